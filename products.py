"""Matrix products on the CPU: which library computes them, and in bfloat16 in which layout they are fast.

oneDNN's products in bfloat16 depend on how the factors lie in memory. The gains below are of 1400 words through 4650 x
1550 weights on 2 cores of an Intel Xeon with AMX; on an AMD EPYC, without a matrix unit, they are none.

Shapes are in the alphabet of `model.py`.
"""

import platform
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
    """Whether this machine's CPU has instructions for products of bfloat16, without which they are slower than fp32,
    and oneDNN, which may be told to do without (ONEDNN_MAX_CPU_ISA), uses them."""
    if torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
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
    """A copy of `matrix` in the type `kind`, in bfloat16 each row at the beginning of a cache line: x @ weight.t() then
    takes 11 ms for 18."""
    return padded(matrix.new_empty, *matrix.shape, kind).copy_(matrix)


def padded(new_empty, rows, width, kind):
    """A matrix of uninitialised rows that in bfloat16 begin cache lines. Zeros lie between them: oneDNN multiplies what
    it finds there by zeros, so that NaN would come through."""
    line = LINE if kind == torch.bfloat16 else 1
    memory = new_empty(rows, -(-width // line) * line, dtype=kind)
    memory[:, width:] = 0
    return memory[:, :width]


def transposed(matrix):
    """A copy of the transpose of `matrix`, `padded`: 2 ms, where `matrix.t().contiguous()`
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


def packs_fp32():
    """Whether `Packed` packs in fp32: with MKL on a processor of Intel. On an AMD EPYC, with
    weights packed by oneDNN, the LSTM's pass takes 514 ms for the 482 of PyTorch's."""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and "GenuineIntel" in cpuinfo()


def packs_bf16():
    """Whether `Packed` packs in bfloat16: with oneDNN on an x86 processor with instructions for it."""
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64") and has_bf16()


class Packed:
    """x @ weight.t() for many x, one after the other, of `rows` rows each; others come out right, but slower.

    Holds a copy of `weight` in the order in which MKL (fp32) or oneDNN (bfloat16) reads it; both otherwise bring it
    into that order at every product. Then 20 rows through 4600 x 1150 take 0.78 ms for 1.24 in fp32 and 0.29 for 0.50
    in bfloat16. Packing that weight takes 1 to 8 ms. PyTorch's own compiler packs by these functions; there are no
    public ones. Where they are not for this machine or type it is the plain product.
    """

    def __init__(self, weight, rows=1):
        self.weight, self.rows, self.mkl, self.onednn = weight.detach(), rows, None, None
        if weight.dtype == torch.float32 and packs_fp32():
            self.mkl = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
        elif weight.dtype == torch.bfloat16 and packs_bf16():
            self.onednn, self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows), None

    def __call__(self, x):
        if self.mkl is not None:
            return torch.ops.mkl._mkl_linear(x, self.mkl, self.weight, None, self.rows)
        if self.onednn is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.onednn, None, "none", [], None)
        return x @ self.weight.t()

    def plus(self, term, x):
        """`term` plus the product; in bfloat16 both at once, for 0.01 ms more than the product."""
        if self.onednn is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, term, self.onednn, None, "add")
        return self(x).add_(term)


class PackedLinear:
    """`functional.linear` without gradient by copies of `weight`, `Packed` in bfloat16, and `bias`, as they are now.

    One word through the 24 million weights of the PTB LSTM takes 1.2 ms, where it takes 2.1 in bfloat16 in the usual
    order and 2.3 in fp32. The copies take half the memory of the weights.
    """

    def __init__(self, weight, bias):
        self.product, self.bias = Packed(weight.detach().bfloat16()), bias.detach().clone()

    def __call__(self, x):
        return self.product(x.bfloat16()).to(x.dtype).add_(self.bias)


def linear(x, weight, bias):
    """`functional.linear` for x (T, B, E), weight (H, E), bias (H)."""
    return (Linear.apply if trains_in_bfloat16(x) else functional.linear)(x, weight, bias)
