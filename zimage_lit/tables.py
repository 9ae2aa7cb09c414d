"""Tables of texts for people, as HTML and as Markdown, and numbers with their intervals."""

import re
from collections.abc import Sequence
from html import escape

STYLE = """table{font-variant-numeric:tabular-nums;font-size:14px;display:block;overflow-x:auto}
td,th{vertical-align:top}td{white-space:nowrap}"""  # of a page with such tables
Rows = Sequence[Sequence[str]]  # the first row has the headings, a line break in a cell begins a new line


def with_interval(score: float, low: float | None, high: float | None, digits: int, times: float = 1) -> str:
    """0.843 [0.821, 0.862]; the score alone where there is no interval. All are shown `times` as large."""
    ends = "" if low is None or high is None else f" [{low * times:.{digits}f}, {high * times:.{digits}f}]"
    return f"{score * times:.{digits}f}{ends}"


def html_table(rows: Rows) -> str:
    head, *body = [[escape(cell).replace("\n", "<br>") for cell in row] for row in rows]
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body)
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{lines}</table>"


def markdown_table(rows: Rows) -> str:
    head, *body = [[markdown_text(cell).replace("\n", "<br>") for cell in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """The text with a backslash before what Markdown would read as a mark."""
    return re.sub(r"([\\`*_<|]|\](?=[(\[:]))", r"\\\1", text)
