"""Whether each stage of the tiny curriculum pays: low resolution -> all sizes -> fine-tuning, each against its control.

    python benchmarks/curriculum.py                        # seed 0, all arms
    python benchmarks/curriculum.py --seeds 0 1 2

Every arm is one `lightning run` in a folder of its own below --folder, printed as a command; arms that are finished are
not run again, and a killed one goes on, so the same command continues. A stage's control begins from the same weights,
has the same optimiser and schedule, and goes on with the data of the stage before for as many FLOPs (of training steps,
counted from packed lengths; drawing pictures for the scores is not in them). Two further variants of the last stage
learn words and counting; `lightning run merge` mixes them and picks the mix with the best mean of both skills. That mix
and the variants are then scored on other noise than the one it was picked by.

All are scored at the final sizes on the same held-out prompts and noise. Differences have 95 % intervals of a
paired bootstrap over prompts, within each task: a prompt's pictures stay together, whatever their seed. Several seeds
have a second one: Student's t over their differences. Prints tables and writes curriculum.json.
"""

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_modules.buckets import image_tokens
from data_modules.tinyworld.combinations import GENEVAL_TASKS
from data_modules.tinyworld.verifier import judge
from data_modules.tinyworld.world import heldout_prompts
from evaluation.report.difference import over_runs
from zimage_lit import cli
from zimage_lit.backbone.flops import forward_flops
from zimage_lit.callbacks.tinyworld_score import is_right
from zimage_lit.config import compose
from zimage_lit.pipeline import ZImagePipeline
from zimage_lit.stages.initial_weights import backbone_config

BATCHES_COUNTED = 20  # of each arm, for the mean FLOPs of a step
RESAMPLES = 4000
SKILLS = ("counting", "word")
Picture = Mapping[str, Any]  # judged: {"metadata", "canvas", "correct"}
MERGE_STEPS = 2  # mixes of none, half and all of each variant


@dataclass(frozen=True)
class Arm:
    """One run. starts_from: the arm whose weights it takes. data_of: the arm whose data it trains on, its own where
    None. as_long_as: the arm whose FLOPs it may spend; its own steps where None."""

    name: str
    experiment: str
    starts_from: str | None = None
    data_of: str | None = None
    as_long_as: str | None = None


ARMS = (
    Arm("low-res", "tiny/low-res"),
    Arm("omni", "tiny/omni", "low-res"),
    Arm("sft", "tiny/sft", "omni"),
    Arm("omni-longer", "tiny/sft", "omni", data_of="omni", as_long_as="sft"),
    Arm("sft-words", "tiny/sft-words", "omni"),
    Arm("sft-counting", "tiny/sft-counting", "omni"),
    Arm("low-res-longer", "tiny/omni", "low-res", data_of="low-res", as_long_as="omni"),
)
QUESTIONS = (("omni", "low-res-longer"), ("sft", "omni-longer"))  # (stage, its control)
CONTROLS = tuple(control for _, control in QUESTIONS)


@dataclass(frozen=True)
class Comparison:
    """What a stage drew beside what its control drew of the same prompts and noise."""

    stage: str
    control: str
    metric: str
    pictures: Sequence[Picture]
    of_control: Sequence[Picture]

    def difference(self) -> tuple[float, float, float]:
        return paired_bootstrap(self.pictures, self.of_control, self.metric)


