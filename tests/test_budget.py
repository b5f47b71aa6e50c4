"""A run that fits into some minutes, by a clock that goes on a second with each batch."""

import math
import signal
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from helpers import TINY, read_metrics

import budget
import checkpoint
import data
import main
import steps
import training
from errors import BadInput
from run import open_batches


@pytest.fixture
def slow_start(monkeypatch, clock):
    """What comes before the first batch takes 30 seconds."""
    make_optimizer = main.make_optimizer

    def slow(*args):
        clock.now += 30
        return make_optimizer(*args)
    monkeypatch.setattr(main, "make_optimizer", slow)


def batches(metrics):
    return [(line["epoch"], line["batch"]) for line in metrics["batch"]]


def test_the_rate_rises_and_falls_in_straight_lines_to_the_end_of_the_time(train, tmp_path, clock, monkeypatch):
    used, step = [], training.train_step

    def noting(*args, lr_scale, clip):
        used.append(lr_scale)
        return step(*args, lr_scale=lr_scale, clip=clip)
    monkeypatch.setattr(training, "train_step", noting)
    monkeypatch.setattr(training, "sample_seq_len", lambda *_: 7)  # the --bptt of these runs
    train(tmp_path / "m.pt", "--minutes", "2.5", "--optimizer", "adam", "--lr", "0.01")
    assert clock.now == 1150
    assert len(used) == 150
    done = [second / 150 for second in range(150)]
    assert used == pytest.approx([min(part / 0.02, 1 - part) for part in done], abs=1e-2)


@pytest.mark.usefixtures("slow_start")
def test_the_rate_rises_from_the_first_batch_on_however_long_the_start_takes(train, tmp_path, monkeypatch):
    used, step = [], training.train_step

    def noting(*args, lr_scale, clip):
        used.append(lr_scale)
        return step(*args, lr_scale=lr_scale, clip=clip)
    monkeypatch.setattr(training, "train_step", noting)
    monkeypatch.setattr(training, "sample_seq_len", lambda *_: 7)
    train(tmp_path / "m.pt", "--minutes", "5")
    assert used[:9] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 264 / 300, 263 / 300, 262 / 300], abs=1e-2)


def test_the_rate_is_never_below_nothing_where_validation_takes_less_than_estimated(clock):
    """Several processes share the validation that one has timed. More time to train is a smaller part that is done."""
    held = budget.Budget(1)
    held.valid_seconds = 20
    clock.now += 20
    assert held.lr_scale(0) == 0
    held.valid_seconds = 2
    clock.now += 3
    assert held.lr_scale(1) == 0
    clock.now += 0.58
    assert held.lr_scale(1) == pytest.approx(0.5)


def test_the_time_of_validation_and_test_is_kept_free(train, tmp_path, clock, monkeypatch):
    evaluate = steps.evaluate

    def slow(model, source, bptt):
        clock.now += (len(source) - 1) / 10
        return evaluate(model, source, bptt)
    monkeypatch.setattr(training, "evaluate", slow)
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(budget, "evaluate", slow)
    train(tmp_path / "m.pt", "--minutes", "3")
    assert 1180 <= clock.now < 1182


@pytest.mark.usefixtures("clock")
def test_the_last_part_of_an_epoch_is_validated_and_more_minutes_go_on_within_it(train, corpus_dir, tmp_path):
    save = tmp_path / "m.pt"
    flags = ["--log-interval", "1", "--optimizer", "adam", "--lr", "0.01"]
    _, metrics = train(save, "--minutes", "0.5", *flags)
    assert len(metrics["batch"]) == 30
    last = metrics["epoch"][-1]
    assert last["epoch"] % 1 > 0
    assert last["best_epoch"] == math.ceil(last["epoch"])
    model = checkpoint.restore_model(checkpoint.load(save), save)
    valid = data.load_split(data.Corpus(corpus_dir), "valid", 10, "cpu")
    assert steps.evaluate(model, valid, 7) == pytest.approx(min(line["loss"] for line in metrics["epoch"]), abs=1e-7)
    (test,) = metrics["test"]
    assert test["epochs"] == last["epoch"]

    train(save, "--resume", str(save), "--minutes", "1")
    metrics = read_metrics(save)
    assert len(batches(metrics)) == len(set(batches(metrics))) == 60
    assert [number for epoch, number in batches(metrics) if epoch == 1] == list(
        range(1, 1 + sum(epoch == 1 for epoch, _ in batches(metrics))))


