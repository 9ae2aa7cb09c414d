"""Whether eight steps can stand for a hundred: Decoupled DMD and DMDR on TinyWorld, against controls and fixed bars.

    python benchmarks/distillation.py main --seeds 0 1 2   # students of 8 and of 4 steps, against their teacher
    python benchmarks/distillation.py main controls front  # several groups; controls and fronts have one seed
    python benchmarks/distillation.py main dmdr

The teacher is a quickstart (`--teacher`, trained if missing). Every arm is one `lightning run` in a folder of its own
below --folder; arms that are finished are not run again, and a killed one goes on, so the same command continues.

All are judged on the same held-out prompts and noise, PICTURES of each prompt, against real pictures of the same
prompts (after the codec and back): KID, diversity and the rest on the features of a classifier that no arm has seen;
accuracy by TinyWorld's verifier and GenEval's rules. 95 % intervals resample prompts, the same prompts in every arm.
The bars stand in BARS and were fixed before the first arm ran. Prints tables; writes distillation.json.
"""

import argparse
import hashlib
import io
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_modules.tinyworld.combinations import GENEVAL_TASKS, Metadata
from data_modules.tinyworld.verifier import judge
from data_modules.tinyworld.world import draw_statement, heldout_prompts
from evaluation.fidelity.comparison import (
    ComparisonSettings,
    Estimate,
    PictureSet,
    compare,
    prompt_weights,
    ratio,
    share,
)
from evaluation.fidelity.tinyworld_classifier import ClassifierConfig, TinyWorldClassifier, as_input, obtain
from zimage_lit import cli
from zimage_lit.callbacks.distribution_score import picture_set, reconstructed
from zimage_lit.callbacks.tinyworld_score import is_right
from zimage_lit.config import compose
from zimage_lit.files import write_atomically
from zimage_lit.pipeline import ZImagePipeline
from zimage_lit.rewards.tinyworld_likelihood import log_likelihoods

sys.path.insert(0, str(Path(__file__).parent))  # where class paths of the controls are found

