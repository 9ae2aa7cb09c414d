"""LLM2CLIP on small networks: each part against a second way to compute it, and what the texts' mean is over."""

import json
import math
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, normalize, silu
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from evaluation.judges.contract import Asked
from evaluation.judges.llm2clip import LONGEST, BidirectionalLlama, LLM2CLIPJudge, LLM2CLIPTowers
from zimage_lit.errors import UserError

WIDTH, HEADS, GROUPS, FEATURES, HIDDEN = 32, 4, 2, 12, 48  # HIDDEN: of the adapter's blocks
CPU = torch.device("cpu")
TURN = ["<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Of single letters, after a start, with Llama 3's template."""
    words = ["<|begin_of_text|>", "<|eot_id|>", "?", *TURN, *string.ascii_lowercase, " "]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.add_special_tokens([words[0], words[1], *TURN])
    inner.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[(words[0], 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=words[0], eos_token=words[1], unk_token="?")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("language_model")
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    model = LlamaModel(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model.bfloat16().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written |= {"architectures": ["LlamaEncoderModel"], "auto_map": {"AutoModel": "absent.LlamaEncoderModel"}}
    (folder / "config.json").write_text(json.dumps(written))  # as published: the code that it names is never asked for
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=FEATURES)
    tensors = CLIPVisionModelWithProjection(config).state_dict() | {"logit_scale": torch.tensor(2.0)}
    for block in range(4):
        for name, shape in (("fn.0", (HIDDEN, WIDTH)), ("fn.3", (WIDTH, HIDDEN))):
            tensors[f"text_adapter.adaptor.{block}.{name}.weight"] = torch.empty(shape)
            tensors[f"text_adapter.adaptor.{block}.{name}.bias"] = torch.empty(shape[0])
        tensors |= {f"text_adapter.adaptor.{block}.ln.{kind}": torch.empty(WIDTH) for kind in ("weight", "bias")}
    tensors |= {f"text_adapter.adaptor.4.{kind}": torch.empty(WIDTH) for kind in ("weight", "bias")}
    tensors |= {"text_adapter.adaptor.5.weight": torch.empty(FEATURES, WIDTH)}
    tensors |= {"text_adapter.adaptor.5.bias": torch.empty(FEATURES)}
    for tensor in tensors.values():
        if tensor.ndim:
            nn.init.normal_(tensor, std=0.3)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config.to_dict()}))
    return folder


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)


