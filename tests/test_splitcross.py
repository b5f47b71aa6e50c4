"""The split softmax is a distribution, and its loss, its log-probabilities and the recorded ones agree."""

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from helpers import read_metrics
from torch.nn import functional

import checkpoint
import finetune
import generate
import optimizers
import pointer
import splitcross
from model import RNNModel
from splitcross import GPUSoftmaxLoss, SoftmaxLoss, SplitCrossEntropy, splits_for

FOLDER = Path(__file__).parent / "reference"
RECORDED = json.loads((FOLDER / "splitcross.json").read_text())
SPLITS = [(), (20,), (10, 30), (10, 30, 45), (1, 2, 59)]


def arrays():
    with numpy.load(FOLDER / "splitcross.npz") as content:
        return {name: torch.from_numpy(content[name]) for name in content}


def make(splits, words=60, size=8, rows=50):
    torch.manual_seed(3)
    softmax = SplitCrossEntropy(size, words, splits).double()
    with torch.no_grad():
        for parameter in softmax.parameters():
            parameter.normal_()
    weight, bias, hidden = (torch.randn(*shape, dtype=torch.double, requires_grad=True)
                            for shape in ((words, size), (words,), (rows, size)))
    return softmax, weight, bias, hidden, torch.randint(words, (rows,))


@pytest.mark.parametrize("case", range(len(RECORDED["cases"])))
def test_loss_and_logprob_are_those_recorded(case):
    recorded, given = RECORDED["cases"][case], arrays()
    softmax = SplitCrossEntropy(8, 60, recorded["splits"])
    softmax.load_state_dict({"tail_vectors": given[f"tail_vectors_{case}"], "tail_bias": given[f"tail_bias_{case}"]})
    loss = softmax(given["weight"], given["bias"], given["hidden"], given["targets"])
    assert loss.item() == pytest.approx(recorded["loss"], abs=1e-5)
    logprob = softmax.logprob(given["weight"], given["bias"], given["hidden"])
    torch.testing.assert_close(logprob, given[f"logprob_{case}"], atol=1e-5, rtol=0)


def test_without_a_split_it_is_plain_cross_entropy():
    given = arrays()
    loss = SplitCrossEntropy(8, 60)(given["weight"], given["bias"], given["hidden"], given["targets"])
    assert loss.item() == pytest.approx(RECORDED["unsplit_loss"], abs=1e-5)
    logits = functional.linear(given["hidden"], given["weight"], given["bias"])
    torch.testing.assert_close(loss, functional.cross_entropy(logits, given["targets"]))
    assert not list(SplitCrossEntropy(8, 60).parameters())


@pytest.mark.parametrize("splits", SPLITS)
def test_it_is_a_distribution_whose_loss_is_its_own_logprob(splits):
    softmax, weight, bias, hidden, targets = make(splits)
    logprob = softmax.logprob(weight, bias, hidden)
    torch.testing.assert_close(logprob.exp().sum(1), torch.ones(50, dtype=torch.double))
    expected = logprob.gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(softmax.target_logprob(weight, bias, hidden, targets), expected)
    torch.testing.assert_close(softmax(weight, bias, hidden, targets), -expected.mean())


@pytest.mark.parametrize("most, largest", [(10_000, 50 * 60), (1000, 13 * 60), (59, 60)])
@torch.no_grad()
def test_without_gradient_few_logits_are_in_memory_at_a_time(monkeypatch, most, largest):
    """50 rows of 60 words: in one block, in four, and each row alone where no block is small enough."""
    softmax, weight, bias, hidden, targets = make(())
    expected = softmax.logprob(weight, bias, hidden).gather(1, targets.unsqueeze(1)).squeeze(1)
    monkeypatch.setattr(splitcross, "MAX_LOGITS", most)
    sizes, linear = [], functional.linear
    monkeypatch.setattr(functional, "linear", lambda *args: (found := linear(*args), sizes.append(found.numel()))[0])
    torch.testing.assert_close(softmax.target_logprob(weight, bias, hidden.view(10, 5, -1), targets.view(10, 5)),
                               expected.view(10, 5))
    torch.testing.assert_close(softmax(weight, bias, hidden, targets), -expected.mean())
    assert max(sizes) == largest


