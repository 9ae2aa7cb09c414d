"""LoRA: small trainable matrices beside the frozen ones of a backbone, in training and in files.

    h = W x + alpha / rank * up (down x)                                   Hu et al., arXiv 2106.09685
    with DoRA: rows of W + alpha / rank * up down, scaled to the lengths m  Liu et al., arXiv 2402.09353

peft puts the adapters into the backbone, which stays the S3DiT it was: same calls, same config. In files they travel in
two dialects, both with the factor alpha / rank already inside, so that no reader can apply another one:

- diffusers: `transformer.<module>.lora_A.weight` and `lora_B.weight`, `lora_magnitude_vector` for DoRA;
- ComfyUI: `diffusion_model.<module>.lora.down.weight` and `lora.up.weight` with ComfyUI's own module names. It holds
  query, key and value as one matrix `qkv`, and its first versions with Z-Image passed over LoRA files that name them
  apart. Here they are one pair: the three `down` one below the other, the three `up` as blocks on a diagonal. Old and
  new versions of ComfyUI look for that name, and diffusers' converter takes it apart again.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.backbone.checkpoints import Piece, comfyui_name, first_few, fresh_beside, read_tensors, write_tensors
from zimage_lit.backbone.parallelize import local, place
from zimage_lit.config import did_you_mean
from zimage_lit.errors import UserError, at_least_one

Dialect = Literal["diffusers", "comfyui"]

TRAINED = "default"  # the adapters that a stage trains
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STACKS = ("layers", "noise_refiner", "context_refiner")
PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.")
SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


@dataclass
class LoRASettings:
    """What is adapted, and how strongly. The adapters are float32 whatever the frozen weights are."""

    rank: int = 16  # width of the adapters
    alpha: float | None = None  # their effect is multiplied by alpha / rank; null: by 1
    dropout: float = 0.0  # share of the adapters' inputs that is hidden in training
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"])
    refiners: bool = False  # also in the four refiner blocks, not only in the main ones
    dora: bool = False  # also learn the length of every row of the adapted matrices; slower
    init: Literal["kaiming", "gaussian"] = "kaiming"  # of the inner matrices; the outer ones begin at zero
    base_dtype: Literal["float32", "bfloat16"] | None = None  # of the frozen weights; null: the trainer's

    def __post_init__(self) -> None:
        at_least_one("lora.rank", self.rank)
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha must be positive, not {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must lie in [0, 1), not {self.dropout}.")
        if not self.targets:
            raise UserError("lora.targets is empty: name at least one layer, such as to_q.")

    @property
    def frozen_dtype(self) -> torch.dtype | None:
        return DTYPES[self.base_dtype] if self.base_dtype else None

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass(frozen=True)
class Adapter:
    """What LoRA adds to one matrix (out, in): up @ down; then, where there are magnitudes, rows of that length."""

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank), the factor alpha / rank included
    magnitude: Tensor | None = None  # (out,), DoRA's

    @property
    def rank(self) -> int:
        return len(self.down)

    def merged(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """The adapted matrix in float32."""
        changed = weight.float() + scale * (self.up.float() @ self.down.float())
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude.float() / torch.linalg.vector_norm(changed, dim=1)).unsqueeze(1)


Adapters = dict[str, Adapter]  # by the published name of the module


# --------------------------------------------------------------------------------------------------- in a backbone


@contextmanager
def type_of_base(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, a backbone is made (or read from disk) in the type that its frozen weights shall have; None: as usual."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype or usual)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def apply_lora(backbone: S3DiT, settings: LoRASettings, seed: int = 0, name: str = TRAINED) -> S3DiT:
    """Freeze the backbone and put fresh adapters `name` into it; returns the same object.

    Several adapters of different names share one base; the latest is the active one. On the meta device the adapters
    have no values: call `reset_adapters` once everything has memory, sharded or not.
    Raises UserError for a target that the backbone does not have.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds: only those who use LoRA pay for it

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.rank * settings.scale),
        lora_dropout=settings.dropout,
        target_modules=target_modules(backbone, settings),
        use_dora=settings.dora,
        init_lora_weights=False,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws values of its own
        inject_adapter_in_model(config, backbone, adapter_name=name)
    _adapter_parts_to(backbone, name, torch.float32)
    if backbone.x_pad_token.device.type != "meta":
        reset_adapters(backbone, settings, seed, name)
    return backbone


