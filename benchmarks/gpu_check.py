"""Check whether the toolkit is right and fast on this machine's GPU.

First the tests that need one, then the training step of four recipes beside a plain baseline (`baseline.py`) and beside
what the hardware allows; one table of both at the end.

    python benchmarks/gpu_check.py --json gpu.json         (make gpu-check; needs CUDA and pytest; 8 minutes)
    python benchmarks/gpu_check.py --only ptb-lstm --minutes 3

The tests, and each recipe, have a process of their own: what goes wrong in one is a row of the table and no end
of the others. Exit status 1 when anything went wrong. Text is random, its words as frequent as in language.
"""

import argparse
import json
import sys
import time
import traceback
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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

from device import allow_tf32, tf32
from errors import BadInput
from files import check_writable
from model import RNNModel
from optimizers import make_optimizer
from process import run_script
from run import Batches, Progress, Run
from splitcross import splits_for
from steps import choose_pass, seed_everything
from training import train_batches
from utils import batchify

TESTS = Path(__file__).parent.parent / "tests"
TEST_FILES = ("test_regularisers.py", "test_qrnn.py", "test_reference.py", "test_cuda.py")  # those of graphs come last
EPOCHS = {"ptb-lstm": 929_589, "ptb-qrnn": 929_589, "wt2-lstm": 2_088_628, "wt103-qrnn": 103_227_021}  # tokens of each
REAL_EPOCHS = dict.fromkeys(("ptb-lstm", "ptb-qrnn"), ("fp32", "fp32, graphs", "bf16, graphs"))
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
    """Run the tests with a `cuda` mark; returns the rows of their Outcomes and the exit status of pytest."""
    outcomes = Outcomes()
    status = pytest.main(["-m", "cuda", "--rootdir", str(TESTS.parent), "-c", str(TESTS.parent / "pyproject.toml"),
                          *(arguments or [str(TESTS / name) for name in TEST_FILES])], plugins=[outcomes])
    return list(outcomes.rows()), int(status)


# --- what the hardware allows ----------------------------------------------------------------------------------------

def peaks(repetitions):
    """Measure what the hardware can do.

    FLOP/s of a large product in each precision, bytes/s of a large copy, seconds to launch a kernel from Python and in
    a graph.
    """
    found = {}
    for name, dtype in PRECISIONS.items():
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        with tf32(name == "tf32"):
            turn = medians({name: lambda a=a, b=b: [a @ b for _ in range(4)]}, repetitions)
        found[name] = 4 * 2 * 8192**3 / turn[name]
    large = torch.empty(2**28, device="cuda")
    target, tiny, graph = torch.empty_like(large), torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    found["copy"] = 2 * large.nbytes / medians({"copy": lambda: target.copy_(large)}, repetitions)["copy"]
    launch = [lambda: tiny.add_(1)] * 2000
    with torch.cuda.graph(graph):
        for one in launch:
            one()
    turns = medians({"launch": lambda: [one() for one in launch], "graphed launch": graph.replay}, repetitions)
    return found | {name: time / len(launch) for name, time in turns.items()}


def floors(recipe, tokens, kernels, peak):
    """Seconds that a step takes at least for its arithmetic, the traffic of weights and gradients, its launches."""
    args = flags_of(recipe)
    with torch.device("meta"):
        model = RNNModel(RECIPES[recipe][0], model=args.model, emsize=args.emsize, nhid=args.nhid, nlayers=args.nlayers)
    multiplied = sum(p.numel() for p in model.rnns.parameters()) + args.emsize * model.softmax.sizes[0]
    found = {f"arithmetic {name}": 6 * multiplied * tokens / peak[name] for name in PRECISIONS}
    # Read forward, backward and to be updated, written once; gradients written once, read for norm and update.
    found["traffic of weights"] = 7 * 4 * model.parameter_count() / peak["copy"]
    found["launches from Python"] = kernels * peak["launch"]
    found["launches in a graph"] = kernels * peak["graphed launch"]
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
        if graphs and splits_for(RECIPES[recipe][0]):
            return
        for precision in PRECISIONS:
            yield f"{precision}, graphs" if graphs else precision, {"precision": precision, "cuda_graphs": graphs}


def as_pytorch(step):
    """The step with what PyTorch allows by itself: TF32 to cuDNN, and not to matrix products."""
    def call():
        allow_tf32(False)
        torch.backends.cudnn.allow_tf32 = True
        step()
    return call


def attempt(errors, name, function):
    """What `function` returns, or None, its error being noted under `name`."""
    try:
        return function()
    except Exception as error:  # any one: the others are still worth their time
        traceback.print_exc()
        errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def measure_recipe(recipe, device, peak, repetitions):
    """Measure a recipe.

    Seconds of a step of `bptt` rows and bytes of memory by candidate, shares of the parts, floors, seconds of whole
    epochs, and errors by what they kept from being measured.
    """
    seed_everything(0)
    args = flags_of(recipe)
    text = words_like_language((args.bptt + 1, args.batch_size), RECIPES[recipe][0]).to(device)
    words, targets, tokens = text[:-1], text[1:], args.bptt * args.batch_size
    makers = {"baseline": lambda: as_pytorch(plain_step(recipe, words, targets)),
              "no regularisation": lambda: our_step(recipe, words, targets, **NO_REGULARISATION)}
    makers |= {name: lambda changes=changes: our_step(recipe, words, targets, **changes)
               for name, changes in variants(recipe)}
    candidates, memory, errors, shares = {}, {}, {}, {}

    def prepare(name):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = makers[name]()
        for _ in range(3):  # the third call of a graph is a replay
            step()
        memory[name] = torch.cuda.max_memory_allocated() - before
        candidates[name] = lambda: [step() for _ in range(5)]

    def share(name):
        with tf32(name == "tf32"):
            shares[name] = step_in_parts(recipe, words, targets, name, repetitions)

    for name in makers:
        attempt(errors, name, lambda name=name: prepare(name))
    times = {name: time / 5 for name, time in medians(candidates, repetitions, seconds).items()}
    kernels = count_kernels(candidates["fp32"]) / 5
    for name in PRECISIONS:
        attempt(errors, f"{name}, shares", lambda name=name: share(name))
    candidates.clear()
    epochs = {}
    for name, changes in variants(recipe):
        if name in REAL_EPOCHS.get(recipe, ()):
            epochs[name] = attempt(errors, f"{name}, the loop",
                                   lambda changes=changes: measure_epoch(recipe, device, **changes))
    return {"tokens": tokens, "seconds": times, "memory": memory, "shares": shares, "kernels": kernels,
            "epochs": {name: time for name, time in epochs.items() if time},
            "floors": floors(recipe, tokens, kernels, peak), "errors": errors}


