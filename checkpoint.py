"""Write and read a checkpoint, safely and whole.

A checkpoint is a plain dict of tensors and plain values, read with `weights_only=True`, so that a stranger's file can
run no code:

    format, version    "awd-lstm" and the number of the layout described here
    flags              the command line that trained the model, by flag name
    vocabulary         the V words, in the order of their ids
    model              the state dict; where averaging runs, of the averaged weights in the best model's file
    loss, epoch        validation loss (nats per token) of these weights and the epoch that ended with it
    state              only in the file for resuming: optimizer, progress and random generators (see `training.py`)

A run keeps two files: `SAVE`, the best model, for evaluation, and `last_path(SAVE)`, the state to resume from.
"""

import pickle
import zipfile
from pathlib import Path

import numpy
import torch

from model import ARCHITECTURE, DROPOUTS, RNNModel
from utils import BadInput, replacing

FORMAT, VERSION = "awd-lstm", 1
# The flags that a later run on a model or a state cannot change.
FIXED = (*ARCHITECTURE, "level", "shares", "optimizer", "seed", "load")
CONTENT = {"flags": dict, "vocabulary": list, "model": dict, "loss": float, "epoch": int}


def best_path(path):
    """The path of the best model, given it or that of the state to resume from."""
    path = Path(path)
    return path.with_name(path.stem.removesuffix(".last") + path.suffix)


def last_path(path):
    """Where the state to resume from lies, given the path of the best model: PTB.pt -> PTB.last.pt."""
    return Path(path).with_name(f"{Path(path).stem}.last{Path(path).suffix}")


def metrics_path(path):
    """Where the figures of a run are recorded, given the path of the best model: PTB.pt -> PTB.metrics.jsonl."""
    return Path(path).with_suffix(".metrics.jsonl")


def files_of_run(path):
    """All of them."""
    return Path(path), last_path(path), metrics_path(path)


def save(path, model, flags, vocabulary, loss, epoch, state=None):
    """Write a checkpoint; at every instant either the old file or the whole new one lies at `path`. Raises BadInput
    when there is no room for it, or the folder has gone."""
    content = {"format": FORMAT, "version": VERSION, "flags": flags, "vocabulary": vocabulary,
               "model": model.state_dict(), "loss": loss, "epoch": epoch}
    if state is not None:
        content["state"] = state
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # PyTorch's error hides that of the disk
        raise BadInput(f"{path}: could not be written: {reason}; what was there is as it was") from error


def load(path, device="cpu"):
    """Read a checkpoint into a dict as described above; raises BadInput for a file that is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums: PyTorch would load other weights and say nothing
        content = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise BadInput(f"{path}: not a checkpoint of this toolkit (a pickled model, as the original toolkit wrote "
                       "them, is not loaded: it could run any code)") from error
    except Exception as error:  # these two raise whatever a damaged archive makes them stumble over
        raise BadInput(f"{path}: not a checkpoint, or damaged ({type(error).__name__})") from error
    if damaged:
        raise BadInput(f"{path}: damaged checkpoint: what it holds is not what was written")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"{path}: not a checkpoint of this toolkit")
    if content.get("version") != VERSION:
        raise BadInput(f"{path}: checkpoint version {content.get('version')!r}; this toolkit reads version {VERSION}")
    if not all(isinstance(content.get(key), kind) for key, kind in CONTENT.items()):
        raise BadInput(f"{path}: damaged checkpoint")
    return content


def restore_model(content, path, flags=None, device="cpu"):
    """The model of the checkpoint `content`, built from `flags` (default: those that trained it), on `device`."""
    flags = content["flags"] if flags is None else flags
    words, weights = len(content["vocabulary"]), content["model"]
    try:
        flags = {name: flags[name] for name in ARCHITECTURE + DROPOUTS}
        if not (all(0 <= flags[name] < 1 for name in DROPOUTS) and 0 < flags["nlayers"] <= len(weights)):
            raise ValueError
        with torch.device("meta"):  # takes no memory, whatever size the flags say
            shapes = {name: value.shape for name, value in RNNModel(words, **flags).state_dict().items()}
        if shapes != {name: value.shape for name, value in weights.items()}:
            raise ValueError
        model = RNNModel(words, **flags).to(device)
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{path}: damaged checkpoint: its flags do not describe its weights") from error
    return model


def keep_flags(args, given, content, path, names):
    """Set each flag in `names` that the command line did not give to the value it has in the checkpoint `content`.

    Raises BadInput when a given flag contradicts one that cannot change any more, or the checkpoint lacks one; returns
    the other given flags that change a value, as {name: (value in the checkpoint, value given)}.
    """
    changed = {}
    for name in names:
        if name not in content["flags"]:
            raise BadInput(f"{path}: damaged checkpoint: it does not say with which --{name} it was trained")
        ours, theirs = getattr(args, name), content["flags"][name]
        if name not in given:
            setattr(args, name, theirs)
        elif ours != theirs and name in FIXED:
            raise BadInput(f"--{name} {ours} contradicts {path}, which was trained with {name} {theirs}")
        elif ours != theirs:
            changed[name] = theirs, ours
    return changed


def check_vocabulary(content, path, dictionary, data):
    """Raise BadInput unless the corpus numbers its words as the checkpoint does; ids would mean other words."""
    if content["vocabulary"] != dictionary.idx2word:
        raise BadInput(f"{path}: its vocabulary ({len(content['vocabulary'])} words) is not that of {data} "
                       f"({len(dictionary)} words): the model was trained on another corpus")


def generator_states():
    """The states of all random generators that training draws from, as tensors and plain values."""
    name, keys, *position = numpy.random.get_state()
    return {"numpy": [name, torch.from_numpy(keys.astype(numpy.int64)), *position], "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_generators(states):
    name, keys, *position = states["numpy"]
    numpy.random.set_state((name, keys.cpu().numpy().astype(numpy.uint32), *position))
    torch.set_rng_state(states["torch"].cpu())
    for device, state in enumerate(states["cuda"][:torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), device)
