"""Measure the parts of `gpu_check.py`, each in a process of its own.

A part returns plain values, with its errors among them: an error costs its own figure, not the others.
"""

import sys
import traceback
from collections import defaultdict
from multiprocessing import get_context
from pathlib import Path

import numpy
import pytest
import torch
from speed import (
    NO_REGULARISATION,
    RECIPES,
    flags_of,
    our_model,
    our_step,
    plain_step,
    step_in_parts,
)
from timing import medians, seconds
from torch.profiler import ProfilerActivity, profile

from device import allow_tf32, tf32
from model import RNNModel
from optimizers import make_optimizer
from run import Batches, Progress, Run
from splitcross import splits_for
from steps import choose_pass, seed_everything
from training import train_batches
from utils import batchify

TESTS = Path(__file__).parent.parent / "tests"
# Tokens of the training text of each recipe, so of an epoch.
CORPUS_TOKENS = {"ptb-lstm": 929_589, "ptb-qrnn": 929_589, "wt2-lstm": 2_088_628, "wt103-qrnn": 103_227_021}
REAL_EPOCHS = dict.fromkeys(("ptb-lstm", "ptb-qrnn"), ("fp32", "fp32, graphs", "tf32, graphs", "bf16, graphs"))
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
GRACE = 10  # seconds that a process has to end after its answer


# --- a process of its own --------------------------------------------------------------------------------------------

class Failed(Exception):
    """Report what went wrong in another process, in one line."""


def describe(error):
    """Describe an error in one line, with the innermost one that it came from."""
    innermost = error
    while innermost.__cause__ or innermost.__context__:
        innermost = innermost.__cause__ or innermost.__context__
    shown = [f"{type(one).__name__}: {one}".splitlines()[0] for one in (error, innermost)]
    return shown[0] if innermost is error else f"{shown[0]} (after {shown[1]})"


def answer(sending, function, arguments):
    """Send what `function` returns, or what went wrong."""
    try:
        result = True, function(*arguments)
    except Exception as error:  # any one: its line is the answer
        traceback.print_exc()
        result = False, describe(error)
    sending.send(result)


def in_a_process(limit, function, *arguments):
    """Call `function` in a process of its own and return what it returns.

    Raises Failed when it raises, dies, or takes more than `limit` seconds. It is killed then.
    """
    receiving, sending = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=answer, args=(sending, function, arguments), daemon=True)
    process.start()
    sending.close()
    try:
        if not receiving.poll(limit):
            raise Failed(f"killed after {limit:.0f} s")
        good, value = receiving.recv()
    except EOFError as error:
        process.join(GRACE)
        raise Failed(f"the process died with exit status {process.exitcode}") from error
    finally:
        process.join(GRACE if sys.exc_info()[0] is None else 0)
        process.kill()
        process.join()
    if not good:
        raise Failed(value)
    return value


def attempt(errors, name, function):
    """Return what `function` returns, or None; its error is noted under `name`."""
    try:
        return function()
    except Exception as error:  # any one: the others are still worth their time
        if not isinstance(error, Failed):
            traceback.print_exc()
        errors[name] = str(error) if isinstance(error, Failed) else describe(error)
        return None


# --- the tests -------------------------------------------------------------------------------------------------------

class Outcomes:
    """Count, as a plugin of pytest, how many tests passed, failed and skipped under each name in a `cuda` mark."""

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
        """Yield what, result and detail of each name."""
        for name, count in self.counts.items():
            result = "passed" if count["passed"] else "skipped"
            if count["failed"]:
                result = "FAILED"
            detail = ", ".join(f"{number} {outcome}" for outcome, number in count.items() if number)
            yield name, result, f"{detail}; {self.seconds[name]:.1f} s"


def run_tests(*arguments):
    """Run the tests with a `cuda` mark; returns the rows of their Outcomes and the exit status of pytest."""
    outcomes = Outcomes()
    status = pytest.main(["-m", "cuda", "--rootdir", str(TESTS.parent), "-c", str(TESTS.parent / "pyproject.toml"),
                          *arguments], plugins=[outcomes])
    return list(outcomes.rows()), int(status)


# --- what the hardware allows ----------------------------------------------------------------------------------------

