"""The one loop that `main.py` and `finetune.py` share: epochs of variable-length BPTT, evaluation, averaged weights,
the non-monotonic plateau rule, checkpoints and the record of figures.

Papers: "Regularizing and Optimizing LSTM Language Models" (1708.02182), sections 3 (NT-ASGD), 4.1 (variable-length
BPTT) and 4.6 (AR and TAR); learning-rate drops (`--when`) from 1803.08240. Shapes are in the alphabet of `model.py`.
"""

import json
import math
import platform
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

import checkpoint
from data import Corpus
from graphs import GraphedPass
from products import has_bf16
from splitcross import splits_for
from utils import (
    PARTIAL,
    BadInput,
    Signals,
    batchify,
    check_writable,
    copy_file,
    figures,
    get_batch,
    map_hidden,
    peak_memory,
    repackage_hidden,
    same_file,
    score,
    tf32,
)

NOT_RESUMED = {"save", "resume", "cuda", "cuda_graphs", "dry_run"}  # a command's, not the run's that it goes on with


@dataclass
class Progress:
    """What the loop changes besides weights, optimizer and random generators; saved and restored as a whole."""
    epoch: int = 0                                  # epochs completed
    row: int = 0                                    # of the epoch under way: where in the text its next batch starts,
    batch: int = 0                                  # batches done,
    hidden: list | None = None                      # the state that they ended with,
    epoch_loss: float = 0.0                         # the sum of their losses over rows,
    epoch_seconds: float = 0.0                      # and over time
    window_batches: int = 0                         # of the log interval under way: batches,
    window_rows: int = 0                            # rows,
    window_loss: float = 0.0                        # the sum of the losses over batches
    window_seconds: float = 0.0
    history: list = field(default_factory=list)     # validation loss after each completed epoch
    best_loss: float = math.inf                     # validation loss of the model at --save, nats per token
    best_epoch: int = 0                             # 0: the model that training started from
    seconds: float = 0.0                            # spent in completed epochs, validation included
    metrics_bytes: int = 0                          # length of the metrics file that belongs to this progress


# --- optimisation ----------------------------------------------------------------------------------------------------

def make_optimizer(name, model, lr, wdecay):
    """The optimizer `name` ("sgd", "asgd" or "adam") over every trainable parameter of `model`.

    ASGD averages from the start (t0 = 0; in PyTorch's the second step overwrites the first) and never decays the
    learning rate (lambd = 0). PyTorch's ASGD steps with the learning rate that it was given one step earlier; under
    variable-length BPTT that is the rate scaled for the batch before. The published numbers were made that way, so it
    is kept. A fused SGD takes less than half the time of the default (5 ms for 11, 21 million values, on a CPU). On a
    GPU ASGD has to be "capturable" and Adam fused, or they wait for the GPU once or twice for each parameter.
    """
    cuda = next(model.parameters()).is_cuda
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=wdecay, fused=True)
    if name == "asgd":
        return torch.optim.ASGD(model.parameters(), lr=lr, t0=0, lambd=0.0, weight_decay=wdecay,
                                capturable=cuda)
    return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=wdecay, fused=cuda or None)


def is_averaging(optimizer):
    return isinstance(optimizer, torch.optim.ASGD)


@contextmanager
def averaged_weights(optimizer):
    """`with averaged_weights(optimizer)`: the parameters hold their ASGD averages, and their own values again after it,
    also when the block raises. Under another optimizer nothing changes."""
    averages = {}
    if is_averaging(optimizer):
        averages = {parameter: state["ax"] for parameter, state in optimizer.state.items()}
    current = {parameter: parameter.detach().clone() for parameter in averages}
    try:
        for parameter, average in averages.items():
            parameter.data.copy_(average)
        yield
    finally:
        for parameter, value in current.items():
            parameter.data.copy_(value)