@dataclass
class Bench:
    """The arms of one seed below a folder; `overrides` go to every run."""

    folder: Path
    seed: int
    arms: Sequence[Arm] = ARMS
    overrides: list[str] = field(default_factory=list)
    scale: float = 1.0
    flops: dict[str, float] = field(default_factory=dict)  # arm -> of a training step
    steps: dict[str, int] = field(default_factory=dict)

    def output(self, arm: str) -> Path:
        return self.folder / f"seed-{self.seed}" / arm

    def words(self, arm: Arm, final: bool = True) -> list[str]:
        """The experiment and the settings of an arm, without its number of steps until that is known."""
        words = [arm.experiment, f"run.name=curriculum/seed-{self.seed}/{arm.name}", f"seed_everything={self.seed}"]
        words.append(f"run.output_dir={self.output(arm.name)}")
        if arm.starts_from:
            words.append(f"model.init_args.init_from={self.output(arm.starts_from)}/checkpoints/last.ckpt")
        if arm.data_of:
            words += data_overrides(next(other for other in ARMS if other.name == arm.data_of).experiment, arm)
        words += self.overrides
        return [*words, f"trainer.max_steps={self.steps[arm.name]}"] if final else words

    def plan(self, arm: Arm) -> None:
        """Work out the FLOPs of a step and how many steps the arm has."""
        config = compose(arm.experiment, self.words(arm, final=False)[1:])
        self.flops[arm.name] = flops_of_a_step(config)
        own = max(1, round(config["trainer"]["max_steps"] * self.scale))
        if arm.as_long_as:
            spent = self.steps[arm.as_long_as] * self.flops[arm.as_long_as]
            own = max(1, round(spent / self.flops[arm.name]))
        self.steps[arm.name] = own

    def run(self, arm: Arm) -> None:
        words = self.words(arm)
        print(f"\n$ lightning run {shlex.join(words)}", flush=True)
        if code := cli.main(["run", *words], program="lightning"):
            sys.exit(code)

    def merge(self) -> dict[str, Any] | None:
        """The table of the sweep over mixes, and its best one beside the variants; None where nothing can merge."""
        if "merge" not in cli.TASKS:
            return None
        output, variants = self.output("merge"), [self.output(f"sft-{name}") for name in ("words", "counting")]
        table = output / "merge.json"
        if not table.is_file() or json.loads(table.read_text())["best"] is None:
            sys.path.append(str(Path(__file__).parent))  # where the scorer is found
            words = ["merge", f"variants=[{variants[0]}, {variants[1]}]", f"sweep={MERGE_STEPS}"]
            words += [
                f"base={self.output('omni')}",
                f"score={Path(__file__).stem}:skills",
                f"score_arguments.prompts_per_task={self.prompts_per_task}",
            ]
            words += [f"output={output}", "experiment_name=null", "dtype=float32"]
            print(f"\n$ lightning run {shlex.join(words)}", flush=True)
            if code := cli.main(["run", *words], program="lightning"):
                sys.exit(code)
        judged = {
            folder.name: judge_skills(ZImagePipeline.from_pretrained(folder / "pipeline"), self.prompts_per_task, 7000)
            for folder in (output, *variants)
        }
        return {**json.loads(table.read_text()), "judged": judged}

    @property
    def prompts_per_task(self) -> int:
        score = compose("tiny/sft", self.overrides)["trainer"]["callbacks"]["score"]
        return int(score["init_args"]["prompts_per_task"])

    def records(self, arm: str) -> list[Picture]:
        """The judged pictures of an arm's end."""
        path = self.output(arm) / "scores" / f"step-{self.steps[arm]:08d}.json"
        return list(json.loads(path.read_text())["records"])

    def comparisons(self, merged: dict[str, Any] | None) -> list[Comparison]:
        """Each stage with its control, and the mix with each variant."""
        run = {arm.name for arm in self.arms}
        found = [Comparison(*names, "overall", *map(self.records, names)) for names in QUESTIONS if run >= {*names}]
        judged = merged["judged"] if merged else {}
        return found + [
            Comparison("merge", name, "skills", judged["merge"], records)
            for name, records in judged.items()
            if name != "merge"
        ]


def data_overrides(experiment: str, arm: Arm) -> list[str]:
    """What makes an experiment train on the data of another one, with its captions and without its balance."""
    theirs = compose(experiment)["data"]["init_args"]
    own = compose(arm.experiment)["data"]["init_args"]
    plain = {"downscale": 1}  # where an experiment says nothing; of the others that is null
    names = ("data_dir", "canvases", "downscale", "num_samples", "task_weights", "balance", "caption_weights")
    both = {name: [init_args.get(name, plain.get(name)) for init_args in (theirs, own)] for name in names}
    settings = {name: value for name, (value, own_value) in both.items() if value != own_value}
    return [f"data.init_args.{name}={json.dumps(value)}" for name, value in settings.items()]


