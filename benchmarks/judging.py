"""How benchmarks on TinyWorld judge a model: pictures of held-out statements, beside real ones of the same statements.

Right or wrong is said by TinyWorld's verifier and GenEval's rules, and once more by a classifier (`gold`); KID,
diversity and the rest are measured on that classifier's features. Every model draws the same statements from the same
noise, PICTURES of each, and what was judged is kept beside the model. 95 % intervals resample the statements.
"""

import argparse
import hashlib
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_modules.tinyworld.combinations import GENEVAL_TASKS, Metadata
from data_modules.tinyworld.verifier import judge
from data_modules.tinyworld.world import draw_statement, heldout_prompts
from evaluation.drawing import counted
from evaluation.fidelity import tinyworld_classifier
from evaluation.fidelity.comparison import ComparisonSettings, Estimate, PictureSet, compare, prompt_weights, share
from evaluation.fidelity.tinyworld_classifier import ClassifierConfig, TinyWorldClassifier, as_input, obtain
from zimage_lit import cli
from zimage_lit.callbacks.distribution_score import BATCH, picture_set, reconstructed
from zimage_lit.callbacks.tinyworld_score import is_right
from zimage_lit.config import compose
from zimage_lit.files import write_atomically
from zimage_lit.pipeline import ZImagePipeline
from zimage_lit.rewards.tinyworld_likelihood import log_likelihoods

PROMPTS_PER_TASK = 12  # held-out statements of each of GenEval's tasks, fewer where there are no more
PICTURES = 24  # of each statement
NOISE_SEED, REAL_SEED = 40_000, 3  # of the pictures that are judged
COMPARISON = ComparisonSettings(resamples=1000)
JUDGE = ClassifierConfig(seed=7)  # another one than curves are drawn by
REWARD_CLASSIFIER, REWARD_CONFIG = "reward_classifier", ClassifierConfig(seed=1, width=16)
METRICS = (
    "accuracy",
    "gold",
    "gold_counting",
    "reward",
    "kid",
    "fd",
    "sliced_wasserstein",
    "precision",
    "recall",
    "diversity",
)


def lightning_run(words: Sequence[str]) -> None:
    """`lightning run WORDS` in this process, said before; ends the benchmark where it fails."""
    print(f"\n$ lightning run {shlex.join(words)}", flush=True)
    if code := cli.main(["run", *words], program="lightning"):
        sys.exit(code)


def with_stage(words: list[str], class_path: str) -> list[str]:
    """An arm with another class as its stage: that takes none of the experiment's settings by itself."""
    init_args = compose(words[0], words[1:])["model"]["init_args"]
    return [*words, f"model={json.dumps({'class_path': class_path, 'init_args': init_args})}"]


def benchmark_options(description: str | None, groups: Iterable[str], folder: str, start: str) -> argparse.Namespace:
    """What a benchmark of arms is asked for; `start` is the model that all begin from, a quickstart made where there
    is none yet."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=sorted(set(groups)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path(folder))
    parser.add_argument(f"--{start}", dest="start", type=Path, default=Path("outputs/quickstart/pipeline"))
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="key=value for every run")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.start / "model_index.json").is_file():
        lightning_run(["quickstart", f"run.output_dir={options.start.parent}"])
    return options


def write_tables(tables: dict[str, Any], options: argparse.Namespace, seed: int) -> None:
    place = options.folder / f"seed-{seed}" / f"{'-'.join(options.groups)}.json"
    write_atomically(place, json.dumps(tables, indent=1) + "\n")


@dataclass(frozen=True)
class Judges:
    """gold: the classifier that nobody is trained by. reward: another one, whose likelihoods rewards may be."""

    gold: TinyWorldClassifier
    reward: TinyWorldClassifier

    @classmethod
    def obtain(cls, folder: Path) -> "Judges":
        """Those below a folder, trained where they are not there yet."""
        return cls(obtain(folder / "classifier", JUDGE), obtain(folder / REWARD_CLASSIFIER, REWARD_CONFIG))


@dataclass(frozen=True)
class Judged:
    """What is known of the pictures of one model."""

    pictures: PictureSet
    right: np.ndarray  # (N,) bool, to the verifier
    gold: np.ndarray  # (N,) bool, to the classifier
    likelihoods: np.ndarray  # (N,), under the reward's classifier
    evaluations: float  # of the network, a picture


@cache
def statements() -> list[Metadata]:
    """Held-out statements of GenEval's tasks, each once."""
    found = {
        (metadata["tag"], metadata["prompt"]): metadata
        for metadata in heldout_prompts(PROMPTS_PER_TASK, seed=1)
        if metadata["tag"] in GENEVAL_TASKS
    }
    return list(found.values())


