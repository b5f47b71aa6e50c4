"""A text of two shares has no test split: models of it are trained, tuned and scored on validation alone."""

import math

import pytest
import reproduce
import table
from helpers import read_metrics

import data
import dynamic
import finetune
import metrics
import pointer
import run_files
from errors import BadInput

LINE = "the cat sat on a mat and saw one dog run by\n"
GRIDS = {"pointer": (pointer, ["--window", "5", "50", "--theta", "0.3", "1", "--lambdasm", "0.1"]),
         "dynamic": (dynamic, ["--lr", "1e-4", "1e-3", "--lamb", "0.01", "--batch_size", "4", "--bptt", "20"])}


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(LINE * 50, encoding="utf-8")
    return path


@pytest.fixture
def model(book, train, tmp_path):
    """A tiny model of the characters of the book."""
    train(tmp_path / "m.pt", "--data", str(book), "--level", "char", "--shares", "90", "10", "--epochs", "1")
    return tmp_path / "m.pt"


def score(kind, model, *flags):
    script, grid = GRIDS[kind]
    script.main(["--no-cuda", "--save", str(model), *grid, *map(str, flags)])


def test_validation_is_all_that_training_leaves(book):
    corpus = data.Corpus(book, "char", (90, 10))
    assert not corpus.has_test
    assert len(corpus.test) == 0
    assert len(corpus.train) == 9 * len(corpus.valid)


@pytest.mark.parametrize("shares", [(2, 1), (1, 2), (90, 10), (0.7, 0.1)])
def test_two_shares_leave_no_token_out(book, shares):
    """... however the parts come out; what is left of a token goes to validation."""
    for words in range(1, 9):
        book.write_text("w " * words)
        corpus = data.Corpus(book, shares=shares)
        assert len(corpus.train) == math.floor((words + 1) * shares[0] / sum(shares))
        assert (len(corpus.train) + len(corpus.valid), len(corpus.test)) == (words + 1, 0)


def test_training_and_fine_tuning_end_with_the_validation_loss(model):
    finetune.main(["--no-cuda", "--save", str(model), "--epochs", "1"])
    found = read_metrics(model)
    trained, tuned = found["test"]
    assert "loss" not in trained
    assert "loss" not in tuned
    assert trained["valid_loss"] == found["epoch"][0]["loss"]
    assert tuned["valid_loss"] == min(found["loaded"][0]["loss"], found["epoch"][1]["loss"])


@pytest.mark.parametrize("kind", GRIDS)
def test_validation_is_scored_as_beside_a_test_split(model, tmp_path, capsys, kind):
    """The longer book has the same training and validation text, and a test split after them."""
    score(kind, model)
    printed = capsys.readouterr().out
    longer = tmp_path / "longer.txt"
    longer.write_text(LINE * 50 + 5 * (LINE[-2::-1] + "\n"), encoding="utf-8")
    score(kind, model, "--data", longer, "--shares", 45 * len(LINE), 5 * len(LINE), 5 * len(LINE))
    found = read_metrics(model)[kind]
    alone, valid, test = found
    assert "no test split" in printed
    assert [line["split"] for line in found] == ["valid", "valid", "test"]
    assert alone["loss"] == valid["loss"] != test["loss"]
    names = ("window", "theta", "lambdasm") if kind == "pointer" else ("lr", "lamb", "epsilon")
    assert [alone[name] for name in names] == [valid[name] for name in names]
    assert "no test split" not in capsys.readouterr().out
    assert f"| {kind:7} |" in printed
    assert "test loss" not in printed


@pytest.mark.parametrize("kind", GRIDS)
def test_the_best_of_the_grid_is_reported(model, kind):
    score(kind, model)
    found = read_metrics(model)
    grid = [line["loss"] for line in found["grid" if kind == "pointer" else "dynamic-grid"]]
    assert len(grid) > 1
    assert [line["loss"] for line in found[kind]] == [min(grid)]


def test_dynamic_evaluation_goes_on(model):
    score("dynamic", model)
    score("dynamic", model, "--resume")
    assert len(read_metrics(model)["dynamic"]) == 1


def test_a_table_has_the_validation_perplexity_of_each_stage(model, tmp_path):
    for kind in GRIDS:
        score(kind, model)
    found, lines = read_metrics(model), metrics.read_metrics(run_files.metrics_path(model))
    losses = [found["test"][0]["valid_loss"], found["pointer"][0]["loss"], found["dynamic"][0]["loss"]]
    rows = list(table.rows(lines))
    assert [row[0] for row in rows] == ["train", "cache", "dynamic"]
    assert [row[2] for row in rows] == pytest.approx([math.exp(loss) for loss in losses])
    assert [line.split("|")[4].strip() for line in table.table(lines)][2:] == ["none"] * 3
    model.with_name("m.metrics.jsonl").rename(tmp_path / "finetune.metrics.jsonl")
    assert all(reproduce.is_done(stage, tmp_path) for stage in ("cache", "grid", "dynamic"))
    assert not reproduce.is_done("both", tmp_path)


@pytest.mark.parametrize("shares", [["1"], ["1", "2", "3", "4"]])
def test_other_numbers_of_shares_are_bad_input(train, tmp_path, shares):
    with pytest.raises(BadInput, match="--shares: takes two parts"):
        train(tmp_path / "m.pt", "--shares", *shares)
