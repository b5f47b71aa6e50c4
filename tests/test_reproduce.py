"""A row of the papers is made stage by stage, and a run that has to stop in between goes on."""

import json
import sys
from types import SimpleNamespace

import pytest
import reproduce
import scripts

import dynamic
import finetune
import main
import pointer
from errors import BadInput

TINY = "--emsize 5 --nhid 6 --nlayers 2 --batch_size 4 --bptt 7 --lr 1 --epochs 30 --nonmono 3 --no-cuda"
DYNAMIC = "--batch_size 4 --lr 1e-4 1e-3 1e-2 --lamb 0.01 0.1"


@pytest.fixture
def make(corpus_dir, tmp_path, monkeypatch, capfd):
    """Run the row "tiny", or some `stages` of it, in a folder; returns what it prints."""
    monkeypatch.setattr(reproduce, "GRID", "--window 5 20 --theta 1 --lambdasm 0.1 0.3 --no-cuda")
    recipe = {
        "train": f"{TINY} --data {corpus_dir}", "finetune": f"{TINY} --data {corpus_dir}",
        "cache": "--window 9 --no-cuda", "dynamic": f"{DYNAMIC} --no-cuda",
        "both": f"{DYNAMIC} --window 5 9 --no-cuda",
        "published": ["9.1 / 9.2", "8.1 / 8.2", "7.1 / 7.2", "6.1 / 6.2"]}

    def call(folder, *flags, stages=tuple(recipe)):
        monkeypatch.setitem(reproduce.RECIPES, "tiny", {stage: recipe[stage] for stage in (*stages, "published")})
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "tiny", "--folder", str(tmp_path / folder), *flags])
        reproduce.main()
        return capfd.readouterr().out
    return call


def test_every_recipe_is_one_that_the_scripts_take():
    for recipe in reproduce.RECIPES.values():
        for stage, script in (("train", main), ("finetune", finetune), ("cache", pointer), ("dynamic", dynamic),
                              ("both", dynamic)):
            if stage in recipe:
                script.parse_flags(recipe[stage].split())
    pointer.parse_flags(reproduce.GRID.split())


@pytest.mark.parametrize(("minutes", "seconds"), [(None, None), (8, 460), (4 / 3, 60), (1, 45), (0.1, 4.5)])
def test_scripts_get_some_of_the_time_to_end(monkeypatch, minutes, seconds):
    """20 seconds, of few minutes a quarter."""
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    deadline = reproduce.deadline_in(minutes)
    assert deadline == (seconds and pytest.approx(1000 + seconds))


@pytest.mark.parametrize(("status", "minutes", "ends"), [
    (143, ["--minutes", "8"], 0), (143, ["--minutes", "9"], 143), (143, [], 143), (2, ["--minutes", "8"], 2),
    (139, [], 139), (130, [], 130)])
def test_its_exit_status_says_why_it_stopped(monkeypatch, tmp_path, capsys, status, minutes, ends):
    """0 at the deadline, which was asked for; that of a script that failed; 143 if something else stopped it.

    The script runs to 480 seconds from the start.
    """
    now = iter([0.0, 480.0])
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(reproduce, "run", lambda *_, **__: status)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "ptbc", "--folder", str(tmp_path), *minutes])
    try:
        found = reproduce.main()
    except SystemExit as error:
        found = error.code
    assert found == ends
    assert ("the same command goes on" in capsys.readouterr().out) == (status == 143)


def test_a_trial_is_not_taken_for_the_row(tmp_path):
    recipe, trial = reproduce.RECIPES["ptb-lstm"], ["--epochs", "2"]
    reproduce.check_extra(["--epochs", "3"], recipe, tmp_path)  # and no run took it
    reproduce.check_extra(trial, recipe, tmp_path)
    (tmp_path / "train.metrics.jsonl").write_text('{"kind": "run"}\n')
    reproduce.check_extra(trial, recipe, tmp_path)
    with pytest.raises(BadInput, match="began with --extra='--epochs 2'; another --folder"):
        reproduce.check_extra([], recipe, tmp_path)
    (tmp_path / "extra.txt").unlink()  # as an earlier version left it
    reproduce.check_extra([], recipe, tmp_path)
    with pytest.raises(BadInput, match="began with no --extra"):
        reproduce.check_extra(trial, recipe, tmp_path)