def asked() -> list[Metadata]:
    """The statement of every picture."""
    return [metadata for metadata in statements() for _ in range(PICTURES)]


def numbers() -> np.ndarray:
    """The number of every picture's statement."""
    return np.repeat(np.arange(len(statements())), PICTURES)


def draw_and_judge(pipeline: Path, store: Path, judges: Judges, **sampling: Any) -> Judged:
    """Pictures of a pipeline, drawn with its own settings but for `sampling`; from `store` where it holds just these,
    of the pipeline as it is now."""
    question = fingerprint(pipeline, judges, sampling)
    if not is_kept(store, pipeline, question):
        drawn = ZImagePipeline.from_pretrained(pipeline)
        texts = [metadata["prompt"] for metadata in asked()]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seeds = [NOISE_SEED + n for n in range(len(texts))]
            pictures, asked_in_all = counted(drawn, texts, seed=seeds, batch_size=64, **sampling)
        images = as_input(pictures)
        seen = picture_set(images, numbers(), judges.gold, COMPARISON)
        right = [is_right(judge(np.asarray(picture), known)) for picture, known in zip(pictures, asked(), strict=True)]
        with torch.no_grad():
            likelihoods = log_likelihoods(judges.reward(images), asked())
        buffer = io.BytesIO()
        found = {"right": right, "gold": seen_as_right(images, judges.gold), "likelihoods": likelihoods.numpy()}
        found["evaluations"] = asked_in_all / len(texts)
        np.savez(buffer, features=seen.features, projections=seen.projections, question=question, **found)
        write_atomically(store, buffer.getvalue())
    kept = np.load(store)
    pictures = PictureSet(kept["features"], kept["projections"], numbers())
    return Judged(pictures, kept["right"], kept["gold"], kept["likelihoods"], float(kept["evaluations"]))


def seen_as_right(images: torch.Tensor, classifier: TinyWorldClassifier) -> list[bool]:
    """Whether a classifier finds in each picture what its statement says."""
    records: list[dict[str, Any]] = []
    known = asked()
    with torch.no_grad():
        for start in range(0, len(images), BATCH):
            places = slice(start, start + BATCH)
            records += tinyworld_classifier.judge(classifier(images[places]), known[places])
    return [is_right(record) for record in records]


def fingerprint(pipeline: Path, judges: Judges, sampling: dict[str, Any]) -> str:
    """Of all that decides what is stored of a pipeline's pictures, but its weights."""
    by = judges.gold.fingerprint(), judges.reward.fingerprint()
    question = [str(pipeline.resolve()), sampling, asked(), NOISE_SEED, repr(COMPARISON), by]
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def is_kept(store: Path, pipeline: Path, question: str) -> bool:
    if not store.is_file() or store.stat().st_mtime < (pipeline / "model_index.json").stat().st_mtime:
        return False
    kept = np.load(store)
    return {"question", "evaluations"} <= set(kept) and str(kept["question"]) == question


