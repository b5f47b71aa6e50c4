"""Each row of the ablation lacks one thing, a run that was stopped goes on, and the table is that of the records."""

import json
import math
import signal
from argparse import Namespace

import ablation
import numpy
import pytest
import reproduce

import finetune
import main
from errors import BadInput
from metrics import Metrics
from run_files import metrics_path
from steps import sample_seq_len

CHANGED = {  # by each row, beside the full model
    "no-asgd": {"nonmono", "when"}, "no-lengths": {"bptt", "max_bptt", "lr"}, "no-dropoute": {"dropoute"},
    "no-wdecay": {"wdecay"}, "no-ar-tar": {"alpha", "beta"}, "full-embedding": {"emsize"}, "no-wdrop": {"wdrop"}}
SCRIPTS = {"main.py": main, "finetune.py": finetune}
TINY = "--emsize 5 --nhid 6 --nlayers 2 --batch_size 4 --bptt 7 --lr 1 --precision fp32 --no-cuda"


# --- the rows --------------------------------------------------------------------------------------------------------

def flags(name, stage):
    script = {"train": main, "finetune": finetune}[stage]
    return vars(script.parse_flags(ablation.recipe(name, 1, "text")[stage].split()))


@pytest.mark.parametrize("name", CHANGED)
def test_a_row_differs_from_the_full_model_in_one_part(name):
    row, full = flags(name, "train"), flags("full", "train")
    different = {flag for flag in full if flag != "when" and str(row[flag]) != str(full[flag])}
    assert different | {"when"} & CHANGED[name] == CHANGED[name]


def test_all_rows_but_one_are_trained_and_one_of_these_is_tuned():
    assert sorted(ablation.TRAINED) == sorted(["full", *CHANGED])
    assert [name for name in ablation.TRAINED if "finetune" in ablation.recipe(name, 1, "text")] == ["full"]


def test_a_part_that_is_taken_away_is_off():
    values = {name: flags(name, "train") for name in CHANGED}
    assert values["no-dropoute"]["dropoute"] == values["no-wdecay"]["wdecay"] == values["no-wdrop"]["wdrop"] == 0
    assert values["no-ar-tar"]["alpha"] == values["no-ar-tar"]["beta"] == 0
    assert values["full-embedding"]["emsize"] == values["full-embedding"]["nhid"]
    assert values["no-asgd"]["nonmono"] > values["no-asgd"]["epochs"] > max(values["no-asgd"]["when"])


def test_without_variable_lengths_every_batch_has_one_length_and_rate():
    numpy.random.seed(1)
    row, full = flags("no-lengths", "train"), flags("full", "train")
    lengths = {sample_seq_len(row["bptt"], row["max_bptt"]) for _ in range(1000)}
    assert lengths == {full["bptt"]}
    assert row["lr"] * full["bptt"] / row["bptt"] == full["lr"]


def test_the_text_is_the_first_words_in_whole_lines(tmp_path):
    for split, text in (("train", "a b c\nd e\nf g h\n"), ("valid", "v\n"), ("test", "t\n")):
        (tmp_path / f"{split}.txt").write_text(text)
    for words, lines in ((1, "a b c\n"), (4, "a b c\n"), (5, "a b c\nd e\n"), (99, "a b c\nd e\nf g h\n")):
        folder = tmp_path / str(words)
        for _ in range(2):  # the second time it is there
            ablation.cut_corpus(tmp_path, folder, words)
        assert [(folder / f"{split}.txt").read_text() for split in ("train", "valid", "test")] == [lines, "v\n", "t\n"]
    with pytest.raises(BadInput, match="another --folder begins anew"):
        ablation.cut_corpus(tmp_path, tmp_path / "1", 5)


