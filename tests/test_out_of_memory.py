"""A lack of memory is one line and exit status 2 wherever it comes, and no file is called damaged for it."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY

import checkpoint
import containers
import convert
import dynamic
import main
import resume
import steps
from model import RNNModel
from process import run_script

FOREIGN = Path(__file__).parent / "reference" / "foreign"
CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation"


def raising(error):
    def function(*_, **__):
        raise error
    return function


@pytest.fixture
def line_of(monkeypatch, capsys):
    """Run a script; returns the line with which it ends with exit status 2."""
    def call(function, *arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_script(function)
        errors = capsys.readouterr().err
        assert (end.value.code, errors.count("\n")) == (2, 1), errors
        return errors
    return call


@pytest.mark.parametrize("error, line", [
    (RuntimeError(CUDA), "script.py: error: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB.\n"),
    (MemoryError("Unable to allocate 8 TiB"), "script.py: error: out of memory: Unable to allocate 8 TiB\n"),
    (MemoryError(), "script.py: error: out of memory\n"),
    (OSError(12, "Cannot allocate memory"), "script.py: error: out of memory: [Errno 12] Cannot allocate memory\n")])
def test_any_script_says_so_in_one_line(line_of, error, line):
    assert line_of(raising(error)) == line


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no kernel image is available"), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(RuntimeError, match=str(error)):
        run_script(raising(error))


@pytest.mark.parametrize("owner, name", [(torch, "load"), (RNNModel, "to"), (resume, "make_optimizer")])
@pytest.mark.parametrize("error", [RuntimeError(CUDA), RuntimeError("CUDA error: out of memory"), MemoryError()])
def test_a_full_memory_is_no_damaged_checkpoint(trained, corpus_dir, monkeypatch, line_of, owner, name, error):
    monkeypatch.setattr(owner, name, raising(error))
    line = line_of(main.main, *TINY, "--data", corpus_dir, "--resume", trained)
    assert "error: out of memory" in line
    assert "damaged" not in line


@pytest.mark.parametrize("owner, name, error", [
    (torch, "load", "CUDA error: device is busy"), (RNNModel, "to", "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")])
def test_a_broken_gpu_is_no_damaged_checkpoint_either(trained, monkeypatch, owner, name, error):
    monkeypatch.setattr(owner, name, raising(RuntimeError(error)))
    with pytest.raises(RuntimeError, match=error):
        checkpoint.restore_model(checkpoint.load(trained), trained)


@pytest.mark.parametrize("owner, name", [(containers, "read_archive"), (convert, "parameter_shapes")])
def test_a_full_memory_is_no_damaged_model_of_fastai(tmp_path, monkeypatch, line_of, owner, name):
    monkeypatch.chdir(tmp_path)
    for file in ("fastai_lstm.pth", "fastai_itos.pkl"):
        shutil.copy(FOREIGN / file, file)
    monkeypatch.setattr(owner, name, raising(RuntimeError(CUDA)))
    assert "error: out of memory" in line_of(convert.main, "fastai_lstm.pth", "--vocabulary", "fastai_itos.pkl",
                                             "--save", "new.pt")
    assert not Path("new.pt").exists()


def test_what_keeps_a_state_from_being_written_is_said(trained, corpus_dir, monkeypatch, line_of):
    before = {path.name: path.read_bytes() for path in trained.parent.glob("m.*pt")}
    monkeypatch.setattr(torch, "save", raising(RuntimeError(CUDA)))
    assert "out of memory: CUDA" in line_of(main.main, *TINY, "--data", corpus_dir, "--epochs", "2", "--resume",
                                            trained)
    assert {path.name: path.read_bytes() for path in trained.parent.glob("m.*pt")} == before


def test_scores_of_a_text_that_does_not_fit_are_not_recorded(trained, corpus_dir, monkeypatch, line_of):
    monkeypatch.setattr(RNNModel, "target_logprob", raising(RuntimeError(CUDA)))
    before = {path.name: path.read_bytes() for path in trained.parent.glob("m.*")}
    line_of(dynamic.main, "--no-cuda", "--data", corpus_dir, "--save", trained, "--rule", "sgd")
    assert {path.name: path.read_bytes() for path in trained.parent.glob("m.*")} == before


def test_validation_that_does_not_fit_ends_training_in_one_line(corpus_dir, tmp_path, monkeypatch, line_of):
    monkeypatch.setattr(steps, "evaluate", raising(RuntimeError(CUDA)))
    line_of(main.main, *TINY, "--data", corpus_dir, "--save", tmp_path / "m.pt", "--epochs", "1")
