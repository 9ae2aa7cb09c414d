"""Random generators that depend on what they are for, not on what ran before them."""

import hashlib

import torch


def generator(seed: int, purpose: str, step: int = 0, rank: int = 0) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments.

    A run that is killed and started again draws the same noise at the same step, and two purposes never share a stream.
    Draw on the CPU and move the result: the numbers are then the same on every device.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}/{rank}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
