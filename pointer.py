"""Score a trained model together with a continuous neural cache (a pointer to the recent past).

    python pointer.py --data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000
    python pointer.py --data data/penn --save PTB.pt --window 100 500 2000 --theta 0.3 0.66 1 --lambdasm 0.05 0.1 0.2

The model is not trained further. Papers:

- Grave, Joulin, Usunier, "Improving Neural Language Models with a Continuous Cache" (arXiv 1612.04426).
- 1708.02182, on pointer models.

Shapes are in the alphabet of `model.py`.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import process

    process.begin()


import time
from itertools import product

import torch

import run_files
from cache import mixture_losses
from device import set_up_device
from files import locked
from flags import CACHE_DEFAULTS, Parser, add_cache_flags, add_device_flags, positive_int
from metrics import log
from process import run_script
from scoring import add_trained_flags, load_scored, log_idle, open_trained, record, report
from utils import get_batch


def parse_flags(argv):
    parser = Parser(description="Score a trained model together with a continuous neural cache.",
                    epilog="Given several windows, thetas or lambdasms, all combinations are scored on validation and "
                           "the best is applied to test.")
    add_trained_flags(parser)
    parser.add_argument("--bptt", type=positive_int, default=2000, metavar="T",
                        help="time steps per pass of the model: more memory, same result (default: %(default)s)")
    add_cache_flags(parser)
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


def score_split(model, source, bptt, settings):
    """Score all combinations of `settings`, (windows, thetas, lambdasms), over `source` (N, 1).

    Returns [(setting, loss), ...], each setting by its names, and the seconds that they took together.
    """
    start = time.perf_counter()
    losses = mixture_losses(scored_chunks(model, source, bptt), *settings).flatten().tolist()
    named = [dict(zip(CACHE_DEFAULTS, values)) for values in product(*settings)]
    return list(zip(named, losses)), time.perf_counter() - start


def main(argv=None):
    args = parse_flags(argv)
    device = set_up_device(args.cuda)
    with locked(run_files.metrics_path(args.save), required=False):
        score(argv, device)


def score(argv, device):
    """Score validation and, where there is one, test; print and record what comes out."""
    args, corpus, model = open_trained(parse_flags, argv, device)
    settings = args.window, args.theta, args.lambdasm
    splits = load_scored(corpus, device)
    log_idle("pointer", args.window, **splits)
    scores, seconds = score_split(model, splits["valid"], args.bptt, settings)
    lines = []
    if len(scores) > 1:
        for setting, loss in scores:
            lines.append(report("grid", "valid", setting, loss, seconds))
    best, loss = min(scores, key=lambda scored: scored[1])
    lines.append(report("pointer", "valid", best, loss, seconds))
    if "test" in splits:
        scores, seconds = score_split(model, splits["test"], args.bptt, [[value] for value in best.values()])
        _, loss = scores[0]
        lines.append(report("pointer", "test", best, loss, seconds))
    record(args.save, lines)
    log.check()


if __name__ == "__main__":
    run_script(main)
