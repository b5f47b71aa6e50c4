"""Run the loop that `main.py` and `finetune.py` share.

That is: epochs, validation, the best model, states to resume from, and the test.

Papers: arXiv 1708.02182, sections 3 (NT-ASGD) and 5 (fine-tuning), and 1803.08240 (learning-rate drops, `--when`).

Shapes are in the alphabet of `model.py`.
"""

import math
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict

import checkpoint
import distributed
import run_files
from device import peak_memory
from errors import BadInput, lacks_memory
from files import remove_partial
from metrics import Metrics, advance, describe_run, format_end, format_loss, log, loss_metrics, open_board, progress_bar
from optimizers import at_plateau, averaged_weights, is_averaging, make_optimizer
from process import StopSignals
from run import Progress, remarks
from steps import MIN_SEQ_LEN, choose_pass, evaluate, sample_seq_len, seed_everything, train_step
from utils import get_batch

GPU_SAVE_SECONDS = 60  # between states that are saved after epochs on a GPU


def train(run):
    """Train until --epochs, --minutes, a plateau of fine-tuning, or a signal; then test the best model.

    Returns the exit status. The best model is kept at --save. The state to resume from and the metrics lie beside it.
    """
    if run.args.dry_run:
        return dry_run(run)
    begin(run)
    with StopSignals() as signals:
        unsaved = False
        while not (poll_requests(run, signals)[0] or is_finished(run)):
            if not train_epoch(run, signals):
                unsaved = False                # a signal ended it, and the state is saved
            elif run.progress.epoch_seconds:   # 0: no time was left for a batch
                end_epoch(run)                 # validate, keep the best model
                update_optimizer(run)          # NT-ASGD, --when
                unsaved = True
            if unsaved and poll_requests(run, signals, is_due(run))[1]:
                save_state(run)
                signals.save = unsaved = False
        if unsaved:
            save_state(run)
    log.check()
    return report_test(run, run.stop)


def poll_requests(run, signals, due=False):
    """Return whether to stop and whether to save, as any process of the run is asked to.

    `due` says that this process saves anyway. Sets `run.stop` to the signal that ends the run, 0 if there is none.
    """
    run.stop, failed, save = distributed.agree(signals.stop or 0, bool(log.error), bool(due or signals.save))
    return bool(run.stop or failed), save


def is_finished(run):
    """Return whether the epochs or the minutes are over, or fine-tuning has come to a plateau.

    Batches that were trained before a stop are validated, even if resuming has taken the rest of the minutes.
    """
    progress = run.progress
    plateau = run.stage == "finetune" and at_plateau(progress.history, run.args.nonmono)
    over = run.budget.is_over(run.epochs()) and not progress.epoch_seconds  # 0 after each validation
    done = run.budget.limit == math.inf and progress.epoch >= run.args.epochs  # else the budget counts them
    return plateau or done or over


def is_due(run):
    """Return whether to save the state after an epoch: always on a CPU, on a GPU if the last save is old enough.

    On a GPU an epoch may take seconds, and saving a tenth of that. The first epoch leaves a model, so also a state.
    """
    is_old = time.monotonic() >= run.saved_at + GPU_SAVE_SECONDS
    return is_old or run.progress.epoch <= 1 or not run.batches.train.is_cuda


def begin(run):
    """Make a run ready for its first batch: its files, the pass, and for fine-tuning a state to resume from."""
    owned = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in run.model.parameters() if p.requires_grad}, "the optimizer owns what can learn"
    resumed = run.progress.metrics_bytes > 0
    if distributed.is_first():
        log.check()
        run.prepare_save()  # not before all processes have read the text
        open_record(run, resumed)
    if resumed:
        distributed.note_saved(run.args.save)
    set_pass(run)
    run.saved_at = time.monotonic()
    if run.stage == "finetune" and not resumed:
        save_state(run)  # there is a model already, so also a state to resume from


def set_pass(run):
    """Choose how the run does forward and backward, over the columns of all its processes."""
    args = run.args
    run.forward_backward = distributed.summed(
        choose_pass(run.model, args.precision, args.alpha, args.beta, args.cuda_graphs))


