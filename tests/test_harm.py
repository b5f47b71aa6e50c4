"""Nothing that a person has made is lost: by links, by --overwrite, on a full disk, between two moments."""

import signal

import pytest
import torch
from helpers import read_metrics, same_weights, tune, write

import checkpoint
import dynamic
import pointer
import run_files
from errors import BadInput
from files import locked


def test_a_run_does_not_go_on_over_another(train, tmp_path):
    train(tmp_path / "a.pt", "--epochs", "1")
    train(tmp_path / "b.pt", "--epochs", "1", "--seed", "7")
    before = (tmp_path / "b.pt").read_bytes()
    go_on = ["--epochs", "2", "--resume", str(tmp_path / "a.pt")]
    with pytest.raises(BadInput, match="a run lies there already"):
        train(tmp_path / "b.pt", *go_on)
    assert (tmp_path / "b.pt").read_bytes() == before
    _, record = train(tmp_path / "b.pt", *go_on, "--overwrite")
    assert [line["seed"] for line in record["run"]] == [1111]
    assert [line["epoch"] for line in record["epoch"]] == [1, 2]


def test_fine_tuning_anew_does_not_remove_what_it_loads(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1", "--lr", "20")
    tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("m.*")}
    assert "m.untuned.pt" in before
    with pytest.raises(BadInput, match="that is a file of the run at --save"):
        tune(corpus_dir, "--load", tmp_path / "m.untuned.pt", "--save", tmp_path / "m.pt", "--overwrite")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("m.*")} == before


def test_a_run_that_cannot_go_on_elsewhere_removes_and_leaves_nothing_there(train, tmp_path):
    for name in ("m.pt", "n.pt"):
        train(tmp_path / name, "--epochs", "1")
    torch.save(checkpoint.load(tmp_path / "m.pt") | {"stage": "finetune"}, tmp_path / "m.pt")  # m.untuned.pt is gone
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    for name, flags in (("n.pt", ["--overwrite"]), ("new.pt", [])):
        with pytest.raises(BadInput, match=r"m\.untuned\.pt: cannot be read"):
            train(tmp_path / name, "--epochs", "2", "--resume", str(tmp_path / "m.pt"), *flags)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_a_text_is_never_overwritten(train, tmp_path):
    (tmp_path / "book.txt").write_text("the cat sat\n" * 200)
    with pytest.raises(BadInput, match="what lies there is no model"):
        train(tmp_path / "book.txt", "--data", str(tmp_path / "book.txt"), "--overwrite")
    assert (tmp_path / "book.txt").read_text().startswith("the cat")


def test_no_copy_of_a_model_takes_the_place_of_another_file(train, tmp_path):
    first, anew, on = ["--when", "1"], ["--overwrite"], ["--epochs", "2", "--resume", str(tmp_path / "m.pt")]
    (tmp_path / "m.pt.e1").write_text("a diary")
    for flags in ([], anew):
        with pytest.raises(BadInput, match=r"--when 1: a copy .*m\.pt\.e1, and what lies there is no model"):
            train(tmp_path / "m.pt", "--epochs", "1", *first, *flags)
    (tmp_path / "m.pt.e1").unlink()
    train(tmp_path / "m.pt", "--epochs", "1", *first)
    for name, epoch in (("m.pt", 2), ("n.pt", 2)):
        (tmp_path / f"{name}.e{epoch}").write_text("a diary")
        with pytest.raises(BadInput, match="what lies there is no model"):
            train(tmp_path / name, *on, "--when", "1", "2")
        assert (tmp_path / f"{name}.e{epoch}").read_text() == "a diary"
        (tmp_path / f"{name}.e{epoch}").unlink()
    assert not list(tmp_path.glob("n.*"))
    (tmp_path / "m.pt").unlink()
    (tmp_path / "m.last.pt").unlink()
    with pytest.raises(BadInput, match=r"--when 1: a model lies at .*m\.pt\.e1 already; --overwrite replaces it"):
        train(tmp_path / "m.pt", "--epochs", "1", *first)
    train(tmp_path / "m.pt", "--epochs", "1", *first, *anew)
    assert checkpoint.load(tmp_path / "m.pt.e1")["epoch"] == 1


def test_a_text_beside_a_run_has_no_record_to_share(train, tmp_path):
    (tmp_path / "book").write_text("the cat sat\n" * 200)
    assert train(tmp_path / "book.pt", "--data", str(tmp_path / "book"), "--epochs", "1")[0] == 0


