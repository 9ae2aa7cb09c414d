"""Frozen text encoders: prompts in, variable-length lists of token features out.

``Qwen3TextEncoder`` reads a real Qwen3 and the tiny one that ``build_tiny_qwen3`` makes for the embedded data set
alike.
"""

import hashlib
import string
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence

from zimage_lit.components.codecs import as_dtype, fingerprint, without_autocast
from zimage_lit.errors import UserError
from zimage_lit.files import read_json

MAX_TOKENS = 512  # the published pipelines' limit, chat template included
FEW_TOKENS = 16  # to which prompts that run together are padded freely; beyond, at most to twice the shortest one

# The tiny tokenizer's own: as short as can be, for on a laptop every token counts. Qwen3's folder brings Qwen3's.
TINY_CHAT_TEMPLATE = "{%- for message in messages %}{{- message.content + '<|im_end|>' }}{%- endfor %}"


class TextEncoder(Protocol):
    """What the stages and the pipeline ask of a text encoder: prompts -> list of (L_i, dim) float32."""

    @property
    def dim(self) -> int: ...

    def encode(self, prompts: list[str]) -> list[torch.Tensor]: ...

    def to(self, device: torch.device | str) -> Self: ...

    def fingerprint(self) -> str: ...


class Qwen3TextEncoder:
    """Qwen3's features of a prompt, as Z-Image reads them: chat template, ``hidden_states[-2]``, real tokens only.

    The last layer and the final norm are dropped after loading, since ``hidden_states[-2]`` is what goes into them.
    A prompt's features do not depend on its batch mates: with ``batch_size=1`` every prompt runs alone, so the
    numbers are the same bit for bit, and are kept in a cache, since a frozen encoder gives the same ones every time.
    Larger values run prompts of like length together, which is several times faster where a prompt alone leaves the
    device idle, and equal up to rounding. Nothing is kept then: what a prompt gets would depend on what was asked
    before, and a resumed run would not repeat itself bit for bit.

    Args:
        folder: one folder with the model (saved as ``Qwen3Model`` or ``Qwen3ForCausalLM``) and its tokenizer, or a
            pipeline's folder with ``text_encoder/`` and ``tokenizer/``. Read at the first use.
        dtype: precision of the weights; None keeps them as stored. Features come out float32 either way.
        on_long_prompt: what happens to a prompt of more than 512 tokens, template included: "error", or "truncate",
            which cuts from the right as the published pipeline does, with one warning.
        batch_size: how many prompts run together.
        cache_mib: size of the cache in MiB, least recently used prompts leave first; 0 switches it off. None for 256
            with ``batch_size=1``, else 0.

    Raises:
        ValueError: an unknown option.
        UserError: at the first use, where a folder, file or tensor is missing or wrong.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype | str | None = None,
        on_long_prompt: Literal["error", "truncate"] = "error",
        batch_size: int = 1,
        cache_mib: int | None = None,
    ) -> None:
        if on_long_prompt not in ("error", "truncate"):
            raise ValueError(f'on_long_prompt is "{on_long_prompt}"; use "error" or "truncate".')
        if cache_mib is None:
            cache_mib = 256 if batch_size == 1 else 0
        if batch_size < 1 or cache_mib < 0:
            raise ValueError(f"batch_size must be at least 1 and cache_mib at least 0, got {batch_size}, {cache_mib}.")
        if batch_size > 1 and cache_mib:
            raise ValueError(f"cache_mib is {cache_mib}, but only features of batch_size 1 are kept: leave one out.")
        self.folder = Path(folder)
        self.dtype = as_dtype(dtype)
        self.on_long_prompt = on_long_prompt
        self.batch_size = batch_size
        self._device = torch.device("cpu")
        self._cache = _FeatureCache(cache_mib * 2**20)
        self._config: dict[str, Any] | None = None
        self._model: Any = None  # transformers' Qwen3Model
        self._tokenizer: Any = None
        self._has_warned = False

    @property
    def dim(self) -> int:
        """Width of the features: the hidden size of the model."""
        return int(self._read_config()["hidden_size"])

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """One (L_i, dim) float32 tensor a prompt, on the encoder's device; L_i counts the template's tokens too.

        Raises:
            UserError: a prompt of more than 512 tokens under ``on_long_prompt="error"``; a missing or damaged folder.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings; wrap a single prompt in a list.")
        features = {prompt: self._cache.get(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, value in features.items() if value is None]
        for prompt, value in zip(missing, self._encode_new(missing), strict=True):
            features[prompt] = value
            self._cache.put(prompt, value)
        return [features[prompt].clone() for prompt in prompts]  # type: ignore[union-attr]  # all are filled by now

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt in the chat template, at most 512.

        Raises:
            UserError: a longer prompt under ``on_long_prompt="error"``; a missing or damaged folder.
        """
        tokenizer = self._load_tokenizer()
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        ids: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        for prompt, tokens in zip(prompts, ids, strict=True):
            if len(tokens) > MAX_TOKENS:
                self._meet_long_prompt(prompt, len(tokens))
        return [tokens[:MAX_TOKENS] for tokens in ids]

    def to(self, device: torch.device | str) -> Self:
        """Run on this device from now on; returns itself."""
        device = torch.device(device)
        if device != self._device:
            self._cache.clear()
        self._device = device
        if self._model is not None:
            self._model.to(device)
        return self

    def fingerprint(self) -> str:
        """SHA-256 of its files and its tokenizer's: encoders with the same one give the same features."""
        folders = dict.fromkeys((self._model_folder(), self._tokenizer_folder()))
        return hashlib.sha256("".join(map(fingerprint, folders)).encode()).hexdigest()

    def _encode_new(self, prompts: list[str]) -> list[torch.Tensor]:
        ids = self.tokenize(prompts)
        batches: list[list[int]] = []
        for index in sorted(range(len(ids)), key=lambda index: len(ids[index])):
            shortest = len(ids[batches[-1][0]]) if batches else 0
            if batches and len(batches[-1]) < self.batch_size and len(ids[index]) <= max(2 * shortest, FEW_TOKENS):
                batches[-1].append(index)
            else:
                batches.append([index])
        features: dict[int, torch.Tensor] = {}
        for batch in batches:
            features.update(zip(batch, self._run([ids[index] for index in batch]), strict=True))
        return [features[index] for index in range(len(prompts))]

    def _run(self, ids: list[list[int]]) -> list[torch.Tensor]:
        """Features (L_i, dim) float32 of token ids; the model is causal, so pads behind a prompt need no mask."""
        model, tokens = self._load_model(), [torch.tensor(prompt) for prompt in ids]
        with without_autocast(self._device):
            output = model(input_ids=pad_sequence(tokens, batch_first=True).to(self._device), use_cache=False)
        states = output.last_hidden_state.float()
        return [state[: len(prompt)] for state, prompt in zip(states, ids, strict=True)]

    def _meet_long_prompt(self, prompt: str, count: int) -> None:
        start = prompt if len(prompt) <= 40 else prompt[:40].rstrip() + "…"
        if self.on_long_prompt == "error":
            raise UserError(
                f'The prompt "{start}" has {count} tokens and the model takes at most {MAX_TOKENS}; '
                "shorten it, or set on_long_prompt: truncate to have its end cut off."
            )
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f'The prompt "{start}" has {count} tokens; it and all others of more than {MAX_TOKENS} lose their end.',
                stacklevel=2,
            )

    def _model_folder(self) -> Path:
        inner = self.folder / "text_encoder"
        return inner if inner.is_dir() else self.folder

    def _read_config(self) -> dict[str, Any]:
        if self._config is None:
            path = self._model_folder() / "config.json"
            if not path.parent.is_dir():
                raise UserError(f"There is no folder {path.parent} to read a Qwen3 from; prepare or download it first.")
            config = read_json(path)
            if config.get("model_type") != "qwen3":
                found = config.get("model_type")
                raise UserError(f'{path} says model_type "{found}", but a "qwen3" is needed here; check the folder.')
            for key in ("hidden_size", "num_hidden_layers"):
                if key not in config:
                    raise UserError(f'{path} lacks the key "{key}" of a Qwen3; write or download it again.')
            self._config = config
        return self._config

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            folder = self._tokenizer_folder()
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except Exception as error:  # transformers and tokenizers raise all kinds; none of them names the folder
                raise UserError(f"The tokenizer in {folder} cannot be read ({_first_line(error)}).") from error
            if tokenizer.chat_template is None:
                raise UserError(f"The tokenizer in {folder} has no chat template; take the one published with Qwen3.")
            self._tokenizer = tokenizer
        return self._tokenizer

    def _tokenizer_folder(self) -> Path:
        self._read_config()  # a missing folder should be named as such, not as a missing tokenizer
        beside = [self.folder / "tokenizer", self._model_folder(), self.folder.parent / "tokenizer"]
        folder = next((path for path in beside if (path / "tokenizer_config.json").is_file()), None)
        if folder is None:
            raise UserError(f"{beside[1]} has no tokenizer_config.json, nor has {beside[0]}; add the tokenizer.")
        return folder

    def _load_model(self) -> Any:
        if self._model is None:
            self._read_config()
            model = _read_qwen3(self._model_folder(), self.dtype)
            model.layers = model.layers[:-1]  # hidden_states[-2] is the input of the last layer,
            model.norm = torch.nn.Identity()  # and it is taken before the final norm
            self._model = model.requires_grad_(False).eval().to(self._device)
        return self._model


