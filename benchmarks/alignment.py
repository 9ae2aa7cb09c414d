"""Whether rewards and preferences make a model better: GRPO, DiffusionNFT and DPO on TinyWorld, against controls.

    python benchmarks/alignment.py online --seeds 0 1 2    # GRPO and DiffusionNFT from the same start
    python benchmarks/alignment.py offline --seeds 0 1 2   # pairs, and DPO on them
    python benchmarks/alignment.py online offline order controls

The base is a quickstart (`--base`, trained if missing), served in SERVED steps without guidance: so it has much to
learn. Every arm is one `lightning run` in a folder of its own below --folder; arms that are finished are not run again,
and a killed one goes on. `order` (which needs `offline`) asks whether DPO and then GRPO beats
either alone with as many forwards of the network; controls have one seed.

The reward is TinyWorld's verifier with GenEval's rules; `gold`, a classifier, has no part in it. All are judged as
judging.py says. The bars stand in BARS and were fixed before the first arm ran. Prints tables; writes them to
seed-N/GROUPS.json.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.fidelity.comparison import Estimate, ratio
from zimage_lit.config import compose
from zimage_lit.files import read_json
from zimage_lit.tracking import RUN_FILE

sys.path.insert(0, str(Path(__file__).parent))  # where class paths of the controls are found
import judging
from judging import (
    Bar,
    Judges,
    benchmark_options,
    difference,
    draw_and_judge,
    lightning_run,
    measured,
    plain,
    table,
    verdicts,
    write_tables,
)

SERVED = {"num_inference_steps": 10, "guidance_scale": 1.0}  # how all models draw what is judged
CONTROL_MODULE = "alignment_controls"
GRPO, DPO = "tiny/grpo", "tiny/dpo"
NFT, NO_PENALTY = "model.init_args.method=nft", "model.init_args.kl.weight=0"
SHUFFLED = f"trainer.callbacks.right.class_path={CONTROL_MODULE}.ShuffledReward"
PAIR_TASKS = "[counting, two_object, position]"  # whose training statements, 117, make pairs
PAIR_SETTINGS = ("samples_per_prompt=144", "pairs_per_prompt=60", "batch_size=48")
PREFERENCE_METRICS = ("implicit_accuracy", "winner_error")
LONGER = 3  # times the steps of the arm with a penalty
MATCHED = 0.05  # points by which the reward may leave the gold judge


@dataclass(frozen=True)
class Arm:
    """One run. settings: those that differ from the experiment. times: its steps, of the experiment's. begins_from: the
    arm whose model goes on. control: class in alignment_controls.py in place of the stage."""

    name: str
    group: str
    experiment: str
    settings: tuple[str, ...] = ()
    times: float = 1.0
    begins_from: str | None = None
    control: str | None = None


ARMS = (
    Arm("grpo", "online", GRPO),
    Arm("nft", "online", GRPO, (NFT, "model.init_args.kl.weight=0.5")),
    Arm("dpo", "offline", DPO),
    Arm("grpo-longer", "order", GRPO, times=1.6),  # as many forwards as DPO with its pairs and then GRPO
    Arm("dpo-longer", "order", DPO, times=2.4),
    Arm("dpo-then-grpo", "order", GRPO, begins_from="dpo"),
    Arm("shuffled-reward", "controls", GRPO, (SHUFFLED,)),
    Arm("no-penalty", "controls", GRPO, (NO_PENALTY,), LONGER),
    Arm("random-labels", "controls", DPO, control="RandomLabels"),
    Arm("easy-first", "controls", DPO, ("model.init_args.curriculum={steps: 200, margin_start: [0.2, 1.0]}",)),
)


def risen(of: Callable[[str, str], Estimate], arm: str, metric: str) -> Estimate:
    return difference(of(arm, metric), of("base", metric))


def apart(of: Callable[[str, str], Estimate], arm: str) -> Estimate:
    """How much more the reward has risen than the gold judge."""
    return difference(risen(of, arm, "accuracy"), risen(of, arm, "gold"))


def moved(of: Callable[[str, str], Estimate], arm: str) -> Estimate:
    """By how much the accuracy has changed, up or down."""
    change = risen(of, arm, "accuracy")
    return Estimate.of(abs(change.value), abs(change.replicates))


ONLINE = [
    bar
    for arm in ("grpo", "nft")
    for bar in (
        Bar(f"accuracy, {arm} less base", "at least", 0.2, lambda of, arm=arm: risen(of, arm, "accuracy")),
        Bar(f"its rise less the gold judge's, {arm}", "at most", MATCHED, lambda of, arm=arm: apart(of, arm)),
        Bar(f"diversity, {arm} / base", "at least", 0.8,
            lambda of, arm=arm: ratio(of(arm, "diversity"), of("base", "diversity"))),
        Bar(f"KID, {arm} / base", "at most", 1.5, lambda of, arm=arm: ratio(of(arm, "kid"), of("base", "kid"))),
    )
]  # fmt: skip
BARS = (
    *ONLINE,
    Bar("accuracy moved by a shuffled reward", "at most", 0.02, lambda of: moved(of, "shuffled-reward")),
    Bar("counting to the gold judge, DPO less base", "at least", 0.1, lambda of: risen(of, "dpo", "gold_counting")),
    Bar("implicit accuracy on held-out pairs, DPO", "at least", 0.65, lambda of: of("dpo", "implicit_accuracy")),
    Bar("implicit accuracy on held-out pairs, DPO", "at most", 0.85, lambda of: of("dpo", "implicit_accuracy")),
    Bar("winner error on held-out pairs, DPO", "at most", 0.0, lambda of: of("dpo", "winner_error")),
    Bar("KID, DPO / base", "at most", 1.2, lambda of: ratio(of("dpo", "kid"), of("base", "kid"))),
    Bar("accuracy moved by random labels", "at most", 0.02, lambda of: moved(of, "random-labels")),
    Bar("accuracy, DPO then GRPO less GRPO as long", "at least", 0.0,
        lambda of: difference(of("dpo-then-grpo", "accuracy"), of("grpo-longer", "accuracy"))),
    Bar("accuracy, DPO then GRPO less DPO as long", "at least", 0.0,
        lambda of: difference(of("dpo-then-grpo", "accuracy"), of("dpo-longer", "accuracy"))),
)  # fmt: skip


@dataclass
class Bench:
    """The arms of one seed below a folder; `overrides` go to every run."""

    folder: Path
    base: Path
    seed: int
    overrides: Sequence[str]
    judges: Judges

    def output(self, name: str) -> Path:
        return self.folder / f"seed-{self.seed}" / name

    def words(self, arm: Arm) -> list[str]:
        """The experiment and the settings of an arm."""
        begins = self.output(arm.begins_from) / "pipeline" if arm.begins_from else self.base
        steps = compose(arm.experiment, list(self.overrides))["trainer"]["max_steps"]
        sampling = "trainer.callbacks.samples.init_args.sampling"
        words = [
            arm.experiment,
            f"run.name=alignment/seed-{self.seed}/{arm.name}",
            f"run.output_dir={self.output(arm.name)}",
            f"seed_everything={self.seed}",
            f"model.init_args.init_from={begins}",
            f"trainer.max_steps={round(arm.times * steps)}",
            *(f"{sampling}.{name}={value}" for name, value in SERVED.items() if arm.experiment == DPO),
            *([f"data.init_args.data_dir={self.output('pairs')}"] if arm.experiment == DPO else []),
            *arm.settings,
            *(f"trainer.callbacks.{name}=null" for name in ("score", "fidelity", "report")),
            *(word for word in self.overrides if not word.startswith("trainer.max_steps=")),
        ]
        return judging.with_stage(words, f"{CONTROL_MODULE}.{arm.control}") if arm.control else words

    def make_pairs(self) -> None:
        """Of the base's own pictures, drawn as it is served."""
        reward = "zimage_lit.rewards.tinyworld.TinyWorldReward"
        lightning_run([
            "pairs", f"model={self.base}", "prompts=tinyworld", f"tasks={PAIR_TASKS}", f"seed={self.seed}",
            f"output={self.output('pairs')}", "objective=tinyworld_all", f"rewards.right.class_path={reward}",
            "rewards.right.init_args.aspect=all", *PAIR_SETTINGS,
            *(f"{name}={value}" for name, value in SERVED.items()),
        ])  # fmt: skip

    def judged(self, pipeline: Path, store: Path) -> judging.Judged:
        return draw_and_judge(pipeline, store, self.judges, **SERVED)


