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
import data
import device
import distributed
import files
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


@pytest.mark.skipif(files.fcntl is None, reason="no locks of Unix")
def test_on_nfs_what_another_process_is_writing_stays_too(tmp_path, monkeypatch):
    flock = files.fcntl.flock

    def lock_of_nfs(file, how):
        if not file.writable():
            raise OSError(9, "Bad file descriptor")
        flock(file, how)
    monkeypatch.setattr(files.fcntl, "flock", lock_of_nfs)
    (tmp_path / "m.pt.1.partial").write_bytes(b"left by a process that was killed")
    with files.replacing(tmp_path / "m.pt") as file:
        files.remove_partial(tmp_path / "m.pt")
        file.write(b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


# --- Windows ---------------------------------------------------------------------------------------------------------

def is_open(path):
    """Whether this process has a file open, or mapped into memory."""
    path = os.path.realpath(path)
    for number in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{number}") and os.readlink(f"/proc/self/fd/{number}") == path:
            return True
    return any(line.endswith(f" {path}") for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def windows(monkeypatch):
    """Files as on Windows: none that is open can be replaced or removed, and locks are those of msvcrt."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("the system does not say which files are open")

    def unless_open(function):
        def call(*paths):
            for path in paths:
                if is_open(path):
                    raise PermissionError(13, "Access is denied", str(path))
            return function(*paths)
        return call

    locker = files.fcntl
    held = SimpleNamespace(LK_NBLCK=2, locking=lambda number, *_: locker.flock(number, locker.LOCK_EX | locker.LOCK_NB))
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "msvcrt", held, raising=False)
    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, unless_open(getattr(os, name)))


def test_files_that_only_look_like_what_a_killed_run_left_are_kept(tmp_path):
    kept = tmp_path / "m.pt.download.partial"
    kept.write_bytes(b"of another program")
    files.remove_partial(tmp_path / "m.pt")
    assert kept.exists()


@pytest.mark.usefixtures("windows")
def test_what_a_killed_run_left_is_removed_on_windows_too(tmp_path):
    left, written = tmp_path / "m.pt.1.partial", tmp_path / "m.pt.2.partial"
    left.write_bytes(b"half")
    with open(written, "wb"):
        files.remove_partial(tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == [written]


@pytest.mark.usefixtures("windows")
def test_a_lock_leaves_no_file_on_windows_either(tmp_path):
    with files.locked(tmp_path / "m.pt"):
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(files.BadInput, match=f"in use by process {os.getpid()}"), files.locked(tmp_path / "m.pt"):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("windows")
def test_a_program_that_has_the_old_file_open_for_a_moment_is_waited_for_on_windows(tmp_path, monkeypatch):
    (tmp_path / "m.pt").write_bytes(b"old")
    scanner = open(tmp_path / "m.pt", "rb")  # noqa: SIM115  it lets go while we wait
    monkeypatch.setattr(files.time, "sleep", lambda _: scanner.close())
    with files.replacing(tmp_path / "m.pt") as file:
        file.write(b"new")
    assert scanner.closed
    assert (tmp_path / "m.pt").read_bytes() == b"new"


@pytest.mark.usefixtures("windows")
def test_a_program_that_keeps_the_old_file_open_on_windows_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "m.pt").write_bytes(b"old")
    monkeypatch.setattr(files, "PATIENCE", 0)
    monkeypatch.setattr(files, "PAUSE", 0.001)
    with open(tmp_path / "m.pt", "rb"), pytest.raises(PermissionError), files.replacing(tmp_path / "m.pt") as file:
        file.write(b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_folder_that_cannot_be_written_is_asked_once_on_windows(tmp_path, monkeypatch):
    """There `os.access` says of any folder that it can be written, so that `tempfile` tries name after name."""
    tries = []

    def denied(path, *_, **__):
        tries.append(path)
        raise PermissionError(13, "Permission denied", path)
    windows = SimpleNamespace(**{**vars(os), "name": "nt", "access": lambda *_: True, "open": denied})
    for module, name, value in ((files.tempfile, "_os", windows), (files.tempfile, "_O_TMPFILE_WORKS", False),
                                (files.tempfile, "TMP_MAX", 9)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(builtins, "open", denied)
    with pytest.raises(files.BadInput, match="cannot be written: Permission denied"):
        files.check_writable(tmp_path / "m.pt")
    with pytest.raises(PermissionError):
        files.nameless(tmp_path)
    assert len(tries) == 2


@pytest.mark.usefixtures("windows")
def test_a_long_text_has_a_cache_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE_TOKENS", 100)
    monkeypatch.setattr(files, "PATIENCE", 0)
    (tmp_path / "book.txt").write_text("the cat sat\n" * 100)
    corpora = [data.Corpus(tmp_path / "book.txt") for _ in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".book.txt.word.cache", "book.txt"]
    assert [corpus.cache_error for corpus in corpora] == [None, None]
    assert corpora[0].train.tolist() == corpora[1].train.tolist() == [0, 1, 2, 3] * 90


def test_a_prompt_file_in_another_encoding_on_windows(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsdecode", lambda content: content.decode("utf-8", "surrogatepass"))
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("utf-8", "surrogatepass"))
    (tmp_path / "prompt.txt").write_bytes("größe".encode("cp1252"))
    with pytest.raises(generate.BadInput, match="the prompt is not UTF-8 text"):
        generate.main(["--no-cuda", "--checkpoint", str(trained), "--prompt-file", str(tmp_path / "prompt.txt")])
    assert tokenize("größe".encode("cp1252"), "byte") == ["103", "114", "246", "223", "101"]


# --- other disks -----------------------------------------------------------------------------------------------------

def test_names_that_differ_in_case_are_one_file_where_the_disk_says_so(tmp_path):
    """A hard link stands for the second name, by which a disk of macOS or Windows finds the first."""
    first, second, other = (tmp_path / name for name in ("PTB.pt", "ptb.pt", "copy.pt"))
    assert not files.same_file(first, second)
    first.write_bytes(b"model")
    if not second.exists():
        assert not files.same_file(first, second)
        os.link(first, second)
    os.link(first, other)
    assert files.same_file(first, second)
    assert not files.same_file(first, other)


def test_a_disk_that_numbers_its_files_anew_each_time_has_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "is_at", lambda *_: False)
    with files.locked(tmp_path / "m.pt"):
        pass


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