@torch.no_grad()
def reset_adapters(backbone: S3DiT, settings: LoRASettings, seed: int = 0, name: str = TRAINED) -> None:
    """Seeded fresh values: no effect yet, because every `up` is zero and every magnitude the length of its row."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # the CPU's alone
        for layer in lora_layers(backbone, name).values():
            down, up = _matrices(layer, name)
            # drawn whole, on the CPU whatever the trainer makes tensors on: the same on every device and share of it
            values = torch.empty(down.shape, dtype=torch.float32, device="cpu")
            if settings.init == "kaiming":
                nn.init.kaiming_uniform_(values, a=math.sqrt(5))
            else:
                nn.init.normal_(values, std=1 / settings.rank)
            place(down, values)
            nn.init.zeros_(local(up))
            if settings.dora:  # a share of a matrix is whole rows, of which a share of the magnitudes is the lengths
                base = local(layer.get_base_layer().weight).float()
                local(_magnitude(layer, name)).copy_(torch.linalg.vector_norm(base, dim=1))


def target_modules(backbone: S3DiT, settings: LoRASettings) -> list[str]:
    """The full names of the linear layers that `settings.targets` means, by the end of their name in a block."""
    stacks = STACKS if settings.refiners else STACKS[:1]
    names = [name for name in linear_shapes(backbone) if name.split(".")[0] in stacks]
    ends = {f".{'.'.join(name.split('.')[3:])}" for name in names}
    for target in settings.targets:
        if f".{target}" not in ends and not any(f".{name}".endswith(f".{target}") for name in names):
            known = sorted(end.removeprefix(".") for end in ends)
            raise UserError(
                f"lora.targets: no layer of a block is called {target}{did_you_mean(target, known, 'there are')}."
            )
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in settings.targets)]


def linear_shapes(backbone: S3DiT) -> dict[str, tuple[int, int]]:
    """Published name -> (out, in) of every linear layer of the blocks, adapted or not."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] in STACKS and not is_adapter(name)
    }