def at_plateau(history, nonmono):
    """Whether the last of the validation losses `history` is worse than the best of those at least `nonmono` + 1 epochs
    older: the non-monotonic trigger, as the authors corrected Algorithm 1 of 1708.02182 in their code."""
    earlier = history[:-1]
    return len(earlier) > nonmono and history[-1] > min(earlier[:len(earlier) - nonmono])


def sample_seq_len(bptt, max_bptt=None):
    """A length for the next batch, in time steps: N(bptt, 5), with probability 0.05 N(bptt / 2, 5), at least 5; from
    numpy's generator. 1708.02182, section 4.1."""
    base = bptt if numpy.random.random() < 0.95 else bptt / 2
    seq_len = max(5, int(numpy.random.normal(base, 5)))
    return min(seq_len, max_bptt) if max_bptt else seq_len


def computes_in(precision, device):
    """Whether `device` has instructions for products in `--precision`; where it has none, training is in fp32."""
    if device.type == "cuda":
        return precision == "fp32" or torch.cuda.get_device_capability(device) >= (8, 0)
    return precision == "fp32" or (precision == "bf16" and has_bf16())


def gradients(model, words, targets, hidden, args):
    """Add the gradient of the regularised loss on the batch `words`, `targets` (T, B) from the state `hidden` to that
    of the parameters; returns the new hidden state, and in one tensor (2,) the cross entropy, nats per token, without
    AR and TAR, and the norm of the gradient. 1708.02182, section 4.6."""
    device, bf16 = words.device, args.precision == "bf16" and computes_in("bf16", words.device)
    with tf32(args.precision == "tf32") if device.type == "cuda" else nullcontext():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output, hidden, raw = model(words, hidden)
            cross_entropy = objective = model.loss(output, targets)
        if args.alpha:
            objective = objective + args.alpha * output.pow(2).mean()
        if args.beta:
            objective = objective + args.beta * (raw[1:] - raw[:-1]).pow(2).mean()
        objective.backward()
    norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    return repackage_hidden(hidden), torch.stack([cross_entropy.detach(), norm])


