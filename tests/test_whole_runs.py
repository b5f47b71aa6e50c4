"""Whole runs: their log, their record, their schedule, their signals, and going on with them."""

import ctypes
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import read_metrics
from test_training import small_run

import checkpoint
import data
import device
import main
import run_files
import steps
import training
import utils
from errors import BadInput
from model import RNNModel
from utils import batchify


def test_log_lines_average_their_own_batches(train, tmp_path):
    """What an epoch has beyond its last line is in none, and not in the first of the next epoch."""
    _, one = train(tmp_path / "one.pt", "--epochs", "3", "--log-interval", "1")
    _, three = train(tmp_path / "three.pt", "--epochs", "3", "--log-interval", "3")
    batches = [[line for line in one["batch"] if line["epoch"] == epoch] for epoch in (1, 2, 3)]
    assert any(len(epoch) % 3 for epoch in batches[:2])
    lines = iter(three["batch"])
    for epoch in batches:
        for start in range(0, len(epoch) // 3 * 3, 3):
            line, part = next(lines), epoch[start:start + 3]
            assert (line["epoch"], line["batch"]) == (part[2]["epoch"], part[2]["batch"])
            assert line["loss"] == pytest.approx(sum(batch["loss"] for batch in part) / 3)
            assert line["tokens"] == sum(batch["tokens"] for batch in part)
    assert next(lines, None) is None


def test_when_keeps_a_copy_and_divides_the_rate(train, tmp_path):
    _, metrics = train(tmp_path / "m.pt", "--epochs", "3", "--optimizer", "adam", "--lr", "0.01",
                       "--when", "1", "2", "--log-interval", "1")
    rates = [[line["lr"] for line in metrics["batch"] if line["epoch"] == epoch][0] for epoch in (1, 2, 3)]
    assert rates == pytest.approx([0.01, 0.001, 0.0001])
    assert [checkpoint.load(tmp_path / f"m.pt.e{epoch}")["epoch"] for epoch in (1, 2)] == [1, 2]


def test_the_saved_model_is_the_best_one_with_its_average(train, corpus_dir, tmp_path):
    """What lies at --save scores the best validation loss of the run, to the last digit that evaluation gives."""
    _, metrics = train(tmp_path / "m.pt", "--epochs", "6", "--nonmono", "0", "--lr", "20")
    assert metrics["switch"]
    content = checkpoint.load(tmp_path / "m.pt")
    best = min(metrics["epoch"], key=lambda line: line["loss"])
    assert best["optimizer"] == "ASGD"
    model = checkpoint.restore_model(content, "m.pt")
    valid = data.load_split(data.Corpus(corpus_dir), "valid", 10, "cpu")
    assert steps.evaluate(model, valid, 7) == pytest.approx(best["loss"], abs=1e-7)
    assert (content["loss"], content["epoch"]) == (best["loss"], best["epoch"])


@pytest.mark.parametrize("flags", [
    ["--model", "LSTM", "--nonmono", "0", "--lr", "20"],                # switches to ASGD on the way
    ["--model", "GRU", "--optimizer", "adam", "--lr", "0.01", "--when", "2"],
    ["--model", "LSTM", "--no-tied", "--when", "1", "3"],
    ["--model", "QRNN", "--nonmono", "0", "--lr", "20"],
])
def test_a_resumed_run_is_the_run_that_never_stopped(train, tmp_path, flags):
    flags += ["--log-interval", "2"]
    _, whole = train(tmp_path / "whole.pt", *flags, "--epochs", "5")
    for epochs in (1, 3, 5):
        resume = [] if epochs == 1 else ["--resume", str(tmp_path / "parts.pt")]
        _, parts = train(tmp_path / "parts.pt", *flags, "--epochs", str(epochs), *resume)
    assert_same_run(whole, parts, tmp_path / "whole.pt", tmp_path / "parts.pt")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best_model(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    before = (tmp_path / "m.pt").read_bytes()
    with pytest.raises(BadInput, match=r"epoch 2, batch \d+: the loss is .*--resume .* replays it \(seed 1111\)"):
        train(tmp_path / "m.pt", "--resume", str(tmp_path / "m.pt"), "--epochs", "2",
              "--clip", "0", "--lr", "9e29")
    assert (tmp_path / "m.pt").read_bytes() == before
    with pytest.raises(BadInput, match="the same command goes that way again, but not to the last bit"):
        train(tmp_path / "timed.pt", "--minutes", "1000", "--clip", "0", "--lr", "9e29")


def signal_at(monkeypatch, number, step):
    """Have this process get the signal `number` in the middle of a step of training."""
    calls, train_step = iter(range(10**6)), training.train_step

    def interrupted(*arguments, **flags):
        if next(calls) == step:
            signal.raise_signal(number)
        return train_step(*arguments, **flags)

    monkeypatch.setattr(training, "train_step", interrupted)


def test_ctrl_c_ends_training_and_reports_the_best_model(train, tmp_path, monkeypatch):
    signal_at(monkeypatch, signal.SIGINT, 45)
    status, metrics = train(tmp_path / "m.pt", "--epochs", "100")
    assert status == 130
    assert len(metrics["epoch"]) == 2
    assert metrics["test"][0]["epoch"] == metrics["epoch"][-1]["best_epoch"]


@pytest.mark.parametrize("flags", [
    ["--model", "LSTM", "--nonmono", "0", "--lr", "20"],
    ["--model", "GRU", "--optimizer", "adam", "--lr", "0.01", "--when", "2"],
    ["--model", "QRNN", "--log-interval", "7", "--nonmono", "0", "--lr", "20"],
])
@pytest.mark.parametrize("number, step, status", [
    (signal.SIGINT, 3, 130), (signal.SIGTERM, 30, 143), (signal.SIGTERM, 64, 143),
    pytest.param(getattr(signal, "SIGUSR1", None), 50, 0,
                 marks=pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1")),
])
def test_a_signal_in_an_epoch_loses_nothing(train, tmp_path, monkeypatch, flags, number, step, status):
    """The state is written after the batch under way, and going on from there is as never having stopped."""
    flags = ["--log-interval", "2", *flags, "--epochs", "4"]
    _, whole = train(tmp_path / "whole.pt", *flags)
    with monkeypatch.context() as patch:
        signal_at(patch, number, step)
        ended, parts = train(tmp_path / "parts.pt", *flags)
    assert ended == status
    assert (status == 0) == (len(parts["epoch"]) == 4 if "epoch" in parts else False)
    _, parts = train(tmp_path / "parts.pt", *flags, "--resume", str(tmp_path / "parts.pt"))
    assert_same_run(whole, parts, tmp_path / "whole.pt", tmp_path / "parts.pt")


def assert_same_run(whole, parts, one, other):
    """Two runs have the same record but for clocks, and the same files but for names."""
    for kind in ("batch", "epoch", "switch", "decay", "test"):
        for line in whole.get(kind, []) + parts.get(kind, []):
            for clock in ("time", "seconds", "ms_per_batch"):
                line.pop(clock, None)
        assert whole.get(kind) == parts.get(kind)
    for path in (Path, run_files.last_path):
        one_model, other_model = (checkpoint.load(path(save))["model"] for save in (one, other))
        assert all(torch.equal(one_model[key], other_model[key]) for key in one_model)


def test_hidden_state_is_carried_from_batch_to_batch(monkeypatch):
    """Each batch starts from the state that the batch before ended with, cut off from its history."""
    source = batchify(torch.arange(200, dtype=torch.int32) % 11, 4)
    states, step = [], training.train_step

    def recorded(model, optimizer, run, words, targets, hidden, *rest, **flags):
        states.append(hidden)
        result = step(model, optimizer, run, words, targets, hidden, *rest, **flags)
        states.append(result[0])
        return result

    monkeypatch.setattr(training, "train_step", recorded)
    list(training.train_batches(small_run(source)))
    starts, ends = states[::2], states[1::2]
    assert all(not part.any() for pair in starts[0] for part in pair)
    for start, end in zip(starts[1:], ends):
        assert all(torch.equal(a, b) and not a.requires_grad for p, q in zip(start, end) for a, b in zip(p, q))


def test_a_ctrl_c_while_the_best_model_is_written_reports_no_model(train, tmp_path, monkeypatch):
    """... least of all one that an earlier run left under that name."""
    train(tmp_path / "m.pt", "--epochs", "1")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "m.pt", "--epochs", "3", "--overwrite")
    assert "test" not in read_metrics(tmp_path / "m.pt")


def test_a_resumed_run_drops_the_lines_that_it_writes_again(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "2")
    _, metrics = train(tmp_path / "m.pt", "--epochs", "3", "--resume", str(tmp_path / "m.pt"))
    assert [len(metrics[kind]) for kind in ("run", "resume", "epoch", "test")] == [1, 1, 3, 1]


@pytest.mark.parametrize("lost", ["m.metrics.jsonl", "nothing"])
def test_a_run_resumes_from_a_link_or_a_last_file_and_without_its_record(train, tmp_path, lost):
    train(tmp_path / "m.pt", "--epochs", "1")
    (tmp_path / lost).unlink(missing_ok=True)
    (tmp_path / "link").symlink_to(tmp_path)
    train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "link" / "m.last.pt"))
    _, metrics = train(tmp_path / "other.pt", "--epochs", "3", "--resume", str(tmp_path / "link" / "m.pt"))
    assert [line["epoch"] for line in metrics["epoch"]] == ([2, 3] if lost == "m.metrics.jsonl" else [1, 2, 3])


