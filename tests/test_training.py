"""The pieces of the loop: batch lengths, optimizers, averages, the plateau rule, losses, the record of a run."""

import math
import weakref
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch.nn import functional

import optimizers
import steps
import training
from errors import BadInput
from metrics import loss_metrics
from model import RNNModel
from run import Batches, Run
from utils import batchify

OFF = dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0)


def small_model():
    torch.manual_seed(4)
    return RNNModel(11, emsize=5, nhid=6, nlayers=2, **OFF)


def small_run(source, model=None):
    """A run over `source` (N, B) that steps by plain SGD."""
    model = model or small_model()
    args = Namespace(bptt=7, max_bptt=None, clip=0, seed=1)
    run = Run("train", args, [], Batches(source, None, None), model,
                       optimizers.make_optimizer("sgd", model, 0.1, 0))
    run.forward_backward = steps.forward_backward
    return run


# --- batch lengths ---------------------------------------------------------------------------------------------------

def test_sequence_lengths_have_the_distribution_of_the_paper():
    numpy.random.seed(0)
    lengths = numpy.array([steps.sample_seq_len(70) for _ in range(40_000)])
    long = lengths > 52
    assert lengths.min() >= 5
    assert long.mean() == pytest.approx(0.95, abs=0.005)
    assert lengths[long].mean() == pytest.approx(69.5, abs=0.1)
    assert lengths[long].std() == pytest.approx(5, abs=0.1)
    assert lengths[~long].mean() == pytest.approx(34.5, abs=0.5)


def test_sequence_lengths_have_a_floor_and_a_cap():
    numpy.random.seed(0)
    assert {steps.sample_seq_len(1) for _ in range(100)} >= {5}
    assert max(steps.sample_seq_len(70, 72) for _ in range(1000)) == 72
    assert max(steps.sample_seq_len(70, 0) for _ in range(1000)) > 72, "0 is no cap"


def test_an_epoch_reads_every_row_but_the_last_once(monkeypatch):
    source = batchify(torch.arange(400, dtype=torch.int32) % 11, 4)
    rows = []

    def train_step(*given, lr_scale, **_):
        *_, words, targets, hidden = given
        rows.append((words, targets, lr_scale))
        return hidden, 0.0

    monkeypatch.setattr(training, "train_step", train_step)
    numpy.random.seed(1)
    lengths = [length for length, *_ in training.train_batches(small_run(source))]
    numpy.random.seed(1)
    sampled = [steps.sample_seq_len(7) for _ in lengths]
    assert torch.equal(torch.cat([words for words, _, _ in rows]), source[:-1].long())
    assert torch.equal(torch.cat([targets for _, targets, _ in rows]), source[1:].long())
    assert lengths[:-1] == sampled[:-1]
    assert lengths[-1] <= sampled[-1]
    assert [scale for _, _, scale in rows] == [length / 7 for length in sampled], "scaled by the sampled length"


# --- steps -----------------------------------------------------------------------------------------------------------

def test_a_step_is_sgd_on_the_regularised_loss_with_the_scaled_rate():
    model, oracle = small_model(), small_model()
    words, targets = torch.randint(11, (6, 3)), torch.randint(11, (6, 3))
    optimizer = optimizers.make_optimizer("sgd", model, 0.5, 0.01)
    regularised = partial(steps.forward_backward, alpha=2, beta=3)
    _, loss = steps.train_step(model, optimizer, regularised, words, targets, model.init_hidden(3), lr_scale=0.7,
                               clip=0.1)

    output, _, raw = oracle(words, oracle.init_hidden(3))
    cross_entropy = functional.cross_entropy(oracle.decoder(output).view(-1, 11), targets.view(-1))
    ar = sum(output[t].square().sum() for t in range(6)) / output.numel()
    tar = sum((raw[t + 1] - raw[t]).square().sum() for t in range(5)) / (5 * 3 * 5)
    (cross_entropy + 2 * ar + 3 * tar).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in oracle.parameters()))
    assert norm > 0.1
    assert loss == pytest.approx(cross_entropy.item())
    for ours, p in zip(model.parameters(), oracle.parameters()):
        torch.testing.assert_close(ours, p - 0.5 * 0.7 * (p.grad * 0.1 / norm + 0.01 * p), rtol=1e-4, atol=1e-6)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_asgd_steps_with_the_rate_of_the_batch_before_and_averages_what_follows():
    """Four steps by hand on one parameter w with gradient 1.

    w falls by the rates 2 (its own, being the first), 2, 4, 8. PyTorch's average takes the first value over by the
    second, so it is that of the last three.
    """
    model = torch.nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    optimizer = optimizers.make_optimizer("asgd", model, 1.0, 0.0)
    for rate in (2, 4, 8, 16):
        optimizer.param_groups[0]["lr"] = rate
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert model.weight.item() == -(2 + 2 + 4 + 8)
    with optimizers.averaged_weights(optimizer):
        assert model.weight.item() == pytest.approx(-(4 + 8 + 16) / 3)