def test_a_run_that_was_stopped_has_the_time_that_was_left(train, tmp_path, clock, monkeypatch):
    step = training.train_step

    def interrupted(*args, **kwargs):
        if clock.now == 1040:
            raise KeyboardInterrupt
        return step(*args, **kwargs)
    monkeypatch.setattr(training, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "m.pt", "--minutes", "1", "--log-interval", "1")
    spent = checkpoint.load(tmp_path / "m.last.pt")["state"]["progress"]["spent"]
    clock.now = 5000.0  # much later
    train(tmp_path / "m.pt", "--resume", str(tmp_path / "m.pt"))
    assert clock.now == 5060 - spent


@pytest.mark.usefixtures("clock")
def test_epochs_win_and_the_rate_falls_to_their_end(train, tmp_path):
    _, metrics = train(tmp_path / "m.pt", "--minutes", "1000", "--epochs", "2", "--log-interval", "1")
    assert [line["epoch"] for line in metrics["epoch"]] == [1, 2]
    rates = [line["mean_lr"] / line["lr"] / line["tokens"] * 4 * 7 for line in metrics["batch"]]
    assert max(rates) > 0.9
    assert rates[-1] < 0.1


@pytest.mark.usefixtures("clock")
def test_no_epochs_are_none_however_many_minutes_there_are(train, tmp_path):
    _, metrics = train(tmp_path / "m.pt", "--minutes", "1", "--epochs", "0")
    assert "epoch" not in metrics


@pytest.mark.usefixtures("clock")
def test_a_schedule_of_epochs_is_not_followed_twice_when_the_time_ends_within_one(train, tmp_path):
    """A --when that an earlier epoch has followed divides the rate once."""
    _, metrics = train(tmp_path / "m.pt", "--minutes", "0.5", "--when", "1")
    assert metrics["epoch"][-1]["epoch"] % 1 > 0
    assert len(metrics["decay"]) == 1


@pytest.mark.usefixtures("clock")
def test_the_plan_is_what_the_speed_so_far_gives(train, tmp_path, capsys):
    _, metrics = train(tmp_path / "m.pt", "--minutes", "2")
    out = capsys.readouterr().out
    planned = float(out.split("| plan | ")[1].split(" epochs")[0])
    assert planned == pytest.approx(metrics["test"][0]["epochs"], rel=0.25)
    assert f"epochs of {planned:.2f} planned in 2.00 of 2 minutes" in out


@pytest.mark.usefixtures("clock")
def test_log_lines_say_what_is_left(train, tmp_path, capsys):
    """Off a terminal there is no bar that would. Each batch takes a second."""
    train(tmp_path / "m.pt", "--minutes", "2", "--log-interval", "6")
    lines = [line for line in capsys.readouterr().out.splitlines() if "batches |" in line]
    assert [line.split(" | ")[-1] for line in lines[:2]] == ["1.9 minutes left", "1.8 minutes left"]


@pytest.mark.usefixtures("clock")
def test_no_minutes_change_nothing(train, tmp_path, capsys):
    train(tmp_path / "m.pt", "--epochs", "1")
    assert "plan" not in capsys.readouterr().out
    assert budget.Budget().lr_scale(3) == 1


@pytest.mark.parametrize(("minutes", "tokens", "columns"), [
    (None, 10**6, (10, 1)), (3.0, 9_999, (10, 1)), (3.0, 99_999, (10, 9)), (3.0, 500_000, (50, 50)),
    (3.0, 10**7, (100, 100))])
def test_long_texts_are_scored_in_more_columns_of_ten_thousand_rows(minutes, tokens, columns):
    text = torch.zeros(tokens, dtype=torch.uint8)
    corpus = Namespace(train=text, valid=text, test=text, has_test=True, first_unknown={}, dictionary=range(5))
    args = Namespace(batch_size=20, cuda_graphs=False, minutes=minutes)
    batches = open_batches(corpus, args, "cpu")
    assert (batches.train.size(1), batches.valid.size(1), batches.test.size(1)) == (20, *columns)


