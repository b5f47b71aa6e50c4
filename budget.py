"""Fit a run of training into some minutes (`main.py --minutes`).

The learning rate rises for a moment, then falls in a straight line to nothing at the end. How far the run has come is
read from the clock, so a slow machine does less and still ends in time.
"""

import math
import statistics
import time
from collections import namedtuple

import process
from errors import BadInput
from flags import NO_LIMIT
from steps import evaluate

WARM_UP = 0.02     # the share of a run in which the learning rate rises
SLOW_START = 0.02  # the share of a run in which its speed is not measured
PLAN_AFTER = 0.02  # the share of a run after which its speed is known
SPARE = 1.05       # epochs that are taken to fit, for each that fits at the speed so far
MOST_SCORING = 0.75  # the share of the time that validation and test may need
PIECES, TIMES = 2, 3  # of --bptt rows each, on which an evaluation is timed, and how often

Point = namedtuple("Point", "fraction seconds epochs")  # how far a run has come: of its training, since its start


class Budget:
    """Keep a run within `minutes` (None: no limit), of which earlier parts of it have taken `spent` seconds.

    The clock of this part began with the script, in a notebook with its `main`. The run also ends after `epochs`, at
    once if they are 0. The learning rate falls to the end that comes first. The time of the last validation and the
    test (`valid_seconds`, `test_seconds`) is not for training.
    """

    def __init__(self, minutes=None, spent=0.0, epochs=NO_LIMIT):
        self.limit = math.inf if minutes is None else 60 * minutes
        self.epochs = epochs
        self.began = (process.began or time.monotonic()) - spent
        self.rises_from = 0.0 if spent else None  # the fraction at the first batch
        self.valid_seconds = self.test_seconds = 0.0
        self.first = None         # the fraction after the first batch
        self.trained_from = None  # the Point from which the speed is measured
        self.planned = None       # epochs

    def spent(self):
        """Return the seconds that the run has taken, its earlier parts included."""
        return time.monotonic() - self.began

    def minutes_left(self):
        return max(0.0, self.limit - self.spent()) / 60

    def format_left(self):
        """Format the time left as one more column of a log line; "" without a limit."""
        return f" | {self.minutes_left():.1f} minutes left" if self.limit < math.inf else ""

    def training_seconds(self):
        """Return the seconds of the whole run that are for training."""
        return max(self.limit - self.valid_seconds - self.test_seconds, 1e-9)

    def seconds_left(self):
        return max(0.0, self.training_seconds() - self.spent())

    def fraction(self, epochs):
        """Return the share of the training that is done, from 0 to 1: that of the time, or of `epochs` if it is larger.

        A run without a limit stays at 0.
        """
        if self.limit == math.inf:
            return 0.0
        by_epochs = epochs / self.epochs if self.epochs else 1.0
        return min(1.0, max(self.spent() / self.training_seconds(), by_epochs))

    def is_over(self, epochs):
        return self.fraction(epochs) >= 1

    def lr_scale(self, epochs):
        """Return the factor of the learning rate after `epochs` epochs: 1 without a limit."""
        if self.limit == math.inf:
            return 1.0
        done = self.fraction(epochs)
        if self.rises_from is None or done < self.rises_from:  # validation took less than was estimated
            self.rises_from = done
        return min((done - self.rises_from) / WARM_UP, 1 - done)

    def time_scoring(self, model, batches, bptt):
        """Estimate the seconds of validation and test, from a few pieces of each.

        Raises BadInput when they, or the start, leave a new run no time to train. A run that goes on is not refused: it
        has something to validate and to test.
        """
        if self.limit == math.inf:
            return
        self.valid_seconds, self.test_seconds = (scoring_seconds(model, source, bptt) for source in batches[1:])
        if self.rises_from is not None:
            return
        scoring = self.valid_seconds + self.test_seconds
        if scoring > MOST_SCORING * self.limit:
            raise BadInput(f"--minutes {self.limit / 60:g}: validation and test alone take about {scoring:.0f} s with "
                           "this model; less text for them (--shares), a smaller model or more minutes may help")
        if self.spent() >= self.training_seconds():
            raise BadInput(f"--minutes {self.limit / 60:g}: no time to train; the start took {self.spent():.0f} s, and "
                           f"validation and test take about {scoring:.0f} s")

    def plan(self, epochs):
        """Plan the number of epochs from the speed so far, once that is known.

        `epochs` are those done. Returns a line for the log, or None before there is a plan and after it was returned.
        """
        if self.limit == math.inf or self.planned is not None:
            return None
        done = self.fraction(epochs)
        if self.first is None:
            self.first = done
        if done < self.first + SLOW_START:
            return None
        if self.trained_from is None:
            self.trained_from = Point(done, self.spent(), epochs)
        if done < self.trained_from.fraction + PLAN_AFTER or epochs == self.trained_from.epochs:
            return None
        epoch = 1 / self.speed(epochs)  # seconds
        whole, rest = divmod(self.seconds_left(), epoch + self.valid_seconds)
        self.planned = min(self.epochs, epochs + whole + min(1, rest / epoch))
        return (f"| plan | {self.planned:.2f} epochs, one in {format_seconds(epoch)}, and "
                f"{self.valid_seconds + self.test_seconds:.0f} s for the last validation and the test")

    def speed(self, epochs):
        """Return the epochs per second so far, without validation."""
        start = self.trained_from
        return (epochs - start.epochs) / max(self.spent() - start.seconds, 1e-9)  # some clocks tick rarely

    def epochs_left(self, epochs):
        """Return the epochs that may fit into the time left; infinity before there is a plan."""
        if self.planned is None:
            return math.inf
        return SPARE * self.speed(epochs) * self.seconds_left()

    def note_validation(self, seconds):
        """Note the time of a validation, and leave it out of the speed of training."""
        self.valid_seconds = seconds
        if self.trained_from is not None:
            self.trained_from = self.trained_from._replace(seconds=self.trained_from.seconds + seconds)

    def describe_end(self, epochs):
        """Format how many epochs there were, and how many were planned; None for a run without a limit."""
        if self.limit == math.inf:
            return None
        planned = f" of {self.planned:.2f} planned" if self.planned is not None else ""
        what, flag = ("epochs", "--epochs") if epochs >= self.epochs else ("time", "--minutes")
        return (f"| end of {what} | {epochs:.2f} epochs{planned} in {self.spent() / 60:.2f} of {self.limit / 60:g} "
                f"minutes; --resume with a larger {flag} goes on")


def scoring_seconds(model, source, bptt):
    """Estimate the seconds that `steps.evaluate` takes over `source` (N, B); 0 where there is none.

    It is the median of a few tries, since the machine may be busy for a moment.
    """
    if source is None:
        return 0.0
    piece = source[:PIECES * bptt + 1]
    evaluate(model, piece[:bptt + 1], bptt)  # warm-up
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        evaluate(model, piece, bptt)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * (len(source) - 1) / (len(piece) - 1)


def format_seconds(seconds):
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} minutes"