def measure_epoch(recipe, device, **changes):
    """Seconds of a real epoch over as many random words as the corpus has: the second one, whose graphs are there."""
    seed_everything(0)
    args = flags_of(recipe, **changes)
    model = our_model(recipe, args).to(device)
    optimizer = make_optimizer(args.optimizer, model, args.lr, args.wdecay)
    source = batchify(words_like_language(EPOCHS[recipe], RECIPES[recipe][0]), args.batch_size, device)
    run = Run("train", args, [], Batches(source, None, None), model, optimizer)
    run.forward_backward = choose_pass(model, args.precision, args.alpha, args.beta, args.cuda_graphs)

    def epoch():
        run.progress = Progress()
        for _ in train_batches(run):
            pass
    return [seconds(epoch) for _ in range(2)][1]


def rows(recipe, found):
    """What, result and detail of each figure of a recipe."""
    times, tokens = found["seconds"], found["tokens"]
    for name, time_ in times.items():
        yield (f"{recipe}, {name}", f"{EPOCHS[recipe] / tokens * time_:,.2f} s/epoch",
               f"{tokens / time_:,.0f} tokens/s, {times['baseline'] / time_:.2f} times the baseline, "
               f"{found['memory'][name] / 2**20:,.0f} MiB")
    for name, error in found["errors"].items():
        yield f"{recipe}, {name}", "ERROR", error
    for name, time_ in found.get("epochs", {}).items():
        goal = f", goal {GOALS[recipe]} s on an H200" if recipe in GOALS else ""
        yield f"{recipe}, {name}, the loop", f"{time_:,.2f} s/epoch", f"measured over a whole epoch{goal}"
    for name, shares in found["shares"].items():
        yield f"{recipe}, {name}", "shares", ", ".join(f"{part} {shares[part]:.0%}" for part in PARTS)
    for name, time_ in found["floors"].items():
        detail = f"{found['kernels']:,.0f} kernels a step" if name.startswith("launches") else ""
        yield f"{recipe}, floor: {name}", f"{EPOCHS[recipe] / tokens * time_:,.2f} s/epoch", detail


def table(rows):
    """Markdown."""
    cells = [("what", "result", "detail"), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def in_a_process(function, *arguments):
    """What `function` returns, called in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main():
    parser = argparse.ArgumentParser(description="Test and time the toolkit on the GPU.")
    parser.add_argument("--only", nargs="+", choices=list(EPOCHS), default=list(EPOCHS), metavar="RECIPE",
                        help=f"recipes to time: {', '.join(EPOCHS)} (default: all)")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N",
                        help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8, metavar="N",
                        help="begin no recipe that may take longer (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise BadInput("PyTorch finds no CUDA device on this machine")
    check_writable(*filter(None, [args.json]))
    start, longest, errors = time.monotonic(), 0, {}
    found = {**machine(), "gpu": torch.cuda.get_device_name(), "results": {}}
    lines, status = attempt(errors, "the tests", lambda: in_a_process(run_tests)) or ([], 1)
    found["tests"], found["peaks"] = lines, in_a_process(peaks, args.repetitions)
    for recipe in args.only:
        began = time.monotonic()
        if began + longest > start + 60 * args.minutes:
            errors[recipe] = f"not begun, {began - start:.0f} s after the start"
            continue
        print(f"measuring {recipe}, {began - start:.0f} s after the start", file=sys.stderr, flush=True)
        result = attempt(errors, recipe, lambda recipe=recipe: in_a_process(
            measure_recipe, recipe, "cuda", found["peaks"], args.repetitions))
        longest = max(longest, time.monotonic() - began)
        if result:
            found["results"][recipe] = result
            lines = [*lines, *rows(recipe, result)]
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    peak = found["peaks"]
    print(f"\n{found['gpu']}, torch {found['torch']}, commit {found['commit']}; "
          + ", ".join(f"{name} {peak[name] / 1e12:,.0f} TFLOP/s" for name in PRECISIONS)
          + f", copy {peak['copy'] / 1e12:.2f} TB/s, launch {peak['launch'] * 1e6:.1f} us, in a graph "
          f"{peak['graphed launch'] * 1e6:.1f} us; {time.monotonic() - start:.0f} s\n")
    print("\n".join(table([*lines, *((name, "ERROR", error) for name, error in errors.items())])))
    return int(status != 0 or bool(errors) or any(result["errors"] for result in found["results"].values()))


if __name__ == "__main__":
    run_script(main)
