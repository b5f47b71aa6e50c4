"""Write and read a checkpoint, safely and whole.

A checkpoint is a dict of tensors and plain values. It is read with `weights_only=True`, so a stranger's file cannot
run code. Its keys:

    format, version    "awd-lstm" and the number of the layout described here
    flags              the command line that trained the model, by flag name
    vocabulary         the V words, in the order of their ids
    model              the state dict; where averaging runs, of the averaged weights in the best model's file
    loss, epoch        validation loss (nats per token) of these weights, and the epochs completed by then
    stage              "train" or "finetune"; older models have none
    state              only in the file for resuming: optimizer, progress and random generators (`training.py`)

`run_files.py` names the files of a run.
"""

import os
import pickle
import sys
import zipfile

import numpy
import torch

from errors import BadInput, is_of_machine
from files import disk_error, replacing
from flags import command_line
from foreign import fastai_state
from model import ARCHITECTURE, DROPOUTS, RNNModel, parameter_shapes
from optimizers import ASGD
from run_files import STATES, best_path
from splitcross import splits_for
from text import BYTES, LEVELS
from vocabulary import carry_rows, is_text

FORMAT, VERSION = "awd-lstm", 1
# The flags that a later run on a model or a state cannot change.
FIXED = (*ARCHITECTURE, "level", "shares", "vocab", "min_count", "max_vocab", "vocab_order", "optimizer", "seed",
         "load")
# What an optimizer keeps for each parameter, once it has made a step.
AVERAGING_STATE = {"step", "eta", "mu", "ax"}
OPTIMIZER_STATE = {torch.optim.SGD: set(), torch.optim.ASGD: AVERAGING_STATE, ASGD: AVERAGING_STATE,
                   torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}}
IMPLEMENTATION = ("fused", "foreach", "capturable")  # flags of an optimizer that depend on the device alone
CONTENT = {"flags": dict, "vocabulary": list, "model": dict, "loss": float, "epoch": int}


def save(path, model, flags, vocabulary, loss, epoch, stage="train", state=None):
    """Write a checkpoint to `path`.

    At any moment the old file or the whole new one lies there. Raises BadInput when the disk is full or the folder is
    gone.
    """
    content = {"format": FORMAT, "version": VERSION, "flags": flags, "vocabulary": vocabulary,
               "model": model.state_dict(), "loss": loss, "epoch": epoch, "stage": stage}
    if state is not None:
        content["state"] = state
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{path}: could not be written: {disk_error(error)}; what was there is as it was") from error


def load(path, device="cpu"):
    """Read a checkpoint into the dict described above.

    Raises BadInput for a file that is no checkpoint.
    """
    damaged = None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums; PyTorch would load wrong weights silently
        content = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if is_cut(path):
            raise BadInput(f"{path}: not a checkpoint, or damaged: its end is missing") from error
        raise BadInput(f"{path}: not a checkpoint of this toolkit (a pickled model, as the original toolkit wrote "
                       "them, could run any code: convert.py reads it without)") from error
    except Exception as error:  # a damaged archive can make these two raise anything
        if is_of_machine(error) and not damaged:
            raise
        raise BadInput(f"{path}: not a checkpoint, or damaged ({type(error).__name__})") from error
    if damaged:
        raise BadInput(f"{path}: damaged checkpoint: what it holds is not what was written")
    if not isinstance(content, dict) or not isinstance(content.get("format"), str) or content["format"] != FORMAT:
        hint = " (a model of fastai: convert.py reads it)" if fastai_state(content) is not None else ""
        raise BadInput(f"{path}: not a checkpoint of this toolkit{hint}")
    version = content.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise BadInput(f"{path}: checkpoint version {version!r:.60}; this toolkit reads version {VERSION}")
    if not (all(isinstance(content.get(key), expected) for key, expected in CONTENT.items())
            and all(map(is_plain, content["flags"].values()))):
        raise BadInput(f"{path}: damaged checkpoint")
    check_tokens(content, path)
    if content.setdefault("stage", "train") not in list(STATES):
        raise BadInput(f"{path}: damaged checkpoint")
    return content