def flops_of_a_step(config: dict[str, Any]) -> float:
    """Mean over the first batches, forward and backward: three forwards. Prepares the data where they are not there."""
    built = cli.build({**config, "trainer": {**config["trainer"], "callbacks": {}, "logger": False}})
    network = backbone_config(config["model"]["init_args"]["backbone"])
    module = built.datamodule
    module.prepare_data()
    module.setup("fit")
    total = 0
    for batch in islice(module.train_dataloader(), BATCHES_COUNTED):
        pictures = [int(image_tokens(image.shape[2], image.shape[1])) for image in batch["images"]]
        captions = [len(tokens) for tokens in built.model.text_encoder.tokenize(batch["captions"])]
        total += 3 * forward_flops(network, pictures, captions)
    return total / min(BATCHES_COUNTED, len(module.train_dataloader()))


def skills(pipeline: ZImagePipeline, prompts_per_task: int, seed: int = 5000) -> dict[str, float]:
    """A scorer for `lightning run merge`: accuracy in words and counting at the final sizes, and their mean."""
    found = accuracies(judge_skills(pipeline, prompts_per_task, seed))
    return {"mean": found["skills"], **{task: found[task] for task in SKILLS}}


def judge_skills(pipeline: ZImagePipeline, prompts_per_task: int, seed: int) -> list[dict[str, Any]]:
    """Pictures of words and counting at the final sizes, as {"metadata", "canvas", "correct"}; seed: of the noise."""
    judged: list[dict[str, Any]] = []
    for width, height in compose("tiny/sft")["trainer"]["callbacks"]["score"]["init_args"]["canvases"]:
        prompts = [m for m in heldout_prompts(prompts_per_task, width=width) if m["tag"] in SKILLS]
        noise = [seed + len(judged) + place for place in range(len(prompts))]
        with torch.no_grad():
            pictures = pipeline([m["prompt"] for m in prompts], height=height, width=width, seed=noise, batch_size=64)
        for picture, metadata in zip(pictures, prompts, strict=True):
            right = is_right(judge(np.asarray(picture), metadata))
            judged.append({"metadata": metadata, "canvas": f"{width}x{height}", "correct": right})
    return judged


# ------------------------------------------------------------------------------------------------------------- scoring


def accuracies(records: Sequence[Picture]) -> dict[str, float]:
    """Share of correct pictures in each task, `overall` (GenEval's mean of six), `skills` (words and counting)."""
    by_task: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        by_task[record["metadata"]["tag"]].append(bool(record["correct"]))
    found = {task: float(np.mean(values)) for task, values in by_task.items()}
    return summed_up(found)


def summed_up(tasks: dict[str, Any]) -> dict[str, Any]:
    """With the means over those of the tasks that were asked."""
    means = {"overall": GENEVAL_TASKS, "skills": SKILLS}
    return tasks | {
        name: sum(tasks[task] for task in members) / len(members)
        for name, members in means.items()
        if all(task in tasks for task in members)
    }


def paired_bootstrap(stage: Sequence[Picture], control: Sequence[Picture], metric: str) -> tuple[float, float, float]:
    """(difference, low, high): stage less control, over the same pictures in the same order."""
    generator = np.random.default_rng(0)
    clusters: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for ours, theirs in zip(stage, control, strict=True):
        assert ours["metadata"]["prompt"] == theirs["metadata"]["prompt"] and ours["canvas"] == theirs["canvas"]
        difference = int(ours["correct"]) - int(theirs["correct"])
        clusters[ours["metadata"]["tag"]][ours["metadata"]["prompt"]].append(difference)
    resampled, mean = {}, {}
    for task, prompts in clusters.items():
        sums, sizes = (np.array([function(values) for values in prompts.values()]) for function in (sum, len))
        chosen = generator.integers(0, len(prompts), (RESAMPLES, len(prompts)))
        resampled[task] = sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)
        mean[task] = sums.sum() / sizes.sum()
    low, high = np.quantile(summed_up(resampled)[metric], [0.025, 0.975])
    return float(summed_up(mean)[metric]), float(low), float(high)


# -------------------------------------------------------------------------------------------------------------- tables


