"""The trajectories of the original, followed through the commands of this project.

The cases are those of `tests/reference`, or of the folder named in REFERENCE_DIR: any number of NAME.json with
NAME.init.npz and NAME.best.npz, and `corpus/`. Each is trained with `main.py` from the recorded weights and seed; every
batch, validation, test and cache loss has to come out as recorded.
"""

import json
import os
from pathlib import Path

import numpy
import pytest
import torch

import main
import pointer
from data import Corpus
from model import ARCHITECTURE, DROPOUTS, LAYERS, RNNModel
from training import evaluate, seed_everything
from utils import batchify

FOLDER = Path(os.environ.get("REFERENCE_DIR", Path(__file__).parent / "reference"))
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")) if path.with_suffix(".init.npz").exists()}
RAN = []

LOSS_TOLERANCE, CACHE_TOLERANCE = 1e-4, 1e-5


def set_weights(model, path):
    """Copy the recorded weights into the model; every parameter has to be among them, under its own name and shape."""
    with numpy.load(path) as arrays, torch.no_grad():
        assert set(arrays) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[name]))


@pytest.fixture(params=CASES)
def case(request):
    recorded = CASES[request.param]
    if recorded["flags"]["model"] not in LAYERS:
        pytest.skip(f"no {recorded['flags']['model']} layer")
    return recorded


def command_line(flags):
    """Flags as they are recorded, as a person would type them."""
    for name, value in flags.items():
        if value != []:
            yield from [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def test_training_follows_the_original(case, tmp_path, monkeypatch):
    def start_as_recorded(model):
        set_weights(model, FOLDER / f"{case['name']}.init.npz")
        seed_everything(case["flags"]["seed"])

    monkeypatch.setattr(RNNModel, "init_weights", start_as_recorded)
    save = tmp_path / "model.pt"
    status = main.main(["--no-cuda", "--data", str(FOLDER / "corpus"), "--save", str(save), "--log-interval", "1",
                        *command_line(case["flags"])])
    lines = [json.loads(line) for line in (tmp_path / "model.metrics.jsonl").read_text().splitlines()]
    of = {kind: [line for line in lines if line["kind"] == kind] for kind in ("run", "batch", "epoch", "switch", "test")}

    assert status == 0
    assert of["run"][0]["parameters"] == case["parameters"]
    assert [line["tokens"] // case["flags"]["batch_size"] for line in of["batch"]] == case["seq_lens"]
    losses = numpy.array([line["loss"] for line in of["batch"]])
    numpy.testing.assert_allclose(losses, case["train_losses"], atol=LOSS_TOLERANCE, rtol=0)
    numpy.testing.assert_allclose([line["loss"] for line in of["epoch"]], case["valid_losses"], atol=LOSS_TOLERANCE, rtol=0)
    assert [line["epoch"] + 1 for line in of["switch"]] == ([case["first_asgd_epoch"]] if case["first_asgd_epoch"] else [])
    assert of["test"][0]["loss"] == pytest.approx(case["test_loss"], abs=LOSS_TOLERANCE)
    RAN.append(case["name"])


def test_cache_scores_as_the_original(case):
    corpus = Corpus(FOLDER / "corpus")
    model = RNNModel(len(corpus.dictionary), **{name: case["flags"][name] for name in ARCHITECTURE + DROPOUTS if name != "tied"})
    set_weights(model, FOLDER / f"{case['name']}.best.npz")
    for split in ("valid", "test"):
        source = batchify(getattr(corpus, split), 1)
        if split == "test":
            assert evaluate(model, source, 70) == pytest.approx(case["test_loss"], abs=CACHE_TOLERANCE)
        for setting in case["pointer"]:
            chunks = pointer.scored_chunks(model, source, bptt=300)
            loss = pointer.mixture_loss(chunks, setting["window"], setting["theta"], setting["lambdasm"])
            assert loss == pytest.approx(setting[f"{split}_loss"], abs=CACHE_TOLERANCE)
