"""Print and record what a run does.

`NAME.metrics.jsonl` lies beside the checkpoint NAME.pt. It has one JSON object a line, each with its kind:

- "run" (or "resume") describes the run.
- "loaded" is the model that fine-tuning begins with.
- "batch" comes after each log interval.
- "epoch", "switch" and "decay" come at the end of an epoch.
- "test" comes at the end.
- "pointer" and "dynamic" are scores of the trained model, "grid" and "dynamic-grid" those of a search.

Losses are in nats per token, `time` in seconds since 1970. An infinite figure is null. `total_tokens` counts the tokens
trained since the run began. With `--tensorboard` the same figures go to TensorBoard.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

from errors import BadInput
from files import check_writable
from flags import NO_LIMIT

NAMED = 10  # bad lines of a file that a message names at most


def loss_metrics(loss):
    """Convert a loss in nats per token; returns it with the perplexity e^loss and bits per character."""
    return {"loss": loss, "ppl": math.inf if loss >= 700 else math.exp(loss), "bpc": loss / math.log(2)}


def format_loss(name, loss):
    """Format a loss for a log line, in fixed width, each figure labelled with `name`."""
    label, values = f"{name} " if name else "", loss_metrics(loss)
    ppl = f"{values['ppl']:8.2f}" if values["ppl"] < 1e6 else f"{values['ppl']:8.1e}"
    return f"{label}loss {loss:5.2f} | {label}ppl {ppl} | {label}bpc {values['bpc']:8.3f}"


class Log:
    """Print the lines of a run, above the progress bar where there is one.

    A line that cannot be written (a full disk, a reader that has gone) interrupts nothing. `error` keeps what happened.
    Training then stops at the next batch with its state written, and `check` raises at the end.
    """

    def __init__(self):
        self.error = None

    def __call__(self, line):
        if sys.stdout is None or self.error:
            return
        try:
            tqdm.write(line)
            sys.stdout.flush()
        except OSError as error:
            self.error = error

    def check(self):
        """Raise the error that kept a line from being written, as BadInput unless a reader has gone, and forget it."""
        error, self.error = self.error, None
        if isinstance(error, BrokenPipeError):
            raise error
        if error:
            raise BadInput(f"standard output: could not be written: {error.strerror}") from error


log = Log()


def progress_bar(total, done, unit, description):
    """Make a progress bar from `done` to `total`, which is silent where the output is no terminal."""
    shown = sys.stdout is not None and sys.stdout.isatty()
    return tqdm(total=total, initial=done, unit=unit, desc=description, leave=False, file=sys.stdout, disable=not shown)


def advance(bar, rows, loss, minutes_left=math.inf):
    """Advance a progress bar by `rows`; show the mean `loss` so far, and `minutes_left` if they are limited."""
    if not bar.disable:
        left = f", {minutes_left:.1f} minutes left" if minutes_left < math.inf else ""
        bar.set_postfix_str(f"loss {loss:.2f}{left}", refresh=False)
        bar.update(rows)


def format_end(seconds, epochs, limit):
    """Format the estimated end of a run as one more column of a log line; "" without a limit or after the last epoch.

    Each epoch up to `limit` is taken to need what the first `epochs` needed on average, `seconds` in all.
    """
    end = time.time() + seconds / epochs * (limit - epochs)
    if limit >= NO_LIMIT or epochs >= limit or end >= 2**32:
        return ""
    return f" | end ~ {time.strftime('%Y-%m-%d %H:%M', time.localtime(end))}"


# --- TensorBoard -----------------------------------------------------------------------------------------------------

def import_writer():
    """Import the writer of TensorBoard; raises BadInput when it is not installed."""
    try:  # an extra that takes seconds: the one place that imports it, and only when it is asked for
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput(f"--tensorboard needs another package: pip install tensorboard ({error})") from error
    return SummaryWriter


def check_board(folder, dry_run=False):
    """Raise BadInput unless TensorBoard can write to `folder` (None: it is not used); a dry run makes no folder."""
    if folder is None:
        return
    import_writer()
    if not dry_run:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--tensorboard {folder}: cannot be written: {error.strerror}") from error
        check_writable(Path(folder, "events"))


class Board:
    """Send the figures of metrics lines to TensorBoard, in a folder for each stage.

    The step of each figure is the number of tokens trained. A run that goes on, or begins anew, removes what was sent
    beyond its `step`.
    """

    def __init__(self, folder, stage, step):
        self.step = step
        self.writer = import_writer()(os.path.join(folder, stage), purge_step=step + 1 if step else 0)

    def write(self, kind, values):
        """Send the numbers of a line, each named KIND/NAME; lines that describe a run have no curves.

        Raises BadInput when they cannot be written.
        """
        self.step = values.get("total_tokens", self.step)
        if kind in ("run", "resume"):
            return
        try:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "total_tokens":
                    self.writer.add_scalar(f"{kind}/{name}", value, self.step)
            self.writer.flush()
        except OSError as error:
            raise BadInput(f"--tensorboard: {self.writer.log_dir} could not be written: {error.strerror}") from error


def open_board(folder, stage, step):
    """Make the Board of a run that has trained `step` tokens; None when `folder` is None."""
    return Board(folder, stage, step) if folder is not None else None


# --- the file --------------------------------------------------------------------------------------------------------

class Metrics:
    """Append lines to the metrics file at `path`.

    A last line without a line end, left by a crash or an editor, gets one. Given `keep`, the file is first cut to so
    many bytes: a run that is resumed at `stage` writes the rest again. Nothing is cut where lines of another run or of
    a score would be lost, or a line would be cut in two.
    """

    OF_A_RUN = ("batch", "epoch", "switch", "decay", "test")  # kinds that are written again when a run goes on

    def __init__(self, path, keep=None, stage=None):
        self.path, self.board = Path(path), None
        try:
            self.prepare(keep, stage)
        except OSError as error:
            raise BadInput(f"{self.path}: could not be written: {error.strerror}") from error

    def prepare(self, keep, stage):
        """Cut the file as asked, and end its last line."""
        with open(self.path, "ab+") as file:
            if keep is not None and self.is_own(file, keep, stage):
                file.truncate(keep)
            size = file.seek(0, 2)
            if size and read_at(file, size - 1, 1) != b"\n":
                file.write(b"\n")

    def is_own(self, file, keep, stage):
        """Return whether the lines from byte `keep` on are of the run at `stage` that goes on, and of no other."""
        if not 0 < keep < file.seek(0, 2) or read_at(file, keep - 1, 1) != b"\n":
            return False
        *whole, torn = read_at(file, keep, -1).split(b"\n")
        lines, bad = parse_lines(whole)
        return not bad and all(line["kind"] in self.OF_A_RUN or (line["kind"], line.get("stage")) == ("resume", stage)
                   for line in lines)

    def write(self, kind, **values):
        """Add a line of kind `kind`, and send its figures to the board if there is one.

        Raises BadInput when it cannot be written.
        """
        values = {name: None if value in (math.inf, -math.inf) else value for name, value in values.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **values}) + "\n")
        except OSError as error:
            raise BadInput(f"{self.path}: could not be written: {error.strerror}") from error
        if self.board:
            self.board.write(kind, values)

    def size(self):
        """Return the length of the file in bytes, 1 where it is gone: a state with 0 has never been saved."""
        try:
            return max(1, self.path.stat().st_size)
        except OSError:
            return 1


def read_at(file, place, count):
    file.seek(place)
    return file.read(count)


def parse_lines(lines):
    """Parse the lines of a metrics file, bytes; returns the records, and the numbers of bad lines, from 1."""
    records, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
            if record is not None:
                record["kind"].strip()
                records.append(record)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            bad.append(number)
    return records, bad


def read_metrics(path):
    """Read the records of a metrics file; bad lines are skipped and named on stderr.

    Raises BadInput when there is no such file.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    records, bad = parse_lines(content.split(b"\n"))
    if bad:
        more = f" and {len(bad) - NAMED:,} more" if len(bad) > NAMED else ""
        print(f"{path}: skipped, no record: line {', '.join(map(str, bad[:NAMED]))}{more}", file=sys.stderr)
    return records


def git_commit(digits=40):
    """Return the commit that runs, with "-dirty" if files differ; None outside of a checkout, or without git."""
    try:
        result = subprocess.run(["git", "describe", "--always", "--dirty", f"--abbrev={digits}", "--exclude=*"],
                                cwd=Path(__file__).parent, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.decode("ascii").strip()  # stderr may name paths that the locale cannot read


def describe_run(flags, parameters, device):
    """Collect what is needed to repeat a run: flags, versions, device, commit."""
    return {
        "flags": flags, "seed": flags["seed"], "parameters": parameters,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "commit": git_commit(),
    }
