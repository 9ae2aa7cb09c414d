"""Whether eight steps can stand for a hundred: Decoupled DMD and DMDR on TinyWorld, against controls and fixed bars.

    python benchmarks/distillation.py main --seeds 0 1 2   # students of 8 and of 4 steps, against their teacher
    python benchmarks/distillation.py main controls front  # several groups; controls and fronts have one seed
    python benchmarks/distillation.py main dmdr

The teacher is a quickstart (`--teacher`, trained if missing). Every arm is one `lightning run` in a folder of its own
below --folder; arms that are finished are not run again, and a killed one goes on, so the same command continues.

All are judged as judging.py says, with a classifier that no arm has seen. The bars stand in BARS and were fixed before
the first arm ran. Prints tables; writes them to seed-N/GROUPS.json, and accuracy over KID for each objective and
guidance scale, of the arms of front and of student-4, to seed-N/front.png.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from evaluation.fidelity.comparison import Estimate, compare, ratio
from zimage_lit.files import write_atomically
from zimage_lit.pipeline import ZImagePipeline
from zimage_lit.plots import as_png

sys.path.insert(0, str(Path(__file__).parent))  # where class paths of the controls are found
import judging
from judging import (
    Bar,
    Judged,
    Judges,
    benchmark_options,
    draw_and_judge,
    lightning_run,
    measured,
    plain,
    table,
    verdicts,
    write_tables,
)

TEACHER_STEPS = (4, 8, 20, 100)  # with guidance from its `cfg_start` on, so up to twice as many evaluations
STUDENT_STEPS = (1, 2, 4, 8)
CONTROL_MODULE = "distillation_controls"
SCALES = (2, 3, 5)  # of guidance, along the front
DMDR = "dmdr-0.1 at 4"  # the weight that the bars are for; the others are listed beside it
BARS = (
    Bar("the task is hard enough: KID, teacher at 4 steps / at 100", "at least", 3.0,
        lambda of: ratio(of("teacher at 4", "kid"), of("teacher at 100", "kid"))),
    Bar("KID, student at 8 / teacher at 100", "at most", 1.15,
        lambda of: ratio(of("student-8 at 8", "kid"), of("teacher at 100", "kid"))),
    Bar("accuracy, student at 8 less teacher at 100", "at least", -0.02,
        lambda of: judging.difference(of("student-8 at 8", "accuracy"), of("teacher at 100", "accuracy"))),
    Bar("diversity, student at 8", "at least", 0.9, lambda of: of("student-8 at 8", "diversity")),
    Bar("KID, student at 4 / teacher at 100", "at most", 1.3,
        lambda of: ratio(of("student-4 at 4", "kid"), of("teacher at 100", "kid"))),
    Bar("KID, student at 4 / teacher at 4", "at most", 0.5,
        lambda of: ratio(of("student-4 at 4", "kid"), of("teacher at 4", "kid"))),
    Bar("accuracy, DMDR less DMD as long", "at least", 0.05,
        lambda of: judging.difference(of(DMDR, "accuracy"), of("dmd-longer at 4", "accuracy"))),
    Bar("KID, DMDR / DMD as long", "at most", 1.1,
        lambda of: ratio(of(DMDR, "kid"), of("dmd-longer at 4", "kid"))),
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One run: `settings` are those that differ from tiny/dmdr. steps: of the grid it is trained and served on.
    control: class in distillation_controls.py in place of DMDRModule. begins_from: arm whose student goes on.
    reward: weight of the likelihood under a classifier that judges nothing here. keeps_start: that student, not the
    teacher, is what `init_from` names."""

    name: str
    group: str
    steps: int = 8
    settings: tuple[str, ...] = ()
    control: str | None = None
    begins_from: str | None = None
    reward: float | None = None
    keeps_start: bool = False


def scale(value: float) -> str:
    return f"model.init_args.objective.guidance_scale={value}"