def report(bench: Bench, merged: dict[str, Any] | None, compared: Sequence[Comparison]) -> dict[str, Any]:
    """Prints the tables of a seed; gives what stands in them."""
    rows: list[dict[str, Any]] = []
    for arm in bench.arms:
        spent = bench.steps[arm.name] * bench.flops[arm.name]
        rows.append({"arm": arm.name, "from": arm.starts_from, "steps": bench.steps[arm.name], "flops": spent,
                     **accuracies(bench.records(arm.name))})  # fmt: skip
    names = ("overall", *GENEVAL_TASKS, "word", "skills")
    print(f"\nseed {bench.seed}\n\n| arm | from | steps | TFLOPs | {' | '.join(names)} |")
    print(f"| --- | --- | --- | --- |{' --- |' * len(names)}")
    for row in rows:
        scores = " | ".join(f"{row[name]:.3f}" for name in names)
        print(f"| {row['arm']} | {row['from'] or '-'} | {row['steps']} | {row['flops'] / 1e12:.1f} | {scores} |")
    if merged:
        report_merge(merged)
    differences = []
    print("\n| difference | of | value | 95 % |\n| --- | --- | --- | --- |")
    for one in compared:
        difference, low, high = one.difference()
        names = {"stage": one.stage, "control": one.control}
        differences.append({**names, "difference": difference, "low": low, "high": high})
        print(f"| {one.stage} - {one.control} | {one.metric} | {difference:+.3f} | {told((low, high))} |")
    return {"seed": bench.seed, "arms": rows, "differences": differences, "merge": merged}


def report_merge(merged: dict[str, Any]) -> None:
    """Prints the sweep, and the best mix beside the variants."""
    print("\n| words | counting | mean of both | word | counting |\n| --- | --- | --- | --- | --- |")
    for row in merged["rows"]:
        found = " | ".join(f"{row['metrics'][name]:.3f}" for name in ("mean", "word", "counting"))
        print(f"| {row['weights'][0]:g} | {row['weights'][1]:g} | {found} |")
    print(f"\nbest mix: {merged['best']}; on other noise:\n\n| | mean of both | word | counting |")
    print("| --- | --- | --- | --- |")
    for name, records in merged["judged"].items():
        found = accuracies(records)
        print(f"| {name} | " + " | ".join(f"{found[metric]:.3f}" for metric in ("skills", "word", "counting")) + " |")


def report_together(seeds: Sequence[Sequence[Comparison]]) -> list[dict[str, Any]]:
    """Prints the comparisons of all seeds as one; gives what stands in the table."""
    rows = []
    print("\n| all seeds | of | value | 95 % by prompt | 95 % by seed | seed by seed |\n|" + " --- |" * 6)
    for same in zip(*seeds, strict=True):
        pictures, of_control = ([p for one in same for p in getattr(one, name)] for name in ("pictures", "of_control"))
        together = replace(same[0], pictures=pictures, of_control=of_control)
        value, *by_prompt = together.difference()
        each = [one.difference()[0] for one in same]
        _, *by_seed = over_runs(each)
        names = {"stage": together.stage, "control": together.control}
        rows.append({**names, "difference": value, "by_prompt": by_prompt, "by_seed": by_seed, "each": each})
        cells = [f"{together.stage} - {together.control}", together.metric, f"{value:+.3f}", told(by_prompt)]
        print(f"| {' | '.join(cells)} | {told(by_seed)} | {'; '.join(f'{change:+.3f}' for change in each)} |")
    return rows


def told(ends: Sequence[float | None]) -> str:
    return " to ".join("-" if end is None else f"{end:+.3f}" for end in ends)


def main() -> None:
    options = parse_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = []
    arms = [arm for arm in ARMS if arm.name not in options.without]
    for seed in options.seeds:
        bench = Bench(options.folder, seed, arms, options.overrides, options.scale)
        for arm in arms:
            bench.plan(arm)
            bench.run(arm)
        merged = bench.merge()
        results.append((bench, merged, bench.comparisons(merged)))
    tables = [report(*result) for result in results]
    together = report_together([compared for _, _, compared in results])
    found = {"seeds": tables, "together": together}
    (options.folder / "curriculum.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/curriculum"))
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of steps")
    parser.add_argument("--without", nargs="+", default=[], choices=CONTROLS, help="controls that are left out")
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
