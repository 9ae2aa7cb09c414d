"""Who is who in a distillation: a student, the fake score that follows it and their teacher, on one to three networks.

layout      student               fake score                      teacher                 for each parameter
copies      a network             a network                       a frozen network        34 bytes
fake_lora   a network             LoRA on the frozen network      the frozen network      18 bytes, and the LoRA
            LoRA on another one                                                           4 bytes, and both LoRAs
adapters    LoRA on the frozen    another LoRA on the same one    the frozen network      2 bytes, and both LoRAs

With `fake_lora` the student may be a LoRA on a model that has been distilled already (`student_init_from`): for tuning
that without losing its few steps. Bytes with AdamW, float32 masters and the frozen weights in bfloat16; the average of
the student's weights takes 4 more for each of its own.

Whose turn it is never changes what requires a gradient: the turn of one role runs the others without a graph, and
adapters are chosen at each forward.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zimage_lit.backbone import S3DiT
from zimage_lit.backbone.parallelize import fill
from zimage_lit.errors import UserError
from zimage_lit.lora import (
    TRAINED,
    LoRASettings,
    adapter_of,
    base_fingerprint,
    base_weights,
    is_adapter,
    kept_weights,
    share_backbone,
    with_adapters,
)
from zimage_lit.sharded_checkpoints import ShardedTensors
from zimage_lit.stages.initial_weights import misfits, open_weights, read_checkpoint, stage_backbone

Layout = Literal["copies", "fake_lora", "adapters"]
LAYOUTS: tuple[Layout, ...] = ("copies", "fake_lora", "adapters")
FAKE = "fake_score"  # the name of its adapters, and of its tensors in checkpoints


class Roles:
    """The networks of a stage by their role: `student`, `fake_score` and `teacher`.

    Outside of `acting` every network is in the state in which its first role draws: the student's, whoever shares it.
    """

    def __init__(self, layout: Layout, student: S3DiT, fake_score: S3DiT, teacher: S3DiT) -> None:
        self.layout = layout
        self.networks = {"student": student, FAKE: fake_score, "teacher": teacher}

    @contextmanager
    def acting(self, role: str, teacher_share: float = 0.0) -> Iterator[S3DiT]:
        """Inside, the network that is yielded is that of the role; a backward through it has to begin inside, too.

        teacher_share: of the fake score's change to the frozen weights, which the teacher takes over (DynaDG).
        """
        network = self.networks[role]
        if self.layout == "copies" or (self.layout == "fake_lora" and role == "student"):
            yield network
            return
        names = {"student": [TRAINED], FAKE: [FAKE], "teacher": [FAKE] if teacher_share else []}[role]
        with with_adapters(network, *names, scale=teacher_share if role == "teacher" else 1.0):
            yield network

    def adapter(self, role: str) -> str:
        """The name of the adapters that a role would have."""
        return FAKE if role == FAKE else TRAINED

    def trained(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters that the role's optimiser changes, by their names in its network."""
        named = dict(self.networks[role].named_parameters())
        if not any(map(is_adapter, named)):
            return named
        return {name: parameter for name, parameter in named.items() if adapter_of(name) == self.adapter(role)}

    def kept(self, role: str) -> dict[str, Tensor]:
        """What a checkpoint holds of a role."""
        return kept_weights(self.networks[role], self.adapter(role))

    def frozen(self) -> dict[str, Tensor]:
        """The teacher's own weights, by their published names."""
        return base_weights(self.networks["teacher"])


def fingerprints(networks: Mapping[str, S3DiT], lora: LoRASettings | None) -> dict[str, str]:
    """What is frozen -> the digest of its weights, of the networks that `make_networks` has made: a LoRA's base, and
    the teacher where there is one."""
    frozen = {"teacher": networks.get("teacher", networks.get(FAKE)), "student": networks["backbone"] if lora else None}
    return {name: base_fingerprint(base_weights(network)) for name, network in frozen.items() if network is not None}