def open_record(run, resumed):
    """Open the metrics file, and describe the run there and in the log."""
    args, progress, model = run.args, run.progress, run.model
    remove_partial(*run_files.all_files(args.save))  # left by a run that was killed
    run.metrics = Metrics(run_files.metrics_path(args.save), progress.metrics_bytes if resumed else None, run.stage)
    run.metrics.board = open_board(args.tensorboard, run.stage, run.total_tokens())
    description = describe_run(vars(args), model.parameter_count(), run.batches.train.device) | distributed.describe()
    run.metrics.write("resume" if resumed else "run", stage=run.stage, epoch=progress.epoch + 1, batch=progress.batch,
                      corpus=run.checksum, **description)
    if run.stage == "finetune" and not resumed:
        run.metrics.write("loaded", **loss_metrics(progress.best_loss))
    log(f"{run.stage}: {' '.join(f'{name}={value}' for name, value in vars(args).items())}")
    processes = f", {description['processes']} processes" if "processes" in description else ""
    log(f"model: {args.model}, {model.parameter_count():,} parameters, on {description['device']}{processes}")
    for line in remarks(args):
        log(line)


def train_epoch(run, signals):
    """Train to the end of the epoch or of the time, with log lines and states to resume from on the way.

    Returns False where a signal ended it before, with the state saved.
    """
    progress, source = run.progress, run.batches.train
    skip_what_does_not_fit(run)
    with progress_bar(len(source), progress.row, "row", f"epoch {progress.epoch + 1}") as bar:
        for rows, loss, seconds, scale in train_batches(run):
            log_batch(run, rows, loss, seconds, scale)
            if plan := run.budget.plan(run.epochs()):
                log(plan)
                rows += skip_what_does_not_fit(run)
            advance(bar, rows, progress.epoch_loss / progress.epoch_rows, run.budget.minutes_left())
            due = run.args.save_interval and time.monotonic() > run.saved_at + 60 * run.args.save_interval
            stop, save = poll_requests(run, signals, due)
            if save or stop:
                save_state(run)
                signals.save = False
            if stop:
                return False
    return True


def skip_what_does_not_fit(run):
    """Leave out the next rows, so as to come to the end of the columns in time; returns their number."""
    progress, rows = run.progress, len(run.batches.train) - 1
    fitting = math.ceil(rows * min(1, run.budget.epochs_left(run.epochs())))
    skipped = rows - progress.row - max(fitting, run.args.bptt, MIN_SEQ_LEN)
    if skipped >= run.args.bptt:  # fewer are not worth a break in the text
        progress.skip(skipped)
        log(f"| epoch {progress.epoch + 1} | no time for all of it: {skipped:,} of {rows:,} rows are left out")
        return skipped
    return 0


def train_batches(run):
    """Train batch after batch to the end of the epoch or of the time.

    Yields (rows, loss, seconds, factor of the learning rate) for each. A longer batch takes a proportionally larger
    step, so that no part of the text weighs more than another. Raises BadInput when a loss or gradient is not finite,
    or when memory runs out.
    """
    args, progress, source = run.args, run.progress, distributed.my_columns(run.batches.train)
    max_bptt = args.bptt + 10 if run.stage == "finetune" and args.max_bptt is None else args.max_bptt
    run.model.train()
    while progress.row < len(source) - 2 and not run.budget.is_over(run.epochs()):
        start = time.perf_counter()
        seq_len = sample_seq_len(args.bptt, max_bptt)
        words, targets = get_batch(source, progress.row, seq_len)
        scale = seq_len / args.bptt * run.budget.lr_scale(run.epochs())
        progress.hidden = progress.hidden or run.model.init_hidden(source.size(1))
        with explained(run, words):
            progress.hidden, loss = train_step(run.model, run.optimizer, run.forward_backward, words, targets,
                                               progress.hidden, lr_scale=scale, clip=args.clip)
        progress.row += seq_len
        progress.batch += 1
        yield len(words), loss, time.perf_counter() - start, scale


