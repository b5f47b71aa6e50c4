"""Dynamic evaluation is that of the recorded rows and of a naive loop, and leaves a model as it was."""

import json
from itertools import product

import numpy
import pytest
import torch
from helpers import read_metrics
from test_pointer import naive_loss
from test_reference import CASES, FOLDER, TOLERANCE, recorded_flags, recorded_model

import checkpoint
import dynamic
import gradients
from cache import mixture_losses
from errors import BadInput
from model import RNNModel
from optimizers import restored_weights
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
    statistics = gradients.gradient_rms(model, train, BPTT) if rule == "rms" else None
    (found,) = dynamic.score_split(model, text, "text", BPTT, statistics, setting, {})
    assert found == pytest.approx(loss, abs=1e-12)
    with restored_weights(model.parameters()) as trained:
        update = dynamic.make_update(model, trained, statistics, **setting)
        for _ in dynamic.dynamic_chunks(model, text, BPTT, update, "text", setting["lr"]):
            pass
        for name, parameter in model.named_parameters():
            assert parameter.detach().numpy() == pytest.approx(weights[name], abs=1e-12)


def test_a_rate_of_zero_is_the_trained_model(model, texts):
    _, text = texts
    expected = evaluate(model, text, 100)
    dynamic.without_dropout(model)
    (found,) = dynamic.score_split(model, text, "text", BPTT, None, {"lr": 0.0, "lamb": 0.5}, {})
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_cache_on_top_is_its_definition(model, texts):
    """A pass with a grid of caches gives each of them over the outputs of the model as it was then."""
    _, text = texts
    setting = {"lr": 0.1, "lamb": 0.1}
    with restored_weights(model.parameters()) as trained:
        update = dynamic.make_update(model, trained, None, **setting)
        chunks = list(dynamic.dynamic_chunks(model, text, BPTT, update, "text", 0.1))
    whole = [torch.cat(parts) for parts in zip(*chunks)]
    cache = {"window": [2, 5], "theta": [0.5, 2.0], "lambdasm": [0.1, 0.4]}
    losses = dynamic.score_split(model, text, "text", BPTT, None, setting, cache)
    for caches, loss in zip(product(*cache.values()), losses, strict=True):
        assert loss == pytest.approx(naive_loss(*whole, *caches), abs=1e-12)
    static = mixture_losses(chunks, [2], [0.5], [0.0]).item()
    assert abs(static - losses[0]) > 1e-4, "or the cache would not matter"


def test_the_weights_are_put_back(model, texts):
    _, text = texts
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for lr in (0.1, 1e200):  # the latter fails on the way
        try:
            dynamic.score_split(model, text, "text", 1, None, {"lr": lr, "lamb": 0.1}, {})
        except BadInput:
            assert lr > 1
        assert all(map(torch.equal, model.parameters(), before))


def test_a_decay_of_more_than_1_goes_no_further_than_the_trained_weights(model, texts):
    _, text = texts
    one, three = (dynamic.score_split(model, text, "text", BPTT, None, {"lr": 0.3, "lamb": lamb}, {})
                  for lamb in (1.0, 3.0))
    assert one == three


def test_statistics_of_some_batches_are_those_of_the_text_up_to_there(model, texts):
    train, _ = texts
    some = gradients.gradient_rms(model, train, BPTT, 2)
    part, whole = (gradients.gradient_rms(model, source, BPTT) for source in (train[:2 * BPTT + 1], train))
    assert all(torch.equal(some[name], part[name]) for name in part)
    assert not all(torch.equal(some[name], whole[name]) for name in whole)
