"""The floor of a small model is that of its own products, and the table is made from the medians."""

import sys

import pytest
import small_steps
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from process import run_script

T, B, V = small_steps.T, small_steps.B, small_steps.NTOKEN
ROWS = T * B


class Products(TorchDispatchMode):
    """Count the matrix products (n, k) @ (k, m), as {(n, k, m): how many}."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            shape = *args[0].shape, args[1].shape[1]
            self.count[shape] = self.count.get(shape, 0) + 1
        return function(*args, **(kwargs or {}))


def add(*parts):
    total = {}
    for part in parts:
        for shape, count in part.items():
            total[shape] = total.get(shape, 0) + count
    return total


def at_once(size, outputs):
    """The products of a layer for all time steps: outputs, gradient of the inputs, gradient of the weight."""
    return add({(ROWS, size, outputs): 1}, {(ROWS, outputs, size): 1}, {(outputs, ROWS, size): 1})


def by_step(size, outputs):
    """Those of a recurrent weight, whose outputs and inputs come a time step at a time."""
    return add({(B, size, outputs): T}, {(B, outputs, size): T}, {(outputs, ROWS, size): 1})


@pytest.mark.parametrize(("flags", "expected"), [
    # 64 -> 256 -> 64, as the softmax shares the weight of the embedding
    (("LSTM", 64, 256, 2), [at_once(64, V), at_once(64, 1024), by_step(256, 1024), at_once(256, 256),
                            by_step(64, 256)]),
    (("GRU", 256, 100, 1), [at_once(256, V), at_once(256, 768), by_step(256, 768)]),
    # The first layer reads two inputs at a time.
    (("QRNN", 64, 256, 2), [at_once(64, V), at_once(128, 768), at_once(256, 192)])],
    ids=["LSTM", "GRU", "QRNN"])
def test_the_products_are_those_of_the_model(flags, expected):
    with Products() as counted:
        small_steps.make_floor(*flags)()
    assert counted.count == add(*expected)


def test_the_flop_of_an_lstm_by_hand():
    """256 wide: the softmax has 65 x 256 weights, inputs and recurrence 1024 x 256 each.

    Each weight takes two FLOP a token in each of three products, for 64 x 16 tokens.
    """
    with Products() as counted:
        small_steps.make_floor("LSTM", 256, 256, 1)()
    flop = sum(2 * n * k * m * count for (n, k, m), count in counted.count.items())
    assert flop == 3 * 2 * 1024 * (16_640 + 262_144 + 262_144) == 3_323_461_632


@pytest.mark.parametrize("model", ["LSTM", "GRU", "QRNN"])
def test_a_step_trains(model, monkeypatch):
    """On one batch again and again, the loss falls."""
    monkeypatch.setattr(small_steps, "T", 7)
    torch.manual_seed(0)
    step = small_steps.make_step(model, 8, 8, 2)
    losses = [step()[1] for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_table_has_the_medians(monkeypatch, capsys):
    """The first three turns warm up; of 10, 14 and 90 ms and of 7, 8 and 1 ms the middle ones count."""
    monkeypatch.setattr(small_steps, "make_step", lambda *_: [9, 9, 9, 0.014, 0.010, 0.090].pop)
    monkeypatch.setattr(small_steps, "make_floor", lambda *_: [5, 5, 5, 0.007, 0.008, 0.001].pop)
    monkeypatch.setattr(small_steps, "seconds", lambda function: function(0))
    monkeypatch.setattr(sys, "argv", ["small_steps.py", "--repetitions", "3"])
    small_steps.main()
    heading, _, names, line, *rows = capsys.readouterr().out.splitlines()
    assert f"B = {B}, T = {T}, V = {V}" in heading
    assert len(rows) == len(small_steps.MODELS)
    assert {row.count("|") for row in (names, line, *rows)} == {7}
    assert rows[0] == "| LSTM | 64 / 256 x 2 | 14.0 | 7.0 | 50% | 73,143 |"  # 1,024 tokens in 14 ms


@pytest.mark.parametrize("flags", [["--repetitions", "0"], ["--repetitions", "many"], ["--models", "GRU"]])
def test_bad_flags_end_in_a_line_and_status_2(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["small_steps.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_script(small_steps.main)
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
