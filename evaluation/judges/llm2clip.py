"""LLM2CLIP as a judge: how alike a picture and a text are, the text read by a language model (OneIG's reasoning).

Huang et al., arXiv 2411.04997. The picture goes through CLIP ViT-L/14 at 336 pixels and its projection; the text
through a Llama 3 8B that attends in both directions, whose last states are averaged, and through an adapter.

Read, not run, since the published weights are not here: modeling_clip.py of microsoft/LLM2CLIP-Openai-L-14-336
(revision 9251233, in a public copy) for the adapter and the names of its tensors; modeling_llama_encoder.py of the
Llama's repository, a Llama whose attention is not causal; McGill-NLP/llm2vec (llm2vec.py) for how texts are put, cut
and averaged; the benchmark's scripts/utils/inference.py for how they are put together. The benchmark's own copy of
llm2vec could not be read. Tested on small networks of the same classes: each part against a second way to compute it.

The benchmark computes the Llama in bfloat16 and the rest from weights in bfloat16 under CUDA's autocast. Here the
Llama is in bfloat16 too, and the rest in float32 from the same rounded weights; how far that moves a cosine has not
been measured.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import normalize

from evaluation.judges.checkpoints import filled, read_folder, some
from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.judges.weights import folder_revision, library_versions
from zimage_lit.errors import UserError
from zimage_lit.files import read_json
from zimage_lit.pipeline import usable_device

CLIP_MODEL = "microsoft/LLM2CLIP-Openai-L-14-336"
LANGUAGE_MODEL = "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
LONGEST = 512  # tokens of a text, with what is put around it; the rest is cut
BEFORE, AFTER = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"  # what llm2vec puts around a text
CLIP_SIZES = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 336}
LANGUAGE_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}


class LLM2CLIPJudge:
    """Role `llm2clip`: the cosine of a picture's and a text's features.

    clip: the folder of microsoft/LLM2CLIP-Openai-L-14-336.
    language_model: the folder of microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned, with its tokenizer.
    device: what it computes on; by default a GPU where there is one. The language model takes 16 GB.

    No code from these folders is run. No SHA-256 of the published files is known here: the networks are told by their
    sizes, and count as the benchmark's where these are right. One picture and one text go through at a time.
    """

    def __init__(self, clip: str, language_model: str, device: str | None = None) -> None:
        self.clip = clip
        self.language_model = language_model
        self.device = device
        self._texts: dict[str, Tensor] = {}  # features of those that were asked about, for their other pictures

    def record(self) -> JudgeRecord:
        """UserError for a folder that is absent or empty."""
        clip = read_json(Path(self.clip) / "config.json", f"download {CLIP_MODEL} there").get("vision_config", {})
        language = read_json(Path(self.language_model) / "config.json", f"download {LANGUAGE_MODEL} there")
        return JudgeRecord(
            judge=type(self).__name__,
            model=f"{CLIP_MODEL} and {LANGUAGE_MODEL}",
            revision="+".join(folder_revision(folder) for folder in (self.clip, self.language_model)),
            differs=sizes_differ(clip, CLIP_SIZES, CLIP_MODEL)
            or sizes_differ(language, LANGUAGE_SIZES, LANGUAGE_MODEL),
            settings={
                "max_length": LONGEST,
                "precision": {"language_model": "bfloat16", "clip": "float32 of bfloat16 weights"},
            },
            versions=library_versions("torch", "transformers", "tokenizers", "pillow"),
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """Questions {"text"} -> {"similarity"}. UserError, at the first call, for folders that hold something else."""
        return [{"similarity": self._similarity(one.pictures[0], one.question["text"])} for one in asked]

    @torch.inference_mode()
    def _similarity(self, picture: Image.Image, text: str) -> float:
        if text not in self._texts:
            self._texts[text] = self._clip.of_text(self._language_model(text))
        return float(self._clip.of_picture(picture) @ self._texts[text])

    @cached_property
    def _clip(self) -> "LLM2CLIPTowers":
        return LLM2CLIPTowers(self.clip, usable_device(self.device))

    @cached_property
    def _language_model(self) -> "BidirectionalLlama":
        return BidirectionalLlama(self.language_model, usable_device(self.device))


class LLM2CLIPTowers:
    """Normalised features (D,) of a picture, and of a text from the language model's features (W,) of it.

    folder: config.json and safetensors with `vision_model.…`, `visual_projection.weight` and `text_adapter.adaptor.…`.
    UserError where it holds something else.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        tensors = {name: tensor.bfloat16().float() for name, tensor in read_folder(folder).items()}
        tensors.pop("logit_scale", None)  # has no part in a cosine
        adaptor = {name: t for name, t in tensors.items() if name.startswith("text_adapter.adaptor.")}
        vision = {name: tensor for name, tensor in tensors.items() if name not in adaptor}
        if not adaptor or "visual_projection.weight" not in vision:
            raise UserError(f"{folder} is no LLM2CLIP: it lacks text_adapter.adaptor or visual_projection.")
        config = CLIPVisionConfig.from_dict(read_json(Path(folder) / "config.json").get("vision_config", {}))
        config.projection_dim = len(vision["visual_projection.weight"])
        self.device = device
        network: Any = CLIPVisionModelWithProjection(config)
        self.vision = filled(network, vision, folder).to(device)
        self.adapter = TextAdapter.of(adaptor, folder).to(device)
        side = network.config.image_size
        # the values of openai/clip-vit-large-patch14-336 for 336 pixels, resized by Pillow as at the benchmark's time
        self.prepare = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def of_picture(self, picture: Image.Image) -> Tensor:
        pixels = self.prepare(images=picture, return_tensors="pt").pixel_values
        return normalize(self.vision(pixel_values=pixels.to(self.device)).image_embeds[0], dim=-1)

    def of_text(self, features: Tensor) -> Tensor:
        return normalize(self.adapter(features.to(self.device)), dim=-1)


