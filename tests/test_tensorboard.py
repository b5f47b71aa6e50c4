"""What TensorBoard reads is what the metrics file says; and what is said of a run's progress."""

import sys
import time

import pytest
from helpers import TINY, read_metrics

import finetune
import main
import metrics
from flags import NO_LIMIT
from process import run_script


def curves(folder):
    """The scalars below a folder as TensorBoard reads them: (step, value) pairs by tag."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(lines, kind, name):
    return [(line["total_tokens"], pytest.approx(line[name], rel=1e-6)) for line in lines[kind]]


def test_the_figures_of_both_stages_are_those_of_the_metrics_file(train, tmp_path):
    pytest.importorskip("tensorboard")
    board = tmp_path / "board"
    status, lines = train(tmp_path / "m.pt", "--epochs", "3", "--log_interval", "7", "--nonmono", "0",
                          "--tensorboard", str(board))
    assert status == 0
    shown = curves(board / "train")
    for kind, name in (("batch", "loss"), ("batch", "lr"), ("epoch", "loss"), ("epoch", "train_loss")):
        assert shown[f"{kind}/{name}"] == expected(lines, kind, name)
    assert [value for _, value in shown["test/loss"]] == [pytest.approx(lines["test"][0]["loss"])]
    assert not [tag for tag in shown if tag.startswith("run/")]
    finetune.main(["--no-cuda", "--save", str(tmp_path / "m.pt"), "--epochs", "1", "--tensorboard", str(board)])
    last = read_metrics(tmp_path / "m.pt")["epoch"][-1]
    assert curves(board / "finetune")["epoch/loss"] == [(last["total_tokens"], pytest.approx(last["loss"]))]


def test_a_run_that_goes_on_takes_back_what_it_does_once_more(train, tmp_path):
    """A board that is ahead of the state, as a killed run leaves it, ends as one that never stopped."""
    pytest.importorskip("tensorboard")
    board = tmp_path / "board"
    _, lines = train(tmp_path / "m.pt", "--epochs", "2", "--log_interval", "7", "--tensorboard", str(board))
    ahead = metrics.Board(str(board), "train", lines["epoch"][-1]["total_tokens"])
    ahead.write("epoch", {"total_tokens": lines["epoch"][-1]["total_tokens"] + 5, "loss": 99.0})
    time.sleep(1.1)  # TensorBoard orders its files by the second
    assert main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt"), "--epochs", "4", "--tensorboard",
                      str(board)]) == 0
    lines = read_metrics(tmp_path / "m.pt")
    assert len(lines["epoch"]) == 4
    assert curves(board / "train")["epoch/loss"] == expected(lines, "epoch", "loss")


def test_it_is_not_remembered(train, tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path / "m.pt", "--epochs", "1", "--tensorboard", str(tmp_path / "board"))
    files = list((tmp_path / "board").rglob("*"))
    assert main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt"), "--epochs", "2"]) == 0
    assert list((tmp_path / "board").rglob("*")) == files


def test_a_dry_run_makes_no_folder(corpus_dir, tmp_path):
    pytest.importorskip("tensorboard")
    assert main.main([*TINY, "--data", str(corpus_dir), "--dry-run", "--tensorboard", str(tmp_path / "board")]) == 0
    assert not (tmp_path / "board").exists()


@pytest.mark.parametrize("script", [main, finetune])
@pytest.mark.parametrize("missing", [True, False], ids=["no package", "no folder"])
def test_where_it_cannot_be_one_line_says_so_before_anything_is_lost(train, tmp_path, monkeypatch, capsys, script,
                                                                     missing):
    train(tmp_path / "m.pt", "--epochs", "1")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("m.*")}
    board = tmp_path / "m.pt" / "board"  # below a file
    if missing:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        board = tmp_path / "board"
    else:
        pytest.importorskip("tensorboard")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_script(lambda: script.main(["--no-cuda", "--save", str(tmp_path / "m.pt"), "--overwrite", "--tensorboard",
                                        str(board)]))
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert ("pip install tensorboard" if missing else "cannot be written") in said
    assert said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.glob("m.*")} == before


# --- progress --------------------------------------------------------------------------------------------------------

def test_the_end_is_estimated_from_the_epochs_so_far(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        assert metrics.format_end(7200.0, 4, 6) == " | end ~ 1970-01-12 14:46"  # 1,000,000 + 2 x 1800 seconds
        assert len(metrics.format_end(3.0, 1, 500)) == len(metrics.format_end(7200.0, 4, 6))
        assert [metrics.format_end(*run) for run in ((60.0, 6, 6), (60.0, 6, 5), (60.0, 6, NO_LIMIT))] == [""] * 3
        assert metrics.format_end(1e12, 1, 7999) == "", "no calendar has it"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_only_the_last_column_of_an_epoch_is_new(train, tmp_path, capsys):
    train(tmp_path / "m.pt", "--epochs", "2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| end of epoch")]
    assert [[cell.split()[0] for cell in line.split("|")[1:]] for line in lines] == [
        ["end", "time:", "train", "valid", "valid", "valid", "end"],
        ["end", "time:", "train", "valid", "valid", "valid"]]


def test_a_bar_shows_the_time_left_and_the_loss_so_far(monkeypatch):
    shown = []

    class Terminal:
        encoding = "utf-8"
        isatty = staticmethod(lambda: True)
        flush = staticmethod(lambda: None)
        write = staticmethod(shown.append)

    monkeypatch.setattr(sys, "stdout", Terminal())
    with metrics.progress_bar(10, 2, "row", "epoch 1") as bar:
        bar.mininterval = 0
        metrics.advance(bar, 2, 3.0)
        assert bar.postfix == "loss 3.00"
        metrics.advance(bar, 4, 4.0)
        bar.refresh()
    assert "loss 4.00" in "".join(shown)
    assert "8/10" in "".join(shown)


def test_a_bar_is_silent_without_a_terminal(capsys):
    with metrics.progress_bar(10, 0, "row", "epoch 1") as bar:
        metrics.advance(bar, 4, 4.0)
    assert capsys.readouterr() == ("", "")
