"""Vision-language judges: Qwen2.5-VL in small, against decoding by hand; a server that is played."""

import base64
import io
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from evaluation.judges.contract import Asked
from evaluation.judges.vlm import OFFICIAL, OFFICIAL_SIZES, EndpointJudge, QwenVLJudge
from zimage_lit.errors import UserError

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PENALTY = 1.3


def question(text: str, longest: int = 6) -> dict[str, Any]:
    return {"prompt": text, "max_new_tokens": longest}


def picture(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL of 32 channels with all that its folder has."""
    place = tmp_path_factory.mktemp("qwen")
    tokenizer = small_tokenizer()
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in [*MARKS, "<|video_pad|>"]}
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config={**sizes, **heads, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={**sizes, "depth": 2, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.update(
        do_sample=True, temperature=1e-6, repetition_penalty=PENALTY, eos_token_id=ids["<|im_end|>"], pad_token_id=0
    )
    model.save_pretrained(place)
    parts = (Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor())
    Qwen2_5_VLProcessor(*parts, chat_template=TEMPLATE).save_pretrained(place)
    return place


def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    marks = [*MARKS, "<|video_pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=marks, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["yes no read"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@torch.inference_mode()
def decoded_by_hand(folder: Path, seen: Image.Image, text: str, longest: int) -> str:
    """Greedy, without a cache: the likeliest token after the penalty of all tokens that stand there already."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    message = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[message], images=[seen], return_tensors="pt")
    tokens, given = inputs["input_ids"], inputs["input_ids"].shape[1]
    for _ in range(longest):
        kinds = (tokens == model.config.image_token_id).int()
        grids = {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}
        logits = model(input_ids=tokens, mm_token_type_ids=kinds, use_cache=False, **grids).logits[0, -1]
        there = tokens[0].unique()
        logits[there] = torch.where(logits[there] > 0, logits[there] / PENALTY, logits[there] * PENALTY)
        tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
        if tokens[0, -1] == model.generation_config.eos_token_id:
            break
    return processor.tokenizer.decode(tokens[0, given:], skip_special_tokens=True)


def test_an_answer_is_the_likeliest_one_after_the_folders_penalty(folder: Path) -> None:
    judge = QwenVLJudge(str(folder), device="cpu")
    asked = [Asked((picture(0),), question("What?")), Asked((picture(1, 56, 112),), question("Read it", 3))]
    answers = judge.judge(asked)
    assert answers == [
        {"answer": decoded_by_hand(folder, picture(0), "What?", 6)},
        {"answer": decoded_by_hand(folder, picture(1, 56, 112), "Read it", 3)},
    ]
    assert answers[0] != answers[1]
    assert judge.judge(asked[::-1]) == answers[::-1] and judge.judge(asked[1:]) == answers[1:]


def test_pictures_are_resized_by_pillow_within_the_folders_limits(folder: Path, tmp_path: Path) -> None:
    """As in the version that the benchmarks were judged with; published folders name the limits by pixels."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "processor_config.json").unlink()
    published = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 28 * 28 * 4}
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**published, **sizes}))
    judge = QwenVLJudge(str(tmp_path), device="cpu")
    judge._load()
    processor = judge._processor.image_processor
    assert "Pil" in type(processor).__name__
    found = processor(images=[picture(0, 280, 280)], return_tensors="pt")
    assert found["image_grid_thw"].tolist() == [[1, 4, 4]]  # 56 x 56 pixels, four times 28 x 28


def test_the_record_tells_small_models_and_other_penalties_from_the_official(folder: Path, tmp_path: Path) -> None:
    record = QwenVLJudge(str(folder), device="cpu").record()
    assert record.settings == {"dtype": "float32", "decoding": "greedy"} and len(record.revision) == 16
    assert f"text_config.hidden_size is 32, not 3584 as that of {OFFICIAL}." in record.differs
    assert f"The penalty of repetition is {PENALTY}, not 1.05." in record.differs and record.model == "Qwen2.5-VL"
    sizes = {
        part: {k: v for (p, k), v in OFFICIAL_SIZES.items() if p == part} for part in ("text_config", "vision_config")
    }
    published = {"model_type": "qwen2_5_vl", **sizes["text_config"], "vision_config": sizes["vision_config"]}
    (tmp_path / "config.json").write_text(json.dumps(published))  # the published file has the text's part outside
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.05}))
    record = QwenVLJudge(str(tmp_path), device="cpu").record()
    assert (record.differs, record.model) == ("", OFFICIAL)


def test_weights_that_were_cut_short_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot be loaded as Qwen2.5-VL .*download"):
        QwenVLJudge(str(tmp_path / "cut"), device="cpu").judge([Asked((picture(0),), question("What?"))])


def test_folders_of_other_models_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*/none for the judge vlm: download Qwen/Qwen2.5-VL-7B-Instruct"):
        QwenVLJudge(str(tmp_path / "none")).record()
    with pytest.raises(UserError, match=r"cannot be loaded as Qwen2.5-VL"):
        QwenVLJudge(str(tmp_path)).record()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a bert, not a Qwen2.5-VL"):
        QwenVLJudge(str(tmp_path)).judge([Asked((picture(0),), question("What?"))])


class Served(ThreadingHTTPServer):
    """A model whose answer is the question's first letter, as often as it may be long."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Player)


class Player(BaseHTTPRequestHandler):
    server: Served

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.keys.append(self.headers.get("Authorization"))
        text = asked["messages"][0]["content"][1]["text"]
        answer = {"choices": [{"message": {"content": text[0] * asked["max_tokens"]}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Served()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_is_asked_about_each_picture_with_its_own_length(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = EndpointJudge(f"http://127.0.0.1:{served.server_port}/v1", "qwen", api_key_env="JUDGE_KEY", workers=2)
    asked = [Asked((picture(i),), question(text, longest)) for i, (text, longest) in enumerate((("a", 3), ("b", 1)))]
    asked.append(Asked((picture(2),), question("c", 3)))
    assert judge.judge(asked) == [{"answer": "aaa"}, {"answer": "b"}, {"answer": "ccc"}]
    assert served.keys == ["Bearer secret"] * 3
    for content in served.asked:
        assert content["temperature"] == 0 and content["model"] == "qwen" and "logprobs" not in content
        sent, text = content["messages"][0]["content"]
        data = base64.b64decode(sent["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture("abc".index(text["text"]))))


def test_a_servers_judgements_are_never_comparable_and_its_key_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    record = EndpointJudge("http://localhost:1/v1/", OFFICIAL).record()
    assert "cannot be checked" in record.differs and record.model == OFFICIAL
    assert record.settings == {"url": "http://localhost:1/v1/chat/completions", "temperature": 0}
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="the judge vlm: the environment variable JUDGE_KEY holds no key"):
        EndpointJudge("http://localhost:1/v1", OFFICIAL, api_key_env="JUDGE_KEY").record()
    with pytest.raises(UserError, match="the judge vlm: url must begin with http"):
        EndpointJudge("localhost", OFFICIAL)


def test_a_server_that_is_not_there_is_one_sentence(served: Served) -> None:
    served.server_close()
    judge = EndpointJudge(f"http://127.0.0.1:{served.server_port}/v1", "qwen", wait=0.0)
    with pytest.raises(UserError, match=r"^the judge vlm: .*start its server"):
        judge.judge([Asked((picture(0),), question("a"))])
