"""The cache in blocks is the cache of its definition, whatever the blocks are."""

import math
from itertools import product

import pytest
import torch
from helpers import read_metrics

import cache
import pointer
import scoring


def naive_loss(outputs, targets, logprob, window, theta, lambdasm):
    """The definition, a prediction at a time: (1 - lambda) p_model(w) + lambda sum_i 1[w = x_{i+1}] softmax_i."""
    total = 0.0
    for t in range(len(outputs)):
        p = logprob[t].exp()
        if t > window:
            attention = torch.softmax(theta * outputs[t - window:t] @ outputs[t], 0)
            p = (1 - lambdasm) * p + lambdasm * attention[targets[t - window:t] == targets[t]].sum()
        total -= math.log(p)
    return total / len(outputs)


def stream(tokens, bptt, words=7, size=4):
    """Outputs, targets and log-probabilities as a model would give them, in chunks of `bptt`."""
    torch.manual_seed(0)
    outputs, targets = torch.randn(tokens, size, dtype=torch.double), torch.randint(words, (tokens,))
    logprob = torch.randn(tokens, words, dtype=torch.double).log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return [(outputs[i:i + bptt], targets[i:i + bptt], logprob[i:i + bptt]) for i in range(0, tokens, bptt)]


@pytest.mark.parametrize("bptt", [1, 13, 64, 1000])
@pytest.mark.parametrize("window", [1, 10, 63, 150, 500])
def test_blocks_are_the_definition(bptt, window, monkeypatch):
    monkeypatch.setattr(cache, "QUERY_ROWS", 16)
    (whole,) = stream(200, 1000)
    expected = naive_loss(*whole, window, 0.7, 0.2)
    loss = cache.mixture_losses(stream(200, bptt), [window], [0.7], [0.2]).item()
    assert loss == pytest.approx(expected, abs=1e-12)


def test_without_the_cache_it_is_the_model():
    (whole,) = stream(200, 1000)
    loss = cache.mixture_losses([whole], [20], [1.0], [0.0]).item()
    assert loss == pytest.approx(-whole[2].mean().item(), abs=1e-12)


def test_similarities_too_large_for_exp_are_weighed_as_any_others():
    """exp(710) overflows float64; these products reach thousands."""
    ((outputs, *rest),) = stream(60, 60)
    loss = cache.mixture_losses([(40 * outputs, *rest)], [20], [1.0], [0.2]).item()
    assert loss == pytest.approx(naive_loss(40 * outputs, *rest, 20, 1.0, 0.2), abs=1e-12)


def test_a_flat_cache_counts_the_words_of_the_window():
    """With theta = 0 the cache is the share of the target among the last words."""
    outputs, targets, logprob = torch.randn(6, 4), torch.tensor([1, 2, 1, 1, 3, 1]), torch.full((6,), -1.0)
    p = [math.exp(-1)] * 4 + [0.5 * math.exp(-1) + 0.5 * share for share in (0 / 3, 2 / 3)]
    expected = -sum(map(math.log, p)) / 6
    (loss,) = cache.mixture_losses([(outputs, targets, logprob)], [3], [0.0], [0.5]).flatten()
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_grid_is_each_of_its_settings_alone():
    settings = [1, 30, 150, 500], [0.0, 0.5, 2.0], [0.0, 0.1, 0.9, 1 - 1e-9]
    (whole,) = stream(200, 1000)
    grid = cache.mixture_losses(stream(200, 64), *settings)
    for (w, window), (t, theta), (m, lambdasm) in product(*map(enumerate, settings)):
        assert grid[w, t, m].item() == pytest.approx(naive_loss(*whole, window, theta, lambdasm), abs=1e-12)


def test_the_best_setting_on_validation_is_applied_to_test(train, corpus_dir, tmp_path, capsys):
    save = tmp_path / "m.pt"
    train(save, "--epochs", "1")
    command = ["--no-cuda", "--data", str(corpus_dir), "--save", str(save)]
    pointer.main([*command, "--window", "5", "20", "--theta", "0", "1", "9", "--lambdasm", "0.1", "0.6"])
    found = read_metrics(save)
    assert len(found["grid"]) == capsys.readouterr().out.count("| grid ") == 12
    best = min(found["grid"], key=lambda line: line["loss"])
    valid, test = found["pointer"]
    setting = {name: best[name] for name in ("window", "theta", "lambdasm")}
    assert best["loss"] == valid["loss"] < max(line["loss"] for line in found["grid"])
    assert setting.items() <= valid.items()
    assert setting.items() <= test.items()
    pointer.main([*command, *(token for name, value in setting.items() for token in (f"--{name}", str(value)))])
    assert read_metrics(save)["pointer"][3]["loss"] == pytest.approx(test["loss"], abs=1e-6)


def test_the_script_scores_and_records(train, corpus_dir, tmp_path, capsys):
    save = tmp_path / "m.pt"
    train(save, "--epochs", "1")
    for bptt in ("3", "5000"):
        pointer.main(["--no-cuda", "--data", str(corpus_dir), "--save", str(save), "--model", "LSTM",
                      "--lambdasm", "0.1", "--theta", "1.0", "--window", "20", "--bptt", bptt])
    assert capsys.readouterr().out.count("| pointer ") == 4
    cache = read_metrics(save)["pointer"]
    assert [line["split"] for line in cache] == ["valid", "test"] * 2
    assert [line["loss"] for line in cache[:2]] == pytest.approx([line["loss"] for line in cache[2:]], abs=1e-6)


@pytest.mark.parametrize("window", [2, 3])
def test_a_text_is_too_short_if_the_cache_changes_no_prediction(capsys, window):
    """A text of 5 words has 4 predictions; before the last of them 3 lie behind."""
    outputs, targets, logprob = torch.randn(4, 4), torch.zeros(4, dtype=torch.long), torch.full((4,), -1.0)
    (loss,) = cache.mixture_losses([(outputs, targets, logprob)], [window], [1.0], [0.5]).flatten()
    scoring.log_idle("pointer", [1, window], valid=torch.zeros(5, 1))
    assert ("the cache never joins" in capsys.readouterr().out) == (loss.item() == 1)
