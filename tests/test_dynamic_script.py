"""dynamic.py applies the best of a grid, keeps what it measured, names what fails, and goes on after a stop."""

import math
import re
from contextlib import nullcontext

import pytest
import torch
from helpers import read_metrics
from recipes import PTB_DYNAMIC

import checkpoint
import dynamic
import gradients
import run_files
from data import Corpus
from errors import BadInput


@pytest.fixture
def trained(train, corpus_dir, tmp_path, capsys):
    """Run the script on a tiny model; returns its metrics by kind and what it prints."""
    save = tmp_path / "m.pt"
    train(save, "--epochs", "2")

    def call(*flags):
        columns = [] if "sgd" in flags and "--rule=rms" not in flags else ["--batch_size", "4"]
        dynamic.main(["--no-cuda", "--data", str(corpus_dir), "--save", str(save), *columns, *flags])
        return read_metrics(save), capsys.readouterr().out
    call.save = save
    capsys.readouterr()
    return call


@pytest.fixture
def passes(monkeypatch):
    """How often the statistics were computed, as a list."""
    count, compute = [], gradients.gradient_rms
    monkeypatch.setattr(gradients, "gradient_rms", lambda *given: count.append(given) or compute(*given))
    return count


@pytest.mark.parametrize("flags, expected", [
    ([], (PTB_DYNAMIC, None, None, None)), (["--rule", "sgd"], ("--rule sgd --lr 0.2 --lamb 0.002", None, None, None)),
    (["--window", "9"], (PTB_DYNAMIC, [9], [0.6625523432485668], [0.12785920428335693])),
    (["--lambdasm", "0", "0.1"], (PTB_DYNAMIC, [3785], [0.6625523432485668], [0, 0.1]))])
def test_what_is_not_given_is_as_published(flags, expected):
    """... for Penn Treebank, and what help says of the other rule. One flag of the cache brings the others."""
    given, *cache = expected
    args = dynamic.parse_flags(flags)
    assert [args.window, args.theta, args.lambdasm] == cache
    for name in ("rule", "lr", "lamb", "epsilon", "bptt", "batch_size", "max_batches"):
        assert getattr(args, name) == getattr(dynamic.parse_flags(given.split()), name)


def test_the_best_setting_on_validation_is_applied_to_test(trained):
    found, printed = trained("--lr", "1e-4", "1e-3", "--lamb", "0.001", "0.1", "--lambdasm", "0.05", "0.2",
                             "--window", "9")
    assert len(found["dynamic-grid"]) == printed.count("| dynamic-grid |") == 8
    best = min(found["dynamic-grid"], key=lambda line: line["loss"])
    valid, test = found["dynamic"]
    names = ("lr", "lamb", "epsilon", "window", "theta", "lambdasm")
    setting = {name: best[name] for name in names}
    assert (valid["split"], test["split"]) == ("valid", "test")
    assert best["loss"] == valid["loss"] < max(line["loss"] for line in found["dynamic-grid"])
    assert setting.items() <= valid.items()
    assert setting.items() <= test.items()
    alone, _ = trained(*(token for name, value in setting.items() for token in (f"--{name}", str(value))))
    assert [line["loss"] for line in alone["dynamic"][2:]] == [valid["loss"], test["loss"]]


def test_a_fast_search_looks_at_the_first_words(trained, corpus_dir, monkeypatch):
    monkeypatch.setattr(dynamic, "FAST_WORDS", 30)
    found, _ = trained("--rule", "sgd", "--lr", "0.1", "1", "--fast")
    assert [line["tokens"] for line in found["dynamic-grid"]] == [30, 30]
    words = {split: len(getattr(Corpus(corpus_dir), split)) - 1 for split in ("valid", "test")}
    assert [line["tokens"] for line in found["dynamic"]] == [words["valid"], words["test"]]
    best = min(found["dynamic-grid"], key=lambda line: line["loss"])
    alone, _ = trained("--rule", "sgd", "--lr", str(best["lr"]))
    assert [line["loss"] for line in alone["dynamic"][2:]] == [line["loss"] for line in found["dynamic"]]


def test_a_fast_search_of_one_setting_says_that_there_is_none(trained):
    assert "--fast is not used" in trained("--rule", "sgd", "--fast")[1]
    assert "--fast" not in trained("--rule", "sgd", "--fast", "--lr", "0.1", "1")[1]


def test_a_grid_computes_the_statistics_once_and_the_next_run_reads_them(trained, passes):
    first, _ = trained("--lr", "1e-4", "1e-3", "--lamb", "0.001", "0.1")
    second, printed = trained("--lr", "1e-4", "1e-3", "--lamb", "0.001", "0.1")
    assert len(passes) == 1
    assert f"gradient statistics: from {run_files.statistics_path(trained.save)}" in printed
    assert [line["loss"] for line in second["dynamic"]] == [line["loss"] for line in first["dynamic"]] * 2