# --------------------------------------------------------------------------------------------------------------- tables


def curve(output: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric that a run has logged."""
    from mlflow import MlflowClient

    run = read_json(output / RUN_FILE)
    history = MlflowClient(run["tracking_uri"]).get_metric_history(run["run_id"], metric)
    return sorted((point.step, point.value) for point in history)


def compare_methods(bench: Bench) -> None:
    """The reward of GRPO and of DiffusionNFT after as many pictures, and after as long: on the pictures of training,
    which GRPO draws with noise in its window and NFT without, so they do not begin at the same value."""
    grpo, nft = (rewards_over_time(bench.output(name)) for name in ("grpo", "nft"))
    if not grpo or not nft:
        return
    print("\n| iterations | GRPO | NFT | seconds | GRPO | NFT |\n| --- | --- | --- | --- | --- | --- |")
    last_step, last_second = min(grpo[-1][0], nft[-1][0]), min(grpo[-1][1], nft[-1][1])
    for share in (0.25, 0.5, 0.75, 1.0):
        by_step, by_time = ([mean_until(points, place, share * last) for points in (grpo, nft)]
                            for place, last in ((0, last_step), (1, last_second)))  # fmt: skip
        print(f"| {share * last_step:.0f} | {by_step[0]:.3f} | {by_step[1]:.3f} "
              f"| {share * last_second:.0f} | {by_time[0]:.3f} | {by_time[1]:.3f} |")  # fmt: skip


def rewards_over_time(output: Path) -> list[tuple[int, float, float]]:
    """(step, seconds of work until then, reward) of a run; a pause between two sessions is no work."""
    parts = [curve(output, f"time/{part}_seconds") for part in ("rollout", "reward", "update")]
    points, seconds, before = [], 0.0, -1
    for (step, reward), *spent in zip(curve(output, "reward/tinyworld_all"), *parts, strict=True):
        seconds += (step - before) * sum(value for _, value in spent)  # of an iteration, the last of those since then
        before = step
        points.append((step, seconds, reward))
    return points


def mean_until(points: list[tuple[int, float, float]], place: int, end: float, count: int = 5) -> float:
    """Mean of the last few values until a step (place 0) or a second (place 1); NaN where there are none yet."""
    values = [point[2] for point in points if point[place] <= end][-count:]
    return sum(values) / len(values) if values else math.nan


def preferences(bench: Bench, arms: Sequence[Arm]) -> dict[str, dict[str, float]]:
    """What the held-out pairs said at the last look of each run of DPO, NaN where there was none."""
    found = {
        arm.name: {
            name: (curve(bench.output(arm.name), f"val/{name}") or [(0, math.nan)])[-1][1]
            for name in PREFERENCE_METRICS
        }
        for arm in arms
        if arm.experiment == DPO
    }
    if found:
        print(f"\n| held-out pairs | {' | '.join(PREFERENCE_METRICS)} |\n| --- |{' --- |' * len(PREFERENCE_METRICS)}")
        for name, values in found.items():
            print(f"| {name} | {' | '.join(f'{value:.4f}' for value in values.values())} |")
    return found


def report(bench: Bench, groups: Sequence[str]) -> dict[str, Any]:
    """Judge, print and give the tables of a seed."""
    real = judging.real_pictures(bench.base, bench.judges)
    judged = {"base": bench.judged(bench.base, bench.folder / "base.npz")}
    arms = arms_of(groups, bench.seed)
    for arm in arms:
        output = bench.output(arm.name)
        judged[arm.name] = bench.judged(output / "pipeline", output / "judged.npz")
    rows = {label: measured(found, real) for label, found in judged.items()}
    print(f"\nseed {bench.seed}")
    table(rows, judged)
    if "online" in groups:
        compare_methods(bench)
    for name, values in preferences(bench, arms).items():
        rows[name] |= {metric: Estimate.of(value, np.array([value])) for metric, value in values.items()}
    told = {label: {name: plain(found[name]) for name in found} for label, found in rows.items()}
    ends = {arm.name: read_json(bench.output(arm.name) / "run.json")["step"] for arm in arms}
    print(f"\nlast steps: {ends}")  # fewer than were asked for where a guard has ended a run
    return {"seed": bench.seed, "arms": told, "last_steps": ends, "bars": verdicts(BARS, rows)}


def arms_of(groups: Sequence[str], seed: int) -> list[Arm]:
    """Controls have one seed."""
    return [arm for arm in ARMS if arm.group in groups and (arm.group != "controls" or seed == 0)]


def main() -> None:
    options = benchmark_options(__doc__, (arm.group for arm in ARMS), "outputs/alignment", "base")
    judges = Judges.obtain(options.folder)
    for seed in options.seeds:
        bench = Bench(options.folder, options.start, seed, options.overrides, judges)
        arms = arms_of(options.groups, seed)
        if any(arm.experiment == DPO for arm in arms):
            bench.make_pairs()
        for arm in arms:
            lightning_run(bench.words(arm))
        write_tables(report(bench, options.groups), options, seed)


if __name__ == "__main__":
    main()
