"""Choose what a run of some minutes is like (`main.py --minutes`): level, sizes, dropouts, batch, learning rate.

The rules come from the measurements in `docs/rules.md`. What a flag says is not chosen. Shapes are in the alphabet of
`model.py`.
"""

import math
import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace

import torch

from budget import Budget
from device import computes_in
from errors import BadInput, lacks_memory
from flags import NO_LIMIT, command_line
from model import ARCHITECTURE, DROPOUTS, parameter_shapes
from optimizers import make_optimizer
from run import make_model
from steps import choose_pass, train_step

LADDER = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)  # units of a layer
TOKENS_PER_WEIGHT = 2      # of the layers; with fewer a smaller model gets further in the time
OF_THE_TIME = 0.9          # share for training of what is left after the start; the rest is for validation and test
PASSES = 3                 # forward, and backward with twice the products
WORD_EMSIZE = 400          # the largest embedding of words
ENOUGH_STEPS = {"adam": 2000, "sgd": 3000}  # of training; if there would be fewer, batches are made smaller
FEWEST_COLUMNS = {"word": 4, "char": 8, "byte": 8}  # of a process
BPTT = 64
MANY_EPOCHS = {"word": 6, "char": 8, "byte": 8}  # from which on there are two layers
SGD_EPOCHS = {"word": 3, "char": 12, "byte": 12}  # from which on SGD, with AR and TAR, gets further than Adam
SGD_LR, LEAST_SGD_LR = 20.0, 0.5  # a smaller one that is given is meant for Adam
MOST_EPOCHS = {"word": 100, "char": 30, "byte": 30}  # with more, only the text itself would be learned better
# The strain of a text is its epochs times the weights of the layers for each of its tokens, 0 if it is read once. Weak
# dropouts are for a strain from WEAK_FROM to WEAK_TO, strong ones from STRONG_FROM on. Between these two, dropouts grow
# with its logarithm.
WEAK_DROPOUTS = {"dropout": 0.2, "dropouth": 0.2, "dropouti": 0.05, "dropoute": 0.0, "wdrop": 0.1}
WEAK_FROM, WEAK_TO = 10, 60
STRONG_DROPOUTS = {"word": {"dropout": 0.5, "dropouth": 0.3, "dropouti": 0.5, "dropoute": 0.1, "wdrop": 0.5},
                   **dict.fromkeys(("char", "byte"), {"dropout": 0.4, "dropouth": 0.3, "dropouti": 0.1,
                                                      "dropoute": 0.0, "wdrop": 0.3})}
STRONG_FROM = {"word": 300, "char": 180, "byte": 180}

# A model whose steps are timed before one is chosen, the most words that it has, and how many steps are timed.
PROBED = {"nlayers": 1, "nhid": 256, "emsize": 256, **dict.fromkeys((*DROPOUTS, "alpha", "beta"), 0.0),
          "optimizer": "adam"}
MOST_PROBED, PROBE_STEPS = 10_000, 4
MOST_PROBING = 0.02        # the share of the time after which no further step is timed

SAVES, LEAST_INTERVAL = 10, 1.0  # states saved within a run, in case it is killed, and the least minutes between two


def choose_level(args, given):
    """Set the level of a text in one file to characters, unless it is given.

    Every text has few different characters. A folder says its level itself.
    """
    if "level" not in given and os.path.isfile(args.data):
        args.level = "char"


def choose_flags(args, given, corpus, device, processes=1):
    """Set the flags of `args` that are not in `given` to what suits the text, the minutes and the `processes`.

    A small model does fewer multiply-adds a second than a large one. So the chosen model is timed, and all is chosen
    again at its speed.
    """
    ntoken, tokens = len(corpus.dictionary), max(1, len(corpus.train))  # no text at all is refused later
    asked, probed = dict(vars(args)), {**PROBED, "bptt": BPTT, "batch_size": batch_size(tokens, processes)}
    vars(args).update({name: value for name, value in probed.items() if name not in given})
    for _ in range(2):
        speed = processes * probe(args, min(ntoken, MOST_PROBED), device, processes)
        vars(args).update(asked)
        left = 60 * Budget(args.minutes).minutes_left()
        choose_by(OF_THE_TIME * left * speed, args, given, ntoken, tokens, processes, on_cpu=device.type == "cpu")


def choose_by(budget, args, given, ntoken, tokens, processes, on_cpu):
    """Set the flags of `args` that are not in `given` to what suits `tokens` of a text and `budget` multiply-adds."""
    def choose(**chosen):
        for name, value in chosen.items():
            if name not in given:
                setattr(args, name, value)

    choose(nlayers=2 if args.model == "QRNN" and args.level != "word" else 1)
    choose(epochs=MOST_EPOCHS[args.level], bptt=BPTT, batch_size=batch_size(tokens, processes))
    choose(save_interval=min(args.save_interval, max(round(args.minutes / SAVES, 2), LEAST_INTERVAL)))

    def choose_size():
        fitting = [size for size in LADDER if sees_enough(sized(args, given, size), ntoken, tokens, budget)]
        choose(nhid=fitting[-1] if fitting else LADDER[0])
        choose(emsize=embedding_size(args.nhid, args.level))
        return min(tokens_seen(args, ntoken, budget) / tokens, args.epochs)

    epochs = choose_size()
    too_wide = args.tied and args.nhid != args.emsize  # a single tied layer is as wide as the embedding
    if epochs >= MANY_EPOCHS[args.level] or too_wide:
        choose(nlayers=2)
        epochs = choose_size()
    strain = epochs * weights(args, ntoken, recurrent=True) / tokens if epochs > 1 else 0.0
    choose(**dropouts(strain, args.level))
    sgd = args.lr >= LEAST_SGD_LR if "lr" in given else epochs >= SGD_EPOCHS[args.level]
    choose(optimizer="sgd" if sgd else "adam")
    if args.optimizer == "sgd":
        # Clip, alpha and beta are those of the papers. Averages are no better than a rate that falls to nothing.
        choose(lr=SGD_LR, nonmono=NO_LIMIT)
    else:
        choose(lr=learning_rate(args.nhid), clip=1.0, alpha=0.0, beta=0.0)
    if on_cpu:  # there few columns take little more time
        rows = epochs * tokens / args.bptt  # of all batches
        steps = ENOUGH_STEPS[args.optimizer]
        choose(batch_size=fewer_columns(args.batch_size, rows, steps, FEWEST_COLUMNS[args.level] * processes))


