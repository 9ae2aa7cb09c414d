"""Concept balancing: the formula against a twin in plain Python, shares against the prior, resume and ranks."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_modules import TextToImageDataModule
from data_modules.balancing import (
    TAGS,
    BalanceSettings,
    balanced_weights,
    collect_tags,
    inverse_document_frequency,
    read_tags,
    tags_file,
    tags_of,
)
from data_modules.buckets import SizeMapping
from data_modules.manifest import write_manifest
from data_modules.planning import PlanSettings, SampleTable, plan_epoch
from data_modules.preparation import PrepareSettings, prepare
from data_modules.streaming import ResumableLoader
from zimage_lit.errors import UserError

SIZED = 60  # samples of the sized data set in conftest.py
EVERY = BalanceSettings(min_samples=1, max_repeats=1e9)


def some_documents(number: int = 200) -> list[list[str]]:
    """Tags as people give them: few are common, many rare, some twice in a sample, some samples without any."""
    dice = np.random.default_rng(5)
    names = [f"tag {n}" for n in range(12)]
    common = 1 / np.arange(1, 13) / sum(1 / np.arange(1, 13))
    return [dice.choice(names, dice.integers(0, 6), p=common).tolist() for _ in range(number)]


def twin(documents: Sequence[Sequence[str]], settings: BalanceSettings) -> list[float]:
    """The docstring of `balanced_weights`, word by word and slowly."""
    holding = Counter(tag for document in documents for tag in set(document))
    concepts = [tag for tag, count in holding.items() if count >= settings.min_samples]
    mean_length = sum(map(len, documents)) / len(documents)

    def bm25(tag: str, document: Sequence[str]) -> float:
        rarity = math.log(1 + (len(documents) - holding[tag] + 0.5) / (holding[tag] + 0.5))
        times = document.count(tag)
        length = 1 - settings.b + settings.b * len(document) / mean_length
        return rarity * times * (settings.k1 + 1) / (times + settings.k1 * length)

    parts = []
    for document in documents:
        scores = {tag: bm25(tag, document) for tag in concepts if tag in document}
        parts.append({tag: score / sum(scores.values()) for tag, score in scores.items()})
    known = [part for part in parts if part]
    share = {tag: sum(part.get(tag, 0) for part in known) / len(known) for tag in concepts}
    wanted = {tag: (settings.prior or {}).get(tag, 1.0) for tag in concepts}
    pull = {tag: (wanted[tag] / sum(wanted.values()) / share[tag]) ** settings.strength for tag in concepts}
    weights = [sum(part[tag] * pull[tag] for tag in part) for part in parts]
    mean = sum(weights) / len(known)
    return [
        min(weight / mean, settings.max_repeats) if part else 1.0 for weight, part in zip(weights, parts, strict=True)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        EVERY,
        BalanceSettings(k1=0.0, b=0.0),
        BalanceSettings(prior={"tag 3": 4.0, "tag 0": 0.0}, strength=0.5, min_samples=20),
        BalanceSettings(k1=2.0, b=1.0, max_repeats=1.5, min_samples=1),
    ],
    ids=str,
)
def test_weights_are_those_of_the_formula(settings: BalanceSettings) -> None:
    documents = some_documents()
    weights = balanced_weights(collect_tags(documents), settings)
    np.testing.assert_allclose(weights, twin(documents, settings), rtol=1e-12)
    assert [] in documents and weights.max() <= settings.max_repeats


def test_rarity_is_robertsons_and_never_below_zero() -> None:
    holding = np.array([1, 10, 50, 99, 100])
    rarity = inverse_document_frequency(holding, 100)
    assert rarity[0] == pytest.approx(math.log(1 + 99.5 / 1.5)) and rarity[2] == pytest.approx(math.log(2))
    assert (rarity > 0).all() and (np.diff(rarity) < 0).all()


def drawn(weights: np.ndarray, documents: Sequence[Sequence[str]], epochs: int = 20) -> Counter[str]:
    """How often each tag is drawn by the planner, over so many epochs."""
    table = SampleTable(len(weights), weight=weights)
    found: Counter[str] = Counter()
    for epoch in range(epochs):
        plan = plan_epoch(table, PlanSettings(4, drop_last=False), epoch)
        found.update(tag for index in plan.order.tolist() for tag in documents[index])
    return found


def test_drawn_shares_of_single_concepts_are_the_priors() -> None:
    documents = [["cat"]] * 160 + [["dog"]] * 32 + [["axolotl"]] * 8
    table = collect_tags(documents)
    for prior, wanted in (
        (None, {"cat": 1 / 3, "dog": 1 / 3, "axolotl": 1 / 3}),
        ({"cat": 2.0, "dog": 1.0, "axolotl": 0.5}, {"cat": 4 / 7, "dog": 2 / 7, "axolotl": 1 / 7}),
    ):
        found = drawn(balanced_weights(table, BalanceSettings(prior=prior)), documents)
        for name, share in wanted.items():
            assert found[name] / found.total() == pytest.approx(share, abs=0.01)
    capped = drawn(balanced_weights(table, BalanceSettings(max_repeats=2)), documents)
    assert capped["axolotl"] == 20 * 2 * 8


def test_drawn_shares_of_samples_with_many_tags_move_to_the_prior() -> None:
    """A rare tag is drawn more, a common one less, and more so with more strength."""
    documents = some_documents(2000)
    table = collect_tags(documents)
    distances = []
    for strength in (0.0, 0.5, 1.0):
        found = drawn(balanced_weights(table, BalanceSettings(strength=strength)), documents, epochs=4)
        shares = np.array([found[name] for name in table.names]) / found.total()
        distances.append(np.abs(shares - 1 / len(shares)).sum())
    assert distances[2] < distances[1] < distances[0]
    assert distances[2] < 0.85 * distances[0]


def test_a_rare_tag_takes_the_sample_that_it_shares_with_a_common_one() -> None:
    documents = [["person"]] * 90 + [["person", "axolotl"]] * 10
    weights = balanced_weights(collect_tags(documents), BalanceSettings())
    assert weights[-1] > 3 and weights[0] < 0.8


def test_misspelt_tags_are_no_concepts() -> None:
    documents = [["cat"]] * 50 + [["dog"]] * 50 + [["dgo"]]
    weights = balanced_weights(collect_tags(documents), BalanceSettings(min_samples=2))
    assert weights[-1] == 1 and weights[:100] == pytest.approx(1)


@pytest.mark.parametrize(
    ("captions", "concept", "tags"),
    [
        ({"en": {"tags": "Cat, red  chair,, cat"}}, None, ["cat", "red  chair", "cat"]),
        ({"zh": {"tags": "猫，红椅子、窗"}, "fr": {"short": "un chat"}}, "Cat", ["猫", "红椅子", "窗", "cat"]),
        ({"zh": {"tags": "猫"}, "en": {"tags": "cat"}}, None, ["cat"]),
        ({"en": {"short": "a cat, a dog"}}, None, []),
    ],
)
def test_tags_are_read_from_the_caption_of_that_kind(captions: Any, concept: str | None, tags: list[str]) -> None:
    assert tags_of(captions, concept) == tags


# In a data set


@pytest.fixture(scope="module")
def tagged(sized_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures: fifty of a cat, ten of a dog."""
    folder = Path(shutil.copytree(sized_folder, tmp_path_factory.mktemp("tagged") / "data"))
    tags = collect_tags([["dog"] if index % 6 == 0 else ["cat"] for index in range(SIZED)])
    (folder / "train" / TAGS).write_bytes(tags_file(tags))
    write_manifest(folder, "tagged", {"train": SIZED}, {"en": ["short"]}, {})
    return folder