class _FeatureCache:
    """Features by prompt, bounded in bytes; the least recently used leave first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._entries: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, prompt: str) -> torch.Tensor | None:
        if prompt not in self._entries:
            return None
        self._entries.move_to_end(prompt)
        return self._entries[prompt]

    def put(self, prompt: str, features: torch.Tensor) -> None:
        self._entries[prompt] = features
        self._size += features.nbytes
        while self._size > self._limit:
            self._size -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._entries.clear()
        self._size = 0


def build_tiny_qwen3(
    folder: str | Path, captions: Iterable[str], hidden_size: int = 128, num_layers: int = 3, seed: int = 0
) -> Qwen3TextEncoder:
    """Write a small tokenizer and a Qwen3 with random weights to ``folder``, laid out like a real one.

    Frozen random features are enough for a small world: each token's vector tells which token it is, and the causal
    attention adds what came before. The same input gives the same bytes; the global random state is left alone.

    Args:
        folder: made if missing.
        captions: the texts whose words become tokens; words outside them are spelt letter by letter.
        hidden_size: width of the features, a multiple of 32.
        num_layers: at least 2; the last one is there for the layout only, since features are taken before it.
        seed: of the weights.

    Raises:
        ValueError: another hidden size or number of layers.
    """
    if hidden_size < 32 or hidden_size % 32 or num_layers < 2:
        raise ValueError(
            f"hidden_size must be a multiple of 32 and num_layers at least 2, got {hidden_size}, {num_layers}."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tiny_tokenizer(captions)
    with _quiet_transformers():
        tokenizer.save_pretrained(folder)
        _tiny_model(len(tokenizer), hidden_size, num_layers, seed).save_pretrained(folder)
    return Qwen3TextEncoder(folder)


def _read_qwen3(folder: Path, dtype: torch.dtype | None) -> Any:
    """transformers' ``Qwen3Model`` with every tensor accounted for; only an output head may be left over."""
    from transformers import Qwen3Model

    try:
        with _quiet_transformers():
            loaded: Any = Qwen3Model.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"The Qwen3 weights in {folder} cannot be read ({_first_line(error)}).") from error
    model, report = loaded
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise UserError(f'{folder}: "{name}" has the shape {tuple(found)}, config.json asks for {tuple(expected)}.')
    for name in sorted(report["missing_keys"]):
        raise UserError(f'{folder}: the weights lack the tensor "{name}"; write or download them again.')
    for name in sorted(set(report["unexpected_keys"]) - {"lm_head.weight"}):
        raise UserError(f'{folder}: the weights hold the tensor "{name}", which config.json has no place for.')
    return model


