"""What the scripts share: how a script ends on bad input, files written whole, batches out of a stream of token ids,
figures, and flags."""

import argparse
import ctypes
import math
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress

import torch

from products import use_onednn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 32 * 2**20  # bytes of a block, the most that glibc takes for that threshold; larger ones are returned
INTERRUPTED = 130  # the exit status after Ctrl-C, 128 + SIGINT, as a shell has it


class BadInput(ValueError):
    """Something that a person handed over cannot be used; the message is one line that says what and why."""


def run_script(main):
    """Run a script's `main` and exit: status 2 and one line on stderr for bad input; a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a word is no reason to stop
    try:
        status = main()
        sys.stdout.flush()
    except BadInput as error:
        print(f"{sys.argv[0]}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # 128 + SIGPIPE
    sys.exit(status)


class Signals:
    """`with Signals() as signals`: SIGINT and SIGTERM set `signals.stop` to their number, SIGUSR1 sets `signals.save`,
    and the code goes on to where it can stop or save. A second signal to stop ends the process at once."""

    def __init__(self):
        self.stop, self.save, self.previous = None, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only there can they be received
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self.previous[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        if number == signal.SIGUSR1:
            self.save = True
        elif self.stop is None:
            self.stop = number
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


# --- files -----------------------------------------------------------------------------------------------------------

PARTIAL = ".partial"  # ends the name of a file that is being written


@contextmanager
def replacing(path, mode="wb", **how):
    """`with replacing(path) as file`: what is written appears under `path` whole, or, on an exception, not at all.

    Written under another name in the same folder, flushed to the disk, then renamed; a link stays one.
    """
    path = os.path.realpath(path)
    partial = path + PARTIAL
    try:
        with open(partial, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def copy_file(source, target):
    """Copy a file so that all of it or nothing appears under `target`."""
    with open(source, "rb") as old, replacing(target) as new:
        shutil.copyfileobj(old, new)


def same_file(path, other):
    """Whether two paths lead to one place, whether there is a file or not."""
    return os.path.realpath(path) == os.path.realpath(other)


def check_writable(*paths):
    """Raise BadInput unless a file can be written at each of `paths`: said before the work and not after it."""
    for path in paths:
        real = os.path.realpath(path)
        try:
            if os.path.lexists(real) and not stat.S_ISREG(os.lstat(real).st_mode):
                raise BadInput(f"{path}: cannot be written: there is something that is no file")
            with tempfile.TemporaryFile(dir=os.path.dirname(real)), suppress(FileNotFoundError):
                os.lstat(real + PARTIAL)  # fails when the name is too long
        except OSError as error:
            raise BadInput(f"{path}: cannot be written: {error.strerror}") from error


# --- batches ---------------------------------------------------------------------------------------------------------

def batchify(ids, batch_size, device="cpu", rows=2):
    """Lay a stream of token ids out as B parallel texts, read top to bottom; returns (N, B), N = len(ids) // B.

        a b c d e f g h i j k l m  with B = 3   ->   a e i
                                                     b f j
                                                     c g k
                                                     d h l     (m, the remainder, is left out)

    Columns are independent for the model, so that it cannot learn how e follows d: the price of the parallel batch.
    Raises BadInput when there are fewer than `rows` rows, too few to predict anything.
    """
    length = len(ids) // batch_size
    if length < rows:
        raise BadInput(f"{len(ids)} tokens are too few for a batch of {batch_size}: "
                       f"it needs {rows * batch_size} or more")
    return ids[:length * batch_size].view(batch_size, length).t().to(device)


def get_batch(source, row, seq_len):
    """Up to `seq_len` rows of `source` (N, B) from `row` on, and those one further: words (T, B), targets (T, B)."""
    seq_len = min(seq_len, len(source) - 1 - row)
    return source[row:row + seq_len].long(), source[row + 1:row + 1 + seq_len].long()


def blocks(steps, size):
    """The slices of so many time steps, `size` at a time; the last has what is left."""
    return [slice(start, min(start + size, steps)) for start in range(0, steps, size)]


def map_hidden(function, hidden):
    """A hidden state with `function` of each of its tensors, nested as it is."""
    if isinstance(hidden, torch.Tensor):
        return function(hidden)
    return type(hidden)(map_hidden(function, part) for part in hidden)


def repackage_hidden(hidden):
    """The same hidden state cut off from its history, which backpropagation does not enter and memory need not keep."""
    return map_hidden(lambda part: part.detach().clone(), hidden)


# --- figures ---------------------------------------------------------------------------------------------------------

def peak_memory(device="cpu"):
    """Bytes: of a GPU's memory that tensors took at most, else of memory that this process had resident at most."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not getrusage first: on Linux it counts what the parent had before it started this process
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def figures(loss):
    """A loss in nats per token as the field reads it: loss, perplexity e^loss, bits per character loss / ln 2."""
    return {"loss": loss, "ppl": math.exp(loss) if loss < 700 else math.inf, "bpc": loss / math.log(2)}


