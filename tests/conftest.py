import os
import signal
import sys
from multiprocessing import forkserver

import pytest
import torch
from helpers import TINY, read_metrics

import budget
import convert
import distributed
import locked_dropout
import main
import process
import qrnn
import steps
import training
from device import allow_tf32
from process import run_script

# A shell that starts the tests in the background has SIGINT ignored, and nohup SIGHUP, which scripts respect.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def one_thread_and_fp32():
    """One thread, unless OMP_NUM_THREADS says more: small tensors gain nothing from more."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if torch.cuda.is_available():
        allow_tf32(False)


@pytest.fixture
def forks(monkeypatch):
    """Let the test start those of `processes.py`, with the paths of this one; none shares a batch when it begins."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    forkserver.ensure_running()
    assert distributed.group is None
    assert locked_dropout.columns is None


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def as_a_gpu(monkeypatch):
    """Tensors of the CPU say that they lie on a GPU.

    So the passes for a GPU run, but for Triton's. PyTorch itself is not deceived where it matters.
    """
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(qrnn, "triton", None)
    monkeypatch.setattr(steps, "read_later", lambda values: values.tolist)


@pytest.fixture
def corpus_dir(tmp_path):
    """A folder of plain text in three splits: 12 words and <eos>, a few hundred tokens."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "by"]
    for split, lines in (("train", 90), ("valid", 20), ("test", 20)):
        text = "".join(" ".join(words[(i * k + k) % 12] for k in range(1, 4 + i % 5)) + "\n" for i in range(lines))
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder


class Clock:
    """Stand in for the module `time`."""

    now = 1000.0

    def monotonic(self):
        return self.now

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The clock of --minutes: batches take a second each, all else takes none."""
    clock, step = Clock(), training.train_step

    def slow_step(*args, **kwargs):
        clock.now += 1
        return step(*args, **kwargs)
    monkeypatch.setattr(budget, "time", clock)
    monkeypatch.setattr(process, "time", clock)
    monkeypatch.setattr(training, "train_step", slow_step)
    return clock


@pytest.fixture
def train(corpus_dir):
    """Train a tiny model on that corpus with main.py; returns the exit status and the metrics, by kind."""
    def run(save, *flags):
        status = main.main([*TINY, "--data", str(corpus_dir), "--save", str(save), *flags])
        return status, read_metrics(save)
    return run


@pytest.fixture
def trained(train, tmp_path):
    """A tiny model, trained for an epoch."""
    train(tmp_path / "m.pt", "--epochs", "1")
    return tmp_path / "m.pt"


@pytest.fixture
def run_converter(monkeypatch, capsys, tmp_path):
    """Run convert.py in `tmp_path`; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_script(convert.main)
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err
    return call


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA"))


def pytest_terminal_summary(terminalreporter):
    """Print how closely each run of the original was followed, a line each."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    lines = sorted(value for report in reports for name, value in report.user_properties if name == "followed")
    for line in lines:
        terminalreporter.write_line(f"reference {line}")
    terminalreporter.write_line(f"reference trajectories followed: {len(lines)}")