@contextmanager
def explained(run, words):
    """Turn a loss that is not finite, or a lack of memory, on `words` (T, B) into BadInput that says what may help."""
    where = f"epoch {run.progress.epoch + 1}, batch {run.progress.batch + 1}"
    try:
        yield
    except FloatingPointError as error:
        again = f"--resume {run.args.save}" if run.progress.metrics_bytes else "the same command"
        again += " replays it" if run.budget.limit == math.inf else " goes that way again, but not to the last bit"
        raise BadInput(f"{where}: {error}; the best checkpoint is as it was; {again} "
                       f"(seed {run.args.seed}); a smaller --lr or a --clip may help") from error
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise BadInput(f"{where}: out of memory with {len(words)} time steps of {words.size(1)} columns; "
                       "--max-bptt caps the steps, which vary around --bptt") from error


def log_batch(run, rows, loss, seconds, scale):
    """Count a batch; write a log line and a metrics line after each `--log-interval` of them.

    The log line shows the mean of the learning rates that were used, the metrics line also the one that was set.
    """
    args, progress, source = run.args, run.progress, run.batches.train
    progress.count_batch(rows, loss, seconds, scale)
    if progress.window_batches < args.log_interval:
        return
    mean, lr = progress.window_loss / progress.window_batches, run.optimizer.param_groups[0]["lr"]
    ms = progress.window_seconds * 1000 / progress.window_batches
    used = lr * progress.window_scale / progress.window_batches
    run.metrics.write("batch", epoch=progress.epoch + 1, batch=progress.batch, total_tokens=run.total_tokens(),
                      tokens=progress.window_rows * source.size(1), lr=lr, mean_lr=used, ms_per_batch=ms,
                      **loss_metrics(mean))
    log(f"| epoch {progress.epoch + 1:3d} | {progress.batch:5d}/{len(source) // args.bptt:5d} batches | "
        f"lr {used:8.5f} | ms/batch {ms:8.2f} | {format_loss('', mean)}"
        f"{distributed.format_speed(progress.window_rows * source.size(1), progress.window_seconds)}"
        f"{run.budget.format_left()}")
    progress.clear_window()


def end_epoch(run):
    """Validate, keep the model if it is the best so far, and turn to the next epoch.

    If the time ended within an epoch, the run stays in it, and can go on from there with more minutes. Raises BadInput
    when the validation loss is not finite.
    """
    progress, start = run.progress, time.perf_counter()
    train_loss, seconds = progress.epoch_loss / max(1, progress.epoch_rows), progress.epoch_seconds
    progress.epoch_seconds, epoch = 0.0, progress.epoch + 1
    if progress.row >= len(run.batches.train) - 2:
        progress.turn_epoch()
    with averaged_weights(run.optimizer):
        loss = distributed.evaluate(run.model, run.batches.valid, run.args.bptt)
        if not math.isfinite(loss):
            raise BadInput(f"the validation loss after epoch {epoch} is {loss}; the best checkpoint is as it was")
        if loss < progress.best_loss:
            save_model(run, run.args.save, loss)
            progress.best_loss, progress.best_epoch = loss, epoch
    run.budget.note_validation(time.perf_counter() - start)
    run.metrics.write("epoch", epoch=round(run.epochs(), 3), optimizer=type(run.optimizer).__name__,
                      seconds=seconds, best_epoch=progress.best_epoch, train_loss=train_loss,
                      total_tokens=run.total_tokens(), **loss_metrics(loss))
    progress.seconds += seconds + time.perf_counter() - start
    end = run.budget.format_left() or format_end(progress.seconds, epoch, run.args.epochs)
    log(f"| end of epoch {epoch:3d} | time: {seconds:8.2f}s | train loss {train_loss:5.2f} | "
        f"{format_loss('valid', loss)}{end}")
    progress.history.append(loss)


