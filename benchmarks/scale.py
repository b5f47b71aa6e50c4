"""Measure training steps of several processes with one thread each beside one process with as many threads.

    python benchmarks/scale.py --json scale.json           (part of make bench; 3 minutes on 2 cores)
    python benchmarks/scale.py --only ptb-lstm --processes 4

The ways take turns in one run. The toolkit's one all-reduce is compared with PyTorch's DistributedDataParallel, whose
all-reduces overlap with the backward pass. Text is random: its words do not matter.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package

import speed
from timing import machine

import distributed
import locked_dropout
from device import keep_memory, use_onednn
from errors import BadInput
from files import check_writable
from flags import Parser, positive_int
from optimizers import make_optimizer
from process import run_script
from steps import choose_pass, train_step

RECIPES = ("ptb-lstm", "ptb-qrnn", "wt2-lstm")


class Ddp:
    """Hold a model in DistributedDataParallel, as `steps.forward_backward` calls a model."""

    def __init__(self, model):
        self.model, self.ddp = model, DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.zero_grad, self.parameters, self.loss = model.zero_grad, model.parameters, model.loss

    def __call__(self, words, hidden):
        return self.ddp(words, hidden)


def shared_step(recipe, words, targets, ddp=False):
    """Make a training step of this process on its columns of the batch; returns the function and its model."""
    args, group = speed.flags_of(recipe), distributed.group
    model = speed.our_model(recipe, args).train()
    optimizer = make_optimizer(args.optimizer, model, args.lr, args.wdecay)
    mine = group.part(args.batch_size)
    batch = words[:, mine], targets[:, mine], model.init_hidden(mine.stop - mine.start)
    forward_backward = choose_pass(model, args.precision, args.alpha, args.beta)
    called = Ddp(model) if ddp else model
    if not ddp:
        forward_backward, group.flat = distributed.summed(forward_backward), None

    def step():
        torch.set_num_threads(1)
        locked_dropout.columns = args.batch_size, mine
        torch.manual_seed(1)
        train_step(called, optimizer, forward_backward, *batch, lr_scale=1.0, clip=args.clip)
        locked_dropout.columns = None
    return step, model


def timed_reduce(spent):
    """Let the all-reduces of the toolkit add their seconds and bytes to `spent`."""
    reduce = distributed.group.reduce

    def call(tensor, *how):
        start = time.perf_counter()
        reduce(tensor, *how)
        spent.append((time.perf_counter() - start, tensor.nbytes))
        return tensor
    distributed.group.reduce = call


def measure(recipe, repetitions):
    """Measure the seconds of a step in each way, and the seconds and bytes of its all-reduce."""
    args, group, spent = speed.flags_of(recipe), distributed.group, []
    torch.manual_seed(0)
    text = torch.randint(speed.RECIPES[recipe][0], (args.bptt + 1, args.batch_size))
    words, targets = text[:-1], text[1:]
    torch.manual_seed(0)
    step, model = shared_step(recipe, words, targets)
    torch.manual_seed(0)
    ddp_step, ddp_model = shared_step(recipe, words, targets, ddp=True)
    whole_step = speed.our_step(recipe, words, targets) if group.rank == 0 else None

    def whole():
        if whole_step:
            torch.set_num_threads(group.size)
            whole_step()

    step()
    ddp_step()
    even = args.batch_size % group.size == 0  # else the mean of DDP is not that over columns
    differences = [(a.grad - b.grad).norm() / a.grad.norm() for a, b in zip(model.parameters(), ddp_model.parameters())]
    assert not even or max(differences) < 1e-4, differences
    timed_reduce(spent)
    turns = []
    for _ in range(repetitions):
        turn = []
        for way in (whole, step, ddp_step):
            for _ in range(2):  # the first call finds the memory as another way left it
                dist.barrier()
                start = time.perf_counter()
                way()
                dist.barrier()
                seconds = time.perf_counter() - start
            turn.append(seconds)
        turns.append((*turn, spent[-1][0]))
    names = ("one process", "processes", "DDP", "all-reduce")
    found = dict(zip(names, map(statistics.median, zip(*turns))))
    return {**found, "bytes": spent[-1][1], "tokens": args.bptt * args.batch_size}


def table(results, size):
    """Yield the lines of a Markdown table: rates, as times that of one process, and what the all-reduce takes."""
    yield (f"| | 1 x {size} threads, tokens/s | {size} x 1 thread | times | DDP, times | all-reduce, MB | ms | "
           "of the step |")
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, found in results.items():
        one, several, ddp, reduce = (found[key] for key in ("one process", "processes", "DDP", "all-reduce"))
        yield (f"| {name} | {found['tokens'] / one:,.0f} | {found['tokens'] / several:,.0f} | {one / several:.2f} | "
               f"{one / ddp:.2f} | {found['bytes'] / 1e6:.1f} | {1000 * reduce:.0f} | {reduce / several:.0%} |")


def worker(rank, port, args):
    """Run as one of the processes; rank 0 prints the table."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(args.processes),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "0"}
    distributed.group = distributed.Group()
    use_onednn()
    keep_memory()
    reduce, results = distributed.group.reduce, {}
    for recipe in args.only:
        distributed.group.reduce = reduce
        results[recipe] = measure(recipe, args.repetitions)
    if rank == 0:
        print(", ".join(f"{name} {value}" for name, value in machine().items() if name != "threads"))
        print("\n".join(table(results, args.processes)))
        if args.json:
            content = {**machine(), "processes": args.processes, "results": results}
            Path(args.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main():
    parser = Parser(description="Measure training steps of several processes on the CPU.")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, metavar="NAME",
                        help=f"what to measure: {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--processes", type=positive_int, default=2, metavar="N",
                        help="processes, and threads of the one (default: %(default)s)")
    parser.add_argument("--repetitions", type=positive_int, default=5, metavar="N",
                        help="turns of each way (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="where the figures go too")
    args = parser.parse_args()
    for recipe in args.only:
        if args.processes > (columns := speed.flags_of(recipe).batch_size):
            raise BadInput(f"--processes {args.processes}: a batch of {recipe} has {columns} columns")
    if args.json:
        check_writable(args.json)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(worker, (store.port, args), nprocs=args.processes)


if __name__ == "__main__":
    run_script(main)
