"""FSDP2 as a strategy of the trainer: `trainer.strategy: fsdp2`."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import empty as empty_dtensor

from zimage_lit import sharded_checkpoints as sharded
from zimage_lit.backbone.parallelize import PRECISIONS, own_part, place
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.stages.initial_weights import check_weights, read_checkpoint


class FSDP2Strategy(ModelParallelStrategy):
    """Every rank trains on data of its own and keeps a share of the weights, gradients, optimiser and average.

    The stage shards its network in `configure_model`, over `self.device_mesh`: (shard,), or (replicate, shard) with
    `replicate` above 1. A parameter that is trained and was not sharded is an error, for nothing would keep it equal on
    all ranks. Checkpoints are folders in which each rank writes its share; they load on any number of ranks, and so do
    checkpoint files of a single process.

    replicate: HSDP: as many groups hold the whole model each, sharded inside; set it to the number of nodes where the
        network between them is slow.   timeout_minutes: how long ranks wait for one another (for the first one's
        exports, say) before they give up.
    """

    def __init__(self, replicate: int = 1, timeout_minutes: float = 30) -> None:
        super().__init__(timeout=timedelta(minutes=timeout_minutes))
        self.replicate = at_least_one("trainer.strategy: replicate", replicate)

    # ------------------------------------------------------------------------------------------------ setting up

    def setup_environment(self) -> None:
        # Lightning's own default would shard nothing on a single node and give all ranks the same data
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        if self._data_parallel_size % self.replicate:
            raise UserError(
                f"trainer.strategy: replicate={self.replicate} does not divide the {self._data_parallel_size} devices "
                "of the run (trainer.devices times trainer.num_nodes) into equal groups."
            )
        super().setup_environment()
        sizes = (self.world_size,) if self.replicate == 1 else (self.replicate, self.world_size // self.replicate)
        self._device_mesh = init_device_mesh(
            self.root_device.type, sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :]
        )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup(self, trainer: Trainer) -> None:
        precision = self.precision_plugin.precision
        if precision not in PRECISIONS:
            raise UserError(f"trainer.strategy=fsdp2 knows trainer.precision={', '.join(PRECISIONS)}, not {precision}.")
        assert self.lightning_module is not None
        whole = [
            name
            for name, parameter in self.lightning_module.named_parameters()
            if parameter.requires_grad and not isinstance(parameter, DTensor)
        ]
        if whole:
            raise UserError(
                f"{type(self.lightning_module).__name__} does not shard {len(whole)} of its parameters, the first is "
                f"{whole[0]}, and nothing would keep them equal on all ranks: shard them in configure_model "
                "(zimage_lit.backbone.parallelize does so), or leave out trainer.strategy=fsdp2."
            )
        super().setup(trainer)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Each rank's share, by the stage's own names; torch would ask for parameters of these names."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the folder `filepath`, which must not exist; OSError on every rank where any rank fails."""
        path = Path(self.broadcast(filepath))
        weights, optimizers = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states", [])
        tensors, rest = sharded.split(checkpoint, DTensor)  # the average of the weights
        tensors["state_dict"] = weights
        rest["optimizer_states"] = []
        for number, state in enumerate(optimizers):
            tensors[f"optimizer_{number}"], without = sharded.split(state)
            rest["optimizer_states"].append(without)
        self.on_first_rank(lambda: path.mkdir(parents=True))
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path))  # waits until the files are on the disk
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise first if isinstance(first, OSError) else OSError(str(first).splitlines()[0]) from error
        self.on_first_rank(lambda: _save_synced(rest, path / sharded.META))

    def on_first_rank(self, action: Callable[[], Any]) -> None:
        """Do something on rank 0 alone; where it fails with an OSError, all ranks raise that."""
        failure: OSError | None = None
        if self.is_global_zero:
            try:
                action()
            except OSError as error:
                failure = error
        if (failure := self.broadcast(failure)) is not None:
            raise failure

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimisers go to where they belong, the rest is returned; from a folder, or from a file.

        Raises UserError for a checkpoint that is not whole, or of another network or optimiser.
        """
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = read_checkpoint(path)
        assert self.lightning_module is not None
        check_snapshots: Any = getattr(self.lightning_module, "check_snapshots", None)
        if check_snapshots is not None:  # first: it knows why names differ
            check_snapshots(checkpoint)
        check_weights(checkpoint["state_dict"], self.lightning_module.state_dict())
        if path.is_dir():
            self._load_folder(path, checkpoint)
        else:
            self._load_file(checkpoint)
        return checkpoint

    def _load_folder(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Fill `checkpoint` up with the tensors that its folder keeps beside weights and optimisers."""
        assert self.lightning_module is not None and self.model is not None
        reader = sharded.TensorReader(path)
        optimizers = [get_optimizer_state_dict(self.model, optimizer) for optimizer in self.optimizers]
        tensors: dict[str, Any] = {"state_dict": self.lightning_module.state_dict()}
        for number, state in enumerate(optimizers):
            tensors[f"optimizer_{number}"], _ = sharded.split(state)
        stored = reader.entries
        wanted = sharded.flat(tensors)
        if missing := [name for name in wanted if name not in stored]:
            raise UserError(
                f"{path} was written with another optimizer: it lacks {len(missing)} tensors, the first is "
                f"{missing[0]}; set that back, or begin a new run from its weights with model.init_args.init_from."
            )
        own = ("state_dict.", *(f"optimizer_{number}." for number in range(len(checkpoint["optimizer_states"]))))
        kept = {
            name: empty_dtensor(
                entry.size,
                dtype=entry.properties.dtype,
                device_mesh=self.device_mesh,
                placements=[Shard(0)] if self.device_mesh.ndim == 1 else [Replicate(), Shard(0)],
            )
            for name, entry in stored.items()
            if not name.startswith(own)
        }
        sharded.load({**wanted, **kept}, reader)
        for number, (optimizer, without) in enumerate(
            zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ):
            set_optimizer_state_dict(
                self.model, optimizer, optim_state_dict=sharded.joined(tensors[f"optimizer_{number}"], without)
            )
        for name, tensor in kept.items():
            _insert(checkpoint, reader.index.planner_data[name], tensor)

    def _load_file(self, checkpoint: dict[str, Any]) -> None:
        """Each rank takes its parts out of the tensors of a single process, which stay on the disk until then."""
        assert self.lightning_module is not None
        with torch.no_grad():
            for name, target in self.lightning_module.state_dict().items():
                place(target, checkpoint["state_dict"][name])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                number: {
                    key: own_part(parameters[number], value) if _same_shape(parameters[number], value) else value
                    for key, value in of_one.items()
                }
                for number, of_one in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})


def _same_shape(parameter: torch.Tensor, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _insert(state: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        state = state.setdefault(key, {})
    state[keys[-1]] = value


def _save_synced(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallelism, second version")
