"""The recorded runs of the original, followed through the commands of this project.

The cases are those of `tests/reference`, or of the folder named in REFERENCE_DIR: any number of NAME.json with
NAME.init.npz and NAME.best.npz, and `corpus/`. They were recorded in float64 with masks from numpy, so every batch can
be followed on any machine. In fp32 and bf16 rounding parts from the recording sooner or later: at learning rate 30
training is chaotic. There the first batches are followed, and single passes are held against float64.
"""

import json
import os
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy
import pytest
import torch
from helpers import Recorder, read_metrics

import checkpoint
import device
import finetune
import locked_dropout
import main
import pointer
import rnn
import splitcross
import steps
import training
from data import Corpus
from graphs import CudaGraphs
from model import ARCHITECTURE, DROPOUTS, LAYERS, RNNModel
from utils import batchify, get_batch

FOLDER = Path(os.environ.get("REFERENCE_DIR", Path(__file__).parent / "reference"))
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))
         if path.with_suffix(".init.npz").exists()}

TOLERANCE = 1e-7  # in float64: nats per token
# In shorter dtypes: how close, in nats per token, for how many batches. That is half of the fewest that any case
# follows within that, on AVX-512, AVX2 and no vector instructions, with MKL's compatible mode and oneDNN's of SSE4.1
# and AVX2, on one thread and two. (tf32 has been measured nowhere.)
FOLLOWING = {"fp32": (1e-4, 26), "tf32": (3e-2, 5), "bf16": (3e-2, 5)}
GRAPH_BATCHES = 60  # enough for most lengths to come three times


@pytest.fixture(params=CASES)
def case(request):
    recorded = CASES[request.param]
    if recorded["flags"]["model"] not in LAYERS:
        pytest.skip(f"no {recorded['flags']['model']} layer")
    return recorded


class RecordedMasks:
    """Masks from numpy, as the original drew them, on whatever device, in whatever dtype.

    A CUDA graph cannot draw them: it copies them from buffers, which are filled before each of its replays.
    """

    def __init__(self, monkeypatch, seed):
        self.source = numpy.random.RandomState(seed)
        self.buffer_for = None  # while a graph is captured or replayed
        monkeypatch.setattr(locked_dropout, "fill_mask", self.fill_mask)

    def draw(self, mask, p):
        kept = self.source.random_sample(tuple(mask.shape)) >= p
        return mask.copy_(torch.from_numpy(kept / (1 - p)))

    def fill_mask(self, mask, p):
        return mask.copy_(self.buffer_for(mask, p)) if self.buffer_for else self.draw(mask, p)

    def feed(self, backend):
        """The same backend of `GraphedPass`, with masks for its graphs."""
        capture = backend.capture

        def capture_with_buffers(function):
            buffers = []

            def new_buffer(mask, p):
                buffers.append((torch.empty_like(mask), p))  # a fill would be in the graph
                return buffers[-1][0]

            self.buffer_for = new_buffer
            replay, result = capture(function)
            self.buffer_for = None

            def fill_and_replay():
                filled = iter([self.draw(*buffer) for buffer in buffers])
                self.buffer_for = lambda *_: next(filled)  # a graph knows them; the stand-in asks
                replay()
                self.buffer_for = None
            return fill_and_replay, result

        backend.capture = capture_with_buffers
        return backend


def set_weights(model, path):
    """Copy the recorded weights into the model; every parameter has to be among them, under its own name and shape."""
    with numpy.load(path) as arrays, torch.no_grad():
        assert set(arrays) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            assert parameter.shape == arrays[name].shape
            parameter.copy_(torch.from_numpy(arrays[name]))


def recorded_flags(case):
    """The flags of a case, all of the model's among them."""
    return {"tied": True, **case["flags"]}


def recorded_model(case, weights):
    """The model of a case with its "init" or "best" weights, and the corpus."""
    corpus = Corpus(FOLDER / "corpus")
    flags = {name: value for name, value in recorded_flags(case).items() if name in ARCHITECTURE + DROPOUTS}
    model = RNNModel(len(corpus.dictionary), **flags)
    set_weights(model, FOLDER / f"{case['name']}.{weights}.npz")
    return model, corpus


