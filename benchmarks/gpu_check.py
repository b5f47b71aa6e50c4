"""Check whether the toolkit is right and fast on this machine's GPU.

First come the tests that need one, then the training step of four recipes beside a plain baseline (`baseline.py`) and
beside what the hardware allows. One table of all comes at the end.

    python benchmarks/gpu_check.py --json gpu.json         (make gpu-check; needs CUDA and pytest; 10 minutes)
    python benchmarks/gpu_check.py --part tests            (5 minutes at most)
    python benchmarks/gpu_check.py --part speed --only ptb-lstm --minutes 3

Each file of tests, and each way to train a recipe, has a process and a time limit of its own (`gpu_parts.py`). What
goes wrong in one is a row of the table, and the others go on. After each of them the JSON is written. The exit status
is 1 if anything went wrong. Text is random, its words as frequent as in language.
"""

import json
import sys
import time
from pathlib import Path

import torch
from gpu_parts import (
    CORPUS_TOKENS,
    PRECISIONS,
    TESTS,
    attempt,
    floors,
    in_a_process,
    measure_variant,
    peaks,
    run_tests,
    variants,
)
from speed import PARTS
from timing import machine

from errors import BadInput
from files import check_writable
from flags import Parser, positive_float, positive_int
from process import run_script

TEST_FILES = ("test_regularisers.py", "test_qrnn.py", "test_cuda.py", "test_cuda_graphs.py", "test_reference.py")
GOALS = {"ptb-lstm": 4.0, "ptb-qrnn": 1.5}  # seconds per epoch on an H200
LIMITS = {"tests": 240, "speed": 120}  # seconds of a process


class Check:
    """Hold what was found, the rows of the table and what went wrong; `minutes` is the time of each part."""

    def __init__(self, json_path, minutes):
        self.json_path, self.minutes = json_path, minutes
        self.found, self.lines, self.errors = {"tests": {}, "peaks": {}, "results": {}}, [], {}
        self.end = self.limit = 0.0

    def begin(self, part):
        self.end, self.limit = time.monotonic() + 60 * self.minutes, LIMITS[part]

    def run(self, name, function, *arguments):
        """Call `function` in a process of its own, while the part has time; returns what it returns, or None."""
        left = self.end - time.monotonic()
        if left <= 0:
            self.errors[name] = f"not begun: the {self.minutes:g} minutes were over"
            return None
        print(f"{name}, {left:.0f} s left", file=sys.stderr, flush=True)
        return attempt(self.errors, name, lambda: in_a_process(min(self.limit, left), function, *arguments))

    def write(self):
        if self.json_path:
            content = {**self.found, "errors": self.errors}
            Path(self.json_path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_tests(check):
    check.begin("tests")
    for name in TEST_FILES:
        result = check.run(name, run_tests, str(TESTS / name))
        if result:
            lines, status = result
            check.found["tests"][name] = lines
            check.lines += lines
            if status:
                check.errors[name] = f"pytest ended with status {status}"
        check.write()


def check_speed(check, recipes, repetitions):
    check.begin("speed")
    check.found["peaks"], errors = check.run("peaks", peaks, repetitions) or ({}, {})
    check.errors |= {f"peak of {name}": error for name, error in errors.items()}
    check.write()
    for recipe in recipes:
        results = check.found["results"].setdefault(recipe, {})
        for name in variants(recipe):
            result = check.run(f"{recipe}, {name}", measure_variant, recipe, name, "cuda", repetitions)
            if result:
                results[name] = result
                check.errors |= {f"{recipe}, {what}": error for what, error in result["errors"].items()}
            check.write()
        check.lines += attempt(check.errors, f"{recipe}, table",
                               lambda recipe=recipe, results=results: list(rows(recipe, results, check.found["peaks"]))
                               ) or []


def rows(recipe, results, peak):
    """Yield what, result and detail of each figure of a recipe; `results` has what `measure_variant` returned."""
    per_epoch = {name: CORPUS_TOKENS[recipe] / found["tokens"] for name, found in results.items()}
    baselines = [found["baseline"] for found in results.values() if "baseline" in found]
    if baselines:
        name, baseline = next(iter(results)), sorted(baselines)[len(baselines) // 2]
        yield f"{recipe}, baseline", f"{per_epoch[name] * baseline:,.2f} s/epoch", "median over the processes"
    for name, found in results.items():
        details = [f"{found['tokens'] / found['seconds']:,.0f} tokens/s"] if "seconds" in found else []
        if "seconds" in found and "baseline" in found:
            details.append(f"{found['baseline'] / found['seconds']:.2f} times the baseline")
        if "memory" in found:
            details.append(f"{found['memory'] / 2**20:,.0f} MiB")
        if "kernels" in found:
            details.append(f"{found['kernels']:,.0f} kernels")
        if "seconds" in found:
            yield f"{recipe}, {name}", f"{per_epoch[name] * found['seconds']:,.2f} s/epoch", ", ".join(details)
        if "epoch" in found:
            goal = f", goal {GOALS[recipe]} s on an H200" if recipe in GOALS else ""
            yield f"{recipe}, {name}, the loop", f"{found['epoch']:,.2f} s/epoch", f"measured over a whole epoch{goal}"
        if "shares" in found:
            yield f"{recipe}, {name}", "shares", ", ".join(f"{part} {found['shares'][part]:.0%}" for part in PARTS)
    plain = results.get("fp32")
    if plain:
        for name, time_ in floors(recipe, plain["tokens"], plain.get("kernels"), peak).items():
            yield f"{recipe}, floor: {name}", f"{per_epoch['fp32'] * time_:,.2f} s/epoch", ""


def table(rows):
    """Format rows as Markdown."""
    cells = [("what", "result", "detail"), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def heading(found):
    """Format the line above the table: the GPU, the versions, and what the hardware can do as far as it is known."""
    peak = found["peaks"]
    parts = [f"{name} {peak[name] / 1e12:,.0f} TFLOP/s" for name in PRECISIONS if name in peak]
    if "copy" in peak:
        parts.append(f"copy {peak['copy'] / 1e12:.2f} TB/s")
    parts += [f"{name} {peak[name] * 1e6:.1f} us" for name in ("launch", "graphed launch") if name in peak]
    line = f"{found['gpu']}, torch {found['torch']}, commit {found['commit']}"
    return f"{line}; {', '.join(parts)}" if parts else line


def main():
    parser = Parser(description="Test and time the toolkit on the GPU.")
    parser.add_argument("--part", nargs="+", choices=["tests", "speed"], default=["tests", "speed"], metavar="PART",
                        help="what to do: tests, speed (default: both)")
    parser.add_argument("--only", nargs="+", choices=list(CORPUS_TOKENS), default=list(CORPUS_TOKENS), metavar="RECIPE",
                        help=f"recipes to time: {', '.join(CORPUS_TOKENS)} (default: all)")
    parser.add_argument("--repetitions", type=positive_int, default=5, metavar="N",
                        help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--minutes", type=positive_float, default=4.8, metavar="N",
                        help="time of each part; what it does not reach is a row (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("PyTorch finds no CUDA device on this machine")
    if args.json:
        check_writable(args.json)
    check = Check(args.json, args.minutes)
    check.found |= {**machine(), "gpu": torch.cuda.get_device_name()}
    if "tests" in args.part:
        check_tests(check)
    if "speed" in args.part:
        check_speed(check, args.only, args.repetitions)
    print(f"\n{heading(check.found)}\n")
    print("\n".join(table([*check.lines, *((name, "ERROR", error) for name, error in check.errors.items())])))
    return int(bool(check.errors))


if __name__ == "__main__":
    run_script(main)