def lora_layers(backbone: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Published name -> peft's layer for every module that has the adapter `name` (None: any)."""
    layers = {path: module for path, module in backbone.named_modules() if hasattr(module, "lora_A")}
    return {path: layer for path, layer in layers.items() if name is None or name in layer.lora_A}


def adapters_of(backbone: nn.Module, name: str = TRAINED) -> Adapters:
    """The adapters `name` as they are now; of a sharded backbone every rank has to ask, and gets whole ones."""
    found: Adapters = {}
    for path, layer in lora_layers(backbone, name).items():
        down, up = map(_whole, _matrices(layer, name))
        magnitude = _whole(_magnitude(layer, name)) if name in layer.lora_magnitude_vector else None
        found[path] = Adapter(down, up * layer.scaling[name], magnitude)
    return found


@torch.no_grad()
def add_adapters(backbone: S3DiT, adapters: Adapters, name: str, scale: float = 1.0) -> None:
    """Put finished adapters beside those that are there already, frozen and active, in the type of the base."""
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {f"^{re.escape(path)}": adapter.rank for path, adapter in adapters.items()}
    dora = next(iter(adapters.values())).magnitude is not None
    config = LoraConfig(
        target_modules=list(adapters), rank_pattern=ranks, use_dora=dora, init_lora_weights=False, inference_mode=True
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, backbone, adapter_name=name)
    for path, layer in lora_layers(backbone, name).items():
        down, up = _matrices(layer, name)
        down.copy_(adapters[path].down)
        up.copy_(adapters[path].up)
        layer.scaling[name] = scale
        magnitude = adapters[path].magnitude
        if magnitude is not None:
            _magnitude(layer, name).copy_(magnitude)
    for layer in lora_layers(backbone).values():  # peft has made the new one the only active one
        layer.set_adapter(list(layer.lora_A), inference_mode=True)


def adapter_names(backbone: nn.Module) -> list[str]:
    """The names of the adapters in a backbone, in the order in which they came."""
    return list(dict.fromkeys(name for layer in lora_layers(backbone).values() for name in layer.lora_A))


def share_backbone(backbone: nn.Module, active: str) -> None:
    """Let all adapters of a backbone be trained, whichever is active; peft freezes those that are not. From now on a
    forward has the adapter `active` alone, inside of `with_adapters` others."""
    for layer in lora_layers(backbone).values():
        layer._active_adapter = [active]
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(is_adapter(name))


@contextmanager
def with_adapters(backbone: nn.Module, *names: str, scale: float = 1.0) -> Iterator[None]:
    """Inside, a forward adds the adapters `names` alone, times `scale`; without any it is that of the frozen base.

    A backward through such a forward has to begin inside as well, for checkpointed blocks compute it once more then.
    peft's own `set_adapter` would also freeze what is not active: with that, shards that have been grouped by what is
    trained, and gradients that another adapter has just got, would change their meaning.
    """
    layers = list(lora_layers(backbone).values())
    before = [(layer._active_adapter, dict(layer.scaling)) for layer in layers]
    for layer in layers:
        layer._active_adapter = list(names)
        layer.scaling.update({name: layer.scaling[name] * scale for name in names if name in layer.scaling})
    try:
        yield
    finally:
        for layer, (active, scaling) in zip(layers, before, strict=True):
            layer._active_adapter = active
            layer.scaling.update(scaling)


def active_adapters(backbone: nn.Module) -> list[str]:
    """The names of the adapters that a forward adds, in the order in which they came."""
    active = {name for layer in lora_layers(backbone).values() for name in layer.active_adapters}
    return [name for name in adapter_names(backbone) if name in active]


def _whole(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _matrices(layer: Any, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _magnitude(layer: Any, name: str) -> nn.Parameter:
    return layer.lora_magnitude_vector[name].weight


def _adapter_parts_to(backbone: nn.Module, name: str, dtype: torch.dtype) -> None:
    """peft makes adapters in the type of their base, where small steps of training would vanish."""
    for layer in lora_layers(backbone, name).values():
        for parts in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            if name in parts:
                parts[name].to(dtype)


# --------------------------------------------------------------------------------------- as tensors of a state dict


def is_adapter(name: str) -> bool:
    """Whether the tensor or module of this name belongs to an adapter."""
    return ".lora_" in name


def adapter_of(name: str) -> str | None:
    """The adapter to which the tensor of this name belongs; None: it is not of an adapter."""
    found = re.search(r"\.lora_\w+\.(\w+)\.", name)
    return found and found[1]


def kept_weights(backbone: nn.Module, adapter: str = TRAINED) -> dict[str, Tensor]:
    """What changes in training and is kept in checkpoints: the adapters of that name, all weights of a backbone
    without any adapters."""
    weights: dict[str, Tensor] = backbone.state_dict()
    if not any(map(is_adapter, weights)):
        return weights
    return {name: weight for name, weight in weights.items() if adapter_of(name) == adapter}


def base_weights(backbone: nn.Module) -> dict[str, Tensor]:
    """Published name -> weight without any adapter."""
    state = backbone.state_dict()
    return {name.replace(".base_layer.", "."): weight for name, weight in state.items() if not is_adapter(name)}


def plain_weights(backbone: nn.Module) -> Mapping[str, Tensor]:
    """Published name -> weight, the effect of the active adapters merged in; one at a time, when it is asked for."""
    weights: Mapping[str, Tensor] = base_weights(backbone)
    for name in active_adapters(backbone):
        weights = MergedWeights(weights, adapters_of(backbone, name))
    return weights


class MergedWeights(Mapping[str, Tensor]):
    """Weights with adapters merged in (then float32); neither held nor computed before they are asked for."""

    def __init__(self, base: Mapping[str, Tensor], adapters: Adapters, scale: float = 1.0) -> None:
        self.base, self.adapters, self.scale = base, adapters, scale

    def __getitem__(self, name: str) -> Tensor:
        weight, adapter = self.base[name], self.adapters.get(name.removesuffix(".weight"))
        return weight if adapter is None else adapter.merged(weight, self.scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def check_adapter_types(adapters: Mapping[str, Tensor]) -> None:
    """UserError where the trainer has cast adapters to half, in which small steps of training vanish."""
    if any(is_adapter(name) and weight.dtype != torch.float32 for name, weight in adapters.items()):
        raise UserError(
            "LoRA's adapters are trained in float32: set trainer.precision to bf16-mixed or 32-true, and "
            "model.init_args.lora.base_dtype=bfloat16 to hold the frozen weights in half."
        )


def base_fingerprint(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """A digest of frozen weights, from the first eight numbers of each (as `dtype`): another base has another one.

    Of shards every rank has to ask.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(_whole(weights[name]).flatten()[:8].to("cpu", dtype).float().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- files


def write_lora(
    adapters: Adapters, file: str | Path, dialect: Dialect = "diffusers", dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write adapters as one safetensors file; an older one is replaced when the new one is complete.

    Raises UserError for DoRA in ComfyUI's dialect, and where the file cannot be written.
    """
    file = Path(file).resolve()
    if file.suffix != ".safetensors" or file.is_dir():
        raise UserError(f"cannot write a LoRA to {file}: give a file name that ends in .safetensors.")
    tensors = _diffusers_tensors(adapters) if dialect == "diffusers" else _comfyui_tensors(adapters, file)
    pieces = [Piece(key, tuple(t.shape), dtype, partial(t.to, "cpu", dtype)) for key, t in tensors.items()]
    with fresh_beside(file) as fresh:
        write_tensors(pieces, fresh)
        fresh.replace(file)


def read_lora(file: str | Path, backbone: S3DiT | S3DiTConfig) -> Adapters:
    """The adapters in a file of either dialect (also with `lora_down` / `lora_up`, `lora_unet_…` names and alphas).

    Raises UserError that names the keys which do not belong to a LoRA of this backbone, or whose shapes do not fit.
    """
    file = Path(file)
    return parse_lora(read_tensors(file), linear_shapes(_skeleton(backbone)), str(file))


def parse_lora(
    tensors: Mapping[str, Tensor], shapes: dict[str, tuple[int, int]], place: str, scale: float = 1.0
) -> Adapters:
    """Adapters from named tensors; `shapes` are the (out, in) of the modules, `place` is what errors call the source.

    scale: alpha / rank of the modules for which the tensors themselves say nothing.
    """
    table = _known_names(shapes)
    found: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        stem, role = _stem_and_role(key)
        if stem in table and role:
            found.setdefault(stem, {})[role] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise UserError(f"{place}: {len(unknown)} tensors are no LoRA of this backbone: {first_few(unknown)}.")
    if not found:
        raise UserError(f"{place} holds no LoRA: there is nothing in it.")
    adapters: Adapters = {}
    for stem, parts in found.items():
        for module, adapter in _unfused(stem, table[stem], parts, shapes, place, scale):
            if module in adapters:
                raise UserError(f"{place}: {module} is adapted twice, by {stem} and by another key: keep one of them.")
            adapters[module] = adapter
    if len({adapter.magnitude is None for adapter in adapters.values()}) > 1:
        raise UserError(f"{place}: only some of the adapters have DoRA's magnitudes, which no reader understands.")
    return adapters


def _diffusers_tensors(adapters: Adapters) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, adapter in adapters.items():
        tensors[f"transformer.{module}.lora_A.weight"] = adapter.down
        tensors[f"transformer.{module}.lora_B.weight"] = adapter.up
        if adapter.magnitude is not None:
            tensors[f"transformer.{module}.lora_magnitude_vector"] = adapter.magnitude
    return tensors


def _comfyui_tensors(adapters: Adapters, file: Path) -> dict[str, Tensor]:
    if any(adapter.magnitude is not None for adapter in adapters.values()):
        raise UserError(
            f"cannot write {file}: ComfyUI scales the rows of a DoRA by another rule and would draw other pictures; "
            "export the merged weights (form=comfyui) instead."
        )
    tensors: dict[str, Tensor] = {}
    for module, adapter in adapters.items():
        attention, _, projection = module.rpartition(".to_")
        if projection in ("q", "k", "v"):
            name, (down, up) = f"{attention}.qkv", _fused(adapters, attention)
        else:
            name, down, up = _comfyui_module(module), adapter.down, adapter.up
        tensors[f"diffusion_model.{name}.lora.down.weight"] = down
        tensors[f"diffusion_model.{name}.lora.up.weight"] = up
    return tensors


def _comfyui_module(module: str) -> str:
    return comfyui_name(f"{module}.weight").removesuffix(".weight")


def _fused(adapters: Adapters, attention: str) -> tuple[Tensor, Tensor]:
    """One pair for query, key and value; a projection without adapter gets rows of zeros."""
    parts = [adapters.get(f"{attention}.to_{letter}") for letter in "qkv"]
    present = [part for part in parts if part]
    rows = len(present[0].up)  # all three matrices are square
    up = torch.zeros(3 * rows, sum(part.rank for part in present), dtype=present[0].up.dtype)
    column = 0
    for number, part in enumerate(parts):
        if part:
            up[number * rows : (number + 1) * rows, column : column + part.rank] = part.up
            column += part.rank
    return torch.cat([part.down.cpu() for part in present]), up


def _skeleton(backbone: S3DiT | S3DiTConfig) -> S3DiT:
    if isinstance(backbone, S3DiT):
        return backbone
    with torch.device("meta"):
        return S3DiT(backbone)


def _known_names(shapes: dict[str, tuple[int, int]]) -> dict[str, list[str]]:
    """Every name that a file may give a module (or three fused ones) -> the published names."""
    table: dict[str, list[str]] = {}
    for module in shapes:
        table[module] = table[_comfyui_module(module)] = [module]
        attention, _, projection = module.rpartition(".to_")
        if projection in ("q", "k", "v"):
            table.setdefault(f"{attention}.qkv", []).append(module)
    return table | {f"lora_unet_{name.replace('.', '_')}": modules for name, modules in table.items()}


def _stem_and_role(key: str) -> tuple[str, str | None]:
    """`transformer.layers.0.attention.to_q.lora_A.weight` -> (`layers.0.attention.to_q`, `down`)."""
    plain = key.replace(f".{TRAINED}.", ".")
    for suffix, role in SUFFIXES.items():
        if plain.endswith(suffix):
            stem = plain.removesuffix(suffix)
            prefix = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), "")
            return stem.removeprefix(prefix), role
    return key, None


def _unfused(
    stem: str,
    modules: list[str],
    parts: dict[str, Tensor],
    shapes: dict[str, tuple[int, int]],
    place: str,
    scale: float,
) -> Iterator[tuple[str, Adapter]]:
    """The adapters of the modules that one pair of matrices stands for, shapes checked."""
    for role in ("down", "up"):
        if role not in parts:
            raise UserError(f"{place}: {stem} lacks its {role} matrix: write or download the file again.")
    down, up, magnitude = parts["down"], parts["up"], parts.get("magnitude")
    rows, columns = sum(shapes[module][0] for module in modules), shapes[modules[0]][1]
    fits = down.ndim == up.ndim == 2 and down.shape[1] == columns and up.shape == (rows, len(down))
    if not fits or (magnitude is not None and magnitude.shape != (rows,)):
        raise UserError(
            f"{place}: {stem} has matrices of {tuple(down.shape)} and {tuple(up.shape)}, which do not adapt a layer "
            f"of {rows} x {columns}: it is a LoRA of another backbone."
        )
    factor = parts["alpha"].item() / len(down) if "alpha" in parts else scale
    magnitudes = magnitude.chunk(len(modules)) if magnitude is not None else [None] * len(modules)
    for module, rows_up, rows_magnitude in zip(modules, up.chunk(len(modules)), magnitudes, strict=True):
        used = rows_up.any(dim=0)  # of a fused pair, the columns that are this module's own
        if len(modules) > 1 and used.any():
            yield module, Adapter(down[used], rows_up[:, used] * factor, rows_magnitude)
        else:
            yield module, Adapter(down, rows_up * factor, rows_magnitude)
