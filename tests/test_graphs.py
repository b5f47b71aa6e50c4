"""Training by graphs is training: the logic, with a stand-in for CUDA's graphs; `test_cuda.py` has the rest."""

from argparse import Namespace

import pytest
import torch
from helpers import Recorder, leaves

import main
import rnn
import training
from graphs import GraphedPass
from model import RNNModel
from utils import BadInput

ARGS = Namespace(precision="fp32", cuda_graphs=True, alpha=2, beta=1, clip=0.25, bptt=7)
LENGTHS = [5, 7, 5, 5, 7, 9, 7, 5, 9, 9]


def make_model(kind):
    torch.manual_seed(4)
    return RNNModel(11, kind, emsize=5, nhid=6, nlayers=2)


def steps(model, run, optimizer="sgd"):
    """The losses of a step for each of LENGTHS, each from the state that the one before ended with."""
    optimizer = training.make_optimizer(optimizer, model, 0.5, 0.01)
    torch.manual_seed(5)
    text = torch.randint(11, (100, 3))
    hidden, losses, row = model.init_hidden(3), [], 0
    for length in LENGTHS:
        words, targets = text[row:row + length], text[row + 1:row + 1 + length]
        hidden, loss = training.train_step(model, optimizer, words, targets, hidden, ARGS, lr_scale=length / 7, run=run)
        losses.append(loss)
        row += length
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "asgd", "adam"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "QRNN"])
def test_training_by_graphs_is_training(kind, optimizer):
    simple, graphed = make_model(kind), make_model(kind)
    graphed.keep_still()
    places = [p.data_ptr() for p in graphed.parameters()]
    ours = steps(graphed, GraphedPass(training.gradients, Recorder(graphed)), optimizer)
    assert ours == pytest.approx(steps(simple, training.gradients, optimizer), abs=1e-6)
    for a, b in zip(graphed.parameters(), simple.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert places == [p.data_ptr() for p in graphed.parameters()]


def test_a_length_is_run_when_first_met_then_captured_once_and_replayed():
    model = make_model("LSTM")
    recorder = Recorder(model)
    steps(model, GraphedPass(training.gradients, recorder))
    assert recorder.events == [
        "run", "run", "capture", "replay", "replay", "capture", "replay", "run", "replay", "replay", "capture",
        "replay", "replay"]


def test_what_a_pass_returns_is_not_written_by_the_next():
    model = make_model("LSTM")
    run = GraphedPass(training.gradients, Recorder(model))
    words = torch.randint(11, (5, 3))
    returned = [run(model, words, words, model.init_hidden(3), ARGS) for _ in range(3)]
    kept = [[part.clone() for part in leaves(result)] for result in returned]
    run(model, words.flip(0), words, model.init_hidden(3), ARGS)
    for result, values in zip(returned, kept):
        assert all(torch.equal(part, value) for part, value in zip(leaves(result), values))


@pytest.fixture(params=[rnn.LSTM, rnn.GRU])
def twins(request):
    """A layer that keeps still, the same one that does not, an input and a hidden state."""
    torch.manual_seed(1)
    still, stock = request.param(5, 6), request.param(5, 6)
    stock.load_state_dict(still.state_dict())
    still.still = True
    h = torch.randn(1, 3, 6)
    return still, stock, torch.randn(7, 3, 5), (h, torch.randn(1, 3, 6)) if request.param is rnn.LSTM else h


def test_weights_in_one_piece_give_the_layer_and_its_gradients(twins):
    still, stock, x, hidden = twins
    results = [layer(x, hidden) for layer in (still, stock)]
    for ours, theirs in zip(*map(leaves, results)):
        assert torch.equal(ours, theirs)
    for output, _ in results:
        output.square().sum().backward()
    for ours, theirs in zip(still.parameters(), stock.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
    (weight, *rest) = rnn.in_one_piece(still, torch.float32)
    storage = weight.untyped_storage()
    assert storage.nbytes() == sum(p.nbytes for p in still.parameters())
    assert all(part.untyped_storage().data_ptr() == storage.data_ptr() for part in rest)


def test_under_autocast_the_pass_for_cudnn_is_in_bfloat16(twins):
    still, stock, x, hidden = twins
    with torch.autocast("cpu", torch.bfloat16):
        output, state = still(x, hidden)
    assert {part.dtype for part in (output, *leaves(state))} == {torch.bfloat16}
    torch.testing.assert_close(output.float(), stock(x, hidden)[0], atol=0.02, rtol=0.02)
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in still.parameters())


def test_a_split_softmax_takes_no_graphs(corpus_dir, monkeypatch):
    monkeypatch.setattr(training, "splits_for", lambda ntoken: [3])
    args = Namespace(data=corpus_dir, level=None, shares=None, batch_size=4, cuda_graphs=True)
    with pytest.raises(BadInput, match="split softmax, which 13 words have"):
        training.open_corpus(args, "cpu")


def test_a_dry_run_meets_the_graph(train, tmp_path, monkeypatch, capsys):
    recorders = []

    def graphed(model):
        recorders.append(Recorder(model))
        return GraphedPass(training.gradients, recorders[-1])

    monkeypatch.setattr(training, "graphed_gradients", graphed)
    monkeypatch.setattr(main, "pick_device", lambda *_: torch.device("cpu"))
    main.main(["--data", str(tmp_path / "corpus"), "--batch_size", "4", "--bptt", "7", "--dry-run", "--cuda-graphs"])
    assert recorders[0].events == ["run", "capture", "replay", "replay"]
    assert "tokens/s" in capsys.readouterr().out