def real_pictures(pipeline: Path, judges: Judges, first: int = 0) -> PictureSet:
    """As many real pictures of the same statements, from the world's number `first` on, through a pipeline's codec."""
    codec = ZImagePipeline.from_pretrained(pipeline).codec
    each = range(first, first + PICTURES)
    images = as_input([draw_statement(metadata, i, REAL_SEED).image for metadata in statements() for i in each])
    return picture_set(reconstructed(images, codec), numbers(), judges.gold, COMPARISON)


# --------------------------------------------------------------------------------------------------------------- tables


def overall(right: np.ndarray, wanted: Sequence[str] = GENEVAL_TASKS) -> Estimate:
    """GenEval's overall score: the mean over the tasks of the share of right pictures; of `wanted` alone."""
    tasks = np.array([metadata["tag"] for metadata in statements()])
    asked_for = np.isin(tasks, wanted)  # so that no resample is without a statement
    tasks, shares = tasks[asked_for], right.reshape(len(tasks), PICTURES).mean(axis=1)[asked_for]

    def mean(weights: np.ndarray) -> float:
        parts = [(tasks == task, weights[tasks == task]) for task in wanted]
        return float(np.mean([np.average(shares[own], weights=w) for own, w in parts if w.sum()]))

    replicates = [mean(each) for each in prompt_weights(len(tasks), COMPARISON.resamples, COMPARISON.seed)]
    return Estimate.of(mean(np.ones(len(tasks))), np.array(replicates))


def difference(first: Estimate, second: Estimate) -> Estimate:
    return Estimate.of(first.value - second.value, first.replicates - second.replicates)


def measured(judged: Judged, real: PictureSet) -> dict[str, Estimate]:
    """METRICS with their intervals."""
    found = {"accuracy": overall(judged.right), "gold": overall(judged.gold)}
    found["gold_counting"] = overall(judged.gold, ["counting"])
    found["reward"] = share(judged.likelihoods, numbers(), COMPARISON)
    return {**found, **compare(judged.pictures, real, COMPARISON)}


def table(rows: dict[str, dict[str, Estimate]], judged: dict[str, Judged]) -> None:
    print(f"\n| arm | NFE | {' | '.join(METRICS)} |\n| --- | --- |{' --- |' * len(METRICS)}")
    for label, found in rows.items():
        cells = (f"{found[n].value:.3f} [{found[n].low:.3f}, {found[n].high:.3f}]" for n in METRICS)
        print(f"| {label} | {judged[label].evaluations:.4g} | {' | '.join(cells)} |")


@dataclass(frozen=True)
class Bar:
    """What was to be reached, fixed before the first arm ran. reached: from (label, metric) -> Estimate."""

    what: str
    side: str  # at least, at most
    bar: float
    reached: Callable[[Callable[[str, str], Estimate]], Estimate]

    def met(self, value: float) -> bool:
        return value >= self.bar if self.side == "at least" else value <= self.bar


def verdicts(bars: Sequence[Bar], rows: dict[str, dict[str, Estimate]]) -> list[dict[str, Any]]:
    """The bars with what was reached; those whose arms were not run are left out, ratios to what may be 0 not met."""
    print("\n| bar | reached | met |\n| --- | --- | --- |")
    found = []
    for bar in bars:
        try:
            estimate = bar.reached(lambda label, metric: rows[label][metric])
        except KeyError:
            continue
        except ValueError as error:  # a KID that cannot be told from 0 divides nothing
            print(f"| {bar.what}: {bar.side} {bar.bar:g} | {error} | no |")
            found.append({"bar": bar.what, bar.side: bar.bar, "error": str(error), "met": False})
            continue
        spread = f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
        print(f"| {bar.what}: {bar.side} {bar.bar:g} | {spread} | {'yes' if bar.met(estimate.value) else 'no'} |")
        found.append({"bar": bar.what, bar.side: bar.bar, **plain(estimate), "met": bar.met(estimate.value)})
    return found


def plain(estimate: Estimate) -> dict[str, float]:
    return {name: float(getattr(estimate, name)) for name in ("value", "low", "high")}