@pytest.mark.parametrize(("name", "expected"), [("sgd", 2 - 0.5 * 0.1 * 2), ("asgd", 2 - 0.5 * 0.1 * 2), ("adam", 1.5)])
def test_weights_decay_without_a_gradient(name, expected):
    """The decay 0.1 w is a gradient too. The first step of Adam is the learning rate, whatever the gradient."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    torch.nn.init.constant_(model.weight, 2)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizers.make_optimizer(name, model, 0.5, 0.1).step()
    assert model.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["sgd", "asgd", "adam"])
def test_the_optimizer_owns_every_trainable_parameter(name):
    model = RNNModel(11, emsize=5, nhid=6, nlayers=2, tied=False)
    owned = {id(p) for group in optimizers.make_optimizer(name, model, 1, 0).param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters() if p.requires_grad}


def test_averages_are_put_back_when_the_block_raises():
    model = small_model()
    optimizer = optimizers.make_optimizer("asgd", model, 1.0, 0.0)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError), optimizers.averaged_weights(optimizer):
        assert not torch.equal(next(model.parameters()), before[0])
        raise KeyError
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("history, nonmono, expected", [
    ([], 5, False), ([3.0], 0, False),
    ([3.0, 3.1], 0, True), ([3.0, 3.0], 0, False),
    ([3.0, 2.0, 2.5], 1, False),              # worse than the last, but better than all before it
    ([2.0, 3.0, 2.5], 1, True),
    ([2.0, 3.0, 3.0, 3.0, 3.0, 3.0], 5, False),  # five before it: not more than --nonmono
    ([2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.1], 5, True),
    ([2.6, 2.5, 2.4, 2.3, 2.2, 2.1, 2.7], 5, True),  # the epoch before was the best so far
])
def test_plateau_rule_by_hand(history, nonmono, expected):
    assert optimizers.at_plateau(history, nonmono) is expected


def test_after_the_switch_the_schedule_is_over(train, tmp_path, monkeypatch):
    """The rate has been divided when ASGD starts with the first one. Later plateaus and epochs of --when do nothing."""
    monkeypatch.setattr(training, "at_plateau", lambda history, _: len(history) >= 2)
    _, metrics = train(tmp_path / "m.pt", "--epochs", "4", "--when", "1", "3", "--lr", "20", "--log-interval", "1")
    assert [line["epoch"] for line in metrics["switch"]] == [2]
    assert [line["epoch"] for line in metrics["decay"]] == [1]
    rates = [{line["lr"] for line in metrics["batch"] if line["epoch"] == epoch} for epoch in (1, 2, 3, 4)]
    assert rates == [{20.0}, {2.0}, {20.0}, {20.0}]
    assert not (tmp_path / "m.pt.e3").exists()


# --- evaluation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bptt", [1, 7, 1000])
def test_evaluation_is_nats_per_predicted_token(bptt):
    model = small_model()
    source = batchify(torch.randint(11, (101,)), 4)
    with torch.no_grad():
        model.eval()
        output, _, _ = model(source[:-1], model.init_hidden(4))
        expected = -model.logprob(output).gather(-1, source[1:].unsqueeze(-1)).mean().item()
    assert steps.evaluate(model, source, bptt) == pytest.approx(expected, abs=1e-6)


def test_evaluation_keeps_no_tensor_of_a_chunk(monkeypatch):
    """Such a tensor would lie where the next chunk's logits fit."""
    model, losses, alive = small_model(), [], []

    def loss(*given, loss=model.loss):
        alive.append(sum(found() is not None for found in losses))
        result = loss(*given)
        losses.append(weakref.ref(result))
        return result
    monkeypatch.setattr(model, "loss", loss)
    steps.evaluate(model, torch.randint(11, (50, 3)), 7)
    assert alive == [0] * 7


def test_loss_metrics():
    assert loss_metrics(math.log(8)) == {"loss": math.log(8), "ppl": pytest.approx(8), "bpc": pytest.approx(3)}
    assert loss_metrics(1000.0)["ppl"] == math.inf


# --- the clock -------------------------------------------------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    """Let a batch take a quarter of a second and a validation three, all else nothing; returns the batches so far."""
    batches, now = [], 0.0

    def slow(function, seconds):
        def call(*given, **how):
            nonlocal now
            now += seconds
            batches.extend([1] if seconds < 1 else [])
            return function(*given, **how)
        return call
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now))
    monkeypatch.setattr(training, "train_step", slow(training.train_step, 0.25))
    monkeypatch.setattr(training.distributed, "evaluate", slow(training.distributed.evaluate, 3))
    return batches


def test_the_record_has_milliseconds_a_batch_and_seconds_an_epoch_and_in_all(train, tmp_path, clock):
    _, record = train(tmp_path / "m.pt", "--epochs", "2", "--log-interval", "3")
    assert [line["ms_per_batch"] for line in record["batch"]] == [250] * len(record["batch"])
    assert sum(line["seconds"] for line in record["epoch"]) == len(clock) / 4
    assert record["test"][0]["seconds"] == len(clock) / 4 + 2 * 3, "with validation"


def test_the_state_is_saved_each_time_that_so_many_minutes_are_over(train, tmp_path, clock, monkeypatch):
    """After 4 batches of a quarter of a second more than 0.9 seconds are over."""
    saved, save_state = [], training.save_state
    monkeypatch.setattr(training, "save_state", lambda run: (saved.append(run.progress.batch), save_state(run)))
    train(tmp_path / "m.pt", "--epochs", "1", "--save-interval", str(0.9 / 60))
    assert saved == [*range(4, len(clock) + 1, 4), 0]


def test_an_illegal_memory_access_is_no_lack_of_memory(train, tmp_path, monkeypatch):
    """It is a bug, so its traceback is kept."""
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(training, "train_step", broken)
    with pytest.raises(RuntimeError, match="illegal memory access") as raised:
        train(tmp_path / "m.pt", "--epochs", "1")
    assert not isinstance(raised.value, BadInput)
