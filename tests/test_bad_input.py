"""Bad input ends with one clear line on stderr and exit status 2, and changes no file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import files

import dynamic
import finetune
import generate
import main
import pointer
from process import run_script

SCRIPTS = {"main": main.main, "finetune": finetune.main, "pointer": pointer.main, "dynamic": dynamic.main,
           "generate": generate.main}
TINY = ["--no-cuda", "--emsize", "5", "--nhid", "6", "--batch_size", "4", "--epochs", "1"]


@pytest.fixture
def place(train, tmp_path, monkeypatch, capsys):
    """A folder with a corpus and a model trained on it, as the working directory."""
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "good.pt", "--epochs", "1")
    capsys.readouterr()
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script in this process; returns exit status, stdout, stderr."""
    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        with pytest.raises(SystemExit) as end:
            run_script(SCRIPTS[script])
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err
    return call


def refused(run, folder, script, *arguments):
    """The line on stderr with which a script refuses its arguments, having changed nothing."""
    before = files(folder)
    status, _, err = run(script, *arguments)
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith(f"{script}.py: error: ")
    assert files(folder) == before
    return err


@pytest.mark.parametrize("script, flags", [
    ("main", "--dropout 1.2"), ("main", "--dropouti 1"), ("main", "--wdrop -0.1"), ("main", "--dropoute nan"),
    ("main", "--nlayers 0"), ("main", "--bptt 0"), ("main", "--nhid -3"), ("main", "--emsize 2.5"),
    ("main", "--batch_size x"),
    ("main", "--lr 0"), ("main", "--lr inf"), ("main", "--clip -1"), ("main", "--nonmono -1"), ("main", "--when 0"),
    ("main", "--model CNN"), ("main", "--optimizer lbfgs"), ("main", "--seed -1"), ("main", "--no-such-flag"),
    ("main", "--log-interval 0"), ("main", "--alpha -2"), ("main", "--wdecay inf"), ("main", "--max-bptt -1"),
    ("finetune", "--dropouth 1.2"), ("finetune", "--epochs -1"), ("finetune", ""),
    ("pointer", "--window 0"), ("pointer", "--theta -1"), ("pointer", "--lambdasm 1"), ("pointer", "--bptt 0"),
    ("dynamic", "--lr -1"), ("dynamic", "--lamb nan"), ("dynamic", "--epsilon 0"), ("dynamic", "--rule adam"),
    ("dynamic", "--bptt 0"), ("dynamic", "--batch_size 0"), ("dynamic", "--max-batches -1"), ("dynamic", "--window 0"),
    ("generate", "--temperature -1"), ("generate", "--words 0"), ("generate", "--top-k -1"),
    ("generate", "--precision tf32"),
])
def test_flags_out_of_range(run, tmp_path, script, flags):
    flag = flags.split(" ")[0].replace("_", "-")
    assert flag in refused(run, tmp_path, script, *flags.split())


@pytest.mark.parametrize("script, flag", [
    ("main", "--data"), ("main", "--save"), ("main", "--resume"), ("finetune", "--load"), ("pointer", "--save"),
    ("dynamic", "--data"), ("generate", "--checkpoint"), ("generate", "--prompt-file")])