@pytest.mark.parametrize("targets", [[0, 1, 2], [0, 59, 59], [35, 35, 35], [59]])
def test_splits_without_a_target(targets):
    """Batches whose targets are all in the head, in one tail, and a single target."""
    softmax, weight, bias, hidden, _ = make((10, 30, 45), rows=len(targets))
    targets = torch.tensor(targets)
    expected = softmax.logprob(weight, bias, hidden).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(softmax.target_logprob(weight, bias, hidden, targets), expected)
    softmax(weight, bias, hidden, targets).backward()
    assert softmax.tail_vectors.grad.abs().sum() > 0, "tombstones compete for the head's probability"


@pytest.mark.parametrize("splits", SPLITS)
def test_loss_gradcheck(splits):
    softmax, weight, bias, hidden, targets = make(splits, rows=6)
    parameters = dict(softmax.named_parameters())

    def loss(weight, bias, hidden, *values):
        return torch.func.functional_call(softmax, dict(zip(parameters, values)), (weight, bias, hidden, targets))

    assert torch.autograd.gradcheck(loss, (weight, bias, hidden, *parameters.values()))


def test_a_vocabulary_smaller_than_the_last_split_has_fewer_tails():
    assert SplitCrossEntropy(8, 60, (20, 60)).sizes == [20, 40]
    assert SplitCrossEntropy(8, 60, (20, 40, 100)).sizes == [20, 20, 20]
    assert SplitCrossEntropy(8, 60, (100, 200)).sizes == [60]


@pytest.mark.parametrize("words, splits", [
    (75_000, []), (75_001, [2800, 20_000, 76_000]),
    (500_000, [2800, 20_000, 76_000]), (500_001, [4200, 35_000, 180_000]),
])
def test_where_the_papers_split(words, splits):
    assert splits_for(words) == splits


def test_memory_is_that_of_the_splits_in_use():
    """No tensor of the pass has more columns than its split has words, or more rows than have their target there."""
    softmax, weight, bias, hidden, _ = make((10, 30))
    targets = torch.tensor([3] * 46 + [15] * 3 + [50])
    seen, linear = [], functional.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", lambda *arguments: (seen.append(linear(*arguments)), seen[-1])[1])
        softmax(weight, bias, hidden, targets)
    assert [tuple(logits.shape) for logits in seen] == [(50, 12), (3, 20), (1, 30)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "asgd", "adam"])
def test_tail_vectors_train_and_are_averaged_as_all_else(optimizer, tied):
    torch.manual_seed(0)
    model = RNNModel(20, emsize=5, nhid=6, nlayers=2, tied=tied, splits=(4, 10))
    tokens, targets = torch.randint(20, (7, 3)), torch.randint(20, (7, 3))
    optimizer = optimizers.make_optimizer(optimizer, model, 0.1, 0)
    for _ in range(3):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.zero_grad()
        output, _, _ = model(tokens, model.init_hidden(3))
        model.loss(output, targets).backward()
        optimizer.step()
        assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    current = model.softmax.tail_vectors.detach().clone()
    with optimizers.averaged_weights(optimizer):
        assert torch.equal(model.softmax.tail_vectors, current) != optimizers.is_averaging(optimizer)


def test_model_loss_and_logprobs_agree_with_splits():
    torch.manual_seed(0)
    model = RNNModel(20, emsize=5, nhid=6, nlayers=2, splits=(4, 10)).double().eval()
    tokens, targets = torch.randint(20, (7, 3)), torch.randint(20, (7, 3))
    output, _, _ = model(tokens, model.init_hidden(3))
    expected = model.logprob(output).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(model.target_logprob(output, targets), expected)
    torch.testing.assert_close(model.loss(output, targets), -expected.mean())


def test_every_script_works_with_a_split_softmax(train, corpus_dir, tmp_path, monkeypatch):
    """Training through the switch to ASGD, fine-tuning, cache and generation; what is saved has the tails."""
    monkeypatch.setattr("model.splits_for", lambda _: [3, 7])
    save = str(tmp_path / "m.pt")
    train(tmp_path / "m.pt", "--epochs", "4", "--nonmono", "0", "--lr", "20")
    finetune.main(["--no-cuda", "--data", str(corpus_dir), "--save", save, "--epochs", "1"])
    pointer.main(["--no-cuda", "--save", save, "--window", "20"])
    generate.main(["--no-cuda", "--checkpoint", save, "--words", "20", "--outf", str(tmp_path / "text.txt")])
    metrics = read_metrics(tmp_path / "m.pt")
    assert metrics["switch"]
    assert len((tmp_path / "text.txt").read_text().split()) == 20
    assert metrics["pointer"][1]["loss"] < 3
    assert checkpoint.load(save)["model"]["softmax.tail_vectors"].abs().sum() > 0


