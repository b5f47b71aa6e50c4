"""Train one model in several processes of PyTorch's torchrun, which share the columns of the batch.

    torchrun --nproc_per_node=2 main.py --data data/penn --save PTB.pt

Rank 0 reads the flags, makes or resumes the run and hands it to the others. It alone logs, writes and tests. Every
process draws the masks and lengths of the whole batch, from generators in the same state, and takes its columns. Loss
and gradients are means over columns, so their weighted sums over the processes are those of one process.

In a process that torchrun did not start, each function acts as for a group of this one alone. Shapes are in the
alphabet of `model.py`.
"""

import io
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

import checkpoint
import locked_dropout
import process
import steps
from device import set_up_device
from errors import BadInput, lacks_memory, line_of
from run import open_batches, open_corpus
from run_files import last_path
from utils import map_hidden

TIMEOUT = timedelta(minutes=10)  # that a process waits for the others in one operation
POLL = 0.1  # seconds between looks at the store, while waiting for what may take any time
GONE = 1  # exit status of a process that has lost another

group = None  # the Group of this process; None without torchrun


class Group:
    """Connect this process to the others of torchrun, and communicate with them.

    `job` is torchrun's key-value store, which outlives a restart of the processes. `store` has the keys of this start.
    This process is `rank`, from 0, of `size`. Tensors on the CPU travel by gloo, those on a GPU by NCCL.
    """

    def __init__(self):
        self.rank, self.size, self.local_rank, self.restarts = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"))
        self.parent, self.flat, self.columns, self.state_of = os.getppid(), None, None, None
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        try:
            self.job = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=TIMEOUT)
            self.store = dist.PrefixStore(f"start {self.restarts}", self.job)
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, timeout=TIMEOUT)
        except RuntimeError as error:
            raise BadInput(f"rank {self.rank} does not reach the others: {str(error).splitlines()[0]}") from error

    def share(self, run):
        """Take the columns of this process from the batch of `run`."""
        total, progress = run.args.batch_size, run.progress
        self.columns = self.part(total)
        locked_dropout.columns = total, self.columns
        if run.budget.limit < math.inf:  # one clock for all
            fraction, epochs_left = run.budget.fraction, run.budget.epochs_left
            run.budget.fraction = lambda epochs: self.of_first(fraction(epochs))
            run.budget.epochs_left = lambda epochs: self.of_first(epochs_left(epochs))
        if progress.hidden is not None:
            progress.hidden = map_hidden(lambda part: part[:, self.columns].clone(), progress.hidden)

    def part(self, columns):
        """Return the slice of so many `columns` that belongs to this process.

        The first ranks have one more if `size` does not divide them. The last have none if there are too few.
        """
        each, more = divmod(columns, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (1 if self.rank < more else 0))

    def reduce(self, tensor, op=None):
        """Reduce `tensor` over the processes in place, by `op` (None: the sum), and return it."""
        with self.exchanging():
            dist.all_reduce(tensor, dist.ReduceOp.SUM if op is None else op)
        return tensor

    def meet(self):
        """Wait until all processes have come here. Ends this one when another has ended with an error."""
        with self.exchanging():
            if self.store.add("met", 1) == self.size:
                self.store.set("all met", "1")
            self.wait("all met")

    def of_first(self, number):
        """Return the `number` of rank 0, in every process."""
        return self.reduce(torch.tensor(0.0 if self.rank else number, dtype=torch.float64)).item()

    @contextmanager
    def exchanging(self):
        """End this process when another one goes inside `with exchanging()`; the first that notices prints a line."""
        try:
            yield
        except RuntimeError as error:
            if lacks_memory(error):
                raise
            again = f"; --resume {self.state_of} goes on from the last state" if self.state_of else ""
            reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0]).split(". ")[0]  # gloo begins with [its file]
            line = f"another process of this run has gone ({reason}){again}"
            raise SystemExit(self.tell_once(GONE, line)) from error

    def tell_once(self, status, line):
        """Print an error's line, if no other process has; returns the exit status of the one that has printed."""
        line = f"{sys.argv[0]}: error: {line}"
        try:
            if self.store.add("tellers", 1) == 1:
                process.tell(line)
                self.store.set("ended", str(status))
                return status
            return self.wait("ended")
        except RuntimeError:  # the store has gone too
            process.tell(line)
            return status

    def wait(self, key):
        """Wait until `key` is in the store; returns its number.

        Ends this process when another one has ended with an error. Raises RuntimeError when the store has gone.
        """
        while not self.store.check([key]):
            if self.store.check(["ended"]):
                raise SystemExit(int(self.store.get("ended")))
            time.sleep(POLL)
        return int(self.store.get(key))

    def end(self, status):
        """Wait until rank 0 has finished the work that it does alone, and leave the group; returns its exit status."""
        with self.exchanging():
            if self.rank == 0:
                self.store.set("ended", str(status))
            status = self.wait("ended")
        dist.destroy_process_group()
        return status


