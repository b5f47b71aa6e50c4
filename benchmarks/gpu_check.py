"""Whether the toolkit is right and fast on this machine's GPU: the tests that need one, then the training step of four
recipes beside a plain baseline (`baseline.py`) and beside what the hardware allows, and one table of both at the end.

    python benchmarks/gpu_check.py --json gpu.json         (make gpu-check; needs CUDA and pytest; up to 8 minutes)
    python benchmarks/gpu_check.py --only ptb-lstm

Exit status 1 when a test failed. Text is random, its words as frequent as in language.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy
import pytest
import torch
from speed import (
    NO_REGULARISATION,
    PARTS,
    RECIPES,
    flags_of,
    machine,
    medians,
    our_model,
    our_step,
    plain_step,
    seconds,
    step_in_parts,
)
from torch.profiler import ProfilerActivity, profile

import training
from model import RNNModel
from utils import BadInput, allow_tf32, batchify, run_script

ROOT = Path(__file__).parent.parent
EPOCHS = {"ptb-lstm": 929_589, "ptb-qrnn": 929_589, "wt2-lstm": 2_088_628, "wt103-qrnn": 103_227_021}  # tokens of each
REAL_EPOCHS = ("ptb-lstm", "ptb-qrnn")
GOALS = {"ptb-lstm": 4.0, "ptb-qrnn": 1.5}  # seconds per epoch on an H200
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


# --- the tests -------------------------------------------------------------------------------------------------------

class Outcomes:
    """A plugin of pytest: how many tests passed, failed and skipped under each name in a `cuda` mark."""

    def __init__(self):
        self.names, self.counts, self.seconds = {}, defaultdict(lambda: defaultdict(int)), defaultdict(float)

    def pytest_collection_modifyitems(self, items):
        for item in items:
            if mark := item.get_closest_marker("cuda"):
                self.names[item.nodeid] = mark.args[0]

    def pytest_runtest_logreport(self, report):
        if name := self.names.get(report.nodeid):
            self.seconds[name] += report.duration
            if report.when == "call" or report.outcome != "passed":
                self.counts[name][report.outcome] += 1

    def rows(self):
        """What, result and detail of each name."""
        for name, count in self.counts.items():
            result = "FAILED" if count["failed"] else "passed" if count["passed"] else "skipped"
            detail = ", ".join(f"{number} {outcome}" for outcome, number in count.items() if number)
            yield name, result, f"{detail}; {self.seconds[name]:.1f} s"


def run_tests(*arguments):
    """Run the tests with a `cuda` mark; returns their Outcomes and the exit status of pytest."""
    outcomes = Outcomes()
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py"))
             if "mark.cuda(" in path.read_text(encoding="utf-8")]  # others may import what is not installed there
    return outcomes, pytest.main(["-m", "cuda", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"),
                                  *(arguments or files)], plugins=[outcomes])


# --- what the hardware allows ----------------------------------------------------------------------------------------

def peaks(device, repetitions):
    """FLOP/s of a large product in each precision, bytes/s of a large copy, seconds to launch a kernel."""
    found = {}
    for name, kind in PRECISIONS.items():
        a, b = (torch.randn(8192, 8192, device=device).to(kind) for _ in range(2))
        allow_tf32(name == "tf32")
        found[name] = 4 * 2 * 8192**3 / medians({name: lambda a=a, b=b: [a @ b for _ in range(4)]}, repetitions)[name]
    allow_tf32(False)
    large = torch.empty(2**28, device=device)
    target, tiny = torch.empty_like(large), torch.zeros(1, device=device)
    found["copy"] = 2 * large.nbytes / medians({"copy": lambda: target.copy_(large)}, repetitions)["copy"]
    found["launch"] = medians({"launch": lambda: [tiny.add_(1) for _ in range(2000)]}, repetitions)["launch"] / 2000
    return found


def floors(recipe, tokens, kernels, peak):
    """Seconds that a step takes at least for its arithmetic, the traffic of weights and gradients, its launches."""
    args = flags_of(recipe)
    with torch.device("meta"):
        model = RNNModel(RECIPES[recipe][0], model=args.model, emsize=args.emsize, nhid=args.nhid, nlayers=args.nlayers)
    multiplied = sum(p.numel() for p in model.rnns.parameters()) + args.emsize * model.softmax.sizes[0]
    found = {f"arithmetic {name}": 6 * multiplied * tokens / peak[name] for name in PRECISIONS}
    # Read forward, backward and to be updated, written once; gradients written once, read for norm and update.
    found["traffic of weights"] = 7 * 4 * model.parameter_count() / peak["copy"]
    found["launches"] = kernels * peak["launch"]
    return found


def count_kernels(step):
    """Kernels that a call of `step` launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
    return sum(event.count for event in recorded.key_averages() if str(event.device_type).endswith("CUDA"))


# --- the benchmark ---------------------------------------------------------------------------------------------------

def words_like_language(shape, ntoken):
    return torch.from_numpy(numpy.random.default_rng(0).zipf(1.2, shape) % ntoken)


def variants(recipe):
    """The ways to train that are compared: name, and changes of the flags."""
    for graphs in (False, True):
        if graphs and RECIPES[recipe][0] > 75_000:
            return  # a split softmax
        for precision in PRECISIONS:
            yield f"{precision}, graphs" if graphs else precision, {"precision": precision, "cuda_graphs": graphs}


