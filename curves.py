"""Read the records of runs as curves need them: stage by stage and epoch by epoch.

A record may hold several stages, one after the other, and stages that were stopped and went on. Losses are in nats per
token. Bad lines are skipped and named.
"""

import math
import sys
from dataclasses import dataclass, field

from errors import BadInput
from metrics import read_metrics

X_AXES = ("epochs", "hours", "minutes", "tokens")  # tokens in millions
LARGEST = 1e100  # figure of a record, so that sums and the margins of an axis are finite too


@dataclass
class Epoch:
    """Hold what the record says of one epoch."""
    valid: float                                   # nats per token
    train: float | None                            # nats per token
    seconds: float
    total_tokens: float | None                     # trained since the stage began


@dataclass
class Stage:
    """Hold a stage of a run: training, or fine-tuning."""
    name: str                                      # "train" or "finetune"
    start: dict = field(default_factory=lambda: dict.fromkeys(X_AXES, 0))  # where it begins on each x axis
    loaded: float | None = None                    # validation loss that fine-tuning started from
    epochs: dict = field(default_factory=dict)     # Epoch by its number
    windows: dict = field(default_factory=dict)    # tokens of log intervals, by epoch, then by last batch
    events: dict = field(default_factory=dict)     # set of "switch" and "decay" by the epoch that they followed
    scores: dict = field(default_factory=dict)     # loss of "pointer", "dynamic" and "both", by kind and split

    def forget_from(self, epoch):
        """Drop the epochs from `epoch` on, which a run that goes on there repeats."""
        for entries in (self.epochs, self.events):
            for number in [number for number in entries if number >= epoch]:
                del entries[number]

    def positions(self, x):
        """Compute where the epochs end on the axis `x`; returns a dict by epoch.

        Older records count the tokens of log intervals only, so those after the last interval of an epoch are missing.
        """
        places, hours, tokens = {}, 0.0, 0
        for number, epoch in sorted(self.epochs.items()):
            hours += epoch.seconds / 3600
            tokens += sum(self.windows.get(number, {}).values())
            tokens = tokens if epoch.total_tokens is None else epoch.total_tokens
            along = {"epochs": number, "hours": hours, "minutes": 60 * hours, "tokens": tokens / 1e6}
            places[number] = self.start[x] + along[x]
        return places

    def end(self):
        """Return where the stage ends on each x axis."""
        return {x: max(self.positions(x).values(), default=self.start[x]) for x in X_AXES}


def figure_of(record, name, low=-math.inf):
    """Return the figure `name` of a record; raises ValueError unless it is a number from `low` to LARGEST."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= LARGEST:
        raise ValueError(name)
    return value


def read_stages(path):
    """Read the stages of a record.

    Epochs that a run repeats when it goes on replace those before. Records that lack a figure are skipped and named on
    stderr. Raises BadInput when no epoch is left.
    """
    stages, bad = [], []
    for number, record in enumerate(read_metrics(path), 1):
        try:
            add_record(stages, record)
        except (ValueError, TypeError) as error:
            bad.append(f"{number} ({record['kind']:.20}: {error})")
    if bad:
        print(f"{path}: skipped, without the figure named: record {', '.join(bad)}", file=sys.stderr)
    stages = [stage for stage in stages if stage.epochs]
    if not stages:
        raise BadInput(f"{path}: there is no epoch in it; the record of PTB.pt is PTB.metrics.jsonl")
    return stages


def add_record(stages, record):
    """Add a record to its stage: the last one, or where a run goes on, the last of that name."""
    kind, stage = record["kind"], stages[-1] if stages else None
    if kind in ("run", "resume"):
        same = [old for old in stages if kind == "resume" and old.name == record.get("stage")]
        if not same:
            stages.append(follow(stage, record.get("stage")))
            return
        stages[:] = [old for old in stages if old is not same[-1]] + same[-1:]  # what comes next is of this stage
        if "epoch" in record:
            same[-1].forget_from(figure_of(record, "epoch", 1))
    elif kind in ("batch", "epoch", "switch", "decay", "loaded", "pointer", "dynamic"):
        if not stages:
            stages.append(Stage("train"))
        add_figures(stages[-1], kind, record)


def follow(stage, name):
    """Make the Stage `name` that follows `stage` (None: it is the first); fine-tuning begins with its best model."""
    if stage is None:
        return Stage(str(name))
    best = min((epoch.valid for epoch in stage.epochs.values()), default=None)
    return Stage(str(name), stage.end(), best if name == "finetune" else None)


def add_figures(stage, kind, record):
    """Add a record of `kind` to its stage; raises ValueError when it lacks a figure."""
    if kind == "loaded":
        stage.loaded = figure_of(record, "loss", 0)
    elif kind in ("pointer", "dynamic"):
        kind = "both" if kind == "dynamic" and "window" in record else kind
        stage.scores[kind, record.get("split")] = figure_of(record, "loss", 0)
    elif kind == "batch":
        window = stage.windows.setdefault(figure_of(record, "epoch", 1), {})
        window[figure_of(record, "batch", 1)] = figure_of(record, "tokens", 0)
    elif kind == "epoch":
        train, total = (figure_of(record, name, 0) if name in record else None
                        for name in ("train_loss", "total_tokens"))
        stage.epochs[figure_of(record, "epoch", 0)] = Epoch(figure_of(record, "loss", 0), train,
                                                            figure_of(record, "seconds", 0), total)
        stage.scores.clear()  # they are those of an earlier model
    else:
        stage.events.setdefault(figure_of(record, "epoch", 1), set()).add(kind)
