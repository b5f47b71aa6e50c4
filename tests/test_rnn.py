"""The passes that the LSTM layer has of its own compute what PyTorch's do."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import rnn
from utils import map_hidden

T, B, E, H = 7, 3, 5, 6


@pytest.fixture
def layer():
    torch.manual_seed(1)
    return rnn.LSTM(E, H)


@pytest.fixture
def batch():
    torch.manual_seed(2)
    return torch.randn(T, B, E), (torch.rand(1, B, H), torch.randn(1, B, H))


def stock(layer):
    """PyTorch's layer with the same weights, in float64."""
    twin = nn.LSTM(E, H)
    twin.load_state_dict(layer.state_dict())
    return twin.double()


@pytest.mark.parametrize("steps, batch_size, rows", [(4, 3, 100), (1, 3, 100), (4, 1, 100), (5, 3, 6), (5, 3, 1)])
def test_the_gradients_of_the_training_pass_are_those_of_finite_differences(steps, batch_size, rows, monkeypatch):
    """In one block of all steps, in blocks of two and a last one of one, in blocks of one."""
    monkeypatch.setattr(rnn.LSTMFunction, "ROWS_PER_PRODUCT", rows)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in
              ((steps, batch_size, E), (4 * H, E), (4 * H, H), (4 * H,), (batch_size, H), (batch_size, H))]
    assert torch.autograd.gradcheck(rnn.LSTMFunction.apply, inputs)


@pytest.mark.parametrize("precision, low, high", [("fp32", 0, 1e-6), ("bf16", 1e-4, 0.02)])
def test_training_by_the_own_pass_is_that_of_pytorch_to_the_precision(layer, batch, monkeypatch, precision, low, high):
    monkeypatch.setattr(rnn.LSTMFunction, "ROWS_PER_PRODUCT", 2 * B)
    monkeypatch.setattr(rnn, "MIN_HIDDEN", 0)
    monkeypatch.setattr(rnn, "packs_fp32", lambda: True)
    x, hidden = batch
    results = []
    for module, dtype in ((layer, torch.float32), (stock(layer), torch.float64)):
        source = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=module is layer and precision == "bf16"):
            output, (h, c) = module(source, tuple(part.to(dtype) for part in hidden))
        assert output.dtype == c.dtype == dtype
        assert (type(output.grad_fn).__name__ == "LSTMFunctionBackward") == (module is layer)
        (output * output.detach().cos() + c.pow(2).sum()).sum().backward()
        results.append([output, h, c, source.grad, *(parameter.grad for parameter in module.parameters())])
    for found, expected in zip(*results):
        assert low * expected.norm() <= (found - expected).norm() < high * expected.norm()


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_one_step_is_that_of_pytorch(kind, batch):
    torch.manual_seed(1)
    layer, twin = getattr(rnn, kind)(E, H), getattr(nn, kind)(E, H)
    twin.load_state_dict(layer.state_dict())
    if kind == "GRU":  # whose step is for packed weights: here for some that are not rounded
        layer.packed = (lambda x: functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0),
                        lambda h: functional.linear(h, layer.weight_hh_l0, layer.bias_hh_l0))
    x, hidden = batch
    hidden = hidden if kind == "LSTM" else hidden[0]
    with torch.no_grad():
        found, found_state = layer(x[:1], hidden)
        expected, expected_state = twin.double()(x[:1].double(), map_hidden(torch.Tensor.double, hidden))
    for a, b in zip((found, *found_state), (expected, *expected_state)):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-6)


def test_the_own_pass_trains_large_layers_in_fp32_and_all_in_bfloat16(monkeypatch):
    x = torch.zeros(2, 1, 4)
    small, large = rnn.LSTM(4, rnn.MIN_HIDDEN - 1), rnn.LSTM(4, rnn.MIN_HIDDEN)
    for packs in (True, False):
        monkeypatch.setattr(rnn, "packs_fp32", lambda packs=packs: packs)
        assert not small.by_own_pass(x)
        assert large.by_own_pass(x) == packs
        assert not large.by_own_pass(x.double())
        with torch.no_grad():
            assert not large.by_own_pass(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert small.by_own_pass(x)
            assert large.by_own_pass(x)


def test_in_fp32_a_small_layer_is_pytorchs_to_the_last_bit(layer, batch):
    twin = stock(layer).float()
    assert torch.equal(layer(*batch)[0], twin(*batch)[0])