@pytest.mark.parametrize("change", ["--bptt=7", "--batch_size=5", "--max-batches=2", "text", "model", "damage", "cut"])
def test_statistics_of_something_else_are_not_used(trained, passes, corpus_dir, change):
    trained()
    path = run_files.statistics_path(trained.save)
    content = path.read_bytes()
    if change == "text":
        text = corpus_dir / "train.txt"
        text.write_text(text.read_text() + "the cat sat\n")
    elif change == "model":
        saved = checkpoint.load(trained.save)
        model = checkpoint.restore_model(saved, trained.save)
        checkpoint.save(trained.save, model, saved["flags"], saved["vocabulary"], 3.0, 1)
    elif change == "damage":
        value = torch.load(path)["statistics"]["encoder.weight"].numpy().tobytes()
        assert value in content
        path.write_bytes(content.replace(value, bytes(len(value))))
    elif change == "cut":
        path.write_bytes(content[:-100])
    trained(*([change] if change.startswith("--") else []))
    assert len(passes) == 2


@pytest.mark.parametrize("rows, enough", [(2, False), (3, True)])
def test_a_training_text_too_short_for_one_batch_has_no_statistics(trained, corpus_dir, passes, rows, enough):
    """As in training, the last row alone is no batch. The mean over none would be no number."""
    columns = str(len(Corpus(corpus_dir).train) // rows)
    with nullcontext() if enough else pytest.raises(BadInput, match=f"train: .* too few for a batch of {columns}"):
        trained("--batch_size", columns)
    assert len(passes) == enough


def test_statistics_that_cannot_be_kept_are_used_all_the_same(trained, monkeypatch):
    first, _ = trained()
    run_files.statistics_path(trained.save).unlink()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(gradients, "replacing", full)
    second, printed = trained()
    assert "not kept: [Errno 28] No space left on device" in printed
    assert [line["loss"] for line in second["dynamic"]] == [line["loss"] for line in first["dynamic"]] * 2


def test_the_checkpoint_is_never_changed(trained):
    before = trained.save.read_bytes()
    folder = {path.name for path in trained.save.parent.iterdir()}
    trained("--lr", "0.001", "0.1")
    assert trained.save.read_bytes() == before
    assert {path.name for path in trained.save.parent.iterdir()} - folder == {"m.statistics.pt"}


def test_a_cache_that_never_joins_is_told_of(trained):
    for flags, count in (([], 0), (["--window", "5"], 0), (["--window", "5", "999"], 2)):
        _, printed = trained("--rule", "sgd", *flags)
        assert printed.count("with --window 999 the cache never joins") == count


DIVERGED = r"chunk (\d+) of valid \(from word (\d+) on\): the loss is \S+ with --lr 9e\+29;"


def test_a_setting_that_diverges_is_an_error_that_names_chunk_and_rate(trained):
    with pytest.raises(BadInput) as error:
        trained("--rule", "sgd", "--lr", "9e29", "--lamb", "1")
    chunk, word = map(int, re.match(DIVERGED, str(error.value)).groups())
    assert word == 5 * (chunk - 1) + 1 > 1


def test_a_setting_that_diverges_does_not_end_the_grid(trained):
    """It counts as infinite, and the others are scored as they are without it."""
    found, printed = trained("--rule", "sgd", "--lr", "0.1", "9e29", "0.2", "--lamb", "1", "--lambdasm", "0.1", "0.2")
    assert len(re.findall(DIVERGED, printed)) == 1
    losses = [(line["lr"], line["loss"]) for line in found["dynamic-grid"]]
    assert [lr for lr, _ in losses] == [0.1, 0.1, 9e29, 9e29, 0.2, 0.2]
    assert [lr for lr, loss in losses if loss is None] == [9e29, 9e29]
    alone, _ = trained("--rule", "sgd", "--lr", "0.1", "0.2", "--lamb", "1", "--lambdasm", "0.1", "0.2")
    assert [line["loss"] for line in alone["dynamic"][2:]] == [line["loss"] for line in found["dynamic"]]


def test_a_setting_that_diverged_in_a_grid_is_an_error_alone_with_resume_too(trained):
    flags = ["--rule", "sgd", "--lamb", "1", "--lr", "9e29"]
    found, _ = trained(*flags, "0.1")
    with pytest.raises(BadInput, match=DIVERGED):
        trained(*flags, "--resume")
    assert read_metrics(trained.save)["dynamic"] == found["dynamic"]


def test_a_grid_of_which_nothing_is_finite_is_an_error(trained):
    with pytest.raises(BadInput, match="no setting of the grid has a finite loss"):
        trained("--rule", "sgd", "--lr", "8e29", "9e29", "--lamb", "1")
    assert "dynamic" not in read_metrics(trained.save)


# --- a stop ----------------------------------------------------------------------------------------------------------

GRID = ("--rule", "sgd", "--lr", "0.1", "9e29", "0.2", "--lamb", "0.5", "1")


@pytest.fixture
def passes_over_text(monkeypatch):
    """The splits that were scored and their settings, as a list; `stop_at` is the number of passes before a stop."""
    seen, score = [], dynamic.score_split

    def counted(*given):
        if len(seen) == counted.stop_at:
            raise SystemExit(143)  # as by SIGTERM
        seen.append((given[2], *given[5].values()))
        return score(*given)
    counted.stop_at, counted.seen = None, seen
    monkeypatch.setattr(dynamic, "score_split", counted)
    return counted


@pytest.mark.parametrize("done", [0, 1, 3, 6])
@pytest.mark.parametrize("cache", [[], ["--window", "5", "9"]], ids=["alone", "cache"])
def test_a_grid_that_was_stopped_goes_on(trained, passes_over_text, done, cache):
    """Each pass is done once, and the record is that of the grid that never stopped."""
    whole, _ = trained(*GRID, *cache)
    metrics = run_files.metrics_path(trained.save)
    lines = metrics.read_text().splitlines(True)
    metrics.write_text("".join(line for line in lines if '"dynamic' not in line))
    expected, passes_over_text.seen[:] = list(passes_over_text.seen), []
    passes_over_text.stop_at = done
    with pytest.raises(SystemExit):
        trained(*GRID, *cache, "--resume")
    passes_over_text.stop_at = None
    found, _ = trained(*GRID, *cache, "--resume")
    assert passes_over_text.seen == expected
    for kind in ("dynamic-grid", "dynamic"):
        assert [what_counts(line) for line in found[kind]] == [what_counts(line) for line in whole[kind]]


def what_counts(line):
    return {name: value for name, value in line.items() if name not in ("time", "seconds")}


def test_what_is_done_is_not_done_again(trained, passes_over_text):
    first, _ = trained(*GRID, "--resume")
    count = len(passes_over_text.seen)
    second, printed = trained(*GRID, "--resume")
    assert (len(passes_over_text.seen), second) == (count, first)
    assert printed.count("| dynamic-grid |") == 6
    assert printed.count("| dynamic |") == 2


@pytest.mark.parametrize("change", ["no --resume", "--bptt=7", "--rule=rms", "--window=9", "no window", "text",
                                    "model", "damage"])
def test_scores_of_something_else_are_computed(trained, passes_over_text, corpus_dir, change):
    flags = ["--lr", "0.1", "--lamb", "0.5"]
    trained("--rule", "sgd", *flags, *(["--window", "9"] if change == "no window" else []))
    path = run_files.metrics_path(trained.save)
    if change == "text":
        text = corpus_dir / "train.txt"
        text.write_text(text.read_text() + "the cat sat\n")
    elif change == "model":
        saved = checkpoint.load(trained.save)
        saved["model"]["decoder.bias"] += 1e-3
        torch.save(saved, trained.save)
    elif change == "damage":
        path.write_text(path.read_text().replace('"loss"', '"lost"'))
    trained("--rule", "sgd", *flags, *([] if change == "no --resume" else ["--resume"]),
            *([change] if change.startswith("--") else []))
    assert len(passes_over_text.seen) == 4


def test_another_cut_of_the_same_text_is_something_else(train, tmp_path, passes, passes_over_text):
    (tmp_path / "book.txt").write_text("the cat sat on a mat\n" * 60)
    train(tmp_path / "m.pt", "--data", str(tmp_path / "book.txt"), "--epochs", "1")
    for shares in (["80", "10", "10"], ["70", "10", "20"]):
        dynamic.main(["--no-cuda", "--save", str(tmp_path / "m.pt"), "--batch_size", "4", "--resume", "--shares",
                      *shares])
    assert len(passes) == 2
    assert len(passes_over_text.seen) == 4


def test_a_training_text_without_a_finite_loss_is_named(trained):
    saved = checkpoint.load(trained.save)
    saved["model"]["decoder.bias"][0] = math.nan
    torch.save(saved, trained.save)
    with pytest.raises(BadInput, match="batch 1 of the training text"):
        trained()


def test_the_files_of_a_run_that_begins_anew_are_removed(trained, train):
    trained()
    train(trained.save, "--epochs", "1", "--overwrite")
    assert not run_files.statistics_path(trained.save).exists()