def test_a_link_and_what_it_leads_to_are_one_run(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    (tmp_path / "link.pt").symlink_to(tmp_path / "m.pt")
    with locked(run_files.metrics_path(tmp_path / "m.pt")), pytest.raises(BadInput, match="in use by process"):
        tune(corpus_dir, "--save", tmp_path / "link.pt", "--epochs", 1)
    tune(corpus_dir, "--save", tmp_path / "link.pt", "--epochs", 1)
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "m.finetune.last.pt").exists()


def test_scores_of_a_model_behind_a_link_are_in_its_own_record(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "best.pt").symlink_to(tmp_path / "m.pt")
    common = ["--no-cuda", "--save", str(tmp_path / "links" / "best.pt")]
    pointer.main([*common, "--window", "5"])
    dynamic.main([*common, "--batch_size", "4"])
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["best.pt"]
    assert {"pointer", "dynamic"} <= read_metrics(tmp_path / "m.pt").keys()


def test_a_fine_tuning_has_a_state_from_its_start(train, corpus_dir, tmp_path, monkeypatch):
    train(tmp_path / "m.pt", "--epochs", "1")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.train_batches", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(corpus_dir, "--load", tmp_path / "m.pt", "--save", tmp_path / "t.pt", "--epochs", 2)
    assert tune(corpus_dir, "--resume", tmp_path / "t.pt", "--epochs", 2) == 0


def test_a_tuned_model_that_is_kept_already_is_no_hindrance(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1", "--lr", "20")
    for epochs in ("2", "3"):
        tune(corpus_dir, "--save", tmp_path / "m.pt", "--epochs", 1)
        content = checkpoint.load(tmp_path / "m.pt") | {"stage": "finetune"}  # as if it had become better
        torch.save(content, tmp_path / "m.pt")
        train(tmp_path / "m.pt", "--epochs", epochs, "--resume", str(tmp_path / "m.pt"))
    assert sorted(path.name for path in tmp_path.glob("m.finetuned?.pt")) == ["m.finetuned2.pt"]


def test_a_signal_between_the_last_batch_and_the_end_of_an_epoch_loses_nothing(train, tmp_path, monkeypatch):
    import training
    end_epoch, calls = training.end_epoch, iter(range(10**6))
    train(tmp_path / "whole.pt", "--epochs", "3")

    def end(run):
        if next(calls) == 0:
            signal.raise_signal(signal.SIGTERM)
        end_epoch(run)

    with monkeypatch.context() as patch:
        patch.setattr(training, "end_epoch", end)
        assert train(tmp_path / "parts.pt", "--epochs", "3")[0] == 128 + signal.SIGTERM
    assert checkpoint.load(tmp_path / "parts.last.pt")["state"]["progress"]["epoch"] == 1
    train(tmp_path / "parts.pt", "--epochs", "3", "--resume", str(tmp_path / "parts.pt"))
    assert same_weights(tmp_path / "whole.last.pt", tmp_path / "parts.last.pt")


def test_a_note_in_a_record_stays(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    with open(tmp_path / "m.metrics.jsonl", "a") as file:
        file.write("note: a good run\n")
    train(tmp_path / "m.pt", "--epochs", "2", "--resume", str(tmp_path / "m.pt"))
    assert "note: a good run\n" in (tmp_path / "m.metrics.jsonl").read_text()


@pytest.mark.parametrize("line", ['{"kind": "test"}', '{"kind": "run"}', '{"kind": "pointer", "split": "test"}',
                                  '{"kind": "test", "epochs": 1, "valid_loss": null, "loss": null, "seconds": 1}'])
def test_a_table_of_records_that_lack_something(line):
    import json

    import table
    assert len(list(table.table([json.loads(line)]))) >= 2


def test_text_is_not_written_over_a_checkpoint(trained, tmp_path):
    with pytest.raises(BadInput, match="a checkpoint lies there"):
        write(trained, "--outf", tmp_path / "m.last.pt")


def test_text_is_not_written_over_its_prompt(trained, tmp_path):
    (tmp_path / "book.txt").write_text("the  cat\n")
    with pytest.raises(BadInput, match=r"book\.txt: that is the prompt"):
        write(trained, "--prompt-file", tmp_path / "book.txt", "--outf", tmp_path / "book.txt")
    assert (tmp_path / "book.txt").read_text() == "the  cat\n"


def test_a_prompt_file_with_a_mark(trained, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfthe cat")
    capsys.readouterr()
    write(trained, "--prompt-file", tmp_path / "prompt.txt")
    assert capsys.readouterr().out.startswith("the cat ")


def test_a_full_disk_keeps_nobody_from_locking(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("files.os.write", full)
    with locked(tmp_path / "m"), pytest.raises(BadInput, match="in use by process unknown"), locked(tmp_path / "m"):
        pass
