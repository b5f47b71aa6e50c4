"""Dynamic evaluation is that of the recorded rows and of a naive loop, and leaves a model as it was."""

import json
import math
import re

import numpy
import pytest
import torch
from helpers import read_metrics
from test_pointer import naive_loss
from test_reference import CASES, FOLDER, TOLERANCE, recorded_flags, recorded_model

import checkpoint
import dynamic
import run_files
from cache import mixture_losses
from data import Corpus
from errors import BadInput
from model import RNNModel
from steps import evaluate
from utils import batchify, get_batch, repackage_hidden

RECORDED = FOLDER / "dynamic.json"
ROWS = [row for row in (json.loads(RECORDED.read_text()) if RECORDED.exists() else [])
        if row["name"] in CASES and (FOLDER / f"{row['name']}.best.npz").exists()]
SETTINGS = ("lr", "lamb", "epsilon", "bptt", "batch_size")


# --- the recorded rows -----------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_float64_gives_the_recorded_losses(row, tmp_path):
    case, save = CASES[row["name"]], tmp_path / "m.pt"
    model, corpus = recorded_model(case, "best")
    flags = {"data": str(FOLDER / "corpus"), "level": "word", "shares": [90, 5, 5], **recorded_flags(case)}
    checkpoint.save(save, model, flags, corpus.dictionary.idx2word, 1.0, 1)
    dynamic.main(["--no-cuda", "--save", str(save), *(f"--{name}={row[name]}" for name in SETTINGS)])
    found = [line["loss"] for line in read_metrics(save)["dynamic"]]
    assert found == pytest.approx([row["valid_loss"], row["test_loss"]], abs=TOLERANCE, rel=0)


# --- the definition --------------------------------------------------------------------------------------------------

V, BPTT, COLUMNS = 23, 4, 3
MODELS = {"lstm": {}, "lstm untied": {"tied": False}, "gru": {"model": "GRU"},
          "gru untied": {"model": "GRU", "tied": False}, "qrnn": {"model": "QRNN"},
          "qrnn untied": {"model": "QRNN", "tied": False}, "split": {"splits": [8, 15]},
          "split untied": {"splits": [8, 15], "tied": False}}


@pytest.fixture(params=MODELS)
def model(request, in_float64):  # noqa: ARG001
    """A model in float64 whose weights are large enough for its gradients to matter."""
    torch.manual_seed(1)
    model = RNNModel(V, emsize=5, nhid=7, nlayers=2, **MODELS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.7, 0.7)
    return dynamic.without_dropout(model)


@pytest.fixture
def texts(in_float64):  # noqa: ARG001
    """A training text (N, B), with a row left over for a batch of one step, and one to score (N, 1)."""
    torch.manual_seed(2)
    return batchify(torch.randint(V, (102,)), COLUMNS), batchify(torch.randint(V, (14,)), 1)


def naive_gradients(model, weights, words, targets, hidden):
    """Loss, gradients by name and new hidden state from `weights`, numpy arrays by name."""
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
            parameter.grad = None
    output, hidden, _ = model(words, hidden)
    loss = -model.logprob(output).flatten(0, 1)[range(targets.numel()), targets.flatten()].mean()
    loss.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    return loss.item(), gradients, repackage_hidden(hidden)


def naive(model, train, text, rule, lr, lamb, epsilon=None):
    """The losses of dynamic evaluation over `text`, a value at a time, and the weights at the end."""
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    batches, hidden, squares = 0, model.init_hidden(COLUMNS), {name: 0 * value for name, value in start.items()}
    row = 0
    while row < len(train) - 2:
        words, targets = get_batch(train, row, BPTT)
        _, gradients, hidden = naive_gradients(model, start, words, targets, hidden)
        squares = {name: squares[name] + gradients[name] ** 2 for name in squares}
        batches, row = batches + 1, row + BPTT
    rms = {name: numpy.sqrt(value / batches) for name, value in squares.items()}
    mean = sum(value.mean() for value in rms.values()) / len(rms)
    weights, total, hidden = {name: value.copy() for name, value in start.items()}, 0.0, model.init_hidden(1)
    for row in range(0, len(text) - 1, BPTT):
        words, targets = get_batch(text, row, BPTT)
        loss, gradients, hidden = naive_gradients(model, weights, words, targets, hidden)
        total += loss * len(words)
        for name, value in weights.items():
            for place in numpy.ndindex(value.shape):
                rate = min(rms[name][place] / mean, 1 / lamb) if rule == "rms" else 1
                divisor = rms[name][place] + epsilon if rule == "rms" else 1
                value[place] += lamb * rate * (start[name][place] - value[place])
                value[place] -= lr * gradients[name][place] / divisor
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(start[name]))
    return total / (len(text) - 1), weights