def test_minutes_that_scoring_alone_takes_are_bad_input(train, tmp_path, clock, monkeypatch):
    def slow(*_):
        clock.now += 30
    monkeypatch.setattr(budget, "evaluate", slow)
    with pytest.raises(BadInput, match="--minutes 0.5: validation and test alone take about"):
        train(tmp_path / "m.pt", "--minutes", "0.5")
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.usefixtures("slow_start")
def test_a_dry_run_has_its_batch_although_the_start_takes_all_of_the_time(corpus_dir, capsys):
    assert main.main([*TINY, "--data", str(corpus_dir), "--minutes", "0.1", "--dry-run"]) == 0
    assert "| dry run | valid loss" in capsys.readouterr().out


@pytest.mark.usefixtures("slow_start")
def test_minutes_that_the_start_alone_takes_are_bad_input(train, tmp_path):
    """Such a run has no model to test. It must not look like one that has come to its end, nor remove one."""
    train(tmp_path / "m.pt", "--epochs", "1")
    before = {path: path.read_bytes() for path in tmp_path.glob("m.*")}
    with pytest.raises(BadInput, match="--minutes 0.5: no time to train; the start took 30 s"):
        train(tmp_path / "m.pt", "--minutes", "0.5", "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.glob("m.*")} == before


def test_a_run_that_goes_on_ends_though_scoring_takes_longer_by_now(train, tmp_path, clock, monkeypatch):
    step, evaluate = training.train_step, budget.evaluate

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return step(*args, **kwargs)

    def slow(*args):
        clock.now += 30
        return evaluate(*args)
    with monkeypatch.context() as stop:
        stop.setattr(training, "train_step", interrupted)
        train(tmp_path / "m.pt", "--minutes", "1")
    monkeypatch.setattr(budget, "evaluate", slow)
    _, metrics = train(tmp_path / "m.pt", "--resume", str(tmp_path / "m.pt"))
    assert len(metrics["test"]) == 1


@pytest.mark.parametrize("stop_after", [5, 55])
def test_what_was_trained_before_a_stop_is_validated_though_no_time_is_left(train, tmp_path, clock, monkeypatch,
                                                                            stop_after):
    """After 5 seconds there is no model yet, after 55 that of an earlier epoch."""
    step = training.train_step

    def interrupted(*args, **kwargs):
        if clock.now == 1000 + stop_after - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(*args, **kwargs)
    monkeypatch.setattr(training, "train_step", interrupted)
    _, before = train(tmp_path / "m.pt", "--minutes", "1", "--log-interval", "1")
    assert len(before["batch"]) == stop_after
    _, metrics = train(tmp_path / "m.pt", "--resume", str(tmp_path / "m.pt"), "--minutes", "0.05")
    assert len(metrics["batch"]) == stop_after
    assert len(metrics["epoch"]) == len(before.get("epoch", [])) + 1
    assert metrics["epoch"][-1]["epoch"] == metrics["test"][0]["epochs"]
    train(tmp_path / "m.pt", "--resume", str(tmp_path / "m.pt"))
    assert len(read_metrics(tmp_path / "m.pt")["epoch"]) == len(metrics["epoch"])


@pytest.mark.usefixtures("clock")
def test_a_run_says_whether_its_time_or_its_epochs_came_to_an_end_and_what_goes_on(train, tmp_path, capsys):
    train(tmp_path / "m.pt", "--minutes", "5", "--epochs", "1")
    out = capsys.readouterr().out
    assert "| end of epochs | 1.00 epochs of 1.00 planned" in out
    assert out.endswith("; --resume with a larger --epochs goes on\n")
    train(tmp_path / "n.pt", "--minutes", "1")
    out = capsys.readouterr().out
    assert "| end of time |" in out
    assert out.endswith("; --resume with a larger --minutes goes on\n")


@pytest.mark.usefixtures("clock")
def test_of_a_run_that_was_stopped_no_end_is_told(train, tmp_path, capsys, monkeypatch):
    step = training.train_step
    monkeypatch.setattr(training, "train_step", lambda *args, **flags: (signal.raise_signal(signal.SIGINT),
                                                                        step(*args, **flags))[1])
    assert train(tmp_path / "m.pt", "--minutes", "5")[0] == 130
    out = capsys.readouterr().out
    assert "stopped by SIGINT" in out
    assert "| end of time |" not in out


def test_a_run_that_goes_on_has_no_second_rise(clock):
    assert budget.Budget(1, spent=30).lr_scale(3) == 0.5
    assert budget.Budget(1, spent=0).lr_scale(3) == 0
    assert clock.now == 1000


@pytest.mark.parametrize(("minutes", "planned"), [(1, "3.00"), (0.9, "2.70")])
def test_the_plan_leaves_the_time_of_validation_and_test(clock, minutes, planned):
    """An epoch in 10 seconds, and one of 15 for validation after each: of 28 that are left 10 + 15 + 3, of 22 10."""
    held = budget.Budget(minutes)
    held.valid_seconds, held.test_seconds = 15, 5
    assert held.plan(0) is None
    clock.now += 2
    assert held.plan(0.7) is None
    clock.now += 10
    assert held.plan(1.7) == f"| plan | {planned} epochs, one in 10 s, and 20 s for the last validation and the test"
    assert held.plan(2.7) is None


def test_a_slow_start_does_not_count(clock):
    """A batch in 10 seconds, then one in each."""
    held = budget.Budget(10)
    clock.now += 10
    assert held.plan(0.01) is None
    plans = []
    for done in range(2, 30):
        clock.now += 1
        plans.append(held.plan(done / 100))
    (plan,) = filter(None, plans)
    assert plan.startswith("| plan | 5.91 epochs, one in 100 s")


def test_a_clock_that_has_not_moved_is_no_division_by_zero(clock):
    held = budget.Budget(1, epochs=1)
    clock.now += 1
    assert [held.plan(part) for part in (0.01, 0.04)] == [None, None]
    assert "| plan | 1.00 epochs" in held.plan(0.08)


@pytest.mark.parametrize(("seconds", "text"), [(119, "119 s"), (120, "2.0 minutes"), (3600, "60.0 minutes")])
def test_a_long_epoch_takes_minutes(seconds, text):
    assert budget.format_seconds(seconds) == text


@pytest.mark.parametrize(("rows", "seconds"), [(101, 50), (21, 10), (6, 2.5)])
def test_an_evaluation_is_estimated_from_its_first_rows(clock, monkeypatch, rows, seconds):
    """Each row takes half a second, 10 rows are looked at, and once the machine is busy for a minute."""
    seen = []

    def evaluate(_, source, bptt):
        seen.append(len(source) - 1)
        clock.now += 0.5 * seen[-1] + 60 * (len(seen) == 3)
        assert bptt == 5
    monkeypatch.setattr(budget, "evaluate", evaluate)
    assert budget.scoring_seconds(None, torch.zeros(rows, 2), 5) == seconds
    assert max(seen) <= 10
    assert budget.scoring_seconds(None, None, 5) == 0


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("each", "refused"), [(22.4, False), (22.6, True)])
def test_scoring_may_take_three_quarters_of_the_time(monkeypatch, each, refused):
    monkeypatch.setattr(budget, "scoring_seconds", lambda *_: each)
    batches = [None, torch.zeros(9, 1), torch.zeros(9, 1)]
    with pytest.raises(BadInput, match="take about 45 s") if refused else nullcontext():
        budget.Budget(1).time_scoring(None, batches, 5)


def test_a_validation_that_takes_longer_than_estimated_leaves_less_time_to_train(train, tmp_path, clock, monkeypatch):
    def slow(*args):
        clock.now += 10
        return steps.evaluate(*args)
    monkeypatch.setattr(training.distributed, "evaluate", slow)
    monkeypatch.setattr(training, "time", clock)
    train(tmp_path / "m.pt", "--minutes", "3")
    assert clock.now <= 1181