def llama(weights: dict[str, Tensor], ids: list[int], theta: float = 500.0, eps: float = 1e-6) -> Tensor:
    """A Llama whose tokens all see each other, by hand, (L, W)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]

    def heads(x: Tensor, layer: str, kind: str, count: int) -> Tensor:
        return (x @ weights[f"{layer}.self_attn.{kind}_proj.weight"].T).unflatten(-1, (count, -1)).transpose(0, 1)

    size = WIDTH // HEADS
    angles = torch.arange(len(ids))[:, None] * theta ** (-torch.arange(0, size, 2) / size)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = weights["embed_tokens.weight"][ids]
    for layer in ("layers.0", "layers.1"):
        normed = norm(x, f"{layer}.input_layernorm")
        q = turned(heads(normed, layer, "q", HEADS))
        k, v = (heads(normed, layer, kind, GROUPS).repeat_interleave(HEADS // GROUPS, 0) for kind in "kv")
        seen = (q @ turned(k).transpose(1, 2) / math.sqrt(size)).softmax(-1) @ v
        x = x + seen.transpose(0, 1).flatten(1) @ weights[f"{layer}.self_attn.o_proj.weight"].T
        normed = norm(x, f"{layer}.post_attention_layernorm")
        gate, up, down = (weights[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    return norm(x, "norm")


def exact(folder: Path) -> BidirectionalLlama:
    """In float32, from the weights in bfloat16."""
    model = BidirectionalLlama(str(folder), CPU)
    model.network.float()
    return model


def test_the_states_are_those_of_a_llama_that_looks_both_ways(language_model: Path) -> None:
    model = exact(language_model)
    ids = model.tokens("a red cat")[0]
    weights = {name: tensor.float() for name, tensor in load_file(language_model / "model.safetensors").items()}
    torch.testing.assert_close(model.states(ids), llama(weights, ids), rtol=1e-4, atol=1e-4)


def test_a_later_token_changes_the_states_of_earlier_ones(language_model: Path) -> None:
    model = exact(language_model)
    ids = model.tokens("a red cat")[0]
    changed = [*ids[:-1], ids[-2]]
    assert (model.states(ids)[0] - model.states(changed)[0]).abs().max() > 1e-3
    causal = [model.network(torch.tensor([row])).last_hidden_state[0, 0] for row in (ids, changed)]
    assert torch.equal(*causal)  # as the network does by itself


def test_the_mean_is_over_the_texts_own_tokens_and_the_end_of_its_turn(language_model: Path) -> None:
    model = exact(language_model)
    ids, own = model.tokens(" a cat \n")
    names = model.tokenizer.convert_ids_to_tokens(ids)
    assert names == ["<|begin_of_text|>", *TURN, " ", "a", " ", "c", "a", "t", "<|eot_id|>"]
    assert own == 7
    expected = model.states(ids)[5:].mean(dim=0)
    torch.testing.assert_close(model(" a cat \n"), expected, rtol=1e-5, atol=1e-6)


def test_long_texts_lose_their_end(language_model: Path) -> None:
    model = exact(language_model)
    ids, own = model.tokens("ab" * 600)
    assert len(ids) == LONGEST and own == LONGEST  # the head's states too, as in llm2vec, where a text fills all
    assert model.tokenizer.convert_ids_to_tokens(ids[-1:])[0] in "ab"
    torch.testing.assert_close(model("ab" * 600), model.states(ids).mean(dim=0), rtol=1e-5, atol=1e-6)
    ids, own = model.tokens("a" * 506)
    assert len(ids) == LONGEST and own == 507 and ids[-1] == 1


def test_padding_would_change_nothing(language_model: Path) -> None:
    """llm2vec fills shorter texts of a batch up on the left: hidden, they leave the others' states as they are."""
    model = exact(language_model)
    ids, own = model.tokens("a cat")
    padded = torch.tensor([[1] * 3 + ids])
    hidden = torch.zeros(1, 1, padded.shape[1], padded.shape[1])
    hidden[..., :3] = torch.finfo(torch.float32).min
    found = model.network(padded, attention_mask=hidden).last_hidden_state[0, -own:]
    torch.testing.assert_close(found, model.states(ids)[-own:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_towers_give_normalised_features(clip: Path) -> None:
    weights = {name: tensor.bfloat16().float() for name, tensor in load_file(clip / "model.safetensors").items()}
    towers = LLM2CLIPTowers(str(clip), CPU)
    features = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)) * 5
    x = features / features.norm()
    for block in range(4):
        layer = {
            name.split(".", 3)[3]: t for name, t in weights.items() if name.startswith(f"text_adapter.adaptor.{block}.")
        }
        wide = gelu(
            linear(
                layer_norm(x, (WIDTH,), layer["ln.weight"], layer["ln.bias"]), layer["fn.0.weight"], layer["fn.0.bias"]
            )
        )
        x = x + linear(wide, layer["fn.3.weight"], layer["fn.3.bias"])
    last = {name.removeprefix("text_adapter.adaptor."): tensor for name, tensor in weights.items()}
    x = linear(layer_norm(x, (WIDTH,), last["4.weight"], last["4.bias"]), last["5.weight"], last["5.bias"])
    torch.testing.assert_close(towers.of_text(features), x / x.norm(), rtol=1e-4, atol=1e-6)

    levels = np.asarray(picture(0).resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy((levels - mean) / std).float().permute(2, 0, 1)[None]
    network = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**json.loads((clip / "config.json").read_text())["vision_config"])
    )
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    expected = normalize(network.eval()(pixel_values=pixels).image_embeds[0], dim=-1)
    torch.testing.assert_close(towers.of_picture(picture(0)), expected, rtol=1e-4, atol=1e-5)


def test_judgements_are_the_cosines_and_each_its_own(clip: Path, language_model: Path) -> None:
    judge = LLM2CLIPJudge(str(clip), str(language_model), "cpu")
    asked = [Asked((picture(seed),), {"text": text}) for text in ("a cat", "a very long dog") for seed in (0, 1)]
    found = judge.judge(asked)
    towers, model = LLM2CLIPTowers(str(clip), CPU), BidirectionalLlama(str(language_model), CPU)
    for one, judgement in zip(asked, found, strict=True):
        expected = float(towers.of_picture(one.pictures[0]) @ towers.of_text(model(one.question["text"])))
        assert judgement == {"similarity": pytest.approx(expected, abs=1e-6)}
    assert len({judgement["similarity"] for judgement in found}) == 4
    again = LLM2CLIPJudge(str(clip), str(language_model), "cpu").judge(asked[::-1])[::-1]
    assert again == found
    assert LLM2CLIPJudge(str(clip), str(language_model), "cpu").judge(asked[2:3]) == found[2:3]


def test_the_record_tells_small_networks_from_the_benchmarks(clip: Path, language_model: Path) -> None:
    record = LLM2CLIPJudge(str(clip), str(language_model)).record()
    assert "'hidden_size': 32" in record.differs and "LLM2CLIP-Openai-L-14-336" in record.differs
    assert len(record.revision) == 33


def test_folders_of_something_else(clip: Path, language_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing: download microsoft/LLM2CLIP-Openai-L-14-336"):
        LLM2CLIPJudge(str(tmp_path), str(language_model)).record()
    with pytest.raises(UserError, match="is no LLM2CLIP"):
        LLM2CLIPTowers(str(language_model), CPU)
    with pytest.raises(UserError, match="cannot be loaded as a Llama"):
        BidirectionalLlama(str(tmp_path), CPU)
    weights = load_file(language_model / "model.safetensors")
    weights.pop("norm.weight")
    for file in language_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"does not hold the Llama .* norm\.weight"):
        BidirectionalLlama(str(tmp_path), CPU)
    (tmp_path / "model.safetensors").write_bytes((language_model / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded as a Llama"):
        BidirectionalLlama(str(tmp_path), CPU)
