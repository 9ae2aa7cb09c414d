"""The project's docstrings as Markdown, for the API reference: what stands in them as lists becomes lists.

Arguments are `name: meaning`, one or several on a line, sometimes below `Args:`; what belongs to one is indented, or
goes on in mid-sentence. Settings are classes of fields with a comment beside each.
"""

import ast
import re
from textwrap import dedent, indent
from typing import Any

import griffe

from zimage_lit.config import comment_at

NAME, CODE = r"`{0,2}[a-z_]\w*`{0,2}", r"`{1,2}\w+`{1,2}"
NAMES, CODES = (rf"{name}(?:(?:, | and ){name})*" for name in (NAME, CODE))
ENTRY = re.compile(rf"({NAMES}):\s(.*)", re.DOTALL)
BEFORE_ANOTHER = re.compile(rf"(?: {{3}}|(?<=\.) )(?={NAMES}: )|(?<=;) (?={CODES}:(?: |$))")  # on the same line
ARGUMENTS = re.compile(r"(?m)^Args:\n((?: {4}.*\n?)+)")
ERRORS = re.compile(r"(?m)^Raises:\n((?: {4}.*\n?)+)")


class MarkdownDocstrings(griffe.Extension):
    """Rewrites the docstring of whatever has one, and adds a list of their fields to those of dataclasses."""

    def on_instance(self, *, node: Any, obj: griffe.Object, agent: Any, **_: Any) -> None:
        text = as_markdown(obj.docstring.value) if obj.docstring else ""
        if isinstance(node, ast.ClassDef) and holds_fields(node):
            text += "\n\n" + field_list(node, obj.lines_collection[obj.filepath])
        if text.strip():
            obj.docstring = griffe.Docstring(text, parent=obj)


def as_markdown(text: str) -> str:
    """A docstring, or what one says of an argument, as Markdown."""
    text = ARGUMENTS.sub(lambda found: dedent(found[1]), text)
    text = ERRORS.sub(lambda found: re.sub(r"(?m)^(?=\w+: )", "Raises ", dedent(found[1])), text)
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(part if part.startswith(" ") else paragraph(part) for part in paragraphs)  # indented: code


def paragraph(text: str) -> str:
    """Lines without an empty one between; each entry among them as an item of a list."""
    groups = list[str]()
    for line in one_entry_a_line(text):
        if groups and (line.startswith(" ") or not begins_group(line, groups[-1])):
            groups[-1] += f"\n{line}"
        else:
            groups.append(line)
    return "\n\n".join(list_item(found) if (found := ENTRY.match(group)) else escaped(group) for group in groups)


def begins_group(line: str, previous: str) -> bool:
    """Whether a line, not indented, is an entry or follows one, and no sentence goes on in it."""
    return previous.endswith((".", "?", ";")) and bool(ENTRY.match(line) or ENTRY.match(previous))


def one_entry_a_line(text: str) -> list[str]:
    lines = list[str]()
    for line in text.split("\n"):
        margin = line[: len(line) - len(line.lstrip())]
        first, *others = BEFORE_ANOTHER.split(line.strip())
        lines += [margin + first, *(margin[4:] + other for other in others)]
    return lines


def list_item(entry: re.Match[str]) -> str:
    names = re.sub(r"`*\b(?!and\b)(\w+)\b`*", r"`\1`", entry[1])
    first, _, rest = entry[2].partition("\n")
    meaning = as_markdown(f"{first}\n{dedent(rest)}" if rest else first)
    return f"- {names}: {indent(meaning, ' ' * 4).lstrip()}"


def escaped(text: str) -> str:
    """Angle brackets and asterisks outside of code as what they are; those of lists stay."""
    parts = re.split(r"(`+[^`]*`+)", text)
    plain = (re.sub(r"(?m)(?<!^)\*", r"\\*", part.replace("<", "&lt;")) for part in parts[::2])
    return "".join(part for pair in zip(plain, [*parts[1::2], ""], strict=True) for part in pair)


# ---------------------------------------------------------------------------------------------------- fields


def holds_fields(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list) or any(
        ast.unparse(base) == "NamedTuple" for base in node.bases
    )


def field_list(node: ast.ClassDef, lines: list[str]) -> str:
    """The fields that have a comment, with it, as the help page of a task shows them."""
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    comments = {ast.unparse(field.target): comment_of(field, lines) for field in fields}
    return "\n".join(f"- `{name}`: {escaped(comment)}" for name, comment in comments.items() if comment)


def comment_of(field: ast.AnnAssign, lines: list[str]) -> str:
    end = field.end_lineno or field.lineno
    return next(filter(None, (comment_at(lines, line - 1) for line in range(field.lineno, end + 1))), "")
