"""What a run of some minutes chooses, and what it leaves to the flags."""

import shlex
from types import SimpleNamespace

import pytest
import torch

import budget
import process
import sizes
from errors import BadInput
from main import make_parser, parse_flags


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on a mat and saw one dog run by\n" * 300, encoding="utf-8")
    return path


class FakeCorpus:
    def __init__(self, ntoken, tokens):
        self.dictionary, self.train = range(ntoken), range(tokens)


def choose(monkeypatch, products, *flags, tokens=10**6, ntoken=65, device="cpu", processes=1):
    """What is chosen with `products` of two numbers a second, or as many as they return for the flags."""
    monkeypatch.setattr(sizes, "probe", lambda args, *_: products(args) if callable(products) else products)
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: 100.0))
    argv = ["--minutes", "1", "--level", "char", "--save", "m.pt", *flags]
    args, given = parse_flags(argv), make_parser().given(argv)
    sizes.choose_flags(args, given, FakeCorpus(ntoken, tokens), torch.device(device), processes)
    return args, given


def test_the_size_is_the_largest_that_sees_two_tokens_for_each_weight(monkeypatch):
    """1 x 256 has 8 * 256^2 weights in its layer, and 65 * 256 in its softmax; 1 x 384 has 2.25 times as many."""
    layer, softmax = 8 * 256**2, 65 * 256
    enough = 3 * (layer + softmax) * 2 * layer / 60 / sizes.OF_THE_TIME
    assert choose(monkeypatch, enough * 1.001)[0].nhid == 256
    assert choose(monkeypatch, enough * 0.999)[0].nhid == 192


def test_the_time_that_the_start_took_is_no_time_to_train(monkeypatch):
    """Half of the minute has gone."""
    layer, softmax = 8 * 256**2, 65 * 256
    enough = 3 * (layer + softmax) * 2 * layer / 30 / sizes.OF_THE_TIME
    monkeypatch.setattr(process, "began", 70.0)
    assert choose(monkeypatch, enough * 1.001)[0].nhid == 256
    assert choose(monkeypatch, enough * 0.999)[0].nhid == 192


@pytest.mark.parametrize("epochs, nlayers, dropout, wdrop", [
    (1.9, 1, 0, 0), (4, 1, 0.04, 0), (7.9, 1, 0.16, 0), (8.1, 2, 0.17, 0), (20, 2, 0.2, 0.1), (40, 2, 0.39, 0.29)])
def test_the_more_often_a_text_is_read_the_more_is_dropped(monkeypatch, epochs, nlayers, dropout, wdrop):
    """The size that 10^10 products a second allow makes so many tokens in the time."""
    products = 1e10 * 60 * sizes.OF_THE_TIME
    size = choose(monkeypatch, 1e10)[0].nhid
    seen = products / 3 / (8 * size**2 + 65 * size)
    args, _ = choose(monkeypatch, 1e10, tokens=round(seen / epochs))
    assert (args.nlayers, args.dropout, args.wdrop) == (nlayers, dropout, wdrop)


@pytest.mark.parametrize("tokens, layers", [(10**7, 1), (40_000, 2)])
def test_a_qrnn_of_characters_has_two_layers_however_often_the_text_is_read(monkeypatch, tokens, layers):
    """With 10^10 products a second the shorter text is read often."""
    for flags, expected in (("LSTM", layers), ("GRU", layers), ("QRNN", 2), ("QRNN --level word", layers)):
        assert choose(monkeypatch, 1e10, "--model", *flags.split(), tokens=tokens)[0].nlayers == expected


@pytest.mark.parametrize("level, strain, expected", [
    ("word", 0.1, (0, 0, 0, 0, 0)), ("char", 1, (0, 0, 0, 0, 0)), ("word", 10**0.5, (0.1, 0.1, 0, 0, 0)),
    ("char", 9.9, (0.2, 0.2, 0, 0, 0)), ("char", 10, (0.2, 0.2, 0.05, 0, 0.1)), ("word", 60, (0.2, 0.2, 0.05, 0, 0.1)),
    ("word", (60 * 300)**0.5, (0.35, 0.25, 0.275, 0.05, 0.3)), ("word", 300, (0.5, 0.3, 0.5, 0.1, 0.5)),
    ("word", 5000, (0.5, 0.3, 0.5, 0.1, 0.5)), ("byte", (60 * 180)**0.5, (0.3, 0.25, 0.075, 0, 0.2)),
    ("char", 180, (0.4, 0.3, 0.1, 0, 0.3))])