class TextAdapter(nn.Module):
    """LLM2CLIP's adapter: blocks with a residual path, a norm and a projection, on normalised features (…, W)."""

    def __init__(self, blocks: int, width: int, hidden: int, features: int) -> None:
        super().__init__()
        layers = [AdapterBlock(width, hidden) for _ in range(blocks)]
        self.adaptor = nn.Sequential(*layers, nn.LayerNorm(width), nn.Linear(width, features))

    @classmethod
    def of(cls, tensors: dict[str, Tensor], source: str) -> "TextAdapter":
        """From tensors `text_adapter.adaptor.<layer>.…`, which tell its sizes."""
        named = {name.removeprefix("text_adapter."): tensor for name, tensor in tensors.items()}
        blocks = len({name for name in named if name.endswith(".fn.0.weight")})
        first, last = named.get("adaptor.0.fn.0.weight"), named.get(f"adaptor.{blocks + 1}.weight")
        if first is None or last is None:
            raise UserError(f"{source} is no LLM2CLIP: its text_adapter has no blocks, or no projection after them.")
        return filled(cls(blocks, first.shape[1], first.shape[0], last.shape[0]), named, source)

    def forward(self, features: Tensor) -> Tensor:
        return self.adaptor(normalize(features, dim=-1))


class AdapterBlock(nn.Module):
    """x + a two-layer network of the normed x."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        unused = nn.Identity()  # dropout in training: it keeps the layers' numbers
        self.fn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), unused, nn.Linear(hidden, width))
        self.ln = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.ln(x))


class BidirectionalLlama:
    """A text -> its features (W,) float32: the mean of the last states of its tokens, which attend to each other in
    both directions.

    As llm2vec puts it, the text stands in a user's turn of Llama 3's template (`BEFORE`, `AFTER`), and the mean is over
    the text's own tokens and the end-of-turn after them: not over the start token and the turn's head, which llm2vec
    takes for an instruction. There is no further instruction and no end-of-text token. Tokens from the 513th on are
    cut, the end-of-turn with them.

    folder: of a Llama and its tokenizer. UserError where it holds something else.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import AutoTokenizer, LlamaModel

        settings: dict[str, Any] = {"local_files_only": True, "dtype": torch.bfloat16, "use_safetensors": True}
        settings |= {"attn_implementation": "sdpa", "output_loading_info": True}
        try:
            loaded: Any = LlamaModel.from_pretrained(folder, **settings)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(f"{folder} cannot be loaded as a Llama with its tokenizer ({reason}).") from error
        self.network, report = loaded
        misfits = [str(name) for kind in ("missing_keys", "mismatched_keys") for name in report[kind]]
        if misfits:
            raise UserError(f"{folder} does not hold the Llama that its config.json describes: see {some(misfits)}.")
        self.network.eval().requires_grad_(False).to(device)

    def __call__(self, text: str) -> Tensor:
        ids, own = self.tokens(text)
        return self.states(ids)[-own:].mean(dim=0).float()

    def tokens(self, text: str) -> tuple[list[int], int]:
        """All tokens of a text with what stands around it, and how many at their end the mean is over."""
        put = text.rstrip() + AFTER
        ids = self.tokenizer(BEFORE + put, truncation=True, max_length=LONGEST)["input_ids"]
        own = self.tokenizer(put, truncation=True, max_length=LONGEST, add_special_tokens=False)["input_ids"]
        return ids, len(own)

    @torch.inference_mode()
    def states(self, ids: Sequence[int]) -> Tensor:
        """The last states (L, W) of tokens."""
        tokens = torch.tensor([ids], device=self.network.device)
        # added to the attention's logits: nothing is hidden, where none given would hide what comes later
        everything = torch.zeros(1, 1, len(ids), len(ids), device=tokens.device, dtype=self.network.dtype)
        return self.network(tokens, attention_mask=everything, use_cache=False).last_hidden_state[0]


def sizes_differ(config: Mapping[str, Any], sizes: Mapping[str, int], model: str) -> str:
    """Why a network with a config.json cannot be `model`, empty if it can."""
    found = {name: config.get(name) for name in sizes}
    return "" if found == sizes else f"its network has {found}, {model} {dict(sizes)}"
