"""How a backbone is made to fit: activation checkpointing, compiling, sharding, in this order; and filling its shards.

The network knows nothing of it: checkpointing and compiling replace the `forward` of single blocks, so that no module,
name or hook changes, and sharding turns the parameters into DTensors where they are. A block's hooks (they gather its
weights) run outside of the replaced `forward`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from zimage_lit.backbone import attention
from zimage_lit.errors import UserError

if TYPE_CHECKING:
    from zimage_lit.backbone.model import S3DiT

Checkpointing = Literal["none", "selective", "full"]
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")  # of a trainer whose memory is sharded or planned


@dataclass
class ParallelizeSettings:
    """What is traded for memory and speed; none of it changes what is learned."""

    activation_checkpointing: Checkpointing = "none"  # selective: keep products and attention; full: blocks' inputs
    compile: bool = False  # compile each block: a minute or more at the first steps
    compile_backend: str = "inductor"  # of torch.compile

    def __post_init__(self) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if self.compile_backend not in known:
            raise UserError(
                f"parallelize.compile_backend must be one of {', '.join(known)}, not {self.compile_backend}."
            )


def parallelize(
    backbone: "S3DiT", mesh: DeviceMesh | None, settings: ParallelizeSettings, precision: str = "32-true"
) -> None:
    """Prepare `backbone` in place; with a mesh every parameter becomes a DTensor, also those still on the meta device.

    mesh: (shard,) or (replicate, shard); None leaves the network whole. precision: of the trainer.
    """
    checkpoint_activations(backbone, settings.activation_checkpointing)
    if settings.compile:
        compile_blocks(backbone, settings.compile_backend)
    if mesh is not None:
        shard(backbone, mesh, precision)


def blocks_of(backbone: "S3DiT") -> Iterator[nn.Module]:
    """The units of all three steps, in the order in which they run."""
    for stack in (backbone.noise_refiner, backbone.context_refiner, backbone.layers):
        yield from stack


# ---------------------------------------------------------------------------------------------------- checkpointing

ATEN = torch.ops.aten
# Worth their memory: everything else in a block is cheap to do again.
SAVED_OPERATIONS = {
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN.bmm.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
if attention.varlen_attn is not None and hasattr(torch.ops.torch_attn, "_varlen_attn"):  # its name is torch's own
    SAVED_OPERATIONS.add(torch.ops.torch_attn._varlen_attn.default)


def checkpoint_activations(backbone: "S3DiT", mode: Checkpointing) -> None:
    """Keep less of each block for the backward pass and compute the rest again there."""
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products)
    for block in blocks_of(backbone):
        options["preserve_rng_state"] = any(isinstance(module, nn.Dropout) for module in block.modules())  # of a LoRA
        block.forward = checkpointed(block.forward, options)


def checkpointed(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    options = dict(options)

    def run(*args: Any) -> Tensor:
        return cast(Tensor, checkpoint(forward, *args, **options))

    return run


def keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = operation in SAVED_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


# ---------------------------------------------------------------------------------------------------- compiling


def compile_blocks(backbone: "S3DiT", backend: str) -> None:
    """Each block by itself: equal blocks share their code, and weights are gathered between them, outside of it."""
    for block in blocks_of(backbone):
        block.forward = torch.compile(block.forward, backend=backend)


# ---------------------------------------------------------------------------------------------------- sharding


def shard(backbone: "S3DiT", mesh: DeviceMesh, precision: str) -> None:
    """Each block is gathered for itself; what lies outside of the blocks, small parts, makes one group at the root.

    Nothing is cast on the way in: the network casts by itself, and t in bfloat16 would lose its last digits before it
    is multiplied by 1000.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(backbone):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Not torch's default: after a forward without a backward (a picture drawn) the root's weights would stay gathered,
    # and the next forwards would use that copy, whatever an optimiser or an average has done to the shards since.
    fully_shard(backbone, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def own_rows(tensor: DTensor) -> slice:
    """The rows of the whole tensor that this rank holds."""
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_shard(0):
            rows = tensor.shape[0]
            size = -(-rows // tensor.device_mesh.size(dimension))
            start = min(size * tensor.device_mesh.get_local_rank(dimension), rows)
            return slice(start, min(start + size, rows))
    return slice(None)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, to be changed in place."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(like: Tensor, whole: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor placed as `like` is, on its device and of its type if none is given, made of `whole` without
    communication."""
    dtype = dtype or like.dtype
    if not isinstance(like, DTensor):
        return whole.to(like.device, dtype, copy=True)
    part = whole[own_rows(like)].to(like.device, dtype, copy=True)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def fill(backbone: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy this rank's parts of `weights`, which are read one at a time; what they do not have keeps its value."""
    for name, target in published(backbone).items():
        if name in weights:
            place(target, weights[name])


def published(backbone: nn.Module) -> dict[str, Tensor]:
    """The weights by the names that they have in files, also where an adapter has been put around a layer."""
    return {name.replace(".base_layer.", "."): weight for name, weight in backbone.state_dict().items()}


def place(target: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of `whole`."""
    local(target).copy_(whole[own_rows(target)] if isinstance(target, DTensor) else whole)


@torch.no_grad()
def fill_fresh(backbone: nn.Module, twin: "S3DiT", seed: int) -> None:
    """Fill shards with what a whole backbone built under this seed would begin with, one whole tensor at a time.

    twin: a backbone of the same sizes on the meta device.
    """
    targets = published(backbone)
    by_identity = {id(parameter): targets[name] for name, parameter in twin.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        for module in twin.modules():
            if isinstance(module, nn.Linear):  # draws twice: when it is made, and when the network resets it
                nn.Linear(module.in_features, module.out_features, module.bias is not None, device="cpu")
        with WholeDraws(by_identity):
            twin.reset_parameters()


class WholeDraws(TorchDispatchMode):
    """What initialisation draws for a parameter is drawn whole, on the CPU, put into its shards and forgotten.

    targets: `id` of the parameter that is initialised -> the shards.
    """

    OPERATIONS = (ATEN.uniform_, ATEN.normal_, ATEN.fill_)

    def __init__(self, targets: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.targets = targets

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in self.OPERATIONS or id(args[0]) not in self.targets:
            return func(*args, **(kwargs or {}))
        whole = torch.empty(args[0].shape, dtype=args[0].dtype, device="cpu")
        func(whole, *args[1:], **(kwargs or {}))
        place(self.targets[id(args[0])], whole)
        return args[0]


def gathered(backbone: nn.Module, keep: bool) -> dict[str, Tensor]:
    """All weights whole, on the CPU, where `keep` is set; every rank has to call it, tensor by tensor is gathered."""
    whole: dict[str, Tensor] = {}
    for name, tensor in backbone.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.cpu()
    return whole
