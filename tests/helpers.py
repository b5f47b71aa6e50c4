"""What several test files share."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import finetune
import generate
from metrics import parse_lines
from run_files import last_path, metrics_path
from utils import map_hidden

ROOT = Path(generate.__file__).parent
TINY = ["--no-cuda", "--emsize", "5", "--nhid", "6", "--nlayers", "2", "--batch_size", "4", "--bptt", "7", "--lr", "1"]


def read_metrics(save):
    """The lines of the metrics file beside the checkpoint `save`, by their kind."""
    lines, _ = parse_lines(metrics_path(save).read_bytes().split(b"\n"))
    return {kind: [line for line in lines if line["kind"] == kind] for kind in sorted({line["kind"] for line in lines})}


class Recorder:
    """What CUDA does, on a CPU: a capture changes nothing, a replay reads and writes the tensors of the capture."""

    def __init__(self, model):
        self.model, self.events = model, []

    def run(self, function):
        self.events.append("run")
        return function()

    def capture(self, function):
        self.events.append("capture")
        places = [p.grad for p in self.model.parameters()]
        before = [grad.clone() for grad in places]
        with torch.random.fork_rng():
            result = function()
        for grad, value in zip(places, before):
            grad.copy_(value)
        map_hidden(lambda part: part.fill_(math.nan), result)

        def replay():
            self.events.append("replay")
            assert all(p.grad is grad for p, grad in zip(self.model.parameters(), places)), "a graph would not see it"
            for place, value in zip(leaves(result), leaves(function())):
                place.copy_(value)
        return replay, result


def leaves(nested):
    found = []
    map_hidden(found.append, nested)
    return found


def files(folder):
    """What every file below a folder holds, by path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(path):
    return checkpoint.load(path)["model"]


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def assert_undisturbed(whole, parts):
    """Training that was killed and went on, at `parts`, is that of `whole`: models, states, record; nothing is left."""
    for one, other in (whole, parts), map(last_path, (whole, parts)):
        assert same_weights(one, other)
    records = [read_metrics(save) for save in (whole, parts)]
    assert records[0]["switch"]
    for kind in ("batch", "epoch", "switch"):
        lines = [[{key: line[key] for key in ("epoch", "batch", "loss") if key in line} for line in record[kind]]
                 for record in records]
        assert lines[0] == lines[1][-len(lines[0]):]
    assert not list(parts.parent.glob("*.partial"))


def script(name, *arguments, **how):
    """Start a script in a process of its own."""
    return subprocess.Popen([sys.executable, ROOT / f"{name}.py", *map(str, arguments)], cwd=ROOT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how})


def tune(corpus_dir, *flags):
    return finetune.main(["--no-cuda", "--data", str(corpus_dir), *map(str, flags)])


def write(trained, *flags):
    generate.main(["--no-cuda", "--checkpoint", str(trained), "--words", "4", "--outf", "-", *map(str, flags)])


# --- what needs a GPU ------------------------------------------------------------------------------------------------

CLOSE = 1e-4  # of losses in nats: cuDNN adds in another order each time


def epochs(metrics):
    return [line["loss"] for line in metrics["epoch"] + metrics["test"]]


def resumed_and_repeated(train, tmp_path, *flags):
    """A run that stopped half-way, and one of the same seed, are the run."""
    runs = [train(tmp_path / name, *flags, "--cuda", "--epochs", "4")[1] for name in ("whole.pt", "again.pt")]
    for count in ("2", "4"):
        resume = [] if count == "2" else ["--resume", str(tmp_path / "parts.pt")]
        _, parts = train(tmp_path / "parts.pt", *flags, "--cuda", "--epochs", count, *resume)
    assert epochs(runs[0]) == pytest.approx(epochs(runs[1]), abs=CLOSE)
    assert epochs(runs[0]) == pytest.approx(epochs(parts), abs=CLOSE)
