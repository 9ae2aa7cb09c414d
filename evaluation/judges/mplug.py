"""mPLUG for visual questions, in plain torch: the network whose answers DPG-Bench counts (Li et al. 2022, arXiv
2205.12005), read from its published checkpoint without the libraries that it was trained with.

Three parts, read top-down: CLIP's vision transformer sees the picture; a BERT encoder reads the question and a fusion
encoder looks at the picture with it; a BERT decoder writes the answer by a beam search of its makers' own kind. The
answers equal those of modelscope's code on the same weights (`tests/evaluation/test_mplug.py` has its values).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from zimage_lit.errors import UserError

CHECKPOINT, SETTINGS = "pytorch_model.bin", "config.yaml"
START, END = 101, 102  # [CLS] and [SEP], whatever the vocabulary
LENGTH_PENALTY = 0.6  # exponent by which long answers are forgiven
RENAMED = (  # of the checkpoint's names -> ours, in this order
    ("model.", ""),
    (".bert.", "."),
    (".encoder.layer.", ".layers."),
    (".cls.predictions.", "."),
    (".transform.LayerNorm.", ".transform_norm."),
    (".transform.dense.", ".transform."),
    (".crossattention.self.", ".cross_attention."),
    (".crossattention.output.dense.", ".cross_attention.out."),
    (".crossattention.output.LayerNorm.", ".cross_attention.norm."),
    (".attention.self.", ".attention."),
    (".attention.output.dense.", ".attention.out."),
    (".attention.output.LayerNorm.", ".attention.norm."),
    (".intermediate.dense.", ".widen."),
    (".output.dense.", ".narrow."),
    (".output.LayerNorm.", ".norm."),
    (".embeddings.word_embeddings.", ".words."),
    (".embeddings.position_embeddings.", ".positions."),
    (".embeddings.token_type_embeddings.", ".kinds."),
    (".embeddings.LayerNorm.", ".words_norm."),
    (".decoder.weight", ".spell.weight"),
    ("visual_encoder.visual.", "visual."),
    (".transformer.resblocks.", ".blocks."),
)


@dataclass(frozen=True)
class MPlugConfig:
    """Sizes and settings under their published names; the defaults are those of mPLUG-large for visual questions."""

    image_res: int = 504  # pixels a side that pictures are resized to
    vision_width: int = 1024
    clip_vision_layers: int = 24
    clip_vision_patch_size: int = 14
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    text_encoder_layers: int = 6
    fusion_layers: int = 6  # the last ones of num_hidden_layers
    stride_layer: int = 6  # every so many layers of the fusion, picture and question are one sequence
    text_decode_layers: int = 12
    encoder_width: int = 768
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    beam_size: int = 5
    min_length: int = 1  # tokens of an answer
    max_length: int = 10

    @classmethod
    def from_folder(cls, folder: str | Path) -> "MPlugConfig":
        """From config.yaml and the JSON file that it names. UserError where they cannot be read."""
        try:
            settings = yaml.safe_load((Path(folder) / SETTINGS).read_text())
            sizes = json.loads((Path(folder) / Path(settings.get("bert_config", "config_bert.json")).name).read_text())
        except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
            raise UserError(
                f"{folder} holds no mPLUG ({error}): download damo/mplug_visual-question-answering_coco_large_en there."
            ) from error
        known = {**settings, **sizes}
        return cls(**{name: known[name] for name in cls.__dataclass_fields__ if name in known})


class MPlug(nn.Module):
    """`answer` says what the network sees."""

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)
        self.narrows = config.vision_width != config.hidden_size
        if self.narrows:
            self.visn_fc = nn.Linear(config.vision_width, config.hidden_size)
            self.visn_layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.text_encoder = TextEncoder(config)
        self.fusion_encoder = FusionEncoder(config)
        self.text_decoder = TextDecoder(config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MPlug":
        """From a published folder. UserError for weights that are missing, misshapen or more than tensors."""
        model = cls(MPlugConfig.from_folder(folder))
        weights = read_weights(Path(folder) / CHECKPOINT)
        needed = model.state_dict()
        missing = [name for name in needed if name not in weights]
        wrong = [name for name in needed if name in weights and weights[name].shape != needed[name].shape]
        if missing or wrong:
            raise UserError(
                f"{Path(folder) / CHECKPOINT} is no mPLUG of the sizes in {SETTINGS}: it lacks {missing[:3]} and has "
                f"{wrong[:3]} in another shape: download it again."
            )
        model.load_state_dict({name: weights[name].float() for name in needed})
        return model.eval()

    @torch.no_grad()
    def answer(self, picture: Tensor, question: Tensor) -> list[int]:
        """picture: (3, image_res, image_res), normalised.   question: (L,) tokens with [CLS] and [SEP].

        The answer's tokens, with those of its start and, where it came to one, its end.
        """
        seen = self.visual(picture[None])
        if self.narrows:
            seen = self.visn_layer_norm(self.visn_fc(seen))
        memory = self.fusion_encoder(self.text_encoder(question[None]), seen)

        def next_word(answers: Tensor) -> Tensor:
            scores = self.text_decoder(answers, memory.expand(len(answers), -1, -1))
            return torch.log(torch.softmax(scores, dim=-1))  # not log_softmax: what is impossible shall be -inf

        settings = self.config
        return beam_search(next_word, settings.beam_size, settings.min_length, settings.max_length, picture.device)


class VisionTransformer(nn.Module):
    """CLIP's, up to the normalised features of all patches: (B, 3, R, R) -> (B, 1 + patches, vision_width)."""

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.clip_vision_patch_size
        patches = config.image_res * config.image_res // (patch * patch)
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(VisionBlock(width) for _ in range(config.clip_vision_layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.conv1(pictures).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(pictures), 1, -1)
        x = torch.cat([whole, patches], dim=1)
        x = self.ln_pre(x + self.positional_embedding[: x.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class VisionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        normalised = self.ln_1(x)
        x = x + self.attn(normalised, normalised, normalised, need_weights=False)[0]
        wide = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](wide * torch.sigmoid(1.702 * wide))


class Embedded(nn.Module):
    """Tokens (B, L) -> (B, L, hidden_size), as in BERT."""

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.kinds = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.words_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def embed(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.words_norm(self.words(tokens) + self.positions(places) + self.kinds.weight[0])


class TextEncoder(Embedded):
    """Tokens (B, L) -> (B, L, hidden_size). One question at a time, so that there is no padding to be hidden."""

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Layer(config, looks=False) for _ in range(config.text_encoder_layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class FusionEncoder(nn.Module):
    """Question (B, L, hidden_size) and picture (B, P, hidden_size) -> both (B, P + L, hidden_size).

    The question looks at the picture in each layer; in every stride-th, both are one sequence instead, and what comes
    of the picture is added to it.
    """

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__()
        self.stride = config.stride_layer
        first = max(0, config.num_hidden_layers - config.fusion_layers)
        self.layers = nn.ModuleDict({str(i): Layer(config, looks=True) for i in range(first, config.num_hidden_layers)})

    def forward(self, question: Tensor, picture: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers.values()):
            if place == 0 or place % self.stride != 0:
                question = layer(question, picture)
            else:
                both = layer(torch.cat([picture, question], dim=1))
                picture, question = picture + both[:, : picture.shape[1]], both[:, picture.shape[1] :]
        return torch.cat([picture, question], dim=1)


class TextDecoder(Embedded):
    """The words so far (B, L), and what they are about (B, M, encoder_width) -> scores of the next word (B, words)."""

    def __init__(self, config: MPlugConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(Layer(config, looks=True) for _ in range(config.text_decode_layers))
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.spell = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, words: Tensor, memory: Tensor) -> Tensor:
        x = self.embed(words)
        for layer in self.layers:
            x = layer(x, memory, causal=True)
        last = self.transform_norm(functional.gelu(self.transform(x[:, -1])))
        return self.spell(last) + self.bias


class Layer(nn.Module):
    """BERT's layer; with `looks`, it can look at something else between attention to itself and its linear layers."""

    def __init__(self, config: MPlugConfig, looks: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        if looks:
            self.cross_attention = Attention(config, config.encoder_width)
        self.widen = nn.Linear(config.hidden_size, config.intermediate_size)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, memory: Tensor | None = None, causal: bool = False) -> Tensor:
        x = self.attention(x, x, causal)
        if memory is not None:
            x = self.cross_attention(x, memory)
        return self.norm(self.narrow(functional.gelu(self.widen(x))) + x)


class Attention(nn.Module):
    """(B, L, hidden_size) looks at (B, M, memory_width); the sum of both is normalised."""

    def __init__(self, config: MPlugConfig, memory_width: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(memory_width, config.hidden_size)
        self.value = nn.Linear(memory_width, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        projected = (self.query(x), self.key(memory), self.value(memory))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.norm(self.out(attended.transpose(1, 2).flatten(2)) + x)


def beam_search(
    next_word: Callable[[Tensor], Tensor],
    beams: int,
    min_length: int,
    max_length: int,
    device: torch.device | str = "cpu",
) -> list[int]:
    """The best answer that a search with so many beams finds, from START on.

    next_word: answers so far (beams, L) -> log probabilities (beams, words) of the word after each.

    As mPLUG's makers search: the score is divided by ((5 + length) / 6) ^ 0.6; an answer that ends is kept but takes
    part further, END or not; all is over when the best one of a step ends.
    """
    answers = torch.full((beams, 1), START, device=device)
    total = torch.tensor([0.0] + [float("-inf")] * (beams - 1), device=device)
    ended: list[tuple[float, list[int]]] = []
    for length in range(1, max_length + 1):
        chances = next_word(answers)
        if length <= min_length:
            chances[:, END] = -1e20
        penalty = ((5.0 + length) / 6.0) ** LENGTH_PENALTY
        scores, places = ((chances + total[:, None]) / penalty).flatten().topk(beams)
        total = scores * penalty
        before, word = places // chances.shape[1], places % chances.shape[1]
        answers = torch.cat([answers[before], word[:, None]], dim=1)
        over = bool(word[0] == END) or length == max_length
        ended += [
            (float(score), answer.tolist())
            for score, answer in zip(scores, answers, strict=True)
            if over or answer[-1] == END
        ]
        if over:
            break
    return max(ended, key=lambda found: found[0])[1]


def read_weights(file: Path) -> Mapping[str, Tensor]:
    """A checkpoint's tensors under our names. UserError for a file that is missing or holds more than tensors."""
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the pickle reader raises whatever it meets
        raise UserError(
            f"{file} cannot be read as a file of weights ({str(error).splitlines()[0]}): download "
            "damo/mplug_visual-question-answering_coco_large_en again."
        ) from error
    for wrapping in ("model", "module"):
        found = found.get(wrapping, found)
    weights = {}
    for name, value in found.items():
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        weights[name] = value
    return weights
