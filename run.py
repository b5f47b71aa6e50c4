"""Hold a run of training: flags, text, model, optimizer, and how far it has come.

Shapes are in the alphabet of `model.py`.
"""

import math
from argparse import Namespace
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from budget import Budget
from data import Corpus, load_split
from errors import BadInput
from metrics import Metrics, log
from model import ARCHITECTURE, DROPOUTS, RNNModel
from splitcross import splits_for
from steps import MIN_SEQ_LEN
from vocabulary import Rules

SHORT = 8  # a --bptt below which batches may be several times as long, and their learning rate as much larger

# With --minutes, in validation and test: the fewest rows of a column, so that its start without a hidden state counts
# for little, and the most columns, beyond which a batch is no faster.
MIN_ROWS, MOST_COLUMNS = 10_000, 100

Batches = namedtuple("Batches", "train valid test")  # the splits, each (N, B); test None where there is none


@dataclass
class Progress:
    """Hold what the loop changes besides weights, optimizer and random generators.

    It is saved and restored as a whole.
    """
    epoch: int = 0                                  # epochs completed
    row: int = 0                                    # where in the text the next batch of the epoch starts
    skipped: int = 0                                # rows that were left out, in all epochs
    batch: int = 0                                  # batches done in the epoch
    hidden: list | None = None                      # the state after the last batch; None at a break in the text
    epoch_rows: int = 0                             # rows predicted in the epoch
    epoch_loss: float = 0.0                         # sum of the losses of these rows
    epoch_seconds: float = 0.0                      # of training in the epoch
    window_batches: int = 0                         # batches since the last log line, the window
    window_rows: int = 0                            # rows predicted in the window
    window_loss: float = 0.0                        # sum of the losses of its batches
    window_seconds: float = 0.0                     # of training in the window
    window_scale: float = 0.0                       # sum of the factors of the learning rates of its batches
    history: list = field(default_factory=list)     # validation loss after each completed epoch
    best_loss: float = math.inf                     # validation loss of the model at --save, nats per token
    best_epoch: int = 0                             # 0: the model that training started from
    seconds: float = 0.0                            # spent in completed epochs, validation included
    spent: float = 0.0                              # seconds since the run began, all of its parts together
    metrics_bytes: int = 0                          # length of the metrics file that belongs to this progress

    def count_batch(self, rows, loss, seconds, scale):
        """Count a batch of `rows`, which took `seconds` and whose learning rate had the factor `scale`."""
        self.epoch_rows += rows
        self.epoch_loss += rows * loss
        self.epoch_seconds += seconds
        self.window_batches += 1
        self.window_rows += rows
        self.window_loss += loss
        self.window_seconds += seconds
        self.window_scale += scale

    def clear_window(self):
        self.window_batches = self.window_rows = 0
        self.window_loss = self.window_seconds = self.window_scale = 0.0

    def skip(self, rows):
        """Leave out the next `rows`. What follows them begins without a hidden state."""
        self.row += rows
        self.skipped += rows
        self.hidden = None

    def turn_epoch(self):
        """Go to the beginning of the next epoch."""
        self.epoch, self.row, self.batch, self.hidden = self.epoch + 1, 0, 0, None
        self.epoch_rows, self.epoch_loss = 0, 0.0
        self.clear_window()


@dataclass
class Run:
    """Hold a run of training, new or resumed."""
    stage: str                                      # "train" or "finetune"
    args: Namespace                                 # the flags
    vocabulary: list                                # V tokens, in the order of their ids
    batches: Batches
    model: RNNModel
    optimizer: torch.optim.Optimizer
    progress: Progress = field(default_factory=Progress)
    metrics: Metrics | None = None                  # from `begin` on
    forward_backward: Callable | None = None        # a pass of training; from `begin` on
    saved_at: float = 0.0                           # when its state was last written, by the monotonic clock
    checksum: str = ""                              # of the text
    stop: int = 0                                   # the signal that ends it, in all processes; 0: none
    budget: Budget = field(default_factory=Budget)  # of time
    prepare_save: Callable = lambda: None           # removes or writes files at --save, before the first batch

    def epochs(self):
        """Return the epochs trained, with the fraction of one that has begun, less the rows that were left out."""
        progress = self.progress
        rows = len(self.batches.train) - 1
        part = (min(progress.row, rows) - progress.skipped) / rows
        return progress.epoch + part if part else progress.epoch

    def set_budget(self):
        """Start the Budget of --minutes, or go on with it; raises BadInput when it leaves no time to train."""
        self.budget = Budget(self.args.minutes, self.progress.spent, self.args.epochs)
        self.budget.time_scoring(self.model, self.batches, self.args.bptt)

    def total_tokens(self):
        """Count the tokens trained since the run began: those of its completed epochs, and of the batches since."""
        progress, (rows, columns) = self.progress, self.batches.train.shape
        return (progress.epoch * (rows - 1) + min(progress.row, rows - 1) - progress.skipped) * columns


def remarks(args):
    """Yield a line for the log about each flag in `args` whose effect may surprise."""
    if args.bptt < SHORT:
        yield (f"--bptt {args.bptt}: as in the original a batch has {MIN_SEQ_LEN} time steps or more, and the learning "
               f"rate is scaled by steps / bptt: up to {(args.bptt + 20) / args.bptt:.0f} times")
    if args.nlayers == 1 and args.tied and args.nhid != args.emsize:
        yield (f"--nhid {args.nhid} is not used: a single layer whose softmax is tied to the embedding has --emsize "
               f"{args.emsize} units")


def open_corpus(args, words=None):
    """Read the corpus that the flags name.

    `words` is the vocabulary of a model, to take as it is. Sets `args.level` to that of the corpus, so that it travels
    with the model. Raises BadInput when a split is missing or malformed.
    """
    rules = Rules(args.min_count, args.max_vocab, args.vocab_order)
    corpus = Corpus(args.data, args.level, args.shares, not args.dry_run, rules, words)
    args.level = corpus.level
    log(corpus.describe())
    return corpus


def open_batches(corpus, args, device):
    """Lay a corpus out as Batches.

    The columns are --batch_size for training, 10 for validation, 1 for the test. With --minutes, long texts are scored
    in more columns. Raises BadInput when a split is too short, and for --cuda-graphs with a split softmax.
    """
    def columns(split, least):
        return max(least, min(len(split) // MIN_ROWS, MOST_COLUMNS)) if args.minutes else least

    if args.cuda_graphs and splits_for(len(corpus.dictionary)):
        raise BadInput(f"--cuda-graphs: not with a split softmax, which {len(corpus.dictionary):,} words have")
    train = load_split(corpus, "train", args.batch_size, device, rows=3)
    valid = load_split(corpus, "valid", columns(corpus.valid, 10), device)
    test = load_split(corpus, "test", columns(corpus.test, 1), device) if corpus.has_test else None
    return Batches(train, valid, test)


def make_model(ntoken, args, device):
    """Make a model for a vocabulary of V = `ntoken` as the flags say.

    Raises BadInput when there is no memory for it.
    """
    flags = {name: getattr(args, name) for name in ARCHITECTURE + DROPOUTS}
    try:
        return RNNModel(ntoken, **flags).to(device)
    except RuntimeError as error:  # what PyTorch raises then
        raise BadInput(f"no model of this size: {str(error).splitlines()[0]}") from error
