"""Score trained models as the peer of `quality.py` is scored: on the validation text in pieces, each read by itself.

    python benchmarks/pieces.py quality/4T.seed1.pt

A model that carries its hidden state through the text knows what came before a piece, which a transformer does not.
Prints the loss of each model in pieces, beside that with the hidden state carried from one piece to the next.
"""

import sys
from pathlib import Path

import torch
from peer import CONTEXT

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
import checkpoint
from data import Corpus, load_split
from flags import Parser, positive_int
from metrics import log
from process import run_script
from utils import get_batch

COLUMNS = 256  # pieces that are read at a time


def parse_flags(argv):
    parser = Parser(description="Score trained models on pieces of the validation text, each read by itself.")
    parser.add_argument("models", nargs="+", metavar="FILE", help="trained models, their texts where they were")
    parser.add_argument("--length", type=positive_int, default=CONTEXT, metavar="T",
                        help="tokens of a piece to predict (default: %(default)s)")
    return parser.parse_args(argv)


@torch.no_grad()
def losses(model, ids, length):
    """Compute the loss over `ids` (N, 1) in pieces of `length` predictions, and with the hidden state carried.

    What is left after the last whole piece is not scored. Both are in nats per token.
    """
    model.eval()
    ids = ids[:(len(ids) - 1) // length * length + 1]
    pieces = ids.flatten().unfold(0, length + 1, length).t()  # (length + 1, pieces)
    alone = [logprobs(model, part, model.init_hidden(part.size(1)))[0] for part in pieces.split(COLUMNS, dim=1)]
    carried, hidden = [], model.init_hidden(1)
    for row in range(0, len(ids) - 1, length):
        logprob, hidden = logprobs(model, ids[row:row + length + 1], hidden)
        carried.append(logprob)
    return -torch.cat(alone).mean().item(), -torch.cat(carried).mean().item()


def logprobs(model, ids, hidden):
    """Return the log-probabilities, in one row, of all but the first of `ids` (T + 1, B), and the new hidden state."""
    words, targets = get_batch(ids, 0, len(ids))
    output, hidden, _ = model(words, hidden)
    return model.target_logprob(output, targets).double().flatten(), hidden


def main(argv=None):
    args = parse_flags(argv)
    for path in args.models:
        content = checkpoint.load_model(path)
        flags = content["flags"]
        corpus = Corpus(flags["data"], flags["level"], flags["shares"], words=content["vocabulary"])
        log(corpus.describe())
        model = checkpoint.restore_model(content, path)
        alone, carried = losses(model, load_split(corpus, "valid", 1, "cpu", args.length + 1), args.length)
        log(f"{path}: {alone:.3f} nats per token in pieces of {args.length}, {carried:.3f} with the state carried")


if __name__ == "__main__":
    run_script(main)