def products(name, repetitions):
    """Measure FLOP/s of a large product in a precision."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(PRECISIONS[name]) for _ in range(2))
    with tf32(name == "tf32"):
        return 4 * 2 * 8192**3 / medians({name: lambda: [a @ b for _ in range(4)]}, repetitions)[name]


def copies(repetitions):
    """Measure bytes/s of a large copy, read and written."""
    large = torch.empty(2**28, device="cuda")
    target = torch.empty_like(large)
    return 2 * large.nbytes / medians({"copy": lambda: target.copy_(large)}, repetitions)["copy"]


def launches(repetitions, graphed):
    """Measure the seconds to launch a kernel from Python, or in a graph."""
    tiny, count = torch.zeros(1, device="cuda"), 2000

    def launch():
        for _ in range(count):
            tiny.add_(1)
    launch()
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
    return medians({"": graph.replay if graphed else launch}, repetitions)[""] / count


def peaks(repetitions):
    """Measure what the hardware can do; returns the figures by name and the errors."""
    errors = {}
    peak = {name: attempt(errors, name, lambda name=name: products(name, repetitions)) for name in PRECISIONS}
    peak["copy"] = attempt(errors, "copy", lambda: copies(repetitions))
    peak["launch"] = attempt(errors, "launch", lambda: launches(repetitions, graphed=False))
    peak["graphed launch"] = attempt(errors, "graphed launch", lambda: launches(repetitions, graphed=True))
    return {name: value for name, value in peak.items() if value}, errors


def floors(recipe, tokens, kernels, peak):
    """Compute the least seconds that a step takes for its arithmetic, for the traffic of weights and for launches.

    Each is left out if the peak, or the number of kernels, could not be measured.
    """
    args = flags_of(recipe)
    with torch.device("meta"):
        model = RNNModel(RECIPES[recipe][0], model=args.model, emsize=args.emsize, nhid=args.nhid, nlayers=args.nlayers)
    multiplied = sum(p.numel() for p in model.rnns.parameters()) + args.emsize * model.softmax.sizes[0]
    floor = {f"arithmetic {name}": 6 * multiplied * tokens / peak[name] for name in PRECISIONS if name in peak}
    if "copy" in peak:
        # Read forward, backward and to be updated, written once; gradients written once, read for norm and update.
        floor["traffic of weights"] = 7 * 4 * model.parameter_count() / peak["copy"]
    for name, each in (("launches from Python", "launch"), ("launches in a graph", "graphed launch")):
        if kernels and each in peak:
            floor[name] = kernels * peak[each]
    return floor


def count_kernels(step):
    """Count the kernels that a call of `step` launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
    return sum(event.count for event in recorded.key_averages() if str(event.device_type).endswith("CUDA"))


# --- the benchmark ---------------------------------------------------------------------------------------------------

def words_like_language(shape, ntoken):
    return torch.from_numpy(numpy.random.default_rng(0).zipf(1.2, shape) % ntoken)


def variants(recipe):
    """Return the ways to train that are compared, each with the flags that it changes."""
    ways = {"no regularisation": NO_REGULARISATION}
    for graphs in (False, True):
        for precision in PRECISIONS:
            if not (graphs and splits_for(RECIPES[recipe][0])):
                name = f"{precision}, graphs" if graphs else precision
                ways[name] = {"precision": precision, "cuda_graphs": graphs}
    return ways


def with_default_tf32(step):
    """Return the step with TF32 as PyTorch comes: allowed in cuDNN, not in matrix products."""
    def call():
        allow_tf32(False)
        torch.backends.cudnn.allow_tf32 = True
        step()
    return call


def measure_variant(recipe, name, device, repetitions):
    """Measure one way to train a recipe, in turns with the baseline.

    Returns a dict. "tokens", "kernels" and "shares" (of its parts) are those of a step, "seconds" and "baseline" the
    times of one. "memory" is in bytes, "epoch" in seconds. "errors" are by what they kept from being measured.
    """
    seed_everything(0)
    args, changes, errors = flags_of(recipe), variants(recipe)[name], {}
    text = words_like_language((args.bptt + 1, args.batch_size), RECIPES[recipe][0]).to(device)
    words, targets = text[:-1], text[1:]
    found, steps = {"tokens": args.bptt * args.batch_size, "errors": errors}, {}

    def prepare(which, make):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = make()
        for _ in range(3):  # the third call of a graph is a replay
            step()
        steps[which] = lambda: [step() for _ in range(5)]
        return torch.cuda.max_memory_allocated() - before

    found["memory"] = attempt(errors, name, lambda: prepare("seconds", lambda: our_step(
        recipe, words, targets, **changes)))
    attempt(errors, "baseline", lambda: prepare("baseline", lambda: with_default_tf32(
        plain_step(recipe, words, targets))))
    times = attempt(errors, f"{name}, timing", lambda: medians(steps, repetitions, seconds)) if steps else None
    found |= {which: time / 5 for which, time in (times or {}).items()}
    if "seconds" in steps:
        found["kernels"] = attempt(errors, f"{name}, kernels", lambda: count_kernels(steps["seconds"]) / 5)
    steps.clear()
    if name in PRECISIONS:
        with tf32(name == "tf32"):
            found["shares"] = attempt(errors, f"{name}, shares", lambda: step_in_parts(
                recipe, words, targets, name, repetitions))
    if name in REAL_EPOCHS.get(recipe, ()):
        found["epoch"] = attempt(errors, f"{name}, the loop", lambda: measure_epoch(recipe, device, **changes))
    return {what: value for what, value in found.items() if value is not None}


def measure_epoch(recipe, device, **changes):
    """Measure the seconds of a real epoch over as many random words as the corpus has.

    It is the second epoch, which finds its graphs captured.
    """
    seed_everything(0)
    args = flags_of(recipe, **changes)
    model = our_model(recipe, args).to(device)
    optimizer = make_optimizer(args.optimizer, model, args.lr, args.wdecay)
    source = batchify(words_like_language(CORPUS_TOKENS[recipe], RECIPES[recipe][0]), args.batch_size, device)
    run = Run("train", args, [], Batches(source, None, None), model, optimizer)
    run.forward_backward = choose_pass(model, args.precision, args.alpha, args.beta, args.cuda_graphs)

    def epoch():
        run.progress = Progress()
        for _ in train_batches(run):
            pass
    return [seconds(epoch) for _ in range(2)][1]
