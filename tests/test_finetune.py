"""Fine-tuning goes on from a trained model, keeps the better of the two, and says what it did."""

import pytest
import torch
from helpers import read_metrics, tune

import checkpoint
import dynamic
import finetune
import pointer
import run_files


@pytest.fixture
def trained(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "2", "--dropouth", "0.11", "--wdrop", "0.22", "--lr", "20")
    return tmp_path / "m.pt"


def test_in_place_with_every_flag_inherited(trained, corpus_dir):
    before = checkpoint.load(trained)
    assert tune(corpus_dir, "--save", trained, "--epochs", 3, "--log-interval", 1) == 0
    metrics, after = read_metrics(trained), checkpoint.load(trained)
    assert [line["stage"] for line in metrics["run"]] == ["train", "finetune"], "one record for both"
    flags = metrics["run"][1]["flags"]
    assert all(flags[name] == before["flags"][name] for name in finetune.INHERITED if name != "data")
    lengths = [line["tokens"] // flags["batch_size"] for line in metrics["batch"]]
    assert max(lengths) <= flags["bptt"] + 10, "no batch is longer than that"
    assert {line["optimizer"] for line in metrics["epoch"][2:]} == {"ASGD"}
    assert after["loss"] <= before["loss"]
    assert len(metrics["test"]) == 2


@pytest.mark.parametrize("given, clip", [([], 0.25), (["--clip", 0.75], 0.75)])
def test_the_clipping_of_adam_is_not_that_of_sgd(train, corpus_dir, tmp_path, given, clip):
    train(tmp_path / "m.pt", "--epochs", "1", "--optimizer", "adam", "--lr", "0.01", "--clip", "1", "--alpha", "0.5")
    tune(corpus_dir, "--load", tmp_path / "m.pt", "--save", tmp_path / "tuned.pt", "--epochs", 1, *given)
    flags = read_metrics(tmp_path / "tuned.pt")["run"][0]["flags"]
    assert (flags["clip"], flags["alpha"]) == (clip, 0.5)


def test_into_another_file(trained, corpus_dir, tmp_path):
    before, other = trained.read_bytes(), tmp_path / "tuned.pt"
    tune(corpus_dir, "--load", trained, "--save", other, "--epochs", 1, "--wdrop", 0.3)
    assert trained.read_bytes() == before
    assert checkpoint.load(other)
    assert read_metrics(other)["run"][0]["flags"]["wdrop"] == 0.3


@pytest.mark.parametrize("name", ["m.pt", "tuned.pt"], ids=["in place", "elsewhere"])
def test_a_worse_model_never_takes_the_place_of_a_better_one(trained, corpus_dir, tmp_path, capsys, name):
    before, save = checkpoint.load(trained), tmp_path / name
    tune(corpus_dir, "--load", trained, "--save", save, "--epochs", 2, "--lr", 1e4, "--clip", 0.25)
    after = checkpoint.load(save)
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
    assert read_metrics(save)["test"][-1]["epoch"] == 0
    assert "no epoch was better than the model as loaded" in capsys.readouterr().out


def test_it_ends_at_a_plateau_and_scores(trained, corpus_dir):
    assert tune(corpus_dir, "--save", trained, "--epochs", 200, "--nonmono", 0, "--lr", 1e4) == 0
    metrics = read_metrics(trained)
    losses = [line["loss"] for line in metrics["epoch"][2:]]
    assert len(losses) < 200
    assert losses[-1] > min(losses[:-1])
    assert all(loss <= min(losses[:i + 1]) for i, loss in enumerate(losses[:-1]))
    assert len(metrics["test"]) == 2
    assert tune(corpus_dir, "--save", trained, "--epochs", 1) == 0, "it has ended, so another may begin"


def test_a_resumed_fine_tuning_is_the_one_that_never_stopped(trained, corpus_dir, tmp_path):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    tune(corpus_dir, "--load", trained, "--save", whole, "--epochs", 4)
    tune(corpus_dir, "--load", trained, "--save", parts, "--epochs", 2)
    tune(corpus_dir, "--resume", parts, "--epochs", 4)
    one, other = (checkpoint.load(run_files.last_path(path, "finetune"))["model"] for path in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[line["loss"] for line in read_metrics(path)["epoch"]] for path in (whole, parts)]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_the_command_of_a_model_behind_a_link_goes_on_with_resume(trained, corpus_dir, tmp_path):
    (tmp_path / "link.pt").symlink_to(trained)
    command = ["--load", tmp_path / "link.pt", "--save", tmp_path / "tuned.pt", "--epochs"]
    tune(corpus_dir, *command, 1)
    assert tune(corpus_dir, *command, 2, "--resume", tmp_path / "tuned.pt") == 0


def test_a_resumed_run_may_go_on_under_another_name(trained, corpus_dir, tmp_path):
    before = trained.read_bytes()
    other = tmp_path / "other.pt"
    tune(corpus_dir, "--load", trained, "--save", tmp_path / "tuned.pt", "--epochs", 1)
    tune(corpus_dir, "--resume", tmp_path / "tuned.pt", "--save", other, "--epochs", 2)
    assert trained.read_bytes() == before
    assert [line["epoch"] for line in read_metrics(other)["epoch"]] == [1, 2]
    assert [line["epoch"] for line in read_metrics(tmp_path / "tuned.pt")["epoch"]] == [1]


def test_help_names_no_optimizer_that_fine_tuning_lacks(capsys):
    with pytest.raises(SystemExit):
        finetune.parse_flags(["--help"])
    text = capsys.readouterr().out
    assert "learning rate (default: 30)" in text
    assert "Adam" not in text


@pytest.mark.parametrize("script", [finetune, pointer, dynamic])
def test_help_says_that_the_text_is_the_one_of_the_model(script, capsys):
    """--data, --level and --shares come from the model, as other tests show; main.py's defaults are not theirs."""
    with pytest.raises(SystemExit):
        script.parse_flags(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--data PATH folder", "--level {word,char,byte} what", "--shares PART [PART ...] the parts"):
        assert text.split(flag)[1].split(" --")[0].endswith("(default: as the model was trained)")