def loader(folder: Path, **options: Any) -> ResumableLoader:
    settings = {"batch_size": 4, "balance": BalanceSettings(), "sizes": SizeMapping(64), **options}
    module = TextToImageDataModule(str(folder), **settings)
    module.setup("fit")
    return module.train_dataloader()


def steps(source: ResumableLoader, count: int) -> list[list[int | str]]:
    found: list[list[int | str]] = []
    while len(found) < count:
        found += [batch["ids"] for batch in islice(source, count - len(found))]
    return found


def test_training_sees_the_priors_shares_and_other_samples_each_epoch(tagged: Path) -> None:
    source = loader(tagged)
    seen = [Counter(name for ids in steps(source, 15) for name in ids) for _ in range(10)]
    total = sum(seen, Counter())
    dogs = sum(count for name, count in total.items() if int(name) % 6 == 0)
    assert dogs / total.total() == pytest.approx(0.5, abs=0.03)
    assert len({frozenset(epoch.items()) for epoch in seen}) > 1


@pytest.mark.parametrize("limit", [{}, {"batch_size": None, "token_budget": 400}])
def test_a_position_continues_exactly(tagged: Path, limit: dict[str, Any]) -> None:
    expected = steps(loader(tagged, **limit), 40)
    for done in (1, 17, 33):
        stopped = loader(tagged, **limit)
        assert steps(stopped, done) == expected[:done]
        state = json.loads(json.dumps(stopped.state_dict()))
        resumed = loader(tagged, num_workers=1, **limit)
        resumed.load_state_dict(state)
        assert steps(resumed, 40 - done) == expected[done:]
    with pytest.raises(UserError, match=r"balance=.* cannot be continued exactly"):
        loader(tagged, balance=BalanceSettings(strength=0.5), **limit).load_state_dict(state)


