"""A vocabulary is chosen as the flags say, and any text goes through that of a model."""

import math

import pytest
import torch
from helpers import read_metrics

import checkpoint
import dynamic
import finetune
import main
import pointer
from data import Corpus, load_split
from errors import BadInput
from model import RNNModel
from vocabulary import Rules, carry_rows, choose_vocabulary, id_table

TRAIN = "b a b\nc b a\n"  # b 3, a 2, <eos> 2, c 1


@pytest.fixture
def folder(tmp_path):
    for split, text in (("train", TRAIN), ("valid", "d a\n"), ("test", "c e <unk>\n")):
        (tmp_path / f"{split}.txt").write_text(text)
    return tmp_path


def words(corpus, split):
    return [corpus.dictionary.idx2word[i] for i in getattr(corpus, split)]


@pytest.mark.parametrize("rules, expected", [
    (Rules(), ["b", "a", "<eos>", "c", "d", "e", "<unk>"]),
    (Rules(min_count=1), ["b", "a", "<eos>", "c", "<unk>"]),
    (Rules(min_count=2), ["b", "a", "<eos>", "<unk>"]),
    (Rules(max_vocab=3), ["b", "<eos>", "<unk>"]),
    (Rules(max_vocab=4), ["b", "a", "<eos>", "<unk>"]),
    (Rules(order="frequency"), ["b", "a", "<eos>", "c", "d", "e", "<unk>"]),
    (Rules(min_count=1, max_vocab=4, order="frequency"), ["b", "a", "<eos>", "<unk>"]),
])
def test_the_vocabulary_by_hand(folder, rules, expected):
    assert Corpus(folder, rules=rules).dictionary.idx2word == expected


def test_frequency_numbers_the_frequent_first_with_unk_among_them():
    tokens = ["x", "y", "z", "<eos>"]
    assert choose_vocabulary(tokens, [1, 2, 3, 4], Rules(order="frequency")) == ["<eos>", "z", "y", "x"]
    assert choose_vocabulary(tokens, [1, 2, 3, 4], Rules(2, 4, "frequency")) == ["<eos>", "z", "y", "<unk>"]


@pytest.mark.parametrize("tokens, expected", [
    (["x", "y", "z"], ["x", "y", "<unk>"]), (["x", "<unk>", "y", "z"], ["x", "<unk>", "y"]),
    (["x", "y", "<eos>", "z"], ["x", "<eos>", "<unk>"]), (["<unk>", "<eos>", "y", "x"], ["<unk>", "<eos>", "y"])])
def test_max_vocab_counts_unk_and_where_there_is_one_eos(tokens, expected):
    assert choose_vocabulary(tokens, [4, 3, 2, 1], Rules(max_vocab=3)) == expected


def test_what_is_left_out_becomes_unk_in_every_split(folder):
    corpus = Corpus(folder, rules=Rules(min_count=2))
    assert words(corpus, "train") == ["b", "a", "b", "<eos>", "<unk>", "b", "a", "<eos>"]
    assert words(corpus, "valid") == ["<unk>", "a", "<eos>"]
    assert words(corpus, "test") == ["<unk>", "<unk>", "<unk>", "<eos>"]
    assert corpus.unknown == {"train": 1, "valid": 1, "test": 2}, "a literal <unk> is in the vocabulary"
    assert corpus.describe().endswith("at word level; as <unk>: 1 / 1 / 2")


@pytest.mark.parametrize("size, dtype", [(2**15, "int16"), (2**15 + 1, "int32")])
def test_ids_of_a_chosen_vocabulary_are_whole_however_large_it_is(size, dtype):
    """A smaller type would wrap the last ids around to negative ones."""
    table = id_table(["w0", f"w{size - 1}", "none"], [f"w{i}" for i in range(size)])
    assert table.tolist() == [0, size - 1, -1]
    assert table.dtype == dtype


def test_characters_have_a_vocabulary_too(tmp_path):
    (tmp_path / "book.txt").write_text("aab\n" * 50 + "z")
    corpus = Corpus(tmp_path / "book.txt", "char", rules=Rules(min_count=2))
    assert corpus.dictionary.idx2word == ["a", "b", "<eos>", "<unk>"]


def test_bytes_have_none(folder):
    with pytest.raises(BadInput, match="for words and characters"):
        Corpus(folder, "byte", rules=Rules(min_count=2))


