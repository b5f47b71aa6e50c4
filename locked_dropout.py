"""Apply locked dropout, and draw every random mask of the project in one function.

Paper: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182), section 4.2. It
uses variational dropout after Gal and Ghahramani (2016). Shapes are in the alphabet of `model.py`.
"""

import numpy
import torch

MIN_MASK_VALUES = 2**16  # on the CPU, `fill_from_bits` draws masks of so many values or more

# Of a batch that processes share: how many columns it has, and the slice of this process (`distributed.py`).
columns = None


def dropout_mask(like, shape, p):
    """Draw a mask of `shape`: 0 with probability `p`, else 1/(1 - p).

    It has the device and dtype of `like`.
    """
    return fill_mask(like.new_empty(shape), p)


def column_mask(like, shape, p):
    """Draw a mask as `dropout_mask` does, one for each batch column: `shape` is (1 or T, B, H).

    Where processes share a batch, each draws the mask of all columns and takes its own part.
    """
    if columns is None:
        return dropout_mask(like, shape, p)
    count, mine = columns
    return dropout_mask(like, (shape[0], count, *shape[2:]), p)[:, mine]


def fill_mask(mask, p):
    """Fill `mask` with fresh values and return it.

    This is the one source of random masks, so another can replace it. Small masks draw as `Tensor.bernoulli_` does.
    Large masks on the CPU use a faster source, so there the same seed gives other values.
    """
    if mask.numel() >= MIN_MASK_VALUES and not mask.is_cuda:
        return fill_from_bits(mask, p)
    return mask.bernoulli_(1 - p).div_(1 - p)


def fill_from_bits(mask, p):
    """Fill `mask` from 16 random bits a value, about ten times as fast as `bernoulli_`.

    The bits come from a generator of numpy, seeded by PyTorch's. `p` is rounded to a multiple of 2^-16, never to 0 or
    1. Kept values are scaled by the rounded `p`.
    """
    seed = torch.randint(2**63 - 1, (2,)).tolist()
    raw = numpy.random.SFC64(seed).random_raw(-(-mask.numel() // 4))
    bits = torch.from_numpy(raw.view("int16"))[:mask.numel()].view(mask.shape)
    kept = min(max(round((1 - p) * 2**16), 1), 2**16 - 1)
    return torch.lt(bits, kept - 2**15, out=mask).mul_(2**16 / kept)


def locked_dropout(x, p, training=True):
    """Drop the same units of `x` (T, B, H) at every time step.

    One mask (1, B, H) serves the whole sequence.
    """
    if not training or p == 0:
        return x
    return x * column_mask(x, (1, *x.shape[1:]), p)
