"""Drop whole words from a batch, wherever they occur (embedding dropout).

Paper: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182), section 4.3. It
follows Gal and Ghahramani (2016). Shapes are in the alphabet of `model.py`.
"""

import torch
from torch.nn import functional

from locked_dropout import dropout_mask

UNSAFE = range(2017, 3073)  # numbers of tokens whose lookup has a race in its gradient on a GPU


def look_up(weight, tokens):
    """Look up `tokens` (T, B) in `weight` (V, E); returns (T, B, E).

    On a GPU, PyTorch's gradient for up to 3,072 tokens has a race from 2,017 on (2.6 to 2.11 at least). Two lookups of
    half as many have none.
    """
    if not (tokens.is_cuda and tokens.numel() in UNSAFE):
        return functional.embedding(tokens, weight)
    halves = [functional.embedding(half, weight) for half in tokens.flatten().chunk(2)]
    return torch.cat(halves).view(*tokens.shape, -1)


def embedded_dropout(weight, tokens, p, training=True):
    """Look up `tokens` (T, B) in `weight` (V, E), with rows dropped at rate `p`.

    Returns (T, B, E). One mask (V, 1) is drawn for the whole vocabulary, and applied only to the rows that were looked
    up. Values and gradients are as if the matrix were masked first, without its V x E product.
    """
    embedded = look_up(weight, tokens)
    if not training or p == 0:
        return embedded
    return embedded * dropout_mask(weight, (weight.size(0), 1), p)[tokens]
