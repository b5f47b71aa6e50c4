"""Drop whole words from a batch, at every place where they stand (embedding dropout).

Paper: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182), section 4.3. It
follows Gal and Ghahramani (2016). Shapes are in the alphabet of `model.py`.
"""

from torch.nn import functional

from locked_dropout import dropout_mask


def embedded_dropout(weight, tokens, p, training=True):
    """Look up `tokens` (T, B) in `weight` (V, E), with rows dropped at rate `p`.

    Returns (T, B, E). One mask (V, 1) is drawn for the whole vocabulary. It is applied only to the rows that were
    looked up. Values and gradients are as if the matrix were masked first. No V x E product is needed.
    """
    embedded = functional.embedding(tokens, weight)
    if not training or p == 0:
        return embedded
    return embedded * dropout_mask(weight, (weight.size(0), 1), p)[tokens]
