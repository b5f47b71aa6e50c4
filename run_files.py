"""Name the files of a run, and protect them from other runs.

A run keeps the best model at `--save`, the state to resume from beside it, one for each stage, and the metrics.
"""

import os
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path

from errors import BadInput
from files import check_writable, locked, remove

STATES = {"train": "last", "finetune": "finetune.last"}  # by stage
# Endings that no --save may have.
RESERVED = ("last", "finetune", "metrics.jsonl", "untuned", "statistics", "partial", "lock")


def named(path):
    """Return `path` as a Path; raises BadInput when it ends in no name, as folder/ and .. do."""
    if Path(path).name in ("", "..") or str(path).endswith(("/", os.sep)):
        raise BadInput(f"{path or 'an empty path'}: is not the name of a file")
    return Path(path)


def beside(path, what):
    """Name a file of the run whose best model is at `path`: PTB.pt -> PTB.WHAT.pt, and exp.lr0.1 -> exp.lr0.1.WHAT."""
    path = named(path)
    return path.with_name(f"{path.stem}.{what}.pt" if path.suffix == ".pt" else f"{path.name}.{what}")


def last_path(path, stage="train"):
    """Return the path of the state to resume from, given that of the best model: PTB.pt -> PTB.last.pt."""
    return beside(path, STATES[stage])


def old_last_paths(path):
    """Return where earlier versions kept the state to resume from, whatever the stage and the suffix."""
    path = Path(path)
    return [last_path(path), path.with_name(f"{path.stem}.last{path.suffix}")]


def best_path(path):
    """Return the path of the best model, given it or that of a state to resume from."""
    path = named(path)
    ending = ".pt" if path.suffix == ".pt" else ""
    name = path.name.removesuffix(ending)
    for what in sorted(STATES.values(), key=len, reverse=True):
        if name.endswith(f".{what}"):
            return path.with_name(name.removesuffix(f".{what}") + ending)
    if old := re.fullmatch(r"(.+)\.last(\.[^.]+)", path.name):  # as earlier versions named the state of NAME.SUFFIX
        return path.with_name("".join(old.groups()))
    return path


def untuned_path(path):
    """Return where fine-tuning in place keeps the model that it began with."""
    return beside(path, "untuned")


def epoch_path(path, epoch):
    """Return where a copy of the model after an `epoch` is kept: PTB.pt -> PTB.pt.e12."""
    return Path(f"{path}.e{epoch}")


def statistics_path(path):
    """Return where dynamic evaluation keeps its gradient statistics."""
    return beside(path, "statistics")


def finetuned_path(path, number=1):
    """Return where a fine-tuned model is kept when training goes on from the untuned one, the `number`-th time."""
    return beside(path, "finetuned" if number == 1 else f"finetuned{number}")


def metrics_path(path):
    """Return the path of the metrics file, given that of the best model: PTB.pt -> PTB.metrics.jsonl."""
    path = named(path)
    return path.with_name(f"{path.stem if path.suffix == '.pt' else path.name}.metrics.jsonl")


def files_of_run(path, stage="train"):
    """Return the paths of the best model, the state and the metrics."""
    return Path(path), last_path(path, stage), metrics_path(path)


@contextmanager
def claimed(save, stage="train", dry_run=False):
    """Lock the files of a run for this process inside `with claimed(save)`.

    Raises BadInput when another process has them, they cannot be written, or they belong to another run.
    """
    if dry_run:
        yield
        return
    check_name(save)
    check_writable(*files_of_run(save, stage))
    with locked(metrics_path(save)):
        yield


def all_files(save):
    """Return the paths of all files that a run may leave at `save`, the model first."""
    states = [last_path(save, stage) for stage in STATES]
    return Path(save), *states, metrics_path(save), untuned_path(save), statistics_path(save)


def check_free(save, overwrite=False):
    """Raise BadInput when a run, a model or another file lies at `save`; with `overwrite` only for another file."""
    if os.path.exists(save) and not is_checkpoint(save):
        raise BadInput(f"--save {save}: what lies there is no model")
    if overwrite:
        return
    for stage in STATES:
        if (last := last_path(save, stage)).exists():
            raise BadInput(f"--save {save}: a run lies there already ({last}); --resume {save} goes on with it, "
                           "--overwrite begins anew in its place")
    if os.path.lexists(save):
        raise BadInput(f"--save {save}: a model lies there already; --overwrite puts another in its place")


def check_copies(save, epochs, overwrite=False):
    """Raise BadInput when a model lies where a copy of the one at `save` is kept after one of `epochs`.

    With `overwrite` a model may lie there, but no other file.
    """
    for epoch in epochs:
        copy = epoch_path(save, epoch)
        if os.path.lexists(copy) and not is_checkpoint(copy):
            raise BadInput(f"--when {epoch}: a copy of the model goes to {copy}, and what lies there is no model")
        if os.path.lexists(copy) and not overwrite:
            raise BadInput(f"--when {epoch}: a model lies at {copy} already; --overwrite replaces it")


def remove_run(save, keep_model=False):
    """Remove the files of the run at `save`, the model last; with `keep_model` it stays.

    Raises BadInput when one cannot be removed.
    """
    model, *others = all_files(save)
    for path in others if keep_model else [*others, model]:
        remove(path)


def check_name(path):
    """Raise BadInput when the files of a run at `path` would be those of another one."""
    path = named(path)
    name = path.name.removesuffix(".pt")
    for ending in RESERVED:
        if name.endswith(f".{ending}"):
            raise BadInput(f"--save {path}: names with .{ending} are those of other files of a run")
    twin = path.with_name(name) if path.suffix == ".pt" else path.with_name(f"{path.name}.pt")
    if any(os.path.exists(file) for file in (last_path(twin), last_path(twin, "finetune"))) or is_checkpoint(twin):
        raise BadInput(f"--save {path}: its record would be that of {twin}, which is there already")


def is_checkpoint(path):
    """Return whether a file looks like a checkpoint, which is a zip archive."""
    try:
        return zipfile.is_zipfile(path)
    except OSError:
        return False