@pytest.mark.parametrize("extra", ["--minutes 5", "--emsizee 3", "it's"])
def test_further_flags_are_those_of_all_scripts_that_get_them(tmp_path, monkeypatch, extra):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "ptb-lstm", "--folder", str(tmp_path), f"--extra={extra}"])
    with pytest.raises(BadInput):
        reproduce.main()


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_further_flags_are_given_again_when_a_stage_goes_on(tmp_path, stage):
    (tmp_path / {"train": "train.last.pt", "finetune": "finetune.finetune.last.pt"}[stage]).touch()
    command = reproduce.command(stage, reproduce.RECIPES["ptb-lstm"], tmp_path, ["--cuda-graphs"])
    assert command[1:] == ["--resume", str(tmp_path / f"{stage}.pt"), "--cuda-graphs"]


def test_a_row_has_the_figures_of_the_record_beside_the_published_ones(monkeypatch, tmp_path):
    """Losses of e^4 and e^3; bits per character; no test split; losses that are too large for a perplexity."""
    lines = [{"kind": "run", "stage": "train", "seed": 5, "commit": None, "device": "CPU"},
             {"kind": "test", "epochs": 9, "seconds": 90.0, "finished": True, "valid_loss": 4.0, "loss": 3.0,
              "ppl": 20.0855, "bpc": 4.3281}]
    for published, test, cell in ((["9 / 8"], lines[1], "54.60 / 20.09 (9 / 8)"), ([], lines[1], "54.60 / 20.09"),
                                  (["1.175 bpc"], lines[1], "4.328 bpc (1.175 bpc)"),
                                  ([], {name: lines[1][name] for name in list(lines[1])[:5]}, "54.60 / nan"),
                                  ([], {**lines[1], "valid_loss": 800.0, "loss": None, "ppl": None, "bpc": None},
                                   "inf / inf")):
        monkeypatch.setitem(reproduce.RECIPES, "tiny", {"published": published})
        text = "".join(json.dumps(line) + "\n" for line in (lines[0], {**test, "finished": False}, test))
        (tmp_path / "train.metrics.jsonl").write_text(text)
        assert reproduce.row("tiny", tmp_path) == f"| tiny | {cell} | seed 5 | commit unknown | CPU | 2 minutes |"


@pytest.mark.slow
def test_a_row_stage_by_stage(make):
    printed = make("whole")
    row = printed.splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "tiny"
    assert [cell.partition(" (")[2] for cell in cells[1:7]] == [
        "9.1 / 9.2)", "8.1 / 8.2)", "7.1 / 7.2)", "", "6.1 / 6.2)", ""]
    assert cells[7] == "seed 1111"
    assert make("whole").splitlines() == [row], "nothing is left to do"


@pytest.mark.slow
@pytest.mark.parametrize("script, stages, count, begun", [
    ("main.py", ["train"], 2, '"kind"'), ("dynamic.py", ["train", "finetune", "dynamic"], 3, '"dynamic-grid"')])
def test_a_stage_that_is_stopped_goes_on(make, tmp_path, monkeypatch, script, stages, count, begun):
    """Stopped by its deadline as often as it takes, the row is that of the run that never stopped."""
    whole = make("whole", stages=stages).splitlines()[-1].split(" | ")
    wait = scripts.subprocess.Popen.wait
    seen = {0}

    def impatient(process, timeout=None):
        """Let the deadline come as soon as the stage has recorded something new."""
        if timeout is not None and any(word.endswith(script) for word in process.args) and len(seen) <= count:
            while process.poll() is None:
                records = "".join(path.read_text() for path in (tmp_path / "stopped").glob("*.metrics.jsonl"))
                if records.count(begun) not in seen:
                    seen.add(records.count(begun))
                    raise scripts.subprocess.TimeoutExpired(process.args, timeout)
                reproduce.time.sleep(0.01)
        return wait(process, timeout)

    monkeypatch.setattr(scripts.subprocess.Popen, "wait", impatient)
    printed = [make("stopped", "--minutes", "500", stages=stages) for _ in range(count + 1)]
    assert "the same command goes on" in printed[0]
    assert printed[-1].splitlines()[-1].split(" | ")[:-1] == whole[:-1], "all but the minutes"
    if "dynamic" in stages:
        lines = (tmp_path / "stopped" / "finetune.metrics.jsonl").read_text()
        assert lines.count('"dynamic-grid"') == 6, "each setting once"
