"""What a step, an evaluation and a run do otherwise on a GPU, shown on a CPU."""

import math
import pickle
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import read_metrics, same_weights

import checkpoint
import optimizers
import run_files
import steps
import training
from model import RNNModel
from utils import batchify

OFF = dict.fromkeys(("dropout", "dropouth", "dropouti", "dropoute", "wdrop"), 0)
RATES = [30.0, 28.7, 15.1, 31.3, 30.0, 29.9]


def small_model(dtype=torch.float32):
    torch.manual_seed(4)
    return RNNModel(11, emsize=5, nhid=6, nlayers=2, **OFF).to(dtype)


def step_by_gradients(optimizer, model, rates):
    """Steps with gradients that depend on the weights, each with a rate of its own."""
    for number, rate in enumerate(rates):
        for parameter in model.parameters():
            parameter.grad = (parameter.detach() * 3 + number).sin() / 100
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 4e-7)])
def test_asgd_of_a_gpu_is_that_of_pytorch_and_so_is_its_state(dtype, tolerance, request):
    if dtype == torch.float64:
        request.getfixturevalue("in_float64")
    models = [small_model(dtype) for _ in range(2)]
    made = [kind(model.parameters(), lr=30.0, t0=0, lambd=0.0, weight_decay=0.01)
            for kind, model in zip((optimizers.ASGD, torch.optim.ASGD), models)]
    for optimizer, model in zip(made, models):
        step_by_gradients(optimizer, model, RATES)
    for found, expected in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        ours, theirs = (optimizer.state[p] for optimizer, p in zip(made, (found, expected)))
        assert set(ours) == set(theirs)
        for name in ("step", "eta", "mu"):
            assert torch.equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
        torch.testing.assert_close(ours["ax"], theirs["ax"], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("first, second", [(optimizers.ASGD, torch.optim.ASGD), (torch.optim.ASGD, optimizers.ASGD),
                                           (optimizers.ASGD, optimizers.ASGD)])
def test_asgd_goes_on_with_a_state_of_either_kind(first, second):
    models = [small_model() for _ in range(2)]
    settings = {"lr": 30.0, "t0": 0, "lambd": 0.0, "weight_decay": 0.01}
    whole, begun = (first(model.parameters(), **settings) for model in models)
    step_by_gradients(whole, models[0], RATES)
    step_by_gradients(begun, models[1], RATES[:4])
    resumed = second(models[1].parameters(), **settings)
    checkpoint.restore_optimizer(resumed, begun.state_dict())
    for parameter in models[1].parameters():
        assert resumed.state[parameter]["step"] == 4
    for number in range(4, 6):
        for parameter in models[1].parameters():
            parameter.grad = (parameter.detach() * 3 + number).sin() / 100
        resumed.param_groups[0]["lr"] = RATES[number]
        resumed.step()
    for found, expected in zip(models[1].parameters(), models[0].parameters()):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(resumed.state[found]["ax"], whole.state[expected]["ax"], atol=1e-6, rtol=1e-6)
    if first is second:
        assert all(map(torch.equal, models[1].parameters(), models[0].parameters()))


def test_asgd_of_a_gpu_keeps_its_scalars_on_the_cpu_when_another_process_takes_it_over(monkeypatch):
    optimizer, moved, cpu = optimizers.ASGD(small_model().parameters(), lr=30.0, t0=0, lambd=0.0), [], torch.Tensor.cpu
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: (moved.append(tensor), cpu(tensor))[1])
    copy = pickle.loads(pickle.dumps(optimizer))
    scalars = [values[name] for values in copy.state.values() for name in ("step", "eta", "mu")]
    assert len(moved) == len(scalars) == 3 * len(optimizer.param_groups[0]["params"])
    assert all(map(torch.equal, moved, scalars))


def take_step(name, model, clip, gradient=1.0, dtype=torch.float32, loss=1.0):
    """A step whose gradient has the value `gradient` everywhere, and the optimizer that made it."""
    optimizer = optimizers.make_optimizer(name, model, 0.5, 0.01)

    def forward_backward(model, _words, _targets, hidden):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        return hidden, torch.stack([torch.tensor(loss, dtype=dtype), norm])

    return optimizer, steps.train_step(model, optimizer, forward_backward, None, None, None, lr_scale=0.7, clip=clip)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("clip", [0, 0.25, 1e9])
@pytest.mark.parametrize("name", ["sgd", "asgd", "adam"])
def test_a_guarded_step_is_the_clipped_one(name, clip, dtype, tolerance, monkeypatch):
    plain, guarded = small_model(dtype), small_model(dtype)
    take_step(name, plain, clip, dtype=dtype)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(steps, "read_later", lambda values: values.tolist)
    take_step(name, guarded, clip, dtype=dtype)
    for found, expected in zip(guarded.parameters(), plain.parameters()):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("as_a_gpu")
