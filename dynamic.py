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
import os
import time
from itertools import product
from types import NoneType

import torch

import run_files
from cache import mixture_losses
from corpus_cache import checksum_of_file
from device import set_up_device
from errors import BadInput
from files import locked
from flags import (
    CACHE_DEFAULTS,
    Parser,
    add_cache_flags,
    add_device_flags,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from gradients import gradient_statistics
from metrics import log, progress_bar, read_metrics
from model import DROPOUTS
from optimizers import restored_weights
from process import run_script
from scoring import add_trained_flags, load_scored, log_idle, open_trained, record, report
from utils import get_batch, repackage_hidden

FAST_WORDS = 30_000  # of validation, on which --fast searches
NO_CACHE = {"window": [1], "theta": [0.0], "lambdasm": [0.0]}  # a share of 0 leaves the model alone
RMS_ONLY = {"epsilon", "batch_size", "max_batches"}  # flags of that rule alone
# The flags of each rule, with their defaults.
RULES = {"rms": {"lr": 5e-5, "lamb": 0.002, "epsilon": 2e-5}, "sgd": {"lr": 0.2, "lamb": 0.002}}


def parse_flags(argv):
    parser = Parser(description="Score a trained model by dynamic evaluation.",
                    epilog="Given several values of a flag, all combinations are scored on validation and the best is "
                           "applied to test.")
    add_trained_flags(parser)
    parser.add_argument("--resume", action="store_true",
                        help="go on with what was stopped: scores in the record, of this model, text and setting, are "
                             "not computed again")
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
    args, given = parser.parse_args(argv), parser.given(argv)
    if args.rule != "rms" and (unused := given & RMS_ONLY):
        parser.error(f"--{' --'.join(sorted(unused)).replace('_', '-')}: of --rule rms only")
    for name, default in RULES[args.rule].items():
        if getattr(args, name) is None:
            setattr(args, name, [default])
    if any(getattr(args, name) is not None for name in CACHE_DEFAULTS):
        for name, default in CACHE_DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, [default])
    return args


class Diverged(BadInput):
    """Report that the loss of a setting is not finite: where, and with which learning rate."""


# --- a pass over a text ----------------------------------------------------------------------------------------------

def without_dropout(model):
    """Put `model` into training mode, with every dropout off.

    It computes what it does in evaluation mode. cuDNN has gradients in training mode only.
    """
    for name in DROPOUTS:
        setattr(model, name, 0.0)
    return model.train()


