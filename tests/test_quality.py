"""Loss over time beside a peer: what is run, what is not run again, and the table, from records that a stub writes."""

import sys

import pytest
import quality
import scripts

import dynamic
import plot
import pointer
from errors import BadInput
from metrics import Metrics, read_metrics
from process import run_script
from run_files import last_path, metrics_path

FLAGS = {"model": "LSTM", "nlayers": 1, "nhid": 256, "emsize": 128, "batch_size": 16, "optimizer": "adam", "lr": 0.004,
         "dropout": 0.0, "wdrop": 0.0}
CHOSEN = ("`--model LSTM --nlayers 1 --nhid 256 --emsize 128 --batch_size 16 --optimizer adam --lr 0.004 --dropout 0.0 "
          "--wdrop 0.0`")
LOSSES = {"0.25T.seed1": 1.7, "0.25T.seed2": 1.71, "4T.seed1": 1.5, "4T.seed2": 1.512}
BETTER = {"pointer": 0.1, "dynamic": 0.2}  # than the model


class Runs:
    """Stand in for the scripts that quality.py runs: keep their commands, and write what their records would have."""

    def __init__(self):
        self.commands, self.stop_at = [], None  # the number of commands after which one is stopped half-way

    def __call__(self, script, *arguments):
        flags = dict(zip(arguments, arguments[1:]))
        self.commands.append([script, *map(str, arguments)])
        stopped = len(self.commands) == self.stop_at
        if script == "benchmarks/peer.py":
            flags["--save"].unlink(missing_ok=True)
            metrics = Metrics(flags["--save"])
            metrics.write("run", stage="peer")
            for epoch, seconds, loss in ((250, 40.0, 2.5), (500, 50.5, 2.0), (600, 29.5, 1.9)):  # T = 120
                metrics.write("epoch", epoch=epoch, seconds=seconds, loss=loss)
            self.end(metrics, stopped, valid_loss=1.9)
        elif script == "main.py":
            save = flags.get("--resume") or flags["--save"]
            metrics, loss = Metrics(metrics_path(save)), LOSSES[save.stem]
            if "--save" in flags:
                metrics.write("run", stage="train", flags={**FLAGS, "minutes": float(flags["--minutes"])})
            else:
                metrics.write("resume", stage="train", epoch=2)
            metrics.write("epoch", epoch=1, seconds=5.0, loss=loss)
            last_path(save).write_bytes(b"")
            self.end(metrics, stopped, valid_loss=loss, epochs=2.5)
        else:
            kind, metrics = script.removesuffix(".py"), Metrics(metrics_path(flags["--save"]))
            own = {"window": 500} if kind == "pointer" else {"lr": 1e-4}
            loss = LOSSES[flags["--save"].stem] - BETTER[kind]
            metrics.write("grid" if kind == "pointer" else "dynamic-grid", split="valid", loss=loss + 1, **own)
            self.end(metrics, stopped, kind, split="valid", loss=loss, **own)

    def end(self, metrics, stopped, kind="test", **values):
        if stopped:
            raise BadInput("stopped")
        metrics.write(kind, finished=True, **values)


@pytest.fixture
def runs(monkeypatch):
    runs = Runs()
    monkeypatch.setattr(quality, "run_whole", runs)
    return runs


@pytest.fixture
def make(tmp_path, monkeypatch, capsys, runs):
    """Run the script for two budgets and two seeds; returns the commands that it ran and what it printed."""
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda paths, *_, **__: drawn.append(paths))

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["quality.py", "--data", "book.txt", "--folder", str(tmp_path / "q"),
                                          "--budgets", "0.25", "4", "--seeds", "1", "2", *flags])
        del runs.commands[:]
        quality.main()
        return runs.commands[:], capsys.readouterr().out
    call.drawn = drawn
    return call


def value(command, flag):
    return command[command.index(flag) + 1]


