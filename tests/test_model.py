"""The model is the stack that the papers describe: sizes, order of masks, tying, initialisation."""

import pytest
import torch
from torch import nn

import finetune
import main
from locked_dropout import dropout_mask
from model import ARCHITECTURE, DROPOUTS, RNNModel

OFF = dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0)
SMALL = {"emsize": 5, "nhid": 6, "nlayers": 3}


LSTM_PTB = "--batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epoch 500 --save PTB.pt"
QRNN_PTB = ("--model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400 --dropouth 0.3 "
            "--seed 9001 --dropouti 0.4 --epochs 550 --save PTB.pt")
QRNN_WT2 = ("--epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 --nhid 1550 --nlayers 4 "
            "--seed 4002 --model QRNN --wdrop 0.1 --batch_size 40 --save WT2.pt")
QRNN_WT103 = ("--epochs 14 --nlayers 4 --emsize 400 --nhid 2500 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.1 "
              "--dropouti 0.1 --dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140 --batch_size 60 "
              "--optimizer adam --lr 1e-3 --data data/wikitext-103 --save WT103.12hr.QRNN.pt --when 12 --model QRNN")
PTBC = ("--epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.25 "
        "--dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 --batch_size 128 "
        "--optimizer adam --lr 2e-3 --data data/pennchar --save PTBC.pt --when 300 400")
ENWIK8 = ("--epochs 50 --nlayers 3 --emsize 400 --nhid 1840 --alpha 0 --beta 0 --dropoute 0 --dropouth 0.1 "
          "--dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200 --batch_size 128 "
          "--optimizer adam --lr 1e-3 --data data/enwik8 --save ENWIK8.pt --when 25 35")


@pytest.mark.parametrize("recipe, ntoken, parameters", [
    (LSTM_PTB, 10_000, 24_221_600), (QRNN_PTB, 10_000, 24_020_150),
    ("--epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882", 33_278, 33_556_078),
    (QRNN_WT2, 33_278, 33_354_628), (QRNN_WT103, 267_735, 153_886_638), (PTBC, 50, 13_787_650),
    (ENWIK8, 205, 47_270_045),
])
def test_recipes_of_the_papers_and_their_parameter_counts(recipe, ntoken, parameters):
    args = main.parse_flags(recipe.split())
    with torch.device("meta"):
        model = RNNModel(ntoken, **{name: getattr(args, name) for name in ARCHITECTURE + DROPOUTS})
    assert model.parameter_count() == parameters


def test_what_the_recipes_leave_out_is_as_in_the_papers():
    """1708.02182, section 5, and its code for WikiText-2: their commands say only what differs from this."""
    expected = {"dropout": 0.4, "dropouth": 0.3, "dropouti": 0.65, "dropoute": 0.1, "wdrop": 0.5, "alpha": 2, "beta": 1,
                "wdecay": 1.2e-6, "optimizer": "sgd", "clip": 0.25, "bptt": 70, "batch_size": 80, "nonmono": 5,
                "when": []}
    args = main.parse_flags([])
    assert {name: getattr(args, name) for name in expected} == expected
    assert main.DEFAULT_LR["sgd"] == finetune.LR == 30


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("tied", [True, False])
def test_without_dropout_it_is_the_plain_stack(kind, tied):
    model = RNNModel(11, kind, **SMALL, tied=tied, **OFF)
    tokens = torch.randint(11, (7, 3))
    output, hidden, raw = model(tokens, model.init_hidden(3))
    x = model.encoder(tokens)
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
    tokens = torch.randint(11, (7, 3))
    torch.manual_seed(9)
    output, _, raw = model(tokens, model.init_hidden(3))

    def mask(p, *shape):
        return dropout_mask(raw, shape, p)

    plain = [nn.LSTM(rnn.input_size, rnn.hidden_size).double() for rnn in model.rnns]
    torch.manual_seed(9)
    x = (model.encoder.weight * mask(0.4, 11, 1))[tokens]
    x = x * mask(0.3, 1, 3, 5)
    for rnn, layer, size, p in zip(plain, model.rnns, (6, 6, 5), (0.2, 0.2, 0.1)):
        rnn.load_state_dict(layer.state_dict())
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
        assert -0.1 <= weight.min() < -0.09
        assert 0.09 < weight.max() <= 0.1
    assert (model.decoder.bias == 0).all()


def test_every_row_of_the_embedding_learns():
    model = RNNModel(11, **SMALL, tied=False, **OFF)
    output, _, _ = model(torch.arange(11).unsqueeze(1), model.init_hidden(1))
    output.square().sum().backward()
    assert (model.encoder.weight.grad.abs().sum(1) > 0).all()


def test_hidden_state_carries_on():
    model = RNNModel(11, **SMALL).eval()
    tokens = torch.randint(11, (9, 2))
    whole, _, _ = model(tokens, model.init_hidden(2))
    first, hidden, _ = model(tokens[:4], model.init_hidden(2))
    second, _, _ = model(tokens[4:], hidden)
    torch.testing.assert_close(whole, torch.cat([first, second]))


def test_loss_is_the_mean_of_its_own_logprob():
    model = RNNModel(11, **SMALL).eval()
    tokens, targets = torch.randint(11, (9, 2)), torch.randint(11, (9, 2))
    output, _, _ = model(tokens, model.init_hidden(2))
    expected = -model.logprob(output).gather(-1, targets.unsqueeze(-1)).mean()
    torch.testing.assert_close(model.loss(output, targets), expected)