@pytest.mark.parametrize("rule, setting", [
    ("rms", {"lr": 0.01, "lamb": 0.3, "epsilon": 1e-3}), ("rms", {"lr": 0.002, "lamb": 0.9, "epsilon": 1e-5}),
    ("sgd", {"lr": 0.3, "lamb": 0.2})])
def test_it_is_the_definition(model, texts, rule, setting):
    """For every kind of model, loss and last weights are those of a loop over single values."""
    train, text = texts
    loss, weights = naive(model, train, text, rule, **setting)
    dynamic.without_dropout(model)
    statistics = dynamic.gradient_rms(model, train, BPTT) if rule == "rms" else None
    ((_, found),), _ = dynamic.score_split(model, text, "text", BPTT, statistics, setting, {})
    assert found == pytest.approx(loss, abs=1e-12)
    with dynamic.trained_weights(model) as trained:
        update = dynamic.make_update(model, trained, statistics, **setting)
        for _ in dynamic.dynamic_chunks(model, text, BPTT, update, "text", setting["lr"]):
            pass
        for name, parameter in model.named_parameters():
            assert parameter.detach().numpy() == pytest.approx(weights[name], abs=1e-12)


def test_a_rate_of_zero_is_the_trained_model(model, texts):
    _, text = texts
    expected = evaluate(model, text, 100)
    dynamic.without_dropout(model)
    ((_, found),), _ = dynamic.score_split(model, text, "text", BPTT, None, {"lr": 0.0, "lamb": 0.5}, {})
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_cache_on_top_is_its_definition(model, texts):
    """A pass with a grid of caches gives each of them over the outputs of the model as it was then."""
    _, text = texts
    setting = {"lr": 0.1, "lamb": 0.1}
    with dynamic.trained_weights(model) as trained:
        update = dynamic.make_update(model, trained, None, **setting)
        chunks = list(dynamic.dynamic_chunks(model, text, BPTT, update, "text", 0.1))
    whole = [torch.cat(parts) for parts in zip(*chunks)]
    cache = {"window": [2, 5], "theta": [0.5, 2.0], "lambdasm": [0.1, 0.4]}
    scores, _ = dynamic.score_split(model, text, "text", BPTT, None, setting, cache)
    assert len(scores) == 8
    for one, loss in scores:
        assert loss == pytest.approx(naive_loss(*whole, one["window"], one["theta"], one["lambdasm"]), abs=1e-12)
    static = mixture_losses(chunks, [2], [0.5], [0.0]).item()
    assert abs(static - scores[0][1]) > 1e-4, "or the cache would not matter"


def test_the_weights_are_put_back(model, texts):
    _, text = texts
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for lr in (0.1, 1e200):  # the latter fails on the way
        try:
            dynamic.score_split(model, text, "text", 1, None, {"lr": lr, "lamb": 0.1}, {})
        except BadInput:
            assert lr > 1
        assert all(map(torch.equal, model.parameters(), before))


# --- the script ------------------------------------------------------------------------------------------------------

@pytest.fixture
def trained(train, corpus_dir, tmp_path, capsys):
    """Run the script on a tiny model; returns its metrics by kind and what it prints."""
    save = tmp_path / "m.pt"
    train(save, "--epochs", "2")

    def call(*flags):
        dynamic.main(["--no-cuda", "--data", str(corpus_dir), "--save", str(save), "--batch_size", "4", *flags])
        return read_metrics(save), capsys.readouterr().out
    call.save = save
    capsys.readouterr()
    return call


@pytest.fixture
def passes(monkeypatch):
    """How often the statistics were computed, as a list."""
    count, compute = [], dynamic.gradient_rms
    monkeypatch.setattr(dynamic, "gradient_rms", lambda *given: count.append(given) or compute(*given))
    return count


def test_the_best_setting_on_validation_is_applied_to_test(trained):
    found, printed = trained("--lr", "1e-4", "1e-3", "--lamb", "0.001", "0.1", "--lambdasm", "0.05", "0.2",
                             "--window", "9")
    assert len(found["dynamic-grid"]) == printed.count("| dynamic-grid |") == 8
    best = min(found["dynamic-grid"], key=lambda line: line["loss"])
    valid, test = found["dynamic"]
    names = ("lr", "lamb", "epsilon", "window", "theta", "lambdasm")
    setting = {name: best[name] for name in names}
    assert (valid["split"], test["split"]) == ("valid", "test")
    assert best["loss"] == valid["loss"] < max(line["loss"] for line in found["dynamic-grid"])
    assert setting.items() <= valid.items()
    assert setting.items() <= test.items()
    alone, _ = trained(*(token for name, value in setting.items() for token in (f"--{name}", str(value))))
    assert [line["loss"] for line in alone["dynamic"][2:]] == [valid["loss"], test["loss"]]


