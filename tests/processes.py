"""Start the processes of one run as torchrun would, from one that has imported all."""

import importlib
import multiprocessing
import os
import sys

import pytest
import torch
from helpers import TINY
from torch.distributed import TCPStore

import distributed
import training
from process import run_script

if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("Windows starts no processes in this way", allow_module_level=True)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_reference", "distributed", "torch._dynamo"])  # what the optimizers import
LIMIT = 900  # seconds, for processes that hang; beyond distributed.TIMEOUT, after which they say so themselves


def together(size, folder, name, argv, prepare=None, *details):
    """Run a script in `size` processes; returns their exit statuses and what they all printed, stdout and stderr.

    `prepare(rank, *details)` is called in each before it begins.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun has it
    argv = list(map(str, argv))
    started = [FORKS.Process(target=one_of, args=(rank, size, store.port, folder, name, argv, prepare, details))
               for rank in range(size)]
    for one in started:
        one.start()
    for one in started:
        one.join(LIMIT)
        one.kill()
    printed = ["".join((folder / f"{rank}.{stream}").read_text() for rank in range(size)) for stream in ("out", "err")]
    return [one.exitcode for one in started], *printed


def one_of(rank, size, port, folder, name, argv, prepare, details):
    """Be one of the processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0",
                   "TORCHELASTIC_MAX_RESTARTS": os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")}
    for stream, name_of in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(folder / f"{rank}.{name_of}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    torch.set_num_threads(1)
    main = (prepare and prepare(rank, *details)) or importlib.import_module(name).main
    run_script(distributed.in_group(lambda: main(argv), training.train))


def command(corpus_dir, save, *flags):
    return [*TINY, "--batch_size", "5", "--data", corpus_dir, "--save", save, *flags]
