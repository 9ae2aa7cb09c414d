"""A report as one HTML file that needs nothing beside it: tables, charts, and small copies of the pictures."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from evaluation.report.chart import Series, score_chart
from evaluation.report.results import Result
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
from zimage_lit.pages import document, reduced
from zimage_lit.tables import STYLE as TABLE_STYLE
from zimage_lit.tables import html_table

PREVIEW = 176  # pixels, longest side of a picture on the page
Contents = Mapping[str, Any]
Pictures = Mapping[tuple[str, str], Result]  # (benchmark's key, model) -> where their pictures are
STYLE = """
h2{margin-top:3rem;border-top:2px solid #222;padding-top:.5rem}
.wide td{white-space:normal;text-align:left}.wide th{text-align:left}
.chart{width:100%;font-size:13px;margin-top:1rem}.legend span{margin-right:1.2rem;white-space:nowrap}
.yes,.no{border-radius:.25rem;padding:.1rem .5rem;font-size:14px;color:#fff}
.yes{background:#15803d}.no{background:#a16207}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(500px,1fr));gap:0 1rem}
.card{margin-bottom:1rem;border:1px solid #ddd;border-radius:.5rem;padding:.75rem;overflow-wrap:anywhere}
.card h4{margin:0;font-weight:600}.card p,.card ul{margin:.25rem 0;font-size:14px}
.card ul{padding-left:1.2rem;color:#444}
.card small{color:#666}.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
.row{display:flex;flex-wrap:wrap;gap:.4rem;margin:.4rem 0}
.row img{width:110px;height:110px;object-fit:contain;background:#f2f2f2}.row img:only-child{width:176px;height:176px}
.row img.small{image-rendering:pixelated}
.absent{width:110px;height:110px;background:#eee;color:#666;font-size:12px;display:flex;align-items:center;
justify-content:center;text-align:center}
details{margin:.75rem 0}summary{cursor:pointer}
"""


def page(contents: Contents, results: Sequence[Result]) -> str:
    """The whole HTML file; `results` are those that the `contents` were made of, for their pictures."""
    pictures = {(result.key, result.model): result for result in results}
    models = ", ".join(contents["models"])
    parts = [
        f"<h1>Evaluation of {escape(models)}</h1>",
        "<p>Scores of mode official, as the benchmarks' own code counts, with 95 % intervals clustered by prompt; "
        "those of mode fixed, without that code's faults, stand below where they differ. Published numbers are on the "
        "right: they say something about ours only where it says comparable.</p>",
        html_table(summary_table(contents)),
        f"<p class='legend'>{' '.join(map(link, contents['benchmarks']))}</p>",
        *(section(benchmark, pictures) for benchmark in contents["benchmarks"]),
    ]
    return document(f"Evaluation of {models}", "".join(parts), TABLE_STYLE + STYLE)


def link(benchmark: Contents) -> str:
    return f"<span><a href='#{escape(benchmark['key'])}'>{escape(benchmark['title'])}</a></span>"


def section(benchmark: Contents, pictures: Pictures) -> str:
    """All about one benchmark."""
    results = benchmark["results"]
    details = score_table(benchmark, detail=True)
    parts = [
        f"<h2 id='{escape(benchmark['key'])}'>{escape(benchmark['title'])}</h2>",
        *(what_was_evaluated(result) for result in results),
        chart(benchmark),
        html_table(score_table(benchmark, detail=False)),
        folded("Scores in detail", html_table(details)) if len(details) > 1 else "",
        f"<p>Intervals: {escape(results[0]['interval'])}.</p>",
        published(benchmark),
        *(compared(benchmark, difference, pictures) for difference in benchmark["differences"]),
        *(worst(benchmark, result, pictures) for result in results),
        *(lost(result) for result in results if result["lost"]),
        folded("Judges", f"<div class='wide'>{html_table(judge_table(results))}</div>"),
        folded("How the pictures were made", f"<div class='wide'>{html_table(setting_table(results))}</div>"),
    ]
    return "".join(parts)


def what_was_evaluated(result: Contents) -> str:
    """The verdict with its reasons, and what has to be known of one model's scores."""
    badge = f"<span class='{'yes' if result['comparable']['verdict'] else 'no'}'>{verdict(result)}</span>"
    reasons = result["comparable"]["reasons"] or ["Judges, prompts and counting are the benchmark's own."]
    return (
        f"<p><b>{escape(result['model'])}</b> {badge} with published numbers: {escape(' '.join(reasons))}</p>"
        f"<p>{escape(' '.join([*result['remarks'], result['modes']]))}</p>"
    )


def chart(benchmark: Contents) -> str:
    """The main scores; published ones are brought to the same scale."""
    ours = [
        Series(
            result["model"],
            {
                row["name"]: (row["official"]["score"], row["official"]["ci_low"], row["official"]["ci_high"])
                for row in result["scores"]
                if row["official"] and not row["detail"]
            },
        )
        for result in benchmark["results"]
    ]
    names = list(dict.fromkeys(name for series in ours for name in series.scores))
    anchors = [
        Series(
            anchor["model"],
            {
                name: (number / benchmark["times"], None, None)
                for name, number in {"overall": anchor["overall"], **anchor["scores"]}.items()
            },
        )
        for anchor in anchors_with_numbers(benchmark)
    ]
    return score_chart(names, ours, anchors, benchmark["times"])


def published(benchmark: Contents) -> str:
    """What is known of the published numbers, and where they are from."""
    anchors = anchors_with_numbers(benchmark)
    lines = [f"{anchor['model']}: {anchor['source']}. {anchor['remark']}".strip() for anchor in anchors]
    without = [anchor["model"] for anchor in benchmark["published"]["anchors"] if anchor["overall"] is None]
    if without:
        lines.append(f"No number is known of {', '.join(without)}.")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    sources = folded("Where published numbers are from", f"<ul>{items}</ul>") if lines else ""
    return f"<p>{escape(benchmark['published']['remark'])}</p>{sources}"


def compared(benchmark: Contents, difference: Contents, pictures: Pictures) -> str:
    """A model beside the first one, and the prompts on which they are furthest apart."""
    cards = []
    for prompt in difference["most"]:
        sides = "".join(
            f"<div><b>{escape(model)}</b>{seen(shown, pictures[benchmark['key'], model])}</div>"
            for model, shown in prompt["models"].items()
        )
        first = next(iter(prompt["models"].values()))
        cards.append(f"<div class='card'>{heading(first)}<div class='pair'>{sides}</div></div>")
    told = [difference["what"], difference_sentence(benchmark, difference), *difference["remarks"]]
    return (
        f"<h3>{escape(difference['model'])} beside {escape(difference['against'])}</h3><p>{escape(' '.join(told))}</p>"
        + "".join(cards)
    )


def worst(benchmark: Contents, result: Contents, pictures: Pictures) -> str:
    if not result["worst"]:
        return f"<p>{NONE_WORST.format(escape(result['model']))}</p>"
    where = pictures[benchmark["key"], result["model"]]
    cards = "".join(f"<div class='card'>{heading(shown)}{seen(shown, where)}</div>" for shown in result["worst"])
    return f"<h3>Worst prompts of {escape(result['model'])}</h3><div class='cards'>{cards}</div>"


def heading(shown: Contents) -> str:
    place = " · ".join(filter(None, (shown["prompt_id"], shown["group"])))
    return f"<h4>{escape(shown['prompt'])}</h4><small>{escape(place)}</small>"


def seen(shown: Contents, result: Result) -> str:
    """A prompt's score, its pictures, and what the judges said of them."""
    row = "".join(figure(image, result, number) for number, image in enumerate(shown["images"], 1))
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in shown["said"])
    return f"<p>score {shown['score']:.3f}</p><div class='row'>{row}</div><ul>{said}</ul>"


def figure(image: Contents, result: Result, number: int) -> str:
    picture = result.picture(image)
    if picture is None:
        return f"<div class='absent'>picture {number}<br>{'lost' if image.get('lost') else 'not found'}</div>"
    return reduced(picture, PREVIEW, f"picture {number}")


def lost(result: Contents) -> str:
    items = "".join(
        f"<li>{escape(one['prompt_id'])}, picture {one['image'] + 1}: {escape(one['reason'])}</li>"
        for one in result["lost"]
    )
    return folded(f"{len(result['lost'])} lost pictures of {result['model']}", f"<ul>{items}</ul>")


def folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"
