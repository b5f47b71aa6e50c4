"""Files are written whole, locked and removed as they should be, on Windows and on odd disks too."""

import builtins
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import files
import run_files


def test_files_that_only_look_like_what_a_killed_run_left_are_kept(tmp_path):
    kept = tmp_path / "m.pt.download.partial"
    kept.write_bytes(b"of another program")
    files.remove_partial(tmp_path / "m.pt")
    assert kept.exists()


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


@pytest.mark.usefixtures("windows")
def test_a_run_is_removed_once_nobody_has_its_files_open_or_else_its_model_stays(tmp_path, monkeypatch):
    for name in ("m.pt", "m.last.pt", "m.metrics.jsonl"):
        (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(files, "PATIENCE", 0)
    monkeypatch.setattr(files, "PAUSE", 0.001)
    with open(tmp_path / "m.metrics.jsonl", "rb"), \
            pytest.raises(files.BadInput, match="m.metrics.jsonl: could not be removed: Access is denied"):
        run_files.remove_run(tmp_path / "m.pt")
    assert (tmp_path / "m.pt").exists()
    monkeypatch.setattr(files, "PATIENCE", 30)
    spreadsheet = open(tmp_path / "m.metrics.jsonl", "rb")  # noqa: SIM115  it lets go while we wait
    monkeypatch.setattr(files.time, "sleep", lambda _: spreadsheet.close())
    run_files.remove_run(tmp_path / "m.pt")
    assert spreadsheet.closed
    assert not list(tmp_path.iterdir())


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
