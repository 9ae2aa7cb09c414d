"""Rewards: what says how good a picture is. The contract for one's own, and the built-in ones."""

from zimage_lit.rewards.contract import PairwiseReward, RewardCallback, find_rewards
from zimage_lit.rewards.pictures import picture_hash
from zimage_lit.rewards.record import RewardRecord
from zimage_lit.rewards.reward_set import RewardSet

__all__ = ["PairwiseReward", "RewardCallback", "RewardRecord", "RewardSet", "find_rewards", "picture_hash"]
