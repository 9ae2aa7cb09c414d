"""The lifecycle with several seeds: what every stage scores and what it has changed, as a Markdown table.

    lightning run lifecycle seed_everything=S run.name=lifecycle-S      for each seed S
    python benchmarks/lifecycle.py outputs/lifecycle-0 outputs/lifecycle-1 outputs/lifecycle-2

A change is that of all seeds together, with two intervals of 95 %: by prompt, each with what all seeds drew of it
(would others show it?), and by seed, Student's t over the runs (would others?); behind them each seed's own. Runs are
read as they are: whoever made them says with which settings.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluation.report.difference import over_runs
from zimage_lit.errors import UserError
from zimage_lit.files import read_json
from zimage_lit.graph import OVERALL, read_graph
from zimage_lit.graph_report import Row, change, rows_of, told
from zimage_lit.tables import markdown_table


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of finished runs, one a seed")
    options = parser.parse_args(words)
    print(markdown_table(table([rows_in(folder) for folder in options.folders])))


def rows_in(folder: Path) -> list[Row]:
    """The rows of a run's report, whatever settings it was made with."""
    path = folder / "graph.json"
    if not path.is_file():
        raise UserError(f"{folder} has no graph.json: name the run.output_dir of a lifecycle.")
    known = read_json(path)["stages"]
    graph = read_graph("lifecycle", [f"run.output_dir={folder}"])
    unfinished = [one.name for one in graph.stages if known.get(one.name, {}).get("status") != "finished"]
    if unfinished:
        raise UserError(f"{folder}: not finished are {', '.join(unfinished)}; run the lifecycle to its end.")
    state = {one.name: {**known[one.name], "judged_by": graph.judged_by(one)} for one in graph.stages}
    return rows_of(graph, state, {name: one["fingerprint"] for name, one in state.items()})


def table(runs: Sequence[Sequence[Row]]) -> list[list[str]]:
    """A line for every stage that was judged and every one that it is compared with; `runs` have the same rows."""
    lines = [["stage", "is for", "scores", "against", "change, by prompt", "by seed", "seed by seed", "evaluations"]]
    results = [{row.stage.name: row.result for row in rows} for rows in runs]
    for rows in zip(*runs, strict=True):
        if any(row.result is None for row in rows):
            continue
        stage, cost = rows[0].stage, rows[0].cost
        scores = ["; ".join(f"{row.scores()[name][0]:.3f}" for row in rows) for name in stage.lifts or (OVERALL,)]
        told_once = [stage.name, "\n".join(stage.lifts), "\n".join(scores)]
        evaluations = f"{cost.evaluations:.3g}" if cost else ""
        for against in rows[0].changes or ("",):
            if not against:
                lines.append([*told_once, "", "", "", "", evaluations])
                continue
            pairs = [(one[against], one[stage.name]) for one in results]
            both = [(before, after) for before, after in pairs if before is not None and after is not None]
            changes = [row.changes[against].value for row in rows]
            each = "; ".join(f"{value:+.3f}" for value in changes)
            by_prompt, by_seed = change(stage.lifts, both), over_runs(changes)
            lines.append([*told_once, against, told(by_prompt), told(by_seed), each, evaluations])
    return lines


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