def test_a_text_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"train.txt cannot be read: No such file"):
        ablation.main(["--data", str(tmp_path / "nowhere"), "--folder", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


# --- the runs --------------------------------------------------------------------------------------------------------

class Ended:
    """A process that has run its script, here, before it is looked at."""

    def __init__(self, arguments, **_):
        script, *rest = arguments[1:]
        self.returncode = SCRIPTS[script].main(rest)
        Ended.commands.append(" ".join(arguments[1:]))

    def poll(self):
        return self.returncode


@pytest.fixture
def run(corpus_dir, tmp_path, monkeypatch):
    """Run the rows "full" and "no-asgd" on a tiny model; returns the status and the commands that ran."""
    monkeypatch.setattr(ablation, "subprocess", Namespace(Popen=Ended, STDOUT=None))
    for name, value in {"SEEDS": (1,), "EPOCHS": 4, "TUNING": 2, "POLL": 0}.items():
        monkeypatch.setattr(ablation, name, value)
    monkeypatch.setattr(ablation, "FULL", "")

    def call(folder):
        Ended.commands = []
        flags = ["--data", str(corpus_dir), "--folder", str(tmp_path / folder), "--rows", "full", "no-asgd",
                 "--jobs", "1"]
        return ablation.main([*flags, f"--extra={TINY}"]), Ended.commands
    return call


def test_a_run_that_is_stopped_goes_on_and_one_that_is_finished_is_left(run, tmp_path, monkeypatch, capsys):
    status, commands = run("whole")
    assert (status, [command.split()[0] for command in commands]) == (0, ["main.py", "finetune.py", "main.py"])
    whole = capsys.readouterr().out
    write = Metrics.write

    def stop(metrics, kind, **values):
        write(metrics, kind, **values)
        if kind == "epoch" and values["epoch"] == stop.epoch:
            stop.epoch = None
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(Metrics, "write", stop)
    stop.epoch = 2
    status, commands = run("stopped")
    assert status == 1, "a process that something else has stopped"
    status, commands = run("stopped")
    assert status == 0
    assert commands[0].startswith("main.py --resume")
    assert [command.split()[0] for command in commands] == ["main.py", "finetune.py"]
    printed = capsys.readouterr().out
    assert last_table(printed) == last_table(whole)
    before = [path.read_bytes() for path in sorted(tmp_path.glob("stopped/*/*.pt"))]
    assert run("stopped") == (0, [])
    assert [path.read_bytes() for path in sorted(tmp_path.glob("stopped/*/*.pt"))] == before


def last_table(printed):
    """The table that was printed last."""
    return printed[printed.rindex("| | seed"):].splitlines()[:len(ablation.ABLATION) + 2]


@pytest.mark.parametrize("cause", ["signal", "deadline"])
def test_a_stop_tells_every_process(tmp_path, monkeypatch, cause):
    """They get SIGTERM and are waited for; no other is begun."""
    told = []

    class Running:
        def __init__(self, *_, **__):
            told.append("begun")
            if cause == "signal" and told.count("begun") == 2:
                signal.raise_signal(signal.SIGTERM)

        def poll(self):
            return None

        def terminate(self):
            told.append("terminate")

        def wait(self):
            told.append("wait")
    monkeypatch.setattr(ablation, "subprocess", Namespace(Popen=Running, STDOUT=None))
    naps = []  # each is a second of this clock
    monkeypatch.setattr(ablation, "time", Namespace(monotonic=lambda: len(naps), sleep=naps.append))
    deadline = 3 if cause == "deadline" else None
    status = ablation.run_all([("full", 1), ("no-asgd", 1), ("full", 2)], tmp_path, tmp_path, 2, deadline)
    assert status == (143 if cause == "signal" else 0)
    assert told == ["begun"] * 2 + ["terminate"] * 2 + ["wait"] * 2


def test_other_flags_take_another_folder(tmp_path):
    """A trial with --extra is not taken for the runs of the table. A flag that no run took is no reason."""
    ablation.check_flags(tmp_path, "--emsizee 5")
    ablation.check_flags(tmp_path, "--emsize 5")
    (tmp_path / "full-1").mkdir()
    metrics_path(tmp_path / "full-1" / "train.pt").write_bytes(b"")
    ablation.check_flags(tmp_path, "--emsize 5")
    with pytest.raises(BadInput, match="another --folder begins anew"):
        ablation.check_flags(tmp_path, "")
    (tmp_path / "flags.txt").unlink()
    with pytest.raises(BadInput, match="another --folder begins anew"):
        ablation.check_flags(tmp_path, "--emsize 5")


def test_a_signal_of_the_terminal_reaches_a_run_once(tmp_path):
    """Ctrl-C goes to all processes of a session; the second signal, from here, would end the run at once."""
    process = ablation.start(["-c", "import os, sys; sys.exit(os.getsid(0) != os.getpid())"], tmp_path)
    assert process.wait() == 0


def test_a_run_has_one_thread_and_adds_what_it_prints_to_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for said in ("first", "second"):
        code = f"import os, sys; print({said!r}, os.environ['OMP_NUM_THREADS']); print('error', file=sys.stderr)"
        assert ablation.start(["-c", code], tmp_path / "full-1").wait() == 0
    lines = (tmp_path / "full-1" / "log.txt").read_text().splitlines()
    assert sorted(lines) == ["error", "error", "first 1", "second 1"]
    assert lines.index("first 1") < lines.index("second 1")


def test_the_runs_that_are_asked_for_end_in_time(corpus_dir, tmp_path, monkeypatch):
    """Of the rows named, those without a record, one seed after the other. A quarter of a minute is for their end."""
    seen = []
    monkeypatch.setattr(ablation, "run_all", lambda *given: seen.append(given) or 0)
    monkeypatch.setattr(reproduce, "time", Namespace(monotonic=lambda: 1000.0))
    write_record(tmp_path, "no-wdrop", 1, train=(150, 140))
    flags = ["--data", str(corpus_dir), "--folder", str(tmp_path), "--jobs", "3", "--rows", "no-wdrop", "no-asgd"]
    for minutes, deadline in (([], None), (["--minutes", "1"], 1045.0)):
        assert ablation.main([*flags, *minutes, "--extra=--emsize 5"]) == 0
        runs, folder, _, *rest = seen.pop()
        assert runs == [("no-asgd", 1), ("no-wdrop", 2), ("no-asgd", 2)]
        assert (folder, rest) == (tmp_path.resolve(), [3, deadline, "--emsize 5"])


def test_a_run_whose_record_is_there_is_not_begun(run, tmp_path):
    """As another machine has left it: only the record. One that lacks a stage is begun."""
    (tmp_path / "copied").mkdir()
    write_record(tmp_path / "copied", "full", 1, train=(150, 140))
    write_record(tmp_path / "copied", "no-asgd", 1, train=(151, 141))
    status, commands = run("copied")
    assert (status, [command.split()[0] for command in commands]) == (0, ["main.py", "finetune.py"])
    assert ablation.read_scores(tmp_path / "copied")["no-asgd"] == {1: pytest.approx((151, 141))}


def test_a_record_that_was_copied_stays_where_a_run_was_stopped_before(run, tmp_path):
    (tmp_path / "copied").mkdir()
    write_record(tmp_path / "copied", "full", 1, train=(150, 140), finetune=(148, 139))
    write_record(tmp_path / "copied", "no-asgd", 1, train=(151, 141))
    for _ in range(2):
        assert run("copied") == (0, [])
        assert list(ablation.read_scores(tmp_path / "copied")) == ["full", "no-finetuning", "no-asgd"]
        (tmp_path / "copied" / "full-1").mkdir(exist_ok=True)
        metrics_path(tmp_path / "copied" / "full-1" / "train.pt").write_text('{"kind": "run", "stage": "train"}\n')


def test_a_run_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "POLL", 0)
    monkeypatch.setattr(ablation, "start", lambda _, place: Namespace(
        poll=lambda: 0, returncode=3 if "full" in str(place) else 0))
    begun = []
    monkeypatch.setattr(ablation, "next_command", lambda name, *_: begun.append(name) or (
        ["x"] if begun.count(name) == 1 else None))
    assert ablation.run_all([("full", 1), ("no-wdrop", 1)], tmp_path, tmp_path, 1) == 1
    assert begun == ["full", "no-wdrop", "no-wdrop"]
    assert "full-1: ended with 3; log.txt there says why" in capsys.readouterr().out


# --- the table -------------------------------------------------------------------------------------------------------

def write_record(folder, name, seed, **losses):
    """A record of a run whose stages have these (validation, test) perplexities."""
    lines = []
    for stage, (valid, test) in losses.items():
        lines += [{"kind": "run", "stage": stage},
                  {"kind": "test", "epochs": 9, "seconds": 1.0, "finished": True, "valid_loss": math.log(valid),
                   "loss": math.log(test)}]
    ablation.record_path(folder, name, seed).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_table_has_the_differences_of_the_records(tmp_path):
    write_record(tmp_path, "full", 1, train=(150, 140), finetune=(148, 139))
    write_record(tmp_path, "full", 2, train=(151, 142), finetune=(149, 138))
    write_record(tmp_path, "no-wdrop", 1, train=(160.5, 150.25))
    write_record(tmp_path, "no-wdrop", 2, train=(161, 152))
    write_record(tmp_path, "no-asgd", 1, train=(150.5, 139))
    write_record(tmp_path, "no-asgd", 2, train=(151.5, 142.5))
    write_record(tmp_path, "no-wdecay", 1, train=(140, 130))
    lines = {line.split(" | ")[0][2:]: line for line in ablation.table(ablation.read_scores(tmp_path))}
    assert lines["AWD-LSTM"] == "| AWD-LSTM | 148.00 / 139.00 | 149.00 / 138.00 |  |  |  |  |"
    assert lines["− fine-tuning"] == ("| − fine-tuning | 150.00 / 140.00 | 151.00 / 142.00 | +2.00 / +1.00 | "
                                      "+2.00 / +4.00 | +0.7 / +1.5 | same |")
    assert lines["− weight dropping"].endswith("| +10.50 / +10.25 | +10.00 / +10.00 | +10.4 / +10.1 | same |")
    assert lines["− NT-ASGD"].endswith("| +0.50 / -1.00 | +0.50 / +0.50 | +5.6 / +4.9 | unclear |")
    assert lines["− weight decay"].endswith("| -10.00 / -10.00 |  | +3.0 / +2.2 | other |")
    assert lines["− AR/TAR"] == "| − AR/TAR |  |  |  |  | +2.0 / +1.5 |  |"


@pytest.mark.parametrize("found, expected", [
    ({1: (0.5, 0.1), 2: (2.0, 0.02)}, "same"), ({1: (-0.5, -0.1)}, "other"), ({1: (0.5, -0.1)}, "unclear"),
    ({1: (-1e-9, -1e-9)}, "unclear"), ({}, "")])
def test_a_sign_needs_differences_that_the_table_shows(found, expected):
    assert ablation.sign(found) == expected


def test_what_a_part_is_worth_is_a_share_of_the_perplexity_in_the_picture(tmp_path):
    """Ten points of 140 are less than ten of 60."""
    write_record(tmp_path, "full", 1, train=(150, 140), finetune=(148, 139))
    write_record(tmp_path, "full", 2, train=(150, 140))
    write_record(tmp_path, "no-wdrop", 1, train=(160, 147))
    scores = ablation.read_scores(tmp_path)
    found, published = ablation.percents(scores, "no-wdrop")
    assert found == pytest.approx([5])
    assert published == pytest.approx(100 * (68.9 / 58.8 - 1))
    assert ablation.percents(scores, "no-asgd")[0] == []


def test_a_run_that_was_interrupted_is_in_no_table(tmp_path):
    write_record(tmp_path, "full", 1, train=(150, 140), finetune=(148, 139))
    path = ablation.record_path(tmp_path, "full", 1)
    path.write_text(path.read_text().replace('"finished": true', '"finished": false'))
    assert ablation.read_scores(tmp_path) == {}


def test_a_picture_that_cannot_be_written_is_a_line_below_the_table(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    epoch = '{"kind": "epoch", "epoch": 1, "loss": 5.0, "seconds": 1.0}\n'
    ablation.record_path(tmp_path, "full", 1).write_text(epoch)
    ablation.report(tmp_path, tmp_path / "nowhere" / "ablation.png")
    assert "no picture: [Errno 2] No such file" in capsys.readouterr().out.splitlines()[-1]


def test_the_picture_is_of_what_there_is(tmp_path, capsys):
    """The second seed alone, and a run that has just begun beside one with an epoch."""
    pytest.importorskip("matplotlib")
    with pytest.raises(BadInput, match="no record of the ablation"):
        ablation.main(["--report", str(tmp_path)])
    epoch = '{"kind": "epoch", "epoch": 1, "loss": 5.0, "seconds": 1.0}\n'
    write_record(tmp_path, "full", 2, train=(150, 140))
    assert ablation.main(["--report", str(tmp_path)]) == 0
    assert "there is no epoch of seed 2" in capsys.readouterr().out
    ablation.record_path(tmp_path, "no-wdrop", 2).write_text(epoch)
    assert ablation.main(["--report", str(tmp_path)]) == 0
    assert f"picture: {tmp_path / 'ablation.png'}" in capsys.readouterr().out
    assert (tmp_path / "ablation.png").exists()
