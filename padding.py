"""Pad sizes to what a GPU multiplies fast, and copy weights there.

The fast kernels of cuBLAS and cuDNN, and the wide loads of Triton, want rows that begin at multiples of 16 bytes. Sizes
like 1150 units or 33,278 words miss them, so training on a GPU pads with zeros. The pads stay zero through an LSTM, a
GRU and a QRNN, and so do their gradients. Parameters, masks, hidden states and checkpoints have no pads.

Shapes are in the alphabet of `model.py`.
"""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

MULTIPLE = 16  # values; 16 bytes or more in every dtype


def padded_size(size):
    """Round `size` up to a multiple of MULTIPLE."""
    return -(-size // MULTIPLE) * MULTIPLE


def pad(x, size):
    """Pad the last dimension of `x` with zeros to `size`."""
    return functional.pad(x, (0, size - x.size(-1))) if x.size(-1) < size else x


def unpad(x, size):
    """Return the first `size` values of the last dimension of `x`."""
    return x[..., :size] if x.size(-1) > size else x  # a slice of everything would cost a copy in the backward pass


def gpu_dtype(x):
    """Return the dtype of products with `x`: that of autocast where it is on, else that of `x`.

    Autocast itself hands cuDNN float16, whatever dtype it was told (PyTorch 2.6 to 2.11 at least). Without a scaled
    loss, most gradients are too small for float16.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class GPULayer:
    """Mark a recurrent layer that trains on a GPU with `PaddedWeights`.

    There, its `forward` takes the mask of weight drop as its last argument. PyTorch's own pass of an LSTM or GRU moves
    the parameters into one buffer whenever one of them was replaced. Weight drop replaces one in every pass. With
    copies no parameter moves. A CUDA graph needs that, since it goes on using the old addresses.
    """

    def pads(self, x):
        """Return whether the layer runs over `x` with padded copies of its weights."""
        return x.is_cuda and self.training


class PaddedWeights(torch.autograd.Function):
    """Copy the weights of a layer into one buffer, each masked, cast and padded on the way.

    Takes:

    - The number of `gates` whose weights lie one below the other.
    - The dtype of the copies.
    - `mask`, factors of the weight number `masked`, or None.
    - The weights (gates x H, E) and biases (gates x H), in the order in which cuDNN wants them.

    Returns copies, with each gate padded in both directions, one behind the other in memory.
    """

    @staticmethod
    def forward(ctx, gates, dtype, masked, mask, *weights):
        shapes = [(gates * padded_size(len(w) // gates), *map(padded_size, w.shape[1:])) for w in weights]
        sizes = list(map(math.prod, shapes))
        is_padded = sum(sizes) > sum(w.numel() for w in weights)
        allocate = weights[0].new_zeros if is_padded else weights[0].new_empty
        buffer = allocate(sum(sizes), dtype=dtype)
        copies = [part.view(shape) for part, shape in zip(buffer.split(sizes), shapes)]
        for index, (copy, weight) in enumerate(zip(copies, weights)):
            source, target = weight.unflatten(0, (gates, -1)), inner(copy, weight.shape, gates)
            if index == masked and mask is not None:
                torch.mul(source, mask.view_as(source), out=target)
            else:
                target.copy_(source)
        ctx.save_for_backward(mask)
        ctx.layout = gates, masked, [(weight.shape, weight.dtype) for weight in weights]
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (mask,), (gates, masked, weights) = ctx.saved_tensors, ctx.layout
        grad_weights = []
        for index, (grad, (shape, dtype)) in enumerate(zip(grads, weights)):
            part = inner(grad, shape, gates)
            if index == masked and mask is not None:
                part = part * mask.view_as(part)
            grad_weights.append(part.to(dtype).reshape(shape))
        return None, None, None, None, *grad_weights


def inner(padded, shape, gates):
    """Return the part of a `padded` weight that has values, (gates, H, E) or (gates, H), for a weight of `shape`."""
    part = padded.unflatten(0, (gates, -1))[:, :shape[0] // gates]
    return part[..., :shape[1]] if len(shape) == 2 else part
