"""Matrix products on the CPU: which library computes them, and in bfloat16 in which layout they are fast.

The speed of oneDNN's products in bfloat16 depends on how the factors lie in memory. The gains named below are those of
a CPU with a matrix unit (Intel's AMX). Without one the layouts gain nothing.

Shapes are in the alphabet of `model.py`.
"""

import platform

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from device import cpuinfo, has_bf16

LINE = 32  # values of bfloat16 in a cache line
BAND = 128  # rows that are transposed at a time


def trains_in_bfloat16(x):
    """Return whether products of `x` belong to training in bfloat16 on a CPU, for which the layouts below are."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def for_products(*tensors):
    """Return the tensors in the dtype in which `torch.autocast` wants matrix products on the CPU.

    Matrices get `aligned` rows. Where autocast is off, the tensors are returned as they are.
    """
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(aligned(tensor, dtype) if tensor.dim() == 2 else tensor.to(dtype) for tensor in tensors)


def aligned(matrix, dtype):
    """Copy `matrix` to `dtype`, in bfloat16 with each row at the beginning of a cache line.

    x @ weight.t() is then more than one and a half times as fast.
    """
    return padded(matrix.new_empty, *matrix.shape, dtype).copy_(matrix)


def padded(new_empty, rows, width, dtype):
    """Make a matrix (rows, width) without values, whose rows in bfloat16 begin cache lines.

    Zeros lie between the rows. oneDNN multiplies by zeros what it finds there, so a NaN would come through.
    """
    line = LINE if dtype == torch.bfloat16 else 1
    memory = new_empty(rows, -(-width // line) * line, dtype=dtype)
    memory[:, width:] = 0
    return memory[:, :width]


def transposed(matrix):
    """Copy the transpose of `matrix`, `padded`, about seven times as fast as `matrix.t().contiguous()`.

    grad.t() @ x, whose left factor oneDNN would transpose, is nearly twice as fast with it, the copy included.
    """
    result = padded(matrix.new_empty, *matrix.shape[::-1], matrix.dtype)
    for source, target in zip(matrix.split(BAND), result.split(BAND, 1)):
        target.copy_(source.t())
    return result


class Linear(torch.autograd.Function):
    """Compute x @ weight.t() + bias for x (T, B, E), weight (H, E), bias (H), in the dtype that autocast says."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        rows, factor, term = for_products(x.flatten(0, 1), weight, bias)
        ctx.save_for_backward(rows, factor)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        return torch.addmm(term, rows, factor.t()).unflatten(0, x.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, factor = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        grad = grad.flatten(0, 1)
        return ((grad @ factor).view(ctx.shape).to(x_dtype), (transposed(grad) @ rows).to(weight_dtype),
                grad.sum(0).to(weight_dtype))


def packs_fp32():
    """Return whether `Packed` packs in fp32: with MKL, on a processor of Intel.

    On one of AMD the LSTM's pass with weights packed by oneDNN is slower than PyTorch's.
    """
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and "GenuineIntel" in cpuinfo()


def packs_bf16():
    """Return whether `Packed` packs in bfloat16: with oneDNN, on an x86 processor with instructions for it."""
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64") and has_bf16()


class Packed:
    """Compute x @ weight.t() for many x of `rows` rows, one after the other; other x come out right, but slower.

    Holds a copy of `weight` in the order in which MKL (fp32) or oneDNN (bfloat16) reads it. Otherwise both bring it
    into that order at every product, and a product of few rows takes about 1.6 times as long. Packing itself takes as
    long as several products. PyTorch's own compiler packs by these functions; there are no public ones. Where they do
    not fit the machine or the dtype, this is the plain product.
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
        """Compute `term` plus the product; in bfloat16 both at once, at hardly any cost."""
        if self.onednn is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, term, self.onednn, None, "add")
        return self(x).add_(term)


class PackedLinear:
    """Compute `functional.linear` without gradient, by copies of `weight` (`Packed` in bfloat16) and `bias`.

    About twice as fast on a CPU for a single token, compared with fp32 and with bfloat16 in the usual order. The copies
    are of the values as they are now, and take half the memory of the weights.
    """

    def __init__(self, weight, bias):
        self.product, self.bias = Packed(weight.detach().bfloat16()), bias.detach().clone()

    def __call__(self, x):
        return self.product(x.bfloat16()).to(x.dtype).add_(self.bias)


def linear(x, weight, bias):
    """Compute `functional.linear` for x (T, B, E), weight (H, E), bias (H), in training in bfloat16 by `Linear`."""
    return (Linear.apply if trains_in_bfloat16(x) else functional.linear)(x, weight, bias)