def test_the_copy_of_when_and_the_start_rate_in_the_epoch_of_the_switch(train, tmp_path):
    """After the epoch that switches to ASGD the copy of --when is kept, and ASGD starts with the first rate."""
    _, metrics = train(tmp_path / "m.pt", "--epochs", "5", "--nonmono", "0", "--lr", "20", "--log-interval", "1")
    switch = metrics["switch"][0]["epoch"]
    _, metrics = train(tmp_path / "n.pt", "--epochs", "5", "--nonmono", "0", "--lr", "20", "--log-interval", "1",
                       "--when", str(switch))
    assert metrics["switch"][0]["epoch"] == switch
    assert "decay" not in metrics
    assert {line["lr"] for line in metrics["batch"]} == {20.0}
    assert (tmp_path / f"n.pt.e{switch}").exists()


def test_the_epoch_line_has_the_mean_training_loss(train, tmp_path):
    """... of that epoch alone."""
    _, metrics = train(tmp_path / "m.pt", "--epochs", "2", "--log-interval", "1")
    for epoch in metrics["epoch"]:
        lines = [line for line in metrics["batch"] if line["epoch"] == epoch["epoch"]]
        mean = sum(line["loss"] * line["tokens"] for line in lines) / sum(line["tokens"] for line in lines)
        assert epoch["train_loss"] == pytest.approx(mean)
    assert len(metrics["epoch"]) == 2


