"""The script behind `make gpu-check`, as far as it needs no GPU: what it counts, times and prints."""

import json
import multiprocessing
import os
import sys
import time

import gpu_check
import gpu_parts
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
    rows, status = gpu_parts.in_a_process(900, gpu_parts.run_tests, str(tmp_path / "test_cases.py"), "-p",
                                          "no:cacheprovider", "--noconftest")
    rows = {what: (result, detail.split(";")[0]) for what, result, detail in rows}
    assert status == 1
    assert rows == {"this holds": ("passed", "2 passed"), "this does not": ("FAILED", "1 failed"),
                                    "this was not looked at": ("skipped", "1 skipped")}


def good(value):
    return value, os.getpid()


def broken():
    try:
        raise MemoryError("the first one\nin many lines")
    except MemoryError:
        raise RuntimeError("the stream is invalid") from None


def chained():
    try:
        broken()
    finally:
        raise ValueError("capture ended")


def hangs():
    time.sleep(600)


@pytest.mark.slow
def test_what_a_process_does_is_an_answer_or_one_line():
    value, process = gpu_parts.in_a_process(900, good, 3)
    assert value == 3
    assert process != os.getpid()
    for function, arguments, line in ((chained, (), r"ValueError: capture ended \(after MemoryError: the first one\)"),
                                      (os._exit, (7,), "the process died with exit status 7")):
        with pytest.raises(gpu_parts.Failed, match=line):
            gpu_parts.in_a_process(900, function, *arguments)
    with pytest.raises(gpu_parts.Failed, match="killed after 1 s"):
        gpu_parts.in_a_process(1, hangs)
    assert not multiprocessing.active_children()


@pytest.fixture
def on_a_cpu(monkeypatch):
    """What asks the GPU answers without one, and what has a process of its own has none."""
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(gpu_parts, "count_kernels", lambda step: step() and 100 * len(step()))
    for module in (gpu_parts, speed):
        monkeypatch.setattr(module, "choose_pass", lambda model, *settings: steps.choose_pass(
            model, *settings, backend=Recorder(model)))
    shape = "--emsize 5 --nhid 6 --nlayers 2 --batch_size 2 --bptt 7 --lr 1"
    for recipe, (words, flags) in {"ptb-lstm": (12, ""), "wt103-qrnn": (80_000, "--model QRNN --alpha 0")}.items():
        monkeypatch.setitem(gpu_parts.RECIPES, recipe, (words, f"{shape} {flags}"))
    monkeypatch.setitem(gpu_parts.CORPUS_TOKENS, "ptb-lstm", 700)
    monkeypatch.setattr(gpu_parts, "with_default_tf32", lambda step: step)
    measure = gpu_parts.measure_variant
    monkeypatch.setattr(gpu_check, "measure_variant", lambda recipe, name, _, n: measure(recipe, name, "cpu", n))
    monkeypatch.setattr(gpu_check, "peaks", lambda _: (PEAKS, {}))
    monkeypatch.setattr(gpu_check, "in_a_process", lambda _, function, *arguments: function(*arguments))


PEAKS = {"fp32": 1e9, "tf32": 2e9, "bf16": 4e9, "copy": 1e9, "launch": 4e-6, "graphed launch": 1e-6}
WAYS = ["no regularisation", "fp32", "tf32", "bf16"]


@pytest.mark.usefixtures("on_a_cpu")
def test_each_way_to_train_is_timed_beside_the_baseline_and_the_floors(tmp_path):
    check = gpu_check.Check(tmp_path / "gpu.json", 5)
    gpu_check.check_speed(check, ["ptb-lstm", "wt103-qrnn"], 1)
    found = check.found["results"]
    assert not check.errors
    assert list(found["wt103-qrnn"]) == WAYS, "a split softmax takes no graphs"
    assert list(found["ptb-lstm"]) == [*WAYS, "fp32, graphs", "tf32, graphs", "bf16, graphs"]
    for result in found["ptb-lstm"].values():
        assert result["seconds"] > 0
        assert result["baseline"] > 0
        assert result["kernels"] == 100
    shares = [result["shares"] for result in found["ptb-lstm"].values() if "shares" in result]
    assert [sum(share.values()) for share in shares] == pytest.approx([1, 1, 1])
    floors = gpu_parts.floors("ptb-lstm", 14, 100, PEAKS)
    recurrent = 4 * (5 * 6 + 6 * 6 + 12) + 4 * (6 * 5 + 5 * 5 + 10)
    assert floors["arithmetic fp32"] == pytest.approx(6 * (recurrent + 5 * 12) * 14 / 1e9)
    assert floors["arithmetic bf16"] == pytest.approx(floors["arithmetic fp32"] / 4)
    assert floors["traffic of weights"] == pytest.approx(28 * (recurrent + 5 * 12 + 12) / 1e9)
    assert floors["launches in a graph"] == pytest.approx(100 * 1e-6)
    epochs = [name for name, result in found["ptb-lstm"].items() if "epoch" in result]
    assert epochs == ["fp32", "fp32, graphs", "tf32, graphs", "bf16, graphs"]
    assert not any("epoch" in result for result in found["wt103-qrnn"].values())
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["results"] == found


def raises(*_, **__):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


