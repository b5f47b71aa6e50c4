"""Compute matrix products on the CPU with the fastest library and layout.

In bfloat16 the speed of oneDNN's products depends on how the factors lie in memory. The gains named below hold for a
CPU with a matrix unit (Intel's AMX). Without one the layouts gain nothing.

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
    """Return whether products of `x` belong to training in bfloat16 on a CPU.

    The layouts below are for that case.
    """
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def for_products(*tensors):
    """Return the tensors in the dtype that `torch.autocast` wants for matrix products on the CPU.

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
    return padded(matrix, *matrix.shape, dtype).copy_(matrix)


def padded(like, rows, width, dtype):
    """Make a matrix (rows, width) on the device of `like`, without values, whose rows in bfloat16 begin cache lines.

    Zeros lie between the rows. oneDNN multiplies by zeros what it finds there, so a NaN would come through.
    """
    line = LINE if dtype == torch.bfloat16 else 1
    memory = like.new_empty(rows, -(-width // line) * line, dtype=dtype)
    memory[:, width:] = 0
    return memory[:, :width]


def transposed(matrix):
    """Copy the transpose of `matrix` to a `padded` matrix.

    The copy is several times as fast as `matrix.t().contiguous()`. It is for products like grad.t() @ x, whose left
    factor oneDNN would transpose: they are nearly twice as fast, the copy included.
    """
    result = padded(matrix, *matrix.shape[::-1], matrix.dtype)
    for source, target in zip(matrix.split(BAND), result.split(BAND, 1)):
        target.copy_(source.t())
    return result


class Linear(torch.autograd.Function):
    """Compute x @ weight.t() + bias for x (T, B, E), weight (H, E), bias (H).

    The dtype is the one that autocast says.
    """

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
    """Return whether `Packed` packs in fp32: with MKL, on an Intel processor.

    On an AMD processor packing makes the LSTM's pass slower than PyTorch's.
    """
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and "GenuineIntel" in cpuinfo()


def packs_bf16():
    """Return whether `Packed` packs in bfloat16: with oneDNN, on an x86 processor with instructions for it."""
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64") and has_bf16()


class Packed:
    """Compute x @ weight.t() for many x of `rows` rows, one after the other.

    Other x come out right, but slower. Holds a copy of `weight` in the order in which MKL (fp32) or oneDNN (bfloat16)
    reads it. Without it both reorder the weight at every product. A product of few rows then takes more than one and a
    half times as long. Packing takes as long as several products.

    PyTorch's own compiler packs by these functions. There are no public ones. Where packing does not fit the machine or
    the dtype, the plain product is computed.
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
        """Compute `term` plus the product.

        In bfloat16 both are done at once, at hardly any cost.
        """
        if self.onednn is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, term, self.onednn, None, "add")
        return self(x).add_(term)


class PackedLinear:
    """Compute `functional.linear` without gradient, by packed bfloat16 copies of `weight` and `bias`.

    On a CPU it is about twice as fast for a single token as fp32, and as bfloat16 in the usual order. The copies have
    the values as they are now. They take half the memory of the weights.
    """

    def __init__(self, weight, bias):
        self.product, self.bias = Packed(weight.detach().bfloat16()), bias.detach().clone()

    def __call__(self, x):
        return self.product(x.bfloat16()).to(x.dtype).add_(self.bias)


def linear(x, weight, bias):
    """Compute `functional.linear` for x (T, B, E), weight (H, E), bias (H).

    Training in bfloat16 uses `Linear`.
    """
    if trains_in_bfloat16(x):
        return Linear.apply(x, weight, bias)
    return functional.linear(x, weight, bias)
