"""A report as Markdown: the same tables and sentences, pictures by their files' names."""

from collections.abc import Mapping
from typing import Any

from evaluation.report.tables import (
    NONE_WORST,
    anchors_with_numbers,
    difference_sentence,
    judge_table,
    score_table,
    setting_table,
    summary_table,
    verdict,
)
from zimage_lit.tables import markdown_table, markdown_text

Contents = Mapping[str, Any]


def markdown(contents: Contents) -> str:
    parts = [
        f"# Evaluation of {markdown_text(', '.join(contents['models']))}",
        "Scores of mode official with 95 % intervals clustered by prompt, of mode fixed where it differs.",
        markdown_table(summary_table(contents)),
    ]
    for benchmark in contents["benchmarks"]:
        parts += section(benchmark)
    return "\n\n".join(filter(None, parts)) + "\n"


def section(benchmark: Contents) -> list[str]:
    results = benchmark["results"]
    details = score_table(benchmark, detail=True)
    parts = [f"## {markdown_text(benchmark['title'])}"]
    for result in results:
        told = [f"{result['model']} is {verdict(result)} with published numbers.", *result["comparable"]["reasons"]]
        parts.append(markdown_text(" ".join([*told, *result["remarks"], result["modes"]])))
    parts += [markdown_table(score_table(benchmark, detail=False)), f"Intervals: {results[0]['interval']}."]
    if len(details) > 1:
        parts += ["### Scores in detail", markdown_table(details)]
    parts.append(markdown_text(benchmark["published"]["remark"]))
    parts.append(
        bullets([f"{one['model']}: {one['source']}. {one['remark']}" for one in anchors_with_numbers(benchmark)])
    )
    for difference in benchmark["differences"]:
        parts += compared(benchmark, difference)
    for result in results:
        name = markdown_text(result["model"])
        if result["worst"]:
            parts += [f"### Worst prompts of {name}", bullets(map(prompt_line, result["worst"]))]
        else:
            parts.append(NONE_WORST.format(name))
        if result["lost"]:
            lost = [f"{one['prompt_id']}, picture {one['image'] + 1}: {one['reason']}" for one in result["lost"]]
            parts += [f"### Lost pictures of {markdown_text(result['model'])}", bullets(lost)]
    parts += ["### Judges", markdown_table(judge_table(results))]
    parts += ["### How the pictures were made", markdown_table(setting_table(results))]
    return parts


def compared(benchmark: Contents, difference: Contents) -> list[str]:
    told = [difference["what"], difference_sentence(benchmark, difference), *difference["remarks"]]
    apart = [
        f"{prompt['prompt_id']}: " + "; ".join(f"{model} {one['score']:.3f}" for model, one in prompt["models"].items())
        for prompt in difference["most"]
    ]
    title = f"### {markdown_text(difference['model'])} beside {markdown_text(difference['against'])}"
    return [title, markdown_text(" ".join(told)), bullets(apart)]


def prompt_line(shown: Contents) -> str:
    files = ", ".join(image["file"] or "none" for image in shown["images"])
    return f"{shown['prompt_id']} ({shown['score']:.3f}): {shown['prompt']} — {' '.join(shown['said'])} Files: {files}"


def bullets(lines: Any) -> str:
    return "\n".join(f"- {markdown_text(' '.join(line.split()))}" for line in lines)
