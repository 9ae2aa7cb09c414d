"""Imports point one way: what CONTRIBUTING says of the rooms of the house, held against every import in them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHTNING = ("lightning", "pytorch_lightning")
NETWORKS = ("transformers", "diffusers", "timm", "torch_fidelity", "open_clip")
NOT_FOR = {  # room -> what it must not import, whether at its head or inside a function
    "zimage_lit/backbone": (*LIGHTNING, "zimage_lit.objectives", "zimage_lit.stages", "data_modules", "evaluation"),
    "zimage_lit/backbone/model.py": ("torch.distributed", "zimage_lit.backbone.parallelize"),
    "zimage_lit/objectives": (*LIGHTNING, *NETWORKS, "zimage_lit.stages", "zimage_lit.callbacks", "zimage_lit.rewards"),
    "zimage_lit/sampling": (*LIGHTNING, *NETWORKS, "zimage_lit.stages", "zimage_lit.callbacks", "zimage_lit.pipeline"),
    "zimage_lit/components": (*LIGHTNING, "zimage_lit.stages", "zimage_lit.callbacks", "zimage_lit.objectives"),
    "zimage_lit/stages": ("zimage_lit.cli", "zimage_lit.graph", "zimage_lit.export", "zimage_lit.merge"),
    "zimage_lit/rewards": ("zimage_lit.stages", "zimage_lit.cli"),
    "zimage_lit/config.py": ("torch", *LIGHTNING),
    "data_modules": ("zimage_lit.stages", "evaluation"),
    "evaluation": ("zimage_lit.stages",),
    "evaluation/benchmarks": (*NETWORKS, *LIGHTNING, "evaluation.judges", "zimage_lit.pipeline", "zimage_lit.backbone"),
    "evaluation/judges": ("evaluation.benchmarks", "evaluation.scoring", "evaluation.report"),
}


def files_of(room: str) -> list[Path]:
    path = ROOT / room
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, f"{file}, line {node.lineno}: write imports out in full"
            for name in node.names:
                yield node.lineno, f"{node.module}.{name.name}"


@pytest.mark.parametrize("room", NOT_FOR)
def test_a_room_imports_nothing_that_is_not_for_it(room):
    files = files_of(room)
    assert files and all(file.is_file() for file in files), f"there is no {room} any more"
    broken = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for line, name in imported(file)
        for barred in NOT_FOR[room]
        if name == barred or name.startswith(f"{barred}.")
    ]
    assert not broken, "\n".join(broken)


def test_an_import_that_is_barred_is_seen(tmp_path):
    file = tmp_path / "one.py"
    file.write_text("import os\ndef run():\n    from zimage_lit.stages import GRPOModule\n")
    assert list(imported(file)) == [(1, "os"), (3, "zimage_lit.stages.GRPOModule")]
