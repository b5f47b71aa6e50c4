"""Matrix products on the CPU: which library computes them, and in bfloat16 in which layout they are fast.

oneDNN's products in bfloat16 depend on how the factors lie in memory. The gains below are of 1400 words through 4650 x
1550 weights on 2 cores of an Intel Xeon with AMX; on other processors they are not measured.

Shapes are in the alphabet of `model.py`.
"""

from functools import cache

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

LINE = 32  # values of bfloat16 in a cache line
BAND = 128  # rows that are transposed at a time


def use_onednn():
    """Let oneDNN compute the matrix products of fp32 tensors on the CPU, where that pays and is exact.

    PyTorch leaves them to MKL, which runs at half speed on a processor of AMD (175 GFLOP/s for oneDNN's 390 on 2 cores
    of an EPYC). The one public way to oneDNN is the precision "medium", which allows bfloat16 but does not demand it.
    """
    if "AuthenticAMD" in cpuinfo():
        torch.set_float32_matmul_precision("medium" if medium_is_exact() else "highest")


@cache
def medium_is_exact():
    """Whether fp32 products come out as exact as they can in the precision "medium", narrow and wide."""
    torch.set_float32_matmul_precision("medium")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 1152, generator=generator) for rows in (20, 512))
    for left, right in ((a, b.t()), (b.t(), b)):
        exact = left.double() @ right.double()
        if (left @ right - exact).norm() > 1e-5 * exact.norm():
            return False
    return True


def has_bf16():
    """Whether this machine's CPU has instructions for products of bfloat16, without which they are slower than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):
        return any(present is True for name, present in torch.cpu.get_capabilities().items() if "bf16" in name)
    return "bf16" in cpuinfo()


@cache
def cpuinfo():
    """What Linux says of the processor, or nothing."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def trains_in_bfloat16(x):
    """Whether products of `x` belong to training in bfloat16 on a CPU, for which the layouts below are."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def for_products(*tensors):
    """The tensors in the type in which `torch.autocast` wants matrix products on the CPU, where it is on; matrices then
    with `aligned` rows."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    kind = torch.get_autocast_dtype("cpu")
    return tuple(aligned(tensor, kind) if tensor.dim() == 2 else tensor.to(kind) for tensor in tensors)


def aligned(matrix, kind):
    """A copy of `matrix` in the type `kind`, each row at the beginning of a cache line: x @ weight.t() then takes 11 ms
    for 18."""
    return padded(matrix.new_empty, *matrix.shape, kind).copy_(matrix)


def padded(new_empty, rows, width, kind):
    """A matrix of uninitialised rows that begin cache lines. Zeros lie between them: oneDNN multiplies what it finds
    there by zeros, so that NaN would come through."""
    memory = new_empty(rows, -(-width // LINE) * LINE, dtype=kind)
    memory[:, width:] = 0
    return memory[:, :width]


def transposed(matrix):
    """A copy of the transpose of `matrix`, with rows that begin cache lines: 2 ms, where `matrix.t().contiguous()`
    takes 15. With it grad.t() @ x, whose left factor oneDNN would transpose, takes 12 ms for 21 (copy included)."""
    result = padded(matrix.new_empty, *matrix.shape[::-1], matrix.dtype)
    for source, target in zip(matrix.split(BAND), result.split(BAND, 1)):
        target.copy_(source.t())
    return result


class Linear(torch.autograd.Function):
    """x @ weight.t() + bias for x (T, B, E), weight (H, E), bias (H), products in the type that autocast says."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        rows, factor, term = for_products(x.flatten(0, 1), weight, bias)
        ctx.save_for_backward(rows, factor)
        ctx.shape, ctx.types = x.shape, (x.dtype, weight.dtype)
        return torch.addmm(term, rows, factor.t()).unflatten(0, x.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, factor = ctx.saved_tensors
        x_type, weight_type = ctx.types
        grad = grad.flatten(0, 1)
        return ((grad @ factor).view(ctx.shape).to(x_type), (transposed(grad) @ rows).to(weight_type),
                grad.sum(0).to(weight_type))


def packs():
    """Whether `Packed` pays on this machine: PyTorch has oneDNN, and the CPU instructions for bfloat16."""
    return has_bf16() and torch.backends.mkldnn.is_available()


class Packed:
    """`functional.linear`, without gradient, with copies of `weight` (H, E), in bfloat16, and `bias` (H).

    The weight is in the order in which oneDNN reads it, which PyTorch offers by private functions only: one word
    through the 24 million weights of the PTB LSTM takes 1.2 ms, where it takes 2.1 in the usual order and 2.3 in fp32.
    """

    def __init__(self, weight, bias):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), None)
        self.bias = bias.detach().clone()

    def __call__(self, x):
        product = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, None, "none", [], None)
        return product.to(x.dtype).add_(self.bias)


def linear(x, weight, bias):
    """`functional.linear` for x (T, B, E), weight (H, E), bias (H)."""
    return (Linear.apply if trains_in_bfloat16(x) else functional.linear)(x, weight, bias)
