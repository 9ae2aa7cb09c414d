"""docs/architecture.md against the code: its rules of what never imports what, its arrows, and the paths it names."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PICTURE = (ROOT / "docs/images/architecture.svg").read_text(encoding="utf-8")
PACKAGES = ("zimage_lit", "data_modules", "evaluation", "experiments")
ARROWS = re.findall(r"<title>(\S+) imports (\S+)</title>", PICTURE)


def table(header: str) -> dict[str, str]:
    """First cell -> second cell of the page's table that begins with a header."""
    lines = PAGE[PAGE.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    return {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in lines)}


WORDS = {word: re.findall(r"`(.+?)`", packages) for word, packages in table("word").items()}
RULES = {  # room -> what it must not import
    room.strip("`"): [
        name
        for item in barred.split(", ")
        for name in ([item.strip("`")] if item.startswith("`") else WORDS[item])  # KeyError: a word without a meaning
    ]
    for room, barred in table("room").items()
}


# ---------------------------------------------------------------------------------------------------- imports


def files_of(room: str) -> list[Path]:
    """The files of a folder and all below it, of a file, or of a pattern."""
    path = ROOT / room
    return sorted(path.rglob("*.py")) if path.is_dir() else sorted(ROOT.glob(room))


def module_file(module: str) -> Path | None:
    """The file of a module of ours."""
    path = ROOT / module.replace(".", "/")
    files = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((file for file in files if file.is_file()), None)


def imported(file: Path, at_load: bool = False) -> list[tuple[int, str]]:
    """(line, full name) of everything that a file imports; `at_load`: only of what importing the file imports."""
    return list(names_in(ast.parse(file.read_text(encoding="utf-8")), at_load, file))


def names_in(node: ast.AST, at_load: bool, file: Path) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Import):
        yield from ((node.lineno, name.name) for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level and node.module, f"{file}, line {node.lineno}: write imports out in full"
        yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)
    elif not (at_load and happens_later(node)):
        for child in ast.iter_child_nodes(node):
            yield from names_in(child, at_load, file)


def happens_later(node: ast.AST) -> bool:
    """Whether importing a file does not run this: what is in functions, or there for type checkers alone."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith("TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


@cache
def loads(file: Path) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """What importing a file imports by itself: the full names, and the files of ours behind them."""
    names = tuple(name for _, name in imported(file, at_load=True))
    parts = (name.split(".") for name in names if name.startswith(PACKAGES))
    modules = (".".join(part[:length]) for part in parts for length in range(1, len(part) + 1))
    return names, tuple(path for module in modules if (path := module_file(module)))


def loaded_with(files: list[Path]) -> dict[str, Path]:
    """Full name -> the first file that imports it, of all that importing these files loads in turn."""
    found, seen, left = dict[str, Path](), set(files), list(files)
    while left:
        file = left.pop()
        names, behind = loads(file)
        found |= {name: file for name in names if name not in found}
        left += (new := set(behind) - seen)
        seen |= new
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


# ---------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("room", RULES)
def test_a_room_imports_nothing_that_is_not_for_it(room):
    broken = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files_of(room)
        for line, name in imported(file)
        for barred in RULES[room]
        if within(name, barred)
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("room", RULES)
def test_a_room_loads_nothing_that_is_not_for_it(room):
    broken = [
        f"{room} loads {name}, through {file.relative_to(ROOT)}"
        for name, file in loaded_with(files_of(room)).items()
        for barred in RULES[room]
        if within(name, barred)
    ]
    assert not broken, "\n".join(broken)


def test_the_rules_are_about_rooms_that_are_there():
    assert len(RULES) >= 15
    assert all(files_of(room) for room in RULES), "a room is gone"
    ours = [name for barred in RULES.values() for name in barred if name.startswith(PACKAGES)]
    assert all(module_file(name) for name in ours), "a rule bars a module that is gone"


def test_every_package_and_every_folder_of_it_has_a_rule():
    folders = [file.parent for package in PACKAGES[:3] for file in (ROOT / package).glob("*/__init__.py")]
    assert folders and all(any(folder.is_relative_to(ROOT / room) for room in RULES) for folder in folders)


@pytest.mark.parametrize(("above", "below"), ARROWS)
def test_an_arrow_of_the_picture_is_an_import_and_none_leads_back(above, below):
    sources, targets = set(files_of(above)), set(files_of(below))
    names = {name for file in sources for _, name in imported(file)}
    modules = {module_file(name) or module_file(name.rpartition(".")[0]) for name in names}
    assert modules & targets, f"{above} does not import {below}"
    back = [str(file.relative_to(ROOT)) for file in targets if sources.intersection(loads(file)[1])]
    assert not back, f"{below} imports {above}: {back}"


def test_the_picture_has_its_arrows():
    assert len(ARROWS) == len(re.findall(r'<path d="[^"]*"><title>', PICTURE)) > 10


def test_paths_on_the_page_are_there():
    paths = re.findall(rf"`((?:{'|'.join(PACKAGES)}|tests)/[\w./]*)`", PAGE)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_an_import_that_is_barred_is_seen(tmp_path):
    file = tmp_path / "one.py"
    file.write_text(
        "import os\nif TYPE_CHECKING:\n    import lightning\ntry:\n    import torch\nfinally:\n    pass\n"
        "class A:\n    import timm\n    def run(self):\n        from zimage_lit.stages import GRPOModule\n"
    )
    at_load = [(1, "os"), (5, "torch"), (9, "timm")]
    assert imported(file, at_load=True) == at_load
    assert imported(file) == sorted([*at_load, (3, "lightning"), (11, "zimage_lit.stages.GRPOModule")])
    assert "zimage_lit.sampling.solvers.full_precision" in loaded_with(files_of("zimage_lit/objectives/policy.py"))
    assert "zimage_lit.rng.generator" in loaded_with(files_of("zimage_lit/objectives/policy.py"))  # through sampling