PROMPTS_PER_TASK = 12  # held-out statements of each of GenEval's tasks, fewer where there are no more
PICTURES = 24  # of each prompt
NOISE_SEED, REAL_SEED = 40_000, 3  # of the pictures that are judged
COMPARISON = ComparisonSettings(resamples=1000)
TEACHER_STEPS = (4, 8, 20, 100)  # with guidance, so twice as many network evaluations
STUDENT_STEPS = (1, 2, 4, 8)
CONTROL_MODULE = "distillation_controls"
# (what, of which arm at how many steps, divided by or less what, bar); fixed before the first arm ran.
BARS = (
    ("the task is hard enough: KID, teacher at 4 steps / at 100", "at least", 3.0),
    ("KID, student at 8 / teacher at 100", "at most", 1.15),
    ("accuracy, student at 8 less teacher at 100", "at least", -0.02),
    ("diversity, student at 8", "at least", 0.9),
    ("KID, student at 4 / teacher at 100", "at most", 1.3),
    ("KID, student at 4 / teacher at 4", "at most", 0.5),
    ("accuracy, DMDR less DMD as long", "at least", 0.05),
    ("KID, DMDR / DMD as long", "at most", 1.1),
)
DMDR = "dmdr-0.1 at 4"  # the weight that the bars are for; the others are listed beside it
JUDGE = ClassifierConfig(seed=7)  # another one than curves are drawn by
REWARD_CLASSIFIER, REWARD_CONFIG = "reward_classifier", ClassifierConfig(seed=1, width=16)


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
ARMS = (
    Arm("student-8", "main"),
    Arm("student-4", "main", steps=4),
    Arm("frozen-fake-score", "controls", settings=("model.init_args.fake_optimizer.lr=0",)),
    Arm("swapped-sign", "controls", control="SwappedSign"),
    Arm("renoised", "controls", settings=RENOISE),
    Arm("not-renoised", "controls", settings=RENOISE, control="NotRenoised"),
    *(Arm(f"coupled-{w:g}", "front", settings=(*COUPLED, scale(w))) for w in (2, 3, 5)),
    *(Arm(f"decoupled-{w:g}", "front", settings=(scale(w),)) for w in (2, 5)),  # 3 is student-8
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
    classifier: TinyWorldClassifier
    reward_classifier: TinyWorldClassifier

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
        if arm.control:  # another class takes none of the settings by itself
            init_args = compose(words[0], words[1:])["model"]["init_args"]
            model = {"class_path": f"{CONTROL_MODULE}.{arm.control}", "init_args": init_args}
            words.append(f"model={json.dumps(model)}")
        return words

    def rewarded(self, weight: float) -> list[str]:
        folder = self.folder / REWARD_CLASSIFIER
        likelihood = {
            "class_path": "zimage_lit.rewards.tinyworld_likelihood.TinyWorldLikelihood",
            "init_args": {"folder": str(folder), "seed": REWARD_CONFIG.seed, "width": REWARD_CONFIG.width},
        }
        return [
            f"model.init_args.reward={{form: backprop, weight: {weight}}}",
            f"trainer.callbacks+={json.dumps(likelihood)}",
        ]

    def run(self, arm: Arm) -> None:
        words = self.words(arm)
        print(f"\n$ lightning run {shlex.join(words)}", flush=True)
        if code := cli.main(["run", *words], program="lightning"):
            sys.exit(code)

    def judged(self, arm: Arm) -> dict[int, "Judged"]:
        """Its student's pictures at each number of steps."""
        return {
            steps: draw_and_judge(self.output(arm) / "pipeline", steps, self.output(arm) / f"judged-{steps}.npz", self)
            for steps in STUDENT_STEPS
        }


# ------------------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Judged:
    """What is known of the pictures of one model at one number of steps."""

    pictures: PictureSet
    right: np.ndarray  # (N,) bool
    likelihoods: np.ndarray  # (N,), what rewarded arms were rewarded with


def statements() -> list[Metadata]:
    """Held-out statements of GenEval's tasks, each once."""
    found = {
        (metadata["tag"], metadata["prompt"]): metadata
        for metadata in heldout_prompts(PROMPTS_PER_TASK, seed=1)
        if metadata["tag"] in GENEVAL_TASKS
    }
    return list(found.values())


ASKED = [metadata for metadata in statements() for _ in range(PICTURES)]
NUMBERS = np.repeat(np.arange(len(statements())), PICTURES)


def draw_and_judge(pipeline: Path, steps: int, store: Path, bench: Bench) -> Judged:
    """From `store` where that is newer than the pipeline, and made by the same judges of the same pictures."""
    asked = fingerprint(pipeline, steps, bench)
    if not is_kept(store, pipeline, asked):
        drawn = ZImagePipeline.from_pretrained(pipeline)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            pictures = drawn(
                [metadata["prompt"] for metadata in ASKED],
                seed=[NOISE_SEED + place for place in range(len(ASKED))],
                num_inference_steps=steps,
                batch_size=64,
            )
        seen = picture_set(as_input(pictures), NUMBERS, bench.classifier, COMPARISON)
        records = (judge(np.asarray(picture), metadata) for picture, metadata in zip(pictures, ASKED, strict=True))
        right = np.array([is_right(record) for record in records])
        with torch.no_grad():
            likelihoods = log_likelihoods(bench.reward_classifier(as_input(pictures)), ASKED)
        found = {"features": seen.features, "projections": seen.projections, "right": right}
        buffer = io.BytesIO()
        np.savez(buffer, **found, likelihoods=likelihoods.numpy(), asked=asked)
        write_atomically(store, buffer.getvalue())
    kept = np.load(store)
    return Judged(PictureSet(kept["features"], kept["projections"], NUMBERS), kept["right"], kept["likelihoods"])


def fingerprint(pipeline: Path, steps: int, bench: Bench) -> str:
    """Of all that decides what is stored of a pipeline's pictures, but its weights."""
    judges = bench.classifier.fingerprint(), bench.reward_classifier.fingerprint()
    asked = [str(pipeline.resolve()), steps, ASKED, NOISE_SEED, repr(COMPARISON), judges]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def is_kept(store: Path, pipeline: Path, asked: str) -> bool:
    if not store.is_file() or store.stat().st_mtime < (pipeline / "model_index.json").stat().st_mtime:
        return False
    kept = np.load(store)
    return "asked" in kept and str(kept["asked"]) == asked


def real_pictures(bench: Bench, first: int = 0) -> PictureSet:
    """As many real pictures of the same prompts, from the world's number `first` on, through the teacher's codec."""
    codec = ZImagePipeline.from_pretrained(bench.teacher).codec
    each = range(first, first + PICTURES)
    images = as_input([draw_statement(metadata, i, REAL_SEED).image for metadata in statements() for i in each])
    return picture_set(reconstructed(images, codec), NUMBERS, bench.classifier, COMPARISON)


def accuracy(judged: Judged) -> Estimate:
    """GenEval's overall score: the mean over the tasks of the share of right pictures."""
    tasks = np.array([metadata["tag"] for metadata in statements()])
    shares = judged.right.reshape(len(tasks), PICTURES).mean(axis=1)

    def overall(weights: np.ndarray) -> float:
        parts = [(tasks == task, weights[tasks == task]) for task in GENEVAL_TASKS]
        return float(np.mean([np.average(shares[own], weights=w) for own, w in parts if w.sum()]))

    replicates = [overall(each) for each in prompt_weights(len(tasks), COMPARISON.resamples, COMPARISON.seed)]
    return Estimate.of(overall(np.ones(len(tasks))), np.array(replicates))


def difference(first: Estimate, second: Estimate) -> Estimate:
    return Estimate.of(first.value - second.value, first.replicates - second.replicates)


def measured(judged: Judged, real: PictureSet) -> dict[str, Estimate]:
    rewarded = share(judged.likelihoods, NUMBERS, COMPARISON)
    return {"accuracy": accuracy(judged), "reward": rewarded, **compare(judged.pictures, real, COMPARISON)}


# -------------------------------------------------------------------------------------------------------------- tables


def table(rows: dict[str, dict[str, Estimate]], evaluations: dict[str, int]) -> None:
    names = ("accuracy", "reward", "kid", "fd", "sliced_wasserstein", "precision", "recall", "diversity")
    print(f"\n| arm | NFE | {' | '.join(names)} |\n| --- | --- |{' --- |' * len(names)}")
    for label, found in rows.items():
        cells = (f"{found[n].value:.3f} [{found[n].low:.3f}, {found[n].high:.3f}]" for n in names)
        print(f"| {label} | {evaluations[label]} | {' | '.join(cells)} |")


def verdicts(rows: dict[str, dict[str, Estimate]]) -> list[dict[str, Any]]:
    """The bars with what was reached; those whose arms were not run are left out, ratios to what may be 0 not met."""

    def of(label: str, metric: str) -> Estimate:
        return rows[label][metric]

    reached = (
        lambda: ratio(of("teacher at 4", "kid"), of("teacher at 100", "kid")),
        lambda: ratio(of("student-8 at 8", "kid"), of("teacher at 100", "kid")),
        lambda: difference(of("student-8 at 8", "accuracy"), of("teacher at 100", "accuracy")),
        lambda: of("student-8 at 8", "diversity"),
        lambda: ratio(of("student-4 at 4", "kid"), of("teacher at 100", "kid")),
        lambda: ratio(of("student-4 at 4", "kid"), of("teacher at 4", "kid")),
        lambda: difference(of(DMDR, "accuracy"), of("dmd-longer at 4", "accuracy")),
        lambda: ratio(of(DMDR, "kid"), of("dmd-longer at 4", "kid")),
    )
    print("\n| bar | reached | met |\n| --- | --- | --- |")
    found = []
    for (what, side, bar), value in zip(BARS, reached, strict=True):
        try:
            estimate = value()
        except KeyError:
            continue
        except ValueError as error:  # a teacher whose KID cannot be told from 0
            print(f"| {what}: {side} {bar:g} | {error} | no |")
            found.append({"bar": what, side: bar, "error": str(error), "met": False})
            continue
        met = estimate.value >= bar if side == "at least" else estimate.value <= bar
        spread = f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
        print(f"| {what}: {side} {bar:g} | {spread} | {'yes' if met else 'no'} |")
        found.append({"bar": what, side: bar, **numbers(estimate), "met": bool(met)})
    return found


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


def speed(bench: Bench) -> float:
    """Seconds of the teacher at 100 steps with guidance over those of the student at 8 without, in this process."""
    student = next(arm for arm in ARMS if arm.name == "student-8")
    seconds = {}
    for label, folder, steps in (("student", bench.output(student) / "pipeline", 8), ("teacher", bench.teacher, 100)):
        pipeline = ZImagePipeline.from_pretrained(folder)
        prompts, seeds = [metadata["prompt"] for metadata in ASKED[::PICTURES]], list(range(len(ASKED[::PICTURES])))
        taken = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                start = time.perf_counter()
                pipeline(prompts, seed=seeds, num_inference_steps=steps, batch_size=len(prompts))
                taken.append(time.perf_counter() - start)
        seconds[label] = min(taken)
    print(f"\n{len(prompts)} pictures: student {seconds['student']:.2f} s, teacher {seconds['teacher']:.2f} s, ratio "
          f"{seconds['teacher'] / seconds['student']:.1f}")  # fmt: skip
    return seconds["teacher"] / seconds["student"]


def report(bench: Bench, groups: Sequence[str]) -> dict[str, Any]:
    """Judge, print and give the tables of a seed."""
    real = real_pictures(bench)
    rows: dict[str, dict[str, Estimate]] = {}
    evaluations: dict[str, int] = {}
    for steps in TEACHER_STEPS:
        store = bench.folder / f"teacher-{steps}.npz"
        rows[f"teacher at {steps}"] = measured(draw_and_judge(bench.teacher, steps, store, bench), real)
        evaluations[f"teacher at {steps}"] = 2 * steps
    for arm in arms_of(groups, bench.seed):
        for steps, judged in bench.judged(arm).items():
            rows[f"{arm.name} at {steps}"] = measured(judged, real)
            evaluations[f"{arm.name} at {steps}"] = steps
    print(f"\nseed {bench.seed}")
    floor = compare(real_pictures(bench, PICTURES), real, COMPARISON)
    print(f"\nreal against real: KID {floor['kid'].value:.4f}, diversity {floor['diversity'].value:.3f}")
    table(rows, evaluations)
    at_matched_reward(rows)
    plain = {label: {name: numbers(found[name]) for name in found} for label, found in rows.items()}
    faster = speed(bench) if "main" in groups else None
    return {"seed": bench.seed, "arms": plain, "bars": verdicts(rows), "speed": faster}


def numbers(estimate: Estimate) -> dict[str, float]:
    return {name: float(getattr(estimate, name)) for name in ("value", "low", "high")}


def arms_of(groups: Sequence[str], seed: int) -> list[Arm]:
    """Controls and fronts have one seed."""
    return [arm for arm in ARMS if arm.group in groups and (arm.group in ("main", "dmdr") or seed == 0)]


def main() -> None:
    options = parse_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.teacher / "model_index.json").is_file():
        output = options.teacher.parent
        if code := cli.main(["run", "quickstart", f"run.output_dir={output}"], program="lightning"):
            sys.exit(code)
    judges = obtain(options.folder / "classifier", JUDGE), obtain(options.folder / REWARD_CLASSIFIER, REWARD_CONFIG)
    tables = []
    for seed in options.seeds:
        bench = Bench(options.folder, options.teacher, seed, options.overrides, *judges)
        for arm in arms_of(options.groups, seed):
            bench.run(arm)
        tables.append(report(bench, options.groups))
    (options.folder / "distillation.json").write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=sorted({arm.group for arm in ARMS}))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/distillation"))
    parser.add_argument("--teacher", type=Path, default=Path("outputs/quickstart/pipeline"))
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="key=value for every run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
