"""docs/data.md as its reader would follow it: every file it shows is written, every command run, in order.

The photographs are made up and the model is tiny. What the page says of real sizes is made small by the settings in
SMALL, added to the page's own commands; nothing else is changed but the port of its web server.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from docs_pages import DOCS, blocks_of, commands, free_port, lightning_run, photograph, write_pipeline
from safetensors.torch import load_file

from data_modules.manifest import read_manifest
from zimage_lit.pipeline import ZImagePipeline, load_pipeline

PAGE = (DOCS / "data.md").read_text(encoding="utf-8")
BLOCKS = blocks_of("data.md")
PORT = "8000"  # of the page's web server
SMALL = {
    "prepare": ["num_workers=1"],
    "verify": ["num_workers=1"],
    "encode": ["sizes.resolution=64", "device=cpu"],
    "generate": ["num_inference_steps=2", "device=cpu"],
    "train": [
        "trainer.max_steps=5",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "data.init_args.num_workers=0",
        "trainer.callbacks.samples.init_args.sampling.num_inference_steps=2",
        "trainer.callbacks.samples.init_args.sampling.height=64",
        "trainer.callbacks.samples.init_args.sampling.width=64",
    ],
}
SMALL_DATA = {
    "mine": ["data.init_args.sizes.resolution=64", "data.init_args.token_budget=512"],
    "mixed": [
        "data.init_args.data.photos.init_args.sizes.resolution=64",
        "data.init_args.data.photos.init_args.token_budget=512",
        "data.init_args.data.album.init_args.sizes.resolution=64",
    ],
}


def blocks(language: str) -> list[str]:
    return [content for name, content in BLOCKS if name == language]


def write_photographs(folder: Path) -> None:
    """24 good ones with their captions, and 6 that cannot be used."""
    (folder / "2024").mkdir(parents=True)
    for index in range(24):
        place = folder / ("" if index % 2 else "2024") / f"harbour-{index:02d}"
        photograph(index).save(place.with_suffix(".png" if index % 3 else ".jpg"))
        if index % 4 == 0:
            place.with_suffix(".json").write_text(blocks("json")[0], encoding="utf-8")
        else:
            place.with_suffix(".txt").write_text(f"a harbour at dusk, {index} boats\n")
    for name in ("half.jpg", "unsaid.jpg", "silent.jpg", "renamed.jpg"):
        photograph(99).save(folder / name, "PNG" if name == "renamed.jpg" else "JPEG")
    (folder / "half.jpg").write_bytes((folder / "half.jpg").read_bytes()[:700])
    photograph(98).resize((40, 30)).save(folder / "thumbnail.jpg")
    for name in ("half", "renamed", "thumbnail", "alone"):
        (folder / f"{name}.txt").write_text("a harbour")
    (folder / "silent.txt").write_text("  \n")


@dataclass
class Walk:
    """Who follows the page, up to the first command that fails: what was printed, and what the page shows of it."""

    port: str = field(default_factory=free_port)
    shown: list[tuple[str, str]] = field(default_factory=list)  # (what the page shows, what its last command printed)
    commands: dict[str, str] = field(default_factory=dict)  # command -> what it printed
    servers: list[subprocess.Popen] = field(default_factory=list)

    def follow(self, language: str, content: str) -> None:
        content = content.replace(f":{PORT}/", f":{self.port}/").replace(f" {PORT} ", f" {self.port} ")
        if language == "yaml":
            place = Path(content.splitlines()[0].removeprefix("# "))
            place.parent.mkdir(exist_ok=True)
            place.write_text(content, encoding="utf-8")
        elif language == "text":
            self.shown.append((content, list(self.commands.values())[-1]))
        elif language == "python":
            exec(compile(content, "docs/data.md", "exec"), {})
        elif language == "bash":
            for command in commands(content):
                self.run(command)

    def run(self, command: str) -> None:
        words = shlex.split(command.replace("\\\n", " "))
        if words[:2] == ["lightning", "run"]:
            self.commands[command] = self.lightning(words[2:])
        elif words[-1] == "&":
            self.servers.append(subprocess.Popen([sys.executable, *words[1:-1]], stderr=subprocess.DEVNULL))
        else:
            subprocess.run(["bash", "-c", command], check=True)

    def lightning(self, words: list[str]) -> str:
        """`lightning run …` in this process, made small; gives what it printed."""
        small = (
            SMALL[words[0]] if words[0] in SMALL else [*SMALL["train"], *SMALL_DATA.get(words[0], SMALL_DATA["mine"])]
        )
        code, printed = lightning_run([*words, *small])
        assert code == 0, f"{shlex.join(words)}\n{printed}"
        return printed


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory):
    """The page followed from its first block to its last, in a folder that holds the photographs and a model."""
    folder = tmp_path_factory.mktemp("docs-data")
    write_photographs(folder / "photos")
    write_pipeline(folder / "models/z-image")
    walk = Walk()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("COLUMNS", "100")
        for language, content in BLOCKS:
            walk.follow(language, content)
        yield walk
        for server in walk.servers:
            server.terminate()
            server.wait()


def test_every_command_of_the_page_is_run(walk: Walk) -> None:
    assert len(walk.commands) == len(re.findall(r"(?m)^lightning ", PAGE)) >= 14


def test_what_the_page_shows_is_what_was_printed(walk: Walk) -> None:
    assert len(walk.shown) == 2
    for page, printed in walk.shown:
        for line in page.splitlines():
            assert line in printed


def test_a_rejected_record_reads_as_on_the_page(walk: Walk) -> None:
    (example,) = re.findall(r'`(\{"source": .*?\})`', PAGE)
    assert json.loads(example) in map(json.loads, Path("data/photos/rejected.jsonl").read_text().splitlines())


def test_the_fine_tune_draws_its_prompts_and_leaves_a_pipeline(walk: Walk) -> None:
    for run in ("mine", "bilingual", "encoded", "mixed", "harbours", "remote"):
        grids = sorted(path.name for path in Path(f"outputs/{run}/samples").iterdir())
        assert grids == ["step-00000000.png", "step-00000005.png"]
        assert ZImagePipeline.from_pretrained(f"outputs/{run}/pipeline", device="cpu").defaults.height == 64
    assert len(list(Path("pictures").glob("*seed0.png"))) == 1
    assert load_pipeline("outputs/mine/checkpoints/last.ckpt", "cpu").defaults.height == 64


def test_encoded_data_train_as_the_pictures_do(walk: Walk) -> None:
    """The same samples, noise and captions; only bfloat16 lies between the two."""
    weights = [
        load_file(f"outputs/{run}/pipeline/transformer/diffusion_pytorch_model.safetensors")
        for run in ("mine", "encoded")
    ]
    start = load_file("models/z-image/transformer/diffusion_pytorch_model.safetensors")
    moved, apart = 0.0, 0.0
    for name, first in weights[0].items():
        moved += float((first - start[name]).square().sum())
        apart += float((first - weights[1][name]).square().sum())
    assert 0 < apart < 0.1 * moved


def test_sources_become_data_sets_with_the_captions_of_the_page(walk: Walk) -> None:
    captions = {name: read_manifest(Path("data") / name).captions for name in ("photos", "manifest", "tar", "edits")}
    assert captions["photos"] == {"en": ["long", "medium", "short", "text"], "zh": ["short"]}
    assert captions["manifest"] == {"de": ["short"], "en": ["long"]}
    assert captions["edits"] == {"en": ["difference", "instruction"]}
    assert read_manifest(Path("data/tar")).splits == {"train": 12}


def test_data_of_other_kinds_and_sizes_are_refused(walk: Walk) -> None:
    edits = ["data.class_path=data_modules.EditingDataModule", "data.init_args.data_dir=data/edits"]
    edits += ["data.init_args.batch_size=2", "data.init_args.sizes.resolution=64"]
    code, printed = lightning_run(["mine", *SMALL["train"], "run.name=edits", *edits])
    assert code == 1 and "learns from pictures and captions" in printed
    words = ["run.name=larger", "data.init_args.data_dir=data/photos-encoded", "data.init_args.sizes.resolution=96"]
    code, printed = lightning_run(["mine", *SMALL["train"], *words])
    assert code == 1 and "latents of pictures of fixed sizes" in printed
    code, printed = lightning_run(["verify", f"data=http://127.0.0.1:{walk.port}/photos"])
    assert code == 2 and "reads a folder" in printed


def test_a_run_goes_on_with_another_cache_and_with_data_that_have_moved(walk: Walk) -> None:
    small = [*SMALL["train"], *SMALL_DATA["mine"], "trainer.max_steps=6"]
    code, printed = lightning_run(["remote", *small, "data.init_args.cache.patience=60"])
    assert code == 0 and "continuing remote" in printed and "finished at step 6" in printed
    shutil.copytree("data/photos", "elsewhere")
    words = ["data.init_args.data_dir=elsewhere", "run.resume=outputs/mine/checkpoints/last.ckpt"]
    code, printed = lightning_run(["mine", *small, *words])
    assert code == 0 and "finished at step 6" in printed
