"""Time candidates in turns on this machine, and say what machine it is."""

import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
from device import LARGEST_KEPT, cpuinfo, keep_memory, use_onednn
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
    """Measure FLOP/s of the LSTM's product, 1400 words through 4 x 1150 gates, 20 times, in fp32 and in bf16."""
    candidates = {}
    for precision in (torch.float32, torch.bfloat16):
        plain = torch.randn(1400, 1150).to(precision), torch.randn(4600, 1150).to(precision)
        layouts = {"plain": plain}
        if precision == torch.bfloat16:
            layouts["aligned"] = [aligned(part, precision) for part in plain]
        for layout, (words, weight) in layouts.items():
            for setting in (as_shipped, as_pytorch):
                candidates[precision, layout, setting] = setting(
                    lambda words=words, weight=weight: [words @ weight.t() for _ in range(20)])
    times, peak = medians(candidates, repetitions), {}
    for name, precision in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        fastest = min(time for (dtype, *_), time in times.items() if dtype == precision)
        peak[name] = 20 * 2 * 1400 * 1150 * 4600 / fastest
    return peak


def multiply_adds(model):
    """Count the multiply-adds of a token, forward: the values of the matrices of `model`, a shared one once."""
    return sum(p.numel() for p in model.parameters() if p.dim() == 2)


def machine():
    """Describe the machine and the commit, as plain values by name."""
    model = next((line.split(":")[1].strip() for line in cpuinfo().splitlines() if line.startswith("model name")),
                 platform.processor())
    return {"cpu": model, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": git_commit(7)}
