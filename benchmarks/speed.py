"""Measure how fast the toolkit is on this machine's CPU (for a GPU see `gpu_check.py`).

Each part is compared with a plain baseline (`baseline.py`), the same step without any regularisation, and the floor
that the matrix products set. All run in one process.

    python benchmarks/speed.py --json speed.json           (make bench; 20 to 30 minutes on 2 idle cores)
    python benchmarks/speed.py --only ptb-lstm cache-500

Each figure is the median over repetitions in which all candidates take turns, each called twice and timed the second
time. Text is random: its words do not matter.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package

import baseline
import recipes
from timing import as_pytorch, as_shipped, clock, machine, medians, multiply_adds, peaks

import cache
import generate
import main
import steps
from data import Corpus
from device import has_bf16
from files import check_writable
from flags import Parser, positive_int
from model import ARCHITECTURE, DROPOUTS, RNNModel
from optimizers import make_optimizer
from process import run_script
from products import packs_bf16
from steps import choose_pass

VOCABULARY = {"ptb-lstm": 10_000, "ptb-qrnn": 10_000, "wt2-lstm": 33_278, "ptbc": 50, "wt103-qrnn": 267_735}
RECIPES = {name: (ntoken, recipes.RECIPES[name]["train"]) for name, ntoken in VOCABULARY.items()}  # and flags
ON_A_CPU = ("ptb-lstm", "ptb-qrnn", "wt2-lstm", "ptbc")
PARTS = ("embedding", "recurrence", "softmax", "optimizer")
PLAIN_WORDS = 40  # that the baseline samples in a call
NO_REGULARISATION = dict.fromkeys((*DROPOUTS, "alpha", "beta", "wdecay", "clip"), 0)


def flags_of(recipe, **changes):
    args = main.parse_flags(RECIPES[recipe][1].split())
    args.lr = args.lr or 1.0
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def our_model(recipe, args):
    return RNNModel(RECIPES[recipe][0], **{name: getattr(args, name) for name in ARCHITECTURE + DROPOUTS})


def our_step(recipe, words, targets, **changes):
    """Make a function that takes a training step of the toolkit on the device of `words`."""
    args = flags_of(recipe, **changes)
    model = our_model(recipe, args).to(words.device).train()
    optimizer = make_optimizer(args.optimizer, model, args.lr, args.wdecay)
    hidden = model.init_hidden(args.batch_size)
    forward_backward = choose_pass(model, args.precision, args.alpha, args.beta, args.cuda_graphs)
    return lambda: steps.train_step(model, optimizer, forward_backward, words, targets, hidden, 1.0, args.clip)


def plain_step(recipe, words, targets):
    """Make a function that takes a training step of the baseline on the device of `words`."""
    args = flags_of(recipe)
    model = baseline.PlainModel(RECIPES[recipe][0], args).to(words.device).train()
    optimizer_class = torch.optim.Adam if args.optimizer == "adam" else torch.optim.SGD
    optimizer = optimizer_class(model.parameters(), lr=args.lr, weight_decay=args.wdecay)
    hidden = model.init_hidden(args.batch_size)
    return lambda: baseline.train_step(model, optimizer, words, targets, hidden, args)


def step_in_parts(recipe, words, targets, precision, repetitions):
    """Measure the share of each of PARTS in the time of a training step, which is cut at their borders."""
    args = flags_of(recipe, precision=precision)
    model = our_model(recipe, args).to(words.device).train()
    optimizer = make_optimizer(args.optimizer, model, args.lr, args.wdecay)
    hidden = model.init_hidden(args.batch_size)
    turns = []
    for _ in range(repetitions + 1):
        marks = [clock()]
        with torch.autocast(words.device.type, torch.bfloat16, enabled=precision == "bf16"):
            embedded = model.embed(words)
            cut = embedded.detach().requires_grad_()
            marks.append(clock())
            output, _, raw = model.recur(cut, hidden)
            tops = [top.detach().requires_grad_() for top in (output, raw)]
            marks.append(clock())
            loss = model.loss(tops[0], targets)
        if args.alpha:
            loss = loss + args.alpha * tops[0].pow(2).mean()
        if args.beta:
            loss = loss + args.beta * (tops[1][1:] - tops[1][:-1]).pow(2).mean()
        loss.backward()
        marks.append(clock())
        reached = [(top, cut_top.grad) for top, cut_top in zip((output, raw), tops) if cut_top.grad is not None]
        torch.autograd.backward(*zip(*reached))
        marks.append(clock())
        embedded.backward(cut.grad)
        marks.append(clock())
        clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        marks.append(clock())
        seconds = [end - start for start, end in zip(marks, marks[1:])]  # of the parts forward, then backward
        embed, recur, softmax, recur_back, embed_back, update = seconds
        turns.append((embed + embed_back, recur + recur_back, softmax, update))
    times = [statistics.median(part) for part in zip(*turns[1:])]
    return {name: part / sum(times) for name, part in zip(PARTS, times)}


def measure_recipe(recipe, peak, repetitions):
    """Measure tokens per second of the training step by candidate, and the shares of its parts."""
    args = flags_of(recipe)
    text = torch.randint(RECIPES[recipe][0], (args.bptt + 1, args.batch_size))
    words, targets, tokens = text[:-1], text[1:], args.bptt * args.batch_size
    plain = plain_step(recipe, words, targets)
    candidates = {"baseline": as_pytorch(plain), "baseline, set up": as_shipped(plain),
                  "no regularisation": as_shipped(our_step(recipe, words, targets, **NO_REGULARISATION)),
                  "fp32": as_shipped(our_step(recipe, words, targets))}
    precisions = ["fp32"]
    if has_bf16():
        precisions.append("bf16")
        candidates["bf16"] = as_shipped(our_step(recipe, words, targets, precision="bf16"))
    times = medians(candidates, repetitions)
    model = our_model(recipe, args)
    times |= {f"floor {precision}": 6 * multiply_adds(model) * tokens / peak[precision] for precision in precisions}
    shares = {precision: as_shipped(lambda p=precision: step_in_parts(recipe, words, targets, p, repetitions))()
              for precision in precisions}
    return {"unit": "tokens/s", "rate": {name: tokens / time for name, time in times.items()}, "shares": shares}


def measure_evaluation(peak, repetitions):
    args = flags_of("ptb-lstm")
    ntoken = RECIPES["ptb-lstm"][0]
    source, tokens = torch.randint(ntoken, (281, 10)), 2800
    plain, ours = baseline.PlainModel(ntoken, args), our_model("ptb-lstm", args)
    times = medians({"baseline": as_pytorch(lambda: steps.evaluate(plain, source, args.bptt)),
                     "fp32": as_shipped(lambda: steps.evaluate(ours, source, args.bptt))}, repetitions)
    times["floor fp32"] = 2 * multiply_adds(ours) * tokens / peak["fp32"]
    return {"unit": "tokens/s", "rate": {name: tokens / time for name, time in times.items()}}


def measure_cache(window, peak, repetitions):
    """Measure the cache alone, on outputs as a model of 400 units gives them."""
    few, many, ntoken = window + 41, window + 8001, 10_000
    outputs, targets = torch.randn(many, 400) * 0.1, torch.randint(1000, (many,))
    logprob, history = torch.full((many,), -6.0), functional.one_hot(targets[:few], ntoken).float()
    losses = {}

    def plain():
        losses["baseline"] = baseline.cache_loss(outputs[:few], targets[:few], logprob[:few], history, window, 1.0,
                                                0.1)

    def ours(n):
        chunk = outputs[:n], targets[:n], logprob[:n]
        losses["fp32"] = cache.mixture_losses([chunk], [window], [1.0], [0.1]).item() * n - 6.0 * (window + 1)

    ours(few)
    plain()
    assert abs(losses["fp32"] - losses["baseline"]) < 1e-5 * 40, losses
    times = medians({"baseline": as_pytorch(plain), "fp32": as_shipped(lambda: ours(many))}, repetitions)
    rate = {"baseline": (few - window - 1) / times["baseline"], "fp32": many / times["fp32"],
            "floor fp32": peak["fp32"] / (2 * 400 * window)}
    return {"unit": "tokens/s", "rate": rate}


def measure_corpus(repetitions):
    """Measure the loading of a corpus of the size of Penn Treebank's, words as frequent as in language."""
    with tempfile.TemporaryDirectory() as folder:
        for split, tokens in (("train", 900_000), ("valid", 70_000), ("test", 80_000)):
            ids = numpy.random.default_rng(0).zipf(1.2, tokens) % 10_000
            lines = (" ".join(f"word{i}" for i in ids[n:n + 20]) for n in range(0, tokens, 20))
            (Path(folder) / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        times = medians({"baseline": lambda: baseline.load_corpus(Path(folder)),
                         "fp32": lambda: Corpus(folder)}, min(3, repetitions))
    return {"unit": "tokens/s", "rate": {name: 1_102_500 / time for name, time in times.items()}}


def measure_generation(repetitions):
    """Measure words per second: a full call of the training module for each against `generate.sample`."""
    args = flags_of("ptb-lstm")
    ntoken = RECIPES["ptb-lstm"][0]
    plain, models = baseline.PlainModel(ntoken, args).eval(), {"fp32": our_model("ptb-lstm", args)}
    if packs_bf16():
        models["bf16"] = our_model("ptb-lstm", args)
        models["bf16"].pack()

    @torch.no_grad()
    def word_by_word():
        hidden, word = plain.init_hidden(1), torch.zeros(1, 1, dtype=torch.long)
        for _ in range(PLAIN_WORDS):
            output, hidden, _ = plain(word, hidden)
            word = torch.multinomial(plain.decoder(output[-1]).softmax(-1), 1)

    def sampled(model, length, batch_size):
        return lambda: list(generate.sample(model, torch.zeros(1, dtype=torch.long), length, batch_size=batch_size))

    candidates, words = {"baseline": as_pytorch(word_by_word)}, {"baseline": PLAIN_WORDS}
    for name, model in models.items():
        for suffix, length, batch_size in (("", 200, 1), (", --batch 100", 40, 100)):
            candidates[name + suffix] = as_shipped(sampled(model, length, batch_size))
            words[name + suffix] = length * batch_size
    times = medians(candidates, repetitions)
    return {"unit": "words/s", "rate": {name: words[name] / time for name, time in times.items()}}


COLUMNS = ("baseline", "baseline, set up", "no regularisation", "fp32", "bf16", "fp32, --batch 100",
           "bf16, --batch 100", "floor fp32", "floor bf16")


def table(results):
    """Yield the lines of Markdown tables: rates, and as how many times the baseline; then the shares of the parts."""
    yield f"| {'':14} | {'unit':8} | " + " | ".join(f"{name:>17}" for name in COLUMNS) + " |"
    yield f"|{'-' * 16}|{'-' * 10}|" + "|".join("-" * 18 + ":" for _ in COLUMNS) + "|"
    for name, found in results.items():
        rate = found["rate"]
        cells = (f"{rate[column]:,.0f} ({rate[column] / rate['baseline']:,.2f})" if column in rate else ""
                 for column in COLUMNS)
        yield f"| {name:14} | {found['unit']:8} | " + " | ".join(f"{cell:>17}" for cell in cells) + " |"
    yield ""
    yield f"| {'share of the step':24} | " + " | ".join(f"{part:>10}" for part in PARTS) + " |"
    yield f"|{'-' * 26}|" + "|".join("-" * 11 + ":" for _ in PARTS) + "|"
    for name, found in results.items():
        for precision, shares in found.get("shares", {}).items():
            yield f"| {f'{name}, {precision}':24} | " + " | ".join(f"{shares[part]:>10.0%}" for part in PARTS) + " |"


def run():
    parser = Parser(description="Measure the speed of the toolkit on the CPU.")
    jobs = {**{recipe: lambda peak, n, recipe=recipe: measure_recipe(recipe, peak, n) for recipe in ON_A_CPU},
            "evaluation": measure_evaluation,
            "cache-500": lambda peak, n: measure_cache(500, peak, n),
            "cache-3785": lambda peak, n: measure_cache(3785, peak, n),
            "corpus": lambda _, n: measure_corpus(n),
            "generation": lambda _, n: measure_generation(n)}
    parser.add_argument("--only", nargs="+", choices=list(jobs), default=list(jobs), metavar="NAME",
                        help=f"what to measure: {', '.join(jobs)} (default: all)")
    parser.add_argument("--repetitions", type=positive_int, default=5, metavar="N",
                        help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go too")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json)
    torch.manual_seed(0)
    peak = peaks(args.repetitions)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(", ".join(f"peak of a product in {name} {value / 1e9:,.0f} GFLOP/s" for name, value in peak.items()))
    results = {}
    for name in args.only:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        results[name] = jobs[name](peak, args.repetitions)
    print("\nRates, and in brackets how many times the baseline.\n")
    print("\n".join(table(results)))
    if args.json:
        Path(args.json).write_text(json.dumps({**machine(), "peak": peak, "results": results}, indent=1) + "\n",
                                   encoding="utf-8")


if __name__ == "__main__":
    run_script(run)
