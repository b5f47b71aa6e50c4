"""A checkpoint is whole or not there, holds no code, and says what it is."""

import pickle
from dataclasses import asdict

import pytest
import torch

import checkpoint
import main
import resume
import run_files
from errors import BadInput
from model import RNNModel
from run import Progress

IN_ITSELF = []
IN_ITSELF.append(IN_ITSELF)
FLAGS = {"model": "LSTM", "emsize": 5, "nhid": 6, "nlayers": 2, "tied": True,
         "dropout": 0.1, "dropouth": 0.1, "dropouti": 0.1, "dropoute": 0.1, "wdrop": 0.5}


def save(path, **changes):
    model = RNNModel(3, **FLAGS)
    checkpoint.save(path, model, FLAGS, ["a", "b", "<eos>"], 1.5, 2)
    if changes:
        torch.save({**torch.load(path), **changes}, path)
    return model


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_model_comes_back_as_it_was_saved(tmp_path):
    model = save(tmp_path / "m.pt")
    content = checkpoint.load(tmp_path / "m.pt")
    restored = checkpoint.restore_model(content, "m.pt")
    words = torch.randint(3, (7, 2))
    assert torch.equal(model.eval()(words, model.init_hidden(2))[0], restored.eval()(words, restored.init_hidden(2))[0])
    assert restored.decoder.weight is restored.encoder.weight
    assert (content["vocabulary"], content["loss"], content["epoch"]) == (["a", "b", "<eos>"], 1.5, 2)


@pytest.mark.parametrize("content, message", [
    (b"", "not a checkpoint"), (b"hello\n", "not a checkpoint"), (b"PK\x03\x04 broken zip", "not a checkpoint"),
])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, message):
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        checkpoint.load(tmp_path / "m.pt")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickled_model_is_refused_and_not_run(tmp_path, legacy):
    path, trace = tmp_path / "m.pt", tmp_path / "trace"
    torch.save([RNNModel(3, **FLAGS), Payload(trace)], path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BadInput, match="as the original toolkit wrote them, could run any code: convert.py"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(BadInput):
        checkpoint.load(path)
    assert not trace.exists()


@pytest.mark.parametrize("form", [lambda state: state, lambda state: {"model": state, "opt": {}}])
def test_a_model_of_fastai_is_sent_to_convert(tmp_path, form):
    torch.save(form({"0.rnns.0.weight_hh_l0_raw": torch.ones(3, 2)}), tmp_path / "m.pth")
    with pytest.raises(BadInput, match="a model of fastai: convert.py"):
        checkpoint.load(tmp_path / "m.pth")


@pytest.mark.parametrize("changes, message", [
    ({"version": 99}, "checkpoint version 99; this toolkit reads version 1"),
    ({"format": "other"}, "not a checkpoint of this toolkit"),
    ({"vocabulary": None}, "damaged"), ({"loss": "low"}, "damaged"),
    ({"flags": {**FLAGS, "shares": IN_ITSELF}}, "damaged"),
    ({"flags": {}}, "damaged"), ({"flags": {**FLAGS, "nhid": 7}}, "damaged"), ({"model": {}}, "damaged"),
])
def test_a_checkpoint_with_other_content_is_refused(tmp_path, changes, message):
    save(tmp_path / "m.pt", **changes)
    with pytest.raises(BadInput, match=message):
        checkpoint.restore_model(checkpoint.load(tmp_path / "m.pt"), "m.pt")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    save(tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    for length in range(0, len(whole), 997):
        (tmp_path / "m.pt").write_bytes(whole[:length])
        with pytest.raises(BadInput, match="its end is missing" if length else "not a checkpoint"):
            checkpoint.load(tmp_path / "m.pt")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    save(tmp_path / "m.pt")
    before = (tmp_path / "m.pt").read_bytes()

    def full_disk(_, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(BadInput, match="could not be written: .*No space left on device; what was there is as it was"):
        save(tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_names_of_the_files_of_a_run():
    assert str(run_files.last_path("runs/PTB.pt")) == "runs/PTB.last.pt"
    assert str(run_files.metrics_path("runs/WT103.12hr.QRNN.pt")) == "runs/WT103.12hr.QRNN.metrics.jsonl"


@pytest.mark.parametrize("flag, value", [
    ("bptt", "x"), ("wdrop", 5.0), ("clip", None), ("batch_size", True), ("bptt", 7.5), ("alpha", "1"), ("beta", "nan"),
    ("data", 3), ("shares", ["--save=lost", 1, 2]), ("shares", []), ("level", "page"), ("seed", -1), ("when", "--cuda"),
])
def test_a_flag_that_no_command_line_could_have_set_is_refused(flag, value):
    flags = vars(main.parse_flags([])) | {flag: value}
    with pytest.raises(BadInput, match="m.pt: damaged checkpoint"):
        checkpoint.merge_flags(main.parse_flags, [], {"flags": flags}, "m.pt", [flag])


def test_the_command_line_wins_over_the_flags_of_a_checkpoint():
    flags = "--bptt 9 --no-tied --when 3 5 --save-interval 0.5 --shares 8 1 1"
    saved = main.parse_flags(flags.split())
    names = [name for name in vars(saved) if name not in resume.NOT_RESUMED]
    args, changed = checkpoint.merge_flags(main.parse_flags, ["--bptt", "8"], {"flags": vars(saved)}, "m.pt", names)
    assert changed == {"bptt": (9, 8)}
    assert vars(args) == vars(saved) | {"bptt": 8}
    with pytest.raises(BadInput, match="--tied True contradicts m.pt, which was trained with tied False"):
        checkpoint.merge_flags(main.parse_flags, ["--tied"], {"flags": vars(saved)}, "m.pt", ["tied"])


def test_progress_of_earlier_versions_lacks_two_figures():
    """Each row of the epoch was predicted, and the rate of each batch counts once."""
    values = asdict(Progress(epoch=1, row=21, batch=3, window_batches=2))
    del values["epoch_rows"], values["window_scale"]
    progress = resume.restore_progress(values, None)
    assert (progress.epoch_rows, progress.window_scale) == (21, 2.0)
