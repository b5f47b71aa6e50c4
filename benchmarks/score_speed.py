"""Measure how many lines a second `score.py` scores on this machine's CPU, beside a line at a time.

    python benchmarks/score_speed.py                                          (a part of make bench; 10 minutes)
    python benchmarks/score_speed.py --text data/penn/train.txt --lines 10000
    python benchmarks/score_speed.py --only small --lines 500 --few 20 --repetitions 1

The plain ways are PyTorch's stock parts (`baseline.py`), one line of text at a time and one word at a time. They are
timed on few lines. All ways read, score and write the same lines. They take turns, and the medians are compared. The
floor is the time of the matrix products alone (see `speed.py`): no way that multiplies by all weights in fp32 takes
less.

Without a text the lines are random words, as many as in lines of Penn Treebank. The weights are random: what they say
does not matter.
"""

import io
import sys
from itertools import islice
from pathlib import Path

import numpy
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package

import baseline
from recipes import RECIPES
from timing import as_pytorch, as_shipped, machine, medians, multiply_adds, peaks, seconds

import main
import score
from errors import BadInput
from flags import Parser, positive_int
from model import ARCHITECTURE, RNNModel
from process import run_script
from stream import batches, read_lines
from vocabulary import END, Dictionary

COLUMNS = ("a word at a time", "a line at a time", "--batch-size 1", "score.py", "floor")
MODELS = ("ptb-lstm", "ptb-qrnn", "small")
TYPES, MEAN, DEVIATION, LONGEST = 10_000, 21, 10, 80  # of Penn Treebank: words, and words of a line


def make_lines(count):
    """Make lines of random words, bytes."""
    random = numpy.random.default_rng(0)
    lengths = random.normal(MEAN, DEVIATION, count).clip(1, LONGEST).astype(int)
    return [" ".join(f"word{i}" for i in random.integers(TYPES - 1, size=length)).encode() + b"\n"
            for length in lengths]


@torch.no_grad()
def score_plainly(model, dictionary, lines):
    """Score lines one at a time with PyTorch's stock parts; returns the log-probability of each."""
    known, scores = dictionary.word2idx, []
    for line in lines:
        ids = torch.tensor([[known[END]], *([known[word]] for word in [*line.decode().split(), END])])
        output, _, _ = model(ids[:-1], model.init_hidden(1))
        logits = functional.linear(output.squeeze(1), model.decoder.weight, model.decoder.bias)
        scores.append(logits.log_softmax(1).gather(1, ids[1:]).sum().item())
    return scores


@torch.no_grad()
def score_by_words(model, dictionary, lines):
    """Score lines one word at a time with PyTorch's stock parts; returns the log-probability of each."""
    known, scores = dictionary.word2idx, []
    for line in lines:
        hidden, before, total = model.init_hidden(1), known[END], 0.0
        for word in [*line.decode().split(), END]:
            output, hidden, _ = model(torch.tensor([[before]]), hidden)
            before = known[word]
            total += model.decoder(output[0, 0]).log_softmax(0)[before].item()
        scores.append(total)
    return scores


def score_as_shipped(model, dictionary, lines, batch_size):
    """Score lines as `score.py` does; returns what it writes."""
    scorer, written = score.Scorer(model, dictionary, batch_size), []
    arrived = read_lines(io.BytesIO(b"".join(lines)), dictionary, "word", no_eos=False)
    for batch in batches(arrived, score.BATCHES * batch_size):
        written += [score.format_line(line, scores, False, False) for line, scores in zip(batch, scorer(batch))]
    return written


def measure(recipe, lines, few, repetitions, peak):
    """Return the lines per second of each way to score `lines`; those that score one at a time take `few` of them.

    `peak` is the speed of a product, FLOP/s.
    """
    args = main.parse_flags(RECIPES[recipe]["train"].split())
    words = {word.decode(): None for line in lines for word in line.split()}
    dictionary = Dictionary([END, *words])
    few = min(few, len(lines))
    flags = {name: getattr(args, name) for name in ARCHITECTURE}
    plain, model = baseline.PlainModel(len(dictionary), args).eval(), RNNModel(len(dictionary), **flags).eval()
    weights = plain.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    candidates = {"a word at a time": as_pytorch(lambda: score_by_words(plain, dictionary, lines[:few])),
                  "a line at a time": as_pytorch(lambda: score_plainly(plain, dictionary, lines[:few])),
                  "--batch-size 1": as_shipped(lambda: score_as_shipped(model, dictionary, lines[:few], 1)),
                  "score.py": as_shipped(lambda: score_as_shipped(model, dictionary, lines, 64))}
    written = [float(row.split("\t")[0]) for row in candidates["score.py"]()[:few]]
    for name in ("a word at a time", "a line at a time"):
        assert numpy.allclose(written, candidates[name](), rtol=1e-5, atol=1e-4)
    times = medians(candidates, repetitions, seconds)
    rates = {name: (len(lines) if name == "score.py" else few) / time for name, time in times.items()}
    tokens = sum(len(line.split()) + 1 for line in lines)
    return rates | {"floor": len(lines) * peak / (2 * multiply_adds(model) * tokens)}


def run():
    parser = Parser(description="Measure the speed of scoring lines.")
    parser.add_argument("--text", metavar="FILE", help="lines to score (default: random words)")
    parser.add_argument("--lines", type=positive_int, default=10_000, metavar="N",
                        help="how many (default: %(default)s)")
    parser.add_argument("--few", type=positive_int, default=100, metavar="N",
                        help="how many one at a time, of all lengths (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, metavar="RECIPE",
                        help="models (default: all)")
    parser.add_argument("--repetitions", type=positive_int, default=3, metavar="N",
                        help="turns of each (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    lines = make_lines(args.lines)
    if args.text:
        try:
            with open(args.text, "rb") as file:
                lines = list(islice(file, args.lines))
        except OSError as error:
            raise BadInput(f"--text {args.text}: cannot be read: {error.strerror}") from error
        if not lines:
            raise BadInput(f"--text {args.text}: is empty")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"\n{len(lines):,} lines; lines/s, and in brackets how many times a line at a time\n")
    peak = peaks(args.repetitions)["fp32"]
    print(f"| model     | {' | '.join(name.rjust(18) for name in COLUMNS)} |")
    print(f"|-----------|{'|'.join('-' * 19 + ':' for _ in COLUMNS)}|")
    for recipe in args.only:
        rates = measure(recipe, lines, args.few, args.repetitions, peak)
        cells = (f"{rates[name]:,.1f} ({rates[name] / rates['a line at a time']:.1f})" for name in COLUMNS)
        print(f"| {recipe:9} | {' | '.join(cell.rjust(18) for cell in cells)} |", flush=True)


if __name__ == "__main__":
    run_script(run)