def test_a_budget_is_so_many_times_of_the_peer(make, tmp_path):
    """The peer takes 40 + 50.5 + 29.5 = 120 s: a quarter of that is half a minute, four times that eight minutes."""
    (peer, *trained), _ = make()
    assert peer[0] == "benchmarks/peer.py"
    assert [command[0] for command in trained] == ["main.py"] * 4
    assert [value(command, "--minutes") for command in trained] == ["0.500", "0.500", "8.000", "8.000"]
    assert [value(command, "--seed") for command in trained] == ["1", "2", "1", "2"]
    assert len({value(command, "--save") for command in trained}) == 4
    for command in trained:
        assert command[command.index("--shares"):][:3] == ["--shares", "90", "10"]
    assert make.drawn == [[tmp_path / "q" / f"{name}.metrics.jsonl" for name in ("peer", "0.25T.seed1", "4T.seed1")]]


def test_further_flags_are_those_of_training(make):
    (_, *trained), _ = make("--flags", "--nhid", "300", "--wdrop", "0.2")
    assert all(command[-4:] == ["--nhid", "300", "--wdrop", "0.2"] for command in trained)


def test_the_table_is_that_of_the_records(make):
    _, printed = make()
    assert printed.splitlines() == [
        "", "the peer: 1.900 nats per token after T = 120 s", "",
        "| budget | minutes | epochs | loss of each seed | what was chosen |",
        "|---:|---:|---:|---|---|",
        f"| 0.25 T | 0.5 | 2.5 | 1.700, 1.710 | {CHOSEN} |",
        f"| 4 T | 8.0 | 2.5 | 1.500, 1.512 | {CHOSEN} |"]


@pytest.mark.parametrize("flags", [[], ["--on-top"]], ids=["alone", "on top"])
def test_what_is_there_is_not_made_again(make, flags):
    first, printed = make(*flags)
    assert len(first) == 1 + 4 * (3 if flags else 1)
    assert make(*flags) == ([], printed)


@pytest.mark.parametrize("stop_at", range(1, 14))
def test_what_was_stopped_goes_on(make, runs, stop_at):
    """Only the command that was stopped is run again: training by --resume, the others as they were."""
    whole = 1 + 4 * 3
    runs.stop_at = stop_at
    with pytest.raises(BadInput, match="stopped"):
        make("--on-top")
    begun, runs.stop_at = runs.commands[:], None
    commands, printed = make("--on-top")
    assert len(begun) == stop_at
    assert len(commands) == whole - stop_at + 1
    if begun[-1][0] == "main.py":
        assert commands[0] == ["main.py", "--resume", value(begun[-1], "--save"), "--no-cuda"]
    else:
        assert commands[0] == begun[-1]
    assert f"| 1.700, 1.710 | 1.600, 1.610 | 1.500, 1.510 | {CHOSEN} |" in printed


def test_a_run_that_was_interrupted_is_not_done(make, tmp_path):
    """SIGINT tests the best model so far, and the record says that the run has not come to its end."""
    make()
    path = tmp_path / "q" / "4T.seed2.metrics.jsonl"
    path.write_text(path.read_text().replace('"finished": true', '"finished": false'))
    commands, _ = make()
    assert commands == [["main.py", "--resume", str(tmp_path / "q" / "4T.seed2.pt"), "--no-cuda"]]


def test_a_run_that_died_before_its_first_state_begins_again(make, tmp_path):
    make()
    path = tmp_path / "q" / "4T.seed2.metrics.jsonl"
    path.write_text(path.read_text().splitlines(True)[0])
    last_path(tmp_path / "q" / "4T.seed2.pt").unlink()
    (command,), _ = make()
    assert value(command, "--minutes") == "8.000"


# --- on top ----------------------------------------------------------------------------------------------------------

