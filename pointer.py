"""Score a trained model together with a continuous neural cache (a pointer to the recent past).

    python pointer.py --data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000
    python pointer.py --data data/penn --save PTB.pt --window 100 500 2000 --theta 0.3 0.66 1 --lambdasm 0.05 0.1 0.2

The model is not trained further. Papers:

- Grave, Joulin, Usunier, "Improving Neural Language Models with a Continuous Cache" (arXiv 1612.04426).
- 1708.02182, section 6.

Shapes are in the alphabet of `model.py`.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import process

    process.begin()


import math
import time
from itertools import product

import torch

import checkpoint
import run_files
from data import Corpus, load_split
from device import set_up_device
from errors import BadInput
from files import locked
from flags import Parser, add_data_flags, add_device_flags, non_negative_float, positive_int, probability
from metrics import Metrics, format_loss, log, loss_metrics
from model import LAYERS
from process import run_script
from utils import get_batch

QUERY_ROWS = 256  # predictions scored at once; QUERY_ROWS x (window + QUERY_ROWS) similarities are in memory


def parse_flags(argv):
    parser = Parser(description="Score a trained model together with a continuous neural cache.",
                    epilog="Given several windows, thetas or lambdasms, all combinations are scored on validation and "
                           "the best is applied to test.")
    add_data_flags(parser)
    parser.add_argument("--save", default="best.pt", metavar="FILE",
                        help="the trained model (default: %(default)s)")
    parser.add_argument("--model", choices=list(LAYERS), help="recurrent layer; has to be that of the trained model")
    parser.add_argument("--bptt", type=positive_int, default=2000, metavar="T",
                        help="time steps per pass of the model: more memory, same result (default: %(default)s)")
    parser.add_argument("--window", type=positive_int, nargs="+", default=[3785], metavar="N",
                        help="words that the cache remembers (default: 3785)")
    parser.add_argument("--theta", type=non_negative_float, nargs="+", default=[0.6625523432485668], metavar="X",
                        help="sharpness of the cache: factor of the similarities (0: flat; default: 0.66255)")
    parser.add_argument("--lambdasm", type=probability, nargs="+", default=[0.12785920428335693], metavar="P",
                        help="share of the cache in the mixture, from 0 (off) to below 1 (default: 0.12786)")
    add_device_flags(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def scored_chunks(model, source, bptt):
    """Run `model` over `source` (N, 1) in chunks of up to `bptt` predictions.

    Yields for each chunk:

    - The raw outputs h (t, H) of the last layer.
    - The words that followed (t,).
    - Their log-probabilities (t,), in nats.
    """
    model.eval()
    hidden = model.init_hidden(1)
    for row in range(0, len(source) - 1, bptt):
        words, targets = get_batch(source, row, bptt)
        output, hidden, raw = model(words, hidden)
        yield raw.squeeze(1), targets.squeeze(1), model.target_logprob(output, targets).squeeze(1)


def cache_logprob(similarities, same, first, window, theta):
    """Compute the log-probability (Q,), nats, that the cache alone gives to the target of each of Q predictions.

    Queries are the outputs of the predictions. Keys are the outputs that came before or among them.

    - `similarities` (Q, K) are the products of queries and keys.
    - `same` (Q, K) says where the word that followed the key is the target.
    - `first`: query q is key number `first` + q. It sees the `window` keys before it.

    The probability is a softmax over theta * similarity, summed over the keys where `same`. The result is -inf where no
    key is `same`. It is NaN where there are no keys at all.
    """
    nearest = max(0, first - window)
    queries, keys = len(similarities), similarities.size(1)
    number = torch.arange(nearest, keys, device=similarities.device)
    own = number[first - nearest:first - nearest + queries].unsqueeze(1)
    weight = similarities[:, nearest:] * theta
    weight.masked_fill_((number >= own) | (number < own - window), -math.inf)
    weight.sub_(weight.amax(1, keepdim=True)).exp_()
    return ((weight * same[:, nearest:]).sum(1) / weight.sum(1)).log()


def mixture_losses(chunks, windows, thetas, lambdasms):
    """Compute the mean cross entropy of (1 - lambdasm) * model + lambdasm * cache over `scored_chunks`.

    Returns nats per token for all combinations, a tensor (windows, thetas, lambdasms). A cache joins once more than its
    window of predictions lie behind. Until then the model stands alone. The published numbers were made that way.
    """
    longest = max(windows)
    totals = torch.zeros(len(windows), len(thetas), len(lambdasms), dtype=torch.float64)
    keys = followers = None
    seen = 0  # predictions so far
    for outputs, targets, logprob in chunks:
        keys = outputs if keys is None else torch.cat([keys, outputs])
        followers = targets if followers is None else torch.cat([followers, targets])
        share = torch.tensor(lambdasms, dtype=torch.double, device=logprob.device).unsqueeze(1)
        model_part, cache_part = (-share).log1p().to(logprob.dtype), share.log().to(logprob.dtype)
        past = len(keys) - len(outputs)
        for start in range(0, len(outputs), QUERY_ROWS):
            block = slice(start, start + QUERY_ROWS)
            alone, first = logprob[block], past + start
            near = slice(max(0, first - longest), first + len(alone))
            similarities = outputs[block] @ keys[near].t()
            same = followers[near] == targets[block].unsqueeze(1)
            behind = torch.arange(seen, seen + len(alone), device=alone.device)
            for w, window in enumerate(windows):
                for t, theta in enumerate(thetas):
                    cached = cache_logprob(similarities, same, first - near.start, window, theta)
                    mixed = torch.logaddexp(alone + model_part, cached + cache_part)
                    totals[w, t] -= torch.where(behind > window, mixed, alone).double().sum(1).cpu()
            seen += len(alone)
        keys, followers = keys[-longest:], followers[-longest:]
    return totals / seen


def score_split(model, source, bptt, settings):
    """Score all combinations of `settings`, (windows, thetas, lambdasms), over `source` (N, 1).

    Returns [((window, theta, lambdasm), loss), ...] and the seconds that they took together.
    """
    start = time.perf_counter()
    losses = mixture_losses(scored_chunks(model, source, bptt), *settings).flatten().tolist()
    return list(zip(product(*settings), losses)), time.perf_counter() - start


def report(kind, split, setting, loss, seconds):
    """Log the score of a setting.

    Returns kind and values of its line in the metrics file.
    """
    values = dict(zip(("window", "theta", "lambdasm"), setting))
    named = " | ".join(f"{name} {value:6.4g}" for name, value in values.items())
    log(f"| {kind:7} | {named} | {format_loss(split, loss)}")
    return kind, {"split": split, **values, "seconds": seconds, **loss_metrics(loss)}


def record(save, lines):
    """Add lines to the record of a model.

    A read-only folder is not an error: its model can still be scored.
    """
    try:
        metrics = Metrics(run_files.metrics_path(save))
        for kind, values in lines:
            metrics.write(kind, **values)
    except (OSError, BadInput) as error:
        log(f"not recorded: {error}")


def main(argv=None):
    args = parse_flags(argv)
    device = set_up_device(args.cuda)
    with locked(run_files.metrics_path(args.save), required=False):
        score(args, argv, device)


def score(args, argv, device):
    """Score validation and test, print and record what comes out."""
    content = checkpoint.load_model(args.save, device)
    args, _ = checkpoint.merge_flags(parse_flags, argv, content, args.save, ["model", "data", "level", "shares"],
                                     fixed=["model", "level"])
    checkpoint.check_data(content, args.save, args.data)
    corpus = Corpus(args.data, args.level, args.shares, words=content["vocabulary"])
    log(corpus.describe())
    model = checkpoint.restore_model(content, args.save, device=device)
    settings = args.window, args.theta, args.lambdasm
    valid, test = load_split(corpus, "valid", 1, device), load_split(corpus, "test", 1, device)
    for split, source in (("valid", valid), ("test", test)):
        if max(args.window) >= len(source) - 2:
            log(f"| pointer | {split} has {len(source) - 1} words: with --window {max(args.window)} the cache never "
                "joins")
    scores, seconds = score_split(model, valid, args.bptt, settings)
    lines = []
    if len(scores) > 1:
        for setting, loss in scores:
            lines.append(report("grid", "valid", setting, loss, seconds))
    best, loss = min(scores, key=lambda scored: scored[1])
    lines.append(report("pointer", "valid", best, loss, seconds))
    scores, seconds = score_split(model, test, args.bptt, [[value] for value in best])
    _, loss = scores[0]
    lines.append(report("pointer", "test", best, loss, seconds))
    record(args.save, lines)
    log.check()


if __name__ == "__main__":
    run_script(main)
