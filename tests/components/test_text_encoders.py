"""The Qwen3 text encoder against transformers itself, run as the published pipeline runs it."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3Model

from zimage_lit.components import Qwen3TextEncoder, build_tiny_qwen3, fingerprint
from zimage_lit.errors import UserError

CAPTIONS = [
    "a photo of a red circle and a blue square",
    "a photo of a blue circle and a red square",
    'a photo of the word "CAT"',
    "一张两个红色圆形的照片",
    "two green crosses, on plain grey. There is nothing else in the picture.",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_qwen3(folder, CAPTIONS)
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def published_features(model: Qwen3Model, folder: Path, prompts: list[str]) -> list[torch.Tensor]:
    """One padded batch, hidden_states[-2], rows of real tokens: how Z-Image's pipelines do it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for p in prompts
    ]
    inputs = tokenizer(texts, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    mask = inputs.attention_mask.bool()
    with torch.no_grad():
        states = model(inputs.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return [row[keep] for row, keep in zip(states[-2], mask, strict=True)]


def test_features_equal_the_published_way(folder: Path) -> None:
    encoder = Qwen3TextEncoder(folder)
    expected = published_features(Qwen3Model.from_pretrained(folder).eval(), folder, CAPTIONS)
    features = encoder.encode(CAPTIONS)
    assert encoder.dim == 128
    for ours, theirs in zip(features, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape[1] == 128
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


def test_the_chat_template_of_the_folder_is_used_as_published(folder: Path, tmp_path: Path) -> None:
    """One user message, an opened answer, thinking enabled (which adds nothing): Z-Image's call of Qwen3's template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}hush{% endif %}{% endif %}"
    )
    shutil.copytree(folder, tmp_path / "chatty")
    tokenizer.save_pretrained(tmp_path / "chatty")
    encoder = Qwen3TextEncoder(tmp_path / "chatty")
    for content in ("a red circle", " two\nlines ", "<b>&'\""):
        (tokens,) = encoder.tokenize([content])
        assert tokens == tokenizer(f"<user>{content}<|im_end|><assistant>").input_ids


def test_features_do_not_depend_on_batch_mates_or_autocast(folder: Path) -> None:
    encoder = Qwen3TextEncoder(folder, cache_mib=0)
    together = encoder.encode(CAPTIONS + CAPTIONS[:2])
    with torch.autocast("cpu", torch.bfloat16):
        alone = [Qwen3TextEncoder(folder).encode([prompt])[0] for prompt in CAPTIONS + CAPTIONS[:2]]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("batch_size", [4, 64])
def test_prompts_that_run_together_have_the_same_features_up_to_rounding(folder: Path, batch_size: int) -> None:
    long = [" ".join([CAPTIONS[0]] * times) for times in (4, 7, 20)]  # 40, 70 and 200 tokens
    encoder, runs = Qwen3TextEncoder(folder, batch_size=batch_size), []
    encoder._load_model().register_forward_pre_hook(lambda _, args, given: runs.append(given), with_kwargs=True)
    batched = encoder.encode(CAPTIONS + long)
    torch.testing.assert_close(batched, Qwen3TextEncoder(folder).encode(CAPTIONS + long), atol=5e-6, rtol=1e-5)
    shapes = [tuple(given["input_ids"].shape) for given in runs]
    lengths = sorted(len(tokens) for tokens in encoder.tokenize(CAPTIONS + long))
    assert 12 == lengths[4] < lengths[5] == 17  # one that 16 tokens and twice the shortest prompt leave out
    short = [(4, lengths[3]), (2, lengths[5])] if batch_size == 4 else [(5, lengths[4]), (1, lengths[5])]
    assert shapes == [*short, (2, lengths[7]), (1, lengths[8])]
    encoder.encode(CAPTIONS)
    assert len(runs) > len(shapes)  # nothing is kept of what depends on its mates


def test_cache_returns_the_same_features_and_stays_bounded(folder: Path) -> None:
    encoder = Qwen3TextEncoder(folder, cache_mib=1)
    first = encoder.encode(CAPTIONS)
    runs: list[int] = []
    encoder._load_model().register_forward_hook(lambda *_: runs.append(1))
    again = encoder.encode(CAPTIONS)
    assert not runs and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    again[0].zero_()  # what a caller does to its features stays with the caller
    assert torch.equal(encoder.encode(CAPTIONS[:1])[0], first[0])
    encoder.encode([f"{index} red circle" * 30 for index in range(40)])  # 40 * 90 tokens * 512 bytes > 1 MiB
    assert 0 < encoder._cache._size <= 2**20
    assert encoder._cache._size == sum(value.nbytes for value in encoder._cache._entries.values())
    before = len(runs)
    assert torch.equal(encoder.encode(CAPTIONS[:1])[0], first[0])
    assert len(runs) == before + 1  # it had left the cache


@pytest.mark.parametrize("tied", [True, False])
def test_reads_a_causal_language_model_in_a_pipeline_folder(folder: Path, tmp_path: Path, tied: bool) -> None:
    base = Qwen3Model.from_pretrained(folder)
    base.config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        whole = Qwen3ForCausalLM(base.config)
    whole.model.load_state_dict(base.state_dict())
    whole.save_pretrained(tmp_path / "text_encoder", max_shard_size="200KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "tokenizer")
    names = {name for path in (tmp_path / "text_encoder").glob("*.safetensors") for name in load_file(path)}
    assert "model.embed_tokens.weight" in names and ("lm_head.weight" in names) == (not tied)

    expected = Qwen3TextEncoder(folder).encode(CAPTIONS)
    for place in (tmp_path, tmp_path / "text_encoder"):
        features = Qwen3TextEncoder(place).encode(CAPTIONS)
        for ours, theirs in zip(features, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)  # other files, other memory alignment


def test_weights_stay_as_stored_unless_told_otherwise(folder: Path, copied: Path) -> None:
    Qwen3Model.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(copied)
    stored, widened = Qwen3TextEncoder(copied), Qwen3TextEncoder(copied, dtype="float32")
    rough, fine = stored.encode(CAPTIONS[:1])[0], widened.encode(CAPTIONS[:1])[0]
    assert stored._load_model().dtype == torch.bfloat16 and widened._load_model().dtype == torch.float32
    assert rough.dtype == fine.dtype == torch.float32
    torch.testing.assert_close(rough, fine, atol=0.1, rtol=0.1)


def test_a_prompt_beyond_512_tokens_is_an_error_or_is_cut_as_published(folder: Path) -> None:
    longest = " ".join(["red"] * 511)  # the template takes the last one
    too_long = " ".join(["red"] * 300 + ["blue"] * 212)
    encoder = Qwen3TextEncoder(folder)
    assert encoder.encode([longest])[0].shape == (512, 128)
    with pytest.raises(UserError, match=r'"red red red.*…" has 513 tokens .* at most 512') as caught:
        encoder.encode([CAPTIONS[0], too_long])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250

    cutting = Qwen3TextEncoder(folder, on_long_prompt="truncate")
    with pytest.warns(UserWarning, match="513 tokens"):
        features = cutting.encode([too_long])[0]
    expected = published_features(Qwen3Model.from_pretrained(folder).eval(), folder, [too_long])[0]
    assert features.shape == (512, 128)
    torch.testing.assert_close(features, expected, atol=5e-6, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cutting.encode([too_long + " red"])  # said once is enough


def test_tiny_qwen3_tells_tokens_and_contexts_apart(folder: Path) -> None:
    first, second = Qwen3TextEncoder(folder).encode(CAPTIONS[:2])
    difference = (first - second).norm(dim=1) / first.norm(dim=1)
    assert (difference[:4] == 0).all()  # causal: nothing differs before the first different word
    assert difference[4] > 0.5 and difference[8] > 0.5  # red against blue, blue against red
    assert (difference[9:] > 0.05).all()  # the same words after them, in another context
    features = torch.cat(Qwen3TextEncoder(folder).encode(CAPTIONS))
    assert features.pow(2).mean().sqrt().item() == pytest.approx(1.0, abs=0.15)


def test_tiny_tokenizer_keeps_words_and_spells_the_rest(folder: Path) -> None:
    encoder = Qwen3TextEncoder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(prompt: str) -> list[str]:
        return list(tokenizer.convert_ids_to_tokens(encoder.tokenize([prompt])[0]))[:-1]

    assert tokens("A red circle") == tokens("a red circle") == ["a", "red", "circle"]
    assert tokens('the word "DOG"') == ["the", "word", '"', "D", "O", "G", '"']
    assert tokens("A dog, 12") == ["a", "d", "o", "g", ",", "1", "2"]
    assert tokens("两个红色圆形") == list("两个红色圆形")
    assert tokens("龙 red") == ["[UNK]", "red"]
    assert tokens("") == []
    assert tokenizer.convert_ids_to_tokens(encoder.tokenize([""])[0]) == ["<|im_end|>"]


def test_tiny_tokenizer_cuts_plurals_of_known_words_in_two(tmp_path: Path) -> None:
    captions = ["a photo of a circle", "three circles, two crosses", "a cross shows this", "two glass shapes"]
    encoder = build_tiny_qwen3(tmp_path, captions)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    def tokens(prompt: str) -> list[str]:
        return list(tokenizer.convert_ids_to_tokens(encoder.tokenize([prompt])[0]))[:-1]

    assert tokens("two circles") == ["two", "circle", "s"]
    assert tokens("three crosses, a cross") == ["three", "cross", "es", ",", "a", "cross"]
    assert tokens("this shows glass shapes") == ["this", "shows", "glass", "shapes"]  # no caption has their singular


def test_tiny_qwen3_is_a_function_of_its_input(folder: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    build_tiny_qwen3(tmp_path / "same", reversed(CAPTIONS))
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(tmp_path / "same") == fingerprint(folder)
    torch.manual_seed(99)
    build_tiny_qwen3(tmp_path / "other", CAPTIONS, seed=1)
    assert fingerprint(tmp_path / "other") != fingerprint(folder)
    with pytest.raises(ValueError, match="multiple of 32"):
        build_tiny_qwen3(tmp_path / "odd", CAPTIONS, hidden_size=100)
    assert not (tmp_path / "odd").exists()


def test_missing_and_damaged_files_are_named(copied: Path, tmp_path: Path) -> None:
    def error_of(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            Qwen3TextEncoder(path).encode(["a red circle"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no folder" in error_of(tmp_path / "nowhere")
    path = copied / "model.safetensors"
    tensors, whole = load_file(path), path.read_bytes()
    key = "layers.0.mlp.up_proj.weight"
    for changed, part in (
        ({name: value for name, value in tensors.items() if name != key}, f'lack the tensor "{key}"'),
        ({**tensors, key: torch.zeros(3, 4)}, f'"{key}" has the shape (3, 4)'),
        ({**tensors, "layers.9.surprise": torch.zeros(2)}, 'hold the tensor "layers.9.surprise"'),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        assert part in error_of(copied)
    path.write_bytes(whole[: len(whole) // 2])
    assert str(copied) in error_of(copied)
    path.unlink()
    assert str(copied) in error_of(copied)

    tokenizer = (copied / "tokenizer.json").read_text()
    (copied / "tokenizer.json").write_text(tokenizer[:200])
    assert "tokenizer" in error_of(copied) and str(copied) in error_of(copied)
    (copied / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json" in error_of(copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert '"llama", but a "qwen3"' in error_of(copied)
    (copied / "config.json").unlink()
    assert "config.json is missing" in error_of(copied)


def test_options_are_checked_when_the_encoder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_long_prompt"):
        Qwen3TextEncoder(tmp_path, on_long_prompt="shrug")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size"):
        Qwen3TextEncoder(tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="cache_mib is 8, but only features of batch_size 1 are kept"):
        Qwen3TextEncoder(tmp_path, batch_size=2, cache_mib=8)
    with pytest.raises(TypeError, match="list"):
        Qwen3TextEncoder(tmp_path).encode("a red circle")  # type: ignore[arg-type]
