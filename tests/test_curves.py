"""The stages of a record are those of the run, each once."""

import json

import curves
import plot


def stages_of(path, *lines):
    """Write a record of (kind, values) lines, and read its stages."""
    path.write_text("".join(json.dumps({"kind": kind, **values}) + "\n" for kind, values in lines))
    return curves.read_stages(path)


def epoch(number, loss):
    return "epoch", {"epoch": number, "loss": loss, "seconds": 1.0}


def test_a_stage_that_was_begun_twice_and_goes_on_is_drawn_once(tmp_path):
    """Both times it was stopped before anything was recorded of it, so the two are alike."""
    begun = ("run", {"stage": "finetune"}), ("loaded", {"loss": 3.0})
    stages = stages_of(tmp_path / "m.metrics.jsonl", ("run", {"stage": "train"}), epoch(1, 3.0), *begun, *begun,
                       ("resume", {"stage": "finetune", "epoch": 1}), epoch(1, 2.0), epoch(2, 1.0))
    assert [(stage.name, list(stage.epochs)) for stage in stages] == [("train", [1]), ("finetune", [1, 2])]


def test_scores_hang_from_the_loaded_model_where_no_tuned_epoch_is_better(tmp_path):
    stage, = stages_of(tmp_path / "m.metrics.jsonl", ("run", {"stage": "finetune"}), ("loaded", {"loss": 3.0}),
                       epoch(1, 3.2), ("pointer", {"split": "valid", "loss": 2.5}))
    assert list(plot.stage_scores(stage, "epochs", "loss")) == [("pointer", (1, 3.0), (1, 2.5))]


def test_dynamic_evaluation_with_the_cache_is_a_score_of_its_own(tmp_path):
    stage, = stages_of(tmp_path / "m.metrics.jsonl", ("run", {"stage": "finetune"}), epoch(1, 3.0),
                       ("pointer", {"split": "valid", "loss": 2.5, "window": 500}),
                       ("dynamic", {"split": "valid", "loss": 2.6}),
                       ("dynamic", {"split": "valid", "loss": 2.4, "window": 500}))
    assert [(kind, place[1]) for kind, _, place in plot.stage_scores(stage, "epochs", "loss")] == [
        ("pointer", 2.5), ("dynamic", 2.6), ("both", 2.4)]
