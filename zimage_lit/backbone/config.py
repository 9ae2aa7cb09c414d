"""Names and numbers of an S3-DiT: the keys of the published `config.json`, and two presets."""

from dataclasses import dataclass, field

from zimage_lit.errors import UserError


@dataclass
class S3DiTConfig:
    """Sizes of one S3-DiT; field names and defaults are those of the published transformer `config.json`.

    `pad_multiple` is ours: the published code fixes it at 32, and only weights trained with 32 behave alike elsewhere.
    Raises UserError for a combination that the architecture does not have.
    """

    all_patch_size: list[int] = field(default_factory=lambda: [2])
    all_f_patch_size: list[int] = field(default_factory=lambda: [1])
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    siglip_feat_dim: int | None = None
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: list[int] = field(default_factory=lambda: [32, 48, 48])
    axes_lens: list[int] = field(default_factory=lambda: [1536, 512, 512])
    pad_multiple: int = 32

    def __post_init__(self) -> None:
        sizes = {
            name: getattr(self, name) for name in ("in_channels", "dim", "n_heads", "cap_feat_dim", "pad_multiple")
        }
        if min(sizes.values()) < 1 or min(self.n_layers, self.n_refiner_layers) < 0:
            raise UserError(f"S3DiTConfig: sizes must be positive, got {sizes}.")
        if self.dim % self.n_heads or sum(self.axes_dims) != self.dim // self.n_heads:
            raise UserError(
                f"S3DiTConfig: axes_dims {self.axes_dims} must add up to the head size, dim / n_heads = "
                f"{self.dim} / {self.n_heads}."
            )
        if any(d % 2 for d in self.axes_dims):
            raise UserError(f"S3DiTConfig: every entry of axes_dims must be even, got {self.axes_dims}.")
        if len(self.all_patch_size) != 1 or self.all_f_patch_size != [1]:
            raise UserError("S3DiTConfig: exactly one entry in all_patch_size and all_f_patch_size [1] are supported.")
        if self.n_kv_heads != self.n_heads or not self.qk_norm:
            raise UserError("S3DiTConfig: the architecture has n_kv_heads == n_heads and qk_norm: true.")
        if self.siglip_feat_dim is not None:
            raise UserError("S3DiTConfig: siglip_feat_dim must be null: image conditioning is not supported.")

    @classmethod
    def preset(cls, name: str) -> "S3DiTConfig":
        """The sizes called `name`; raises UserError that lists the known names."""
        if name not in PRESETS:
            raise UserError(f"unknown backbone preset '{name}': known are {', '.join(sorted(PRESETS))}.")
        return cls(**PRESETS[name])

    @property
    def patch_size(self) -> int:
        return self.all_patch_size[0]

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def modulation_dim(self) -> int:
        """Width of the low-rank conditioning that every block reads."""
        return min(self.dim, 256)

    @property
    def ffn_dim(self) -> int:
        return int(self.dim / 3 * 8)


PRESETS: dict[str, dict] = {
    # Z-Image and Z-Image-Turbo: 6,154,908,736 parameters in 521 tensors.
    "z-image-6b": {},
    # TinyWorld on a laptop: the same architecture, small.
    "tiny": {
        "dim": 128,
        "n_layers": 5,
        "n_refiner_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 4,
        "cap_feat_dim": 128,
        "axes_dims": [8, 12, 12],
        "axes_lens": [1536, 64, 64],
        "pad_multiple": 4,
        "rope_theta": 2.0,  # a picture is four tokens wide: every rate must tell a token from its neighbour
    },
}
