"""S3-DiT weights on disk: the published folder layout and the ComfyUI single file.

A folder holds `config.json` and one safetensors file, or several with an index. A ComfyUI file holds the same tensors
with fused query-key-value weights and shorter names. Reading is strict: a tensor that is missing, left over or of
another shape is an error that names it. Writing goes to a temporary place first, so a full disk spoils nothing.
"""

import json
import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zimage_lit.backbone.config import S3DiTConfig
from zimage_lit.errors import UserError
from zimage_lit.files import parse_json, read_json

if TYPE_CHECKING:
    from zimage_lit.backbone.model import S3DiT

Model = TypeVar("Model", bound="S3DiT")

PUBLISHED_CLASS, OWN_CLASS = "ZImageTransformer2DModel", "S3DiT"
PUBLISHED_WEIGHTS, OWN_WEIGHTS = "diffusion_pytorch_model", "s3dit_model"
LAYOUT_FILE = re.compile(
    rf"config\.json|({PUBLISHED_WEIGHTS}|{OWN_WEIGHTS})(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
# Types that a network can run in, with safetensors' names for them.
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOAT_KINDS = tuple(KINDS.values())

COMFYUI_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
COMFYUI_ATTENTION = {
    "norm_q.weight": "q_norm.weight",
    "norm_k.weight": "k_norm.weight",
    "to_out.0.weight": "out.weight",
}
CONFIG_METADATA = "s3dit_config"


def save(model: "S3DiT", path: str | Path, max_shard_size: int = 10 * 10**9) -> None:
    """Write `model` as the folder `path`, in the parameters' own dtype: see `save_weights`."""
    save_weights(model.state_dict(), model.config, path, max_shard_size=max_shard_size)


def save_weights(
    weights: Mapping[str, Tensor],
    config: S3DiTConfig,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 10 * 10**9,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Write `weights` (published name -> tensor) as the folder `path` in the published layout.

    Tensors are taken from the mapping one at a time and let go once they are written, so a mapping that reads them
    from disk is never in memory as a whole.
    dtype: of the file; None keeps the tensors' own, for which each of them is looked up twice.
    max_shard_size: bytes; more than that is split into numbered files with an index.
    on_bytes: called with the number of bytes after each tensor.

    diffusers pads to 32 tokens and would ignore another `pad_multiple` with a mere warning, drawing wrong pictures.
    A backbone with another `pad_multiple` is therefore written under a class name and file names of our own, which
    diffusers refuses to load.

    An older checkpoint in `path` is replaced in one step once the new one is complete, other files there stay. Raises
    UserError when the disk is full or not writable; the older checkpoint is then untouched.
    """
    folder = Path(path).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot save a backbone to {path}: it is a file, give a folder.")
    foreign = config.pad_multiple != S3DiTConfig.pad_multiple
    described = {"_class_name": OWN_CLASS if foreign else PUBLISHED_CLASS, **asdict(config)}
    if not foreign:
        del described["pad_multiple"]
    shapes = _shapes(config, weights)
    pieces = [_piece(name, [name], weights, shapes, dtype) for name in shapes]
    with fresh_beside(folder) as fresh:
        fresh.mkdir()
        (fresh / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_shards(pieces, config, fresh, OWN_WEIGHTS if foreign else PUBLISHED_WEIGHTS, max_shard_size, on_bytes)
        _replace_folder(fresh, folder)


def load(cls: type[Model], path: str | Path, dtype: torch.dtype | None = None) -> Model:
    """Read a folder in the published layout, a pipeline folder with a `transformer` subfolder, or a ComfyUI file.

    dtype: cast every parameter while reading; None keeps the stored types. The network is on the CPU, in training mode.
    Raises UserError that names the file, and the tensors or keys at fault.
    """
    return _build(cls, stored_weights(path), dtype)


def stored_weights(path: str | Path) -> "StoredWeights":
    """The tensors behind `path` as `load` reads it, found and checked by the files' headers, none of them read yet."""
    path = Path(path)
    if path.is_file():
        return _stored_in_file(path)
    folder = _transformer_folder(path)
    return StoredWeights(read_config(path), _catalogue(_weight_files(folder)), folder)


def read_config(path: str | Path) -> S3DiTConfig:
    """The sizes of the backbone in a folder as `load` reads it; raises UserError that names the file."""
    file = _transformer_folder(Path(path)) / "config.json"
    return _parse_config(read_json(file), str(file))


def export_comfyui(model: "S3DiT", file: str | Path, prefix: str = COMFYUI_PREFIXES[0]) -> None:
    """Write `model` as one ComfyUI file, in the parameters' own dtype: see `export_comfyui_weights`."""
    export_comfyui_weights(model.state_dict(), model.config, file, prefix)


def export_comfyui_weights(
    weights: Mapping[str, Tensor],
    config: S3DiTConfig,
    file: str | Path,
    prefix: str = COMFYUI_PREFIXES[0],
    dtype: torch.dtype | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Write `weights` as one safetensors file in ComfyUI's form: fused qkv, short names, each behind `prefix`.

    `weights`, `dtype` and `on_bytes` as in `save_weights`. The sizes are noted in the file's metadata, so
    `load_comfyui` reads back a model of any size.
    Raises UserError for a `pad_multiple` other than 32, which ComfyUI cannot know, and when the disk is full.
    """
    file = Path(file).resolve()
    if config.pad_multiple != S3DiTConfig.pad_multiple:
        raise UserError(
            f"cannot export to {file}: ComfyUI pads to {S3DiTConfig.pad_multiple} tokens and would draw wrong pictures "
            f"with this backbone's pad_multiple {config.pad_multiple}; save it as a folder instead."
        )
    if file.is_dir():
        raise UserError(f"cannot export to {file}: it is a folder, give a file name that ends in .safetensors.")
    shapes = _shapes(config, weights)
    pieces: list[Piece] = []
    for name in shapes:
        module, _, projection = name.rpartition(".to_")
        if projection == "q.weight":
            parts = [f"{module}.to_{part}.weight" for part in "qkv"]
            pieces.append(_piece(f"{prefix}{module}.qkv.weight", parts, weights, shapes, dtype))
        elif projection not in ("k.weight", "v.weight"):
            pieces.append(_piece(prefix + comfyui_name(name), [name], weights, shapes, dtype))
    with fresh_beside(file) as fresh:
        write_tensors(pieces, fresh, {CONFIG_METADATA: json.dumps(asdict(config))}, on_bytes)
        fresh.replace(file)


def load_comfyui(
    cls: type[Model], file: str | Path, config: S3DiTConfig | None = None, dtype: torch.dtype | None = None
) -> Model:
    """Read a ComfyUI single file, with or without its key prefix; a file with the published names loads as well.

    config: the sizes; None takes them from the metadata that our own files carry, else from the tensors' shapes, which
    is possible for the published head size of 128. rope_theta, t_scale, norm_eps and axes_lens leave no trace in shapes
    and are then the published ones. Raises UserError that names the file, and the tensors at fault; a stray
    `norm_final.weight`, which the network has no use for, is left out with a warning.
    """
    return _build(cls, _stored_in_file(Path(file), config), dtype)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, known from a file's header without reading its data."""

    file: Path
    key: str
    shape: tuple[int, ...]
    kind: str  # safetensors' type name
    part: int = 0  # of several that are stored as one, each of `shape`

    @property
    def rows(self) -> slice:
        return slice(self.part * self.shape[0], (self.part + 1) * self.shape[0])


class StoredWeights(Mapping[str, Tensor]):
    """A backbone on disk: published name -> tensor in the stored type, read when it is asked for and not kept.

    Raises UserError where the stored names or shapes are not those of `config`.
    """

    def __init__(self, config: S3DiTConfig, parts: dict[str, StoredTensor], place: Path) -> None:
        self.config, self.parts, self.place = config, parts, place
        _check_tensors(published_shapes(config), parts, place)

    def __getitem__(self, name: str) -> Tensor:
        part = self.parts[name]
        with _opened(part.file) as handle:
            return handle.get_slice(part.key)[part.rows].clone()  # or it would hang on the file

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def check_kinds(self, cast: bool) -> None:
        """UserError for a stored type that the network cannot run in; float8 may be `cast` to one that it can."""
        for name, part in self.parts.items():
            if part.kind not in FLOAT_KINDS and not (cast and part.kind.startswith("F8")):
                raise UserError(
                    f"{part.file}: '{name}' is stored as {part.kind}, which the network cannot run in; "
                    f"give a dtype to cast float8 weights, or take an unquantised file."
                )


# --- reading ---------------------------------------------------------------------------------------------------------


def _stored_in_file(file: Path, config: S3DiTConfig | None = None) -> StoredWeights:
    """See `load_comfyui`."""
    stored, metadata = _catalogue([file]), _read_metadata(file)
    if config is None and CONFIG_METADATA in metadata:
        place = f"{file} (its metadata)"
        config = _parse_config(parse_json(metadata[CONFIG_METADATA], place), place)
    patch = config.patch_size if config else S3DiTConfig().patch_size
    prefix = next(p for p in COMFYUI_PREFIXES if not p or any(key.startswith(p) for key in stored))
    parts: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        for name, part in _published_parts(key.removeprefix(prefix), tensor, patch):
            if name in parts:
                raise UserError(f"{file}: both '{parts[name].key}' and '{key}' hold the tensor {name}.")
            parts[name] = part
    if "norm_final.weight" in parts:
        warnings.warn(
            f"{file}: '{parts.pop('norm_final.weight').key}' is not part of the network, left out.", stacklevel=4
        )
    return StoredWeights(config or _infer_config(parts, file), parts, file)


def _build(cls: type[Model], stored: StoredWeights, dtype: torch.dtype | None) -> Model:
    """A network without memory of its own, whose parameters become the stored tensors one by one."""
    stored.check_kinds(cast=dtype is not None)
    with torch.device("meta"):
        model = cls(stored.config)
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in stored.items()}
    model.load_state_dict(state, assign=True)
    return model


def _check_tensors(expected: dict[str, tuple[int, ...]], stored: dict[str, StoredTensor], place: Path) -> None:
    """Raise UserError that names what is missing, left over or of another shape."""
    missing = [name for name in expected if name not in stored]
    left_over = [tensor.key for name, tensor in stored.items() if name not in expected]
    misshapen = [
        f"{name} {stored[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    faults = {"missing": missing, "not part of the network": left_over, "of another shape": misshapen}
    told = [f"{len(names)} {fault}: {first_few(names)}" for fault, names in faults.items() if names]
    if told:
        raise UserError(f"{place} does not fit the network's configuration: tensors {'; '.join(told)}.")


def first_few(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _transformer_folder(path: Path) -> Path:
    """`path`, or its `transformer` subfolder when it is a pipeline folder."""
    if not path.is_dir():
        raise UserError(f"no backbone at {path}: the folder does not exist (weights are read from local folders only).")
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"no backbone in {path}: neither config.json nor transformer/config.json is there.")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if it has one."""
    single = [folder / f"{stem}.safetensors" for stem in (PUBLISHED_WEIGHTS, OWN_WEIGHTS)]
    candidates = [p for file in single for p in (file, file.with_name(f"{file.name}.index.json")) if p.is_file()]
    if not candidates:
        raise UserError(f"no weights in {folder}: {single[0].name} or {single[0].name}.index.json is expected there.")
    if len(candidates) > 1:
        raise UserError(
            f"{folder} holds two sets of weights, {candidates[0].name} and {candidates[1].name}: remove one."
        )
    if candidates[0].suffix == ".safetensors":
        return candidates
    index = read_json(candidates[0])
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{candidates[0]}: not an index of shards, 'weight_map' is missing; download or save it again.")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise UserError(f"{folder}: {len(absent)} of {len(shards)} shards missing: {first_few(absent)}.")
    return shards


def _catalogue(files: list[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the files by its stored name."""
    catalogue: dict[str, StoredTensor] = {}
    for file in files:
        with _opened(file) as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                if key in catalogue:
                    raise UserError(f"'{key}' is stored both in {catalogue[key].file} and in {file.name}.")
                part = handle.get_slice(key)
                catalogue[key] = StoredTensor(file, key, tuple(part.get_shape()), part.get_dtype())
    return catalogue


@contextmanager
def _opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a readable safetensors file ({error}): it may be incomplete, fetch or save it again."
        ) from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by their stored names; UserError where it cannot be read."""
    if not file.is_file():
        raise UserError(f"there is no file {file}.")
    with _opened(file) as handle:
        return {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118 (not a dict)


def _read_metadata(file: Path) -> dict[str, str]:
    with _opened(file) as handle:
        return handle.metadata() or {}


def _parse_config(content: dict, place: str) -> S3DiTConfig:
    """Keys that start with `_` are notes of the writer; any other must be a field of the right type."""
    written_by = content.get("_class_name", PUBLISHED_CLASS)
    if written_by not in (PUBLISHED_CLASS, OWN_CLASS):
        raise UserError(f"{place} describes a {written_by}, not an S3-DiT ({PUBLISHED_CLASS}).")
    values = {key: value for key, value in content.items() if not key.startswith("_")}
    defaults = asdict(S3DiTConfig())
    unknown = [key for key in values if key not in defaults]
    if unknown:
        raise UserError(f"{place}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(defaults))}.")
    for key, value in values.items():
        if not _same_type(value, defaults[key], least=0 if key.endswith("_layers") else 1):
            raise UserError(f"{place}: {key} cannot be {value!r}, it is something like {defaults[key]!r}.")
    try:
        return S3DiTConfig(**values)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _same_type(value: object, default: object, least: int) -> bool:
    """Whether value may stand where default stands; sizes are at least `least`, an integer may stand for a float."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, list):
        return isinstance(value, list) and all(_same_type(entry, default[0], least) for entry in value)
    if default is None:
        return value is None or isinstance(value, int)
    if isinstance(default, int):
        return isinstance(value, int) and value >= least
    return isinstance(value, int | float)


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: all that a file's header says of it, and where to get it when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _shapes(config: S3DiTConfig, weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the network, in its own order; UserError where `weights` has other names."""
    shapes = published_shapes(config)
    faults = {"missing": shapes.keys() - weights.keys(), "not part of the network": weights.keys() - shapes.keys()}
    told = [f"{len(names)} {fault}: {first_few(sorted(names))}" for fault, names in faults.items() if names]
    if told:
        raise UserError(f"the weights cannot be saved as a backbone of these sizes: tensors {'; '.join(told)}.")
    return shapes


def published_shapes(config: S3DiTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a backbone of these sizes, in its own order; nothing is allocated."""
    from zimage_lit.backbone.model import S3DiT  # which imports this module

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in S3DiT(config).state_dict().items()}


def _piece(
    key: str,
    names: list[str],
    weights: Mapping[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype | None,
) -> Piece:
    """The tensor `key` of a file: `names` of the network, one below the other."""
    kind = dtype or weights[names[0]].dtype

    def read() -> Tensor:
        parts: list[Tensor] = []
        for name in names:
            part = weights[name].detach()
            if tuple(part.shape) != shapes[name]:
                raise UserError(f"the tensor {name} has the shape {tuple(part.shape)} instead of {shapes[name]}.")
            parts.append(part.to("cpu", kind))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    rows = sum(shapes[name][0] for name in names)
    return Piece(key, (rows, *shapes[names[0]][1:]), kind, read)


def _write_shards(
    pieces: list[Piece],
    config: S3DiTConfig,
    folder: Path,
    stem: str,
    max_shard_size: int,
    on_bytes: Callable[[int], object] | None,
) -> None:
    """The parameters in order, as many a file as fit; an index beside them when there are several files."""
    metadata = {CONFIG_METADATA: json.dumps(asdict(config))}
    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if shards[-1] and filled + piece.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += piece.nbytes
    if len(shards) == 1:
        write_tensors(pieces, folder / f"{stem}.safetensors", metadata, on_bytes)
        return
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, start=1):
        shard = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(members, folder / shard, metadata, on_bytes)
        weight_map |= dict.fromkeys((piece.key for piece in members), shard)
    index = {"metadata": {"total_size": sum(piece.nbytes for piece in pieces)}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def write_tensors(
    pieces: Sequence[Piece],
    file: Path,
    metadata: dict[str, str] | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """A safetensors file: eight bytes for the header's length, the header as JSON, the tensors one after the other.

    The library's own writer wants all tensors at once; this one holds one at a time.
    Source: the format's description in the README of huggingface/safetensors.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for piece in pieces:
        start, end = end, end + piece.nbytes
        header[piece.key] = {"dtype": KINDS[piece.dtype], "shape": piece.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            stream.write(piece.read().contiguous().flatten().view(torch.uint8).numpy().data)
            if on_bytes:
                on_bytes(piece.nbytes)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def fresh_beside(target: Path) -> Iterator[Path]:
    """A name to write to before it takes the place of `target`, on the same disk; nothing stays behind on failure."""
    fresh = target.with_name(f".{target.name}.saving-{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield fresh
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"could not save to {target} ({error}): what was there before is unchanged; free some space or choose "
            f"another place."
        ) from error
    finally:
        if fresh.is_dir():
            shutil.rmtree(fresh)
        elif fresh.exists():
            fresh.unlink()


def _replace_folder(fresh: Path, target: Path) -> None:
    """Put a complete folder in the place of `target`; files there that are not part of a checkpoint move over."""
    if not target.exists():
        fresh.rename(target)
        return
    old = fresh.with_name(fresh.name.replace(".saving-", ".replaced-"))
    target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target)
        raise
    for item in old.iterdir():
        if not LAYOUT_FILE.fullmatch(item.name):
            item.rename(target / item.name)
    shutil.rmtree(old)


# --- ComfyUI names ---------------------------------------------------------------------------------------------------


def comfyui_name(name: str) -> str:
    """`all_x_embedder.2-1.bias` -> `x_embedder.bias`, `….attention.norm_q.weight` -> `….attention.q_norm.weight`."""
    for part in ("x_embedder", "final_layer"):
        if name.startswith(f"all_{part}."):
            return f"{part}.{name.split('.', 2)[2]}"
    return _renamed_attention(name, COMFYUI_ATTENTION)


def _published_parts(key: str, tensor: StoredTensor, patch: int) -> Iterator[tuple[str, StoredTensor]]:
    """The published name of a ComfyUI key and where its data lie; a fused qkv weight yields three, others one.

    Names are matched whole, so a key that has the published name already passes unchanged.
    """
    module, fused, _ = key.rpartition(".attention.qkv.weight")
    if fused and key.endswith(fused) and tensor.shape[0] % 3 == 0:
        size = tensor.shape[0] // 3
        for part, letter in enumerate("qkv"):
            yield f"{module}.attention.to_{letter}.weight", replace(tensor, shape=(size, *tensor.shape[1:]), part=part)
        return
    for end in ("x_embedder", "final_layer"):
        if key.startswith(f"{end}."):
            key = f"all_{end}.{patch}-1.{key.removeprefix(f'{end}.')}"
    yield _renamed_attention(key, {short: long for long, short in COMFYUI_ATTENTION.items()}), tensor


def _renamed_attention(name: str, table: dict[str, str]) -> str:
    module, attention, leaf = name.rpartition(".attention.")
    return module + attention + table.get(leaf, leaf)


def _infer_config(tensors: dict[str, StoredTensor], file: Path) -> S3DiTConfig:
    """The sizes that the tensors' shapes show, everything else as published."""
    published = S3DiTConfig()

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"{file}: '{name}' is missing, so this is not a Z-Image backbone.")
        return tensors[name].shape

    def blocks(stack: str) -> int:
        return len({name.split(".")[1] for name in tensors if name.startswith(f"{stack}.")})

    dim, patch_dim = shape(f"all_x_embedder.{published.patch_size}-1.weight")
    (head_dim,) = shape("layers.0.attention.norm_q.weight")
    if head_dim != published.head_dim or dim % head_dim:
        raise UserError(
            f"{file}: the sizes cannot be told from the tensors (width {dim}, head size {head_dim}; only head size "
            f"{published.head_dim} is known): give a config."
        )
    return S3DiTConfig(
        in_channels=patch_dim // published.patch_size**2,
        dim=dim,
        n_layers=blocks("layers"),
        n_refiner_layers=blocks("noise_refiner"),
        n_heads=dim // head_dim,
        n_kv_heads=dim // head_dim,
        cap_feat_dim=math.prod(shape("cap_embedder.0.weight")),
    )