@pytest.mark.usefixtures("train")
def test_a_dry_run_reports_and_writes_nothing(corpus_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "CACHE_TOKENS", 3)
    status = main.main(["--no-cuda", "--data", str(corpus_dir), "--batch_size", "4", "--bptt", "7", "--dry-run",
                        "--save", str(tmp_path / "m.pt")])
    printed = capsys.readouterr().out
    assert status == 0
    assert "20216813 parameters | peak memory" in printed
    assert "valid loss" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    assert len(list(corpus_dir.iterdir())) == 3


def test_the_hidden_state_is_reset_at_the_start_of_each_epoch(train, tmp_path, monkeypatch):
    zero, train_step = [], training.train_step

    def recorded(model, optimizer, run, words, targets, hidden, *rest, **flags):
        zero.append(not any(part.any() for pair in hidden for part in pair))
        return train_step(model, optimizer, run, words, targets, hidden, *rest, **flags)

    monkeypatch.setattr(training, "train_step", recorded)
    train(tmp_path / "m.pt", "--epochs", "3")
    assert zero[0]
    assert sum(zero) == 3


def test_out_of_memory_names_the_length_and_the_flag_that_caps_it(train, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(training, "train_step", full)
    with pytest.raises(BadInput, match=r"batch 1: out of memory with \d+ time steps of 4 columns; --max-bptt caps"):
        train(tmp_path / "m.pt", "--epochs", "1")


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(corpus_dir, tmp_path):
    code = ("import signal, sys, training, main\n"
            "def step(*_, **__):\n"
            "    signal.raise_signal(signal.SIGTERM)\n"
            "    print('first', flush=True)\n"
            "    signal.raise_signal(signal.SIGTERM)\n"
            "    print('never', flush=True)\n"
            "training.train_step = step\n"
            "main.main(['--no-cuda', '--data', sys.argv[1], '--batch_size', '4', '--save', sys.argv[2]])\n")
    ended = subprocess.run([sys.executable, "-c", code, corpus_dir, tmp_path / "m.pt"], cwd=Path(main.__file__).parent,
                           capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM
    assert ended.stdout.endswith("first\n")


def test_the_same_seed_gives_the_same_weights(train, tmp_path):
    for name in ("a", "b"):
        train(tmp_path / f"{name}.pt", "--epochs", "2", "--seed", "7")
    one, other = (checkpoint.load(tmp_path / f"{name}.last.pt")["model"] for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_batch_size_cannot_change_in_the_middle_of_an_epoch(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    path = run_files.last_path(tmp_path / "m.pt")
    content = checkpoint.load(path)
    hidden = RNNModel(13, emsize=5, nhid=6, nlayers=2).init_hidden(4)
    content["state"]["progress"].update(row=7, batch=1, hidden=hidden)
    torch.save(content, path)
    with pytest.raises(BadInput, match="--batch_size cannot change in the middle of an epoch"):
        main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt"), "--epochs", "2", "--batch_size", "3"])


def test_a_state_from_before_a_flag_existed_goes_on_with_its_default(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    path = run_files.last_path(tmp_path / "m.pt")
    content = checkpoint.load(path)
    del content["flags"]["precision"]
    for group in content["state"]["optimizer"]["param_groups"]:
        group["fused"] = None
    torch.save(content, path)
    assert main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt"), "--epochs", "2"]) == 0


def test_how_a_step_is_computed_does_not_travel_with_a_state(train, tmp_path):
    """ASGD's way on a GPU, which refuses tensors of a CPU."""
    train(tmp_path / "m.pt", "--epochs", "4", "--nonmono", "0", "--lr", "20")
    path = run_files.last_path(tmp_path / "m.pt")
    content = checkpoint.load(path)
    assert content["state"]["averaging"]
    for group in content["state"]["optimizer"]["param_groups"]:
        group["capturable"] = True
    torch.save(content, path)
    assert main.main(["--no-cuda", "--resume", str(path), "--epochs", "5"]) == 0


@pytest.mark.parametrize("model", ["LSTM", "GRU", "QRNN"])
def test_a_carried_hidden_state_keeps_no_sequence_in_memory(model):
    network = RNNModel(11, model=model, emsize=5, nhid=6, nlayers=2)
    _, hidden, _ = network(torch.randint(11, (50, 3)), network.init_hidden(3))
    sizes = []
    utils.map_hidden(lambda part: sizes.append((part.untyped_storage().nbytes(), part.nbytes)),
                     utils.repackage_hidden(hidden))
    assert sizes
    assert all(stored == needed for stored, needed in sizes)


def test_training_in_bfloat16_learns_what_fp32_learns(train, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "has_bf16", lambda: True)
    runs = [train(tmp_path / f"{precision}.pt", "--epochs", "3", "--precision", precision)[1]
            for precision in ("fp32", "bf16")]
    fp32, bf16 = ([line["loss"] for line in run["epoch"]] for run in runs)
    assert fp32 != bf16
    assert fp32 == pytest.approx(bf16, abs=0.03)
    assert all(value.dtype == torch.float32 for value in checkpoint.load(tmp_path / "bf16.pt")["model"].values())


@pytest.mark.parametrize("model", ["LSTM", "GRU", "QRNN"])
def test_without_instructions_for_bfloat16_it_trains_in_fp32_and_says_so(train, tmp_path, monkeypatch, capsys, model):
    monkeypatch.setattr(device, "has_bf16", lambda: False)
    train(tmp_path / "a.pt", "--epochs", "1", "--model", model)
    train(tmp_path / "b.pt", "--epochs", "1", "--model", model, "--precision", "bf16")
    assert "--precision bf16: this CPU has no instructions for it; training in fp32" in capsys.readouterr().out
    a, b = (checkpoint.load(tmp_path / name)["model"] for name in ("a.pt", "b.pt"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert checkpoint.load(tmp_path / "b.pt")["flags"]["precision"] == "bf16", "what was asked for"
    monkeypatch.setattr(device, "has_bf16", lambda: True)
    assert train(tmp_path / "c.pt", "--epochs", "1", "--model", model, "--precision", "bf16")[0] == 0


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_on_a_cpu_glibc_is_asked_to_keep_memory_and_agrees(monkeypatch):
    mallopt, answers = ctypes.CDLL(None).mallopt, {}
    take = Namespace(mallopt=lambda *option: answers.update({option: mallopt(*option)}))
    monkeypatch.setattr(device, "ctypes", Namespace(CDLL=lambda _: take))
    device.set_up_device(False)
    assert answers == {(-3, 2**25): 1, (-1, -1): 1}, "M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h; 1: accepted"
