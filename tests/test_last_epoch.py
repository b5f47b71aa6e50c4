"""The last epoch of a run of some minutes, which there is no time to finish, reads the ends of the columns."""

import math
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import read_metrics

import budget
import checkpoint
import main
import run_files
import training


@pytest.fixture
def trained(monkeypatch):
    """The batches: of each its first row, its steps and whether it began without a hidden state. And all rows."""
    seen = SimpleNamespace(batches=[], rows=0)
    get_batch, step = training.get_batch, training.train_step

    def noting(source, row, seq_len):
        words, targets = get_batch(source, row, seq_len)
        seen.rows = len(source) - 1  # that have a target
        seen.batches.append((row, len(words)))
        return words, targets

    def stepping(model, optimizer, pass_, words, targets, hidden, **kwargs):
        fresh = all(not part.any() for layer in hidden for part in layer)
        seen.batches[-1] += (fresh,)
        return step(model, optimizer, pass_, words, targets, hidden, **kwargs)
    monkeypatch.setattr(training, "get_batch", noting)
    monkeypatch.setattr(training, "train_step", stepping)
    monkeypatch.setattr(training, "sample_seq_len", lambda *_: 3)
    return seen


def parts(batches):
    """The stretches of text that were read without a break, each as first row and the row after its last."""
    found = []
    for row, steps, fresh in batches:
        if found and found[-1][1] == row:
            found[-1][1] = row + steps
        else:
            assert fresh, "after a break the hidden state is that of other text"
            found.append([row, row + steps])
    return found


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("epochs", [2.6, 3.3])
def test_the_last_epoch_reads_the_ends_of_the_columns(train, tmp_path, trained, epochs):
    train(tmp_path / "m.pt", "--epochs", "1")
    batches = len(trained.batches)
    trained.batches.clear()
    train(tmp_path / "n.pt", "--minutes", str(epochs * batches / 60))
    *whole, (start, end) = parts(trained.batches)
    assert whole == [[0, trained.rows]] * math.floor(epochs)
    done = epochs % 1 * trained.rows
    assert end - start == pytest.approx(done, abs=6)
    assert trained.rows - 0.06 * done - 6 <= end <= trained.rows


@pytest.mark.usefixtures("clock")
def test_a_text_too_long_for_the_time_is_read_from_its_beginning_only_until_the_speed_is_known(train, tmp_path,
                                                                                               trained):
    train(tmp_path / "m.pt", "--minutes", "0.5")
    (first, until), (start, end) = parts(trained.batches)
    assert first == 0
    assert until <= 9
    assert end - start == pytest.approx(30 * 3 - until, abs=6)
    assert trained.rows - 12 <= end <= trained.rows


@pytest.mark.usefixtures("clock")
def test_what_is_left_out_is_not_counted(train, tmp_path, trained):
    _, metrics = train(tmp_path / "m.pt", "--minutes", "2", "--log-interval", "1")
    rows = sum(steps for _, steps, _ in trained.batches)
    assert len(parts(trained.batches)) > 1
    (test,), last = metrics["test"], metrics["epoch"][-1]
    assert last["total_tokens"] == 4 * rows == sum(line["tokens"] for line in metrics["batch"])
    assert test["epochs"] == last["epoch"] == round(rows / trained.rows, 3)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("stop_after", [1, 20, 75])
def test_a_run_that_was_stopped_reads_the_same(train, tmp_path, trained, stop_after, monkeypatch):
    """After one batch the speed is not known, after 75 rows have been left out."""
    train(tmp_path / "whole.pt", "--minutes", "1.3")
    whole, step = parts(trained.batches), training.train_step
    trained.batches.clear()

    def interrupted(*args, **kwargs):
        if len(trained.batches) == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return step(*args, **kwargs)
    with monkeypatch.context() as stop:
        stop.setattr(training, "train_step", interrupted)
        train(tmp_path / "m.pt", "--minutes", "1.3")
    train(tmp_path / "m.pt", "--resume", str(tmp_path / "m.pt"))
    assert sum(parts(trained.batches), []) == pytest.approx(sum(whole, []), abs=2)


