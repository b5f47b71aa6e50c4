"""Several processes train as one does: the recorded runs, and states that others go on from.

The tests start the processes themselves, as torchrun would. `test_distributed_faults.py` has what goes wrong,
`test_torchrun.py` what needs torchrun.
"""

import importlib
import math
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import scale
import test_reference
import torch
from helpers import ROOT, read_metrics
from processes import command, together

import budget
import checkpoint
import distributed
import locked_dropout
import process
import run_files
import training

pytestmark = pytest.mark.usefixtures("forks")


def alone(corpus_dir, save, *flags):
    return importlib.import_module("main").main(list(map(str, command(corpus_dir, save, *flags))))


def in_float64(_):
    torch.set_default_dtype(torch.float64)


def state_difference(one, other, stage="train"):
    """The largest difference of two runs' states: weights, averages, hidden state, losses."""
    def tensors(nested):
        if isinstance(nested, torch.Tensor):
            yield nested.double()
        elif isinstance(nested, (dict, list, tuple)):
            for part in nested.values() if isinstance(nested, dict) else nested:
                yield from tensors(part)

    contents = [checkpoint.load(run_files.last_path(save, stage)) for save in (one, other)]
    for content in contents:
        progress = content["state"]["progress"]
        content["losses"] = torch.tensor([*progress["history"], progress["epoch_loss"]])
    parts = [list(tensors([content["model"], content["state"], content["losses"]])) for content in contents]
    pairs = zip(*parts, strict=True)
    return max(abs(a - b).max().item() for a, b in pairs if a.numel())


# --- the same run ----------------------------------------------------------------------------------------------------

def as_recorded(rank, case, save):
    """Give a process the masks of a recorded run, and rank 0 its weights."""
    torch.set_default_dtype(torch.float64)
    patch = pytest.MonkeyPatch()
    if rank:
        test_reference.RecordedMasks(patch, case["flags"]["seed"])
        return None
    return lambda _: test_reference.train(case, save, patch) and 0


QUICK = [("lstm_ntasgd", 3), ("lstm_finetune", 2)]


@pytest.mark.parametrize(("name", "size"), [
    pytest.param(name, size, marks=[] if (name, size) in QUICK else pytest.mark.slow)
    for name in test_reference.CASES for size in (2, 3)])
@pytest.mark.usefixtures("in_float64")
def test_float64_follows_every_loss_of_the_original(name, size, tmp_path, monkeypatch, record_property):
    def train(case, save, *_, **__):
        statuses, _, errors = together(size, tmp_path, "main", [], as_recorded, case, save)
        assert statuses == [0] * size, errors
        return read_metrics(save)

    case = test_reference.CASES[name]
    monkeypatch.setattr(test_reference, "train", train)
    largest = test_reference.follow(case, tmp_path, monkeypatch, lambda *_: None)
    record_property("followed", f"{name} in {size} processes: largest difference {largest:.1e}")
    assert largest <= test_reference.TOLERANCE
    assert test_reference.weight_difference(case, tmp_path / "run.pt") <= test_reference.TOLERANCE


def fast_masks(rank):
    in_float64(rank)
    locked_dropout.MIN_MASK_VALUES = 8