def score(name, loss):
    """The fixed-width text of a loss for log lines, each figure labelled with `name`."""
    label, ppl = f"{name} " if name else "", figures(loss)["ppl"]
    ppl = f"{ppl:8.2f}" if ppl < 1e6 else f"{ppl:8.1e}"
    return f"{label}loss {loss:5.2f} | {label}ppl {ppl} | {label}bpc {figures(loss)['bpc']:8.3f}"


# --- flags -----------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An ArgumentParser to which a flag that it cannot take is bad input like any other."""

    def error(self, message):
        raise BadInput(message)


def number(kind, low, below=math.inf, exclusive=False):
    """A flag's type: an int or float `kind` with low <= value < below, or low < value when `exclusive`."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < below or (exclusive and value == low):
            noun = "a whole number" if kind is int else "a number"
            limits = f"above {low}" if exclusive else f"of {low} or more"
            limits += f" and below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {noun} {limits}, not {text!r}")
        return value
    return convert


count, natural = number(int, 1, 2**31), number(int, 0, 2**31)
amount, rate = number(float, 0, 1e30), number(float, 0, 1)  # what times a step's length is still a number in fp32
positive = number(float, 0, 1e30, exclusive=True)


def add_run_flags(parser):
    """Flags that every script has."""
    parser.add_argument("--cuda", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                        help="run on the GPU (default: if there is one)")


def add_data_flags(parser):
    """Flags that say what the text is."""
    parser.add_argument("--data", default="data/penn", metavar="PATH",
                        help="folder with train.txt, valid.txt and test.txt, or one text file (default: %(default)s)")
    parser.add_argument("--level", choices=["word", "char", "byte"],
                        help="what a token is (default: what the folder's file 'level' says, else word)")
    parser.add_argument("--shares", type=number(float, 0, 2**31, exclusive=True), nargs=3, default=[90, 5, 5],
                        metavar=("TRAIN", "VALID", "TEST"),
                        help="the parts of one text file that the splits get (default: 90 5 5)")


def add_training_flags(parser, max_bptt, plateau, save):
    """The flags that main.py and finetune.py share; the other arguments are what differs in their help."""
    add_data_flags(parser.add_argument_group("data"))
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=["LSTM", "QRNN", "GRU"], default="LSTM",
                       help="recurrent layer (default: %(default)s)")
    group.add_argument("--emsize", type=count, default=400, metavar="E",
                       help="embedding size, units (default: %(default)s)")
    group.add_argument("--nhid", type=count, default=1150, metavar="H",
                       help="hidden units per layer (default: %(default)s)")
    group.add_argument("--nlayers", type=count, default=3, metavar="L",
                       help="recurrent layers (default: %(default)s)")
    group.add_argument("--tied", action=argparse.BooleanOptionalAction, default=True,
                       help="share the softmax weight with the embedding (default: %(default)s)")
    group = parser.add_argument_group("dropout", "probabilities of dropping, from 0 (off) to below 1")
    for name, default, what in (
            ("dropout", 0.4, "the last layer's output"), ("dropouth", 0.3, "the other layers' outputs"),
            ("dropouti", 0.65, "the embedded words"), ("dropoute", 0.1, "whole words of the vocabulary"),
            ("wdrop", 0.5, "the hidden-to-hidden weights (QRNN: all weights of a layer)")):
        group.add_argument(f"--{name}", type=rate, default=default, metavar="P",
                           help=f"on {what} (default: %(default)s)")
    group = parser.add_argument_group("regularisation")
    group.add_argument("--alpha", type=amount, default=2, metavar="A",
                       help="AR: weight of the squared dropped output in the loss (0: off; default: %(default)s)")
    group.add_argument("--beta", type=amount, default=1, metavar="B",
                       help="TAR: weight of the squared change of the output over time in the loss "
                            "(0: off; default: %(default)s)")
    group.add_argument("--wdecay", type=amount, default=1.2e-6, metavar="W",
                       help="weight decay on all parameters (0: off; default: %(default)s)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=positive, metavar="LR", help="learning rate (default: 30; 0.001 for Adam)")
    group.add_argument("--clip", type=amount, default=0.25, metavar="C",
                       help="largest norm of the gradient (0: no clipping; default: %(default)s)")
    group.add_argument("--epochs", type=natural, default=8000, metavar="N",
                       help="upper limit of epochs (default: %(default)s)")
    group.add_argument("--batch_size", type=count, default=80, metavar="B",
                       help="columns of a batch (default: %(default)s)")
    group.add_argument("--bptt", type=count, default=70, metavar="T",
                       help="mean length of a training batch, time steps (default: %(default)s)")
    group.add_argument("--max-bptt", type=natural, metavar="T",
                       help=f"longest training batch, time steps (0: no limit; default: {max_bptt})")
    group.add_argument("--nonmono", type=natural, default=5, metavar="N",
                       help="epochs that may pass without a better validation loss before "
                            f"{plateau} (default: %(default)s)")
    group.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
                       help="of the matrix products of training, and on a GPU of LSTM and GRU layers as a whole; "
                            "weights, loss and all scores are fp32; tf32 needs a GPU (default: %(default)s)")
    group = parser.add_argument_group("run")
    group.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
                       help="launch the passes of training on a GPU as CUDA graphs, one for each length of batch; like "
                            "--cuda not remembered by --resume (default: %(default)s)")
    group.add_argument("--seed", type=number(int, 0, 2**32), default=1111, metavar="N",
                       help="random seed (default: %(default)s)")
    group.add_argument("--log-interval", type=count, default=200, metavar="N",
                       help="batches between log lines (default: %(default)s)")
    group.add_argument("--save", metavar="FILE", help=f"where the best model goes (default: {save})")
    group.add_argument("--resume", metavar="FILE", help="the --save of an earlier run, to go on where it stopped")
    group.add_argument("--save-interval", type=amount, default=30, metavar="MINUTES",
                       help="time between states written to resume from, besides those at the end of each epoch "
                            "(0: only those; default: %(default)s)")
    group.add_argument("--dry-run", action="store_true",
                       help="one training batch, one validation batch, the number of parameters and the peak memory; "
                            "writes nothing")
    add_run_flags(group)


# --- the machine ------------------------------------------------------------------------------------------------------

def pick_device(cuda, cuda_graphs=False):
    """The device that `--cuda` or `--no-cuda` asks for; raises BadInput when there is none, or none that
    `--cuda-graphs` could run on. From here on the process computes its products on a CPU as `use_onednn` says and keeps
    its memory, and on a GPU computes in fp32 and nothing less."""
    if cuda and not torch.cuda.is_available():
        raise BadInput("--cuda: PyTorch finds no CUDA device on this machine")
    if cuda_graphs and not cuda:
        raise BadInput("--cuda-graphs: there are none on a CPU")
    if cuda:
        allow_tf32(False)
    else:
        use_onednn()
        keep_memory()
    return torch.device("cuda" if cuda else "cpu")


def keep_memory(freed=-1):
    """Let glibc, where that is the C library, keep up to so many bytes of freed memory (-1: all) for the next training
    step.

    By itself it returns all but some tens of MiB to the system, which hands it out again a page at a time, filled with
    zeros: 20,000 to 80,000 times in a step of the PTB recipes. Kept, a step takes 93% (LSTM) and 97% (QRNN) of the time
    in fp32, 90% and 86% in bfloat16 (2 cores of a virtual machine, Intel Xeon). It costs little memory: after 42
    batches of varying length the peak was 1,259 MiB for 1,269 (LSTM) and 997 for 930 (QRNN) in fp32, 1,722 for 1,651
    and 1,926 for 1,861 in bfloat16.

    Blocks of more than LARGEST_KEPT bytes are returned, unless the environment says MALLOC_MMAP_MAX_=0: kept, they
    leave gaps in the heap, since their sizes change with the length of the batch, and it grows (benchmarks/README.md).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, freed)


def allow_tf32(on):
    """Whether a GPU may compute products of fp32 tensors in TF32, with 10 bits of mantissa for 23. PyTorch by itself
    allows it to cuDNN, whose are the recurrent layers, and not to matrix products."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


@contextmanager
def tf32(on):
    """`with tf32(on)`: a GPU computes products of fp32 tensors in TF32, or does not; afterwards it does not."""
    allow_tf32(on)
    try:
        yield
    finally:
        allow_tf32(False)