def check_layout(layout: str, lora: LoRASettings | None, fake_lora: LoRASettings | None, dynamic: bool) -> None:
    """UserError for an unknown layout, and for settings that it has no use for or lacks."""
    key = "model.init_args"
    if layout not in LAYOUTS:
        raise UserError(f"{key}.layout must be one of {', '.join(LAYOUTS)}, not {layout}.")
    if layout != "fake_lora" and (layout == "adapters") != (lora is not None):
        verb = "needs" if layout == "adapters" else "has no use for"
        raise UserError(
            f"{key}.layout={layout} {verb} {key}.lora, the student's: {_cure(layout == 'adapters', 'lora')}"
        )
    if (layout == "copies") == (fake_lora is not None):
        verb = "needs" if layout != "copies" else "has no use for"
        raise UserError(
            f"{key}.layout={layout} {verb} {key}.fake_lora, the fake score's: {_cure(layout != 'copies', 'fake_lora')}"
        )
    if dynamic and layout == "copies":
        raise UserError(
            f"{key}.dynamic_guidance moves the teacher by a share of the fake score's LoRA, which layout=copies does "
            "not have: set layout=fake_lora or adapters, or leave it out."
        )
    for name, settings in (("lora", lora), ("fake_lora", fake_lora)):
        if settings is not None and (settings.base_dtype or settings.dropout):
            raise UserError(
                f"{key}.{name}: dropout must be 0, for it would make noise of what the roles are compared by, and the "
                f"type of the frozen weights is {key}.frozen_dtype, not {name}.base_dtype."
            )


def _cure(needed: bool, name: str) -> str:
    return f"give {name}.rank, say." if needed else f"set {name} to null."


def make_networks(stage: Any) -> dict[str, S3DiT]:
    """The networks of a DMDRModule by the names of its attributes; without a trainer the student's alone, from which
    pictures are drawn. All begin with the weights of `init_from`; the student, where it names any, with those of
    `student_init_from`, and the fake score with its own there, if that is a checkpoint of the same layout."""
    dtype = getattr(torch, stage.frozen_dtype) if stage.frozen_dtype else None
    source, student_source = stage.init_from, stage.student_init_from or stage.init_from
    trains = stage._trainer is not None
    if stage.layout == "adapters":
        adapters = {TRAINED: stage.lora} | ({FAKE: stage.fake_lora} if trains else {})
        networks = {"backbone": stage_backbone(stage, source, adapters, dtype)}
        share_backbone(networks["backbone"], TRAINED)
        return networks
    adapters = {TRAINED: stage.lora} if stage.lora else {}
    networks = {"backbone": stage_backbone(stage, student_source, adapters, dtype if stage.lora else None)}
    if trains and stage.layout == "fake_lora":
        networks[FAKE] = stage_backbone(stage, source, {FAKE: stage.fake_lora}, dtype)
        share_backbone(networks[FAKE], FAKE)
    elif trains:
        networks[FAKE] = stage_backbone(stage, source, {})
        networks["teacher"] = stage_backbone(stage, source, {}, dtype).requires_grad_(False)
    return networks


def continue_from(roles: Roles, path: Path) -> None:
    """Give the roles what a run before this one has taught them, beyond what `make_networks` has filled in.

    path: that `student_init_from` names. Raises UserError where the adapters of a student are not there.
    """
    if path.suffix != ".ckpt":
        if roles.layout == "adapters":
            raise UserError(
                f"student_init_from={path}: with layout=adapters it has to be a checkpoint of such a run (.ckpt)."
            )
        return
    if roles.layout == "adapters":
        fill_role(roles, "student", open_weights(path), path)
    checkpoint = read_checkpoint(path)
    if checkpoint.get("layout") == roles.layout:
        prefix = f"{FAKE}."
        stored: Mapping[str, Tensor] = checkpoint["state_dict"]
        stored = {name.removeprefix(prefix): w for name, w in stored.items() if name.startswith(prefix)}
        fill_role(roles, FAKE, ShardedTensors(path, f"state_dict.{prefix}") if path.is_dir() else stored, path)


def fill_role(roles: Roles, role: str, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy a role's weights from a checkpoint, one at a time; UserError where they are others than it has."""
    if wrong := misfits(roles.kept(role), weights.shapes if isinstance(weights, ShardedTensors) else weights):
        raise UserError(
            f"student_init_from={path}: {len(wrong)} tensors do not fit the {role.replace('_', ' ')}, the first is "
            f"{wrong[0]}; set layout, backbone and LoRA as they were there."
        )
    fill(roles.networks[role], weights)
