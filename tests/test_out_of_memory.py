"""A lack of memory is one line and exit status 2 wherever it comes; no file is called damaged for it."""

import sys

import pytest
import torch
from helpers import TINY

import checkpoint
import dynamic
import main
import resume
import steps
from model import RNNModel
from process import run_script

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
    (MemoryError(), "script.py: error: out of memory\n")])
def test_any_script_says_so_in_one_line(line_of, error, line):
    assert line_of(raising(error)) == line


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no kernel image is available"), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(RuntimeError, match=str(error)):
        run_script(raising(error))


@pytest.mark.parametrize("owner, name", [(torch, "load"), (RNNModel, "to"), (resume, "make_optimizer")])
@pytest.mark.parametrize("error", [RuntimeError(CUDA), RuntimeError("CUDA error: out of memory")])
def test_a_full_gpu_is_no_damaged_checkpoint(trained, corpus_dir, monkeypatch, line_of, owner, name, error):
    monkeypatch.setattr(owner, name, raising(error))
    line = line_of(main.main, *TINY, "--data", corpus_dir, "--resume", trained)
    assert "out of memory: CUDA" in line
    assert "damaged" not in line


@pytest.mark.parametrize("owner, name", [(torch, "load"), (RNNModel, "to")])
def test_a_broken_gpu_is_no_damaged_checkpoint_either(trained, monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, raising(RuntimeError("CUDA error: device is busy")))
    with pytest.raises(RuntimeError, match="busy"):
        checkpoint.restore_model(checkpoint.load(trained), trained)


def test_scores_of_a_text_that_does_not_fit_are_not_recorded(trained, corpus_dir, monkeypatch, line_of):
    monkeypatch.setattr(RNNModel, "target_logprob", raising(RuntimeError(CUDA)))
    before = {path.name: path.read_bytes() for path in trained.parent.glob("m.*")}
    line_of(dynamic.main, "--no-cuda", "--data", corpus_dir, "--save", trained, "--rule", "sgd")
    assert {path.name: path.read_bytes() for path in trained.parent.glob("m.*")} == before


def test_validation_that_does_not_fit_ends_training_in_one_line(corpus_dir, tmp_path, monkeypatch, line_of):
    monkeypatch.setattr(steps, "evaluate", raising(RuntimeError(CUDA)))
    line_of(main.main, *TINY, "--data", corpus_dir, "--save", tmp_path / "m.pt", "--epochs", "1")