def command_line(flags):
    """Flags as they are recorded, as a person would type them."""
    for name, value in flags.items():
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif value != []:
            yield from [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def train(case, save, monkeypatch, *flags, on="--no-cuda", graphs=None):
    """Train a case from its recorded weights, with its masks, by the script of its stage; the metrics by their kind."""
    def start_as_recorded(model):
        set_weights(model, FOLDER / f"{case['name']}.init.npz")

    masks = RecordedMasks(monkeypatch, case["flags"]["seed"])
    if graphs:
        monkeypatch.setattr(training, "choose_pass", lambda model, *settings: steps.choose_pass(
            model, *settings, backend=masks.feed(graphs(model))))
    command = [on, "--data", str(FOLDER / "corpus"), "--save", str(save), "--log-interval", "1", *flags]
    with monkeypatch.context() as patch:
        if case["stage"] == "train":
            patch.setattr(RNNModel, "init_weights", start_as_recorded)
            assert main.main([*command, *command_line(case["flags"])]) == 0
        else:
            load = save.with_name("loaded.pt")
            model, corpus = recorded_model(case, "init")
            flags = {"data": str(FOLDER / "corpus"), "level": "word", "shares": [90, 5, 5], **recorded_flags(case)}
            checkpoint.save(load, model, flags, corpus.dictionary.idx2word, case["loaded_valid_loss"], 1)
            tuned = {name: value for name, value in case["flags"].items() if name not in ("optimizer", "when")}
            assert finetune.main([*command, "--load", str(load), *command_line(tuned)]) == 0
    return read_metrics(save)


def losses(lines):
    return [line["loss"] for line in lines]


def difference(found, recorded):
    """The largest absolute difference between two lists of losses."""
    assert len(found) == len(recorded)
    return float(abs(numpy.subtract(found, recorded)).max(initial=0))


def scored_by_pointer(case, save, on):
    """The losses of the cache on a trained model, in the order of the recorded settings, validation and test."""
    for setting in case["pointer"]:
        flags = {name: setting[name] for name in ("window", "theta", "lambdasm")}
        pointer.main([on, "--data", str(FOLDER / "corpus"), "--save", str(save), "--bptt", "300",
                      *command_line(flags)])
    return losses(read_metrics(save).get("pointer", []))


def follow(case, folder, monkeypatch, record, on="--no-cuda"):
    """Follow a case from its first batch to its cache in float64; returns the largest difference of a loss."""
    run = train(case, folder / "run.pt", monkeypatch, on=on)
    assert run["run"][0]["parameters"] == case["parameters"]
    assert [line["tokens"] // case["flags"]["batch_size"] for line in run["batch"]] == case["seq_lens"]
    assert next((line["epoch"] + 1 for line in run.get("switch", [])), None) == case["first_asgd_epoch"]
    loaded = [case["loaded_valid_loss"]] if case["stage"] == "finetune" else []
    cached = [setting[f"{split}_loss"] for setting in case["pointer"] for split in ("valid", "test")]
    largest = max(difference(losses(run["batch"]), case["train_losses"]),
                  difference(losses(run["epoch"]), case["valid_losses"]),
                  difference(losses(run["test"]), [case["test_loss"]]),
                  difference(losses(run.get("loaded", [])), loaded),
                  difference(scored_by_pointer(case, folder / "run.pt", on), cached))
    where = "" if on == "--no-cuda" else " on the GPU"
    record("followed", f"{case['name']}{where}: {len(case['train_losses'])} batches, largest difference {largest:.1e}")
    return largest


def weight_difference(case, save):
    """The largest difference of a value of the model at `save` from the recorded best weights."""
    found = checkpoint.load(save)["model"]
    with numpy.load(FOLDER / f"{case['name']}.best.npz") as arrays:
        return max(abs(found[name].numpy() - arrays[name]).max() for name in arrays)


def test_there_are_runs_to_follow():
    assert CASES, f"{FOLDER} holds none"


@pytest.mark.usefixtures("in_float64")
def test_float64_follows_every_loss_of_the_original_and_ends_with_its_weights(case, tmp_path, monkeypatch,
                                                                              record_property):
    assert follow(case, tmp_path, monkeypatch, record_property) <= TOLERANCE
    assert weight_difference(case, tmp_path / "run.pt") <= TOLERANCE


@pytest.mark.cuda("reference trajectories on the GPU")
@pytest.mark.usefixtures("in_float64")
def test_float64_on_a_gpu_follows_every_loss_of_the_original(case, tmp_path, monkeypatch, record_property):
    assert follow(case, tmp_path, monkeypatch, record_property, on="--cuda") <= TOLERANCE


# --- faster paths ----------------------------------------------------------------------------------------------------

@pytest.fixture(params=["as they come", "of large models"])
def calls(request, monkeypatch):
    """The paths through the model: those that its size takes, or those of large ones; how often the latter ran."""
    counter = Counter()

    def counted(function):
        forward = function.forward

        def call(*inputs):
            counter[function] += 1
            return forward(*inputs)
        return call

    for function in (splitcross.SoftmaxLoss, rnn.LSTMFunction):
        monkeypatch.setattr(function, "forward", counted(function))
    if request.param == "of large models":
        monkeypatch.setattr(splitcross, "MIN_LOGITS", 0)
        monkeypatch.setattr(rnn, "MIN_HIDDEN", 0)
        monkeypatch.setattr(rnn, "packs_fp32", lambda: True)
    counter.large = request.param == "of large models"
    return counter


def expected_calls(case, passes, large):
    """How often the paths of large models run in so many passes."""
    layers = case["flags"]["nlayers"] if case["flags"]["model"] == "LSTM" else 0
    return Counter({splitcross.SoftmaxLoss: passes, rnn.LSTMFunction: layers * passes}) if large else Counter()


def first_batches(case, folder, monkeypatch, count, *flags, **how):
    """How far the first batches of a case are from the recorded ones: nats per token, for each of them."""
    train_batches = training.train_batches

    def first(run):
        yield from islice(train_batches(run), count)
        run.progress.row = len(run.batches.train)  # the epoch ends here
    monkeypatch.setattr(training, "train_batches", first)
    run = train({**case, "flags": {**case["flags"], "epochs": 1}}, folder / "run.pt", monkeypatch, *flags,
                **how)
    assert len(run["batch"]) == count
    return abs(numpy.subtract(losses(run["batch"]), case["train_losses"][:count]))


def test_fp32_follows_the_first_batches(case, tmp_path, monkeypatch, calls):
    tolerance, count = FOLLOWING["fp32"]
    assert first_batches(case, tmp_path, monkeypatch, count).max() <= tolerance
    assert calls == expected_calls(case, count, calls.large)


def test_bf16_follows_the_first_batches(case, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "has_bf16", lambda: True)
    tolerance, count = FOLLOWING["bf16"]
    assert first_batches(case, tmp_path, monkeypatch, count, "--precision", "bf16").max() <= tolerance


@pytest.mark.usefixtures("in_float64", "as_a_gpu")
def test_the_passes_of_a_gpu_follow_every_loss_of_the_original(case, tmp_path, monkeypatch, record_property):
    """On a CPU, through the switch to ASGD, with MIN_LOGITS low enough for the loss in blocks."""
    monkeypatch.setattr(splitcross, "MIN_LOGITS", 0)
    assert follow(case, tmp_path, monkeypatch, record_property) <= TOLERANCE
    assert weight_difference(case, tmp_path / "run.pt") <= TOLERANCE


@pytest.mark.usefixtures("in_float64", "as_a_gpu")
def test_the_pass_for_graphs_follows_the_original(case, tmp_path, monkeypatch):
    """With a stand-in for CUDA's graphs; no batch of its lengths is lost or computed from stale inputs."""
    for script in (main, finetune):
        monkeypatch.setattr(script, "set_up_device", lambda *_: torch.device("cpu"))
    found = first_batches(case, tmp_path, monkeypatch, GRAPH_BATCHES, "--cuda-graphs", graphs=Recorder)
    assert found.max() <= TOLERANCE


@pytest.mark.cuda("first batches of the reference in each precision")
@pytest.mark.parametrize("graphs", [None, lambda _: CudaGraphs()], ids=["simple", "graphs"])
@pytest.mark.parametrize("precision", FOLLOWING)
def test_a_gpu_follows_the_first_batches(case, tmp_path, monkeypatch, precision, graphs):
    tolerance, count = FOLLOWING[precision]
    flags = ["--precision", precision, "--cuda-graphs" if graphs else "--no-cuda-graphs"]
    found = first_batches(case, tmp_path, monkeypatch, count, *flags, on="--cuda", graphs=graphs)
    assert found.max() <= tolerance


def gradients(case, monkeypatch, dtype):
    """The gradients of all parameters on the first batch of a case, from its best weights, in a dtype."""
    torch.set_default_dtype(torch.float64)
    model, corpus = recorded_model(case, "best")
    model = model.to(dtype)
    torch.set_default_dtype(torch.float32)
    RecordedMasks(monkeypatch, seed=1)
    words, targets = get_batch(batchify(corpus.train, case["flags"]["batch_size"]), 0, 20)
    steps.forward_backward(model.train(), words, targets, model.init_hidden(words.size(1)),
                           case["flags"]["alpha"], case["flags"]["beta"])
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("calls")
def test_fp32_gradients_are_those_of_float64(case, monkeypatch):
    found, exact = (gradients(case, monkeypatch, dtype) for dtype in (torch.float32, torch.float64))
    errors = {name: ((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}
    assert max(errors.values()) <= 1e-5, errors