@pytest.mark.usefixtures("in_float64")
def test_masks_of_the_fast_generator_are_shared_out_too(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(locked_dropout, "MIN_MASK_VALUES", 8)
    flags = ["--epochs", "2", "--model", "QRNN"]
    alone(corpus_dir, tmp_path / "one.pt", *flags)
    assert together(2, tmp_path, "main", command(corpus_dir, tmp_path / "two.pt", *flags), fast_masks)[0] == [0, 0]
    assert state_difference(tmp_path / "one.pt", tmp_path / "two.pt") <= 1e-9


def keep_weights(rank, folder):
    """Keep what each process holds in the end."""
    report_test = training.report_test

    def report(run, stop):
        torch.save([run.model.state_dict(), run.optimizer.state_dict()["state"]], folder / f"{rank}.weights")
        return report_test(run, stop)
    training.report_test = report


def test_all_processes_hold_the_same_weights_and_averages(corpus_dir, tmp_path):
    flags = ["--epochs", "5", "--nonmono", "1", "--lr", "20"]
    together(3, tmp_path, "main", command(corpus_dir, tmp_path / "m.pt", *flags), keep_weights, tmp_path)
    (weights, averages), *others = (torch.load(tmp_path / f"{rank}.weights") for rank in range(3))
    assert "ax" in averages[0]
    for other_weights, other_averages in others:
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
        assert all(torch.equal(averages[i]["ax"], other_averages[i]["ax"]) for i in averages)


def other_clock(rank, folder):
    """Let each batch take a second by the clock of rank 0. That of rank 1 is long ahead, and faster."""
    keep_weights(rank, folder)
    steps, step = [], training.train_step

    def counted(*given, **how):
        steps.append(1 + rank / 2)
        return step(*given, **how)
    training.train_step = counted
    ahead = 10_000 * rank
    clock = SimpleNamespace(monotonic=lambda: ahead + sum(steps), perf_counter=lambda: sum(steps))
    budget.time = training.time = process.time = clock


def test_minutes_are_those_of_one_clock(corpus_dir, tmp_path):
    flags = command(corpus_dir, tmp_path / "m.pt", "--minutes", "1", "--epochs", "100000", "--log-interval", "1")
    statuses, printed, errors = together(2, tmp_path, "main", flags, other_clock, tmp_path)
    assert statuses == [0, 0], errors
    assert printed.count("| end of time |") == 1
    record = read_metrics(tmp_path / "m.pt")
    assert len(record["batch"]) == 60
    assert len(record["epoch"]) == math.ceil(record["test"][0]["epochs"])  # only of the last one rows are left out
    assert printed.count("rows are left out") == 1
    (weights, _), (other_weights, _) = (torch.load(tmp_path / f"{rank}.weights") for rank in range(2))
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_columns_are_shared_out_once_each():
    for size in range(1, 6):
        for columns in range(12):
            ranks = [distributed.Group.__new__(distributed.Group) for _ in range(size)]
            for rank, one in enumerate(ranks):
                one.rank, one.size = rank, size
            parts = [list(range(columns))[one.part(columns)] for one in ranks]
            assert sum(parts, []) == list(range(columns))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- what is written -------------------------------------------------------------------------------------------------

def test_one_process_logs_and_records_for_all(corpus_dir, tmp_path):
    flags = ["--epochs", "1", "--log-interval", "5"]
    _, printed, errors = together(2, tmp_path, "main", command(corpus_dir, tmp_path / "m.pt", *flags))
    record = read_metrics(tmp_path / "m.pt")
    assert not errors
    assert printed.count("2 processes") == printed.count("end of training") == 1
    assert printed.count("tokens/s") == len(record["batch"])
    assert [line["processes"] for line in record["run"]] == [2]
    assert len(record["epoch"]) == len(record["test"]) == 1


def test_a_dry_run_writes_nothing(corpus_dir, tmp_path):
    statuses, printed, _ = together(2, tmp_path, "main", command(corpus_dir, tmp_path / "m.pt", "--dry-run"))
    assert statuses == [0, 0]
    assert printed.count("peak memory") == 1
    assert not list(tmp_path.glob("m.*"))


# --- states ----------------------------------------------------------------------------------------------------------

def stop_one(rank, batches):
    """Send SIGTERM to the last process only, after so many batches; all in float64."""
    in_float64(rank)
    if rank == 1:
        train_step, done = training.train_step, []

        def step(*inputs, **how):
            done.append(1)
            if len(done) == batches:
                signal.raise_signal(signal.SIGTERM)
            return train_step(*inputs, **how)
        training.train_step = step


@pytest.mark.parametrize("model", ["LSTM", "QRNN"])
@pytest.mark.usefixtures("in_float64")
def test_a_state_from_the_middle_of_an_epoch_goes_on_in_any_number_of_processes(corpus_dir, tmp_path, model):
    flags = ["--model", model, "--epochs", "2", "--nonmono", "0", "--lr", "5"]
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    assert together(2, tmp_path, "main", command(corpus_dir, whole, *flags), in_float64)[0] == [0, 0]
    statuses, printed, _ = together(2, tmp_path, "main", command(corpus_dir, parts, *flags), stop_one, 5)
    assert statuses == [143, 143]
    assert "stopped by SIGTERM | --resume" in printed
    for size in (1, 2, 3):
        save = tmp_path / f"in{size}.pt"
        again = command(corpus_dir, save, *flags, "--resume", parts)
        if size == 1:
            alone(corpus_dir, save, *flags, "--resume", parts)
        else:
            assert together(size, tmp_path, "main", again, in_float64)[0] == [0] * size
        difference = state_difference(whole, save)
        assert difference == 0 if size == 2 else difference <= 1e-9
    alone(corpus_dir, tmp_path / "alone.pt", *flags)
    again = command(corpus_dir, tmp_path / "alone.pt", *flags, "--resume", tmp_path / "alone.pt", "--epochs", "3")
    assert together(2, tmp_path, "main", again, in_float64)[0] == [0, 0]


def test_fine_tuning_goes_on_as_if_it_had_not_stopped(corpus_dir, tmp_path):
    alone(corpus_dir, tmp_path / "m.pt", "--epochs", "1")
    data = ["--no-cuda", "--data", corpus_dir, "--load", tmp_path / "m.pt", "--save"]
    for save, epochs in (("whole.pt", 3), ("parts.pt", 1)):
        flags = [*data, tmp_path / save, "--epochs", epochs]
        assert together(2, tmp_path, "finetune", flags)[0] == [0, 0]
    again = ["--no-cuda", "--resume", tmp_path / "parts.pt", "--epochs", 3]
    assert together(2, tmp_path, "finetune", again)[0] == [0, 0]
    assert state_difference(tmp_path / "whole.pt", tmp_path / "parts.pt", "finetune") == 0


def test_the_speed_is_tokens_a_second(monkeypatch):
    monkeypatch.setattr(distributed, "group", object())
    assert distributed.format_speed(3000, 2.0) == " | tokens/s    1,500"


def test_a_process_that_is_alone_is_left_alone():
    def main():
        pass
    assert distributed.in_group(main, training.train) is main
    assert distributed.summed(main) is main
    assert distributed.hand_over(main) is main
    assert distributed.agree(15, True) == (15, True)


def test_a_process_that_is_alone_imports_no_more_of_torch():
    code = ("import sys, torch; before = set(sys.modules); import distributed; "
            "print(*(name for name in set(sys.modules) - before if name.startswith('torch.distributed')))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout.split() == []


def test_the_table_of_the_benchmark_has_rates_ratios_and_the_share_of_the_all_reduce():
    found = {"one process": 2.0, "processes": 1.0, "DDP": 4.0, "all-reduce": 0.25, "bytes": 3_000_000, "tokens": 1000}
    *_, row = scale.table({"ptb-lstm": found}, 2)
    assert row == "| ptb-lstm | 500 | 1,000 | 2.00 | 0.50 | 3.0 | 250 | 25% |"