@pytest.mark.parametrize("rows, part", [(1, 1), (7, 3), (7, 100), (100, 3), (100, 100)])
def test_the_loss_in_blocks_and_its_gradients_are_those_of_cross_entropy(monkeypatch, rows, part):
    monkeypatch.setattr(SoftmaxLoss, "ROWS", rows)
    monkeypatch.setattr(SoftmaxLoss, "PART", part)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((20, 5), (11, 5), (11,))]
    targets = torch.randint(11, (20,))
    (3 * SoftmaxLoss.apply(*inputs, targets)).backward()
    gradients = [tensor.grad.clone() for tensor in inputs]
    loss = 3 * functional.cross_entropy(functional.linear(*inputs), targets)
    torch.testing.assert_close(3 * SoftmaxLoss.apply(*inputs, targets), loss)
    for gradient, expected in zip(gradients, torch.autograd.grad(loss, inputs)):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("logits", [1, 11 * 7, 2**20])
@pytest.mark.parametrize("rows, words, size", [(20, 11, 5), (20, 16, 16), (20, 33, 16), (1, 11, 32)])
def test_the_loss_of_a_gpu_and_its_gradients_are_those_of_cross_entropy(monkeypatch, rows, words, size, logits):
    """With pads and without, in blocks of one row, of some, and of all."""
    monkeypatch.setattr(GPUSoftmaxLoss, "LOGITS", logits)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True)
              for shape in ((rows, size), (words, size), (words,))]
    targets = torch.randint(words, (rows,))
    (3 * GPUSoftmaxLoss.apply(*inputs, targets)).backward()
    loss = 3 * functional.cross_entropy(functional.linear(*inputs), targets)
    torch.testing.assert_close(3 * GPUSoftmaxLoss.apply(*inputs, targets), loss)
    for tensor, expected in zip(inputs, torch.autograd.grad(loss, inputs)):
        torch.testing.assert_close(tensor.grad, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("as_a_gpu")
def test_on_a_gpu_the_products_of_the_loss_have_whole_vectors(monkeypatch):
    monkeypatch.setattr(splitcross, "MIN_LOGITS", 0)
    shapes, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *factors: (shapes.append([part.shape for part in factors]),
                                                          addmm(*factors))[1])
    hidden = torch.randn(7, 3, 5, requires_grad=True)
    SplitCrossEntropy(5, 11, [])(torch.randn(11, 5), torch.randn(11), hidden, torch.randint(11, (7, 3))).backward()
    assert shapes == [[(16,), (21, 16), (16, 16)]]


@pytest.mark.parametrize("function", [SoftmaxLoss, GPUSoftmaxLoss])
@pytest.mark.parametrize("target, expected", [(0, math.log(2)), (1, 1e4 + math.log(2)), (3, 2e4 + math.log(2))])
def test_the_loss_is_exact_for_large_logits_and_probabilities_below_all_numbers(target, expected, function):
    bias = torch.tensor([1e4, 0.0, 1e4, -1e4])
    loss = function.apply(torch.zeros(1, 1), torch.zeros(4, 1), bias, torch.tensor([target]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_the_loss_in_bfloat16_has_gradients_to_the_precision_of_bfloat16(monkeypatch, on_a_gpu):
    monkeypatch.setattr(splitcross, "MIN_LOGITS", 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", on_a_gpu)
    torch.manual_seed(0)
    softmax, targets = SplitCrossEntropy(5, 11, []), torch.randint(11, (20, 3))
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((11, 5), (11,), (20, 3, 5))]
    expected = torch.autograd.grad(functional.cross_entropy(
        functional.linear(inputs[2], *inputs[:2]).flatten(0, 1), targets.flatten()), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = softmax(*inputs, targets)
    assert loss.dtype == torch.float32
    for found, exact in zip(torch.autograd.grad(loss, inputs), expected):
        assert found.dtype == torch.float32
        assert 1e-4 * exact.norm() < (found - exact).norm() < 0.02 * exact.norm()
