"""Weights that a stage's network had at an earlier time: the reference of a penalty, or the policy that drew samples.

kind        with LoRA                              without                         in checkpoints
fixed       the frozen weights, adapters off       a frozen copy of the network    its fingerprint alone
follows     adapters of its own beside those       a frozen copy of the network    itself
            that are trained

`fixed` are the weights with which a run begins: a LoRA's adapters have no effect then. `follows` begins with the same
and is moved by `Snapshot.follow`. Nobody's optimiser sees any of them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from zimage_lit.backbone import S3DiT
from zimage_lit.backbone.parallelize import local
from zimage_lit.errors import UserError
from zimage_lit.lora import TRAINED, LoRASettings, adapter_of, base_fingerprint, kept_weights, with_adapters
from zimage_lit.objectives.distillation import blend
from zimage_lit.stages.initial_weights import stage_backbone

SnapshotKind = Literal["fixed", "follows"]
FrozenType = Literal["float32", "bfloat16"]


class Snapshot:
    """One of a stage's snapshots.

    trained: the network in training.   network: the one that has the snapshot's weights, the same with LoRA.
    adapter: with LoRA, the name of its own adapters; None: it has none.
    """

    def __init__(self, kind: SnapshotKind, trained: S3DiT, network: S3DiT, adapter: str | None = None) -> None:
        self.kind = kind
        self.trained, self.network, self.adapter = trained, network, adapter
        is_copy = kind == "fixed" and network is not trained
        self.fingerprint = base_fingerprint(network.state_dict()) if is_copy else ""
        self.dtype = str(next(network.parameters()).dtype).removeprefix("torch.") if is_copy else ""

    @contextmanager
    def acting(self) -> Iterator[S3DiT]:
        """Inside, the network that is yielded has these weights, and nothing that it computes has a gradient."""
        with torch.no_grad():
            if self.network is not self.trained:
                yield self.network
                return
            with with_adapters(self.network, *([self.adapter] if self.adapter else [])):
                yield self.network

    def follow(self, decay: float) -> None:
        """weights <- decay * weights + (1 - decay) * those in training; 0 makes it the policy of now, 1 changes
        nothing."""
        if self.kind == "fixed":
            raise ValueError("A fixed snapshot does not follow.")
        blend(map(local, self.kept().values()), map(local, kept_weights(self.trained, TRAINED).values()), decay)

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {} if self.kind == "fixed" else kept_weights(self.network, self.adapter or TRAINED)


def adapters_of_stage(lora: LoRASettings | None, kinds: Mapping[str, SnapshotKind]) -> dict[str, LoRASettings]:
    """All adapters that a stage's backbone needs, those of the snapshots included; the trained ones come last, for the
    latest is the active one."""
    if lora is None:
        return {}
    return {name: lora for name, kind in kinds.items() if kind == "follows"} | {TRAINED: lora}


def make_snapshots(
    stage: Any, kinds: Mapping[str, SnapshotKind], frozen_dtype: FrozenType | None
) -> dict[str, Snapshot]:
    """The snapshots of a BackboneStage whose backbone has `adapters_of_stage`, by their names.

    A copy of the network becomes the stage's attribute of the snapshot's name, made like the backbone from `init_from`;
    a fixed one in `frozen_dtype` (None: the trainer's type).
    """
    snapshots = {}
    for name, kind in kinds.items():
        network, follows = stage.backbone, kind == "follows"
        if not stage.lora:
            dtype = getattr(torch, frozen_dtype) if frozen_dtype and not follows else None
            network = stage_backbone(stage, stage.init_from, {}, dtype).requires_grad_(False)
            setattr(stage, name, network)
        own = name if stage.lora and follows else None
        for parameter_name, parameter in stage.backbone.named_parameters():
            if own and adapter_of(parameter_name) == own:  # peft leaves it to be trained, inactive as it is
                parameter.requires_grad_(False)
        snapshots[name] = Snapshot(kind, stage.backbone, network, own)
    return snapshots


def check_frozen_dtype(
    frozen_dtype: FrozenType | None, lora: LoRASettings | None, kinds: Mapping[str, SnapshotKind]
) -> None:
    """UserError for the type of a frozen copy where there is none."""
    if frozen_dtype is not None and (lora is not None or "fixed" not in kinds.values()):
        cure = "the frozen weights' type is model.init_args.lora.base_dtype" if lora else "no reference is asked for"
        raise UserError(
            f"model.init_args.frozen_dtype={frozen_dtype} is of a frozen copy of the whole network, and there is none "
            f"({cure}): set it to null."
        )


def check_snapshots(checkpoint: dict[str, Any], snapshots: Mapping[str, Snapshot], init_from: str | None) -> None:
    """UserError where a checkpoint was trained beside other snapshots than those here."""
    stored: dict[str, str] = checkpoint.get("snapshots", {})
    if stored.keys() != snapshots.keys():
        raise UserError(
            f"the checkpoint to continue from is of a run that kept {listed(stored)}, and this one keeps "
            f"{listed(snapshots)}: set the stage, its method and penalties back to what they were, or begin a new run "
            "from its weights with model.init_args.init_from."
        )
    types: dict[str, str] = checkpoint.get("snapshot_types", {})
    for name, snapshot in snapshots.items():
        if types.get(name, snapshot.dtype) != snapshot.dtype:
            raise UserError(
                f"the checkpoint was trained beside a {name.replace('_', ' ')} in {types[name]}, and this run has it "
                f"in {snapshot.dtype}: set model.init_args.frozen_dtype (where that is null, trainer.precision) back."
            )
    if any(stored[name] != snapshot.fingerprint for name, snapshot in snapshots.items()):
        raise UserError(
            f"the checkpoint was trained beside another reference than the weights of init_from={init_from}: put the "
            "right ones back there, or name them."
        )


def listed(names: Mapping[str, Any]) -> str:
    return " and ".join(name.replace("_", " ") for name in names) or "no earlier weights"
