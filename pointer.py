"""Score a trained model together with a continuous neural cache (a pointer to the recent past).

    python pointer.py --data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000
    python pointer.py --data data/wikitext-2 --save WT2.pt --lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000

The model is not trained further. Paper: Grave, Joulin, Usunier, "Improving Neural Language Models with a Continuous
Cache" (arXiv 1612.04426); 1708.02182, section 6. Shapes are in the alphabet of `model.py`.
"""

import math
import time

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

QUERY_ROWS = 512  # predictions scored at once: a block of QUERY_ROWS x (window + QUERY_ROWS) similarities is in memory


def parse_flags(argv):
    parser = Parser(description="Score a trained model together with a continuous neural cache.")
    add_data_flags(parser)
    parser.add_argument("--save", default="best.pt", metavar="FILE",
                        help="the trained model (default: %(default)s)")
    parser.add_argument("--model", choices=list(LAYERS), help="recurrent layer; has to be that of the trained model")
    parser.add_argument("--bptt", type=count, default=2000, metavar="T",
                        help="time steps per pass of the model: more memory, same result (default: %(default)s)")
    parser.add_argument("--window", type=count, default=3785, metavar="N",
                        help="words that the cache remembers (default: %(default)s)")
    parser.add_argument("--theta", type=amount, default=0.6625523432485668, metavar="X",
                        help="sharpness of the cache: factor of the similarities (0: flat; default: %(default)s)")
    parser.add_argument("--lambdasm", type=rate, default=0.12785920428335693, metavar="P",
                        help="share of the cache in the mixture, from 0 (off) to below 1 (default: %(default)s)")
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


def cache_logprob(queries, keys, targets, followers, first, window, theta):
    """Log-probability (Q,) in nats that the cache alone gives to `targets` (Q,) for the outputs `queries` (Q, H).

    `keys` (K, H) are the outputs that came before or among the queries, `followers` (K,) the words that followed them;
    query q is key number `first` + q, and sees the `window` keys before it: softmax over them of theta * query . key,
    summed where the follower is the target. -inf where it is none of them.
    """
    numbers = torch.arange(len(keys), device=keys.device)
    place = numbers - numbers[first:first + len(queries)].unsqueeze(1)
    weight = (theta * queries @ keys.t()).masked_fill((place < -window) | (place >= 0), -math.inf)
    found = weight.masked_fill(followers != targets.unsqueeze(1), -math.inf)
    return found.logsumexp(1) - weight.logsumexp(1)


def mixture_loss(chunks, window, theta, lambdasm):
    """Mean cross entropy, in nats per token, of (1 - lambdasm) * model + lambdasm * cache over `scored_chunks`.

    As in the published numbers the cache joins once more than `window` predictions lie behind; until then the model
    stands alone.
    """
    log_lambdasm = math.log(lambdasm) if lambdasm else -math.inf
    keys = followers = None
    seen, total = 0, 0.0  # predictions so far
    for outputs, targets, logprob in chunks:
        keys = outputs if keys is None else torch.cat([keys, outputs])
        followers = targets if followers is None else torch.cat([followers, targets])
        past = len(keys) - len(outputs)
        for start in range(0, len(outputs), QUERY_ROWS):
            block = slice(start, start + QUERY_ROWS)
            first = past + start
            near = slice(max(0, first - window), first + QUERY_ROWS)
            cached = cache_logprob(outputs[block], keys[near], targets[block], followers[near], first - near.start,
                                   window, theta)
            alone = logprob[block]
            mixed = torch.logaddexp(alone + math.log1p(-lambdasm), cached + log_lambdasm)
            behind = torch.arange(seen, seen + len(alone), device=alone.device)
            total -= torch.where(behind > window, mixed, alone).double().sum().item()
            seen += len(alone)
        keys, followers = keys[-window:], followers[-window:]
    return total / seen


def main(argv=None):
    args = parse_flags(argv)
    device = pick_device(args.cuda)
    content = checkpoint.load(args.save, device)
    args, _ = checkpoint.keep_flags(parse_flags, argv, content, args.save, ["model", "data", "level", "shares"])
    corpus = training.load_corpus(args)
    checkpoint.check_vocabulary(content, args.save, corpus.dictionary, args.data)
    model = checkpoint.restore_model(content, args.save, device=device)
    training.say(f"pointer: window={args.window} theta={args.theta} lambdasm={args.lambdasm}")
    sources = {split: training.lay_out(args, corpus, split, 1, device) for split in ("valid", "test")}
    lines = []
    for split, source in sources.items():
        if args.window >= len(source) - 2:
            training.say(f"| pointer | {split} has {len(source) - 1} words: with this --window the cache never joins")
        start = time.perf_counter()
        chunks = scored_chunks(model, source, args.bptt)
        loss = mixture_loss(chunks, args.window, args.theta, args.lambdasm)
        lines.append({"split": split, "window": args.window, "theta": args.theta, "lambdasm": args.lambdasm,
                      "seconds": time.perf_counter() - start, **figures(loss)})
        training.say(f"| pointer | {score(split, loss)}")
    try:
        metrics = training.Metrics(args.save)
        for line in lines:
            metrics.write("pointer", **line)
    except (OSError, BadInput) as error:  # a model in a folder that may only be read is still a model to score
        training.say(f"not recorded: {error}")


if __name__ == "__main__":
    run_script(main)
