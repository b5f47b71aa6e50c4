"""Go on with a stopped run: flags, model, optimizer, progress and random generators."""

import filecmp
import math
import os
from functools import partial
from itertools import count
from pathlib import Path

import checkpoint
import run_files
from errors import BadInput, is_of_machine
from files import copy_file, follow, remove, same_file
from metrics import log
from optimizers import at_plateau, make_optimizer
from run import Progress, Run, open_batches, open_corpus
from utils import map_hidden

# Flags of the command, not of the run.
NOT_RESUMED = {"save", "resume", "cuda", "cuda_graphs", "tensorboard", "dry_run", "overwrite"}


def resume(parse, argv, stage, device):
    """Restore the run that the flag `--resume` names, and return it as a Run, whose files are copied when it begins.

    `parse` reads the flags from `argv`, which win over those of the run. Raises BadInput when there is no such state,
    or a flag or the corpus contradicts it.
    """
    args = parse(argv)
    best = Path(follow(run_files.best_path(args.resume)))
    path, content = find_state(best, stage, device)
    state = content["state"]
    names = [name for name in vars(args) if name not in NOT_RESUMED]
    args, changed = checkpoint.merge_flags(parse, argv, content, path, names)
    args.save = str(follow(args.save or best))
    in_place = same_file(args.save, best)
    if not (in_place or args.dry_run):
        run_files.check_free(args.save, args.overwrite)
    checkpoint.check_data(content, path, args.data)
    corpus = open_corpus(args, content["vocabulary"])
    batches = open_batches(corpus, args, device)
    check_corpus(state, path, corpus, args.data, content["flags"].get("data"))
    model, optimizer, progress = restore(content, path, args, changed, device)
    best_stage = None
    if progress.best_loss < math.inf:
        best_stage = checkpoint.load(best)["stage"]  # read now, since the end of the run needs it
    if not args.dry_run:
        if stage == "train":
            to_come = [epoch for epoch in args.when if epoch > progress.epoch]
            run_files.check_copies(args.save, to_come, args.overwrite or in_place)
        source = find_model(best, stage, best_stage)
    log("; ".join([f"resuming {path} in epoch {progress.epoch + 1}, batch {progress.batch + 1}",
                   *differences(args, changed, progress, in_place)]))
    run = Run(stage, args, corpus.dictionary.idx2word, batches, model, optimizer, progress, checksum=corpus.checksum)
    if not args.dry_run:
        run.set_budget()
        run.prepare_save = partial(carry_on, path, best, args.save, stage, source)
    return run


def restore(content, path, args, changed, device):
    """Restore model, optimizer and progress from the `content` of the state at `path`.

    `args` are the flags of the run that goes on, `changed` those that it changes: name to (saved, given). The random
    generators are set too. Raises BadInput when the content is damaged, or a flag contradicts it.
    """
    state = content["state"]
    model = checkpoint.restore_model(content, path, vars(args), device)
    try:
        columns, _ = changed.get("batch_size", (args.batch_size, None))
        progress = restore_progress(state["progress"], model.init_hidden(columns))
        optimizer = make_optimizer("asgd" if state["averaging"] else args.optimizer, model, args.lr, args.wdecay)
        checkpoint.restore_optimizer(optimizer, state["optimizer"])
        checkpoint.restore_generators(state["generators"])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if is_of_machine(error):
            raise
        raise BadInput(f"{path}: damaged checkpoint: its state cannot be restored") from error
    if progress.row and "batch_size" in changed:
        raise BadInput(f"--batch_size cannot change in the middle of an epoch, which is where {path} stopped")
    progress.skipped = progress.skipped * columns // args.batch_size  # in rows of the new batch size
    for group in optimizer.param_groups:
        group["weight_decay"] = args.wdecay
        if "lr" in changed:
            group["lr"] = args.lr
    return model, optimizer, progress


def differences(args, changed, progress, in_place):
    """Describe how a run differs from what was saved, or does not do what its flags say; a list for the log.

    `changed` maps the names of flags to (saved, given). `in_place` says that the run keeps its `--save`.
    """
    lines = [f"{name} {saved} -> {given}" for name, (saved, given) in changed.items()]
    if args.overwrite and in_place:
        lines.append("--overwrite is not used, since nothing begins anew")
    if "when" in changed:
        late = [epoch for epoch in args.when if 0 < epoch <= progress.epoch and epoch not in changed["when"][0]]
        lines += [f"--when {epoch} comes too late" for epoch in late]
    return lines


