"""The files of a report: report.html, report.md, report.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from evaluation.report.contents import contents
from evaluation.report.markdown import markdown
from evaluation.report.page import page
from evaluation.report.results import read_results
from zimage_lit.files import write_atomically


def write_report(result_folders: Sequence[Path], output: Path) -> Path:
    """Writes the report of one or several result folders below `output`, and returns the path of report.html.

    Results of one benchmark stand side by side; differences are from the model that comes first. UserError for a folder
    that holds no result, and for two results of one model on one benchmark.
    """
    results = read_results(result_folders)
    told = contents(results)
    path = Path(output) / "report.html"
    write_atomically(path, page(told, results))
    write_atomically(path.with_suffix(".md"), markdown(told))
    write_atomically(path.with_suffix(".json"), json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return path
