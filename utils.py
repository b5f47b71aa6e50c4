"""Cut a stream of token ids into batches, and handle hidden states.

Shapes are in the alphabet of `model.py`.
"""

import torch

from errors import BadInput

# --- batches ---------------------------------------------------------------------------------------------------------

def batchify(ids, batch_size, device="cpu", rows=2):
    """Lay a stream of token ids out as B parallel texts, read top to bottom.

        a b c d e f g h i j k l m  with B = 3   ->   a e i
                                                     b f j
                                                     c g k
                                                     d h l     (m, the remainder, is left out)

    Returns (N, B), N = len(ids) // B. The model takes columns as independent, so it cannot learn that e follows d. This
    is the price of the parallel batch. Raises BadInput when there are fewer than `rows` rows.
    """
    length = len(ids) // batch_size
    if length < rows:
        raise BadInput(f"{len(ids)} tokens are too few for a batch of {batch_size}: "
                       f"it needs {rows * batch_size} or more")
    return ids[:length * batch_size].view(batch_size, length).t().to(device)


def get_batch(source, row, seq_len):
    """Take up to `seq_len` rows of `source` (N, B) from `row` on.

    Returns token ids (T, B) and targets (T, B), which are one row further on.
    """
    seq_len = min(seq_len, len(source) - 1 - row)
    return source[row:row + seq_len].long(), source[row + 1:row + 1 + seq_len].long()


def blocks(steps, size):
    """Cut `steps` time steps into slices of `size`.

    The last slice has what is left.
    """
    return [slice(start, min(start + size, steps)) for start in range(0, steps, size)]


# --- hidden states ---------------------------------------------------------------------------------------------------

def map_hidden(function, hidden):
    """Apply `function` to each tensor of a hidden state, nested as it is."""
    if isinstance(hidden, torch.Tensor):
        return function(hidden)
    return type(hidden)(map_hidden(function, part) for part in hidden)


def repackage_hidden(hidden):
    """Cut a hidden state off from its history.

    Backpropagation stops there, and the history need not stay in memory.
    """
    return map_hidden(lambda part: part.detach().clone(), hidden)
