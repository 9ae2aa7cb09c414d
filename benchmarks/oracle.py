"""What the embedded OCR can read at best: CVTG-2K's and LongText-Bench's texts on plain pages, scored as the benchmarks
score pictures.

    python benchmarks/oracle.py --data FOLDER [--prompts 100] [--pages perfect swapped blank] [--font FILE]

FOLDER has the official files in cvtg2k/ and longtext/. A row a benchmark: its score through the OCR (`read`), and what
a reader without faults would have scored (`expected`): 1 for perfect pages, less for swapped letters, 0 for blank ones.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.benchmarks import cvtg2k, longtext
from evaluation.judges.ocr import RapidOCRReader
from evaluation.oracle import chinese_letters, find_font, oracle_score, swapped, wanted_texts

BARS = {"cvtg2k": 0.97, "longtext-en": 0.95, "longtext-zh": 0.95}  # what perfect pages must score


def spread(prompts: Sequence[Any], number: int) -> list[Any]:
    """So many of the prompts, at even distances, from the first on."""
    number = min(number, len(prompts))
    return [prompts[place * len(prompts) // number] for place in range(number)]


def texts_for(prompts: Sequence[Mapping[str, Any]], pages: str) -> list[list[str]]:
    texts = [wanted_texts(prompt) for prompt in prompts]
    if pages == "blank":
        return [[] for _ in texts]
    if pages == "perfect":
        return texts
    alphabet = chinese_letters(text for paragraph in texts for text in paragraph)
    return [[swapped(text, alphabet) for text in paragraph] for paragraph in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--pages", nargs="+", choices=("perfect", "swapped", "blank"), default=["perfect", "swapped"])
    parser.add_argument("--benchmarks", nargs="+", choices=sorted(BARS), default=sorted(BARS))
    parser.add_argument("--font")
    options = parser.parse_args()
    found = {
        "cvtg2k": cvtg2k.prompts(options.data / "cvtg2k"),
        "longtext-en": longtext.prompts(options.data / "longtext", "en"),
        "longtext-zh": longtext.prompts(options.data / "longtext", "zh"),
    }
    font, reader = find_font(options.font), RapidOCRReader()
    print(f"{reader.record().model}, {options.prompts} prompts each\n")
    print("| pages | benchmark | read | expected | bar | seconds a page |\n| --- | --- | --- | --- | --- | --- |")
    for pages in options.pages:
        for name in options.benchmarks:
            prompts = spread(found[name], options.prompts)
            start = time.perf_counter()
            score = oracle_score(prompts, texts_for(prompts, pages), reader, font)
            seconds = (time.perf_counter() - start) / len(prompts)
            bar = BARS[name] if pages == "perfect" else ""
            row = f"| {pages} | {name} | {score.measured:.4f} | {score.expected:.4f} | {bar} | {seconds:.1f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
