"""Vision-language models as judges: Qwen2.5-VL from a local folder, the one that LongText-Bench and OneIG-Bench ask,
or any model that a server runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.judges.weights import folder_revision, library_versions
from zimage_lit.errors import UserError
from zimage_lit.pipeline import usable_device
from zimage_lit.rewards.vision_language import Endpoint, EndpointSettings

OFFICIAL = "Qwen2.5-VL-7B-Instruct"
OFFICIAL_SIZES = {  # of its config.json: (part, key) -> value
    ("text_config", "hidden_size"): 3584,
    ("text_config", "num_hidden_layers"): 28,
    ("text_config", "intermediate_size"): 18944,
    ("text_config", "vocab_size"): 152064,
    ("vision_config", "hidden_size"): 1280,
    ("vision_config", "depth"): 32,
}
OFFICIAL_PENALTY = 1.05  # of repetition, in its generation_config.json


class QwenVLJudge:
    """Role vlm: Qwen2.5-VL, from its folder as published (Bai et al. 2025, arXiv 2502.13923).

    folder: of the model with tokenizer, processor, chat template and generation_config.json.
    device: what it computes on; by default a GPU where there is one. bfloat16 there, as the benchmarks have it, float32
        on a CPU.

    The likeliest token each time, after the folder's penalty of repetition: what the published settings (a temperature
    of a millionth) come to, without their chance. One picture at a time, so that no answer depends on another's.

    `differs` is told by the sizes in config.json and by that penalty, for no checksums of the weights are published
    with the benchmarks: other weights of these sizes pass for the official ones.
    """

    def __init__(self, folder: str, device: str | None = None) -> None:
        self.folder = folder
        self.device = device
        self._model: Any = None
        self._processor: Any = None

    def record(self) -> JudgeRecord:
        """UserError for a folder that holds no Qwen2.5-VL."""
        config, penalty = self._config()
        found = {place: getattr(getattr(config, place[0]), place[1]) for place in OFFICIAL_SIZES}
        differs = [
            f"{'.'.join(place)} is {value}, not {OFFICIAL_SIZES[place]} as that of {OFFICIAL}."
            for place, value in found.items()
            if value != OFFICIAL_SIZES[place]
        ]
        if penalty != OFFICIAL_PENALTY:
            differs.append(f"The penalty of repetition is {penalty}, not {OFFICIAL_PENALTY}.")
        return JudgeRecord(
            judge=type(self).__name__,
            model="Qwen2.5-VL" if differs else OFFICIAL,
            revision=folder_revision(self.folder),
            differs=" ".join(differs),
            settings={"dtype": str(self._dtype()).removeprefix("torch."), "decoding": "greedy"},
            versions=library_versions("transformers", "torch", "pillow"),
        )

    @torch.inference_mode()
    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        if self._model is None:
            self._load()
        return [{"answer": self._answer(pictures[0], question)} for pictures, question in asked]

    def _answer(self, picture: Image.Image, question: Any) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question["prompt"]}]
        text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = self._processor(text=[text], images=[picture], return_tensors="pt").to(self._model.device)
        tokens = self._model.generate(**inputs, max_new_tokens=question["max_new_tokens"])
        new = tokens[0, inputs["input_ids"].shape[1] :]
        return self._processor.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _load(self) -> None:
        from transformers import AutoImageProcessor, AutoProcessor, Qwen2_5_VLForConditionalGeneration

        self._config()
        try:
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, dtype=self._dtype()
            )
            self._processor = AutoProcessor.from_pretrained(self.folder, local_files_only=True)
            # Pictures are resized by Pillow in the benchmarks' version of the library; its default is another by now.
            self._processor.image_processor = AutoImageProcessor.from_pretrained(
                self.folder, local_files_only=True, backend="pil"
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise self._unusable(error) from error
        model.generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        self._model = torch.nn.Module.to(model, usable_device(self.device)).eval()

    def _dtype(self) -> torch.dtype:
        return torch.float32 if usable_device(self.device).type == "cpu" else torch.bfloat16

    def _config(self) -> tuple[Any, float]:
        """The model's config, and its penalty of repetition."""
        from transformers import AutoConfig, GenerationConfig

        if not Path(self.folder).is_dir():
            raise UserError(f"there is no folder {self.folder} for the judge vlm: download Qwen/{OFFICIAL} there.")
        try:
            config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
            generation = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        if config.model_type != "qwen2_5_vl":
            raise UserError(f"{self.folder} holds a {config.model_type}, not a Qwen2.5-VL: download Qwen/{OFFICIAL}.")
        return config, generation.repetition_penalty or 1.0

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"{self.folder} cannot be loaded as Qwen2.5-VL ({str(error).splitlines()[0]}): download Qwen/{OFFICIAL} "
            "again."
        )


class EndpointJudge:
    """Role vlm: a model behind an address that speaks OpenAI's chat completions, such as vLLM's.

    url: the API's base, such as http://localhost:8000/v1.
    model: as the server calls it.
    api_key_env: name of the environment variable that holds the key; none for servers without one.
    workers: questions that are asked at once.
    wait: seconds to go on asking a server that does not answer or is busy.
    request_timeout: seconds that one answer may take.

    Never comparable with published results, for the server's weights cannot be checked.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key_env: str | None = None,
        workers: int = 8,
        wait: float = 60.0,
        request_timeout: float = 120.0,
    ) -> None:
        self.model = model
        settings = EndpointSettings(
            url, model, api_key_env, workers, logprobs=False, wait=wait, request_timeout=request_timeout
        )
        self._endpoint = Endpoint("the judge vlm", settings)

    def record(self) -> JudgeRecord:
        """UserError where the environment holds no key."""
        self._endpoint.headers()
        return JudgeRecord(
            judge=type(self).__name__,
            model=self.model,
            revision="as served",
            differs=f"Answers come from a server, whose weights cannot be checked to be those of {OFFICIAL}.",
            settings={"url": self._endpoint.url, "temperature": 0},
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """UserError for a server that does not answer, or not as it should."""
        try:
            return [{"answer": answer} for answer in self._answers(asked)]
        except ConnectionError as error:
            raise UserError(
                f"the judge vlm: {error}: start its server or mend the url, then start the same command again."
            ) from error

    def _answers(self, asked: Sequence[Asked]) -> list[str]:
        answers = [""] * len(asked)
        for longest in sorted({question["max_new_tokens"] for _, question in asked}):
            places = [place for place, (_, question) in enumerate(asked) if question["max_new_tokens"] == longest]
            questions = [(as_tensor(asked[place].pictures[0]), asked[place].question["prompt"]) for place in places]
            for place, answer in zip(places, self._endpoint.ask_all(questions, longest), strict=True):
                answers[place] = answer.text
        return answers


def as_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