def test_a_fast_search_looks_at_the_first_words(trained, corpus_dir, monkeypatch):
    monkeypatch.setattr(dynamic, "FAST_WORDS", 30)
    found, _ = trained("--rule", "sgd", "--lr", "0.1", "1", "--fast")
    assert [line["tokens"] for line in found["dynamic-grid"]] == [30, 30]
    words = {split: len(getattr(Corpus(corpus_dir), split)) - 1 for split in ("valid", "test")}
    assert [line["tokens"] for line in found["dynamic"]] == [words["valid"], words["test"]]
    best = min(found["dynamic-grid"], key=lambda line: line["loss"])
    alone, _ = trained("--rule", "sgd", "--lr", str(best["lr"]))
    assert [line["loss"] for line in alone["dynamic"][2:]] == [line["loss"] for line in found["dynamic"]]


def test_a_grid_computes_the_statistics_once_and_the_next_run_reads_them(trained, passes):
    first, _ = trained("--lr", "1e-4", "1e-3", "--lamb", "0.001", "0.1")
    second, printed = trained("--lr", "1e-4", "1e-3", "--lamb", "0.001", "0.1")
    assert len(passes) == 1
    assert f"gradient statistics: from {run_files.statistics_path(trained.save)}" in printed
    assert [line["loss"] for line in second["dynamic"]] == [line["loss"] for line in first["dynamic"]] * 2


@pytest.mark.parametrize("change", ["--bptt=7", "--batch_size=5", "--max-batches=2", "text", "model", "damage", "cut"])
def test_statistics_of_something_else_are_not_used(trained, passes, corpus_dir, change):
    trained()
    path = run_files.statistics_path(trained.save)
    content = path.read_bytes()
    if change == "text":
        text = corpus_dir / "train.txt"
        text.write_text(text.read_text() + "the cat sat\n")
    elif change == "model":
        saved = checkpoint.load(trained.save)
        model = checkpoint.restore_model(saved, trained.save)
        checkpoint.save(trained.save, model, saved["flags"], saved["vocabulary"], 3.0, 1)
    elif change == "damage":
        value = torch.load(path)["statistics"]["encoder.weight"].numpy().tobytes()
        assert value in content
        path.write_bytes(content.replace(value, bytes(len(value))))
    elif change == "cut":
        path.write_bytes(content[:-100])
    trained(*([change] if change.startswith("--") else []))
    assert len(passes) == 2


def test_statistics_that_cannot_be_kept_are_used_all_the_same(trained, monkeypatch):
    first, _ = trained()
    run_files.statistics_path(trained.save).unlink()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(dynamic, "replacing", full)
    second, printed = trained()
    assert "not kept: [Errno 28] No space left on device" in printed
    assert [line["loss"] for line in second["dynamic"]] == [line["loss"] for line in first["dynamic"]] * 2


def test_the_checkpoint_is_never_changed(trained):
    before = trained.save.read_bytes()
    folder = {path.name for path in trained.save.parent.iterdir()}
    trained("--lr", "0.001", "0.1")
    assert trained.save.read_bytes() == before
    assert {path.name for path in trained.save.parent.iterdir()} - folder == {"m.statistics.pt"}


def test_a_loss_that_is_not_finite_names_chunk_and_rate(trained):
    with pytest.raises(BadInput) as error:
        trained("--rule", "sgd", "--lr", "0.1", "9e29", "--lamb", "1")
    named = r"chunk (\d+) of valid \(from word (\d+) on\): the loss is \S+ with --lr 9e\+29;"
    chunk, word = map(int, re.match(named, str(error.value)).groups())
    assert word == 5 * (chunk - 1) + 1 > 1
    assert [line["lr"] for line in read_metrics(trained.save)["dynamic-grid"]] == [0.1], "what came before is recorded"


def test_a_training_text_without_a_finite_loss_is_named(trained):
    saved = checkpoint.load(trained.save)
    saved["model"]["decoder.bias"][0] = math.nan
    torch.save(saved, trained.save)
    with pytest.raises(BadInput, match="batch 1 of the training text"):
        trained()


def test_the_files_of_a_run_that_begins_anew_are_removed(trained, train):
    trained()
    train(trained.save, "--epochs", "1", "--overwrite")
    assert not run_files.statistics_path(trained.save).exists()
