"""Score a trained model by dynamic evaluation: it learns from each chunk of the text after predicting it.

    python dynamic.py --data data/penn --save PTB.pt --lr 5e-5 --lamb 0.002 --epsilon 2e-5 --bptt 5 --batch_size 100
    python dynamic.py --data data/penn --save PTB.pt --lr 3e-5 5e-5 1e-4 --lamb 0.001 0.003 --fast
    python dynamic.py --data data/penn --save PTB.pt --window 500 --theta 1.0 --lambdasm 0.1

The checkpoint is never changed. Each split is scored from the trained weights. Papers:

- Krause, Kahembwe, Murray, Renals, "Dynamic Evaluation of Neural Sequence Models" (arXiv 1709.07432), sections 4
  (both rules) and 6 (the figures for AWD-LSTM).
- The neural cache: see `cache.py`.

Shapes are in the alphabet of `model.py`.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import process

    process.begin()


import math
import pickle
import time
import zipfile
from contextlib import contextmanager
from itertools import product

import torch

import run_files
from cache import log_idle, mixture_losses
from corpus_cache import checksum_of_file
from data import load_split
from device import set_up_device
from errors import BadInput
from files import locked, replacing
from flags import (
    CACHE_DEFAULTS,
    Parser,
    add_cache_flags,
    add_data_flags,
    add_device_flags,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from metrics import log, progress_bar
from model import DROPOUTS, LAYERS
from process import run_script
from scoring import open_trained, record, report
from steps import forward_backward
from utils import get_batch, repackage_hidden

FAST_WORDS = 30_000  # of validation, on which --fast searches
NO_CACHE = {"window": [1], "theta": [0.0], "lambdasm": [0.0]}  # a share of 0 leaves the model alone
# The flags of each rule, with their defaults.
RULES = {"rms": {"lr": 5e-5, "lamb": 0.002, "epsilon": 2e-5}, "sgd": {"lr": 0.2, "lamb": 0.002}}
STATISTICS = "awd-lstm-statistics"  # the format of the file


def parse_flags(argv):
    parser = Parser(description="Score a trained model by dynamic evaluation.",
                    epilog="Given several values of a flag, all combinations are scored on validation and the best is "
                           "applied to test.")
    add_data_flags(parser)
    parser.add_argument("--save", default="best.pt", metavar="FILE", help="the trained model (default: %(default)s)")
    parser.add_argument("--model", choices=list(LAYERS), help="recurrent layer; has to be that of the trained model")
    group = parser.add_argument_group("dynamic evaluation")
    group.add_argument("--rule", choices=list(RULES), default="rms",
                       help="how weights learn: rms divides each gradient by its root mean square over the training "
                            "text, sgd does not (default: %(default)s)")
    group.add_argument("--lr", type=non_negative_float, nargs="+", metavar="LR",
                       help="learning rate of a chunk of --bptt words, so longer chunks need a larger one (0: the "
                            "trained model as it is; default: 5e-5; 0.2 for sgd)")
    group.add_argument("--lamb", type=non_negative_float, nargs="+", metavar="X",
                       help="decay to the trained weights after each chunk (0: off; default: 0.002)")
    group.add_argument("--epsilon", type=positive_float, nargs="+", metavar="X",
                       help="added to the root mean square of a gradient, rms only (default: 2e-5)")
    group.add_argument("--bptt", type=positive_int, default=5, metavar="T",
                       help="words of a chunk: more are faster, and learnt from later (default: %(default)s)")
    group.add_argument("--batch-size", type=positive_int, default=100, metavar="B",
                       help="columns of the training text for the mean squares, rms only (default: %(default)s)")
    group.add_argument("--max-batches", type=non_negative_int, default=0, metavar="N",
                       help="batches of the training text for the mean squares, rms only (0: all; default: "
                            "%(default)s)")
    group.add_argument("--fast", action="store_true",
                       help=f"search for the best combination on the first {FAST_WORDS:,} words of validation")
    add_cache_flags(parser.add_argument_group("neural cache on top, if any of these is given"), optional=True)
    add_device_flags(parser)
    args = parser.parse_args(argv)
    for name, default in RULES[args.rule].items():
        if getattr(args, name) is None:
            setattr(args, name, [default])
    if any(getattr(args, name) is not None for name in CACHE_DEFAULTS):
        for name, default in CACHE_DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, [default])
    return args


# --- gradient statistics ---------------------------------------------------------------------------------------------

def gradient_rms(model, source, bptt, max_batches=0):
    """Compute the root mean square of the gradient of each parameter over batches of `source` (N, B).

    Batches have `bptt` time steps. There are at most `max_batches` of them (0: all). The hidden state is carried along.
    Returns a dict of tensors by the names of the parameters, a tied one once.
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