def make_update(model, trained, statistics, lr, lamb, epsilon=None):
    """Make the function that moves the parameters of `model` in place, given their gradients.

    It goes against the gradient and back to the `trained` weights:

        w += lamb * rate * (trained - w) - lr * gradient / (rms + epsilon)

    `rms` are the `statistics`. The rate is rms over its mean, which is the mean over parameters of the mean of each;
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
    messages. Raises Diverged when a loss is not finite.
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
                raise Diverged(f"chunk {number:,} of {what} (from word {row + 1:,} on): the loss is {value} with --lr "
                               f"{lr:g}; a smaller one may do")
            loss.backward()
            hidden = repackage_hidden(hidden)
            yield raw.detach().squeeze(1), targets.squeeze(1), logprob.detach().squeeze(1)
            update()
            bar.update(len(words))


def score_split(model, source, split, bptt, statistics, setting, cache):
    """Score `source` (N, 1) with a `setting` of the rule, from the trained weights, which are put back.

    `cache` has the windows, thetas and lambdasms of the cache, by these names, or nothing. All their combinations are
    scored in the same pass. Returns their losses, the last of these changing fastest. Raises Diverged.
    """
    with restored_weights(model.parameters()) as trained:
        update = make_update(model, trained, statistics, **setting)
        chunks = dynamic_chunks(model, source, bptt, update, split, setting["lr"])
        return mixture_losses(chunks, *(cache or NO_CACHE).values()).flatten().tolist()


# --- the command -----------------------------------------------------------------------------------------------------

class Scores:
    """Score a trained model, and print and record each score as it comes, so that a stop loses none.

    `description` is what lines of the record say besides the setting: the model, the text and the flags. No score is
    computed twice. Given --resume, those in the record are not computed again either.
    """

    def __init__(self, model, args, statistics, description):
        self.model, self.args, self.statistics, self.description = model, args, statistics, description
        self.known = recorded_scores(run_files.metrics_path(args.save)) if args.resume else []
        self.recording = True

    def score(self, kind, split, source, setting, cache, may_diverge=False):
        """Score `source` (N, 1) with a `setting` of the rule and each combination of `cache`.

        Returns [(loss, combination), ...]. A loss that is not finite is infinite if the setting `may_diverge`. Else it
        raises Diverged.
        """
        further = {"tokens": len(source) - 1, **self.description}
        combinations = [setting | dict(zip(cache, values)) for values in product(*cache.values())]
        lines = [self.find(kind, {"split": split, **combination, **further}) for combination in combinations]
        # A recorded loss that is not finite is computed again where it is an error: the message says in which chunk.
        if any(line is None or (line["loss"] is None and not may_diverge) for line in lines):
            start = time.perf_counter()
            try:
                losses = score_split(self.model, source, split, self.args.bptt, self.statistics, setting, cache)
            except Diverged as error:
                if not may_diverge:
                    raise
                log(f"| {kind:7} | {error}")
                losses = [math.inf] * len(combinations)
            seconds = time.perf_counter() - start
            lines = [{"kind": None, "loss": loss, "seconds": seconds} for loss in losses]
        losses = [math.inf if line["loss"] is None else line["loss"] for line in lines]
        for combination, loss, line in zip(combinations, losses, lines):
            _, values = report(kind, split, combination, loss, line["seconds"], **further)
            if line["kind"] != kind:
                self.known.append({"kind": kind, **values})
                self.recording = self.recording and record(self.args.save, [(kind, values)])
        return list(zip(losses, combinations))

    def find(self, kind, values):
        """Return the line of a known score with these `values`, if possible of this `kind`; None if there is none."""
        values = dict.fromkeys(CACHE_DEFAULTS) | values
        same = [line for line in self.known if all(line.get(name) == value for name, value in values.items())]
        return max(same, key=lambda line: line["kind"] == kind, default=None)


def recorded_scores(path):
    """Read what the record at `path` has of dynamic evaluation; an infinite loss is None."""
    lines = read_metrics(path) if os.path.exists(path) else []
    return [line for line in lines if line["kind"] in ("dynamic", "dynamic-grid")
            and isinstance(line.get("loss", ""), (float, NoneType)) and isinstance(line.get("seconds"), float)]


def main(argv=None):
    args = parse_flags(argv)
    device = set_up_device(args.cuda)
    with locked(run_files.metrics_path(args.save), required=False):
        score(argv, device)


def score(argv, device):
    """Score validation and, where there is one, test; print and record what comes out."""
    args, corpus, model = open_trained(parse_flags, argv, device)
    splits = load_scored(corpus, device)
    without_dropout(model)
    checksum = checksum_of_file(args.save)
    statistics = gradient_statistics(model, corpus, checksum, args, device) if args.rule == "rms" else None
    names = list(RULES[args.rule])
    settings = [dict(zip(names, values)) for values in product(*(getattr(args, name) for name in names))]
    cache = {name: getattr(args, name) for name in CACHE_DEFAULTS} if args.window else {}
    if cache:
        log_idle("dynamic", args.window, **splits)
    scores = Scores(model, args, statistics, described(args, corpus, checksum))
    best = settings[0] | {name: values[0] for name, values in cache.items()}
    if len(settings) > 1 or any(len(values) > 1 for values in cache.values()):
        part = splits["valid"][:FAST_WORDS + 1] if args.fast else splits["valid"]
        scored = []
        for setting in settings:
            scored += scores.score("dynamic-grid", "valid", part, setting, cache, may_diverge=True)
        loss, best = min(scored, key=lambda pair: pair[0])
        if loss == math.inf:
            raise BadInput("no setting of the grid has a finite loss; a smaller --lr may do")
    elif args.fast:
        log("--fast is not used, since one setting needs no search")
    setting, cache = {name: best[name] for name in names}, {name: [best[name]] for name in cache}
    for split, source in splits.items():
        scores.score("dynamic", split, source, setting, cache)
    log.check()


def described(args, corpus, checksum):
    """Collect what the metrics file says of a score besides its setting."""
    names = ("rule", "bptt", "batch_size", "max_batches") if args.rule == "rms" else ("rule", "bptt")
    return {"checkpoint": checksum, "text": corpus.checksum, "shares": args.shares,
            **{name: getattr(args, name) for name in names}}


if __name__ == "__main__":
    run_script(main)
