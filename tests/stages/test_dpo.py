"""Preference training: what a pair shares, which pairs are learnt from, and that an interrupted run goes on exactly."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distillation import Codec, same, write_teacher
from pairs_of_pictures import Data, Stage, fit, pairs_of, settings_of

from zimage_lit.backbone.parallelize import ParallelizeSettings
from zimage_lit.callbacks.guards import StepGuard
from zimage_lit.callbacks.preference_guard import PreferenceGuard
from zimage_lit.errors import UserError
from zimage_lit.lora import LoRASettings
from zimage_lit.objectives import TimestepLaw
from zimage_lit.rewards.controls import Brightness
from zimage_lit.rng import generator
from zimage_lit.run_folder import last_checkpoint
from zimage_lit.sampling import sigmas
from zimage_lit.stages import DPOModule
from zimage_lit.stages.dpo import CurriculumSettings, PreferenceSettings
from zimage_lit.stages.initial_weights import build_backbone, read_checkpoint
from zimage_lit.stages.optimizers import OptimizerSettings

LORA = LoRASettings(rank=4)
WAYS = [
    pytest.param({}, id="whole"),
    pytest.param({"lora": LORA}, id="lora"),
    pytest.param({"refresh_every_n_steps": 3}, id="whole, refreshed"),
    pytest.param({"lora": LORA, "refresh_every_n_steps": 3}, id="lora, refreshed"),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("start") / "transformer")


def stage(start: Path, **changes: Any) -> Stage:
    return Stage(**settings_of(start, **changes))


# ---------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("settings", WAYS)
def test_a_run_begins_at_ln_2_exactly(start, tmp_path, settings, precision):
    seen = fit(stage(start, **settings), tmp_path, 2, precision=precision)
    first, second = seen.logged
    assert first["train/loss"] == first["train/preference_loss"] == float(torch.tensor(math.log(2)))
    assert first["train/implicit_accuracy"] == 0.5
    assert first["train/winner_error"] == first["train/loser_error"] == first["train/margin"] == 0
    assert first["train/gradient_norm"] > 0 and second["train/loss"] != first["train/loss"]


def test_loss_and_figures_are_the_formulas_written_out_pair_by_pair(start, tmp_path):
    module = stage(start, preference=PreferenceSettings(beta=30.0, anchor=0.2), lora=LORA)
    fit(module, tmp_path, 3)
    batch = pairs_of(range(3))
    with torch.no_grad():
        found = DPOModule.times_and_noise(module, batch["winner_latents"], "val", 5)
        module.times_and_noise = lambda *_: found  # type: ignore[method-assign]
        figures = module.compared(batch, "val", 5)
    t, noise = found
    draws = [generator(1, f"val/{purpose}", 5) for purpose in ("timesteps", "noise")]
    assert torch.equal(t, torch.sigmoid(-torch.randn(3, generator=draws[0])))
    reference = build_backbone(module.config, str(start), 0)
    for i in range(3):
        errors = []
        for network in (module.backbone, reference):
            for role in ("winner_latents", "loser_latents"):
                clean = batch[role][i]
                noisy = t[i] * clean + (1 - t[i]) * noise[i]
                with torch.no_grad():
                    (velocity,) = network([noisy], t[i : i + 1], [batch["caption_features"][i]])
                errors.append(float((velocity - (clean - noise[i])).square().mean()))
        assert torch.equal(noise[i], torch.randn(noise[i].shape, generator=draws[1]))
        own_w, own_l, ref_w, ref_l = errors
        logit = -15 * ((own_w - ref_w) - (own_l - ref_l))
        expected = {
            "loss": math.log(1 + math.exp(-logit)) + 0.2 * own_w,
            "preference_loss": math.log(1 + math.exp(-logit)),
            "implicit_accuracy": float(logit > 0),
            "margin": logit,
            "winner_error": own_w / ref_w - 1,
            "loser_error": own_l / ref_l - 1,
        }
        assert {name: float(value[i]) for name, value in figures.items()} == pytest.approx(expected, rel=1e-3, abs=1e-4)


class Forwards:
    """The arguments of every forward of a network."""

    def __init__(self, *networks: torch.nn.Module) -> None:
        self.seen: list[tuple[Any, ...]] = []
        for network in networks:
            network.register_forward_pre_hook(lambda _, arguments: self.seen.append(arguments))


def test_a_pair_shares_time_and_noise_and_stands_in_one_forward(start, tmp_path):
    module = stage(start)
    fit(module, tmp_path, 1)
    forwards = Forwards(module.backbone, module.snapshots["reference"].network)
    batch = pairs_of(range(4))
    module.compared(batch, "train", 0)
    assert len(forwards.seen) == 2  # the reference's, and the backbone's
    for latents, t, features in forwards.seen:
        assert len(latents) == len(features) == 8 and torch.equal(t[:4], t[4:])
        for i in range(4):
            parts = zip(latents[i::4], (batch["winner_latents"][i], batch["loser_latents"][i]), strict=True)
            winner_noise, loser_noise = ((x - t[i] * clean) / (1 - t[i]) for x, clean in parts)
            torch.testing.assert_close(winner_noise, loser_noise, rtol=1e-3, atol=1e-4)
            assert features[i] is features[i + 4]


def seeded(ids: range) -> dict[str, Any]:
    """Numbered pairs whose pictures came from noise of known seeds."""
    batch = pairs_of(ids)
    for number, entry in zip(ids, batch["metadata"], strict=True):
        entry["pair"]["seeds"] = [1000 + number, 2000 + number]
    return batch


OWN = PreferenceSettings(beta=20.0, anchor=0.0, noise="own")


def test_every_picture_is_noised_with_what_it_was_drawn_from(start, tmp_path):
    module = stage(start, preference=OWN)
    seen = fit(module, tmp_path, 1, data=Data(seeded))
    assert seen.logged[0]["train/loss"] == float(torch.tensor(math.log(2)))
    forwards = Forwards(module.backbone)
    batch = seeded(range(4))
    figures = module.compared(batch, "train", 0)
    (((latents, t, features), *_),) = (forwards.seen,)
    clean, seeds = batch["winner_latents"] + batch["loser_latents"], [*range(1000, 1004), *range(2000, 2004)]
    noise = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(n)) for x, n in zip(clean, seeds, strict=True)
    ]
    for i in range(8):
        assert t[i] == t[i % 4]
        torch.testing.assert_close(latents[i], t[i] * clean[i] + (1 - t[i]) * noise[i])
    with torch.no_grad():
        predicted = module.backbone(latents, t, features)
        seen_before = module.snapshots["reference"].network(latents, t, features)
    own, before = (
        [float((v - (x - n)).square().mean()) for v, x, n in zip(velocities, clean, noise, strict=True)]
        for velocities in (predicted, seen_before)
    )
    assert figures["winner_error"].tolist() == pytest.approx([own[i] / before[i] - 1 for i in range(4)], abs=1e-5)
    margins = [-10 * ((own[i] - before[i]) - (own[i + 4] - before[i + 4])) for i in range(4)]
    assert figures["margin"].tolist() == pytest.approx(margins, rel=1e-3, abs=1e-4)


def test_own_noise_needs_the_seeds_and_a_solver_that_drew_no_more(start, tmp_path):
    with pytest.raises(UserError, match="noise=own needs the seed of every picture"):
        fit(stage(start, preference=OWN), tmp_path, 1)
    for drawn, solver in (({"solver": "renoise"}, "renoise"), ({"solver": "cps", "eta": 0.5}, "cps")):
        data = Data(seeded)
        data.manifest = SimpleNamespace(settings=drawn)  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=f"drawn by {solver} with fresh noise at every step: set it to shared"):
            fit(stage(start, preference=OWN), tmp_path, 1, data=data)
        fit(stage(start), tmp_path, 1, data=data)


def gradient(start: Path, folder: Path, batch: dict[str, Any]) -> torch.Tensor:
    """Of the first step, all parameters joined."""
    module = stage(start)
    fit(module, folder, 1)
    fresh = build_backbone(module.config, str(start), 0)
    module.backbone.load_state_dict(fresh.state_dict())
    module.compared(batch, "train", 0)["loss"].sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in module.backbone.parameters()])


def test_swapping_the_pairs_turns_the_gradient_round(start, tmp_path):
    batch = pairs_of(range(4))
    swapped = batch | {"winner_latents": batch["loser_latents"], "loser_latents": batch["winner_latents"]}
    right, wrong = gradient(start, tmp_path, batch), gradient(start, tmp_path, swapped)
    assert right.norm() > 1e-3
    torch.testing.assert_close(right, -wrong, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


def test_a_distilled_student_is_asked_at_the_times_of_its_steps_alone(start, tmp_path):
    module = stage(start, timesteps=TimestepLaw("grid", num_inference_steps=4, shift=3.0))
    fit(module, tmp_path, 1)
    forwards = Forwards(module.backbone, module.snapshots["reference"].network)
    for step in range(8):
        module.compared(pairs_of(range(8)), "train", step)
    seen = {float(time) for _, t, _ in forwards.seen for time in t}
    assert sorted(seen) == pytest.approx([float(1 - sigma) for sigma in sigmas(4, 3.0)[:-1]])


def test_bfloat16_weights_are_asked_at_float32_times_and_judged_in_float32(start, tmp_path):
    module = stage(start)
    seen = fit(module, tmp_path, 2, precision="bf16-true")
    assert module.backbone.x_pad_token.dtype == torch.bfloat16 and all(map(math.isfinite, seen.losses))
    forwards = Forwards(module.backbone)
    figures = module.compared(pairs_of(range(4)), "train", 0)
    assert forwards.seen[0][1].dtype == torch.float32 and figures["loss"].dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- refresh, resume


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_the_reference_becomes_the_policy_every_so_many_steps(start, tmp_path, lora):
    seen = fit(stage(start, lora=lora, refresh_every_n_steps=3), tmp_path, 8)
    at_reference = [figures["train/margin"] == 0 for figures in seen.logged]
    assert at_reference == [True, False, False, True, False, False, True, False]
    still = fit(stage(start, lora=lora), tmp_path / "still", 5)
    assert [figures["train/margin"] == 0 for figures in still.logged] == [True] + 4 * [False]
    assert still.losses[:3] == seen.losses[:3] and still.losses[4] != seen.losses[4]


def test_accumulated_batches_of_a_step_have_one_reference(start, tmp_path):
    seen = fit(stage(start, refresh_every_n_steps=2), tmp_path, 4, accumulate_grad_batches=2)
    at_reference = [figures["train/margin"] == 0 for figures in seen.logged]
    assert at_reference == [True, True, False, False, True, True, False, False]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        pytest.param({}, 4, id="whole"),
        pytest.param({"lora": LORA}, 4, id="lora"),
        pytest.param({"refresh_every_n_steps": 3}, 3, id="where the reference is due to be refreshed"),
        pytest.param({"lora": LORA, "refresh_every_n_steps": 3}, 4, id="lora, just refreshed"),
    ],
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(start, tmp_path, settings, steps):
    settings = settings | {"curriculum": CurriculumSettings(steps=6)}
    straight = fit(stage(start, **settings), tmp_path / "straight", 7)
    first = fit(stage(start, **settings), tmp_path / "torn", steps, save_every=100)
    second = fit(stage(start, **settings), tmp_path / "torn", 7, resume=last_checkpoint(tmp_path / "torn"))
    assert same(first.states[-1], second.states[0])
    assert first.losses + second.losses == straight.losses
    assert same(second.states[-1], straight.states[-1])
    assert len({len(ids) for ids in straight.pairs}) > 1


@pytest.mark.parametrize("settings", WAYS)
def test_a_checkpoint_holds_what_moves_and_nothing_frozen(start, tmp_path, settings):
    module = stage(start, **settings)
    fit(module, tmp_path, 1, save_every=100)
    state = read_checkpoint(last_checkpoint(tmp_path))["state_dict"]
    one = 2 * 2 * 7 if "lora" in settings else len(module.backbone.state_dict())  # adapters: down, up, blocks, matrices
    own, moved = (sum(name.startswith(prefix) for name in state) for prefix in ("backbone.", "reference."))
    assert (own, moved) == (one, one if "refresh_every_n_steps" in settings else 0) and len(state) == own + moved


def test_recomputed_blocks_see_the_backbone_and_not_its_reference(start, tmp_path):
    for lora in (None, LORA):
        plain = fit(stage(start, lora=lora), tmp_path / "plain", 4)
        settings = ParallelizeSettings(activation_checkpointing="full")
        again = fit(stage(start, lora=lora, parallelize=settings), tmp_path / "again", 4)
        assert again.losses == plain.losses and same(again.states[-1], plain.states[-1])


# ---------------------------------------------------------------------------------------------------- the curriculum


COURSE = CurriculumSettings(4, (0.0, 0.5), (0.0, 1.0), (0.2, 0.6), (0.0, 1.0))


def test_pairs_outside_the_bands_of_the_step_are_left_out(start, tmp_path):
    """Of numbered pairs the odd ones, at .8 and .9, come in at three quarters of the way."""
    seen = fit(stage(start, curriculum=COURSE), tmp_path, 6)
    assert seen.pairs == [[0, 2], [4, 6], [8, 10], [12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]
    assert [figures["train/admitted"] for figures in seen.logged] == [0.5, 0.5, 0.5, 1.0, 1.0, 1.0]


def test_a_batch_without_any_pair_of_the_band_keeps_one(start, tmp_path):
    def hard(ids: range) -> dict[str, Any]:
        found = pairs_of(ids)
        for place, entry in enumerate(found["metadata"]):
            entry["pair"] = {"difficulty": 1.0 - 0.1 * place, "margin": 0.3}
        return found

    seen = fit(stage(start, curriculum=COURSE), tmp_path, 1, data=Data(hard))
    assert seen.pairs == [[3]] and seen.logged[0]["train/admitted"] == 0.25


def test_a_curriculum_needs_its_metadata(start, tmp_path):
    def plain(ids: range) -> dict[str, Any]:
        return pairs_of(ids) | {"metadata": [{} for _ in ids]}

    with pytest.raises(UserError, match="difficulty and margin, which the data's metadata do not have"):
        fit(stage(start, curriculum=COURSE), tmp_path, 1, data=Data(plain))


# ---------------------------------------------------------------------------------------------------- what is learnt


def tinted(number: int, right: bool, seed: int) -> dict[str, Any]:
    """Pairs of a latent with a high and with a low first channel; `right`: the high one wins, else a coin decides."""
    source = torch.Generator().manual_seed(seed)
    plain = [0.5 * torch.randn(16, 4, 4, generator=source) for _ in range(number)]
    high, low = ([x.index_fill(0, torch.tensor([0]), level) for x in plain] for level in (1.0, -1.0))
    swap = (torch.rand(number, generator=source) < (0.0 if right else 0.5)).tolist()
    return {
        "ids": list(range(number)),
        "winner_latents": [b if s else a for a, b, s in zip(high, low, swap, strict=True)],
        "loser_latents": [a if s else b for a, b, s in zip(high, low, swap, strict=True)],
        "caption_features": [torch.full((2, 12), 0.1)] * number,
        "captions": ["a tint"] * number,
        "metadata": [{}] * number,
    }


def learn_tints(start: Path, folder: Path, right: bool) -> dict[str, float]:
    """What validation says after 40 batches of eight pairs; the held-out pairs are labelled rightly, always."""
    module = stage(
        start, preference=PreferenceSettings(beta=20.0), optimizer=OptimizerSettings(lr=1e-3, warmup_steps=1)
    )
    data = Data(lambda ids: tinted(8, right, seed=ids[0]), held_out=[tinted(32, True, seed=10**6)])
    fit(module, folder, 40, data=data, limit_val_batches=1, num_sanity_val_steps=0, val_check_interval=40)
    return {name: float(value) for name, value in module.trainer.callback_metrics.items()}


def test_what_is_preferred_is_learnt_from_right_labels_and_nothing_from_random_ones(start, tmp_path):
    learnt = learn_tints(start, tmp_path / "right", True)
    assert learnt["val/implicit_accuracy"] > 0.9 and learnt["val/winner_error"] < 0 < learnt["val/loser_error"]
    random = learn_tints(start, tmp_path / "random", False)
    assert abs(random["val/margin"]) < 0.1 * learnt["val/margin"]


# ---------------------------------------------------------------------------------------------------- guards, refusals


def test_the_guard_is_told_of_every_steps_winners(start, tmp_path):
    guard = PreferenceGuard()
    seen = fit(stage(start), tmp_path, 3, callbacks=[guard])
    assert list(guard.errors) == pytest.approx([figures["train/winner_error"] for figures in seen.logged])
    assert len(set(guard.errors)) == 3


def test_a_pair_that_is_not_finite_costs_its_step_alone(start, tmp_path):
    def broken(ids: range) -> dict[str, Any]:
        batch = pairs_of(ids)
        if ids[0] == 4:  # the second step's
            batch["winner_latents"][1] = batch["winner_latents"][1] * math.nan
        return batch

    steps, guard, watch = StepGuard(), PreferenceGuard(), stage(start)
    seen = fit(watch, tmp_path, 3, data=Data(broken), callbacks=[steps, guard])
    assert steps.skipped == 1 and len(guard.errors) == 2 and math.isfinite(seen.losses[2])


def test_pictures_are_encoded_and_a_pair_of_two_sizes_is_named(start, tmp_path):
    class Doubling(Codec):
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return images.repeat(1, 6, 1, 1)[:, :16]

    pictures = [torch.full((3, 4, 4), level, dtype=torch.uint8) for level in (0, 64, 128, 255)]
    batch = {"ids": ["a", "b"], "captions": ["x", "y"], "winners": pictures[:2], "losers": pictures[2:]}
    module = stage(start)
    module.codec = Doubling()  # type: ignore[assignment]
    winners, losers = module.latents(batch)
    assert [float(x.mean()) for x in winners + losers] == pytest.approx(
        [-1, 64 / 127.5 - 1, 128 / 127.5 - 1, 1], abs=1e-6
    )
    batch["losers"][1] = torch.zeros(3, 4, 6, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"pair b differ in size \(latents of \[16, 4, 4\] and \[16, 4, 6\]\)"):
        module.latents(batch)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora": LoRASettings(rank=4, dropout=0.1)}, "lora.dropout must be 0"),
        ({"refresh_every_n_steps": 0}, "refresh_every_n_steps must be at least 1"),
        ({"frozen_dtype": "bfloat16", "refresh_every_n_steps": 5}, "frozen_dtype=bfloat16"),
        ({"frozen_dtype": "bfloat16", "lora": LORA}, "frozen_dtype=bfloat16"),
    ],
)
def test_settings_that_would_do_nothing_or_harm_are_refused(start, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        stage(start, **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"beta": 0.0}, "preference.beta must be more than 0"),
        ({"reduction": "max"}, "preference.reduction must be mean or sum"),
        ({"anchor": -1.0}, "preference.anchor must be 0 or more"),
        ({"noise": "mine"}, "preference.noise must be shared or own, not mine"),
    ],
)
def test_preferences_without_sense_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        PreferenceSettings(**settings)


def test_a_curriculum_without_sense_is_refused():
    with pytest.raises(UserError, match=r"margin_start must be a lowest and a highest value .* not 0\.6 and 0\.2"):
        CurriculumSettings(margin_start=(0.6, 0.2))
    with pytest.raises(UserError, match=r"curriculum\.steps must be at least 1"):
        CurriculumSettings(steps=0)


def test_what_a_run_lacks_or_has_no_use_for_is_named(start, tmp_path):
    with pytest.raises(UserError, match="init_from is not given"):
        fit(Stage(seed=1), tmp_path, 1)
    with pytest.raises(UserError, match=r"rewards \(brightness\), and a DPOModule asks nobody but its pairs"):
        fit(stage(start), tmp_path, 1, callbacks=[Brightness()])
    with pytest.raises(UserError, match=r"DPOModule learns from winners and losers .* the data give ids, captions"):
        fit(stage(start), tmp_path, 1, data=Data(lambda ids: {"ids": list(ids), "captions": [""] * len(ids)}))
