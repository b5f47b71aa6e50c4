"""Fo-pooling, by a loop and by Triton, is exact forward and backward, and the QRNN layer is its equations."""

import os
import subprocess
import sys

import pytest
import torch

import qrnn
from model import RNNModel
from qrnn import QRNN, fo_pool
from steps import evaluate
from utils import batchify

WITH_TRITON = pytest.mark.skipif(qrnn.triton is None, reason="no Triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton asks for this when a kernel is defined
FO_POOLS = [
    pytest.param("FoPool", "cpu", id="loop"),
    pytest.param("TritonFoPool", "cpu", id="interpreted",
                 marks=pytest.mark.skipif(not INTERPRETING, reason="TRITON_INTERPRET is not 1")),
    pytest.param("TritonFoPool", "cuda", id="triton",
                 marks=[WITH_TRITON, pytest.mark.cuda("Triton's fo-pooling is the oracle's, gradcheck")]),
]
EACH_FO_POOL = pytest.mark.parametrize("name, device", FO_POOLS)


@WITH_TRITON
@pytest.mark.skipif(INTERPRETING, reason="this is the run under the interpreter")
def test_the_kernels_of_triton_under_its_interpreter():
    """The cases "interpreted" of the tests below, for which no GPU is needed."""
    command = [sys.executable, "-m", "pytest", __file__, "-k", "interpreted"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if " passed" not in done.stdout and "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("the interpreter of this Triton (3.2 is one) is older than this numpy (2.4)")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout, done.stdout


@pytest.mark.parametrize("missing", ["Triton", "a GPU", "a newer GPU", "a compiler"])
def test_without_triton_a_new_gpu_or_a_compiler_the_loop_runs(monkeypatch, missing):
    """A stand-in for the kernels says whether they were asked; by default all is there."""
    asked = []
    monkeypatch.setattr(qrnn.TritonFoPool, "apply", lambda *_: asked.append(True))
    monkeypatch.setattr(qrnn, "has_compiler", lambda: True)
    monkeypatch.setattr(qrnn, "triton", object())
    capability = [7, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
    monkeypatch.setattr(qrnn, "is_new_enough", qrnn.is_new_enough.__wrapped__)
    linear_map, start = torch.zeros(2, 1, 9), torch.zeros(1, 3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        fo_pool(linear_map, start)
        assert asked == [True]
        if missing == "Triton":
            patch.setattr(qrnn, "triton", None)
        elif missing == "a GPU":
            patch.setattr(torch.Tensor, "is_cuda", False)
        elif missing == "a newer GPU":
            capability[:] = 6, 1
        else:
            patch.setattr(qrnn, "has_compiler", lambda: False)
        output, _ = fo_pool(linear_map, start)
    assert output.shape == (2, 1, 3)
    assert asked == [True]


def test_a_compiler_is_one_that_triton_would_take(monkeypatch):
    qrnn.has_compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert not qrnn.has_compiler()
    qrnn.has_compiler.cache_clear()
    monkeypatch.setenv("CC", "gcc")
    assert qrnn.has_compiler()
    qrnn.has_compiler.cache_clear()


def naive(f, z, start):
    """The definition, with autograd recording every step."""
    h, states = start, []
    for f_t, z_t in zip(f, z):
        h = f_t * z_t + (1 - f_t) * h
        states.append(h)
    return torch.stack(states)


def naive_fo_pool(linear_map, start, zoneout_mask):
    """The definition, with autograd recording every step."""
    z, f, o = linear_map.chunk(3, -1)
    f = f.sigmoid()
    c = naive(f if zoneout_mask is None else f * zoneout_mask, z.tanh(), start)
    return o.sigmoid() * c, c[-1]


def fo_pool_inputs(device, steps, batch_size, hidden_size, zoneout):
    torch.manual_seed(0)
    linear_map, start = torch.randn(steps, batch_size, 3 * hidden_size), torch.randn(batch_size, hidden_size)
    zoneout_mask = torch.rand(steps, batch_size, hidden_size).double().to(device) if zoneout else None
    return linear_map.double().to(device).requires_grad_(), start.double().to(device).requires_grad_(), zoneout_mask


@EACH_FO_POOL
@pytest.mark.parametrize("zoneout", [False, True])
@pytest.mark.parametrize("shape", [(9, 4, 5), (8, 4, 5), (1, 4, 5), (9, 1, 1), (1, 1, 1), (3, 7, 300)])
def test_fo_pool_and_its_gradient_are_the_naive_loop(monkeypatch, name, device, shape, zoneout):
    """The loop works on 4 time steps together here, so it has several such blocks. In the tests below it has one."""
    monkeypatch.setattr(qrnn.FoPool, "VALUES", 1)
    *variables, zoneout_mask = fo_pool_inputs(device, *shape, zoneout)
    upstream = [torch.randn(size, dtype=torch.double).to(device) for size in (shape, shape[1:])]
    found, expected = (function(*variables, zoneout_mask) for function in (getattr(qrnn, name).apply, naive_fo_pool))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(outputs, variables, upstream) for outputs in (found, expected)))


@EACH_FO_POOL
@pytest.mark.parametrize("zoneout", [False, True])
def test_fo_pool_gradcheck(name, device, zoneout):
    assert torch.autograd.gradcheck(getattr(qrnn, name).apply, fo_pool_inputs(device, 5, 2, 3, zoneout))


@EACH_FO_POOL
def test_fo_pool_takes_tensors_that_are_not_contiguous(name, device):
    linear_map, start, _ = fo_pool_inputs(device, 6, 4, 8, False)
    inputs = linear_map.transpose(0, 1)[:, :, ::2], start[:1, 1::2].expand(6, 4), None
    upstream = [torch.randn(4, 4, 6).double().transpose(1, 2).to(device), torch.randn(4, 6).double().t().to(device)]
    found, expected = getattr(qrnn, name).apply(*inputs), naive_fo_pool(*inputs)
    torch.testing.assert_close(found, expected)
    variables = linear_map, start
    torch.testing.assert_close(*(torch.autograd.grad(outputs, variables, upstream) for outputs in (found, expected)))


@EACH_FO_POOL
def test_saturated_gates_are_exact(name, device):
    """Gates of 0 and 1, where a form by logarithms would give NaN: the state is kept, and replaced."""
    z, f, o = [1.0, -1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0], [1.0] * 4
    linear_map = torch.tensor([z, f, o], device=device).t().reshape(4, 1, 3) * 1e4
    output, last = getattr(qrnn, name).apply(linear_map, torch.zeros(1, 1, device=device), None)
    assert output.flatten().tolist() == [1.0, 1.0, 1.0, -1.0]
    assert last.item() == -1.0


@EACH_FO_POOL
def test_fo_pool_takes_a_linear_map_in_bfloat16(name, device):
    """Only its gradient is as short; state, output and their gradients are in fp32."""
    linear_map, start, _ = (part if part is None else part.detach().float().requires_grad_()
                            for part in fo_pool_inputs(device, 9, 4, 5, False))
    short = linear_map.detach().bfloat16().requires_grad_()
    output, last = getattr(qrnn, name).apply(short, start, None)
    expected, _ = naive_fo_pool(short.float(), start, None)
    assert output.dtype == last.dtype == torch.float32
    torch.testing.assert_close(output, expected)
    found, exact = (torch.autograd.grad(outputs.sum(), (short, start)) for outputs in (output, expected))
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, exact, atol=1e-2, rtol=1e-2)


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
    torch.testing.assert_close(moved[moved != 7], free[moved != 7])


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
