"""The trajectories of the original, followed through the commands of this project.

The cases are those of `tests/reference`, or of the folder named in REFERENCE_DIR: any number of NAME.json with
NAME.init.npz and NAME.best.npz, and `corpus/`. Each is trained with `main.py` from the recorded weights and seed; every
batch, validation, test and cache loss has to come out as recorded.

Training at learning rate 30 is chaotic: a CPU that rounds otherwise than the recorder's follows a run for so many
batches and then parts from it. So the first 50 batches have to agree strictly anywhere. Later ones may part, but no
further than twin runs do on the same machine, whose first weights differ in the sixth decimal; the twins are run only
when a trajectory parts, and the summary says where it did.
"""

import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from conftest import read_metrics

import locked_dropout
import main
import pointer
import rnn
import splitcross
from data import Corpus
from model import ARCHITECTURE, DROPOUTS, LAYERS, RNNModel
from training import evaluate, seed_everything
from utils import batchify

FOLDER = Path(os.environ.get("REFERENCE_DIR", Path(__file__).parent / "reference"))
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))
         if path.with_suffix(".init.npz").exists()}
FOLLOWED = {}  # how closely each run came out as recorded, for the summary

LOSS_TOLERANCE, CACHE_TOLERANCE = 1e-4, 1e-5
STRICT_BATCHES = 50
LARGE_BATCHES = 25  # sums in another order: half as many before the chaos of rounding reaches 1e-4 here
TWINS, TWIN_DIFFERENCE, TWIN_FACTOR = (1, 2), 1e-6, 5


def set_weights(model, path):
    """Copy the recorded weights into the model; every parameter has to be among them, under its own name and shape."""
    with numpy.load(path) as arrays, torch.no_grad():
        assert set(arrays) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            assert parameter.shape == arrays[name].shape
            parameter.copy_(torch.from_numpy(arrays[name]))


def command_line(flags):
    """Flags as they are recorded, as a person would type them."""
    for name, value in flags.items():
        if value != []:
            yield from [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def train(case, save, monkeypatch, twin=None, device="--no-cuda"):
    """Run main.py on a case, from its recorded weights or those of a twin; the metrics by their kind."""
    def start_as_recorded(model):
        set_weights(model, FOLDER / f"{case['name']}.init.npz")
        if twin is not None:
            torch.manual_seed(twin)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + TWIN_DIFFERENCE * torch.randn_like(parameter))
        seed_everything(case["flags"]["seed"])

    with monkeypatch.context() as patch:
        patch.setattr(RNNModel, "init_weights", start_as_recorded)
        status = main.main([device, "--data", str(FOLDER / "corpus"), "--save", str(save), "--log-interval", "1",
                            *command_line(case["flags"])])
    assert status == 0
    return read_metrics(save)


def losses(lines):
    return numpy.array([line["loss"] for line in lines])


def counted(calls, name, function):
    """The function, each of whose calls `calls` counts under `name`."""
    def call(*inputs):
        calls[name] += 1
        return function(*inputs)
    return call


def furthest(difference):
    """The largest absolute difference so far, batch by batch."""
    return numpy.maximum.accumulate(abs(difference))


def test_there_are_trajectories_to_follow():
    assert CASES, f"{FOLDER} holds none"


@pytest.fixture(params=CASES)
def case(request):
    recorded = CASES[request.param]
    if recorded["flags"]["model"] not in LAYERS:
        pytest.skip(f"no {recorded['flags']['model']} layer")
    return recorded


