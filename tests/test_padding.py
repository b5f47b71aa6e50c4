"""The passes of a GPU, run on a CPU: padded copies of the weights give the layer, and no parameter moves."""

import pytest
import torch
from helpers import leaves
from torch import nn

import checkpoint
import locked_dropout
import padding
import rnn
import steps
from model import RNNModel
from qrnn import QRNN
from utils import map_hidden
from weight_drop import weight_drop

T, B = 7, 3
SIZES = [(5, 6), (16, 6), (5, 32), (16, 16), (17, 31)]  # E and H: padded or not
WEIGHT = {rnn.LSTM: "weight_hh_l0", rnn.GRU: "weight_hh_l0", QRNN: "linear.weight"}
LAYERS = [rnn.LSTM, rnn.GRU, QRNN, lambda *sizes: QRNN(*sizes, window=2), lambda *sizes: QRNN(*sizes, zoneout=0.3)]
NAMES = ["LSTM", "GRU", "QRNN", "QRNN of two inputs", "QRNN with zoneout"]


def make(kind, sizes, dtype):
    """A layer in training mode, an input, and a hidden state."""
    torch.manual_seed(1)
    layer = kind(*sizes).to(dtype)
    state = torch.randn(1, B, sizes[1], dtype=dtype)
    if isinstance(layer, QRNN):
        hidden = tuple(torch.randn_like(part) for part in layer.init_hidden(B))
    else:
        hidden = (state, torch.randn_like(state)) if isinstance(layer, rnn.LSTM) else state
    return layer, torch.randn(T, B, sizes[0], dtype=dtype, requires_grad=True), hidden


def results(layer, x, hidden):
    """Output and state of a pass with weight drop, and the gradients of input, state and parameters."""
    hidden = map_hidden(lambda part: part.detach().requires_grad_(), hidden)
    torch.manual_seed(2)
    found = leaves(weight_drop(layer, WEIGHT[type(layer)], 0.5, x, hidden))
    objective = sum((part * part.detach().cos()).sum() for part in found)
    return found, torch.autograd.grad(objective, [x, *leaves(hidden), *layer.parameters()])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", LAYERS, ids=NAMES)
def test_a_padded_pass_is_the_layer_and_its_gradients(kind, sizes, monkeypatch):
    monkeypatch.setattr("qrnn.triton", None)
    plain = results(*make(kind, sizes, torch.double))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    padded = results(*make(kind, sizes, torch.double))
    for found, expected in zip(padded, plain):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("kind", LAYERS[:3], ids=NAMES[:3])
def test_under_autocast_the_pass_is_in_bfloat16_and_gradients_are_as_the_parameters(kind, monkeypatch):
    layer, x, hidden = make(kind, (5, 6), torch.double)
    layer, x, hidden = layer.float(), x.detach().float().requires_grad_(), map_hidden(torch.Tensor.float, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = results(layer, x, hidden)
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    exact, expected = results(layer, x, hidden)
    assert found[0].dtype == (torch.float if kind is QRNN else torch.bfloat16), "the forget-mult is in fp32"
    assert {part.dtype for part in gradients} == {torch.float}
    for one, other in zip((*found, *gradients), (*exact, *expected)):
        assert (one.float() - other).norm() < 0.03 * other.norm()


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", [rnn.LSTM, rnn.GRU])
def test_the_pass_reads_weights_one_behind_the_other_in_one_buffer(kind, sizes, monkeypatch):
    """As cuDNN wants them: W_ih, W_hh, b_ih, b_hh, dense, from the beginning of the buffer on."""
    name, seen = kind.__name__.lower(), []
    function = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda x, hidden, weights, *how: (
        seen.append((x, hidden, weights)), function(x, hidden, weights, *how))[1])
    layer, x, hidden = make(kind, sizes, torch.float)
    weight_drop(layer, "weight_hh_l0", 0.5, x, hidden)
    ((source, states, weights),) = seen
    buffer = weights[0].untyped_storage()
    assert all(w.untyped_storage().data_ptr() == buffer.data_ptr() and w.is_contiguous() for w in weights)
    offsets = [w.storage_offset() for w in weights]
    assert offsets == [sum(w.numel() for w in weights[:number]) for number in range(4)]
    assert buffer.nbytes() == sum(w.nbytes for w in weights)
    assert all(size % padding.MULTIPLE == 0 for part in (source, *leaves(states)) for size in part.shape[2:])
    assert all(size % padding.MULTIPLE == 0 for w in weights for size in w.shape)


