"""Where the time of reinforcement learning goes, and what packed roll-outs gain.

    python benchmarks/rl.py                                            # CPU, a few minutes on two cores
    python benchmarks/rl.py --method nft
    python benchmarks/rl.py --device cuda --preset z-image-6b --lora 32 --canvases 1024x1024 768x1344 1344x768

A GRPOModule with random weights (open gates, so that no part is idle) and TinyWorld's prompts, codec, text encoder and
reward. Two questions, in one process, on the same network and prompts:

    roll-outs    pictures a second: packed, that is, --batch-size pictures of any prompts and sizes in one forward; one
                 prompt at a time, its group in one forward; with --singly also one picture at a time. They take turns,
                 and the ratio of each turn enters the median: a ratio says more than seconds on a machine with other
                 work. A picture has its own noise, so all of them draw the same pictures, which is checked.
    iterations   the share of roll-out, reward and update in a step of training, by the stage's own clock

Seconds of roll-outs are the wall's on a GPU, the processor's on a CPU, which others may use too (with --threads 1: what
waits for other threads counts as work). Prints a table and one line of JSON.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from data_modules.tinyworld.prepare import prepare
from data_modules.tinyworld.world import draw
from zimage_lit.backbone import S3DiT
from zimage_lit.components import PatchPCACodec, Qwen3TextEncoder
from zimage_lit.lora import LoRASettings
from zimage_lit.rewards.tinyworld import TinyWorldReward
from zimage_lit.stages import GRPOModule
from zimage_lit.stages.grpo_settings import GroupRolloutSettings
from zimage_lit.stages.initial_weights import backbone_config

PARTS = ("rollout", "reward", "update")


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        watch = Watch(options)
        trainer = Trainer(
            max_steps=options.iterations + 1,
            accelerator="gpu" if options.device == "cuda" else "cpu",
            devices=1,
            precision=options.precision,
            callbacks=[TinyWorldReward(), watch],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = [draw_batch(options, number) for number in range(options.iterations + 1)]
        trainer.fit(build_stage(options, Path(folder)), torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    report(options, watch)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "z-image-6b"], default="tiny")
    parser.add_argument("--layers", type=int, help="fewer main blocks than the preset has")
    parser.add_argument("--method", choices=["grpo", "nft"], default="grpo")
    parser.add_argument("--lora", type=int, help="rank; all weights are trained without it")
    parser.add_argument("--prompts", type=int, default=16, help="in one iteration")
    parser.add_argument("--group-size", type=int, default=12, help="pictures of a prompt")
    parser.add_argument("--batch-size", type=int, default=96, help="pictures in one packed forward")
    parser.add_argument("--steps", type=int, default=10, help="network evaluations of a picture")
    parser.add_argument("--canvases", nargs="+", default=["64x64"], help="WIDTHxHEIGHT in pixels, in turn")
    parser.add_argument("--singly", action="store_true", help="time roll-outs of one picture at a time, too")
    parser.add_argument("--turns", type=int, default=3, help="timed roll-outs of each kind, after one to warm up")
    parser.add_argument("--iterations", type=int, default=3, help="timed, after one to warm up")
    parser.add_argument("--precision", default="bf16-mixed", help="the trainer's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="for weights and data while it runs; the system's, where none is given")
    return parser.parse_args()


def build_stage(options: argparse.Namespace, folder: Path) -> GRPOModule:
    """A stage that begins with random weights; the embedded codec has the published one's geometry."""
    prepare(folder / "tinyworld", num_samples=1, num_val_samples=1, num_workers=1)
    encoder = Qwen3TextEncoder(folder / "tinyworld" / "text_encoder")
    sizes: dict[str, Any] = {"preset": options.preset, "cap_feat_dim": encoder.dim}
    sizes |= {"n_layers": options.layers} if options.layers else {}
    torch.manual_seed(options.seed)
    with torch.device(options.device):
        model = S3DiT(backbone_config(sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder / "backbone")
    del model
    return GRPOModule(
        encoder,
        PatchPCACodec(folder / "tinyworld" / "codec"),
        backbone=sizes,
        init_from=str(folder / "backbone"),
        method=options.method,
        rollout=GroupRolloutSettings(options.steps, group_size=options.group_size, batch_size=options.batch_size),
        canvases=canvases(options),
        lora=LoRASettings(rank=options.lora) if options.lora else None,
    )


def canvases(options: argparse.Namespace) -> list[tuple[int, int]]:
    """(width, height) in pixels."""
    return [tuple(map(int, canvas.split("x"))) for canvas in options.canvases]  # type: ignore[misc]


def draw_batch(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """Different prompts of all tasks and kinds of captions, so of many lengths."""
    dice = random.Random(f"{options.seed}/{number}")
    samples = [draw(number * options.prompts + place, options.seed) for place in range(options.prompts)]
    captions = [dice.choice(list(sample.captions["en"].values())) for sample in samples]
    return {"captions": captions, "metadata": [sample.metadata for sample in samples]}


class Watch(Callback):
    """Times roll-outs before the first step, and reads the stage's clock at every step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sizes = {"packed": options.batch_size, "one prompt at a time": options.group_size}
        self.sizes |= {"one picture at a time": 1} if options.singly else {}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.sizes}
        self.shares: list[dict[str, float]] = []  # seconds of each part in each iteration
        self.largest_difference = 0.0

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:  # type: ignore[override]
        batch = draw_batch(self.options, 0)
        with trainer.precision_plugin.forward_context():
            for turn in range(self.options.turns + 1):
                drawn = {name: self.timed(pl_module, batch, name) for name in self.sizes}
                if turn == 0:
                    self.check_agreement({name: pictures for name, (_, pictures) in drawn.items()})
                else:
                    for name, (seconds, _) in drawn.items():
                        self.seconds[name].append(seconds)
        pl_module.rollout.batch_size = self.options.batch_size

    def timed(self, stage: GRPOModule, batch: dict[str, Any], name: str) -> tuple[float, list[Tensor]]:
        """Seconds of a roll-out, and its clean latents in the order of the prompts."""
        stage.rollout.batch_size = self.sizes[name]
        began = self.now()
        packs = [pack for minibatch in stage.draw(batch, step=0) for pack in minibatch]
        seconds = self.now() - began
        return seconds, [sample.float().cpu() for pack in packs for sample in pack.rollout.clean]

    def now(self) -> float:
        if self.options.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def check_agreement(self, drawn: dict[str, list[Tensor]]) -> None:
        """Stop where they do not draw the same."""
        flat = {name: torch.cat([sample.flatten() for sample in pictures]) for name, pictures in drawn.items()}
        for name in flat:
            difference = ((flat[name] - flat["packed"]).norm() / flat["packed"].norm()).item()
            self.largest_difference = max(self.largest_difference, difference)
        if self.largest_difference > (1e-4 if self.options.precision.startswith("32") else 0.1):
            raise SystemExit(f"roll-outs disagree: relative difference {self.largest_difference:.2g}")

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        metrics = trainer.callback_metrics
        self.shares.append({part: metrics[f"time/{part}_seconds"].item() for part in PARTS})


def report(options: argparse.Namespace, watch: Watch) -> None:
    pictures = options.prompts * options.group_size
    print(f"{options.preset}, {options.method}, {options.device}, {options.precision}, {options.threads} threads: "
          f"{options.prompts} prompts x {options.group_size} pictures of {' '.join(options.canvases)}, "
          f"{options.steps} steps")  # fmt: skip
    results: dict[str, Any] = {}
    print(f"{'roll-out':26}{'pictures/s':>12}{'packed is':>12}{'(range)':>14}")
    for name, seconds in watch.seconds.items():
        ratios = [own / packed for own, packed in zip(seconds, watch.seconds["packed"], strict=True)]
        results[name] = {"pictures_per_second": pictures / statistics.median(seconds), "ratios": ratios}
        print(f"{name:26}{results[name]['pictures_per_second']:>12.1f}{statistics.median(ratios):>11.2f}x"
              f"{f'{min(ratios):.2f}-{max(ratios):.2f}':>14}")  # fmt: skip
    timed = watch.shares[1:]
    total = statistics.median(sum(shares.values()) for shares in timed)
    parts = {part: statistics.mean(shares[part] / sum(shares.values()) for shares in timed) for part in PARTS}
    print(f"iteration of {total:.2f} s: " + ", ".join(f"{part} {share:.0%}" for part, share in parts.items()))
    results |= {"iteration_seconds": total, "shares": parts, "largest_difference": watch.largest_difference}
    print(json.dumps({"options": vars(options), "torch": torch.__version__, **results}))


if __name__ == "__main__":
    main()