def test_two_ranks_share_the_epochs_of_one(tagged: Path) -> None:
    whole = loader(tagged, batch_size=8)
    parts = [
        ResumableLoader(whole.reader, whole._settings["fingerprint"], 4, 0, rank=rank, world_size=2, table=whole._table)
        for rank in range(2)
    ]
    for epoch in range(3):
        together = whole._plan(epoch)
        ranks = [part._plan(epoch) for part in parts]
        assert len(ranks[0]) == len(ranks[1]) == len(together)
        for step in range(len(together)):
            mine, theirs = (ranks[rank].batch(step, rank).tolist() for rank in range(2))
            assert len(mine) == len(theirs) == 4
            assert sorted(mine + theirs) == sorted(together.batch(step, 0).tolist())


def test_preparation_notes_tags_and_a_prior_may_name_them(tmp_path: Path) -> None:
    tags = ["cat, chair", "cat", "dog, chair", None]
    lines = [
        {"captions": {"en": {"short": str(n), **({"tags": tag} if tag else {})}}, "id": f"id-{n}", "concept": "animal"}
        for n, tag in enumerate(tags)
    ]
    source = tmp_path / "list.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(PrepareSettings(str(source), str(tmp_path / "data"), num_workers=1, part_size=2))
    table = read_tags(tmp_path / "data/train", 4)
    starts = [0, *table.ends.tolist()]
    found = [[table.names[tag] for tag in table.tags[a:b]] for a, b in pairwise(starts)]
    assert found == [["cat", "chair", "animal"], ["cat", "animal"], ["dog", "chair", "animal"], ["animal"]]
    weights = balanced_weights(table, BalanceSettings(prior={"dog": 5.0}, min_samples=1))
    assert weights.argmax() == 2


def test_what_cannot_be_balanced_is_refused_in_a_sentence(tagged: Path, sized_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tags\.npz is missing, which data.init_args.balance needs: prepare data"):
        loader(sized_folder)
    with pytest.raises(UserError, match=r"balance.prior.cow is no concept .* there are dog, cat\.$"):
        loader(tagged, balance=BalanceSettings(prior={"cow": 1.0}))
    with pytest.raises(UserError, match="prior gives no concept a weight above 0"):
        loader(tagged, balance=BalanceSettings(prior={"cat": 0.0, "dog": 0.0}))
    with pytest.raises(UserError, match="balance and concept_weights both"):
        loader(tagged, concept_weights={"cat": 2.0})
    for name, value in (("strength", 1.5), ("b", -0.1), ("k1", math.inf), ("max_repeats", 0.5), ("min_samples", 0)):
        with pytest.raises(UserError, match=rf"balance.{name} "):
            BalanceSettings(**{name: value})
    with pytest.raises(UserError, match=r"prior.cat is -1"):
        BalanceSettings(prior={"cat": -1})
    path = tmp_path / TAGS
    path.write_bytes(tags_file(collect_tags([["cat"]] * 3)))
    with pytest.raises(UserError, match="has the tags of 3 samples and the split has 4"):
        read_tags(tmp_path, 4)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"tags\.npz cannot be read .*: copy it again"):
        read_tags(tmp_path, 3)
