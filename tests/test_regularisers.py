"""Weight drop, locked dropout and embedding dropout act as their equations say, on each device that is there."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from embed_regularize import embedded_dropout, look_up
from locked_dropout import dropout_mask, locked_dropout
from weight_drop import weight_drop

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda("weight drop acts under cuDNN, without warnings"))]
T, B, E, H = 7, 3, 5, 6


def test_mask_is_zero_or_rescaled_one_and_draws_as_bernoulli_():
    torch.manual_seed(3)
    mask = dropout_mask(torch.empty(0), (100, 100), 0.3)
    torch.manual_seed(3)
    assert torch.equal(mask, torch.empty(100, 100).bernoulli_(0.7) / 0.7)
    assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.98, 1e-6, 1 - 1e-6])
def test_a_large_mask_keeps_the_share_it_is_scaled_by(p):
    torch.manual_seed(3)
    mask = dropout_mask(torch.empty(0), (999, 1001), p)
    kept = mask[mask > 0].unique()
    assert len(kept) == 1
    assert 1 / kept.item() == pytest.approx(1 - p, abs=2**-15)
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert (mask > 0).double().mean().item() == pytest.approx(1 - p, abs=5 * deviation + 2**-15)
    columns = (mask > 0).double().mean(0)
    assert columns.std().item() == pytest.approx((p * (1 - p) / 999) ** 0.5, rel=0.15, abs=2e-3), "they are independent"
    assert not torch.equal(mask, dropout_mask(torch.empty(0), (999, 1001), p)) or not 0.01 < p < 0.99


def test_locked_dropout_drops_the_same_units_at_every_step():
    x = torch.rand(T, 40, H) + 1
    dropped = locked_dropout(x, 0.5)
    gone = dropped == 0
    assert (gone == gone[0]).all()
    assert gone.any()
    assert not gone.all()
    assert torch.allclose(dropped[~gone], 2 * x[~gone])
    assert not (gone[0] == gone[0][0]).all(), "columns have masks of their own"


def test_locked_dropout_leaves_evaluation_alone():
    x = torch.rand(T, B, H)
    assert locked_dropout(x, 0.5, training=False) is x


def test_embedding_dropout_is_the_lookup_in_a_masked_matrix():
    weight = torch.randn(11, E, dtype=torch.double, requires_grad=True)
    tokens, upstream = torch.randint(11, (T, B)), torch.randn(T, B, E, dtype=torch.double)
    torch.manual_seed(5)
    embedded = embedded_dropout(weight, tokens, 0.4)
    (gradient,) = torch.autograd.grad(embedded, weight, upstream)
    torch.manual_seed(5)
    masked = functional.embedding(tokens, weight * dropout_mask(weight, (11, 1), 0.4))
    (expected,) = torch.autograd.grad(masked, weight, upstream)
    assert (embedded == 0).any()
    torch.testing.assert_close(embedded, masked)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("count, lookups", [(2016, [2016]), (2017, [1009, 1008]), (3072, [1536, 1536]), (3073, [3073])])
def test_on_a_gpu_no_lookup_has_a_number_of_tokens_whose_gradient_has_a_race(count, lookups, monkeypatch):
    """PyTorch's kernel for up to 3,072 tokens is right up to 2,016 of them; that for more is another."""
    found, embedding = [], functional.embedding
    monkeypatch.setattr(functional, "embedding", lambda tokens, weight: (
        found.append(tokens.numel()), embedding(tokens, weight))[1])
    weight = torch.randn(11, E, dtype=torch.double, requires_grad=True)
    tokens, upstream = torch.randint(11, (1, count)), torch.randn(1, count, E, dtype=torch.double)
    whole = look_up(weight, tokens)
    assert found == [count], "on a CPU there is one lookup"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    parts = look_up(weight, tokens)
    assert found[1:] == lookups
    assert torch.equal(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(out, weight, upstream) for out in (parts, whole)))


def recurrent(kind, device):
    torch.manual_seed(1)
    return kind(E, H).to(device), torch.randn(T, B, E, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.filterwarnings("error")  # cuDNN warns when weights are not one contiguous chunk
class TestWeightDrop:
    def test_acts_on_the_recurrence_only(self, kind, device):
        rnn, x = recurrent(kind, device)
        first, _ = weight_drop(rnn, "weight_hh_l0", 0.5, x)
        second, _ = weight_drop(rnn, "weight_hh_l0", 0.5, x)
        torch.testing.assert_close(first[0], second[0])  # from a zero state the first step knows no W_hh
        assert all(not torch.allclose(a, b) for a, b in zip(first[1:], second[1:]))

    def test_is_the_module_with_a_masked_weight(self, kind, device):
        rnn, x = recurrent(kind, device)
        torch.manual_seed(2)
        dropped, _ = weight_drop(rnn, "weight_hh_l0", 0.5, x)
        torch.manual_seed(2)
        with torch.no_grad():
            rnn.weight_hh_l0.mul_(dropout_mask(rnn.weight_hh_l0, rnn.weight_hh_l0.shape, 0.5))
        torch.testing.assert_close(dropped, rnn(x)[0])

    def test_repeats_in_evaluation_and_comes_back_in_training(self, kind, device):
        rnn, x = recurrent(kind, device)
        trained, _ = weight_drop(rnn, "weight_hh_l0", 0.5, x)
        rnn.eval()
        first, _ = weight_drop(rnn, "weight_hh_l0", 0.5, x)
        second, _ = weight_drop(rnn, "weight_hh_l0", 0.5, x)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, rnn(x)[0])
        rnn.train()
        again, _ = weight_drop(rnn, "weight_hh_l0", 0.5, x)
        assert not torch.allclose(again, first)
        assert not torch.allclose(again, trained)
        again.sum().backward()
        assert rnn.weight_hh_l0.grad.abs().sum() > 0

    def test_leaves_the_parameter_alone_and_masks_its_gradient(self, kind, device):
        rnn, x = recurrent(kind, device)
        names, before = list(rnn.state_dict()), rnn.weight_hh_l0.detach().clone()
        torch.manual_seed(2)
        weight_drop(rnn, "weight_hh_l0", 0.5, x)[0].sum().backward()
        torch.manual_seed(2)
        kept = dropout_mask(before, before.shape, 0.5) > 0
        assert torch.equal(rnn.weight_hh_l0, before)
        assert isinstance(rnn.weight_hh_l0, nn.Parameter)
        assert list(rnn.state_dict()) == names == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
        assert (rnn.weight_hh_l0.grad[kept] != 0).all()
        assert (rnn.weight_hh_l0.grad[~kept] == 0).all()

    def test_at_rate_zero_is_the_module(self, kind, device):
        rnn, x = recurrent(kind, device)
        torch.testing.assert_close(weight_drop(rnn, "weight_hh_l0", 0, x)[0], rnn(x)[0])

    def test_puts_the_parameter_back_when_the_pass_raises(self, kind, device):
        rnn, x = recurrent(kind, device)
        parameter = rnn.weight_hh_l0
        with pytest.raises(RuntimeError):
            weight_drop(rnn, "weight_hh_l0", 0.5, x[:, :, :2])
        assert rnn.weight_hh_l0 is parameter