def test_the_gradient_of_the_copies_is_that_of_finite_differences():
    torch.manual_seed(0)
    mask = torch.empty(12, 4).bernoulli_(0.5).double()
    weights = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((12, 5), (12, 4), (12,))]
    assert torch.autograd.gradcheck(lambda *w: padding.PaddedWeights.apply(3, torch.double, 1, mask, *w), weights)


@pytest.mark.parametrize("size, expected", [(1150, 1152), (1550, 1552), (33_278, 33_280), (400, 400), (1, 16)])
def test_sizes_are_those_of_whole_vectors(size, expected):
    assert padding.padded_size(size) == expected


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("kind", LAYERS[:3], ids=NAMES[:3])
def test_the_mask_is_applied_while_the_weight_is_copied(kind, monkeypatch):
    monkeypatch.setattr("weight_drop.functional_call", None)  # which would take a product of its own
    layer, x, hidden = make(kind, (5, 6), torch.float)
    weight_drop(layer, WEIGHT[kind], 0.5, x, hidden)


@pytest.mark.usefixtures("as_a_gpu")
def test_masks_are_drawn_unpadded(monkeypatch):
    drawn, fill_mask = [], locked_dropout.fill_mask
    monkeypatch.setattr(locked_dropout, "fill_mask", lambda mask, p: (drawn.append(mask.shape), fill_mask(mask, p))[1])
    model = RNNModel(11, emsize=5, nhid=6, nlayers=2)
    model(torch.randint(11, (T, B)), model.init_hidden(B))
    assert drawn == [(11, 1), (1, B, 5), (24, 6), (1, B, 6), (20, 5), (1, B, 5)]


def flatten(layer):
    """What PyTorch does with the parameters of an LSTM or GRU on a GPU: it moves them into one new buffer."""
    parameters = list(nn.Module.parameters(layer))
    if all(isinstance(part, torch.Tensor) for part in layer._flat_weights):
        buffer = torch.cat([part.detach().flatten() for part in layer._flat_weights])
        for part, place in zip(layer._flat_weights, buffer.split([part.numel() for part in parameters])):
            part.data = place.view(part.shape)


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "QRNN"])
def test_training_leaves_the_parameters_where_they_are_and_a_checkpoint_as_large_as_they(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", flatten)
    model = RNNModel(50, kind, emsize=20, nhid=60, nlayers=2)
    model.to("cpu")  # which flattens, as it does on the way to a GPU
    places = [p.data_ptr() for p in model.parameters()]
    tokens, hidden = torch.randint(50, (T + 1, B)), model.init_hidden(B)
    for _ in range(3):
        hidden, _ = steps.forward_backward(model, tokens[:-1], tokens[1:], hidden)
    assert places == [p.data_ptr() for p in model.parameters()]
    checkpoint.save(tmp_path / "m.pt", model, {}, list(map(str, range(50))), 1.0, 1)
    needed = sum(p.nbytes for p in model.parameters())
    assert needed < (tmp_path / "m.pt").stat().st_size < needed + 10_000
    for layer in model.rnns:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in layer.parameters()}
        assert sum(storages.values()) == sum(p.nbytes for p in layer.parameters())


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("kind", [rnn.LSTM, rnn.GRU])
def test_a_pass_changes_nothing_that_an_earlier_one_needs(kind):
    """Two forward passes, then both backward passes: each pass has copies of its own."""
    layer, x, hidden = make(kind, (5, 6), torch.double)

    def first_gradient(passes):
        torch.manual_seed(2)
        (output, _), *_ = [weight_drop(layer, "weight_hh_l0", 0.5, x, hidden) for _ in range(passes)]
        return torch.autograd.grad(output.square().sum(), list(layer.parameters()))

    for found, expected in zip(first_gradient(2), first_gradient(1)):
        assert torch.equal(found, expected)