def gradient_statistics(model, corpus, args, device):
    """Return `gradient_rms` over the training text, from the file beside the checkpoint where that has it.

    Else the file is written, so that later settings find it. It holds one set of statistics, the last one.
    """
    path = run_files.statistics_path(args.save)
    key = {"checkpoint": checksum_of_file(args.save), "text": corpus.checksum, "level": corpus.level,
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
        reason = error if isinstance(error, OSError) else error.__context__  # PyTorch's error hides that of the disk
        where = f"not kept: {reason}"
    log(f"gradient statistics: {seconds:.2f} s; {where}")
    return statistics


def load_statistics(path, key, model, device):
    """Load the statistics that were kept under `key`.

    Returns None when there are none, or of another key, or damaged. They are computed anew then.
    """
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


# --- a pass over a text ----------------------------------------------------------------------------------------------

def without_dropout(model):
    """Put `model` into training mode, with every dropout off.

    It computes what it does in evaluation mode. cuDNN has gradients in training mode only.
    """
    for name in DROPOUTS:
        setattr(model, name, 0.0)
    return model.train()


@contextmanager
def trained_weights(model):
    """Yield copies of the parameters, and put their values back in the end, also when the block raises."""
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        yield trained
    finally:
        for parameter, value in zip(model.parameters(), trained):
            parameter.data.copy_(value)


def make_update(model, trained, statistics, lr, lamb, epsilon=None):
    """Make the function that moves the parameters of `model` in place, given their gradients.

    It goes against the gradient and back to the `trained` weights:

        w += lamb * rate * (trained - w) - lr * gradient / (rms + epsilon)

    `rms` are the `statistics`. The rate is rms over its mean. That is the mean over the parameters of the mean of each.
    lamb * rate is at most 1. With `statistics` None it is the SGD rule: rate and divisor are 1.
    """
    def weights_and_gradients():
        parameters = list(model.parameters())
        return [parameter.detach() for parameter in parameters], [parameter.grad for parameter in parameters]

    def sgd():
        weights, gradients = weights_and_gradients()
        torch._foreach_lerp_(weights, trained, min(lamb, 1.0))
        torch._foreach_add_(weights, gradients, alpha=-lr)

    def rms():
        weights, gradients = weights_and_gradients()
        torch._foreach_lerp_(weights, trained, decays)
        torch._foreach_addcmul_(weights, gradients, factors, value=-lr)

    if statistics is None:
        return sgd
    rms_values = [statistics[name] for name, _ in model.named_parameters()]
    mean = torch.stack([value.mean() for value in rms_values]).mean()
    decays = [(value * (lamb / mean)).clamp_(max=1) for value in rms_values]
    factors = [(value + epsilon).reciprocal_() for value in rms_values]
    return rms


def dynamic_chunks(model, source, bptt, update, what, lr):
    """Run `model` over `source` (N, 1) in chunks of up to `bptt` predictions, and `update` it after each.

    Yields what `pointer.scored_chunks` does. A chunk is predicted before it is learnt from. `what` and `lr` are for
    messages. Raises BadInput when a loss is not finite.
    """
    hidden = model.init_hidden(1)
    with progress_bar(len(source) - 1, 0, "word", f"dynamic evaluation, {what}") as bar:
        for number, row in enumerate(range(0, len(source) - 1, bptt), 1):
            words, targets = get_batch(source, row, bptt)
            model.zero_grad()
            output, hidden, raw = model(words, hidden)
            logprob = model.target_logprob(output, targets)
            loss = -logprob.mean()
            value = loss.item()
            if not math.isfinite(value):
                raise BadInput(f"chunk {number:,} of {what} (from word {row + 1:,} on): the loss is {value} with --lr "
                               f"{lr:g}; a smaller one may do")
            loss.backward()
            hidden = repackage_hidden(hidden)
            yield raw.detach().squeeze(1), targets.squeeze(1), logprob.detach().squeeze(1)
            update()
            bar.update(len(words))


def score_split(model, source, split, bptt, statistics, setting, cache):
    """Score `source` (N, 1) with a `setting` of the rule, from the trained weights, which are put back.

    `cache` has the windows, thetas and lambdasms of the cache, by these names, or nothing. All their combinations are
    scored in the same pass. Returns [(setting, loss), ...] and the seconds that they took together.
    """
    start = time.perf_counter()
    with trained_weights(model) as trained:
        update = make_update(model, trained, statistics, **setting)
        chunks = dynamic_chunks(model, source, bptt, update, split, setting["lr"])
        losses = mixture_losses(chunks, *(cache or NO_CACHE).values()).flatten().tolist()
    named = [setting | dict(zip(cache, values)) for values in product(*cache.values())]
    return list(zip(named, losses)), time.perf_counter() - start


# --- the command -----------------------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_flags(argv)
    device = set_up_device(args.cuda)
    with locked(run_files.metrics_path(args.save), required=False):
        score(argv, device)


def score(argv, device):
    """Score validation and test, print and record what comes out.

    When a setting fails, those before it are recorded.
    """
    args, corpus, model = open_trained(parse_flags, argv, device)
    valid, test = load_split(corpus, "valid", 1, device), load_split(corpus, "test", 1, device)
    without_dropout(model)
    statistics = gradient_statistics(model, corpus, args, device) if args.rule == "rms" else None
    names = RULES[args.rule]
    settings = [dict(zip(names, values)) for values in product(*(getattr(args, name) for name in names))]
    cache = {name: getattr(args, name) for name in CACHE_DEFAULTS} if args.window else {}
    if cache:
        log_idle("dynamic", args.window, valid=valid, test=test)
    lines, found = [], []

    def add(kind, split, source, setting, loss, seconds):
        lines.append(report(kind, split, setting, loss, seconds, tokens=len(source) - 1, **described(args)))

    try:
        is_grid = len(settings) > 1 or any(len(values) > 1 for values in cache.values())
        part = valid[:FAST_WORDS + 1] if args.fast and is_grid else valid
        for setting in settings:
            scores, seconds = score_split(model, part, "valid", args.bptt, statistics, setting, cache)
            for one, loss in scores:
                found.append((loss, seconds, one))
                if is_grid:
                    add("dynamic-grid", "valid", part, one, loss, seconds)
        loss, seconds, best = min(found, key=lambda scored: scored[0])
        setting, cache = {name: best[name] for name in names}, {name: [best[name]] for name in cache}
        if len(part) < len(valid):
            scores, seconds = score_split(model, valid, "valid", args.bptt, statistics, setting, cache)
            loss = scores[0][1]
        add("dynamic", "valid", valid, best, loss, seconds)
        scores, seconds = score_split(model, test, "test", args.bptt, statistics, setting, cache)
        add("dynamic", "test", test, best, scores[0][1], seconds)
    finally:
        if lines:
            record(args.save, lines)
    log.check()


def described(args):
    """Collect what else the metrics file says of a setting."""
    names = ("rule", "bptt", "batch_size", "max_batches") if args.rule == "rms" else ("rule", "bptt")
    return {name: getattr(args, name) for name in names}


if __name__ == "__main__":
    run_script(main)