COUPLED = ("model.init_args.objective.name=coupled",)
RENOISE = ("model.init_args.rollout.sampler=renoise",)
STILL = ("model.init_args.fake_optimizer.lr=0", "model.init_args.fake_optimizer.muon_lr=0")
ARMS = (
    Arm("student-8", "main"),
    Arm("student-4", "main", steps=4),
    Arm("frozen-fake-score", "controls", settings=STILL),
    Arm("swapped-sign", "controls", control="SwappedSign"),
    Arm("renoised", "controls", settings=RENOISE),
    Arm("not-renoised", "controls", settings=RENOISE, control="NotRenoised"),
    *(Arm(f"coupled-{w:g}", "front", 4, (*COUPLED, scale(w))) for w in SCALES),
    *(Arm(f"decoupled-{w:g}", "front", 4, (scale(w),)) for w in SCALES if w != 3),  # 3 is student-4
    Arm("dmd-longer", "dmdr", 4, begins_from="student-4"),
    *(Arm(f"dmdr-{w:g}", "dmdr", 4, begins_from="student-4", reward=w) for w in (0.02, 0.1, 0.5)),
    *(
        Arm(f"reward-{w:g}", "dmdr", 4, control="RewardAlone", begins_from="student-4", reward=w)
        for w in (0.02, 0.1, 0.5)
    ),
    *(
        Arm(f"reward-{w:g}-l2", "dmdr", 4, (), "RewardAndL2", "student-4", w, keeps_start=True)
        for w in (0.02, 0.1, 0.5)
    ),
)


@dataclass
class Bench:
    """The arms of one seed below a folder; `overrides` go to every run."""

    folder: Path
    teacher: Path
    seed: int
    overrides: Sequence[str]
    judges: Judges

    def output(self, arm: Arm) -> Path:
        return self.folder / f"seed-{self.seed}" / arm.name

    def words(self, arm: Arm) -> list[str]:
        """The experiment and the settings of an arm."""
        begins = next((self.output(other) for other in ARMS if other.name == arm.begins_from), None)
        words = [
            "tiny/dmdr",
            f"run.name=distillation/seed-{self.seed}/{arm.name}",
            f"run.output_dir={self.output(arm)}",
            f"seed_everything={self.seed}",
            f"model.init_args.init_from={begins / 'pipeline' if begins and arm.keeps_start else self.teacher}",
            *([f"model.init_args.student_init_from={begins}/checkpoints/last.ckpt"] if begins else []),
            f"model.init_args.rollout.num_inference_steps={arm.steps}",
            *arm.settings,
            *([] if arm.reward is None else self.rewarded(arm.reward)),
            *(f"trainer.callbacks.{name}=null" for name in ("score", "fidelity", "report")),
            *self.overrides,
        ]
        return judging.with_stage(words, f"{CONTROL_MODULE}.{arm.control}") if arm.control else words

    def rewarded(self, weight: float) -> list[str]:
        folder, config = self.folder / judging.REWARD_CLASSIFIER, judging.REWARD_CONFIG
        likelihood = {
            "class_path": "zimage_lit.rewards.tinyworld_likelihood.TinyWorldLikelihood",
            "init_args": {"folder": str(folder), "seed": config.seed, "width": config.width},
        }
        return [
            f"model.init_args.reward={{form: backprop, weight: {weight}}}",
            f"trainer.callbacks+={json.dumps(likelihood)}",
        ]

    def judged(self, arm: Arm) -> dict[int, Judged]:
        """Its student's pictures at each number of steps."""
        output = self.output(arm)
        return {
            steps: draw_and_judge(
                output / "pipeline", output / f"judged-{steps}.npz", self.judges, num_inference_steps=steps
            )
            for steps in STUDENT_STEPS
        }


# -------------------------------------------------------------------------------------------------------------- tables


def at_matched_reward(rows: dict[str, dict[str, Estimate]]) -> None:
    """Each arm without distribution matching beside the DMDR arm whose reward is nearest."""
    dmdr = [label for label in rows if label.startswith("dmdr-") and label.endswith("at 4")]
    if not dmdr:
        return
    print("\n| arm | reward | KID | accuracy | DMDR of like reward | reward | KID | accuracy |")
    print(f"|{' --- |' * 8}")
    for label in (label for label in rows if label.startswith("reward-") and label.endswith("at 4")):
        reward = rows[label]["reward"].value
        other = min(dmdr, key=lambda name: abs(rows[name]["reward"].value - reward))
        cells = [
            f"{rows[name][metric].value:.4f}" for name in (label, other) for metric in ("reward", "kid", "accuracy")
        ]
        print(f"| {label} | {' | '.join(cells[:3])} | {other} | {' | '.join(cells[3:])} |")


def front(rows: dict[str, dict[str, Estimate]]) -> dict[str, dict[float, str]]:
    """Objective -> guidance scale -> label of the student of four steps that learnt with it, of those in `rows`."""
    labels = {
        name: {w: "student-4 at 4" if (name, w) == ("decoupled", 3) else f"{name}-{w:g} at 4" for w in SCALES}
        for name in ("coupled", "decoupled")
    }
    return {name: {w: label for w, label in of.items() if label in rows} for name, of in labels.items()}