def measure_recipe(recipe, device, peak, repetitions):
    """Seconds of a step of `bptt` rows, and bytes of memory, by candidate; shares of the parts; floors."""
    args = flags_of(recipe)
    text = words_like_language((args.bptt + 1, args.batch_size), RECIPES[recipe][0]).to(device)
    words, targets, tokens = text[:-1], text[1:], args.bptt * args.batch_size
    makers = {"baseline": lambda: plain_step(recipe, words, targets),
              "no regularisation": lambda: our_step(recipe, words, targets, **NO_REGULARISATION)}
    makers |= {name: lambda changes=changes: our_step(recipe, words, targets, **changes)
               for name, changes in variants(recipe)}
    candidates, memory = {}, {}
    for name, make in makers.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = make()
        for _ in range(3):  # the third call of a graph is a replay
            step()
        memory[name] = torch.cuda.max_memory_allocated() - before
        candidates[name] = lambda step=step: [step() for _ in range(5)]
    times = {name: time / 5 for name, time in medians(candidates, repetitions).items()}
    kernels = count_kernels(candidates["fp32"]) / 5
    shares = {name: step_in_parts(recipe, words, targets, name, repetitions) for name in PRECISIONS}
    return {"tokens": tokens, "seconds": times, "memory": memory, "shares": shares, "kernels": kernels,
            "floors": floors(recipe, tokens, kernels, peak)}


def measure_epoch(recipe, device, **changes):
    """Seconds of a real epoch over as many random words as the corpus has: the second one, whose graphs are there."""
    args = flags_of(recipe, **changes)
    model = our_model(recipe, args).to(device)
    optimizer = training.make_optimizer(args.optimizer, model, args.lr, args.wdecay)
    run = training.graphed_gradients(model) if args.cuda_graphs else training.gradients
    source = batchify(words_like_language(EPOCHS[recipe], RECIPES[recipe][0]), args.batch_size, device)
    return [seconds(lambda: list(training.train_epoch(model, optimizer, source, args, training.Progress(), run=run)))
            for _ in range(2)][1]


def rows(recipe, found):
    """What, result and detail of each figure of a recipe."""
    times, tokens = found["seconds"], found["tokens"]
    for name, time_ in times.items():
        yield (f"{recipe}, {name}", f"{EPOCHS[recipe] / tokens * time_:,.2f} s/epoch",
               f"{tokens / time_:,.0f} tokens/s, {times['baseline'] / time_:.2f} times the baseline, "
               f"{found['memory'][name] / 2**20:,.0f} MiB")
    for name, time_ in found.get("epochs", {}).items():
        goal = f", goal {GOALS[recipe]} s on an H200" if recipe in GOALS else ""
        yield f"{recipe}, {name}, the loop", f"{time_:,.2f} s/epoch", f"measured over a whole epoch{goal}"
    for name, shares in found["shares"].items():
        yield f"{recipe}, {name}", "shares", ", ".join(f"{part} {shares[part]:.0%}" for part in PARTS)
    for name, time_ in found["floors"].items():
        detail = f"{found['kernels']:,.0f} kernels a step" if name == "launches" else ""
        yield f"{recipe}, floor: {name}", f"{EPOCHS[recipe] / tokens * time_:,.2f} s/epoch", detail


def table(rows):
    """Markdown."""
    cells = [("what", "result", "detail"), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def main():
    parser = argparse.ArgumentParser(description="Test and time the toolkit on the GPU.")
    parser.add_argument("--only", nargs="+", choices=list(EPOCHS), default=list(EPOCHS), metavar="RECIPE",
                        help=f"recipes to time: {', '.join(EPOCHS)} (default: all)")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N",
                        help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("PyTorch finds no CUDA device on this machine")
    start, device = time.monotonic(), torch.device("cuda")
    outcomes, status = run_tests()
    lines = list(outcomes.rows())
    allow_tf32(False)
    torch.manual_seed(0)
    found = {**machine(), "gpu": torch.cuda.get_device_name(), "peaks": peaks(device, args.repetitions), "results": {}}
    for recipe in args.only:
        print(f"measuring {recipe}, {time.monotonic() - start:.0f} s after the start", file=sys.stderr, flush=True)
        result = measure_recipe(recipe, device, found["peaks"], args.repetitions)
        if recipe in REAL_EPOCHS:
            result["epochs"] = {name: measure_epoch(recipe, device, **changes) for name, changes in variants(recipe)
                                if name in ("fp32", "fp32, graphs", "bf16, graphs")}
        found["results"][recipe] = result
        lines += rows(recipe, result)
        torch.cuda.empty_cache()
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    peak = found["peaks"]
    print(f"\n{found['gpu']}, torch {found['torch']}, commit {found['commit']}; "
          + ", ".join(f"{name} {peak[name] / 1e12:,.0f} TFLOP/s" for name in PRECISIONS)
          + f", copy {peak['copy'] / 1e12:.2f} TB/s, launch {peak['launch'] * 1e6:.1f} us; "
          f"{time.monotonic() - start:.0f} s\n")
    print("\n".join(table(lines)))
    return int(status != 0)


if __name__ == "__main__":
    run_script(main)