def test_the_cache_of_a_corpus_serves_every_vocabulary(folder, monkeypatch):
    monkeypatch.setattr("data.CACHE_TOKENS", 3)
    for _ in range(2):
        for rules in (Rules(), Rules(min_count=2), Rules(max_vocab=3)):
            cached = Corpus(folder, rules=rules)
            fresh = Corpus(folder, rules=rules, cache=False)
            assert words(cached, "train") == words(fresh, "train")
            assert cached.dictionary.idx2word == fresh.dictionary.idx2word


def test_the_vocabulary_of_a_model_whatever_its_order(folder):
    corpus = Corpus(folder, words=["<unk>", "c", "<eos>", "a"])
    assert words(corpus, "train") == ["<unk>", "a", "<unk>", "<eos>", "c", "<unk>", "a", "<eos>"]


def test_without_unk_a_split_with_an_unknown_word_is_refused_and_others_are_not(folder):
    corpus = Corpus(folder, words=["a", "b", "c", "<eos>"])
    assert len(load_split(corpus, "train", 1, "cpu")) == 8
    with pytest.raises(BadInput, match="test: the model does not know 2 of its tokens and has no <unk> .*'e' is the f"):
        load_split(corpus, "test", 1, "cpu")


# --- through the scripts ---------------------------------------------------------------------------------------------

