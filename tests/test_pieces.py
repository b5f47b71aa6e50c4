"""The loss of a model in pieces that are read by themselves, beside the loss over the whole text."""

import re

import pieces
import pytest
import torch

from errors import BadInput
from model import RNNModel


@pytest.mark.parametrize("length", [1, 3, 64])
def test_a_piece_knows_nothing_of_what_came_before(length):
    """Token by token: the state begins anew at each piece, or goes on. Ten tokens after the last piece do not count."""
    torch.manual_seed(1)
    model = RNNModel(11, emsize=6, nhid=7, nlayers=2).double()
    ids = torch.randint(11, (300 // length * length + 1 + min(10, length - 1), 1))
    found, naive = pieces.losses(model, ids, length), []
    for anew in (True, False):
        hidden, total, tokens = model.init_hidden(1), 0.0, 300 // length * length
        for i in range(tokens):
            hidden = model.init_hidden(1) if anew and i % length == 0 else hidden
            output, hidden, _ = model(ids[i:i + 1], hidden)
            scores = output[0, 0] @ model.decoder.weight.t() + model.decoder.bias
            total -= torch.log_softmax(scores, 0)[ids[i + 1, 0]].item()
        naive.append(total / tokens)
    assert found == pytest.approx(naive, abs=1e-12)
    assert found[0] != pytest.approx(found[1], abs=1e-6)


def test_a_model_is_scored_on_the_validation_text_that_it_was_trained_with(train, tmp_path, capsys):
    """Of 66 tokens 65 can be predicted. Read as one piece they are what they are with the state carried."""
    book = tmp_path / "book.txt"
    book.write_text("the cat sat on a mat and saw one dog run by\n" * 30, encoding="utf-8")
    train(tmp_path / "m.pt", "--data", str(book), "--level", "char", "--epochs", "1", "--batch_size", "4")
    capsys.readouterr()
    pieces.main([str(tmp_path / "m.pt"), "--length", "65"])
    alone, carried = re.findall(r" (\d\.\d+) ", capsys.readouterr().out)
    assert alone == carried
    with pytest.raises(BadInput, match="too few"):
        pieces.main([str(tmp_path / "m.pt"), "--length", "66"])
