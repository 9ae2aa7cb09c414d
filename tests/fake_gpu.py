"""A GPU that is not there: torch works out shapes, dtypes and what is kept for the backward, and computes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.attention.varlen as varlen
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_gpu(autocast: bool = False) -> Iterator[None]:
    """Inside, tensors made on "cuda" are fake; `autocast` to bfloat16, as the Trainer's bf16-mixed has it.

    torch.autocast itself does nothing where it sees no GPU, and the attention asks for the GPU's generation.
    """
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(varlen, "_cudnn_version_and_major_capability", lambda index: (None, 9))
        patch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", autocast)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
            torch.clear_autocast_cache()
