"""Score a trained model together with a continuous neural cache (a pointer to the recent past).

    python pointer.py --data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000
    python pointer.py --data data/penn --save PTB.pt --window 100 500 2000 --theta 0.3 0.66 1 --lambdasm 0.05 0.1 0.2

The model is not trained further. Paper: Grave, Joulin, Usunier, "Improving Neural Language Models with a Continuous
Cache" (arXiv 1612.04426); 1708.02182, section 6. Shapes are in the alphabet of `model.py`.
"""

import math
import time
from itertools import product

import torch

import checkpoint
import training
from model import LAYERS
from utils import (
    BadInput,
    Parser,
    add_data_flags,
    add_run_flags,
    amount,
    count,
    figures,
    get_batch,
    pick_device,
    rate,
    run_script,
    score,
)

QUERY_ROWS = 256  # predictions scored at once: QUERY_ROWS x (window + QUERY_ROWS) similarities are in memory


def parse_flags(argv):
    parser = Parser(description="Score a trained model together with a continuous neural cache.",
                    epilog="Given several windows, thetas or lambdasms, all combinations are scored on validation and "
                           "the best is applied to test.")
    add_data_flags(parser)
    parser.add_argument("--save", default="best.pt", metavar="FILE",
                        help="the trained model (default: %(default)s)")
    parser.add_argument("--model", choices=list(LAYERS), help="recurrent layer; has to be that of the trained model")
    parser.add_argument("--bptt", type=count, default=2000, metavar="T",
                        help="time steps per pass of the model: more memory, same result (default: %(default)s)")
    parser.add_argument("--window", type=count, nargs="+", default=[3785], metavar="N",
                        help="words that the cache remembers (default: 3785)")
    parser.add_argument("--theta", type=amount, nargs="+", default=[0.6625523432485668], metavar="X",
                        help="sharpness of the cache: factor of the similarities (0: flat; default: 0.66255)")
    parser.add_argument("--lambdasm", type=rate, nargs="+", default=[0.12785920428335693], metavar="P",
                        help="share of the cache in the mixture, from 0 (off) to below 1 (default: 0.12786)")
    add_run_flags(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def scored_chunks(model, source, bptt):
    """Run `model` over `source` (N, 1); yields for each chunk of up to `bptt` predictions the last layer's raw outputs
    h (t, H), the words that followed (t,) and their log-probabilities (t,) in nats."""
    model.eval()
    hidden = model.init_hidden(1)
    for row in range(0, len(source) - 1, bptt):
        words, targets = get_batch(source, row, bptt)
        output, hidden, raw = model(words, hidden)
        yield raw.squeeze(1), targets.squeeze(1), model.target_logprob(output, targets).squeeze(1)


def cache_logprob(similarities, same, first, window, theta):
    """Log-probability (Q,) in nats that the cache alone gives to the target of each of Q predictions.

    `similarities` (Q, K) are the products of the queries, their outputs, with the keys, the outputs that came before or
    among them; `same` (Q, K) says where the word that followed the key is the target. Query q is key number `first` + q
    and sees the `window` keys before it: a softmax over theta * similarity, summed over the keys where `same`. -inf
    where there are none, NaN where there are no keys at all.
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
    """Mean cross entropy, in nats per token, of (1 - lambdasm) * model + lambdasm * cache over `scored_chunks`, for all
    combinations: a tensor (windows, thetas, lambdasms).

    As in the published numbers a cache joins once more than its window of predictions lie behind; until then the model
    stands alone.
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
    """The loss of each combination of `settings`, (windows, thetas, lambdasms), over `source` (N, 1); returns them as
    [((window, theta, lambdasm), loss), ...] and the seconds they took."""
    start = time.perf_counter()
    losses = mixture_losses(scored_chunks(model, source, bptt), *settings).flatten().tolist()
    return list(zip(product(*settings), losses)), time.perf_counter() - start


def report(kind, split, setting, loss, seconds):
    """Print the score of a setting; returns kind and values of its line in the metrics file."""
    values = dict(zip(("window", "theta", "lambdasm"), setting))
    named = " | ".join(f"{name} {value:6.4g}" for name, value in values.items())
    training.say(f"| {kind:7} | {named} | {score(split, loss)}")
    return kind, {"split": split, **values, "seconds": seconds, **figures(loss)}


def main(argv=None):
    args = parse_flags(argv)
    device = pick_device(args.cuda)
    content = checkpoint.load(args.save, device)
    args, _ = checkpoint.keep_flags(parse_flags, argv, content, args.save, ["model", "data", "level", "shares"])
    corpus = training.load_corpus(args)
    checkpoint.check_vocabulary(content, args.save, corpus.dictionary, args.data)
    model = checkpoint.restore_model(content, args.save, device=device)
    settings = args.window, args.theta, args.lambdasm
    sources = {split: training.lay_out(args, corpus, split, 1, device) for split in ("valid", "test")}
    for split, source in sources.items():
        if max(args.window) >= len(source) - 2:
            training.say(f"| pointer | {split} has {len(source) - 1} words: with --window {max(args.window)} the cache "
                         "never joins")
    searched, seconds = score_split(model, sources["valid"], args.bptt, settings)
    lines = [report("grid", "valid", *found, seconds) for found in searched if len(searched) > 1]
    best, loss = min(searched, key=lambda found: found[1])
    lines.append(report("pointer", "valid", best, loss, seconds))
    ((_, loss),), seconds = score_split(model, sources["test"], args.bptt, [[value] for value in best])
    lines.append(report("pointer", "test", best, loss, seconds))
    try:
        metrics = training.Metrics(args.save)
        for kind, values in lines:
            metrics.write(kind, **values)
    except (OSError, BadInput) as error:  # a model in a folder that may only be read is still a model to score
        training.say(f"not recorded: {error}")


if __name__ == "__main__":
    run_script(main)
