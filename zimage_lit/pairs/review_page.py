"""The page on which a person looks at pairs and keeps or drops them: one HTML file that needs nothing beside it.

Pictures are embedded. What was decided stays in the browser (localStorage, under the set's id) until it is saved as
review.json: {"set", "kept": [ids], "dropped": [ids]}; pairs that nobody decided on are in neither list.
All text is escaped, and the page's policy lets nothing run but its own script.
"""

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape

from PIL import Image

from zimage_lit.pages import reduced

PREVIEW = 384  # pixels, longest side of a picture on the page; larger ones are reduced


@dataclass(frozen=True)
class ShownPair:
    """A pair as the page shows it. Scores are by reward, None for no judgement; pictures are files; verdict: kept,
    dropped or, where nobody has looked, None."""

    id: str
    prompt: str
    margin: float
    difficulty: float
    winner: bytes
    loser: bytes
    winner_scores: Mapping[str, float | None]
    loser_scores: Mapping[str, float | None]
    verdict: str | None


def review_page(pairs: Iterable[ShownPair], name: str, set_id: str) -> str:
    """The whole HTML file of a set called `name`."""
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    cards = "\n".join(card(pair) for pair in pairs)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Review of {escape(name)}</title>
<style>{STYLE}</style>
</head>
<body data-set="{escape(set_id)}">
<header>
<h1>{escape(name)}</h1>
<p>Is the left picture right, the right one wrong, and nothing else better in it? <kbd>K</kbd> keeps, <kbd>D</kbd>
drops, <kbd>U</kbd> undecides, <kbd>←</kbd> <kbd>→</kbd> move, <kbd>S</kbd> saves.</p>
<p><span id="counts" role="status"></span> <button id="save" type="button">Save review.json</button></p>
</header>
<main>
{cards}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def card(pair: ShownPair) -> str:
    """One pair."""
    verdict = f' data-verdict="{escape(pair.verdict)}"' if pair.verdict else ""
    names = dict.fromkeys([*pair.winner_scores, *pair.loser_scores])
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{told(pair.winner_scores.get(name))}</td>"
        f"<td>{told(pair.loser_scores.get(name))}</td></tr>"
        for name in names
    )
    return f"""<article data-id="{escape(pair.id)}"{verdict}>
<h2>{escape(pair.prompt)}</h2>
<div class="pictures">{figure(pair.winner, "winner")}{figure(pair.loser, "loser")}</div>
<p>margin {pair.margin:g}, difficulty {pair.difficulty:g}</p>
<table><tr><th>score</th><th>winner</th><th>loser</th></tr>{rows}</table>
<p><button type="button" data-verdict="kept">Keep</button> <button type="button" data-verdict="dropped">Drop</button>
<small>{escape(pair.id)}</small></p>
</article>"""


def figure(content: bytes, role: str) -> str:
    with Image.open(io.BytesIO(content)) as picture:
        image = reduced(picture, PREVIEW, role)
    return f"<figure>{image}<figcaption>{role}</figcaption></figure>"


def told(score: float | None) -> str:
    return "not judged" if score is None else f"{score:g}"


STYLE = """
body { font: 16px/1.4 system-ui, sans-serif; margin: 0; background: #f4f4f4; color: #111; }
header { position: sticky; top: 0; z-index: 1; background: #fff; padding: .5rem 1rem; border-bottom: 1px solid #bbb; }
header h1 { font-size: 1.1rem; margin: 0; }
header p { margin: .25rem 0; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 1rem; padding: 1rem; }
article { background: #fff; border: 3px solid #ccc; border-radius: .5rem; padding: .75rem; scroll-margin-top: 9rem; }
article.current { outline: 4px solid #1565c0; }
article[data-verdict=kept] { border-color: #2e7d32; }
article[data-verdict=dropped] { border-color: #b71c1c; }
article[data-verdict=dropped] .pictures { opacity: .4; }
article[data-verdict=kept] button[data-verdict=kept] { background: #2e7d32; color: #fff; }
article[data-verdict=dropped] button[data-verdict=dropped] { background: #b71c1c; color: #fff; }
h2 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.pictures { display: flex; gap: .5rem; }
figure { margin: 0; flex: 1; text-align: center; }
img { width: 100%; }
img.small { image-rendering: pixelated; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 0 .75rem 0 0; font-weight: normal; }
small { color: #666; }
"""

SCRIPT = """
"use strict";
const articles = [...document.querySelectorAll("article")];
const key = "zimage-lit review " + document.body.dataset.set;
let current = 0;

function stored() {
  try { return JSON.parse(localStorage.getItem(key)) || {}; } catch { return {}; }
}

function decide(article, verdict) {
  if (verdict) article.dataset.verdict = verdict; else delete article.dataset.verdict;
  const verdicts = {};
  for (const one of articles) verdicts[one.dataset.id] = one.dataset.verdict || null;
  try { localStorage.setItem(key, JSON.stringify(verdicts)); } catch { /* then it lasts as long as the page is open */ }
  count();
}

function withVerdict(verdict) {
  return articles.filter((article) => article.dataset.verdict === verdict).map((article) => article.dataset.id);
}

function count() {
  const kept = withVerdict("kept").length, dropped = withVerdict("dropped").length;
  document.getElementById("counts").textContent =
    `${articles.length} pairs: ${kept} kept, ${dropped} dropped, ${articles.length - kept - dropped} to look at.`;
}

function move(to) {
  if (!articles.length) return;
  articles[current].classList.remove("current");
  current = Math.min(Math.max(to, 0), articles.length - 1);
  articles[current].classList.add("current");
  articles[current].scrollIntoView({block: "nearest"});
}

function save() {
  const review = {set: document.body.dataset.set, kept: withVerdict("kept"), dropped: withVerdict("dropped")};
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(review, null, 1) + "\\n"], {type: "application/json"}));
  link.download = "review.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const actions = {
  k: () => { decide(articles[current], "kept"); move(current + 1); },
  d: () => { decide(articles[current], "dropped"); move(current + 1); },
  u: () => decide(articles[current], null),
  s: save,
  arrowright: () => move(current + 1),
  arrowleft: () => move(current - 1),
};
document.addEventListener("keydown", (event) => {
  const action = actions[event.key.toLowerCase()];
  if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
  if (articles.length || action === save) action();
  event.preventDefault();
});
document.getElementById("save").addEventListener("click", save);
articles.forEach((article, place) => {
  article.addEventListener("click", () => move(place));
  for (const button of article.querySelectorAll("button"))
    button.addEventListener("click", () => {
      const verdict = button.dataset.verdict;
      decide(article, article.dataset.verdict === verdict ? null : verdict);
    });
});
for (const [id, verdict] of Object.entries(stored())) {
  const article = articles.find((one) => one.dataset.id === id);
  if (!article) continue;
  if (verdict) article.dataset.verdict = verdict; else delete article.dataset.verdict;
}
count();
move(0);
"""
