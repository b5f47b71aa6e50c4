"""Go on with a stopped run: flags, model, optimizer, progress and random generators."""

import math
from dataclasses import fields

import checkpoint
from files import check_writable, copy_file, same_file
from metrics import log
from optimizers import make_optimizer
from training import Progress, Run, open_batches
from utils import BadInput, map_hidden

NOT_RESUMED = {"save", "resume", "cuda", "cuda_graphs", "dry_run"}  # they belong to the command, not to the run


def resume(parse, argv, stage, device):
    """Restore the run that the flag `--resume` names, and return it as a Run.

    `parse` reads the flags from `argv`. They win over the run's own. Raises BadInput when there is no such state.
    Raises it too when a flag or the corpus contradicts the state.
    """
    args = parse(argv)
    best = checkpoint.best_path(args.resume)
    path = checkpoint.last_path(best)
    content = checkpoint.load(path, device)
    state = content.get("state")
    if not isinstance(state, dict) or state.get("stage") != stage:
        raise BadInput(f"{path}: not the state of a run of this script (its stage is not {stage!r})")
    names = [name for name in vars(args) if name not in NOT_RESUMED]
    args, changed = checkpoint.merge_flags(parse, argv, content, path, names)
    args.save = args.save or str(best)
    check_writable(*checkpoint.files_of_run(args.save))
    dictionary, batches = open_batches(args, device)
    checkpoint.check_vocabulary(content, path, dictionary, args.data)
    model = checkpoint.restore_model(content, path, vars(args), device)
    try:
        columns, _ = changed.get("batch_size", (args.batch_size, None))
        progress = restore_progress(state["progress"], model.init_hidden(columns))
        optimizer = make_optimizer("asgd" if state["averaging"] else args.optimizer, model, args.lr, args.wdecay)
        checkpoint.restore_optimizer(optimizer, state["optimizer"])
        checkpoint.restore_generators(state["generators"])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{path}: damaged checkpoint: its state cannot be restored") from error
    if progress.best_loss < math.inf:
        checkpoint.load(best)  # raises BadInput now: the best model is needed at the end
    if progress.row and "batch_size" in changed:
        raise BadInput(f"--batch_size cannot change in the middle of an epoch, which is where {path} stopped")
    for group in optimizer.param_groups:
        group["weight_decay"] = args.wdecay
        if "lr" in changed:
            group["lr"] = args.lr
    if not same_file(args.save, best) and not args.dry_run:  # goes on under another name, with all files so far
        for old, new in zip(checkpoint.files_of_run(best), checkpoint.files_of_run(args.save)):
            if old.exists():
                copy_file(old, new)
    differences = [f"{name} {saved} -> {given}" for name, (saved, given) in changed.items()]
    log("; ".join([f"resuming {path} in epoch {progress.epoch + 1}, batch {progress.batch + 1}", *differences]))
    return Run(stage, args, dictionary.idx2word, batches, model, optimizer, progress)


def restore_progress(values, hidden):
    """Make Progress of its saved values.

    Its hidden state has to have the form of `hidden`. Raises TypeError or ValueError for values that Progress cannot
    hold.
    """
    progress = Progress(**values)
    for entry in fields(Progress):
        value = values[entry.name]
        if not isinstance(value, entry.type) or (isinstance(value, int) and value < 0):
            raise ValueError
    if progress.hidden is not None and form(progress.hidden) != form(hidden):
        raise ValueError
    if not all(isinstance(loss, float) for loss in progress.history):
        raise ValueError
    return progress


def form(hidden):
    """Return the shapes and dtypes of a hidden state, nested as it is."""
    return map_hidden(lambda part: (part.shape, part.dtype), hidden)
