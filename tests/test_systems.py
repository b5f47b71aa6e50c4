"""The scripts start, train, resume and write text on systems that lack what Linux, glibc and a terminal offer.

What is hidden here stands for Windows, macOS, notebooks, processes without streams, and a locale of plain ASCII. No
other system has run these tests yet (`.github/workflows/test.yml` would).
"""

import builtins
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, read_metrics

import checkpoint
import device
import distributed
import generate
import main
import metrics
import process
from budget import Budget
from process import StopSignals, run_script
from text import tokenize

ROOT = Path(main.__file__).parent
HIDE = """
import builtins, ctypes, runpy, signal, sys
sys.modules["resource"] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
    delattr(signal, name)
really_open = builtins.open
def hidden_open(path, *rest, **how):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", path)
    return really_open(path, *rest, **how)
builtins.open = hidden_open
really_load = ctypes.CDLL.__init__
def hidden_load(self, name, *rest, **how):
    if name is None:
        raise TypeError("no C library by that name")
    really_load(self, name, *rest, **how)
ctypes.CDLL.__init__ = hidden_load
sys.path.insert(0, {root!r})
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def call(script, *arguments, before="", env=None, **streams):
    """Run a script in a process of its own, after the code `before`."""
    start = ["-c", before.format(root=str(ROOT)), str(ROOT / script)] if before else [str(ROOT / script)]
    return subprocess.run([sys.executable, *start, *map(str, arguments)], cwd=ROOT, text=True, encoding="utf-8",
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                          **({"capture_output": True} | streams))


@pytest.mark.slow
def test_scripts_run_without_what_only_linux_has(corpus_dir, tmp_path):
    save = tmp_path / "m.pt"
    for script, *flags in (("main.py", *TINY, "--data", corpus_dir, "--save", save, "--epochs", 1),
                           ("main.py", "--resume", save, "--epochs", 2),
                           ("finetune.py", "--save", save, "--epochs", 1),
                           ("pointer.py", "--save", save, "--window", 5),
                           ("dynamic.py", "--save", save, "--batch_size", 4, "--window", 5),
                           ("generate.py", "--checkpoint", save, "--words", 5, "--outf", "-"),
                           ("main.py", *TINY, "--data", corpus_dir, "--dry-run")):
        ended = call(script, *flags, before=HIDE)
        assert (ended.returncode, ended.stderr) == (0, ""), script
    assert "peak memory unknown on this system" in ended.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="no SIGUSR2")
def test_ctrl_break_of_windows_is_a_signal_to_stop(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR2, raising=False)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGUSR2)
    assert signals.stop == signal.SIGUSR2


def test_a_build_of_pytorch_for_one_process_is_enough(monkeypatch):
    alone = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(torch, "distributed", alone)
    monkeypatch.setitem(sys.modules, "torch.distributed", alone)
    monkeypatch.delitem(sys.modules, "distributed")
    fresh = importlib.import_module("distributed")
    assert fresh.in_group(main.main, None) is main.main
    monkeypatch.setitem(sys.modules, "distributed", distributed)


def test_a_signal_that_the_system_lacks_is_left_out(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
    assert signals.stop == signal.SIGTERM


def test_without_a_c_library_memory_is_left_as_it_is(monkeypatch):
    def missing(_):
        raise TypeError
    monkeypatch.setattr(device.ctypes, "CDLL", missing)
    assert device.keep_memory() is None


class Notebook:
    """A stream as Jupyter has it: written to and flushed, and nothing else."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.mark.parametrize("stream", [None, Notebook()], ids=["none", "notebook"])
def test_streams_that_cannot_be_reconfigured_are_left_as_they_are(train, tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: train(tmp_path / "m.pt", "--epochs", "1")[0])
    assert end.value.code == 0
    assert read_metrics(tmp_path / "m.pt")["test"]
    assert sys.stdout is stream


def test_text_needs_a_stream_to_be_printed_to(train, tmp_path, monkeypatch):
    train(tmp_path / "m.pt", "--epochs", "1")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(generate.BadInput, match="there is no standard output"):
        generate.main(["--no-cuda", "--checkpoint", str(tmp_path / "m.pt"), "--outf", "-"])


@pytest.mark.slow
def test_a_process_whose_streams_are_closed_trains(corpus_dir, tmp_path):
    command = [sys.executable, ROOT / "main.py", *TINY, "--data", corpus_dir, "--save", tmp_path / "m.pt"]
    line = " ".join(f"'{part}'" for part in [*command, "--epochs", "1"])
    assert subprocess.run(f"{line} >&- 2>&- <&-", shell=True).returncode == 0
    assert read_metrics(tmp_path / "m.pt")["test"]


