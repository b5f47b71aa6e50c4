"""Find out what the machine can do, and set a process up to use it."""

import ctypes
import sys
from contextlib import contextmanager
from functools import cache

import torch

from errors import BadInput

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 32 * 2**20  # bytes of a block, the most that glibc takes for that threshold


def set_up_device(cuda, cuda_graphs=False):
    """Return the device that `--cuda` or `--no-cuda` asks for, and set the process up for it.

    - On a CPU, products are computed as `use_onednn` says, and memory is kept.
    - On a GPU, fp32 is fp32 and nothing less.

    Raises BadInput when there is no such device, or it cannot run `--cuda-graphs`.
    """
    if cuda and not torch.cuda.is_available():
        raise BadInput("--cuda: PyTorch finds no CUDA device on this machine")
    if cuda_graphs and not cuda:
        raise BadInput("--cuda-graphs: there are none on a CPU")
    if cuda:
        allow_tf32(False)
    else:
        use_onednn()
        keep_memory()
    return torch.device("cuda" if cuda else "cpu")


# --- what it can do --------------------------------------------------------------------------------------------------

@cache
def cpuinfo():
    """Return the text of Linux's /proc/cpuinfo; "" on other systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def has_bf16():
    """Return whether the CPU has instructions for products in bfloat16.

    Without them bfloat16 is slower than fp32. The setting ONEDNN_MAX_CPU_ISA may forbid them to oneDNN.
    """
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return any(present is True for name, present in torch.cpu.get_capabilities().items() if "bf16" in name)
    return "bf16" in cpuinfo()


def computes_in(precision, device):
    """Return whether `device` has instructions for products in `--precision`."""
    if device.type == "cuda":
        return precision == "fp32" or torch.cuda.get_device_capability(device) >= (8, 0)
    return precision == "fp32" or (precision == "bf16" and has_bf16())


def peak_memory(device="cpu"):
    """Return the peak memory in bytes: of tensors on a GPU, of this process on a CPU.

    Returns None where the system does not say.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # first: on Linux getrusage counts what the parent had before it started this process
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        from resource import RUSAGE_SELF, getrusage  # Windows has none
    except ImportError:
        return None
    peak = getrusage(RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- how it is set ---------------------------------------------------------------------------------------------------

def use_onednn():
    """Let oneDNN compute the fp32 matrix products on the CPU, where that pays and is exact.

    By default PyTorch uses MKL, which runs at half speed on AMD processors. The one public way to oneDNN is the
    precision "medium". It allows bfloat16 but does not demand it.
    """
    if "AuthenticAMD" in cpuinfo():
        torch.set_float32_matmul_precision("medium" if medium_is_exact() else "highest")


@cache
def medium_is_exact():
    """Return whether the precision "medium" gives exact fp32 products, narrow and wide.

    The precision setting stays as it was.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 1152, generator=generator) for rows in (20, 512))
    errors = []
    for left, right in ((a, b.t()), (b.t(), b)):
        exact = left.double() @ right.double()
        errors.append((left @ right - exact).norm() / exact.norm())
    torch.set_float32_matmul_precision(before)
    return max(errors).item() <= 1e-5


def keep_memory(freed=-1):
    """Let glibc keep `freed` bytes of freed memory (-1: all) for the next training step.

    Other C libraries are left alone. By default glibc returns most of the memory to the system after each step, then
    takes it back a page at a time, filled with zeros. That costs about a tenth of the step.

    Blocks of more than LARGEST_KEPT bytes still go back. Their sizes change with the length of the batch. Kept blocks
    would leave gaps in the heap, and it would grow.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(M_TRIM_THRESHOLD, freed)


def allow_tf32(on):
    """Set whether a GPU may compute products of fp32 tensors in TF32.

    TF32 has 10 bits of mantissa instead of 23. By default PyTorch allows it in cuDNN, so in recurrent layers, but not
    in matrix products.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


@contextmanager
def tf32(on):
    """Allow a GPU products of fp32 tensors in TF32 inside `with tf32(on)`, or forbid them if `on` is false.

    After the block TF32 is off.
    """
    allow_tf32(on)
    try:
        yield
    finally:
        allow_tf32(False)