def train_step(model, optimizer, words, targets, hidden, args, lr_scale, run=gradients):
    """One step of the optimizer on the batch `words`, `targets` (T, B) from the state `hidden`, with the learning rate
    times `lr_scale`; returns the new hidden state and the cross entropy, nats per token, without AR and TAR. `run` is
    `gradients`, or that from a graph.

    Raises FloatingPointError, having changed no weight, when loss or gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=not args.cuda_graphs)  # graphs know the gradients by where they lie
    hidden, found = run(model, words, targets, hidden, args)
    loss, norm = found.tolist()  # the one time in a step that the CPU waits for a GPU
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"the loss is {loss} and the norm of the gradient {norm}")
    if args.clip:
        clip_grads_with_norm_(model.parameters(), args.clip, found[1])
    group = optimizer.param_groups[0]
    lr = group["lr"]
    group["lr"] = lr * lr_scale
    optimizer.step()
    group["lr"] = lr
    return hidden, loss


def graphed_gradients(model, backend=None):
    """`gradients` of `model` by CUDA graphs. Not for a split softmax, whose work depends on the words."""
    model.keep_still()
    return GraphedPass(gradients, backend)


def gradients_for(model, args):
    """`gradients`, by graphs where `--cuda-graphs` asks for them."""
    return graphed_gradients(model) if args.cuda_graphs else gradients


def train_epoch(model, optimizer, source, args, progress, max_bptt=None, run=gradients):
    """Train over `source` (N, B) from where `progress` stands to its end, in batches of up to `max_bptt` steps, with
    gradients from `run`; yields after each batch its rows, its loss in nats per token and its seconds.

    A longer batch takes a proportionally larger step, so that no part of the text weighs more than another. Raises
    BadInput when a loss or gradient is not finite, or when memory runs out.
    """
    model.train()
    progress.hidden = progress.hidden or model.init_hidden(source.size(1))
    while progress.row < len(source) - 2:
        start = time.perf_counter()
        seq_len = sample_seq_len(args.bptt, max_bptt)
        words, targets = get_batch(source, progress.row, seq_len)
        where = f"epoch {progress.epoch + 1}, batch {progress.batch + 1}"
        try:
            progress.hidden, loss = train_step(model, optimizer, words, targets, progress.hidden, args,
                                               lr_scale=seq_len / args.bptt, run=run)
        except FloatingPointError as error:
            again = f"--resume {args.save}" if progress.metrics_bytes else "the same command"
            raise BadInput(f"{where}: {error}; the best checkpoint is as it was; {again} replays it "
                           f"(seed {args.seed}); a smaller --lr or a --clip may help") from error
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            raise BadInput(f"{where}: out of memory with {len(words)} time steps of {words.size(1)} columns; "
                           "--max-bptt caps the steps, which vary around --bptt") from error
        progress.row += seq_len
        progress.batch += 1
        yield len(words), loss, time.perf_counter() - start


@torch.no_grad()
def evaluate(model, source, bptt):
    """Cross entropy over `source` (N, B) in nats per predicted token, the hidden state carried from batch to batch."""
    model.eval()
    hidden = model.init_hidden(source.size(1))
    total = 0.0
    for row in range(0, len(source) - 1, bptt):
        words, targets = get_batch(source, row, bptt)
        output, hidden, _ = model(words, hidden)
        total += len(words) * model.loss(output, targets).item()
    return total / (len(source) - 1)


# --- the record of a run ---------------------------------------------------------------------------------------------

class Metrics:
    """`NAME.metrics.jsonl` beside the checkpoint NAME.pt: one JSON object a line. A line of kind "run" (or "resume")
    describes the run, then come "batch" lines each log interval, "epoch", "switch" and "decay" lines, "test" at the
    end. Losses are in nats per token, `time` in seconds since 1970; a figure that is not finite is null.

    Lines are added to a file that is there already; given `keep`, what it has beyond so many bytes is dropped first.
    """

    def __init__(self, save, keep=None):
        self.path = checkpoint.metrics_path(save)
        with open(self.path, "ab") as file:
            if keep is not None and keep < file.tell():
                file.truncate(keep)

    def write(self, kind, **values):
        values = {name: None if value in (math.inf, -math.inf) else value for name, value in values.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **values}) + "\n")
        except OSError as error:
            raise BadInput(f"{self.path}: could not be written: {error.strerror}") from error

    def size(self):
        return self.path.stat().st_size


def say(line):
    """Print a log line, above the progress bar where there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def describe_run(args, model, device):
    """What has to be known to repeat a run: flags, versions, device, commit."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                                cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a git checkout, or no git
    return {
        "flags": vars(args), "seed": args.seed, "parameters": model.parameter_count(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "commit": commit,
    }


def seed_everything(seed):
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # seeds CUDA too


def training_state(stage, progress, optimizer):
    """What a checkpoint needs besides the model so that training can go on as if it had never stopped."""
    return {"stage": stage, "progress": asdict(progress), "averaging": is_averaging(optimizer),
            "optimizer": optimizer.state_dict(), "generators": checkpoint.generator_states()}


def restore_progress(values, hidden):
    """The Progress with these values by name; raises TypeError or ValueError unless they are what one holds, with a
    hidden state of the form of `hidden`."""
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
    """The shapes and types of a hidden state, nested as it is."""
    return map_hidden(lambda part: (part.shape, part.dtype), hidden)


def resume(parse, argv, stage, device):
    """Flags, dictionary, batches, model, optimizer and progress of the run that the flag `--resume` names among those
    that `parse` reads from `argv`, with the random generators as the run left them.

    Flags in `argv` take the place of the run's own. Raises BadInput when there is no such state, or a flag or the
    corpus contradicts it.
    """
    args = parse(argv)
    best = checkpoint.best_path(args.resume)
    path = checkpoint.last_path(best)
    content = checkpoint.load(path, device)
    state = content.get("state")
    if not isinstance(state, dict) or state.get("stage") != stage:
        raise BadInput(f"{path}: not the state of a run of this script (its stage is not {stage!r})")
    names = [name for name in vars(args) if name not in NOT_RESUMED]
    args, changed = checkpoint.keep_flags(parse, argv, content, path, names)
    args.save = args.save or str(best)
    check_writable(*checkpoint.files_of_run(args.save))
    dictionary, batches = open_corpus(args, device)
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
        checkpoint.load(best)  # the best model so far will be needed in the end
    if progress.row and "batch_size" in changed:
        raise BadInput(f"--batch_size cannot change in the middle of an epoch, which is where {path} stopped")
    for group in optimizer.param_groups:
        group["weight_decay"] = args.wdecay
        if "lr" in changed:
            group["lr"] = args.lr
    if not same_file(args.save, best) and not args.dry_run:  # it goes on under another name, with all it has so far
        for old, new in zip(checkpoint.files_of_run(best), checkpoint.files_of_run(args.save)):
            if old.exists():
                copy_file(old, new)
    say("; ".join([f"resuming {path} in epoch {progress.epoch + 1}, batch {progress.batch + 1}",
                   *(f"{name} {theirs} -> {ours}" for name, (theirs, ours) in changed.items())]))
    return args, dictionary, batches, model, optimizer, progress


# --- the loop --------------------------------------------------------------------------------------------------------

Batches = namedtuple("Batches", "train valid test")


def load_corpus(args):
    """The corpus that the flags `--data`, `--level` and `--shares` say, and a line about it. Sets `args.level` to what
    the corpus has, so that it travels with the model."""
    corpus = Corpus(args.data, args.level, args.shares, cache=not getattr(args, "dry_run", False))
    args.level = corpus.level
    say(f"corpus: {len(corpus.train):,} / {len(corpus.valid):,} / {len(corpus.test):,} tokens, "
        f"{len(corpus.dictionary):,} different, at {corpus.level} level")
    if corpus.cache_error:
        say(f"corpus: {corpus.cache_error}")
    return corpus


def open_corpus(args, device):
    """The dictionary of the corpus at `args.data`, and its splits laid out as (N, B): B = `args.batch_size` for
    training, 10 for validation, 1 for the test. Raises BadInput when a split is missing, malformed or too short."""
    corpus = load_corpus(args)
    if getattr(args, "cuda_graphs", False) and splits_for(len(corpus.dictionary)):
        raise BadInput(f"--cuda-graphs: not with a split softmax, which {len(corpus.dictionary):,} words have")
    batches = [lay_out(args, corpus, split, batch_size, device, rows)
               for split, batch_size, rows in (("train", args.batch_size, 3), ("valid", 10, 2), ("test", 1, 2))]
    return corpus.dictionary, Batches(*batches)


def lay_out(args, corpus, split, batch_size, device, rows=2):
    """One split of the corpus as `batchify` does it, and its error with the name of the split."""
    try:
        return batchify(getattr(corpus, split), batch_size, device, rows)
    except BadInput as error:
        raise BadInput(f"{args.data}, {split}: {error}") from error


def train(stage, args, dictionary, batches, model, optimizer, progress):
    """Train `model` on from `progress` for `args.epochs` epochs or until a signal to stop, then test the best model.

    The `stage` "train" turns SGD into ASGD at a plateau (NT-ASGD); the stage "finetune" ends there. The best model is
    kept at `args.save`, the state to resume from and the metrics beside it. Returns the exit status of the script.
    """
    device = batches.train.device
    if not computes_in(args.precision, device):
        kind = "GPU" if device.type == "cuda" else "CPU"
        say(f"--precision {args.precision}: this {kind} has no instructions for it; training in fp32")
    run = gradients_for(model, args)
    if args.dry_run:
        return dry_run(args, batches, model, optimizer, run)
    max_bptt = args.bptt + 10 if stage == "finetune" and args.max_bptt is None else args.max_bptt
    assert ({id(p) for group in optimizer.param_groups for p in group["params"]}
            == {id(p) for p in model.parameters() if p.requires_grad}), "the optimizer has to own what can be trained"
    for path in checkpoint.files_of_run(args.save):
        Path(f"{path}{PARTIAL}").unlink(missing_ok=True)  # of a run that was killed
    resumed = progress.metrics_bytes > 0
    metrics = Metrics(args.save, keep=progress.metrics_bytes if resumed else None)
    description = describe_run(args, model, device)
    metrics.write("resume" if resumed else "run", stage=stage, **description)
    if stage == "finetune" and not resumed:
        metrics.write("loaded", **figures(progress.best_loss))
    say(f"{stage}: {' '.join(f'{name}={value}' for name, value in vars(args).items())}")
    say(f"model: {args.model}, {model.parameter_count():,} parameters, on {description['device']}")

    def save(path, loss, **extra):
        checkpoint.save(path, model, vars(args), dictionary.idx2word, loss, progress.epoch, **extra)

    def save_state():
        progress.metrics_bytes = metrics.size()
        loss = progress.history[-1] if progress.history else math.inf
        save(checkpoint.last_path(args.save), loss, state=training_state(stage, progress, optimizer))

    with Signals() as signals:
        saved = time.monotonic()
        while not (signals.stop or progress.epoch >= args.epochs
                   or (stage == "finetune" and at_plateau(progress.history, args.nonmono))):
            with tqdm(total=len(batches.train), initial=progress.row, unit="row", desc=f"epoch {progress.epoch + 1}",
                      leave=False, file=sys.stdout, disable=not sys.stdout.isatty()) as bar:
                for rows, loss, seconds in train_epoch(model, optimizer, batches.train, args, progress, max_bptt,
                                                       run):
                    bar.update(rows)
                    log_batch(args, metrics, progress, optimizer, batches.train, rows, loss, seconds)
                    due = args.save_interval and time.monotonic() > saved + 60 * args.save_interval
                    if due or signals.stop or signals.save:
                        save_state()
                        saved, signals.save = time.monotonic(), False
                    if signals.stop:
                        break
            if signals.stop:
                break
            end_epoch(args, metrics, progress, model, optimizer, batches, save)
            optimizer = after_epoch(args, model, optimizer, progress, save, metrics)
            save_state()
            saved = time.monotonic()
    if signals.stop:
        say(f"| stopped by {signal.Signals(signals.stop).name} | --resume {args.save} goes on from epoch "
            f"{progress.epoch + 1}, batch {progress.batch + 1}")
    if signals.stop == signal.SIGTERM:  # whoever sent it does not wait
        return 128 + signals.stop
    if progress.best_loss == math.inf:
        say("no epoch was completed: there is no model to test")
    else:
        best = checkpoint.restore_model(checkpoint.load(args.save, device), args.save, device=device)
        loss = evaluate(best, batches.test, args.bptt)
        metrics.write("test", epoch=progress.best_epoch, epochs=progress.epoch, finished=not signals.stop,
                      seconds=progress.seconds, valid_loss=progress.best_loss, **figures(loss))
        say(f"| end of training | best epoch {progress.best_epoch:3d} | {score('test', loss)}")
    return 128 + signals.stop if signals.stop else 0


def log_batch(args, metrics, progress, optimizer, source, rows, loss, seconds):
    """Count a batch; a log line and a metrics line when `args.log_interval` of them are full."""
    progress.epoch_loss += rows * loss
    progress.epoch_seconds += seconds
    progress.window_batches += 1
    progress.window_rows += rows
    progress.window_loss += loss
    progress.window_seconds += seconds
    if progress.window_batches < args.log_interval:
        return
    mean, lr = progress.window_loss / progress.window_batches, optimizer.param_groups[0]["lr"]
    ms = progress.window_seconds * 1000 / progress.window_batches
    metrics.write("batch", epoch=progress.epoch + 1, batch=progress.batch, tokens=progress.window_rows * source.size(1),
                  lr=lr, ms_per_batch=ms, **figures(mean))
    say(f"| epoch {progress.epoch + 1:3d} | {progress.batch:5d}/{len(source) // args.bptt:5d} batches | lr {lr:8.5f} | "
        f"ms/batch {ms:8.2f} | {score('', mean)}")
    progress.window_batches, progress.window_rows, progress.window_loss, progress.window_seconds = 0, 0, 0.0, 0.0


def end_epoch(args, metrics, progress, model, optimizer, batches, save):
    """Validate, keep the model if it is the best so far, and turn `progress` to the next epoch."""
    start, epoch = time.perf_counter(), progress.epoch + 1
    train_loss = progress.epoch_loss / (len(batches.train) - 1)
    with averaged_weights(optimizer):
        loss = evaluate(model, batches.valid, args.bptt)
        if not math.isfinite(loss):
            raise BadInput(f"the validation loss after epoch {epoch} is {loss}; the best checkpoint is as it was")
        if loss < progress.best_loss:
            progress.epoch = epoch
            save(args.save, loss)
            progress.best_loss, progress.best_epoch = loss, epoch
    metrics.write("epoch", epoch=epoch, optimizer=type(optimizer).__name__, seconds=progress.epoch_seconds,
                  best_epoch=progress.best_epoch, train_loss=train_loss, **figures(loss))
    say(f"| end of epoch {epoch:3d} | time: {progress.epoch_seconds:8.2f}s | train loss {train_loss:5.2f} | "
        f"{score('valid', loss)}")
    progress.history.append(loss)
    progress.seconds += progress.epoch_seconds + time.perf_counter() - start
    progress.epoch, progress.row, progress.batch, progress.hidden = epoch, 0, 0, None
    progress.epoch_loss, progress.epoch_seconds = 0.0, 0.0
    progress.window_batches, progress.window_rows, progress.window_loss, progress.window_seconds = 0, 0, 0.0, 0.0


def dry_run(args, batches, model, optimizer, run):
    """One training batch and one validation batch; says what they need and writes nothing."""
    for _ in range(3 if args.cuda_graphs else 1):  # the third batch of a length is the first that is but replayed
        seed_everything(args.seed)
        rows, loss, seconds = next(train_epoch(model, optimizer, batches.train, args, Progress(), args.bptt, run))
    say(f"| dry run | {rows * args.batch_size / seconds:,.0f} tokens/s in the first batch | {score('train', loss)}")
    with averaged_weights(optimizer):
        loss = evaluate(model, batches.valid[:args.bptt + 1], args.bptt)
    memory = peak_memory(batches.train.device) / 2**20
    say(f"| dry run | {score('valid', loss)}")
    say(f"| dry run | {model.parameter_count()} parameters | peak memory {memory:,.0f} MiB")
    return 0


def after_epoch(args, model, optimizer, progress, save, metrics):
    """The schedule between epochs: the copies and learning-rate drops of `--when` and the NT-ASGD trigger, all over
    once ASGD runs, which starts with the first learning rate. Returns the optimizer to go on with."""
    if is_averaging(optimizer):
        return optimizer
    if progress.epoch in args.when:
        save(f"{args.save}.e{progress.epoch}", progress.history[-1])
    if args.optimizer == "sgd" and at_plateau(progress.history, args.nonmono):
        metrics.write("switch", epoch=progress.epoch)
        say(f"| after epoch {progress.epoch} | switching to ASGD")
        return make_optimizer("asgd", model, args.lr, args.wdecay)
    if progress.epoch in args.when:
        for group in optimizer.param_groups:
            group["lr"] /= 10
        metrics.write("decay", epoch=progress.epoch, lr=optimizer.param_groups[0]["lr"])
        say(f"| after epoch {progress.epoch} | learning rate divided by 10")
    return optimizer
