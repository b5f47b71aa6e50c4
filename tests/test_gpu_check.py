"""The script behind `make gpu-check`, as far as it needs no GPU: what it counts, times and prints."""

import sys

import gpu_check
import pytest
import speed
import torch
from helpers import Recorder

import steps
from errors import BadInput

CASES = """
import pytest

@pytest.mark.cuda("this holds")
@pytest.mark.parametrize("n", [1, 2])
def test_good(n):
    pass

@pytest.mark.cuda("this does not")
def test_bad():
    assert False

@pytest.mark.cuda("this was not looked at")
def test_skipped():
    pytest.skip()

def test_of_no_interest():
    pass
"""


@pytest.mark.slow
def test_outcomes_are_counted_by_name(tmp_path):
    (tmp_path / "test_cases.py").write_text(CASES)
    rows, status = gpu_check.in_a_process(gpu_check.run_tests, str(tmp_path / "test_cases.py"), "-p",
                                          "no:cacheprovider", "--noconftest")
    rows = {what: (result, detail.split(";")[0]) for what, result, detail in rows}
    assert status == 1
    assert rows == {"this holds": ("passed", "2 passed"), "this does not": ("FAILED", "1 failed"),
                                    "this was not looked at": ("skipped", "1 skipped")}


@pytest.fixture
def on_a_cpu(monkeypatch):
    """What asks the GPU answers without one."""
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(gpu_check, "count_kernels", lambda step: step() and 100 * len(step()))
    for module in (gpu_check, speed):
        monkeypatch.setattr(module, "choose_pass", lambda model, *settings: steps.choose_pass(
            model, *settings, backend=Recorder(model)))
    shape = "--emsize 5 --nhid 6 --nlayers 2 --batch_size 2 --bptt 7 --lr 1"
    for recipe, (words, flags) in {"ptb-lstm": (12, ""), "wt103-qrnn": (80_000, "--model QRNN --alpha 0")}.items():
        monkeypatch.setitem(gpu_check.RECIPES, recipe, (words, f"{shape} {flags}"))
    monkeypatch.setitem(gpu_check.EPOCHS, "ptb-lstm", 700)
    monkeypatch.setattr(gpu_check, "as_pytorch", lambda step: step)


@pytest.mark.usefixtures("on_a_cpu")
def test_each_way_to_train_is_timed_beside_the_baseline_and_the_floors():
    peak = {"fp32": 1e9, "tf32": 2e9, "bf16": 4e9, "copy": 1e9, "launch": 4e-6, "graphed launch": 1e-6}
    found = {recipe: gpu_check.measure_recipe(recipe, "cpu", peak, 1) for recipe in ("ptb-lstm", "wt103-qrnn")}
    ways = ["baseline", "no regularisation", "fp32", "tf32", "bf16"]
    assert list(found["wt103-qrnn"]["seconds"]) == ways, "a split softmax takes no graphs"
    assert list(found["ptb-lstm"]["seconds"]) == [*ways, "fp32, graphs", "tf32, graphs", "bf16, graphs"]
    assert all(time > 0 for time in found["ptb-lstm"]["seconds"].values())
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found["ptb-lstm"]["shares"].values())
    floors = found["ptb-lstm"]["floors"]
    recurrent = 4 * (5 * 6 + 6 * 6 + 12) + 4 * (6 * 5 + 5 * 5 + 10)
    assert floors["arithmetic fp32"] == pytest.approx(6 * (recurrent + 5 * 12) * 14 / 1e9)
    assert floors["arithmetic bf16"] == pytest.approx(floors["arithmetic fp32"] / 4)
    assert floors["traffic of weights"] == pytest.approx(28 * (recurrent + 5 * 12 + 12) / 1e9)
    assert floors["launches in a graph"] == pytest.approx(100 * 5 / 5 * 1e-6)
    assert list(found["ptb-lstm"]["epochs"]) == ["fp32", "fp32, graphs", "bf16, graphs"]
    assert not found["ptb-lstm"]["errors"]
    assert not found["wt103-qrnn"]["epochs"]


@pytest.mark.usefixtures("on_a_cpu")
def test_what_goes_wrong_is_a_row_and_stops_nothing(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(steps, "GraphedPass", broken)
    peak = {"fp32": 1e9, "tf32": 2e9, "bf16": 4e9, "copy": 1e9, "launch": 4e-6, "graphed launch": 1e-6}
    found = gpu_check.measure_recipe("ptb-lstm", "cpu", peak, 1)
    assert list(found["seconds"]) == ["baseline", "no regularisation", "fp32", "tf32", "bf16"]
    rows = [(what, detail) for what, result, detail in gpu_check.rows("ptb-lstm", found) if result == "ERROR"]
    assert len(rows) == 5
    assert rows[0] == ("ptb-lstm, fp32, graphs", "RuntimeError: operation not permitted when stream is capturing")


def test_the_table_says_how_many_times_the_baseline():
    found = {"tokens": 1400, "seconds": {"baseline": 0.02, "bf16, graphs": 0.004}, "kernels": 3000.0, "errors": {},
             "memory": {"baseline": 2**30, "bf16, graphs": 2**31}, "epochs": {"bf16, graphs": 2.7},
             "shares": {"bf16": dict(zip(gpu_check.PARTS, (0.1, 0.6, 0.2, 0.1)))},
             "floors": {"launches in a graph": 0.006}}
    lines = gpu_check.table(gpu_check.rows("ptb-lstm", found))
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert cells[3] == ["ptb-lstm, bf16, graphs", "2.66 s/epoch",
                        "350,000 tokens/s, 5.00 times the baseline, 2,048 MiB"]
    assert cells[4][1:] == ["2.70 s/epoch", "measured over a whole epoch, goal 4.0 s on an H200"]
    assert cells[5][2] == "embedding 10%, recurrence 60%, softmax 20%, optimizer 10%"
    assert cells[6][1:] == ["3.98 s/epoch", "3,000 kernels a step"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(BadInput, match="no CUDA device"):
        gpu_check.main()