def test_what_a_shell_makes_of_a_variable_that_is_not_set(run, tmp_path, script, flag):
    assert refused(run, tmp_path, script, flag, "").endswith(f"argument {flag}: must not be empty\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(run, place):
    assert "no CUDA device" in refused(run, place, "main", "--cuda", "--data", "corpus", "--save", "m.pt")


@pytest.mark.parametrize("flag", ["--epsilon 1", "--batch_size 5", "--max-batches 3"])
def test_flags_of_the_other_rule(run, place, flag):
    err = refused(run, place, "dynamic", "--save", "good.pt", "--rule", "sgd", *flag.split())
    assert f"{flag.split()[0].replace('_', '-')}: of --rule rms only" in err


@pytest.mark.parametrize("script, flags", [("main", [*TINY, "--save", "m.pt"]), ("finetune", ["--save", "good.pt"]),
                                           ("pointer", ["--save", "good.pt"]), ("dynamic", ["--save", "good.pt"])])
def test_parts_of_a_folder(run, place, script, flags):
    err = refused(run, place, script, *flags, "--data", "corpus", "--shares", "90", "10")
    assert "--shares cuts one text file: the folder corpus has its own splits" in err


def test_missing_corpus_names_the_command_that_gets_it(run, place):
    assert "./getdata.sh NAME" in refused(run, place, "main", "--data", "data/penn", "--save", "m.pt")


@pytest.mark.parametrize("script", ["main", "finetune", "pointer", "dynamic"])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("content, message", [
    (None, "No such file"), (b"", "is empty"), (b"a\n\xff\n", "line 2 is not UTF-8"),
])
def test_broken_split(run, place, script, split, content, message):
    path = place / "corpus" / f"{split}.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    save = "new.pt" if script == "main" else "good.pt"
    err = refused(run, place, script, "--no-cuda", "--data", "corpus", "--save", save)
    assert f"{split}.txt" in err
    assert message in err


def test_too_few_tokens_for_the_batch(run, place):
    err = refused(run, place, "main", *TINY, "--data", "corpus", "--save", "m.pt", "--batch_size", "500")
    assert "540 tokens are too few for a batch of 500: it needs 1500 or more" in err
    (place / "corpus" / "valid.txt").write_text("the cat\n")
    err = refused(run, place, "main", *TINY, "--data", "corpus", "--save", "m.pt")
    assert "too few for a batch of 10" in err
    assert "--shares" not in err
    (place / "book.txt").write_text("the cat sat\n" * 30, encoding="utf-8")
    err = refused(run, place, "main", *TINY, "--data", "book.txt", "--save", "m.pt", "--batch_size", "4")
    assert "book.txt, valid: 6 tokens are too few for a batch of 10" in err
    assert "--shares" in err


def test_one_character_is_too_few_for_any_minutes(run, place):
    """Of it training gets none, validation neither."""
    (place / "book.txt").write_text("a", encoding="utf-8")
    err = refused(run, place, "main", "--no-cuda", "--data", "book.txt", "--minutes", "1", "--save", "m.pt")
    assert "book.txt, train: 0 tokens are too few for a batch of" in err


@pytest.mark.parametrize("save", ["missing/m.pt", "corpus", "corpus/train.txt/m.pt"])
def test_unwritable_save_is_found_before_training(run, place, save):
    for script, *arguments in (("main", *TINY, "--data", "corpus", "--save", save),
                               ("finetune", "--data", "corpus", "--load", "good.pt", "--save", save),
                               ("generate", "--checkpoint", "good.pt", "--outf", save)):
        assert "cannot be written" in refused(run, place, script, *arguments)


@pytest.mark.parametrize("script, flag", [
    ("main", "--resume"), ("finetune", "--save"), ("pointer", "--save"), ("dynamic", "--save"),
    ("generate", "--checkpoint"),
])
def test_files_that_are_no_checkpoint(run, place, script, flag):
    torch.save([torch.nn.LSTM(2, 2)], "pickle.pt")
    Path("text.pt").write_text("hello\n")
    Path("tensors.pt").write_bytes(b"")
    for name in ("pickle", "text", "tensors", "missing"):
        if script == "main" and name != "missing":
            shutil.copy(f"{name}.pt", f"{name}.last.pt")
        assert name in refused(run, place, script, flag, f"{name}.pt", *(["--data", "corpus"] * (script != "generate")))


@pytest.mark.parametrize("given, named", [
    (["--nhid", "7"], "--nhid 7 contradicts good.pt, which was trained with nhid 6"),
    (["--model", "GRU"], "--model GRU contradicts good.pt, which was trained with model LSTM"),
    (["--no-tied"], "--tied False contradicts good.pt, which was trained with tied True"),
])
def test_an_architecture_that_contradicts_the_checkpoint(run, place, given, named):
    assert named in refused(run, place, "finetune", "--data", "corpus", "--save", "good.pt", *given)
    if given[0] == "--model":
        assert named in refused(run, place, "pointer", "--data", "corpus", "--save", "good.pt", *given)


@pytest.mark.parametrize("flag", ["--seed 5", "--optimizer adam", "--nhid 7"])
def test_flags_that_a_resumed_run_cannot_change(run, place, flag):
    name = flag.split()[0]
    assert f"{name} {flag.split()[1]} contradicts" in refused(run, place, "main", "--resume", "good.pt", *flag.split())


def test_a_resumed_run_needs_its_best_model(run, place):
    (place / "good.pt").unlink()
    assert "good.pt: cannot be read" in refused(run, place, "main", "--resume", "good.pt")


@pytest.mark.parametrize("name", ["m.pt", "m.last.pt", "m.metrics.jsonl"])
def test_a_folder_in_the_place_of_a_file_of_the_run(run, place, name):
    (place / name).mkdir()
    assert name in refused(run, place, "main", *TINY, "--data", "corpus", "--save", "m.pt")


@pytest.mark.parametrize("length", [240, 300])
def test_names_that_are_too_long(run, place, length):
    assert "too long" in refused(run, place, "main", *TINY, "--data", "corpus", "--save", "m" * length)
    assert "no such file" in refused(run, place, "main", *TINY, "--data", "m" * 300, "--save", "m.pt")


def test_a_device_is_not_replaced_by_a_file(run, place):
    os.mkfifo("pipe")
    assert "no file" in refused(run, place, "generate", "--checkpoint", "good.pt", "--outf", "pipe")
    assert "that is the model" in refused(run, place, "generate", "--checkpoint", "good.pt", "--outf", "./good.pt")


def test_ctrl_c_outside_of_training_is_no_traceback(run, place, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(generate, "sample", interrupted)
    before = files(place)
    status, _, err = run("generate", "--checkpoint", "good.pt", "--outf", "text.txt")
    assert (status, err) == (130, "generate.py: interrupted\n")
    assert files(place) == before


@pytest.mark.usefixtures("place")
def test_the_smallest_temperature_takes_the_likeliest_word(run):
    flags = ["--words", "5", "--temperature", "1e-300", "--outf", "-"]
    status, out, _ = run("generate", "--checkpoint", "good.pt", *flags)
    assert status == 0
    assert len(out.split()) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_a_reader_that_leaves_early_is_no_traceback():
    command = f"'{sys.executable}' '{generate.__file__}' --checkpoint good.pt --words 20000 --outf - | head -1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert ended.stderr == ""
    assert ended.stdout


def test_the_state_of_another_script(run, place):
    assert "not the state of a run of this script" in refused(run, place, "finetune", "--resume", "good.pt")


def test_a_loss_that_is_not_finite_names_epoch_and_batch(run, place):
    before = (place / "good.pt").read_bytes()
    status, _, err = run("main", "--resume", "good.pt", "--epochs", "2", "--lr", "9e29", "--clip", "0")
    assert status == 2
    assert "epoch 2, batch" in err
    assert err.count("\n") == 1
    assert (place / "good.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_a_whole_process_ends_like_that():
    """The one check that goes through a shell: what a person sees."""
    command = [sys.executable, main.__file__, "--data", "nowhere", "--save", "m.pt"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "nowhere: no such file or folder" in ended.stderr
    assert "Traceback" not in ended.stderr