def test_training_follows_the_original(case, tmp_path, monkeypatch):
    run = train(case, tmp_path / "run.pt", monkeypatch)
    assert run["run"][0]["parameters"] == case["parameters"]
    assert [line["tokens"] // case["flags"]["batch_size"] for line in run["batch"]] == case["seq_lens"]
    assert next((line["epoch"] + 1 for line in run.get("switch", [])), None) == case["first_asgd_epoch"]

    batches = furthest(losses(run["batch"]) - case["train_losses"])
    epochs = abs(losses(run["epoch"] + run["test"]) - [*case["valid_losses"], case["test_loss"]])
    assert batches[:STRICT_BATCHES].max() <= LOSS_TOLERANCE
    FOLLOWED[case["name"]] = (f"{(batches <= LOSS_TOLERANCE).sum()} of {len(batches)} batches to {LOSS_TOLERANCE}, "
                              f"validation and test to {epochs.max():.0e}")
    allowed_batches, allowed_epochs = (numpy.full(len(kind), LOSS_TOLERANCE) for kind in (batches, epochs))
    if batches.max() > LOSS_TOLERANCE:
        for twin in (train(case, tmp_path / f"twin{twin}.pt", monkeypatch, twin) for twin in TWINS):
            twin_batches = furthest(losses(twin["batch"]) - losses(run["batch"]))
            twin_epochs = abs(losses(twin["epoch"] + twin["test"]) - losses(run["epoch"] + run["test"]))
            allowed_batches = numpy.maximum(allowed_batches, TWIN_FACTOR * twin_batches)
            allowed_epochs = numpy.maximum(allowed_epochs, TWIN_FACTOR * twin_epochs)
    assert (batches - allowed_batches).max() <= 0
    assert (epochs - allowed_epochs).max() <= 0


def test_training_follows_the_original_on_the_path_of_large_models_too(case, tmp_path, monkeypatch):
    """The blockwise softmax and the LSTM's own pass, which models as small as these do not take; the masks stay those
    of the recorder."""
    calls = Counter()
    for function in (splitcross.SoftmaxLoss, rnn.TrainingPass):
        monkeypatch.setattr(function, "forward", counted(calls, function, function.forward))
    monkeypatch.setattr(splitcross, "LARGE", 0)
    monkeypatch.setattr(rnn, "LARGE", 0)
    monkeypatch.setattr(rnn, "packs_fp32", lambda: True)
    monkeypatch.setattr(locked_dropout, "LARGE", math.inf)
    run = train(case, tmp_path / "run.pt", monkeypatch)
    layers = case["flags"]["nlayers"] if case["flags"]["model"] == "LSTM" else 0
    assert calls[splitcross.SoftmaxLoss] == len(run["batch"])
    assert calls[rnn.TrainingPass] == layers * len(run["batch"])
    difference = abs(losses(run["batch"]) - case["train_losses"])
    assert difference[:LARGE_BATCHES].max() <= LOSS_TOLERANCE


@pytest.mark.cuda("reference trajectories on the GPU")
def test_training_follows_the_original_on_a_gpu(case, tmp_path, monkeypatch):
    """With the masks of the recorder, which a CPU drew."""
    bernoulli = torch.Tensor.bernoulli_
    monkeypatch.setattr(torch.Tensor, "bernoulli_",
                        lambda mask, p: mask.copy_(bernoulli(torch.empty(mask.shape, dtype=mask.dtype), p)))
    run = train(case, tmp_path / "run.pt", monkeypatch, device="--cuda")
    difference = furthest(losses(run["batch"]) - case["train_losses"])
    FOLLOWED[f"{case['name']} on the GPU"] = (f"{(difference <= LOSS_TOLERANCE).sum()} of {len(difference)} batches to "
                                              f"{LOSS_TOLERANCE}")
    assert difference[:LARGE_BATCHES].max() <= LOSS_TOLERANCE


def test_evaluation_and_cache_score_as_the_original(case):
    corpus = Corpus(FOLDER / "corpus")
    flags = {name: case["flags"][name] for name in ARCHITECTURE + DROPOUTS if name in case["flags"]}
    model = RNNModel(len(corpus.dictionary), **flags)
    set_weights(model, FOLDER / f"{case['name']}.best.npz")
    assert evaluate(model, batchify(corpus.test, 1), 70) == pytest.approx(case["test_loss"], abs=CACHE_TOLERANCE)
    for setting in case["pointer"]:
        for split in ("valid", "test"):
            chunks = pointer.scored_chunks(model, batchify(getattr(corpus, split), 1), bptt=300)
            loss = pointer.mixture_losses(chunks, [setting["window"]], [setting["theta"]], [setting["lambdasm"]])
            assert loss.item() == pytest.approx(setting[f"{split}_loss"], abs=CACHE_TOLERANCE)