def _tiny_tokenizer(captions: Iterable[str]) -> Any:
    """A tokenizer of whole words, single CJK characters, digits and punctuation marks.

    Plurals of the captions' own words are cut in two, "circle" and "s", as larger tokenizers do with rarer words: "two
    moons" can then be understood by who has only read of one moon and of two circles. Capitals and words that no
    caption has are spelt letter by letter: a quoted "CAT" becomes C, A, T, so that a model which has seen some words
    drawn can try to spell others. A capital that only begins a sentence is lowered.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_end|>", "[UNK]"]
    first_letter = [normalizers.Replace(Regex(rf"\b{c}(?=[a-z])"), c.lower()) for c in string.ascii_uppercase]
    normalizer = normalizers.Sequence([*first_letter, normalizers.Replace(Regex(r"\bA(?= [a-z])"), "a")])

    def splitting(word: str) -> Any:
        spaces = pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed")
        return pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex(rf"{word}|[^a-z]"), "isolated")])

    texts = [normalizer.normalize_str(caption) for caption in set(captions)]

    def words_by(splitter: Any) -> set[str]:
        return {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}

    words = words_by(splitting("[a-z]+"))
    counted = sorted(word for word in words if len(word) > 2 and words & {f"{word}s", f"{word}es"})
    singular = rf"(?<![a-z])(?:{'|'.join(counted)})(?=e?s(?![a-z]))|" if counted else ""
    splitter = splitting(f"{singular}[a-z]+")
    words = words_by(splitter)
    alphabet = ["\n", *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = dict.fromkeys([*special, *alphabet, *sorted(words)])
    # WordPiece without a prefix for continuations: an unknown word falls apart into known pieces, in the end letters.
    pieces = models.WordPiece(
        {word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]", continuing_subword_prefix=""
    )
    tokenizer = Tokenizer(pieces)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens(special[:2])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=TINY_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _tiny_model(vocabulary: int, hidden_size: int, num_layers: int, seed: int) -> Any:
    """A seeded random ``Qwen3Model`` whose features are of about unit size and told apart by token and by context."""
    from transformers import Qwen3Config, Qwen3Model

    heads = hidden_size // 16  # many small heads: each mixes the context in its own way
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=16,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen3Model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Measured on TinyWorld's captions: unit features, 5/6 of their energy says which token it is, the rest what
        # came before it.
        for name, weight in sorted(model.named_parameters()):
            if name == "embed_tokens.weight":
                weight.normal_(std=2 / 3, generator=generator)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):  # what a layer adds to the token
                weight.normal_(std=0.5 * weight.shape[1] ** -0.5, generator=generator)
            elif weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
            elif name.endswith("q_norm.weight"):
                weight.fill_(4.0)  # random queries and keys of unit size would attend to all tokens nearly alike
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no loading report for the while: a part that takes a moment needs none."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
