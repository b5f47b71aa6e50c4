"""No run harms another, and no file is taken for what it is not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, same_weights, tune, weights

import checkpoint
import finetune
import generate
import main
import pointer
import run_files
from data import Corpus
from errors import BadInput
from files import locked
from model import RNNModel, parameter_shapes
from run import remarks
from text import read_texts

# --- names -----------------------------------------------------------------------------------------------------------

NAMES = ["a.pt", "a.pth", "a.b", "exp.lr0.1", "exp.lr0.2", "exp.lr0", "exp.pt", "x.y.pt", "x.z.pt", "data"]


@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_the_files_of_runs_are_their_own(stage):
    files = [path for name in NAMES for path in run_files.files_of_run(name, stage)]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("flags, files", [("", 3), ("--dry-run", 0), ("--save m.pt", 3)])
def test_a_run_without_a_name_says_where_its_model_is(corpus_dir, tmp_path, monkeypatch, capsys, flags, files):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    main.main([*TINY, "--data", str(corpus_dir), "--epochs", "1", *flags.split()])
    said = re.findall(r"no --save: the model goes to (\d+\.pt)\n", capsys.readouterr().out)
    assert [Path(name).exists() for name in said] == [True] * (flags == "")
    assert len(list(Path().iterdir())) == files


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", ["train", "finetune"])
def test_a_state_leads_back_to_its_model(name, stage):
    assert run_files.best_path(run_files.last_path(name, stage)) == Path(name)
    assert run_files.best_path(name) == Path(name)


def test_runs_whose_names_differ_after_the_last_dot_keep_their_records(train, tmp_path):
    for name in ("exp.lr0.1", "exp.lr0.2"):
        train(tmp_path / name, "--epochs", "2", "--log-interval", "5")
    before = run_files.metrics_path(tmp_path / "exp.lr0.2").read_bytes()
    train(tmp_path / "exp.lr0.1", "--epochs", "3", "--resume", str(tmp_path / "exp.lr0.1"))
    assert run_files.metrics_path(tmp_path / "exp.lr0.2").read_bytes() == before


@pytest.mark.parametrize("name", ["d.last.pt", "d.last", "d.finetune.last.pt", "d.untuned.pt",
                                  "d.statistics.pt", "d.metrics.jsonl"])
def test_the_name_of_another_file_of_a_run_is_refused(train, tmp_path, name):
    with pytest.raises(BadInput, match="those of other files of a run"):
        train(tmp_path / name, "--epochs", "1")


@pytest.mark.parametrize("name", [".", "/", "..", "a/..", "new/"])
@pytest.mark.parametrize("call", [
    lambda name: main.main(["--no-cuda", "--save", name]), lambda name: main.main(["--no-cuda", "--resume", name]),
    lambda name: finetune.main(["--no-cuda", "--save", name]), lambda name: pointer.main(["--no-cuda", "--save", name]),
], ids=["main", "resume", "finetune", "pointer"])
def test_a_path_without_a_name_is_refused(call, name):
    with pytest.raises(BadInput, match="is not the name of a file|cannot be read"):
        call(name)


# --- flags -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("flags", "said"), [
    ("", ""), ("--bptt 8", ""), ("--bptt 7", "--bptt 7: as in the original a batch has 5 time steps or more"),
    ("--nlayers 1 --nhid 99", "--nhid 99 is not used: a single layer whose softmax is tied to the embedding has "
                              "--emsize 400 units"),
    ("--nlayers 1 --nhid 99 --no-tied", ""), ("--nlayers 1 --nhid 400", ""), ("--nlayers 2 --nhid 99", "")])
def test_a_run_says_what_is_easily_overlooked(flags, said):
    (line,) = list(remarks(main.parse_flags(flags.split()))) or [""]
    assert line.startswith(said)
    assert bool(line) == bool(said)


def test_a_resumed_run_says_which_flags_come_too_late(train, tmp_path, capsys):
    train(tmp_path / "m.pt", "--epochs", "2", "--optimizer", "adam", "--when", "1", "5")
    capsys.readouterr()
    train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"), "--overwrite",
          "--when", "1", "2", "3")
    printed = capsys.readouterr().out
    assert "--when 2 comes too late" in printed
    assert printed.count("comes too late") == 1
    assert "--overwrite is not used" in printed


# --- other files -----------------------------------------------------------------------------------------------------

def test_two_names_with_one_record_are_refused(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    with pytest.raises(BadInput, match=r"its record would be that of .*m.pt"):
        train(tmp_path / "m", "--epochs", "1")


# --- locks -----------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import files, run_files
with files.locked(run_files.metrics_path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the files of the run `m.pt` to itself."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, ROOT, tmp_path / "m.pt"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_and_told_by_whom(train, tmp_path, holder):
    with pytest.raises(BadInput, match=f"m.metrics.jsonl: in use by process {holder.pid}"):
        train(tmp_path / "m.pt", "--epochs", "1")


@pytest.mark.parametrize("command", ["resume", "finetune", "pointer"])
def test_every_script_that_writes_a_run_is_refused_while_another_has_it(train, corpus_dir, tmp_path, command):
    train(tmp_path / "m.pt", "--epochs", "1")
    data, save = ["--no-cuda", "--data", str(corpus_dir)], str(tmp_path / "m.pt")
    calls = {"resume": lambda: main.main([*data, "--resume", save, "--epochs", "2"]),
             "finetune": lambda: finetune.main([*data, "--save", save]),
             "pointer": lambda: pointer.main([*data, "--save", save])}
    with locked(run_files.metrics_path(save)), pytest.raises(BadInput, match="in use by process"):
        calls[command]()


def test_a_lock_left_by_a_killed_process_refuses_nobody(train, tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".m.metrics.jsonl.lock").exists()
    assert train(tmp_path / "m.pt", "--epochs", "1")[0] == 0


def test_a_lock_is_removed_at_the_end(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    assert not list(tmp_path.glob(".*.lock"))


# --- the text --------------------------------------------------------------------------------------------------------

def test_a_run_goes_on_with_the_text_it_began_with(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    text = (corpus_dir / "train.txt").read_text().splitlines(keepends=True)
    (corpus_dir / "train.txt").write_text("".join(text[:60]))
    with pytest.raises(BadInput, match=r"corpus is not the text of .*m.last.pt, which was .*: its checksum is"):
        train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"))


def test_a_moved_text_is_the_same_text(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    corpus_dir.rename(tmp_path / "moved")
    assert main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt"), "--epochs", "2", "--data",
                      str(tmp_path / "moved")]) == 0


def test_a_text_that_is_not_here_is_named_with_its_model(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    corpus_dir.rename(tmp_path / "moved")
    for call in (lambda: pointer.main(["--no-cuda", "--save", str(tmp_path / "m.pt")]),
                 lambda: finetune.main(["--no-cuda", "--save", str(tmp_path / "m.pt")]),
                 lambda: main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt")])):
        with pytest.raises(BadInput, match=r"m(\.last)?\.pt was trained on .*corpus, which is not here; --data names"):
            call()


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("level", ["word", "char"])
def test_every_kind_of_line_end_is_one_eos(tmp_path, ends, level):
    (tmp_path / "book.txt").write_bytes(ends.join(["a b", "", "c d"] * 100 + [""]).encode())
    corpus = Corpus(tmp_path / "book.txt", level)
    ids = torch.cat([corpus.train, corpus.valid, corpus.test])
    words = [corpus.dictionary.idx2word[i] for i in ids]
    line = {"word": ["a", "b", "<eos>", "<eos>", "c", "d", "<eos>"],
            "char": ["a", " ", "b", "<eos>", "<eos>", "c", " ", "d", "<eos>"]}[level]
    assert words == line * 100


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_line_ends_at_the_border_of_a_block(tmp_path, monkeypatch, size):
    monkeypatch.setattr("text.BLOCK", size)
    (tmp_path / "book.txt").write_bytes(b"a\r\nb\rc\n" * 9 + b"d\r")
    ids = []
    _, words = read_texts([tmp_path / "book.txt"], "word", ids.extend)
    assert [words[i] for i in ids] == ["a", "<eos>", "b", "<eos>", "c", "<eos>"] * 9 + ["d", "<eos>"]


@pytest.mark.parametrize("content, message", [
    ("some words\n".encode("utf-16"), "is UTF-16, not UTF-8 text: convert it .*Notepad"),
    (b"\x1f\x8b\x08\x00rest", "is a gzip archive, not UTF-8 text: unpack it"),
    (b"good\n\xff\n", "line 2 is not UTF-8 text: convert it .*WINDOWS-1252 .*, or --level byte"),
    ("some words\n".encode("utf-16-le"), "is binary, or UTF-16 without a mark: it is not UTF-8 text: .*UTF-16LE "),
])
def test_a_file_that_is_no_text_is_named(tmp_path, content, message):
    (tmp_path / "book.txt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        Corpus(tmp_path / "book.txt", "word")


def test_text_without_spaces_is_told_of_its_level(train, tmp_path):
    (tmp_path / "book.txt").write_text("起初神創造天地" * 999, encoding="utf-8")
    with pytest.raises(BadInput, match="text without spaces between its words needs --level char"):
        train(tmp_path / "m.pt", "--data", str(tmp_path / "book.txt"))


# --- models and states -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call", [
    lambda path: pointer.main(["--no-cuda", "--save", path]),
    lambda path: generate.main(["--no-cuda", "--checkpoint", path]),
    lambda path: finetune.main(["--no-cuda", "--load", path, "--save", path.replace("last", "tuned")]),
], ids=["pointer", "generate", "finetune"])
def test_the_state_to_resume_from_is_not_taken_for_the_model(train, tmp_path, call):
    train(tmp_path / "m.pt", "--epochs", "1")
    with pytest.raises(BadInput, match=r"m.last.pt: that is the state to resume from; the model is .*m.pt"):
        call(str(tmp_path / "m.last.pt"))


def test_the_same_command_again_keeps_what_is_there(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "2")
    before = (tmp_path / "m.pt").read_bytes()
    with pytest.raises(BadInput, match="a run lies there already .*--resume .*--overwrite"):
        train(tmp_path / "m.pt", "--epochs", "2")
    (tmp_path / "m.last.pt").unlink()
    with pytest.raises(BadInput, match="a model lies there already; --overwrite"):
        train(tmp_path / "m.pt", "--epochs", "2")
    assert (tmp_path / "m.pt").read_bytes() == before


def test_overwrite_begins_anew(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "2")
    _, record = train(tmp_path / "m.pt", "--epochs", "1", "--overwrite", "--seed", "5")
    assert [len(record[kind]) for kind in ("run", "epoch", "test")] == [1, 1, 1]
    train(tmp_path / "other.pt", "--epochs", "1", "--seed", "5")
    assert same_weights(tmp_path / "m.pt", tmp_path / "other.pt")


def test_training_goes_on_after_fine_tuning_in_place_as_if_there_had_been_none(train, corpus_dir, tmp_path):
    flags = ["--lr", "20", "--log-interval", "5"]
    train(tmp_path / "whole.pt", *flags, "--epochs", "4")
    train(tmp_path / "m.pt", *flags, "--epochs", "2")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 3)
    tuned = weights(tmp_path / "m.pt")
    assert checkpoint.load(tmp_path / "m.pt")["stage"] == "finetune"
    train(tmp_path / "m.pt", *flags, "--epochs", "4", "--resume", str(tmp_path / "m.pt"))
    assert same_weights(tmp_path / "m.last.pt", tmp_path / "whole.last.pt")
    assert same_weights(tmp_path / "m.pt", tmp_path / "whole.pt")
    kept = weights(tmp_path / "m.finetuned.pt")
    assert all(torch.equal(kept[name], tuned[name]) for name in tuned)


def test_training_that_goes_on_keeps_the_record_of_the_fine_tuning(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 2)
    before = run_files.metrics_path(tmp_path / "m.pt").read_bytes()
    train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"))
    assert run_files.metrics_path(tmp_path / "m.pt").read_bytes().startswith(before)


def test_the_fine_tuned_model_that_was_kept_can_be_tuned_on(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1", "--lr", "20")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    assert checkpoint.load(tmp_path / "m.pt")["stage"] == "finetune"
    train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"))
    assert tune(corpus_dir, "--resume", tmp_path / "m.finetuned.pt", "--epochs", 2) == 0


def test_a_fine_tuning_that_was_stopped_is_not_begun_anew(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    state = checkpoint.load(tmp_path / "m.finetune.last.pt")
    state["flags"]["epochs"] = 9
    torch.save(state, tmp_path / "m.finetune.last.pt")
    with pytest.raises(BadInput, match="a fine-tuning was stopped there; --resume .*--overwrite"):
        tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    assert tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1, "--overwrite") == 0


def test_fine_tuning_does_not_overwrite_another_model(train, corpus_dir, tmp_path):
    for name in ("m.pt", "other.pt"):
        train(tmp_path / name, "--epochs", "1")
    before = (tmp_path / "other.pt").read_bytes()
    with pytest.raises(BadInput, match="lies there already"):
        tune(corpus_dir, "--load", tmp_path / "m.pt", "--save", tmp_path / "other.pt", "--epochs", 1)
    assert (tmp_path / "other.pt").read_bytes() == before


def test_a_fine_tuning_of_before_is_resumed_from_where_its_state_was(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    (tmp_path / "m.finetune.last.pt").replace(tmp_path / "m.last.pt")
    assert tune(corpus_dir, "--resume", tmp_path / "m.pt", "--epochs", 2) == 0


@pytest.mark.parametrize("flags", [
    {}, {"model": "GRU"}, {"model": "QRNN"}, {"tied": False}, {"nlayers": 1}, {"nlayers": 1, "tied": False},
    {"model": "QRNN", "nlayers": 4, "tied": False},
])
@pytest.mark.parametrize("ntoken", [11, 80_000])
def test_the_shapes_of_a_model_are_known_without_building_it(flags, ntoken):
    flags = {"model": "LSTM", "emsize": 3, "nhid": 4, "nlayers": 2, "tied": True} | flags
    built = {name: tuple(value.shape) for name, value in RNNModel(ntoken, **flags).state_dict().items()}
    assert parameter_shapes(ntoken, **flags) == built


@pytest.mark.slow
def test_scripts_start_without_what_they_do_not_need(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    code = ("import sys, generate\n"
            "generate.main(['--no-cuda', '--checkpoint', sys.argv[1], '--words', '3', '--outf', '-'])\n"
            "assert 'torch._dynamo' not in sys.modules")
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "m.pt"], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr == ""


# --- other flags -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [[], ["--lr", "0.5"], ["--wdecay", "0.25"]], ids=["none", "lr", "wdecay"])
def test_a_run_goes_on_with_the_rate_and_the_decay_that_are_given(train, tmp_path, flags):
    train(tmp_path / "m.pt", "--epochs", "2", "--optimizer", "adam", "--lr", "0.01", "--wdecay", "0.125", "--when", "1")
    main.main(["--no-cuda", "--resume", str(tmp_path / "m.pt"), "--epochs", "3", *flags])
    (group,) = checkpoint.load(tmp_path / "m.last.pt")["state"]["optimizer"]["param_groups"]
    expected = {"--lr": 0.001, "--wdecay": 0.125} | dict(zip(flags[::2], map(float, flags[1::2])))
    assert {"--lr": group["lr"], "--wdecay": group["weight_decay"]} == pytest.approx(expected)
