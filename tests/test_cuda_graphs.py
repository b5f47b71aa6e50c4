"""What only a GPU can show of CUDA graphs, run by `make gpu-check`; elsewhere these tests skip, but for one."""

from functools import partial

import pytest
import torch
from helpers import CLOSE, Recorder, epochs, resumed_and_repeated

import steps
from graphs import CudaGraphs, GraphedPass
from model import RNNModel

OFF = dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda("a replay is the eager pass"))])
@pytest.mark.parametrize("nhid", [250, 256])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "QRNN"])
def test_a_replay_is_the_eager_pass(kind, nhid, device):
    """Padded or not, and of a size for which cuDNN takes the kernels of large layers; on a CPU with a stand-in."""
    torch.manual_seed(1)
    model = RNNModel(500, kind, emsize=128, nhid=nhid, nlayers=2, **OFF).to(device)
    run = GraphedPass(partial(steps.forward_backward, alpha=2, beta=1, keep_grads=True),
                      CudaGraphs() if device == "cuda" else Recorder(model))
    tokens, found = torch.randint(500, (5, 11, 4), device=device), []
    for batch in tokens:
        hidden, loss_and_norm = run(model, batch[:-1], batch[1:], model.init_hidden(4))
        found.append([loss_and_norm, hidden[0][0], *(p.grad.clone() for p in model.parameters())])
    for batch, (loss_and_norm, state, *gradients) in zip(tokens, found):
        model.zero_grad()
        hidden, expected = steps.forward_backward(model, batch[:-1], batch[1:], model.init_hidden(4), alpha=2, beta=1)
        torch.testing.assert_close(loss_and_norm, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(state, hidden[0][0], atol=1e-4, rtol=1e-4)
        for gradient, parameter in zip(gradients, model.parameters()):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.cuda("training by graphs is training")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "QRNN"])
def test_training_by_graphs_is_training(train, tmp_path, kind, precision):
    flags = ["--cuda", "--model", kind, "--epochs", "4", "--precision", precision]  # at a rate that is not chaotic
    runs = [train(tmp_path / f"{name}.pt", *flags, f"--{name}")[1] for name in ("cuda-graphs", "no-cuda-graphs")]
    assert epochs(runs[0]) == pytest.approx(epochs(runs[1]), abs=CLOSE if precision == "fp32" else 0.02)


@pytest.mark.cuda("training by graphs is training")
def test_resume_and_repeat_with_graphs(train, tmp_path):
    resumed_and_repeated(train, tmp_path, "--nonmono", "0", "--lr", "20", "--cuda-graphs")


@pytest.mark.cuda("masks differ between the replays of a graph")
@pytest.mark.parametrize("dropped", ["dropout", "dropouth", "dropouti", "dropoute", "wdrop"])
@pytest.mark.parametrize("kind", ["LSTM", "QRNN"])
def test_masks_are_fresh_in_every_replay(kind, dropped):
    model = RNNModel(50, kind, emsize=20, nhid=30, nlayers=2, **{**OFF, dropped: 0.5}).cuda()
    run = GraphedPass(partial(steps.forward_backward, keep_grads=True))
    tokens = torch.randint(50, (10, 4), device="cuda")
    losses = []
    for _ in range(5):
        _, loss_and_norm = run(model, tokens[:-1], tokens[1:], model.init_hidden(4))
        losses.append(loss_and_norm[0].item())
    assert len(set(losses)) == 5


@pytest.mark.cuda("masks differ between the replays of a graph")
def test_without_dropout_replays_repeat():
    model = RNNModel(50, emsize=20, nhid=30, nlayers=2, **OFF).cuda()
    run = GraphedPass(partial(steps.forward_backward, keep_grads=True))
    tokens = torch.randint(50, (10, 4), device="cuda")
    losses = [run(model, tokens[:-1], tokens[1:], model.init_hidden(4))[1][0].item() for _ in range(4)]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-6)