# --- the command -----------------------------------------------------------------------------------------------------

def in_group(main, train):
    """Return `main` for processes of torchrun: rank 0 calls it, the others `train` the run that it hands over.

    Of an error one process prints the line, and all exit with its status.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):  # some builds of PyTorch are for one process
        return main

    def run():
        global group
        group = Group()
        if group.rank:
            sys.stdout = None  # rank 0 says all
        try:
            status = train(take_over()) if group.rank else main()
        except Exception as error:
            line = line_of(error)
            if line is None:
                raise
            return group.tell_once(2, line)
        except SystemExit as end:
            if group.rank or end.code:
                raise
            status = 0  # after --help there is no run to hand over
        return group.end(status)
    return run


def check_flags(args):
    """Raise BadInput for flags that do not go with several processes."""
    if group and group.size > 1 and args.cuda_graphs:
        raise BadInput(f"--cuda-graphs: in one process, not in {group.size}")
    if group and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and not (args.save or args.resume):
        raise BadInput("--max-restarts of torchrun: a restart goes on from --save FILE, which is not given")


def after_restart(argv, save, stage):
    """Return the command line that goes on from the state at `save`, if this job wrote it before a restart."""
    argv = sys.argv[1:] if argv is None else argv
    again = group and group.restarts and group.job.check(["saved"]) and last_path(save, stage).exists()
    return [*argv, "--resume", str(save)] if again else argv


def hand_over(run):
    """Send the run that rank 0 has made to the others, and return it once each of them has read the text.

    Raises BadInput when some process would have no column.
    """
    if group is None:
        return run
    if group.size > run.args.batch_size:
        raise BadInput(f"--batch-size {run.args.batch_size}: too few columns for {group.size} processes")
    content = io.BytesIO()
    torch.save((replace(run, batches=None, prepare_save=None), checkpoint.generator_states()), content)
    content = torch.frombuffer(content.getbuffer(), dtype=torch.uint8)
    group.store.set("on a GPU", str(int(run.batches.train.is_cuda)))
    group.store.set("bytes", str(len(content)))
    with group.exchanging():
        dist.broadcast(content, 0)
    group.meet()
    group.share(run)
    return run


def take_over():
    """Receive the run that rank 0 hands over, and read its text.

    Raises BadInput when the text here is another one, or this process has no GPU.
    """
    with group.exchanging():
        content = torch.empty(group.wait("bytes"), dtype=torch.uint8)
        cuda = bool(group.wait("on a GPU"))
        dist.broadcast(content, 0)
    if cuda and group.local_rank >= torch.cuda.device_count():
        raise BadInput(f"rank {group.rank} is process {group.local_rank + 1} of a machine where PyTorch finds "
                       f"{torch.cuda.device_count()} CUDA devices; --no-cuda runs on CPUs")
    if cuda:
        torch.cuda.set_device(group.local_rank)
    device = set_up_device(cuda)
    run, generators = torch.load(io.BytesIO(content.numpy()), map_location=device, weights_only=False)  # of rank 0
    corpus = open_corpus(run.args, run.vocabulary)
    run.batches = open_batches(corpus, run.args, device)
    if corpus.checksum != run.checksum:
        raise BadInput(f"{run.args.data} of rank {group.rank} is not the text of rank 0")
    checkpoint.restore_generators(generators)
    run.metrics = NoMetrics()
    group.meet()
    group.share(run)
    return run


# --- the run ---------------------------------------------------------------------------------------------------------

class NoMetrics:
    """Stand in for the record, in a process that writes none."""

    def write(self, kind, **values):
        pass

    def size(self):
        return 1  # not 0: rank 0 has written it, so there is a state to resume from


def is_first():
    """Return whether this process is the one that writes."""
    return group is None or group.rank == 0


def describe():
    """Return what the record of a run says of its processes."""
    return {} if group is None else {"processes": group.size}


def format_speed(tokens, seconds):
    """Format the tokens per second of all processes, as one more column of a log line."""
    return f" | tokens/s {tokens / max(seconds, 1e-9):8,.0f}" if group else ""


def my_columns(source):
    """Return the columns of `source` (N, B) that belong to this process."""
    return source if group is None else source[:, group.part(source.size(1))]


def whole_hidden(hidden):
    """Return the hidden state of all columns, given that of the columns of this process."""
    if group is None or hidden is None:
        return hidden

    def gather(part):
        whole = part.new_zeros(part.size(0), locked_dropout.columns[0], *part.shape[2:])
        whole[:, group.columns] = part
        return group.reduce(whole)
    return map_hidden(gather, hidden)


def note_saved(save):
    """Note, for a restart by torchrun and for messages, that there is a state of the run at `save` to go on from."""
    if group is None:
        return
    group.state_of = save
    if group.rank == 0:
        group.job.set("saved", "1")


def agree(stop, *asked):
    """Return the maximum of each of these integers over the processes.

    `stop` is the signal that asks this process to stop, 0 if none. It is SIGTERM when torchrun has gone.
    """
    if group is None:
        return stop, *asked
    if os.getppid() != group.parent:
        stop = stop or signal.SIGTERM
    return group.reduce(torch.tensor([stop, *map(int, asked)]), dist.ReduceOp.MAX).tolist()


def evaluate(model, source, bptt):
    """Evaluate as `steps.evaluate` does, each process on its columns of `source` (N, B)."""
    if group is None:
        return steps.evaluate(model, source, bptt)
    mine = my_columns(source)
    loss = steps.evaluate(model, mine, bptt) if mine.size(1) else 0.0
    return group.reduce(torch.tensor(loss * mine.size(1) / source.size(1), dtype=torch.float64)).item()


def summed(forward_backward):
    """Return `forward_backward` over all columns: gradients, loss and norm are those of the whole batch.

    One tensor carries all gradients and the loss through one all-reduce. Afterwards the gradients are views of it.
    """
    if group is None:
        return forward_backward

    def over_all_columns(model, words, targets, hidden):
        hidden, loss_and_norm = forward_backward(model, words, targets, hidden)
        parameters = list(model.parameters())
        if group.flat is None:
            group.flat = parameters[0].new_empty(sum(p.numel() for p in parameters) + 1)
        weight = words.size(1) / locked_dropout.columns[0]
        *parts, loss = group.flat.split([*(p.numel() for p in parameters), 1])
        torch.mul(loss_and_norm[:1], weight, out=loss)
        for parameter, part in zip(parameters, parts):
            torch.mul(parameter.grad, weight, out=part.view_as(parameter))
            parameter.grad = part.view_as(parameter)
        group.reduce(group.flat)
        norm = get_total_norm([parameter.grad for parameter in parameters])
        return hidden, torch.stack([loss.squeeze(0).clone(), norm])
    return over_all_columns
