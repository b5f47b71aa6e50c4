"""The model is the stack that the papers describe: sizes, order of masks, tying, initialisation."""

import pytest
import torch
from torch import nn

from locked_dropout import dropout_mask
from model import RNNModel

OFF = dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0)
SMALL = {"emsize": 5, "nhid": 6, "nlayers": 3}


@pytest.mark.parametrize("words, flags, parameters", [
    (10_000, {}, 24_221_600),                                                     # PTB LSTM
    (33_278, {}, 33_556_078),                                                     # WT2 LSTM
    (50, {"emsize": 200, "nhid": 1000}, 13_787_650),                              # PTBC
    (205, {"emsize": 400, "nhid": 1840}, 47_270_045),                             # enwik8
])
def test_parameter_counts_of_the_papers(words, flags, parameters):
    with torch.device("meta"):
        assert RNNModel(words, **flags).parameter_count() == parameters


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("tied", [True, False])
def test_without_dropout_it_is_the_plain_stack(kind, tied):
    model = RNNModel(11, kind, **SMALL, tied=tied, **OFF)
    words = torch.randint(11, (7, 3))
    output, hidden, raw = model(words, model.init_hidden(3))
    x = model.encoder(words)
    for layer, rnn in enumerate(model.rnns):
        plain = getattr(nn, kind)(rnn.input_size, rnn.hidden_size)
        plain.load_state_dict(rnn.state_dict())
        x, state = plain(x)
        torch.testing.assert_close(hidden[layer], state)
    torch.testing.assert_close(output, x)
    torch.testing.assert_close(raw, x)
    assert output.shape == (7, 3, 5 if tied else 6)
    torch.testing.assert_close(model.logprob(output), torch.log_softmax(x @ model.decoder.weight.T, -1))


def test_masks_come_in_the_order_and_place_of_the_papers():
    model = RNNModel(11, **SMALL, dropout=0.1, dropouth=0.2, dropouti=0.3, dropoute=0.4, wdrop=0.5).double()
    words = torch.randint(11, (7, 3))
    torch.manual_seed(9)
    output, _, raw = model(words, model.init_hidden(3))

    def mask(p, *shape):
        return dropout_mask(raw, shape, p)

    plain = [nn.LSTM(rnn.input_size, rnn.hidden_size).double() for rnn in model.rnns]
    torch.manual_seed(9)
    x = (model.encoder.weight * mask(0.4, 11, 1))[words]
    x = x * mask(0.3, 1, 3, 5)
    for rnn, ours, size, p in zip(plain, model.rnns, (6, 6, 5), (0.2, 0.2, 0.1)):
        rnn.load_state_dict(ours.state_dict())
        with torch.no_grad():
            rnn.weight_hh_l0 *= mask(0.5, 4 * size, size)
        last = rnn(x)[0]
        x = last * mask(p, 1, 3, size)
    torch.testing.assert_close(raw, last)
    torch.testing.assert_close(output, x)


def test_state_dict_has_the_plain_names():
    names = {"encoder.weight", "decoder.weight", "decoder.bias"}
    for layer in range(3):
        names |= {f"rnns.{layer}.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    assert set(RNNModel(11, **SMALL).state_dict()) == names


def test_initial_weights():
    model = RNNModel(500, **SMALL, tied=False)
    for weight in (model.encoder.weight, model.decoder.weight):
        assert -0.1 <= weight.min() < -0.09 and 0.09 < weight.max() <= 0.1
    assert (model.decoder.bias == 0).all()


def test_every_row_of_the_embedding_learns():
    model = RNNModel(11, **SMALL, tied=False, **OFF)
    output, _, _ = model(torch.arange(11).unsqueeze(1), model.init_hidden(1))
    output.square().sum().backward()
    assert (model.encoder.weight.grad.abs().sum(1) > 0).all()


def test_hidden_state_carries_on():
    model = RNNModel(11, **SMALL).eval()
    words = torch.randint(11, (9, 2))
    whole, _, _ = model(words, model.init_hidden(2))
    first, hidden, _ = model(words[:4], model.init_hidden(2))
    second, _, _ = model(words[4:], hidden)
    torch.testing.assert_close(whole, torch.cat([first, second]))


def test_loss_is_the_mean_of_its_own_logprob():
    model = RNNModel(11, **SMALL).eval()
    words, targets = torch.randint(11, (9, 2)), torch.randint(11, (9, 2))
    output, _, _ = model(words, model.init_hidden(2))
    expected = -model.logprob(output).gather(-1, targets.unsqueeze(-1)).mean()
    torch.testing.assert_close(model.loss(output, targets), expected)
