"""Score lines of text: their log-probabilities under a trained model.

    python score.py --checkpoint PTB.pt lines.txt
    echo "the company said" | python score.py --checkpoint PTB.pt --per-word
    python score.py --checkpoint PTB.pt --carry data/penn/test.txt                  (the lines are one text)

Writes for each line, separated by tabs: log-probability (nats), tokens, unknown tokens, perplexity. The totals come
last, on stderr. Shapes are in the alphabet of `model.py`.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import process

    process.begin()


import json
import math
import sys
from argparse import ArgumentTypeError
from dataclasses import dataclass
from itertools import islice

import torch

import checkpoint
from cache import Cache
from device import set_up_device
from errors import BadInput
from flags import Parser, add_device_flags, non_negative_float, positive_int, probability
from metrics import loss_metrics
from process import run_script
from stream import batches, read_lines
from vocabulary import END, Dictionary

BATCHES = 16  # batches scored before they are written, so that more lines of one length meet
LOGITS = 2**22  # most values of a softmax at a time: they stay in the cache


def parse_flags(argv):
    parser = Parser(description="Score lines of text under a trained model.")
    parser.add_argument("file", nargs="?", default="-", metavar="FILE", help="lines of text (default and -: stdin)")
    parser.add_argument("--checkpoint", default="model.pt", metavar="FILE",
                        help="the trained model (default: %(default)s)")
    parser.add_argument("--carry", action="store_true",
                        help="the lines are one text: the hidden state goes on from line to line, and the first token "
                             "is not predicted (default: each line follows an <eos>, or fastai's xxbos)")
    parser.add_argument("--no-eos", action="store_true", help="do not score the <eos> that ends a line")
    parser.add_argument("--per-word", action="store_true",
                        help="also write each token and its log-probability, an empty line after each line")
    parser.add_argument("--json", action="store_true", help="write a JSON object a line")
    parser.add_argument("--cache", nargs=3, metavar=("WINDOW", "THETA", "LAMBDA"),
                        help="with a neural cache on top, as in pointer.py; needs --carry")
    parser.add_argument("--batch-size", type=positive_int, metavar="B",
                        help="lines scored at once (default: 64; 1 with --carry)")
    add_device_flags(parser)
    args = parser.parse_args(argv)
    if args.cache and not args.carry:
        raise BadInput("--cache: a cache remembers the lines before, so it needs --carry")
    if args.carry and args.batch_size not in (None, 1):
        raise BadInput("--batch-size: the lines of one text are scored one after the other, so it is 1 with --carry")
    args.batch_size = args.batch_size or 64
    return args


def make_cache(values):
    """Make the Cache that the flag --cache asks for; None without it. Raises BadInput for values out of range."""
    if values is None:
        return None
    try:
        window, theta, lambdasm = values
        return Cache([positive_int(window)], [non_negative_float(theta)], [probability(lambdasm)])
    except ArgumentTypeError as error:
        raise BadInput(f"--cache: {error}") from error


# --- scoring ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def logprobs(model, columns, hidden, pad, cache=None):
    """Compute the log-probabilities, in nats, of the ids of each column after its first.

    Shorter columns are filled up with the id `pad`. Long ones are read in pieces, in memory that does not grow
    with them. A `cache` is for one column. Returns a list of floats for each column, and the last hidden state.
    """
    lengths = [len(ids) - 1 for ids in columns]
    widest = max(len(model.decoder.bias), *(4 * rnn.hidden_size for rnn in model.rnns))
    steps = max(1, LOGITS // (len(columns) * widest))
    device, logprobs_of = model.decoder.bias.device, [[] for _ in columns]
    for start in range(0, max(lengths), steps):
        stop = min(start + steps, max(lengths)) + 1
        piece = [ids[start:stop] + [pad] * (stop - start - len(ids[start:stop])) for ids in columns]
        piece = torch.tensor(piece, device=device).t()
        output, hidden, raw = model(piece[:-1], hidden)
        scores = model.target_logprob(output, piece[1:])
        if cache:
            scores = cache.mix(raw.squeeze(1), piece[1:, 0], scores.squeeze(1)).view(-1, 1)
        scores = scores.double().t().tolist()
        for column, length in enumerate(lengths):
            logprobs_of[column] += scores[column][:max(0, length - start)]
    return logprobs_of, hidden


class Scorer:
    """Score lists of Lines, up to `batch_size` at a time.

    With `carry` they are one text, else each follows an <eos>.
    """

    def __init__(self, model, dictionary, batch_size, carry=False, cache=None):
        self.model, self.batch_size, self.carry, self.cache = model.eval(), batch_size, carry, cache
        self.start = dictionary.start_id()
        self.hidden, self.context = model.init_hidden(1), []  # of the text so far: state, and id not yet read

    def __call__(self, lines):
        """Return the log-probabilities of the tokens of each line; that of a text's first token is None."""
        if self.carry:
            return self.go_on(lines)
        logprobs_of = [[] for _ in lines]
        for group in groups([len(line.ids) for line in lines], self.batch_size):
            columns = [[self.start, *lines[i].ids] for i in group]
            scores, _ = logprobs(self.model, columns, self.model.init_hidden(len(group)), self.start)
            for i, score in zip(group, scores):
                logprobs_of[i] = score
        return logprobs_of

    def go_on(self, lines):
        """Score the next lines of the text."""
        ids, scores = self.context + [i for line in lines for i in line.ids], []
        if ids and not self.context:
            scores.append(None)
        if len(ids) > 1:
            (new,), self.hidden = logprobs(self.model, [ids], self.hidden, self.start, self.cache)
            scores += new
        self.context = ids[-1:]
        scores = iter(scores)
        return [list(islice(scores, len(line.ids))) for line in lines]