def test_a_model_is_scored_on_the_same_text_in_another_order(train, corpus_dir, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1", "--vocab-order", "frequency")
    pointer.main(["--no-cuda", "--data", str(corpus_dir), "--save", str(tmp_path / "m.pt"), "--window", "5"])
    record = read_metrics(tmp_path / "m.pt")
    assert record["pointer"][0]["window"] == 5
    lone = ["--no-cuda", "--data", str(corpus_dir), "--save", str(tmp_path / "m.pt"), "--lambdasm", "0"]
    pointer.main(lone)
    assert read_metrics(tmp_path / "m.pt")["pointer"][3]["loss"] == pytest.approx(record["test"][0]["loss"], abs=1e-5)


@pytest.mark.parametrize("flags", [["--min-count", "40"], ["--max-vocab", "6", "--vocab-order", "frequency"]])
def test_a_run_with_a_chosen_vocabulary_is_resumed_and_recorded(train, tmp_path, flags):
    train(tmp_path / "whole.pt", *flags, "--epochs", "3")
    train(tmp_path / "parts.pt", *flags, "--epochs", "1")
    train(tmp_path / "parts.pt", "--epochs", "3", "--resume", str(tmp_path / "parts.pt"))
    one, other = (checkpoint.load(tmp_path / f"{name}.last.pt") for name in ("whole", "parts"))
    assert "<unk>" in one["vocabulary"]
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_flags_that_choose_a_vocabulary_do_not_change_on_the_way(train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    with pytest.raises(BadInput, match="--min_count 3 contradicts"):
        train(tmp_path / "m.pt", "--epochs", "2", "--min-count", "3", "--resume", str(tmp_path / "m.pt"))


@pytest.fixture
def other(tmp_path):
    """Another text: some words of the first corpus, and some that it has not."""
    folder = tmp_path / "other"
    folder.mkdir()
    for split, count in (("train", 200), ("valid", 30), ("test", 30)):
        text = "".join(("the zebra sat on a hill\n", "one zebra saw the hill\n")[i % 2] for i in range(count))
        (folder / f"{split}.txt").write_text(text)
    return folder


def tune(other, load, save, *flags):
    return finetune.main(["--no-cuda", "--data", str(other), "--load", str(load), "--save", str(save), "--epochs", "4",
                          *map(str, flags)])


def test_tuning_on_another_text_with_the_words_of_the_model(train, other, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1", "--min-count", "2")
    assert tune(other, tmp_path / "m.pt", tmp_path / "t.pt") == 0
    content = checkpoint.load(tmp_path / "t.pt")
    assert content["vocabulary"] == checkpoint.load(tmp_path / "m.pt")["vocabulary"]
    assert content["flags"]["data"] == str(other)


@pytest.mark.parametrize("flags", [[], ["--no-tied"], ["--model", "QRNN"]], ids=["tied", "untied", "QRNN"])
def test_tuning_on_another_text_with_its_own_words_learns_them(train, other, tmp_path, flags):
    train(tmp_path / "m.pt", "--epochs", "3", "--lr", "20", *flags)
    assert tune(other, tmp_path / "m.pt", tmp_path / "t.pt", "--vocab", "corpus", "--lr", "10") == 0
    content, record = checkpoint.load(tmp_path / "t.pt"), read_metrics(tmp_path / "t.pt")
    assert {"zebra", "hill"} < set(content["vocabulary"])
    assert record["test"][0]["loss"] < record["loaded"][0]["loss"]
    assert finetune.main(["--no-cuda", "--resume", str(tmp_path / "t.pt"), "--epochs", "5"]) == 0


def test_rows_follow_their_words_and_new_ones_begin_with_the_mean():
    torch.manual_seed(1)
    weights = RNNModel(3, emsize=4, nhid=5, nlayers=1).state_dict()
    carried = carry_rows(weights, ["a", "b", "c"], ["new", "c", "a"])
    for name in ("encoder.weight", "decoder.weight", "decoder.bias"):
        assert torch.equal(carried[name][1], weights[name][2])
        assert torch.equal(carried[name][2], weights[name][0])
        torch.testing.assert_close(carried[name][0], weights[name].mean(0))


@pytest.mark.parametrize("ntoken, kept", [(80_001, True), (100, False), (600_000, False)])
def test_a_split_softmax_is_carried(ntoken, kept):
    flags = {"model": "LSTM", "emsize": 2, "nhid": 3, "nlayers": 1, "tied": True, "dropout": 0, "dropouth": 0,
             "dropouti": 0, "dropoute": 0, "wdrop": 0}
    model = RNNModel(80_000, **flags)
    with torch.no_grad():
        model.softmax.tail_vectors.fill_(3)
    content = {"flags": flags, "vocabulary": [f"w{i}" for i in range(80_000)], "model": model.state_dict()}
    carried = checkpoint.carry_vocabulary(content, "m.pt", [f"w{i}" for i in range(ntoken)])
    model = checkpoint.restore_model(carried, "m.pt")
    if ntoken > 75_000:
        assert bool((model.softmax.tail_vectors == 3).all()) == kept


@pytest.mark.parametrize("flags, message", [
    (["--max-vocab", "1"], "a whole number of 2 or more"), (["--min-count", "0"], "of 1 or more"),
    (["--vocab-order", "x"], "invalid choice"),
])
def test_flags_out_of_range(flags, message):
    with pytest.raises(BadInput, match=message):
        main.parse_flags(flags)


def test_the_words_of_the_corpus_keep_the_unk_of_the_model(train, other, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1", "--min-count", "2")
    tune(other, tmp_path / "m.pt", tmp_path / "t.pt", "--vocab", "corpus")
    assert "<unk>" in checkpoint.load(tmp_path / "t.pt")["vocabulary"]


def test_the_words_of_the_corpus_do_not_change_a_model_in_place(train, other, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    with pytest.raises(BadInput, match="--vocab corpus changes the model: --save OTHER"):
        tune(other, tmp_path / "m.pt", tmp_path / "m.pt", "--vocab", "corpus")


def test_two_flags_of_fine_tuning_that_contradict(train, other, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1")
    with pytest.raises(BadInput, match="choose a vocabulary: with --vocab corpus"):
        tune(other, tmp_path / "m.pt", tmp_path / "t.pt", "--min-count", "2")


def test_a_text_of_unknown_words_alone_is_still_a_text(train, tmp_path):
    (tmp_path / "book.txt").write_text("the cat <unk> sat\n" * 200)
    train(tmp_path / "m.pt", "--epochs", "1", "--data", str(tmp_path / "book.txt"))
    (tmp_path / "new.txt").write_text("ein zwei drei vier\n" * 200)
    pointer.main(["--no-cuda", "--data", str(tmp_path / "new.txt"), "--save", str(tmp_path / "m.pt"), "--window", "9"])
    assert math.isfinite(read_metrics(tmp_path / "m.pt")["pointer"][0]["loss"])


@pytest.mark.parametrize("script", [pointer.main, dynamic.main, finetune.main])
def test_a_folder_made_for_another_level_is_refused_unless_the_command_says_so(train, other, tmp_path, script):
    train(tmp_path / "m.pt", "--epochs", "1", "--min-count", "2")
    (other / "level").write_text("char\n")
    flags = ["--no-cuda", "--data", str(other), "--save", str(tmp_path / "m.pt")]
    flags += ["--epochs", "0"] if script is finetune.main else ["--window", "5"]
    with pytest.raises(BadInput, match="is made for --level char, and .* at word level; with --level word it is read"):
        script(flags)
    assert not script([*flags, "--level", "word"])


def test_the_text_of_a_model_is_read_at_its_level_whatever_its_folder_says(train, corpus_dir, tmp_path):
    (corpus_dir / "level").write_text("char\n")
    train(tmp_path / "m.pt", "--epochs", "1", "--level", "word")
    pointer.main(["--no-cuda", "--save", str(tmp_path / "m.pt"), "--window", "5"])
    assert read_metrics(tmp_path / "m.pt")["pointer"]
