"""What goes wrong in several processes: one line, one exit status, nothing half-written."""

import os
import shutil
import signal
import time

import pytest
from helpers import TINY, files, script, tune
from processes import command, together

import checkpoint
import distributed
import resume
import run_files
import training

pytestmark = pytest.mark.usefixtures("forks")


def the_line(size, folder, flags, *how, name="main"):
    """The one line that bad input gives, with exit status 2 of all."""
    statuses, _, errors = together(size, folder, name, flags, *how)
    assert statuses == [2] * size, errors
    assert errors.count("\n") == 1, errors
    return errors


@pytest.mark.parametrize(("flags", "line"), [
    (["--emsize", "x"], "argument --emsize: must be a whole number"),
    (["--data", "nowhere"], "nowhere: no such file or folder"),
    (["--batch_size", "2"], "--batch-size 2: too few columns for 3 processes"),
    (["--cuda-graphs"], "--cuda-graphs: in one process, not in 3"),
    (["--lr", "1e29", "--clip", "0"], "a smaller --lr or a --clip may help")])
def test_what_is_wrong_with_all_is_one_line(corpus_dir, tmp_path, flags, line):
    assert line in the_line(3, tmp_path, command(corpus_dir, tmp_path / "m.pt", *flags))


@pytest.mark.parametrize("name, flags", [
    ("main", [*TINY, "--save", "old.pt"]), ("main", [*TINY, "--save", "old.pt", "--resume", "run.pt"]),
    ("main", [*TINY, "--resume", "tuned.pt"]), ("finetune", ["--no-cuda", "--save", "run.pt"]),
    ("finetune", ["--no-cuda", "--load", "run.pt", "--save", "old.pt"])])
def test_what_is_wrong_in_the_group_leaves_the_old_run(train, corpus_dir, tmp_path, monkeypatch, name, flags):
    """Wrong are too few columns, and another text at rank 1."""
    monkeypatch.chdir(tmp_path)
    for save in ("old.pt", "run.pt", "tuned.pt"):
        train(save, "--epochs", "1")
    tune(corpus_dir, "--save", "tuned.pt", "--epochs", 1)
    before = files(tmp_path)
    flags = [*flags, "--data", corpus_dir, "--overwrite"]
    logs = tmp_path / "logs"
    logs.mkdir()
    assert "too few columns" in the_line(3, logs, [*flags, "--batch_size", "2"], name=name)
    assert "of rank 1 is not the text of rank 0" in the_line(2, logs, flags, other_text, name=name)
    shutil.rmtree(logs)
    assert files(tmp_path) == before


def full_at_first(_):
    """Let the disk of rank 0 be full when the files of the run are to be copied, while rank 1 already trains."""
    def full(*_):
        time.sleep(1)
        raise checkpoint.BadInput("m.last.pt: could not be written")
    resume.carry_on = full


def test_rank_0_ends_all_when_it_cannot_write_the_first_files(train, corpus_dir, tmp_path):
    train(tmp_path / "old.pt", "--epochs", "1")
    line = the_line(2, tmp_path, command(corpus_dir, tmp_path / "m.pt", "--resume", tmp_path / "old.pt"), full_at_first)
    assert "m.last.pt: could not be written" in line
    assert "--resume" not in line


def test_help_is_printed_once_and_ends_all(tmp_path):
    statuses, printed, errors = together(3, tmp_path, "main", ["--help"])
    assert (statuses, errors) == ([0] * 3, "")
    assert printed.count("usage:") == 1


def test_a_restart_needs_a_name_to_go_on_from(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert "--save FILE, which is not given" in the_line(2, tmp_path, [*TINY, "--data", corpus_dir], restarts)


def restarts(_):
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = "1"


def other_text(rank):
    if rank:
        open_corpus = distributed.open_corpus

        def opened(*inputs):
            corpus = open_corpus(*inputs)
            corpus.checksum = "other"
            return corpus
        distributed.open_corpus = opened


def test_another_text_on_another_machine_is_refused(corpus_dir, tmp_path):
    line = the_line(2, tmp_path, command(corpus_dir, tmp_path / "m.pt"), other_text)
    assert "of rank 1 is not the text of rank 0" in line


def full_memory(rank, victim, place):
    def full(*_):
        raise RuntimeError("NCCL error\nCuda failure 2 'out of memory'")
    if rank == victim:
        training.begin = {"exchange": lambda run: setattr(distributed.dist, "all_reduce", full) or begin(run),
                          "validation": lambda run: setattr(distributed.steps, "evaluate", full) or begin(run),
                          "test": lambda run: setattr(training, "evaluate", full) or begin(run)}[place]


begin = training.begin


@pytest.mark.parametrize("victim, place", [(0, "exchange"), (1, "exchange"), (1, "validation"), (0, "test")])
def test_any_process_says_that_memory_is_full(corpus_dir, tmp_path, victim, place):
    flags = command(corpus_dir, tmp_path / "m.pt", "--epochs", "1")
    assert "out of memory: NCCL error" in the_line(2, tmp_path, flags, full_memory, victim, place)


def full_disk(rank):
    """Let the disk of rank 0 be full from its second file on."""
    save, saved = checkpoint.torch.save, []

    def write(content, file):
        saved.append(1)
        if rank == 0 and len(saved) > 2:
            raise OSError(28, "No space left on device")
        save(content, file)
    checkpoint.torch.save = write


def test_a_full_disk_ends_all(corpus_dir, tmp_path):
    line = the_line(2, tmp_path, command(corpus_dir, tmp_path / "m.pt", "--epochs", "3"), full_disk)
    assert "m.last.pt: could not be written: [Errno 28] No space left" in line
    assert not list(tmp_path.glob("*.partial"))


def diverged(rank):
    """Let the loss of the second epoch be NaN, which rank 1 is the first to tell."""
    train_batches = training.train_batches

    def step(*_, **__):
        time.sleep(0 if rank else 2)
        raise FloatingPointError("the loss is nan")

    def batches(run):
        if run.progress.epoch == 1:
            training.train_step = step
        yield from train_batches(run)
    training.train_batches = batches


def test_any_process_says_how_to_go_on_after_a_loss_that_is_not_finite(corpus_dir, tmp_path):
    save = tmp_path / "m.pt"
    assert f"--resume {save} replays it" in the_line(2, tmp_path, command(corpus_dir, save, "--epochs", "2"), diverged)


def killed(rank, victim):
    if rank == victim:
        end_epoch = training.end_epoch

        def end(run):
            if run.progress.epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            end_epoch(run)
        training.end_epoch = end


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_with_a_line_when_one_is_killed(corpus_dir, tmp_path, victim):
    save = tmp_path / "m.pt"
    statuses, _, errors = together(3, tmp_path, "main", command(corpus_dir, save, "--epochs", "3"), killed, victim)
    assert statuses == [-signal.SIGKILL if rank == victim else distributed.GONE for rank in range(3)]
    assert errors.count("another process of this run has gone") == 1
    assert f"--resume {save} goes on" in errors
    assert checkpoint.load(run_files.last_path(save))["epoch"] == 1


@pytest.mark.parametrize("name", ["pointer", "dynamic", "score", "generate", "convert", "plot"])
def test_scripts_for_one_process_say_so(name, monkeypatch):
    for variable, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "test")):
        monkeypatch.setenv(variable, value)
    run = script(name)
    _, errors = run.communicate()
    assert run.returncode == 2
    assert errors.count("\n") == 1
    assert "this script runs in one process" in errors
