"""Print and record what a run does.

`NAME.metrics.jsonl` lies beside the checkpoint NAME.pt. It has one JSON object a line, each with its kind:

- "run" (or "resume") describes the run.
- "batch" comes after each log interval.
- "epoch", "switch" and "decay" come at the end of an epoch.
- "test" comes at the end.

Losses are in nats per token, `time` in seconds since 1970. An infinite figure is null.
"""

import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

from utils import BadInput


def loss_metrics(loss):
    """Express a loss in nats per token as the field reads it.

    Returns the loss, the perplexity e^loss and bits per character.
    """
    return {"loss": loss, "ppl": math.exp(loss) if loss < 700 else math.inf, "bpc": loss / math.log(2)}


def format_loss(name, loss):
    """Format a loss for a log line, in fixed width, each figure labelled with `name`."""
    label, values = f"{name} " if name else "", loss_metrics(loss)
    ppl = f"{values['ppl']:8.2f}" if values["ppl"] < 1e6 else f"{values['ppl']:8.1e}"
    return f"{label}loss {loss:5.2f} | {label}ppl {ppl} | {label}bpc {values['bpc']:8.3f}"


def log(line):
    """Print a line, above the progress bar where there is one."""
    if sys.stdout is not None:
        tqdm.write(line)
        sys.stdout.flush()


def progress_bar(total, done, unit, description):
    """Make a progress bar from `done` to `total`.

    It is silent where the output is no terminal.
    """
    shown = sys.stdout is not None and sys.stdout.isatty()
    return tqdm(total=total, initial=done, unit=unit, desc=description, leave=False, file=sys.stdout, disable=not shown)


class Metrics:
    """Write the metrics file at `path`.

    Lines are added at the end. With `keep`, all beyond that many bytes is dropped first.
    """

    def __init__(self, path, keep=None):
        self.path = Path(path)
        with open(self.path, "ab") as file:
            if keep is not None and keep < file.tell():
                file.truncate(keep)

    def write(self, kind, **values):
        """Add a line of kind `kind`.

        Raises BadInput when it cannot be written.
        """
        values = {name: None if value in (math.inf, -math.inf) else value for name, value in values.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **values}) + "\n")
        except OSError as error:
            raise BadInput(f"{self.path}: could not be written: {error.strerror}") from error

    def size(self):
        return self.path.stat().st_size


def describe_run(flags, parameters, device):
    """Collect what is needed to repeat a run: flags, versions, device, commit."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                                cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a git checkout, or no git
    return {
        "flags": flags, "seed": flags["seed"], "parameters": parameters,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "commit": commit,
    }
