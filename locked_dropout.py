"""Locked dropout, and the one function from which every random mask of the project comes.

Paper: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models", section 4.2 (variational dropout
after Gal and Ghahramani, 2016). Shapes are in the alphabet of `model.py`.
"""


def dropout_mask(like, shape, p):
    """A mask of `shape`, 0 with probability `p` and 1/(1 - p) otherwise, on the device and in the type of `like`.

    It draws as `Tensor.bernoulli_` does, so that a seed gives the same masks as the trajectories of the original.
    """
    return like.new_empty(shape).bernoulli_(1 - p).div_(1 - p)


def locked_dropout(x, p, training=True):
    """Drop the same units of `x` (T, B, H) at every time step: one mask (1, B, H) for the whole sequence."""
    if not training or p == 0:
        return x
    return x * dropout_mask(x, (1, *x.shape[1:]), p)