@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
@pytest.mark.parametrize("name", ["sgd", "asgd", "adam"])
def test_a_step_on_what_is_not_finite_changes_no_weight_and_is_an_error(name, loss, gradient):
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError):
        take_step(name, model, 0.25, gradient, loss=loss)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.usefixtures("as_a_gpu")
def test_the_look_at_the_loss_comes_when_the_optimizer_has_been_launched(monkeypatch):
    events = []
    monkeypatch.setattr(steps, "read_later", lambda values: (
        events.append("copy"), lambda: (events.append("look"), values.tolist())[1])[1])
    monkeypatch.setattr(optimizers.ASGD, "step", lambda _: events.append("step"))
    _, (_, loss) = take_step("asgd", small_model(), 0.25)
    assert events == ["copy", "step", "look"]
    assert loss == 1.0


@pytest.mark.parametrize("precision, allowed", [("fp32", False), ("tf32", True), ("bf16", True)])
@pytest.mark.filterwarnings("ignore")  # PyTorch's, of autocast for CUDA where there is none
def test_products_of_fp32_may_be_in_tf32_in_every_precision_but_fp32(precision, allowed):
    class Model:
        def zero_grad(self, **_):
            pass

        def __call__(self, *_):
            raise KeyError(torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)

    words = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(KeyError) as seen:
        steps.forward_backward(Model(), words, None, None, precision=precision)
    assert seen.value.args == (allowed, allowed)
    assert not torch.backends.cudnn.allow_tf32


# --- evaluation and saving -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values, chunks", [(1, 15), (4 * 24 * 30, 4), (2**26, 1)])
def test_on_a_gpu_evaluation_has_long_chunks_and_the_same_loss(values, chunks, monkeypatch):
    """The widest activation has the 4 x 6 gates of the first layer, not the 11 logits."""
    model, calls = small_model().double(), []
    source = batchify(torch.randint(11, (401,)), 4)
    expected = steps.evaluate(model, source, 7)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(steps, "MAX_VALUES", values)
    monkeypatch.setattr(model, "loss", lambda *given, loss=model.loss: (calls.append(1), loss(*given))[1])
    assert steps.evaluate(model, source, 7) == pytest.approx(expected, abs=1e-12)
    assert len(calls) == chunks


@pytest.mark.parametrize("on_a_gpu, seconds, saved", [(False, math.inf, [1, 2, 3]), (True, 0, [1, 2, 3]),
                                                       (True, math.inf, [1, 3])])
def test_on_a_gpu_the_state_is_saved_once_then_by_time_and_in_the_end(on_a_gpu, seconds, saved, train, tmp_path,
                                                                      monkeypatch, request):
    if on_a_gpu:
        request.getfixturevalue("as_a_gpu")
    epochs, save_state = [], training.save_state
    monkeypatch.setattr(training, "GPU_SAVE_SECONDS", seconds)
    monkeypatch.setattr(training, "save_state", lambda run: (epochs.append(run.progress.epoch), save_state(run)))
    train(tmp_path / "m.pt", "--epochs", "3")
    assert epochs == saved


@pytest.mark.usefixtures("as_a_gpu")
def test_a_run_resumes_from_an_older_state_as_if_it_had_never_stopped(train, tmp_path, monkeypatch):
    """Killed after its fourth epoch, when the last state is that of the second."""
    flags = ["--nonmono", "0", "--lr", "20"]
    train(tmp_path / "whole.pt", *flags, "--epochs", "5")
    begun = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: begun, perf_counter=time.perf_counter)
    monkeypatch.setattr(training, "time", clock)
    end_epoch = training.end_epoch

    def ends(run):
        end_epoch(run)
        if run.progress.epoch == 2:
            run.saved_at -= training.GPU_SAVE_SECONDS
        if run.progress.epoch == 4:
            raise KeyError
    monkeypatch.setattr(training, "end_epoch", ends)
    with pytest.raises(KeyError):
        train(tmp_path / "m.pt", *flags, "--epochs", "5")
    monkeypatch.setattr(training, "end_epoch", end_epoch)
    assert checkpoint.load(run_files.last_path(tmp_path / "m.pt", "train"))["state"]["progress"]["epoch"] == 2
    train(tmp_path / "m.pt", *flags, "--epochs", "5", "--resume", str(tmp_path / "m.pt"))
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)["epoch"]] for name in ("whole.pt", "m.pt")]
    assert losses[0] == losses[1]
    assert same_weights(tmp_path / "whole.pt", tmp_path / "m.pt")