def groups(lengths, size):
    """Yield lists of up to `size` indices of lines, by rising length.

    A list also ends where padding would be much of the work. Lines without a token are left out.
    """
    group, written = [], [i for i, length in enumerate(lengths) if length]
    for i in sorted(written, key=lambda i: lengths[i]):
        if len(group) == size or (group and lengths[i] > 2 * lengths[group[0]] + 8):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


# --- writing ---------------------------------------------------------------------------------------------------------

@dataclass
class Totals:
    """Sum log-probabilities and tokens, and those of the tokens that the model knows."""
    logprob: float = 0.0
    tokens: int = 0
    known_logprob: float = 0.0
    known_tokens: int = 0

    def add(self, scores, unknown):
        for score, is_unknown in zip(scores, unknown):
            if score is not None:
                self.logprob += score
                self.tokens += 1
                if not is_unknown:
                    self.known_logprob += score
                    self.known_tokens += 1

    @property
    def unknown(self):
        return self.tokens - self.known_tokens

    @property
    def ppl(self):
        return perplexity(self.logprob, self.tokens)

    def describe(self):
        known = perplexity(self.known_logprob, self.known_tokens)
        return (f"total: log-probability {self.logprob:.4f}, {self.tokens} tokens, "
                f"{self.unknown} unknown, perplexity {self.ppl:.4f}, without unknown {known:.4f}")


def perplexity(logprob, tokens):
    """Compute e^(-log-probability / tokens); NaN without tokens, infinity if it is too large."""
    if not tokens:
        return math.nan
    return loss_metrics(-logprob / tokens)["ppl"]


def finite(value):
    """Return a number as JSON has it: None for one that is not finite, and for None."""
    return value if value is not None and math.isfinite(value) else None


def format_line(line, scores, per_word, as_json):
    """Format the scores of a line as the flags ask."""
    totals = Totals()
    totals.add(scores, line.unknown)
    words = list(zip(line.tokens, scores)) if per_word else []
    if as_json:
        values = {"logprob": finite(totals.logprob), "tokens": totals.tokens, "unknown": totals.unknown,
                  "ppl": finite(totals.ppl)}
        words = [(word, finite(score)) for word, score in words]
        return json.dumps(values | ({"words": words} if per_word else {}))  # ASCII: any stream can take it
    row = f"{totals.logprob:.6f}\t{totals.tokens}\t{totals.unknown}\t{totals.ppl:.4f}"
    rows = [f"{word}\t{'nan' if score is None else f'{score:.6f}'}" for word, score in words]
    return "\n".join([row, *rows, ""] if per_word else [row])


def main(argv=None):
    args = parse_flags(argv)
    if args.file == "-" and sys.stdin is None:
        raise BadInput("there is no standard input; give a file")
    device = set_up_device(args.cuda)
    content = checkpoint.load_model(args.checkpoint, device)
    model = checkpoint.restore_model(content, args.checkpoint, device=device)
    dictionary, level = Dictionary(content["vocabulary"]), content["flags"].get("level", "word")
    if not args.no_eos and END not in dictionary.word2idx:
        raise BadInput(f"{args.checkpoint}: its vocabulary has no {END} to end a line with; --no-eos scores without")
    try:
        # The thread that reads has the stream to itself; stdin's own would be locked when the process ends.
        file = open(sys.stdin.fileno() if args.file == "-" else args.file, "rb", closefd=args.file != "-")  # noqa: SIM115
    except OSError as error:
        raise BadInput(f"{args.file}: cannot be read: {error.strerror or error}") from error
    scorer = Scorer(model, dictionary, args.batch_size, args.carry, make_cache(args.cache))
    totals, arrived = Totals(), read_lines(file, dictionary, level, args.no_eos)
    try:
        for lines in batches(arrived, BATCHES * args.batch_size):
            for line, scores in zip(lines, scorer(lines)):
                totals.add(scores, line.unknown)
                print(format_line(line, scores, args.per_word, args.json))
            if sys.stdout is not None:
                sys.stdout.flush()
    except BadInput as error:
        raise BadInput(f"{'standard input' if args.file == '-' else args.file}: {error}") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BadInput(f"standard output: could not be written: {error.strerror}") from error
    print(totals.describe(), file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