@pytest.mark.slow
def test_a_prompt_and_a_path_beyond_ascii_in_a_locale_of_ascii(tmp_path):
    folder = tmp_path / os.fsdecode("größe".encode())  # the locale of the tests may be of ASCII too
    folder.mkdir()
    (folder / "book.txt").write_text("größe über alles\n" * 300, encoding="utf-8")
    trained = call("main.py", *TINY, "--data", folder / "book.txt", "--save", folder / "m.pt", "--epochs", 1, env=PLAIN)
    assert (trained.returncode, trained.stderr) == (0, "")
    resumed = call("main.py", "--resume", folder / "m.pt", "--epochs", 2, env=PLAIN)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    ended = call("generate.py", "--checkpoint", folder / "m.pt", "--prompt", os.fsdecode("größe über".encode()),
                 "--words", 2, "--outf", folder / "text.txt", env=PLAIN)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (folder / "text.txt").read_text(encoding="utf-8").startswith("größe über ")


@pytest.mark.skipif(os.name != "posix", reason="git is a script of sh")
def test_a_complaint_of_git_that_the_locale_cannot_read_is_no_error(tmp_path, monkeypatch):
    """... as of a checkout in a folder beyond ASCII that belongs to another user."""
    (tmp_path / "git").write_bytes(b"#!/bin/sh\necho 'fatal: dubious ownership in \xff\xc3\x9f' >&2\nexit 128\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert metrics.git_commit() is None


@pytest.mark.skipif(not os.path.exists("/proc/self/comm"), reason="no names of processes in /proc")
def test_a_process_with_a_name_beyond_ascii_has_a_peak_memory():
    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    comm.write_bytes("größe".encode())
    try:
        assert device.peak_memory() > 2**20
    finally:
        comm.write_bytes(before)


def test_log_lines_go_nowhere_without_a_stream(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    metrics.log("| a line |")
    with metrics.progress_bar(3, 0, "row", "epoch") as bar:
        bar.update(1)
    assert bar.disable


@pytest.mark.usefixtures("train")
def test_a_checkpoint_holds_a_path_that_the_locale_cannot_read(corpus_dir, tmp_path):
    odd = os.fsdecode(os.fsencode(corpus_dir) + b"\xff")
    os.rename(corpus_dir, odd)
    assert main.main([*TINY, "--data", odd, "--save", str(tmp_path / "m.pt"), "--epochs", "1"]) == 0
    assert checkpoint.load(tmp_path / "m.pt")["flags"]["data"] == odd


def test_a_prompt_file_in_another_encoding_on_windows(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsdecode", lambda content: content.decode("utf-8", "surrogatepass"))
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("utf-8", "surrogatepass"))
    (tmp_path / "prompt.txt").write_bytes("größe".encode("cp1252"))
    with pytest.raises(generate.BadInput, match="the prompt is not UTF-8 text"):
        generate.main(["--no-cuda", "--checkpoint", str(trained), "--prompt-file", str(tmp_path / "prompt.txt")])
    assert tokenize("größe".encode("cp1252"), "byte") == ["103", "114", "246", "223", "101"]


# --- notebooks -------------------------------------------------------------------------------------------------------

def test_a_script_that_has_ended_gives_a_later_call_its_whole_time(monkeypatch):
    monkeypatch.setattr(process, "began", process.time.monotonic() - 3600)
    with pytest.raises(SystemExit):
        run_script(lambda: 0)
    assert Budget(minutes=1).spent() < 60


def test_a_call_of_main_has_the_time_that_reading_the_text_takes_in_its_minutes(train, tmp_path, clock, monkeypatch):
    """As a script has it. Each batch takes a second."""
    def slow(*args):
        clock.now += 30
        return open_corpus(*args)
    open_corpus = main.open_corpus
    monkeypatch.setattr(main, "open_corpus", slow)
    for number in (1, 2):
        start = clock.now
        train(tmp_path / f"{number}.pt", "--minutes", "1")
        assert clock.now == start + 60
    assert process.began is None


def test_run_in_a_notebook_leaves_its_signals_alone(monkeypatch):
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    monkeypatch.setattr(process, "began", None)
    numbers = [signal.SIGINT, *(getattr(signal, name) for name in process.SAVE if hasattr(signal, name))]
    before = [signal.getsignal(number) for number in numbers]
    try:
        process.begin()
        assert [signal.getsignal(number) for number in numbers] == before
        assert process.began is None, "an import that is interrupted is no part of the next run"
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