BREAKS = {  # what is broken: the row that says so, and the rows that there are all the same
    "a variant": ((steps, "GraphedPass"), "ptb-lstm, fp32, graphs", WAYS),
    "the baseline": ((gpu_parts, "plain_step"), "ptb-lstm, baseline", [*WAYS, "fp32, graphs", "bf16, graphs"]),
    "the kernels": ((gpu_parts, "count_kernels"), "ptb-lstm, fp32, kernels", [*WAYS, "fp32, graphs"]),
    "the timing": ((gpu_parts, "medians"), "ptb-lstm, fp32, timing", []),
    "the epoch": ((gpu_parts, "measure_epoch"), "ptb-lstm, fp32, the loop", [*WAYS, "fp32, graphs"]),
    "the peaks": ((gpu_check, "peaks"), "peaks", [*WAYS, "fp32, graphs"]),
    "the floors": ((gpu_check, "floors"), "ptb-lstm, table", []),
}


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("what", BREAKS)
def test_what_goes_wrong_is_a_row_and_stops_nothing(monkeypatch, tmp_path, what):
    (module, name), row, ways = BREAKS[what]
    monkeypatch.setattr(module, name, raises)
    check = gpu_check.Check(tmp_path / "gpu.json", 5)
    gpu_check.check_speed(check, ["ptb-lstm", "wt103-qrnn"], 1)
    assert check.errors[row] == "RuntimeError: operation not permitted when stream is capturing"
    rows = [what for what, result, _ in check.lines if result.endswith("s/epoch")]
    assert {f"ptb-lstm, {way}" for way in ways} <= set(rows)
    assert gpu_check.table(check.lines)
    assert json.loads((tmp_path / "gpu.json").read_text())["errors"]


@pytest.mark.usefixtures("on_a_cpu")
def test_json_is_written_after_every_part_and_what_has_no_time_left_is_a_row(monkeypatch, tmp_path):
    check, states = gpu_check.Check(tmp_path / "gpu.json", 5), []

    def one_variant(*_):
        if states:
            check.end = 0  # the time is over
        states.append((tmp_path / "gpu.json").read_text())
        return {"tokens": 14, "seconds": 1.0, "errors": {}}
    monkeypatch.setattr(gpu_check, "measure_variant", one_variant)
    gpu_check.check_speed(check, ["ptb-lstm"], 1)
    assert json.loads(states[0])["peaks"] == PEAKS
    assert list(json.loads(states[1])["results"]["ptb-lstm"]) == WAYS[:1]
    assert check.errors["ptb-lstm, tf32"] == "not begun: the 5 minutes were over"
    assert len(states) == 2


@pytest.mark.usefixtures("on_a_cpu")
def test_a_file_of_tests_that_cannot_run_is_a_row(monkeypatch, tmp_path):
    def run_tests(path):
        if path.endswith("test_cuda.py"):
            raise gpu_parts.Failed("killed after 120 s")
        return [("this holds", "passed", path)], int(path.endswith("test_qrnn.py"))
    monkeypatch.setattr(gpu_check, "run_tests", run_tests)
    check = gpu_check.Check(tmp_path / "gpu.json", 5)
    gpu_check.check_tests(check)
    assert check.errors == {"test_cuda.py": "killed after 120 s", "test_qrnn.py": "pytest ended with status 1"}
    assert len(check.lines) == len(gpu_check.TEST_FILES) - 1
    for name in gpu_check.TEST_FILES:
        assert (gpu_parts.TESTS / name).exists()


def test_the_table_says_how_many_times_the_baseline():
    shares = dict(zip(gpu_check.PARTS, (0.1, 0.6, 0.2, 0.1)))
    results = {"fp32": {"tokens": 1400, "seconds": 0.01, "baseline": 0.02, "kernels": 3000.0, "shares": shares},
               "bf16, graphs": {"tokens": 1400, "seconds": 0.004, "baseline": 0.02, "memory": 2**31, "epoch": 2.7}}
    lines = gpu_check.table(gpu_check.rows("ptb-lstm", results, {"graphed launch": 2e-6}))
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]]
    assert cells == [
        ["ptb-lstm, baseline", "13.28 s/epoch", "median over the processes"],
        ["ptb-lstm, fp32", "6.64 s/epoch", "140,000 tokens/s, 2.00 times the baseline, 3,000 kernels"],
        ["ptb-lstm, fp32", "shares", "embedding 10%, recurrence 60%, softmax 20%, optimizer 10%"],
        ["ptb-lstm, bf16, graphs", "2.66 s/epoch", "350,000 tokens/s, 5.00 times the baseline, 2,048 MiB"],
        ["ptb-lstm, bf16, graphs, the loop", "2.70 s/epoch",
         "measured over a whole epoch, goal 4.0 s on an H200"],
        ["ptb-lstm, floor: launches in a graph", "3.98 s/epoch"]]


def test_peaks_that_cannot_be_measured_cost_the_others_nothing(monkeypatch):
    monkeypatch.setattr(gpu_parts, "products", lambda name, _: raises() if name == "tf32" else 1e12)
    monkeypatch.setattr(gpu_parts, "copies", raises)
    monkeypatch.setattr(gpu_parts, "launches", lambda _, graphed: raises() if graphed else 4e-6)
    found, errors = gpu_parts.peaks(1)
    assert found == {"fp32": 1e12, "bf16": 1e12, "launch": 4e-6}
    assert set(errors) == {"tf32", "copy", "graphed launch"}
    said = gpu_check.heading({"gpu": "GPU", "torch": "2.6", "commit": "abc", "peaks": found})
    assert said == "GPU, torch 2.6, commit abc; fp32 1 TFLOP/s, bf16 1 TFLOP/s, launch 4.0 us"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(BadInput, match="no CUDA device"):
        gpu_check.main()