def update_optimizer(run):
    """Follow the schedule between epochs: the NT-ASGD trigger, and what `--when` asks for.

    `--when` asks for copies of the model and drops of the learning rate. ASGD starts with the first learning rate. Once
    it runs, the schedule is over.
    """
    args, epoch = run.args, run.progress.epoch
    if is_averaging(run.optimizer) or run.progress.row:  # within an epoch if the time has ended there
        return
    if epoch in args.when:
        save_model(run, run_files.epoch_path(args.save, epoch), run.progress.history[-1])
    if args.optimizer == "sgd" and at_plateau(run.progress.history, args.nonmono):
        run.optimizer = make_optimizer("asgd", run.model, args.lr, args.wdecay)
        run.metrics.write("switch", epoch=epoch)
        log(f"| after epoch {epoch} | switching to ASGD")
    elif epoch in args.when:
        for group in run.optimizer.param_groups:
            group["lr"] /= 10
        run.metrics.write("decay", epoch=epoch, lr=run.optimizer.param_groups[0]["lr"])
        log(f"| after epoch {epoch} | learning rate divided by 10")


def save_model(run, path, loss, **extra):
    """Write the model as a checkpoint of validation `loss`, nats per token; of several processes rank 0 writes."""
    if distributed.is_first():
        checkpoint.save(path, run.model, vars(run.args), run.vocabulary, loss, run.progress.epoch, run.stage, **extra)


def save_state(run):
    """Write the state from which training can go on as if it had never stopped."""
    progress = run.progress
    progress.metrics_bytes, progress.spent = run.metrics.size(), run.budget.spent()
    hidden = distributed.whole_hidden(progress.hidden)
    state = {"stage": run.stage, "progress": {**asdict(progress), "hidden": hidden},
             "averaging": is_averaging(run.optimizer), "optimizer": run.optimizer.state_dict(),
             "generators": checkpoint.generator_states(), "corpus": run.checksum}
    loss = progress.history[-1] if progress.history else math.inf
    save_model(run, run_files.last_path(run.args.save, run.stage), loss, state=state)
    distributed.note_saved(run.args.save)
    run.saved_at = time.monotonic()


def report_test(run, stop):
    """Test the best model, unless a signal other than Ctrl-C says that nobody waits for it. Returns the exit status."""
    progress, save = run.progress, run.args.save
    if stop:
        log(f"| stopped by {signal.Signals(stop).name} | --resume {save} goes on from epoch {progress.epoch + 1}, "
            f"batch {progress.batch + 1}")
    if stop and stop != signal.SIGINT:
        return 128 + stop
    if not distributed.is_first():
        return 128 + stop if stop else 0
    if progress.best_loss == math.inf:
        log("no epoch was completed: there is no model to test")
    else:
        tested, shown = {}, f"no test split | {format_loss('best valid', progress.best_loss)}"
        if run.batches.test is not None:
            device = run.batches.test.device
            best = checkpoint.restore_model(checkpoint.load(save, device), save, device=device)
            tested = loss_metrics(evaluate(best, run.batches.test, run.args.bptt))
            shown = format_loss("test", tested["loss"])
        run.metrics.write("test", epoch=progress.best_epoch, epochs=round(run.epochs(), 3), finished=not stop,
                          seconds=progress.seconds, valid_loss=progress.best_loss, **tested)
        log(f"| end of training | best epoch {progress.best_epoch:3d} | {shown}")
        if run.stage == "finetune" and progress.history and not (progress.best_epoch or stop):
            log("no epoch was better than the model as loaded, which is kept; a smaller --lr may help")
    if not stop and (end := run.budget.describe_end(run.epochs())):
        log(end)
    return 128 + stop if stop else 0


def dry_run(run):
    """Run one training batch and one validation batch, and log what they need; writes nothing.

    Returns the exit status.
    """
    args, batches = run.args, run.batches
    set_pass(run)
    for _ in range(3 if args.cuda_graphs else 1):  # the third batch of a length is the first pure replay
        seed_everything(args.seed)
        run.progress = Progress()
        rows, loss, seconds, _ = next(train_batches(run))
    log(f"| dry run | {rows * args.batch_size / seconds:,.0f} tokens/s in the first batch | "
        f"{format_loss('train', loss)}")
    with averaged_weights(run.optimizer):
        loss = distributed.evaluate(run.model, batches.valid[:args.bptt + 1], args.bptt)
    log(f"| dry run | {format_loss('valid', loss)}")
    peak = peak_memory(batches.train.device)
    memory = "unknown on this system" if peak is None else f"{peak / 2**20:,.0f} MiB"
    log(f"| dry run | {run.model.parameter_count()} parameters | peak memory {memory}")
    return 0