def test_cache_and_dynamic_evaluation_have_columns_of_their_own(make):
    commands, printed = make("--on-top")
    assert [command[0] for command in commands] == ["benchmarks/peer.py", *["main.py", "pointer.py", "dynamic.py"] * 4]
    assert printed.splitlines()[3:] == [
        "| budget | minutes | epochs | loss of each seed | cache | dynamic | what was chosen |",
        "|---:|---:|---:|---|---|---|---|",
        f"| 0.25 T | 0.5 | 2.5 | 1.700, 1.710 | 1.600, 1.610 | 1.500, 1.510 | {CHOSEN} |",
        f"| 4 T | 8.0 | 2.5 | 1.500, 1.512 | 1.400, 1.412 | 1.300, 1.312 | {CHOSEN} |",
        "", f"cache and dynamic: {quality.SAME_TEXT}"]


def test_only_what_is_in_the_records_has_a_column(make, tmp_path):
    """Scores that were made by hand show without the flag; those on test and of both together are of neither column."""
    make()
    metrics = Metrics(tmp_path / "q" / "4T.seed2.metrics.jsonl")
    for values in ({"split": "valid", "loss": 1.45}, {"split": "valid", "loss": 1.41}, {"split": "test", "loss": 9.0},
                   {"split": "valid", "loss": 8.0, "window": 500}):
        metrics.write("dynamic", lr=1e-4, **values)
    commands, printed = make()
    assert not commands
    assert printed.splitlines()[3].split(" | ")[3:5] == ["loss of each seed", "dynamic"]
    assert [line.split(" | ")[4] for line in printed.splitlines()[5:7]] == ["-, -", "-, 1.410"]
    assert printed.splitlines()[-1] == f"dynamic: {quality.SAME_TEXT}"


def test_the_grids_are_some_that_the_scripts_take():
    for kind, script in (("pointer", pointer), ("dynamic", dynamic)):
        script.parse_flags(quality.ON_TOP[kind][1].split())


def test_the_picture_marks_them(make, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    make("--on-top")
    monkeypatch.undo()
    (axes,) = plot.draw(make.drawn[0], tmp_path / "q.png", "minutes", "loss", log_axis=False).axes
    heights = {note.get_gid(): note.xyann[1] for note in axes.texts if note.get_gid()}
    assert heights == pytest.approx({"0.25T.seed1 pointer": 1.6, "0.25T.seed1 dynamic": 1.5, "4T.seed1 pointer": 1.4,
                                     "4T.seed1 dynamic": 1.3})


def test_what_is_scored_on_top_is_what_the_scripts_record(trained, capsys):
    """The real scripts, on a tiny model: their records have what the table reads, and it is not made again."""
    pointer.main(["--no-cuda", "--save", str(trained), "--window", "5", "9", "--lambdasm", "0.1"])
    dynamic.main(["--no-cuda", "--save", str(trained), "--lr", "1e-4", "--batch_size", "4"])
    dynamic.main(["--no-cuda", "--save", str(trained), "--lr", "1e-4", "--batch_size", "4", "--window", "5"])
    capsys.readouterr()
    lines = [line for line in read_metrics(metrics_path(trained)) if line.get("split") == "valid"]
    cache, alone, both = (line["loss"] for line in lines if line["kind"] in ("pointer", "dynamic"))
    assert quality.scored(metrics_path(trained), "pointer") == cache
    assert quality.scored(metrics_path(trained), "dynamic") == alone != both


# --- what is wrong ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [["--budgets", "0"], ["--seeds", "-1"], ["--nhid", "5"], ["--on-top", "yes"]])
def test_bad_flags_end_in_a_line_and_status_2(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["quality.py", "--data", "book.txt", "--folder", "q", *flags])
    with pytest.raises(SystemExit) as end:
        run_script(quality.main)
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("status", [2, 137], ids=["bad input", "no memory"])
def test_a_script_that_fails_is_named(monkeypatch, status):
    monkeypatch.setattr(scripts, "run", lambda _: status)
    with pytest.raises(BadInput, match=rf"main\.py: failed with status {status}"):
        scripts.run_whole("main.py", "--data", "book.txt")


def test_a_script_that_is_stopped_is_none_that_fails(monkeypatch):
    monkeypatch.setattr(scripts, "run", lambda _: 143)
    with pytest.raises(SystemExit, match="143"):
        scripts.run_whole("main.py", "--data", "book.txt")
