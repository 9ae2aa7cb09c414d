"""What is minimised, as pure functions of tensors that know nothing of Lightning."""

from zimage_lit.objectives.timesteps import RenoiseLaw, TimestepLaw

__all__ = ["RenoiseLaw", "TimestepLaw"]