def draw_front(rows: dict[str, dict[str, Estimate]], place: Path) -> None:
    """Accuracy over KID for each objective, its guidance scales joined in their order; lines are 95 % intervals."""
    plot = Figure(figsize=(7, 4.5), layout="tight")
    axes = plot.subplots()
    for name, labels in front(rows).items():
        kid, accuracy = ([rows[label][metric] for label in labels.values()] for metric in ("kid", "accuracy"))
        around = [[(e.value - e.low, e.high - e.value) for e in estimates] for estimates in (kid, accuracy)]
        xerr, yerr = (np.array(each).T.reshape(2, -1).clip(min=0) for each in around)
        x, y = ([e.value for e in estimates] for estimates in (kid, accuracy))
        axes.errorbar(x, y, yerr, xerr, marker="o", linewidth=1, elinewidth=0.5, label=name)
        for number, kid_of_it, accuracy_of_it in zip(labels, x, y, strict=True):
            axes.annotate(f"{number:g}", (kid_of_it, accuracy_of_it), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="KID (lower is better)", ylabel="accuracy")
    axes.legend()
    write_atomically(place, as_png(plot))
    print(f"\nfront: {place}")


def speed(bench: Bench) -> dict[str, float]:
    """Seconds of the teacher at 100 steps over those of the student at 8 without guidance, in this process, in turns:
    with guidance at every step, and as the teacher is served."""
    student = bench.output(next(arm for arm in ARMS if arm.name == "student-8")) / "pipeline"
    pipelines = {folder: ZImagePipeline.from_pretrained(folder) for folder in (student, bench.teacher)}
    prompts = [metadata["prompt"] for metadata in judging.statements()]
    ways: dict[str, tuple[Path, dict[str, Any]]] = {
        "student": (student, {"num_inference_steps": 8}),
        "guidance at every step": (bench.teacher, {"num_inference_steps": 100, "cfg_start": 0.0}),
        "as it is served": (bench.teacher, {"num_inference_steps": 100}),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            for way, (folder, sampling) in ways.items():
                start = time.perf_counter()
                pipelines[folder](prompts, seed=list(range(len(prompts))), batch_size=len(prompts), **sampling)
                taken[way].append(time.perf_counter() - start)
    fast, *slow = map(min, taken.values())
    ratios = {way: seconds / fast for way, seconds in zip(list(ways)[1:], slow, strict=True)}
    print(f"\n{len(prompts)} pictures: student {fast:.2f} s; teacher, times as long: " + ", ".join(
        f"{way} {times:.1f}" for way, times in ratios.items()))  # fmt: skip
    return ratios


def report(bench: Bench, groups: Sequence[str]) -> dict[str, Any]:
    """Judge, print and give the tables of a seed."""
    real = judging.real_pictures(bench.teacher, bench.judges)
    judged = {
        f"teacher at {steps}": draw_and_judge(
            bench.teacher, bench.folder / f"teacher-{steps}.npz", bench.judges, num_inference_steps=steps
        )
        for steps in TEACHER_STEPS
    }
    for arm in arms_of(groups, bench.seed):
        judged |= {f"{arm.name} at {steps}": found for steps, found in bench.judged(arm).items()}
    rows = {label: measured(found, real) for label, found in judged.items()}
    print(f"\nseed {bench.seed}")
    others = judging.real_pictures(bench.teacher, bench.judges, first=judging.PICTURES)
    floor = compare(others, real, judging.COMPARISON)
    print(f"\nreal against real: KID {floor['kid'].value:.4f}, diversity {floor['diversity'].value:.3f}")
    table(rows, judged)
    at_matched_reward(rows)
    if "front" in groups:
        draw_front(rows, bench.folder / f"seed-{bench.seed}" / "front.png")
    told = {label: {name: plain(found[name]) for name in found} for label, found in rows.items()}
    faster = speed(bench) if "main" in groups else None
    return {"seed": bench.seed, "arms": told, "bars": verdicts(BARS, rows), "speed": faster}


def arms_of(groups: Sequence[str], seed: int) -> list[Arm]:
    """Controls and fronts have one seed."""
    return [arm for arm in ARMS if arm.group in groups and (arm.group in ("main", "dmdr") or seed == 0)]


def main() -> None:
    options = benchmark_options(__doc__, (arm.group for arm in ARMS), "outputs/distillation", "teacher")
    judges = Judges.obtain(options.folder)
    for seed in options.seeds:
        bench = Bench(options.folder, options.start, seed, options.overrides, judges)
        for arm in arms_of(options.groups, seed):
            lightning_run(bench.words(arm))
        write_tables(report(bench, options.groups), options, seed)


if __name__ == "__main__":
    main()