@pytest.mark.parametrize("columns", [2, 8])
def test_what_was_left_out_is_as_much_with_another_batch_size(train, tmp_path, columns):
    """Half of the text, after two turns through it in four columns."""
    _, before = train(tmp_path / "m.pt", "--epochs", "2")
    path = run_files.last_path(tmp_path / "m.pt")
    content = checkpoint.load(path)
    content["state"]["progress"]["skipped"] = before["epoch"][-1]["total_tokens"] // 4 // 4
    torch.save(content, path)
    main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt"), "--epochs", "3", "--batch_size", str(columns)])
    last = read_metrics(tmp_path / "m.pt")["epoch"][-1]
    assert last["epoch"] == pytest.approx(2.5, abs=0.03)
    assert last["total_tokens"] == pytest.approx(1.25 * before["epoch"][-1]["total_tokens"], rel=0.03)


def test_a_part_that_was_left_out_is_no_epoch(train, tmp_path):
    """The one epoch of --epochs has half of the text so far."""
    train(tmp_path / "m.pt", "--epochs", "1")
    path = run_files.last_path(tmp_path / "m.pt")
    content = checkpoint.load(path)
    content["state"]["progress"]["skipped"] = 60
    torch.save(content, path)
    main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt"), "--minutes", "5"])
    first, last = read_metrics(tmp_path / "m.pt")["epoch"]
    assert first["epoch"] == 1
    assert 1 <= last["epoch"] < 1.2


@pytest.mark.usefixtures("clock")
def test_the_end_of_an_epoch_has_the_number_of_its_batches(train, tmp_path, capsys):
    """However much of it, and of those before, was left out."""
    flags = ["--log-interval", "1", "--lr", "0.1"]
    train(tmp_path / "m.pt", "--minutes", "1", *flags)
    for minutes in ("1.2", "1.4"):
        train(tmp_path / "m.pt", "--resume", str(tmp_path / "m.pt"), "--minutes", minutes, *flags)
    out = capsys.readouterr().out
    assert out.count("rows are left out") == 3
    numbers = re.findall(r"^\| (end of )?epoch +(\d+) \| +(?:time|\d+/)", out, re.MULTILINE)
    ends = [(number, before) for (_, before), (end, number) in zip(numbers, numbers[1:]) if end]
    assert len(ends) >= 3
    assert [number for number, _ in ends] == [before for _, before in ends]
    assert read_metrics(tmp_path / "m.pt")["epoch"][-1]["epoch"] < int(ends[-1][0]) - 1


def test_the_epochs_that_fit_are_those_of_the_speed_without_validation(clock):
    """An epoch in 10 seconds, and 5 of validation: of 60 seconds, 41 are left after 14, then 36."""
    held = budget.Budget(1)
    held.note_validation(5)
    for seconds, epochs in ((2, 0.2), (2, 0.4), (10, 1.4)):
        assert held.epochs_left(epochs) == math.inf
        clock.now += seconds
        held.plan(epochs)
    assert held.epochs_left(1.4) == pytest.approx(budget.SPARE * 4.1)
    clock.now += 5
    held.note_validation(5)
    assert held.epochs_left(1.4) == pytest.approx(budget.SPARE * 3.6)
    assert budget.Budget().epochs_left(1) == math.inf


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("due", [True, False])
def test_time_that_ends_before_a_batch_ends_the_run_without_another_validation(train, tmp_path, monkeypatch, due):
    """The loop is told once that time is left when none is, as if the clock had ticked just after it asked.

    The state of the end is saved, whether it is due after each epoch or not.
    """
    monkeypatch.setattr(training, "is_due", lambda *_: due)
    is_finished, told = training.is_finished, []

    def a_moment_early(run):
        over = is_finished(run)
        if over:
            told.append(True)
        return over and len(told) > 1
    monkeypatch.setattr(training, "is_finished", a_moment_early)
    train(tmp_path / "m.pt", "--minutes", "1")
    assert len(told) == 2
    epochs = [line["epoch"] for line in read_metrics(tmp_path / "m.pt")["epoch"]]
    assert epochs == sorted(set(epochs))
    progress = checkpoint.load(run_files.last_path(tmp_path / "m.pt"))["state"]["progress"]
    assert len(progress["history"]) == len(epochs)
