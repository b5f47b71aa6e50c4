"""Fo-pooling and Triton's forget-mult are exact forward and backward, and the QRNN layer is its equations."""

import os
import subprocess
import sys

import pytest
import torch

import qrnn
from model import RNNModel
from qrnn import QRNN, FoPool, TritonForgetMult
from steps import evaluate
from utils import batchify

WITH_TRITON = pytest.mark.skipif(qrnn.triton is None, reason="no Triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton asks for this when a kernel is defined
DEVICES = [
    pytest.param("cuda", id="triton",
                 marks=[WITH_TRITON, pytest.mark.cuda("Triton's forget-mult is the oracle's, gradcheck")]),
    pytest.param("cpu", id="interpreted",
                 marks=pytest.mark.skipif(not INTERPRETING, reason="TRITON_INTERPRET is not 1")),
]


def naive(f, z, start):
    """The definition, with autograd recording every step."""
    h, states = start, []
    for f_t, z_t in zip(f, z):
        h = f_t * z_t + (1 - f_t) * h
        states.append(h)
    return torch.stack(states)


def inputs(device, shape, dtype=torch.double):
    torch.manual_seed(0)
    f, z, start = torch.rand(shape), torch.randn(shape), torch.randn(shape[1:])
    return [x.to(device, dtype).requires_grad_() for x in (f, z, start)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(9, 4, 5), (1, 4, 5), (9, 1, 1), (1, 1, 1), (3, 7, 300)])
def test_forget_mult_and_its_gradient_are_the_naive_loop(device, shape):
    given, same = inputs(device, shape), inputs(device, shape)
    upstream = torch.randn(shape, dtype=torch.double).to(device)
    h, expected = TritonForgetMult.apply(*given), naive(*same)
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(torch.autograd.grad(h, given, upstream), torch.autograd.grad(expected, same, upstream))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(5, 2, 3), (1, 1, 2)])
def test_forget_mult_gradcheck(device, shape):
    assert torch.autograd.gradcheck(TritonForgetMult.apply, inputs(device, shape))


@pytest.mark.parametrize("device", DEVICES)
def test_forget_mult_takes_inputs_that_are_not_contiguous(device):
    f, z, start = inputs(device, (6, 4, 8))
    f, z, start = f[:, :, ::2], z.transpose(0, 1).transpose(0, 1)[:, :, :4], start[:, 1::2]
    torch.testing.assert_close(TritonForgetMult.apply(f, z, start), naive(f, z, start))


@WITH_TRITON
@pytest.mark.skipif(INTERPRETING, reason="this is the run under the interpreter")
def test_the_kernels_of_triton_under_its_interpreter():
    """The cases "interpreted" of the tests above, for which no GPU is needed."""
    command = [sys.executable, "-m", "pytest", __file__, "-k", "interpreted"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if "8 failed" in done.stdout and "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("the interpreter of this Triton (3.2 is one) is older than this numpy (2.4)")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout, done.stdout


def naive_fo_pool(linear_map, start, zoneout_mask):
    """The definition, with autograd recording every step."""
    z, f, o = linear_map.chunk(3, -1)
    f = f.sigmoid()
    c = naive(f if zoneout_mask is None else f * zoneout_mask, z.tanh(), start)
    return o.sigmoid() * c, c[-1]


def fo_pool_inputs(steps, batch_size, hidden_size, zoneout):
    torch.manual_seed(0)
    linear_map, start = torch.randn(steps, batch_size, 3 * hidden_size), torch.randn(batch_size, hidden_size)
    zoneout_mask = torch.rand(steps, batch_size, hidden_size).double() if zoneout else None
    return linear_map.double().requires_grad_(), start.double().requires_grad_(), zoneout_mask


@pytest.mark.parametrize("zoneout", [False, True])
@pytest.mark.parametrize("shape", [(9, 4, 5), (8, 4, 5), (1, 4, 5), (9, 1, 1), (1, 1, 1), (3, 7, 300)])
def test_fo_pool_and_its_gradient_are_the_naive_loop(shape, zoneout):
    *variables, zoneout_mask = fo_pool_inputs(*shape, zoneout)
    upstream = torch.randn(shape, dtype=torch.double), torch.randn(shape[1:], dtype=torch.double)
    found, expected = (function(*variables, zoneout_mask) for function in (FoPool.apply, naive_fo_pool))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(outputs, variables, upstream) for outputs in (found, expected)))


