"""Time candidates in turns on this machine, and say what machine it is."""

import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
from device import LARGEST_KEPT, cpuinfo, has_bf16, keep_memory, use_onednn
from metrics import git_commit
from products import aligned

GLIBC_KEEPS = 2 * LARGEST_KEPT  # bytes freed: the most that glibc comes to by itself


def clock():
    """Return the seconds of a clock, read when all that was given to a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function):
    start = clock()
    function()
    return clock() - start


def warm_seconds(function):
    """Time the second of two calls, in seconds: the first finds the memory as another candidate left it."""
    function()
    return seconds(function)


def medians(candidates, repetitions, timed=warm_seconds):
    """Time each of `candidates` (name: function): median seconds over turns, after one to warm up."""
    for function in candidates.values():
        function()
    turns = [{name: timed(function) for name, function in candidates.items()} for _ in range(repetitions)]
    return {name: statistics.median(turn[name] for turn in turns) for name in candidates}


def as_shipped(function):
    """Return the function with products and memory as the toolkit sets them up."""
    def call():
        use_onednn()
        keep_memory()
        return function()
    return call


def as_pytorch(function):
    """Return the function with PyTorch as it comes."""
    def call():
        torch.set_float32_matmul_precision("highest")
        keep_memory(GLIBC_KEEPS)
        return function()
    return call


def peaks(repetitions):
    """Measure FLOP/s of the LSTM's product, 1400 words through 4 x 1150 gates, 20 times, by precision.

    That is fp32, and bf16 where the CPU has instructions for it. Without them it is far slower than fp32.
    """
    words, weight = torch.randn(1400, 1150), torch.randn(4600, 1150)
    factors = {"fp32": [(words, weight)]}
    if has_bf16():
        factors["bf16"] = [(words.bfloat16(), weight.bfloat16()),
                           (aligned(words, torch.bfloat16), aligned(weight, torch.bfloat16))]
    candidates = {(precision, layout, setting): setting(lambda x=x, y=y: [x @ y.t() for _ in range(20)])
                  for precision, layouts in factors.items() for layout, (x, y) in enumerate(layouts)
                  for setting in (as_shipped, as_pytorch)}
    times = medians(candidates, repetitions)
    fastest = {precision: min(time for (measured, *_), time in times.items() if measured == precision)
               for precision in factors}
    return {precision: 20 * 2 * 1400 * 1150 * 4600 / time for precision, time in fastest.items()}


def multiply_adds(model):
    """Count the multiply-adds of a token, forward: the values of the matrices of `model`, a shared one once."""
    return sum(p.numel() for p in model.parameters() if p.dim() == 2)


def machine():
    """Describe the machine and the commit, as plain values by name."""
    model = next((line.split(":")[1].strip() for line in cpuinfo().splitlines() if line.startswith("model name")),
                 platform.processor())
    return {"cpu": model, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": git_commit(7)}
