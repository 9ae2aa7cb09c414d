"""What planning an epoch costs at 10^4, 10^6 and 10^7 samples, and how many pads its batches have.

    python benchmarks/planning.py                      # about a minute on one core

The pictures are drawn like photographs: usual aspect ratios, both ways up, log-normal areas around two megapixels,
captions of 8 to 300 tokens, in chunks of 500. Each plan is made in a process of its own: seconds to read the table,
seconds to plan an epoch for 8 ranks, and the peak of the resident set, with the share that Python and its libraries
have before it begins. Then the pads of batches by token budget and by count. Prints tables and one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.buckets import SizeMapping, image_tokens
from data_modules.planning import PLANNING, EpochPlan, PlanSettings, SampleTable, padding_share, plan_epoch, read_table

ASPECTS = {3 / 2: 0.35, 4 / 3: 0.3, 16 / 9: 0.1, 1.0: 0.1, 5 / 4: 0.1, 2.0: 0.05}
SAMPLES_OF_A_CHUNK = 500


def main() -> None:
    options = parse_options()
    if options.cost_of:
        print(json.dumps(cost(options)))
        return
    costs = [row for count in options.samples for row in costs_in_own_process(count)]
    print(
        f"{'samples':>10} {'window':>7} {'steps':>9} {'read s':>8} {'plan s':>8} {'peak MiB':>9} {'libraries MiB':>14}"
    )
    for row in costs:
        print(
            f"{row['samples']:>10} {row['window'] or '-':>7} {row['steps']:>9} {row['read_seconds']:>8.2f} "
            f"{row['plan_seconds']:>8.2f} {row['peak_MiB']:>9.0f} {row['libraries_MiB']:>14.0f}"
        )
    shares = padding(options)
    print(f"\n{'resolution':>10} {'ranks':>6} {'batches':>22} {'packed':>8} {'to longest':>11} {'beyond packed':>14}")
    for row in shares:
        print(
            f"{row['resolution'] or 'own':>10} {row['ranks']:>6} {row['batches']:>22} {row['packed']:>8.2%} "
            f"{row['to_longest']:>11.2%} {row['beyond_multiple']:>14.2%}"
        )
    print(json.dumps({"cost": costs, "padding": shares}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**4, 10**6, 10**7])
    parser.add_argument("--token-budget", type=int, default=32768)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--padding-samples", type=int, default=100_000)
    parser.add_argument("--cost-of", help=argparse.SUPPRESS)
    parser.add_argument("--window", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def draw_photographs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Widths and heights in pixels, and tokens of captions."""
    dice = np.random.default_rng(seed)
    aspect = dice.choice(list(ASPECTS), count, p=list(ASPECTS.values())) * np.exp(dice.normal(0, 0.03, count))
    aspect = np.where(dice.random(count) < 0.4, 1 / aspect, aspect)
    area = np.exp(dice.normal(np.log(1500**2), 0.8, count)).clip(256**2, 6000**2)
    size = (np.sqrt(area * aspect).astype(np.uint16), np.sqrt(area / aspect).astype(np.uint16))
    return *size, dice.integers(8, 301, count).astype(np.uint16)


def write_columns(folder: Path, count: int) -> None:
    """planning.npz, as a preparation leaves it."""
    width, height, captions = draw_photographs(count)
    concept = np.full(count, -1, dtype=np.int32)
    np.savez(folder / PLANNING, width=width, height=height, caption_tokens=captions, concept=concept)


def chunk_sizes(count: int) -> list[int]:
    full, rest = divmod(count, SAMPLES_OF_A_CHUNK)
    return [SAMPLES_OF_A_CHUNK] * full + [rest] * (rest > 0)


def costs_in_own_process(count: int) -> list[dict[str, Any]]:
    """Of an epoch over all the data at once, and of one in windows."""
    with tempfile.TemporaryDirectory() as folder:
        write_columns(Path(folder), count)
        rows = []
        for window in ("0", "16"):
            command = [sys.executable, __file__, "--cost-of", folder, "--samples", str(count), "--window", window]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return rows


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of reading the table, once a run, and of planning an epoch; the peak of the process."""
    (count,) = options.samples
    before = peak_mebibytes()
    start = time.perf_counter()
    table = read_table(Path(options.cost_of), chunk_sizes(count), SizeMapping(resolution=1024))
    read = time.perf_counter()
    settings = PlanSettings(None, options.token_budget, world_size=8, window=options.window or None)
    plan = plan_epoch(table, settings, epoch=0)
    end = time.perf_counter()
    return {
        "samples": count, "window": settings.window, "steps": len(plan), "read_seconds": read - start,
        "plan_seconds": end - read, "peak_MiB": peak_mebibytes(), "libraries_MiB": before,
    }  # fmt: skip


def peak_mebibytes() -> float:
    """Of this process alone; getrusage would count what its parent held when it was started."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10


def padding(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for resolution in (256, 512, 1024, None):
        with tempfile.TemporaryDirectory() as folder:
            write_columns(Path(folder), options.padding_samples)
            sizes = SizeMapping(resolution=resolution)
            table = read_table(Path(folder), chunk_sizes(options.padding_samples), sizes)
        width, height, captions = draw_photographs(options.padding_samples)
        tokens = image_tokens(*sizes(width, height))
        unknown = SampleTable(table.num_samples)
        for ranks in (1, 8):
            budget = PlanSettings(None, options.token_budget, ranks)
            count = PlanSettings(options.batch_size, None, ranks)
            plans: dict[str, EpochPlan] = {
                "buckets, token budget": plan_epoch(table, budget, 0),
                "buckets, by count": plan_epoch(table, count, 0),
                "plain, by count": plan_epoch(unknown, count, 0),
            }
            for name, plan in plans.items():
                share = padding_share(plan, tokens, captions)
                rows.append({"resolution": resolution, "ranks": ranks, "batches": name, **vars(share)})
    return rows


if __name__ == "__main__":
    main()