def is_cut(path):
    """Return whether a file begins like a checkpoint but does not end like one."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(path)


def is_plain(value):
    """Return whether a flag can have this value: a number, a str, None, or a list of these."""
    values = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, (str, int, float)) for part in values)


def check_tokens(content, path):
    """Raise BadInput unless the vocabulary of the checkpoint `content` fits its level."""
    vocabulary, level = content["vocabulary"], content["flags"].get("level", "word")
    if level not in LEVELS or not is_text(vocabulary) or (level == "byte" and not BYTES.issuperset(vocabulary)):
        raise BadInput(f"{path}: damaged checkpoint: its vocabulary is not that of a text")


def load_model(path, device="cpu"):
    """Read the checkpoint of a trained model.

    Raises BadInput for a state to resume from, whose weights are not averaged.
    """
    content = load(path, device)
    if "state" in content:
        raise BadInput(f"{path}: that is the state to resume from; the model is {best_path(path)}")
    return content


def check_weights(content, path, flags):
    """Raise BadInput unless the model of the checkpoint `content` is the one that `flags` describe.

    It takes no memory, whatever size the flags say.
    """
    ntoken, weights = len(content["vocabulary"]), content["model"]
    try:
        if not (all(0 <= flags[name] < 1 for name in DROPOUTS) and 0 < flags["nlayers"] <= len(weights)):
            raise ValueError
        architecture = {name: flags[name] for name in ARCHITECTURE}
        if parameter_shapes(ntoken, **architecture) != {name: tuple(value.shape) for name, value in weights.items()}:
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path}: damaged checkpoint: its flags do not describe its weights") from error


def restore_model(content, path, flags=None, device="cpu"):
    """Build the model of the checkpoint `content` on `device`, from `flags` (default: those that trained it).

    Raises BadInput when the flags do not describe the weights.
    """
    flags = content["flags"] if flags is None else flags
    check_weights(content, path, flags)
    try:
        model = RNNModel(len(content["vocabulary"]), **{name: flags[name] for name in ARCHITECTURE + DROPOUTS})
        model = model.to(device)
        model.load_state_dict(content["model"])
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_of_machine(error):
            raise
        raise BadInput(f"{path}: damaged checkpoint: its flags do not describe its weights") from error
    return model


def carry_vocabulary(content, path, words):
    """Return the checkpoint `content` with its model carried to the vocabulary `words`.

    The tombstones of a split softmax are kept if it is split at the same ids; otherwise they begin at 0.
    """
    flags = content["flags"]
    check_weights(content, path, flags)
    weights = carry_rows(content["model"], content["vocabulary"], words)
    carried, same_splits = {}, splits_for(len(words)) == splits_for(len(content["vocabulary"]))
    for name, shape in parameter_shapes(len(words), **{name: flags[name] for name in ARCHITECTURE}).items():
        kept = same_splits or not name.startswith("softmax.")
        carried[name] = weights[name] if kept else weights["decoder.bias"].new_zeros(shape)
    return {**content, "vocabulary": words, "model": carried}


def merge_flags(parse, argv, content, path, names, fixed=FIXED):
    """Merge the command line with the flags saved in the checkpoint `content`; the command line wins.

    `parse` reads `argv` (None: sys.argv). Flags in `names` that are not given come from the checkpoint, or have their
    default if it is older than the flag.

    Returns the flags and the changes. Changes are what the command line changes in `names`, as {name: (saved, given)}.

    Raises BadInput in two cases:

    - The command line contradicts a flag that cannot change any more.
    - The checkpoint has a value that no command line could give.
    """
    flags = content["flags"]
    saved_argv = [token for name in names if name in flags for token in command_line(name, flags[name])]
    try:
        saved = vars(parse(saved_argv))
    except BadInput as error:
        raise BadInput(f"{path}: damaged checkpoint: {error}") from error
    for name in names:
        if not is_plain(saved[name]):
            raise BadInput(f"{path}: damaged checkpoint: it does not say with which --{name} it was trained")
        if flags.get(name, saved[name]) != saved[name]:
            raise BadInput(f"{path}: damaged checkpoint: no --{name} is {flags[name]!r:.60}")
    args = parse(saved_argv + (sys.argv[1:] if argv is None else list(argv)))
    changed = {name: (saved[name], given) for name, given in vars(args).items()
               if name in names and given != saved[name]}
    for name in fixed:
        if name in changed:
            raise BadInput(f"--{name} {changed[name][1]} contradicts {path}, which was trained with {name} "
                           f"{changed[name][0]}")
    return args, changed


def check_data(content, path, data):
    """Raise BadInput when the text that the checkpoint names is missing, and no other was given."""
    if data == content["flags"].get("data") and not os.path.exists(data):
        raise BadInput(f"{path} was trained on {data}, which is not here; --data names it, or another text")


def restore_optimizer(optimizer, state):
    """Load `state` into a fresh optimizer; raises ValueError, or what PyTorch raises, unless it fits."""
    def types():
        return [{name: type(value) for name, value in group.items()} for group in optimizer.param_groups]

    fresh = types()
    implementations = [{name: group[name] for name in IMPLEMENTATION if name in group}
                       for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, implementation in zip(optimizer.param_groups, implementations):
        group.update(implementation)
    if types() != fresh:
        raise ValueError
    for parameter, values in optimizer.state.items():
        if set(values) != OPTIMIZER_STATE[type(optimizer)]:
            raise ValueError
        if any(value.shape not in (parameter.shape, ()) for value in values.values()):
            raise ValueError


def generator_states():
    """Collect the states of all random generators of training, as tensors and plain values."""
    name, keys, *position = numpy.random.get_state()
    return {"numpy": [name, torch.from_numpy(keys.astype(numpy.int64)), *position], "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []}


def restore_generators(states):
    """Put the random generators into the `states` that `generator_states` collected."""
    name, keys, *position = states["numpy"]
    numpy.random.set_state((name, keys.cpu().numpy().astype(numpy.uint32), *position))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0].cpu())  # of the one GPU that a process uses
