"""What only a GPU can show, run by `make gpu-check` under the names in the marks; elsewhere these tests skip."""

import pytest
import torch
from helpers import read_metrics, resumed_and_repeated

import dynamic
import finetune
import generate
import main
import pointer
import rnn
import splitcross
import steps
import weight_drop
from locked_dropout import dropout_mask
from model import RNNModel
from splitcross import SplitCrossEntropy

TINY = ["--emsize", "5", "--nhid", "6", "--nlayers", "2", "--batch_size", "4", "--bptt", "7", "--lr", "1"]


# --- layers ----------------------------------------------------------------------------------------------------------

@pytest.mark.cuda("weight drop acts under cuDNN, without warnings")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sizes", [(30, 50), (32, 64), (250, 250)])
@pytest.mark.parametrize("kind", [rnn.LSTM, rnn.GRU])
def test_a_padded_pass_under_cudnn_is_the_layer_on_a_cpu(kind, sizes, monkeypatch):
    torch.manual_seed(1)
    layer, x, h = kind(*sizes), torch.randn(9, 4, sizes[0]), torch.randn(1, 4, sizes[1])
    mask = dropout_mask(torch.empty(0), layer.weight_hh_l0.shape, 0.5)
    monkeypatch.setattr(weight_drop, "dropout_mask", lambda like, *_: mask.to(like.device))
    results = []
    for device in ("cpu", "cuda"):
        layer.to(device).zero_grad()
        places = [p.data_ptr() for p in layer.parameters()]
        start = h.to(device)
        output, _ = weight_drop.weight_drop(layer, "weight_hh_l0", 0.5, x.to(device),
                                            (start, start) if kind is rnn.LSTM else start)
        output.square().sum().backward()
        assert places == [p.data_ptr() for p in layer.parameters()]
        results.append([output.detach().cpu(), *(p.grad.cpu() for p in layer.parameters())])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.cuda("weight drop acts under cuDNN, without warnings")
def test_masks_are_fresh_in_every_pass_of_a_model():
    model = RNNModel(50, emsize=20, nhid=30, nlayers=2, dropout=0, dropouth=0, dropouti=0, dropoute=0, wdrop=0.5).cuda()
    tokens = torch.randint(50, (9, 4), device="cuda")
    first, second = (model(tokens, model.init_hidden(4))[0] for _ in range(2))
    assert not torch.allclose(first, second)
    model.eval()
    first, second = (model(tokens, model.init_hidden(4))[0] for _ in range(2))
    torch.testing.assert_close(first, second)


@pytest.mark.cuda("fp32 is fp32, TF32 and bfloat16 are what they are")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "QRNN"])
def test_precision_of_gradients(kind):
    torch.manual_seed(1)
    off = dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0)
    model = RNNModel(500, kind, emsize=128, nhid=256, nlayers=2, **off)
    tokens = torch.randint(500, (21, 8))

    def error(precision):
        model.float().cuda().zero_grad()
        steps.forward_backward(model, tokens[:-1].cuda(), tokens[1:].cuda(), model.init_hidden(8), alpha=2, beta=1,
                               precision=precision)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double().cpu()
        return ((gradient - exact).norm() / exact.norm()).item()

    model.double()
    steps.forward_backward(model, tokens[:-1], tokens[1:], model.init_hidden(8), alpha=2, beta=1)
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert error("fp32") < 1e-5
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 1e-5 < error("tf32") < 0.02
        assert 1e-4 < error("bf16") < 0.1
    assert error("fp32") < 1e-5, "TF32 was for that pass only"
    with torch.autocast("cuda", torch.bfloat16):
        output, _ = model.rnns[0](torch.randn(20, 8, 128, device="cuda"), model.init_hidden(8)[0])
    assert output.dtype == (torch.float32 if kind == "QRNN" else torch.bfloat16), "and not float16"


@pytest.mark.cuda("split softmax is that of the CPU")
@pytest.mark.parametrize("splits", [[], [20], [10, 30, 45]])
def test_split_softmax(splits, monkeypatch):
    monkeypatch.setattr(splitcross, "MIN_LOGITS", 0)
    torch.manual_seed(3)
    softmax = SplitCrossEntropy(8, 60, splits)
    for parameter in softmax.parameters():
        torch.nn.init.normal_(parameter)
    tensors = torch.randn(60, 8), torch.randn(60), torch.randn(50, 8)
    targets, results = torch.randint(60, (50,)), []
    for device in ("cpu", "cuda"):
        weight, bias, hidden = (tensor.to(device).requires_grad_() for tensor in tensors)
        loss = softmax.to(device)(weight, bias, hidden, targets.to(device))
        grads = torch.autograd.grad(loss, (weight, bias, hidden))
        results.append([loss.cpu(), *(grad.cpu() for grad in grads), softmax.logprob(weight, bias, hidden).cpu()])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --- runs ------------------------------------------------------------------------------------------------------------

@pytest.mark.cuda("a checkpoint of CUDA on a CPU and back")
@pytest.mark.parametrize("kind", ["LSTM", "QRNN"])
def test_devices_change_between_runs(train, tmp_path, kind):
    save = tmp_path / "m.pt"
    train(save, "--model", kind, "--cuda", "--epochs", "1")
    scores = []
    for device in ("--cuda", "--no-cuda"):
        pointer.main(["--save", str(save), "--window", "9", device])
        scores.append([line["loss"] for line in read_metrics(save)["pointer"][-2:]])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    for device, count in (("--no-cuda", 4), ("--cuda", 6), ("--no-cuda", 7)):
        _, metrics = train(save, "--model", kind, device, "--epochs", str(count), "--nonmono", "0", "--lr", "20",
                           "--resume", str(save))
        assert len(metrics["epoch"]) == count
    assert metrics["epoch"][-1]["optimizer"] == "ASGD"


@pytest.mark.cuda("resume is the run that never stopped, same seed same run")
@pytest.mark.parametrize("flags", [["--nonmono", "0", "--lr", "20"],
                                   ["--model", "QRNN", "--optimizer", "adam", "--lr", "0.01", "--when", "2"]])
def test_resume_and_repeat(train, tmp_path, flags):
    resumed_and_repeated(train, tmp_path, *flags)


@pytest.mark.cuda("every script runs")
def test_every_script(corpus_dir, tmp_path):
    save = str(tmp_path / "m.pt")
    data = ["--data", str(corpus_dir), "--cuda"]
    for precision in ("fp32", "tf32", "bf16"):
        assert main.main([*data, *TINY, "--epochs", "1", "--save", save, "--precision", precision, "--overwrite"]) == 0
    assert finetune.main([*data, "--epochs", "1", "--save", save]) == 0
    pointer.main([*data, "--save", save, "--window", "5", "20", "--theta", "1", "--lambdasm", "0.1"])
    dynamic.main([*data, "--save", save, "--batch_size", "4"])
    text = tmp_path / "text.txt"
    generate.main(["--cuda", "--checkpoint", save, "--words", "50", "--outf", str(text)])
    assert len(text.read_text().split()) >= 40