def sized(args, given, nhid):
    """Return `args` with layers of `nhid` units, and an embedding that goes with them if none is in `given`.

    That of a single tied layer always does.
    """
    fixed = "emsize" in given and not (args.tied and args.nlayers == 1)
    emsize = args.emsize if fixed else embedding_size(nhid, args.level)
    return Namespace(**{**vars(args), "nhid": nhid, "emsize": emsize})


def sees_enough(args, ntoken, tokens, budget):
    """Return whether a model of these flags sees enough tokens in the time and in --epochs of a text of `tokens`."""
    seen = min(tokens_seen(args, ntoken, budget), args.epochs * tokens)
    return seen >= TOKENS_PER_WEIGHT * weights(args, ntoken, recurrent=True)


def tokens_seen(args, ntoken, budget):
    """Return the tokens that a model of these flags is trained on with `budget` multiply-adds."""
    return budget / weights(args, ntoken) / PASSES


def embedding_size(nhid, level):
    return min(nhid, WORD_EMSIZE) if level == "word" else nhid


def weights(args, ntoken, recurrent=False):
    """Count the weights that a token is multiplied by; only those of the layers if `recurrent`."""
    shapes = parameter_shapes(ntoken, **{name: getattr(args, name) for name in ARCHITECTURE})
    return sum(math.prod(shape) for name, shape in shapes.items()
               if len(shape) == 2 and name != "encoder.weight" and (name.startswith("rnns") or not recurrent))


def batch_size(tokens, processes):
    """Choose the columns of a batch: fewer for a short text, so that they are long, and one for each process."""
    return max(16 if tokens < 2**22 else 32, processes)


def fewer_columns(columns, rows, steps, fewest):
    """Halve the columns of a batch, not below `fewest`, until `rows` of --bptt tokens make `steps` batches."""
    while columns // 2 >= fewest and rows / columns < steps:
        columns //= 2
    return columns


def learning_rate(nhid):
    return 4e-3 if nhid <= 384 else 3e-3


def dropouts(strain, level):
    """Choose dropouts for a text of this `strain`: epochs times weights of the layers for each token.

    A model that is small beside its text needs none. From WEAK_FROM on there is weight drop too.
    """
    if strain < WEAK_FROM:
        p = round(WEAK_DROPOUTS["dropout"] * math.log(max(strain, 1)) / math.log(WEAK_FROM), 2)
        return {"dropout": p, "dropouth": p, "dropouti": 0.0, "dropoute": 0.0, "wdrop": 0.0}
    share = math.log(strain / WEAK_TO) / math.log(STRONG_FROM[level] / WEAK_TO)
    share, strong = min(max(share, 0.0), 1.0), STRONG_DROPOUTS[level]
    return {name: round(p + share * (strong[name] - p), 2) for name, p in WEAK_DROPOUTS.items()}


def probe(args, ntoken, device, processes=1):
    """Measure the multiply-adds a second of a training step of these flags, on the columns of one of `processes`.

    Raises BadInput when there is no memory for it, or its loss is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        model = make_model(ntoken, args, device).train()
        tokens = torch.randint(ntoken, (args.bptt, max(1, args.batch_size // processes)), device=device)
        try:
            return PASSES * tokens.numel() * weights(args, ntoken) / step_seconds(model, tokens, args)
        except RuntimeError as error:
            if lacks_memory(error):
                raise BadInput("out of memory in a training step of this size; smaller layers, a smaller --batch_size "
                               "or --bptt may help") from error
            raise
        except FloatingPointError as error:
            raise BadInput(f"the first training step: {error}") from error


def step_seconds(model, tokens, args):
    """Time training steps of `model` on `tokens` (T, B); returns the seconds of the fastest but the first.

    There are fewer steps if they take much of the time. The learning rate is 0, so that none is too large.
    """
    optimizer = make_optimizer(args.optimizer, model, 0.0, args.wdecay)
    precision = args.precision if computes_in(args.precision, tokens.device) else "fp32"
    forward_backward = choose_pass(model, precision, args.alpha, args.beta)
    hidden = model.init_hidden(tokens.size(1))
    seconds = []
    for _ in range(PROBE_STEPS):
        start = time.perf_counter()
        hidden, _ = train_step(model, optimizer, forward_backward, tokens, tokens, hidden, 1, args.clip)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > MOST_PROBING * 60 * args.minutes:
            break
    return min(seconds[1:] or seconds)


def describe(args, given):
    """Spell the command whose flags say what was chosen."""
    names = ["data", "minutes", "save_interval", "level", *ARCHITECTURE, *DROPOUTS, "alpha", "beta", "optimizer", "lr",
             "clip", *(["nonmono"] if args.optimizer == "sgd" else []), "batch_size", "bptt", "epochs"]
    names += sorted(given - {*names, "overwrite", "resume", "dry_run"})
    flags = [word for name in names for word in command_line(name, getattr(args, name))]
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    return join(["python", "main.py", *flags])