def find_state(best, stage, device="cpu"):
    """Find the state of the run at `stage` whose best model is at `best`; returns its path and content.

    Fine-tuning once kept its state where training does. Raises BadInput when there is none.
    """
    path = run_files.last_path(best, stage)
    if not path.exists():
        path = next((old for old in run_files.old_last_paths(best) if old.exists()), path)
    if os.path.exists(best) and not path.exists():
        raise BadInput(f"{path}: is not there, so no run of this script can go on; finetune.py --load {best} "
                       "--save OTHER trains on from the model alone")
    content = checkpoint.load(path, device)
    state = content.get("state")
    if not isinstance(state, dict) or state.get("stage") != stage:
        raise BadInput(f"{path}: not the state of a run of this script (its stage is not {stage!r})")
    return path, content


def is_unfinished(best, stage):
    """Return whether a run at `stage` whose best model is at `best` was stopped before its end."""
    if not run_files.last_path(best, stage).exists():
        return False
    _, content = find_state(best, stage)
    try:
        flags, progress = content["flags"], content["state"]["progress"]
        plateau = stage == "finetune" and at_plateau(progress["history"], flags["nonmono"])
        return progress["epoch"] < flags["epochs"] and not plateau
    except (LookupError, TypeError) as error:
        raise BadInput(f"{run_files.last_path(best, stage)}: damaged checkpoint") from error


def check_corpus(state, path, corpus, given, saved):
    """Raise BadInput unless the text is the one of the state; older states do not say which it was."""
    checksum = state.get("corpus")
    if checksum and checksum != corpus.checksum:
        raise BadInput(f"{given} is not the text of {path}, which was {saved}: its checksum is {corpus.checksum[:12]}, "
                       f"not {str(checksum)[:12]}; a run goes on with the text it began with")


def find_model(best, stage, best_stage):
    """Return the path of the model that a run at `stage` goes on with; None when there is no model yet.

    It is the one at `best`, whose stage is `best_stage`. Training that goes on after fine-tuning in place takes the
    untuned model back. Raises BadInput when that one cannot be read.
    """
    if best_stage is None:
        return None
    if not (stage == "train" and best_stage == "finetune"):
        return best
    untuned = run_files.untuned_path(best)
    checkpoint.load(untuned)
    return untuned


def carry_on(path, best, save, stage, source):
    """Copy a run at `stage` from `best` to `save`, where it goes on: state (at `path`), record and model.

    The model is at `source`, None when there is none yet. One that was fine-tuned in place is kept under another name.
    Raises BadInput when a file cannot be copied.
    """
    if not same_file(best, save):
        run_files.remove_run(save)  # `resume` has checked that it may be overwritten
        for old, new in ((path, run_files.last_path(save, stage)),
                         (run_files.metrics_path(best), run_files.metrics_path(save))):
            if old.exists():
                copy_file(old, new)
    if source is None or same_file(source, save):
        return
    if same_file(best, save):
        keep_tuned(best)
    copy_file(source, save)


def keep_tuned(best):
    """Keep a model that was fine-tuned in place, and the state of its fine-tuning, under a name of their own.

    Raises BadInput when that cannot be written.
    """
    names = (run_files.finetuned_path(best, number) for number in count(1))
    tuned = next(name for name in names if not name.exists() or filecmp.cmp(best, name, shallow=False))
    copy_file(best, tuned)
    state = run_files.last_path(best, "finetune")
    if state.exists():
        copy_file(state, run_files.last_path(tuned, "finetune"))
        remove(state)
    log(f"{best} has been fine-tuned: that model is kept as {tuned}; training goes on from the untuned one")


def restore_progress(values, hidden):
    """Build Progress from its saved values.

    Raises TypeError or ValueError unless they have the types of a fresh Progress, and the hidden state the form of
    `hidden`.
    """
    progress = Progress(**values)
    progress.epoch_rows = values.get("epoch_rows", progress.row)  # states of earlier versions lack these two
    progress.window_scale = values.get("window_scale", float(progress.window_batches))
    for name, default in vars(Progress()).items():
        value = getattr(progress, name)
        if name != "hidden" and (type(value) is not type(default) or (isinstance(value, int) and value < 0)):
            raise ValueError
    if progress.hidden is not None and form(progress.hidden) != form(hidden):
        raise ValueError
    if not all(isinstance(loss, float) for loss in progress.history):
        raise ValueError
    return progress


def form(hidden):
    """Return the shapes and dtypes of a hidden state, nested as it is."""
    return map_hidden(lambda part: (part.shape, part.dtype), hidden)