@pytest.mark.parametrize("zoneout", [False, True])
def test_fo_pool_gradcheck(zoneout):
    assert torch.autograd.gradcheck(FoPool.apply, fo_pool_inputs(5, 2, 3, zoneout))


def test_fo_pool_takes_tensors_that_are_not_contiguous():
    linear_map, start, _ = fo_pool_inputs(6, 4, 8, False)
    inputs = linear_map.transpose(0, 1)[:, :, ::2], start[:1, 1::2].expand(6, 4), None
    upstream = torch.randn(4, 4, 6).double().transpose(1, 2), torch.randn(4, 6).double().t()
    found, expected = FoPool.apply(*inputs), naive_fo_pool(*inputs)
    torch.testing.assert_close(found, expected)
    variables = linear_map, start
    torch.testing.assert_close(*(torch.autograd.grad(outputs, variables, upstream) for outputs in (found, expected)))


def test_saturated_gates_are_exact():
    """Gates of 0 and 1, where a form by logarithms would give NaN: the state is kept, and replaced."""
    z, f, o = [1.0, -1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0], [1.0] * 4
    output, last = FoPool.apply(torch.tensor([z, f, o]).t().view(4, 1, 3) * 1e4, torch.zeros(1, 1), None)
    assert output.flatten().tolist() == [1.0, 1.0, 1.0, -1.0]
    assert last.item() == -1.0


@pytest.mark.parametrize("window", [1, 2])
def test_the_layer_is_its_equations(window):
    layer = QRNN(3, 4, window).double()
    x, c, previous = (torch.randn(*shape, dtype=torch.double) for shape in ((6, 2, 3), (1, 2, 4), (1, 2, 3)))
    h, hidden = layer(x, (c, previous) if window == 2 else (c,))
    weight_z, weight_f, weight_o = layer.linear.weight.split(4)
    bias_z, bias_f, bias_o = layer.linear.bias.split(4)
    state, last = c[0], previous[0]
    for t in range(6):
        source = torch.cat([x[t], last], -1) if window == 2 else x[t]
        z = torch.tanh(source @ weight_z.T + bias_z)
        f = torch.sigmoid(source @ weight_f.T + bias_f)
        o = torch.sigmoid(source @ weight_o.T + bias_o)
        state, last = f * z + (1 - f) * state, x[t]
        torch.testing.assert_close(h[t], o * state)
    torch.testing.assert_close(hidden[0][0], state)
    assert len(hidden) == window


def test_zoneout_keeps_units_in_training_and_slows_them_in_evaluation():
    torch.manual_seed(1)
    layer = QRNN(3, 500, zoneout=0.3).double()
    x, start = torch.randn(1, 2, 3, dtype=torch.double), layer.init_hidden(2)[0] + 7
    _, (moved,) = layer(x, (start,))
    assert (moved == 7).double().mean().item() == pytest.approx(0.3, abs=0.05)
    layer.eval()
    _, (slowed,) = layer(x, (start,))
    layer.zoneout = 0
    _, (free,) = layer(x, (start,))
    torch.testing.assert_close(slowed - 7, (free - 7) * 0.7)


@pytest.mark.parametrize("bptt", [1, 5, 33])
def test_evaluation_in_chunks_is_evaluation_at_once(bptt):
    """The previous input travels in the hidden state: where the chunks are cut makes no difference."""
    torch.manual_seed(0)
    model = RNNModel(11, "QRNN", emsize=5, nhid=6, nlayers=3).double()
    source = batchify(torch.randint(11, (150,)), 3)
    assert evaluate(model, source, bptt) == pytest.approx(evaluate(model, source, 1000), abs=1e-12)


def test_weight_drop_acts_on_the_linear_weight():
    model = RNNModel(11, "QRNN", emsize=5, nhid=6, nlayers=2, dropout=0, dropouth=0, dropouti=0, dropoute=0, wdrop=0.5)
    tokens = torch.randint(11, (7, 2))
    first, second = (model(tokens, model.init_hidden(2))[0] for _ in range(2))
    assert not torch.allclose(first[0], second[0]), "the linear map acts at every step, the first one too"
    names = [name for name, _ in model.named_parameters()]
    assert names == ["encoder.weight", "rnns.0.linear.weight", "rnns.0.linear.bias", "rnns.1.linear.weight",
                     "rnns.1.linear.bias", "decoder.bias"]
    assert model.rnns[0].linear.weight.shape == (18, 10)
    assert model.rnns[1].linear.weight.shape == (15, 6)
