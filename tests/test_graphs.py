"""Training by graphs is training: the logic, with a stand-in for CUDA's graphs; `test_cuda_graphs.py` has the rest."""

from argparse import Namespace
from functools import partial

import pytest
import torch
from helpers import Recorder, leaves

import main
import optimizers
import steps
import training
from errors import BadInput
from graphs import GraphedPass
from model import RNNModel
from run import open_batches, open_corpus

SIMPLE = partial(steps.forward_backward, alpha=2, beta=1)
KEEPING = partial(SIMPLE, keep_grads=True)
LENGTHS = [5, 7, 5, 5, 7, 9, 7, 5, 9, 9]


def make_model(kind):
    torch.manual_seed(4)
    return RNNModel(11, kind, emsize=5, nhid=6, nlayers=2)


def losses_of_steps(model, run, optimizer="sgd"):
    """The losses of a step for each of LENGTHS, each from the state that the one before ended with."""
    optimizer = optimizers.make_optimizer(optimizer, model, 0.5, 0.01)
    torch.manual_seed(5)
    text = torch.randint(11, (100, 3))
    hidden, losses, row = model.init_hidden(3), [], 0
    for length in LENGTHS:
        tokens, targets = text[row:row + length], text[row + 1:row + 1 + length]
        hidden, loss = steps.train_step(model, optimizer, run, tokens, targets, hidden, lr_scale=length / 7, clip=0.25)
        losses.append(loss)
        row += length
    return losses


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("optimizer", ["sgd", "asgd", "adam"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "QRNN"])
def test_training_by_graphs_is_training(kind, optimizer):
    simple, graphed = make_model(kind), make_model(kind)
    places = [p.data_ptr() for p in graphed.parameters()]
    losses = losses_of_steps(graphed, GraphedPass(KEEPING, Recorder(graphed)), optimizer)
    assert losses == pytest.approx(losses_of_steps(simple, SIMPLE, optimizer), abs=1e-6)
    for a, b in zip(graphed.parameters(), simple.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert places == [p.data_ptr() for p in graphed.parameters()]


def test_a_length_is_run_when_first_seen_then_captured_once_and_replayed():
    model = make_model("LSTM")
    recorder = Recorder(model)
    losses_of_steps(model, GraphedPass(KEEPING, recorder))
    assert recorder.events == [
        "run", "run", "capture", "replay", "replay", "capture", "replay", "run", "replay", "replay", "capture",
        "replay", "replay"]


def test_what_a_pass_returns_is_not_written_by_the_next():
    model = make_model("LSTM")
    run = GraphedPass(KEEPING, Recorder(model))
    tokens = torch.randint(11, (5, 3))
    returned = [run(model, tokens, tokens, model.init_hidden(3)) for _ in range(3)]
    kept = [[part.clone() for part in leaves(result)] for result in returned]
    run(model, tokens.flip(0), tokens, model.init_hidden(3))
    for result, values in zip(returned, kept):
        assert all(torch.equal(part, value) for part, value in zip(leaves(result), values))


def test_a_split_softmax_takes_no_graphs(corpus_dir, monkeypatch):
    monkeypatch.setattr("run.splits_for", lambda _: [3])
    args = Namespace(data=corpus_dir, level=None, shares=None, batch_size=4, cuda_graphs=True, dry_run=False,
                     min_count=None, max_vocab=None, vocab_order="appearance")
    corpus = open_corpus(args)
    with pytest.raises(BadInput, match="split softmax, which 13 words have"):
        open_batches(corpus, args, "cpu")


@pytest.mark.usefixtures("train")
def test_a_dry_run_meets_the_graph(tmp_path, monkeypatch, capsys):
    recorders = []

    def graphed(model, *settings):
        recorders.append(Recorder(model))
        return steps.choose_pass(model, *settings, backend=recorders[-1])

    monkeypatch.setattr(training, "choose_pass", graphed)
    monkeypatch.setattr(main, "set_up_device", lambda *_: torch.device("cpu"))
    main.main(["--data", str(tmp_path / "corpus"), "--batch_size", "4", "--bptt", "7", "--dry-run", "--cuda-graphs"])
    assert recorders[0].events == ["run", "capture", "replay", "replay"]
    assert "tokens/s" in capsys.readouterr().out
