"""Measure the root mean square of gradients over the training text, and keep it beside the checkpoint.

The RMS rule of dynamic evaluation divides by it (arXiv 1709.07432, section 4). Shapes are in the alphabet of
`model.py`.
"""

import pickle
import time
import zipfile

import torch

import run_files
from data import load_split
from errors import BadInput
from files import disk_error, replacing
from metrics import log, progress_bar
from steps import forward_backward
from utils import get_batch

STATISTICS = "awd-lstm-statistics"  # the format of the file


def gradient_rms(model, source, bptt, max_batches=0):
    """Compute the root mean square of the gradient of each parameter over batches of `source` (N, B).

    Batches have `bptt` time steps. There are at most `max_batches` of them (0: all). The hidden state is carried along.
    Returns a dict of tensors by the names of the parameters, a tied one once. Raises BadInput when a loss or a gradient
    is not finite.
    """
    rows = range(0, len(source) - 2, bptt)[:max_batches or None]
    parameters = dict(model.named_parameters())
    squares = [torch.zeros_like(parameter) for parameter in parameters.values()]
    hidden = model.init_hidden(source.size(1))
    with progress_bar(len(rows), 0, "batch", "gradient statistics") as bar:
        for number, row in enumerate(rows, 1):
            words, targets = get_batch(source, row, bptt)
            hidden, loss_and_norm = forward_backward(model, words, targets, hidden)
            if not loss_and_norm.isfinite().all():
                raise BadInput(f"batch {number} of the training text: its loss or its gradient is not finite")
            gradients = [parameter.grad for parameter in parameters.values()]
            torch._foreach_addcmul_(squares, gradients, gradients)
            bar.update()
    torch._foreach_div_(squares, len(rows))
    torch._foreach_sqrt_(squares)
    return dict(zip(parameters, squares))


def gradient_statistics(model, corpus, checksum, args, device):
    """Return `gradient_rms` over the training text, from the file beside the checkpoint if it is there.

    Otherwise it is computed and the file written. The file holds one set of statistics, the last one. `checksum` is
    that of the checkpoint. Raises BadInput when a loss or gradient is not finite.
    """
    path = run_files.statistics_path(args.save)
    key = {"checkpoint": checksum, "text": corpus.checksum, "level": corpus.level,
           "shares": args.shares, "batch_size": args.batch_size, "bptt": args.bptt, "max_batches": args.max_batches}
    statistics = load_statistics(path, key, model, device)
    if statistics:
        log(f"gradient statistics: from {path}")
        return statistics
    start = time.perf_counter()
    source = load_split(corpus, "train", args.batch_size, device, rows=3)
    statistics = gradient_rms(model, source, args.bptt, args.max_batches)
    seconds = time.perf_counter() - start
    try:
        with replacing(path) as file:
            torch.save({"format": STATISTICS, "key": key, "statistics": statistics}, file)
        where = f"kept in {path}"
    except (OSError, RuntimeError) as error:
        where = f"not kept: {disk_error(error)}"
    log(f"gradient statistics: {seconds:.2f} s; {where}")
    return statistics


def load_statistics(path, key, model, device):
    """Load the statistics that were kept under `key`; returns None when they are missing, damaged or of another key."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # compares checksums; PyTorch would load wrong values silently
                return None
        content = torch.load(path, map_location=device, weights_only=True)
        if (content["format"], content["key"]) != (STATISTICS, key):
            return None
        statistics = content["statistics"]
        for name, parameter in model.named_parameters():
            if (statistics[name].shape, statistics[name].dtype) != (parameter.shape, parameter.dtype):
                return None
        return statistics
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, LookupError, TypeError, ValueError,
            AttributeError, EOFError):
        return None