def test_the_dropouts_of_a_strain(level, strain, expected):
    """From 60 to 300 the square root of 60 * 300 is half way as their ratios go."""
    chosen = sizes.dropouts(strain, level)
    got = [chosen[name] for name in ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")]
    assert got == pytest.approx(expected, abs=0.006)  # two decimals


@pytest.mark.parametrize("epochs, dropped", [(1.0, False), (1.1, True)])
def test_a_text_that_is_read_once_needs_no_dropout_however_large_the_layers_are(monkeypatch, epochs, dropped):
    monkeypatch.setattr(sizes, "tokens_seen", lambda *_: epochs * 10**6)
    args, _ = choose(monkeypatch, 1e10, "--nlayers", "2", "--nhid", "1024")
    assert all((getattr(args, name) > 0) is dropped for name in ("dropout", "dropouth", "dropouti", "wdrop"))


@pytest.mark.parametrize("level, epochs", [("word", 100), ("char", 30), ("byte", 30)])
def test_a_text_is_read_no_more_often_than_pays(monkeypatch, level, epochs):
    args, given = choose(monkeypatch, 1e12, "--level", level, tokens=50_000)
    assert args.epochs == epochs
    again = parse_flags([*shlex.split(sizes.describe(args, given))[2:], "--save", "m.pt"])
    assert again.epochs == epochs
    assert choose(monkeypatch, 1e12, "--level", level, "--epochs", "90", tokens=50_000)[0].epochs == 90


@pytest.mark.parametrize("level, epochs, expected", [
    ("word", 2.9, ("adam", 1, 0, 0)), ("word", 3, ("sgd", 0.25, 2, 1)),
    ("char", 11.9, ("adam", 1, 0, 0)), ("char", 12, ("sgd", 0.25, 2, 1))])
def test_a_text_that_is_read_often_is_learned_by_sgd_as_in_the_papers(monkeypatch, level, epochs, expected):
    monkeypatch.setattr(sizes, "tokens_seen", lambda *_: epochs * 10**6)
    args, _ = choose(monkeypatch, 1e10, "--level", level)
    assert (args.optimizer, args.clip, args.alpha, args.beta) == expected
    assert args.lr == (sizes.SGD_LR if expected[0] == "sgd" else sizes.learning_rate(args.nhid))
    args, _ = choose(monkeypatch, 1e10, "--level", level, "--optimizer", "adam", "--alpha", "3")
    assert (args.optimizer, args.alpha, args.lr) == ("adam", 3, sizes.learning_rate(args.nhid))


def test_sgd_in_minutes_has_no_averages_unless_they_are_asked_for(monkeypatch):
    """They are no better than a rate that falls to nothing. NT-ASGD does not begin within --nonmono epochs."""
    args, given = choose(monkeypatch, 1e12, "--level", "word", "--epochs", "40")
    assert args.optimizer == "sgd"
    assert args.nonmono > 1000
    assert f"--nonmono={args.nonmono}" in sizes.describe(args, given)
    assert choose(monkeypatch, 1e12, "--level", "word", "--nonmono", "5")[0].nonmono == 5


@pytest.mark.parametrize("epochs", [1, 20])
@pytest.mark.parametrize("lr, optimizer", [(0.002, "adam"), (20, "sgd")])
def test_a_rate_given_says_which_optimizer_it_is_for(monkeypatch, epochs, lr, optimizer):
    monkeypatch.setattr(sizes, "tokens_seen", lambda *_: epochs * 10**6)
    args, _ = choose(monkeypatch, 1e10, "--level", "word", "--lr", str(lr))
    assert (args.lr, args.optimizer) == (lr, optimizer)


@pytest.mark.parametrize("rows, columns", [(32_000, 16), (31_999, 8), (15_999, 4), (1, 4)])
def test_a_batch_is_no_larger_than_leaves_enough_steps(rows, columns):
    assert sizes.fewer_columns(16, rows, 2000, 4) == columns


@pytest.mark.parametrize("optimizer, columns", [("adam", 16), ("sgd", 8)])
def test_sgd_takes_more_steps_than_adam(monkeypatch, optimizer, columns):
    """2,500 batches of 16 columns."""
    monkeypatch.setattr(sizes, "tokens_seen", lambda *_: 2500 * 16 * 64)
    assert choose(monkeypatch, 1e10, "--optimizer", optimizer)[0].batch_size == columns


def test_fewer_columns_are_for_a_cpu_and_some_for_each_process(monkeypatch):
    def columns(*flags, level="word", **how):
        return choose(monkeypatch, 1e9, "--level", level, *flags, **how)[0].batch_size
    assert columns() == columns("--optimizer", "sgd") == 4
    assert columns(level="char") == columns(level="byte") == 8
    assert columns(device="cuda") == columns("--batch_size", "16") == 16
    assert columns(processes=2) == 8
    assert columns(processes=8) == columns(processes=2, level="char") == 16
    assert columns(processes=40) == columns(processes=40, device="cuda") == 40


def test_processes_together_are_as_fast_as_one_of_their_speed_each(monkeypatch):
    sizes_of = [choose(monkeypatch, 4e10 / processes, "--batch_size", "64", processes=processes)[0].nhid
                for processes in (1, 2, 4)]
    assert sizes_of[0] == sizes_of[1] == sizes_of[2] > choose(monkeypatch, 1e10, "--batch_size", "64")[0].nhid


@pytest.mark.parametrize("processes, columns", [(1, 12), (4, 3), (5, 2), (20, 1)])
def test_what_is_timed_are_the_columns_of_one_process(monkeypatch, processes, columns):
    monkeypatch.setattr(sizes, "step_seconds", lambda _, tokens, __: tokens.size(1))
    args = parse_flags(["--bptt", "7", "--batch_size", "12", "--nhid", "8", "--emsize", "8", "--nlayers", "1"])
    assert sizes.probe(args, 65, torch.device("cpu"), processes) == 3 * 7 * (8 * 8**2 + 65 * 8)
    monkeypatch.setattr(sizes, "step_seconds", lambda *_: 1)
    assert sizes.probe(args, 65, torch.device("cpu"), processes) == columns * 3 * 7 * (8 * 8**2 + 65 * 8)


def test_the_layers_suit_an_embedding_that_is_given(monkeypatch):
    """2 x 192 units beside 1500 are 4 * 192 * 1692 weights in the first layer, and 4 * 1500 * 1692 in the second."""
    layers, softmax = 4 * (192 + 1500) * (1500 + 192), 65 * 1500
    enough = 3 * (layers + softmax) * 2 * layers / 60 / sizes.OF_THE_TIME
    for speed, nhid in ((1.001, 192), (0.999, 128)):
        args, _ = choose(monkeypatch, enough * speed, "--emsize", "1500", tokens=10**8)
        assert (args.nlayers, args.nhid) == (2, nhid)


def test_one_layer_that_is_not_tied_may_be_wider_than_the_embedding(monkeypatch):
    flags = ["--level", "word", "--nhid", "600"]
    assert choose(monkeypatch, 1e10, *flags, "--no-tied")[0].nlayers == 1
    assert choose(monkeypatch, 1e10, *flags)[0].nlayers == 2


@pytest.mark.parametrize("minutes, interval", [("0.5", 1), ("15", 1.5), ("300", 30), ("900", 30)])
def test_states_are_saved_a_tenth_of_the_time_apart_but_1_to_30_minutes(monkeypatch, minutes, interval):
    assert choose(monkeypatch, 1e10, "--minutes", minutes)[0].save_interval == interval
    assert choose(monkeypatch, 1e10, "--minutes", minutes, "--save-interval", "0")[0].save_interval == 0


def test_what_is_dropped_goes_by_the_layers_that_are_trained(monkeypatch):
    """Those of words are two where the embedding is narrower, and slower than the one that was thought of first."""
    products = 6e12
    args, _ = choose(monkeypatch, products, "--level", "word", tokens=4 * 10**6, ntoken=10_000)
    epochs = sizes.OF_THE_TIME * 60 * products / 3 / sizes.weights(args, 10_000) / 4e6
    layers = 4 * args.nhid * (args.emsize + args.nhid) + 4 * args.emsize * (args.nhid + args.emsize)
    strain = epochs * layers / 4e6
    assert args.nlayers == 2
    assert 0 < args.dropout == sizes.dropouts(strain, "word")["dropout"] < 0.2


@pytest.mark.parametrize("products", [1e8, 1e9, 1e10, 1e11, 1e12])
def test_words_get_no_size_without_effect(monkeypatch, products):
    """The embedding of words has a largest size. A single layer whose weight is tied to it is as wide as it is."""
    args, _ = choose(monkeypatch, products, "--level", "word", ntoken=12_000)
    assert args.emsize <= sizes.WORD_EMSIZE
    assert args.nlayers == 2 if args.nhid > args.emsize else args.nhid == args.emsize


def test_few_epochs_make_a_small_model_however_long_the_time_is(monkeypatch):
    """Two epochs of a million tokens are two for each of 10^6 weights: 1 x 256 has 8 * 256^2, 1 x 384 has more."""
    assert choose(monkeypatch, 1e13)[0].nhid > 384
    assert choose(monkeypatch, 1e13, "--epochs", "2")[0].nhid == 256


def test_a_flag_given_wins_even_with_the_value_of_its_default(monkeypatch):
    args, _ = choose(monkeypatch, 1e10, "--nhid", "1150", "--dropout", "0.4", "--clip", "0.25")
    assert (args.nhid, args.dropout, args.clip) == (1150, 0.4, 0.25)


@pytest.mark.parametrize("flags", [("--nhid", "50"), ("--nhid", "1150"), ("--emsize", "30"), ("--emsize", "700")])
@pytest.mark.parametrize("level", ["char", "word"])
def test_a_size_given_is_never_without_effect(monkeypatch, flags, level):
    """A single layer whose weight is tied to the embedding is as wide as it is."""
    args, _ = choose(monkeypatch, 1e10, "--level", level, *flags)
    assert getattr(args, flags[0].strip("-")) == int(flags[1])
    assert args.nlayers == 2 or args.nhid == args.emsize


def test_the_command_is_quoted_as_the_system_reads_it(monkeypatch):
    args, given = choose(monkeypatch, 1e10, "--data", "my book.txt")
    monkeypatch.setattr(sizes.sys, "platform", "win32")
    assert ' "--data=my book.txt" ' in sizes.describe(args, given)
    monkeypatch.setattr(sizes.sys, "platform", "linux")
    assert " '--data=my book.txt' " in sizes.describe(args, given)


def test_the_command_that_is_printed_amounts_to_the_same_flags(monkeypatch):
    args, given = choose(monkeypatch, 1e10, "--seed", "5", "--data", "it's my book.txt", "--shares", "90", "10")
    words = shlex.split(sizes.describe(args, given))
    assert words[:2] == ["python", "main.py"]
    assert vars(parse_flags(words[2:])) == vars(args)


def test_the_command_of_a_dry_run_is_that_of_a_run_in_one_order(monkeypatch):
    args, given = choose(monkeypatch, 1e10, "--seed", "5", "--dry-run", "--min-count", "2")
    assert sizes.describe(args, given).endswith("--bptt=64 --epochs=30 --min-count=2 --save=m.pt --seed=5")


def test_a_book_is_read_by_characters_and_the_run_says_what_was_chosen(train, book, tmp_path, capsys):
    _, metrics = train(tmp_path / "m.pt", "--data", str(book), "--minutes", "1000", "--epochs", "1")
    flags = metrics["run"][0]["flags"]
    assert (flags["level"], flags["optimizer"], flags["nhid"]) == ("char", "sgd", 6)  # 6 was given, and a rate for SGD
    assert "the same by flags: python main.py" in capsys.readouterr().out


def test_without_minutes_nothing_is_chosen(train, book, tmp_path):
    _, metrics = train(tmp_path / "m.pt", "--data", str(book), "--epochs", "1")
    assert (metrics["run"][0]["flags"]["level"], metrics["run"][0]["flags"]["optimizer"]) == ("word", "sgd")


@pytest.mark.parametrize("tokens, columns", [(2**22 - 1, 16), (2**22, 32)])
def test_a_long_text_has_more_columns(monkeypatch, tokens, columns):
    assert choose(monkeypatch, 1e10, tokens=tokens, device="cuda")[0].batch_size == columns


@pytest.mark.parametrize("nhid, lr", [(384, 0.004), (512, 0.003)])
def test_a_wide_layer_has_a_smaller_learning_rate(monkeypatch, nhid, lr):
    assert choose(monkeypatch, 1e10, "--nhid", str(nhid))[0].lr == lr


@pytest.mark.parametrize("speeds, optimizers", [((1e10, 1e9), ("sgd", "adam")), ((1e9, 1e10), ("adam", "sgd"))])
def test_what_is_chosen_goes_by_the_speed_of_what_would_be_chosen(monkeypatch, speeds, optimizers):
    """A model of middling size is timed, then the one that its speed allows, which is slower here, or faster."""
    timed = []

    def products(args):
        timed.append((args.nlayers, args.nhid, args.batch_size))
        return speeds[len(timed) - 1]
    first, last = (choose(monkeypatch, speed, tokens=50_000)[0] for speed in speeds)
    assert (first.optimizer, last.optimizer) == optimizers
    assert choose(monkeypatch, products, tokens=50_000)[0] == last
    assert timed == [(1, 256, 16), (first.nlayers, first.nhid, first.batch_size)]


def test_a_size_for_which_there_is_no_memory_is_bad_input(monkeypatch):
    def step(*_):
        raise RuntimeError("CUDA out of memory")
    monkeypatch.setattr(sizes, "train_step", step)
    with pytest.raises(BadInput, match="out of memory in a training step of this size"):
        sizes.probe(parse_flags(["--nhid", "8", "--emsize", "8", "--minutes", "9"]), 65, torch.device("cpu"))


def test_few_steps_are_timed_where_they_take_much_of_the_time(monkeypatch):
    taken = []
    monkeypatch.setattr(sizes, "time", SimpleNamespace(perf_counter=lambda: 2.0 * len(taken)))
    monkeypatch.setattr(sizes, "train_step", lambda *given: taken.append(1) or (given[5], 0.0))
    for minutes, steps in (("1", 1), ("3", 2), ("60", 4)):
        taken.clear()
        flags = ["--bptt", "7", "--batch_size", "4", "--nhid", "8", "--emsize", "8", "--nlayers", "1"]
        args = parse_flags([*flags, "--minutes", minutes])
        assert sizes.probe(args, 65, torch.device("cpu")) == 3 * 7 * 4 * (8 * 8**2 + 65 * 8) / 2
        assert len(taken) == steps


@pytest.mark.parametrize("ntoken, probed", [(65, 65), (10_000, 10_000), (10**6, 10_000)])
def test_no_large_vocabulary_is_timed(monkeypatch, ntoken, probed):
    """Its softmax alone would take much of the time."""
    seen = []
    monkeypatch.setattr(sizes, "probe", lambda _, words, *__: seen.append(words) or 1e10)
    argv = ["--minutes", "1", "--level", "word", "--save", "m.pt"]
    sizes.choose_flags(parse_flags(argv), make_parser().given(argv), FakeCorpus(ntoken, 10**6), torch.device("cpu"))
    assert seen == [probed, probed]


def test_the_speed_is_that_of_the_fastest_step_but_the_first(monkeypatch):
    """A token is multiplied by 8 * 256^2 weights of the layer and 65 * 256 of the softmax, three times in a step."""
    taken, now = [1, 5, 2, 4], 0

    def step(*given):
        nonlocal now
        now += taken.pop(0)
        return given[5], 0.0
    monkeypatch.setattr(sizes, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(sizes, "train_step", step)
    args = parse_flags(["--bptt", "7", "--batch_size", "4", "--nhid", "256", "--emsize", "256", "--nlayers", "1",
                        "--minutes", "9"])
    assert sizes.probe(args, 65, torch.device("cpu")) == 3 * 7 * 4 * (8 * 256**2 + 65 * 256) / 2
