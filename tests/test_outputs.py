"""What a run writes is whole, what comes in is read as it is meant, and signals lose nothing."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, read_metrics, same_weights, script, write

import checkpoint
import flags
import generate
import main
import metrics
import run_files
import score
import training
from errors import BadInput
from process import StopSignals
from text import tokenize

# --- records ---------------------------------------------------------------------------------------------------------

def test_a_record_that_is_moved_away_costs_no_state(train, corpus_dir, tmp_path, monkeypatch):
    save, step = tmp_path / "m.pt", training.train_step

    def stopped(*inputs, **options):
        run_files.metrics_path(save).unlink()
        signal.raise_signal(signal.SIGTERM)
        return step(*inputs, **options)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", stopped)
        assert main.main([*TINY, "--data", str(corpus_dir), "--save", str(save)]) == 128 + signal.SIGTERM
    _, record = train(save, "--epochs", "1", "--resume", str(save))
    assert [(line["kind"], line["batch"]) for line in record["resume"]] == [("resume", 1)]
    assert [line["epoch"] for line in record["epoch"]] == [1]


def test_a_torn_record_goes_on_with_a_line_of_its_own(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    path = run_files.metrics_path(tmp_path / "m.pt")
    path.write_bytes(path.read_bytes() + b'{"kind": "epo')
    train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"))
    lines = path.read_bytes().split(b"\n")
    records, bad = metrics.parse_lines(lines)
    assert [record["epoch"] for record in records if record["kind"] == "epoch"] == [1, 2]
    assert len(bad) <= 1


@pytest.mark.parametrize("change", [
    lambda text: text.replace(b"\n", b"\r\n"), lambda text: b"# a note\n" + text, lambda text: text[:-1],
    lambda text: text[:200] + text[210:],
], ids=["CRLF", "line added", "no last line end", "bytes lost"])
def test_a_record_that_was_edited_loses_no_line(train, tmp_path, change):
    train(tmp_path / "m.pt", "--epochs", "2")
    path = run_files.metrics_path(tmp_path / "m.pt")
    before, _ = metrics.parse_lines(path.read_bytes().split(b"\n"))
    path.write_bytes(change(path.read_bytes()))
    kept, _ = metrics.parse_lines(path.read_bytes().split(b"\n"))
    train(tmp_path / "m.pt", "--epochs", "3", "--resume", str(tmp_path / "m.pt"))
    after, _ = metrics.parse_lines(path.read_bytes().split(b"\n"))
    assert after[:len(kept) - 1] == kept[:-1]
    assert [record["epoch"] for record in after if record["kind"] == "epoch"][-1] == 3
    assert len(kept) >= len(before) - 1


KEPT, OWN = b'{"kind": "run", "stage": "train"}\n', b'{"kind": "batch"}\n{"kind": "epoch"}\n'


@pytest.mark.parametrize("after, keep, cut", [
    (OWN, 0, True), (OWN + b'{"kind": "ba', 0, True), (OWN + b'{"kind": "resume", "stage": "train"}\n', 0, True),
    (OWN + b'{"kind": "resume", "stage": "finetune"}\n', 0, False), (OWN + KEPT, 0, False),
    (b'{"kind": "pointer"}\n' + OWN, 0, False), (OWN + b"a note\n", 0, False), (OWN, 5, False), (OWN, -1, False),
    (OWN, 17, False), (OWN, 18, True),
    (OWN, -len(KEPT), False), (OWN, 99, False)])
def test_a_run_that_goes_on_cuts_whole_lines_of_its_own_alone(tmp_path, after, keep, cut):
    """`keep` is where the state says that the record ended, in bytes from the end of the first line."""
    path = tmp_path / "m.metrics.jsonl"
    path.write_bytes(KEPT + after)
    metrics.Metrics(path, len(KEPT) + keep, "train").write("epoch", loss=1.0)
    start = (KEPT + after)[:len(KEPT) + keep] if cut else KEPT + after
    assert path.read_bytes().removeprefix(start).lstrip(b"\n").startswith(b'{"kind": "epoch", "time": ')
    assert path.read_bytes().startswith(start)


def test_an_infinite_figure_is_null(tmp_path):
    metrics.Metrics(tmp_path / "m").write("epoch", loss=math.inf, low=-math.inf, ppl=3.5, stage="train", best=None)
    (line,) = metrics.read_metrics(tmp_path / "m")
    line.pop("time")
    assert line == {"kind": "epoch", "loss": None, "low": None, "ppl": 3.5, "stage": "train", "best": None}


def test_readers_skip_bad_lines_and_name_them(tmp_path, capsys):
    content = b'{"kind": "epoch", "loss": 1}\r\nnonsense\n\n[1]\n{"kind": "test"}\n{"ki'
    (tmp_path / "m.metrics.jsonl").write_bytes(content)
    records = metrics.read_metrics(tmp_path / "m.metrics.jsonl")
    assert [record["kind"] for record in records] == ["epoch", "test"]
    assert "skipped, no record: line 2, 4, 6\n" in capsys.readouterr().err


def test_of_a_file_that_is_no_record_a_few_lines_are_named(trained, capsys):
    """The model itself is easily taken for its record. It has thousands of lines."""
    trained.write_bytes(b"\n".join([b"x"] * 5000))
    capsys.readouterr()
    assert metrics.read_metrics(trained) == []
    said = capsys.readouterr().err
    assert said == f"{trained}: skipped, no record: line 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 4,990 more\n"


@pytest.mark.slow
def test_a_table_of_a_damaged_record(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    with open(tmp_path / "m.metrics.jsonl", "ab") as file:
        file.write(b"torn")
    ended = subprocess.run([sys.executable, ROOT / "benchmarks" / "table.py", tmp_path / "m.metrics.jsonl"],
                           capture_output=True, text=True)
    assert ended.returncode == 0
    assert "| train    |" in ended.stdout
    assert "skipped" in ended.stderr


# --- prompts and other flags -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, tokens", [
    ("the cat\nsat", ["the", "cat", "<eos>", "sat"]), ("a\r\nb\rc\n", ["a", "<eos>", "b", "<eos>", "c", "<eos>"]),
    ("the\n\ncat", ["the", "<eos>", "<eos>", "cat"]), ("the <eos>\ncat", ["the", "<eos>", "cat"]), ("", []),
])
def test_a_new_line_of_a_prompt_is_an_eos(text, tokens):
    assert tokenize(text, "word") == tokens


def test_a_byte_order_mark_is_no_part_of_a_prompt_of_text():
    assert tokenize(b"\xef\xbb\xbfa", "word") == tokenize(b"\xef\xbb\xbfa", "char") == ["a"]
    assert tokenize(b"\xef\xbb\xbfa", "byte") == ["239", "187", "191", "97"]


def test_a_prompt_from_a_file(trained, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("the cat\nsat")
    capsys.readouterr()
    write(trained, "--prompt-file", tmp_path / "prompt.txt")
    assert capsys.readouterr().out.startswith("the cat <eos>\nsat ")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_prompt_from_standard_input(trained, tmp_path, capsys, monkeypatch, mark):
    (tmp_path / "prompt.txt").write_bytes(mark + b"the cat")
    with open(tmp_path / "prompt.txt", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        capsys.readouterr()
        write(trained, "--prompt-file", "-")
    assert capsys.readouterr().out.startswith("the cat ")


@pytest.mark.parametrize("flags, message", [
    (["--prompt", "a", "--prompt-file", "b"], "one of them"), (["--prompt-file", "missing"], "cannot be read: No such"),
    (["--prompt-file", "."], "cannot be read: Is a directory"),
])
def test_a_prompt_that_cannot_be_had(trained, flags, message):
    with pytest.raises(BadInput, match=message):
        write(trained, *flags)


def test_a_model_from_before_there_were_levels_is_one_of_words(trained, tmp_path, capsys):
    content = checkpoint.load(trained)
    del content["flags"]["level"]
    torch.save(content, tmp_path / "old.pt")
    (tmp_path / "lines.txt").write_text("the cat\n")
    printed = []
    for model in (trained, tmp_path / "old.pt"):
        capsys.readouterr()
        score.main(["--no-cuda", "--checkpoint", str(model), str(tmp_path / "lines.txt")])
        write(model, "--prompt", "the cat")
        printed.append(capsys.readouterr())
    assert printed[0] == printed[1]


def test_temperature_0_takes_the_likeliest_word_each_time(trained, capsys):
    texts = []
    for seed in (1, 2):
        capsys.readouterr()
        write(trained, "--temperature", 0, "--seed", seed)
        texts.append(capsys.readouterr().out)
    write(trained, "--top-k", 1)
    assert texts == [capsys.readouterr().out] * 2


def test_flags_of_the_original_that_generation_does_not_need(trained, capsys):
    write(trained, "--model", "LSTM", "--data", "data/penn")
    with pytest.raises(BadInput, match="--model QRNN contradicts"):
        write(trained, "--model", "QRNN")
    assert capsys.readouterr().out


@pytest.mark.parametrize("flags, name, value", [
    (["--batch-size", "3"], "batch_size", 3), (["--batch_size", "3"], "batch_size", 3),
    (["--batch_size=3"], "batch_size", 3), (["--save-interval", "3"], "save_interval", 3),
    (["--save_interval", "3"], "save_interval", 3), (["--no_cuda_graphs"], "cuda_graphs", False),
    (["--max_bptt=3"], "max_bptt", 3), (["--save=my_model.pt"], "save", "my_model.pt"), (["--epoch", "3"], "epochs", 3),
])
def test_a_flag_has_both_spellings(flags, name, value):
    assert getattr(main.parse_flags(flags), name) == value


def test_a_command_line_as_the_value_of_a_flag_stays_as_it_is():
    parser = flags.Parser()
    parser.add_argument("--extra")
    assert parser.parse_args(["--extra=--data my_corpus"]).extra == "--data my_corpus"
    assert flags.with_dashes("--data my_corpus --batch_size 3") == "--data my_corpus --batch_size 3"


def test_when_minus_1_is_never(train, tmp_path):
    _, record = train(tmp_path / "m.pt", "--epochs", "2", "--when", "-1", "--optimizer", "adam", "--lr", "0.01")
    assert "decay" not in record


@pytest.mark.parametrize("bptt, warned", [(5, True), (9, False)])
def test_a_short_bptt_is_warned_of(train, tmp_path, capsys, bptt, warned):
    train(tmp_path / "m.pt", "--epochs", "1", "--bptt", str(bptt))
    assert ("the learning rate is scaled" in capsys.readouterr().out) == warned


def test_the_log_line_shows_the_learning_rate_that_was_used(train, tmp_path, capsys):
    _, record = train(tmp_path / "m.pt", "--epochs", "1", "--bptt", "5", "--log-interval", "4")
    lines = [line for line in capsys.readouterr().out.splitlines() if "| lr" in line]
    shown = [float(line.split("| lr")[1].split("|")[0]) for line in lines]
    assert shown == pytest.approx([line["mean_lr"] for line in record["batch"]], abs=1e-5)
    scales = [line["tokens"] / 4 / 4 / 5 for line in record["batch"][:-1]]  # 4 batches of 4 columns, bptt 5
    assert shown[:-1] == pytest.approx(scales, abs=1e-5)


# --- outputs and signals ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, raised", [
    (OSError(28, "No space left on device"), BadInput), (BrokenPipeError(32, "Broken pipe"), BrokenPipeError),
])
@pytest.mark.parametrize("lines", [5, 8, 12])  # in an epoch, at its end, in another
def test_training_whose_log_cannot_be_written_any_more_keeps_its_state(train, tmp_path, monkeypatch, error, raised,
                                                                       lines):
    flags = ["--log-interval", "5", "--epochs", "4", "--nonmono", "0", "--lr", "20"]
    train(tmp_path / "whole.pt", *flags)
    written = iter(range(10**6))

    def write(_):
        if next(written) >= lines:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(metrics.tqdm, "write", write)
        with pytest.raises(raised):
            train(tmp_path / "parts.pt", *flags)
    assert len(read_metrics(tmp_path / "parts.pt").get("epoch", [])) < 4
    train(tmp_path / "parts.pt", *flags, "--resume", str(tmp_path / "parts.pt"))
    assert same_weights(tmp_path / "whole.last.pt", tmp_path / "parts.last.pt")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name, flags", [
    ("main", [*TINY, "--data", "corpus", "--save", "new.pt"]),
    ("pointer", ["--save", "m.pt", "--window", 5]), ("generate", ["--checkpoint", "m.pt", "--outf", "-", "--words", 9]),
])
def test_output_that_cannot_be_written_is_one_line(trained, tmp_path, name, flags):
    places = {"m.pt": trained, "corpus": tmp_path / "corpus", "new.pt": tmp_path / "new.pt"}
    flags = [places.get(flag, flag) for flag in flags]
    with open("/dev/full", "w") as full:
        run = script(name, *flags, stdout=full)
        _, err = run.communicate()
    assert (run.returncode, err.count("\n")) == (2, 1), err


def test_a_disk_that_is_full_while_text_is_written_is_one_line(trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(generate, "write_texts", full)
    with pytest.raises(BadInput, match="text.txt: could not be written: No space left on device"):
        write(trained, "--outf", tmp_path / "text.txt")
    assert not list(tmp_path.glob("text*"))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_a_terminal_that_goes_stops_training_as_sigterm_does(train, tmp_path, monkeypatch):
    step, calls = training.train_step, iter(range(10**6))

    def interrupted(*arguments, **flags):
        if next(calls) == 5:
            signal.raise_signal(signal.SIGHUP)
        return step(*arguments, **flags)

    monkeypatch.setattr(training, "train_step", interrupted)
    assert train(tmp_path / "m.pt", "--epochs", "9")[0] == 128 + signal.SIGHUP
    assert checkpoint.load(tmp_path / "m.last.pt")["state"]["progress"]["batch"] == 6


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_under_nohup_a_terminal_that_goes_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.stop is None
    finally:
        signal.signal(signal.SIGHUP, before)


def started(*flags):
    """Start main.py and wait until it has prepared for signals. SIGUSR1 is the last of them, ignored or caught."""
    run, prepared = script("main", *TINY, *flags), 0
    while run.poll() is None and not prepared >> (signal.SIGUSR1 - 1) & 1:
        time.sleep(0.01)
        status = Path(f"/proc/{run.pid}/status").read_text()
        prepared = int(status.split("SigIgn:")[1].split()[0], 16) | int(status.split("SigCgt:")[1].split()[0], 16)
    return run


needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the processes of Linux")


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("after", [0, 0.3, 0.8])
def test_ctrl_c_while_a_script_starts_is_one_line(corpus_dir, tmp_path, after):
    run = started("--data", corpus_dir, "--save", tmp_path / "m.pt")
    time.sleep(after)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    if run.returncode == 130 and "interrupted" in err:
        assert err.endswith("main.py: interrupted\n")
        assert err.count("\n") == 1
    else:  # it was in its loop already
        assert "Traceback" not in err


@pytest.mark.slow
@needs_linux
def test_sigusr1_while_a_script_starts_ends_nothing(corpus_dir, tmp_path):
    run = started("--data", corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    run.send_signal(signal.SIGUSR1)
    run.communicate()
    assert run.returncode == 0
    assert read_metrics(tmp_path / "m.pt")["test"]
