"""Texts of several lengths: what is run, what is not run again, and the table, from records that a stub writes."""

import math
import sys

import lengths
import pytest

from errors import BadInput
from metrics import Metrics, read_metrics
from process import run_script
from run_files import last_path, metrics_path

CHOSEN = {"nlayers": 1, "nhid": 256, "dropout": 0.1, "wdrop": 0.0, "batch_size": 16, "optimizer": "adam", "lr": 0.004}
SIZE = "`--nlayers 1 --nhid 256 --dropout 0.1 --wdrop 0.0 --batch_size 16 --optimizer adam --lr 0.004`"


class Runs:
    """Stand in for main.py: keep the commands, and write what the records would have."""

    def __init__(self):
        self.commands, self.stop_at = [], None  # the number of commands after which one is stopped half-way

    def __call__(self, script, *arguments):
        assert script == "main.py"
        flags = dict(zip(arguments, arguments[1:]))
        self.commands.append([*map(str, arguments)])
        save = flags.get("--resume") or flags["--save"]
        metrics = Metrics(metrics_path(save))
        if "--save" in flags:
            metrics.write("run", stage="train", flags={**CHOSEN, "nhid": int(flags.get("--nhid", CHOSEN["nhid"]))})
        last_path(save).write_bytes(b"")
        if len(self.commands) == self.stop_at:
            raise BadInput("stopped")
        nhid = next(line for line in read_metrics(metrics_path(save)) if line["kind"] == "run")["flags"]["nhid"]
        metrics.write("test", epochs=2.25, finished=True, valid_loss=math.log(nhid), loss=math.log(2 * nhid))


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """Run the script; returns the commands that it ran and the lines that it printed."""
    runs = Runs()
    monkeypatch.setattr(lengths, "run_whole", runs)

    def call(*flags, data=("book.txt",)):
        monkeypatch.setattr(sys, "argv", ["lengths.py", "--data", *data, "--folder", str(tmp_path / "l"), *flags])
        del runs.commands[:]
        lengths.main()
        return runs.commands[:], capsys.readouterr().out.splitlines()
    call.runs = runs
    return call


def value(command, flag):
    return command[command.index(flag) + 1] if flag in command else None


def test_every_text_level_time_and_seed_is_run_once(make):
    commands, _ = make("--minutes", "3", "0.5", "--seeds", "4", "5", data=("a.txt", "b.txt"))
    found = {tuple(value(command, flag).split("/")[-1] for flag in ("--data", "--level", "--minutes", "--seed"))
             for command in commands}
    assert len(commands) == len(found) == 2 * 2 * 2 * 2
    assert found == {(text, level, minutes, seed) for text in ("a.txt", "b.txt") for level in ("char", "word")
                     for minutes in ("3", "0.5") for seed in "45"}
    assert all(value(command, "--min-count") == {"char": None, "word": "2"}[value(command, "--level")]
               for command in commands)


def test_neighbours_are_the_sizes_beside_the_chosen_one(make):
    """The ladder is ..., 192, 256, 384, ...; the embedding of words is at most 400 wide."""
    commands, _ = make("--minutes", "3", "--seeds", "1", "--neighbours")
    assert [(value(command, "--level"), value(command, "--nhid"), value(command, "--emsize")) for command in commands] \
        == [(level, nhid, nhid) for level in ("char", "word") for nhid in (None, "192", "384")]


@pytest.mark.parametrize(("size", "which", "expected"), [(64, "smaller", None), (64, "larger", 96),
                                                         (1536, "larger", None), (512, "smaller", 384)])
def test_the_ladder_ends(size, which, expected):
    assert lengths.neighbour(size, which) == expected


def test_the_table_is_that_of_the_records(make):
    """Bits per character: log2 of 256 is 8. By words perplexity."""
    commands, printed = make("--minutes", "3", "--seeds", "1", "2", "--neighbours")
    smaller, larger = "7.585 / 8.585, 7.585 / 8.585", "8.585 / 9.585, 8.585 / 9.585"
    assert printed[2:] == [
        f"| book | char | 3 | 2.2 | {SIZE} | 8 / 9, 8 / 9 | {smaller} | {larger} |",
        f"| book | word | 3 | 2.2 | {SIZE} | 256 / 512, 256 / 512 | 192 / 384, 192 / 384 | 384 / 768, 384 / 768 |"]
    assert len({line.count("|") for line in printed}) == 1
    assert make("--minutes", "3", "--seeds", "1", "2", "--neighbours") == ([], printed)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_what_was_stopped_goes_on(make, stop_at):
    make.runs.stop_at = stop_at
    with pytest.raises(BadInput, match="stopped"):
        make("--minutes", "3", "--seeds", "1", "2")
    begun, make.runs.stop_at = make.runs.commands[:], None
    commands, printed = make("--minutes", "3", "--seeds", "1", "2")
    assert commands[0] == ["--resume", value(begun[-1], "--save")]
    assert (len(begun), len(commands)) == (stop_at, 4 - stop_at + 1)
    assert printed[2].count("8 / 9") == 2


def test_a_report_shows_what_is_finished(make, tmp_path, monkeypatch, capsys):
    make("--minutes", "15", "3", "--seeds", "1", "--levels", "char")
    (tmp_path / "l" / "other.metrics.jsonl").write_text("{}\n")
    Metrics(tmp_path / "l" / "book.char.60min.seed1.metrics.jsonl").write("run", stage="train", flags=CHOSEN)
    monkeypatch.setattr(sys, "argv", ["lengths.py", "--report", str(tmp_path / "l")])
    lengths.main()
    assert [line.split(" | ")[2] for line in capsys.readouterr().out.splitlines()[2:]] == ["3", "15"]


@pytest.mark.parametrize("flags", [[], ["--data", "a.txt"], ["--folder", "l"],
                                   ["--data", "a.txt", "--folder", "l", "--minutes", "0"],
                                   ["--data", "a/b.txt", "c/b.txt", "--folder", "l"], ["--report", "nowhere"]])
def test_bad_flags_end_in_a_line_and_status_2(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["lengths.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_script(lengths.main)
    assert end.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_table_has_the_last_test_of_a_run_that_was_stopped(make, tmp_path):
    """A run that Ctrl-C stops has a test too."""
    save = tmp_path / "l" / "book.char.3min.seed1.pt"
    save.parent.mkdir()
    metrics = Metrics(metrics_path(save))
    metrics.write("run", stage="train", flags=CHOSEN)
    metrics.write("test", epochs=1.0, finished=False, valid_loss=9.0, loss=9.0)
    last_path(save).write_bytes(b"")
    commands, printed = make("--minutes", "3", "--seeds", "1", "--levels", "char")
    assert commands == [["--resume", str(save)]]
    assert printed[2] == f"| book | char | 3 | 2.2 | {SIZE} | 8 / 9 |  |  |"
