"""The peer's model is the one of its definition, its rate follows its schedule, and it needs enough text."""

import json
import math
import sys

import peer
import pytest
import torch

from process import run_script

NTOKEN = 11


def make_model():
    """A model whose weights are all large enough to matter."""
    torch.manual_seed(0)
    model = peer.Transformer(NTOKEN)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0, 0.2)
    return model


def normalised(x, weight):
    centred = x - x.mean()
    return centred / (centred.pow(2).mean() + 1e-5).sqrt() * weight


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def naive_losses(model, row):
    """The cross entropy of each token of a row but the first: one position, one head and one key at a time."""
    row, size = row.tolist(), peer.WIDTH // peer.HEADS
    stream = [model.tokens.weight[token] + model.places.weight[place] for place, token in enumerate(row[:-1])]
    for block in model.blocks:
        parts = [block.attention.weight @ normalised(x, block.norm_1.weight) for x in stream]
        after = []
        for place, x in enumerate(stream):
            heads = []
            for start in range(0, peer.WIDTH, size):
                q, k, v = (slice(start + part * peer.WIDTH, start + part * peer.WIDTH + size) for part in range(3))
                scores = [parts[place][q] @ parts[other][k] / math.sqrt(size) for other in range(place + 1)]
                total = sum(score.exp() for score in scores)
                heads.append(sum(score.exp() / total * parts[other][v] for other, score in enumerate(scores)))
            x = x + block.output.weight @ torch.cat(heads)
            after.append(x + block.down.weight @ gelu(block.up.weight @ normalised(x, block.norm_2.weight)))
        stream = after
    logits = [model.tokens.weight @ normalised(x, model.norm.weight) for x in stream]
    return [(values.exp().sum().log() - values[token]).item() for values, token in zip(logits, row[1:])]


@pytest.mark.usefixtures("in_float64")
def test_the_loss_is_that_of_a_naive_computation():
    model = make_model()
    tokens = torch.randint(NTOKEN, (2, 10))
    with torch.no_grad():
        expected = [loss for row in tokens for loss in naive_losses(model, row)]
        assert model.loss(tokens).item() == pytest.approx(sum(expected) / len(expected), rel=1e-9)


@torch.no_grad()
def test_the_weights_before_a_residual_sum_begin_smaller():
    """Each of the 2 L sums adds as much variance: their standard deviation is 0.02 / sqrt(2 L), that of others 0.02."""
    torch.manual_seed(0)
    for name, weight in peer.Transformer(NTOKEN).named_parameters():
        if weight.dim() == 2:
            last = name.split(".")[-2] in ("output", "down")
            expected = 0.02 / math.sqrt(2 * peer.LAYERS) if last else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.1), name


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit():
    model = make_model().eval()
    tokens = torch.randint(NTOKEN, (1, peer.CONTEXT))
    before = model(tokens)
    for place in (1, 30, peer.CONTEXT - 1):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % NTOKEN
        after = model(changed)
        assert torch.allclose(after[:, :place], before[:, :place], atol=1e-4)
        assert not torch.allclose(after[:, place], before[:, place], atol=1e-2)


@pytest.mark.usefixtures("in_float64")
@torch.no_grad()
def test_a_text_is_scored_in_pieces_each_by_itself():
    """Each token but the first is predicted once; what is left after the last whole piece is not."""
    model, pieces = make_model().eval(), 3
    ids = torch.randint(NTOKEN, (pieces * peer.CONTEXT + 1 + 20,))
    starts = [piece * peer.CONTEXT for piece in range(pieces)]
    expected = [model.loss(ids[start:start + peer.CONTEXT + 1].unsqueeze(0)).item() for start in starts]
    assert peer.evaluate(model, ids) == pytest.approx(sum(expected) / pieces, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [
    (0, 1e-3 / 101), (49, 50e-3 / 101), (99, 100e-3 / 101), (100, 1e-3), (1050, 5.5e-4),
    (100 + 1900 / 3, 1e-4 + 9e-4 * 0.75), (2000, 1e-4)])
def test_the_rate_rises_in_a_line_and_falls_as_a_cosine(step, expected):
    """In 2,000 steps: up to 0.001 in the first 100, half of the way down after 950 more, 0.0001 in the end."""
    assert peer.rate(step, 2000) == pytest.approx(expected, rel=1e-12)


# --- the command -----------------------------------------------------------------------------------------------------

@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script; returns the exit status and stderr."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["peer.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_script(peer.main)
        return end.value.code or 0, capsys.readouterr().err
    return call


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on a mat and saw one dog run by\n" * 20, encoding="utf-8")
    return path


def test_the_record_is_that_of_a_run(run, book, tmp_path):
    save = tmp_path / "peer.metrics.jsonl"
    for _ in range(2):  # the second one in place of the first
        assert run("--data", book, "--save", save, "--steps", "3", "--every", "2") == (0, "")
        begun, *epochs, test = map(json.loads, save.read_text().splitlines())
        assert begun["kind"] == "run"
        assert [line["epoch"] for line in epochs] == [2, 3]
        assert [line["total_tokens"] for line in epochs] == [steps * peer.BATCH * peer.CONTEXT for steps in (2, 3)]
        assert all(line["seconds"] > 0 for line in epochs)
        assert test["finished"]
        assert test["valid_loss"] == epochs[-1]["loss"]


def test_another_file_is_not_replaced(run, book):
    before = book.read_bytes()
    status, printed = run("--data", book, "--save", book)
    assert (status, len(printed.splitlines())) == (2, 1)
    assert book.read_bytes() == before


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--every", "-1"], ["--seed", "x"], ["--layers", "2"],
                                   ["--data", "nowhere.txt"], ["--save", "nowhere/x"], ["--save", "."], "short"])
def test_bad_flags_end_in_a_line_and_status_2(run, book, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    if flags == "short":
        book.write_text("too short to be read in pieces\n", encoding="utf-8")
        flags = []
    status, printed = run("--data", book, "--save", "record", *flags)
    assert status == 2
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "record").exists()


def test_both_flags_are_needed(run, book):
    assert run("--data", book)[0] == run("--save", "x")[0] == 2
