"""Text becomes token ids, and ids become batches, without losing or inventing a token."""

import gc
from collections import defaultdict

import pytest
import torch

from data import Corpus
from errors import BadInput
from text import read_texts
from utils import batchify, get_batch, repackage_hidden


def write(folder, train="a b\nb c\n", valid="a\n", test="d\n"):
    for split, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def read(corpus, split):
    return [corpus.dictionary.idx2word[index] for index in getattr(corpus, split)]


def test_words_are_numbered_by_first_appearance_over_all_splits(tmp_path):
    corpus = Corpus(write(tmp_path))
    assert corpus.dictionary.idx2word == ["a", "b", "<eos>", "c", "d"]
    assert corpus.dictionary.word2idx == {"a": 0, "b": 1, "<eos>": 2, "c": 3, "d": 4}
    assert corpus.train.tolist() == [0, 1, 2, 1, 3, 2]
    assert (corpus.valid.tolist(), corpus.test.tolist()) == ([0, 2], [4, 2])


@pytest.mark.parametrize("text, tokens", [
    ("a\n\nb\n", ["a", "<eos>", "<eos>", "b", "<eos>"]),                        # an empty line is a line
    ("a b", ["a", "b", "<eos>"]),                                              # no newline at the end
    ("a\r\nb\r\n", ["a", "<eos>", "b", "<eos>"]),                              # Windows lines
    (b"\xef\xbb\xbfa b\n", ["a", "b", "<eos>"]),                               # byte order mark
    ("  a\t b  \n", ["a", "b", "<eos>"]),
    ("größe 東京 <eos>\n", ["größe", "東京", "<eos>", "<eos>"]),
])
def test_lines_and_words(tmp_path, text, tokens):
    assert read(Corpus(write(tmp_path, train=text)), "train") == tokens


@pytest.mark.parametrize("bad, message", [
    ({"train": ""}, "train.txt: is empty"),
    ({"valid": b"good\nbad \xff\n"}, "valid.txt: line 2 is not UTF-8 text"),
])
def test_bad_splits_are_named(tmp_path, bad, message):
    with pytest.raises(BadInput, match=message):
        Corpus(write(tmp_path, **bad))


def test_the_numbers_of_the_words_go_once_the_text_is_read(tmp_path):
    """A mapping that refers to itself would stay until Python looks for such cycles, beside all else."""
    (tmp_path / "book.txt").write_text("these words\nare few\n")
    gc.disable()
    try:
        _, words = read_texts([tmp_path / "book.txt"], "word", list)
        kept = [found for found in gc.get_objects() if type(found) is defaultdict and list(found) == words]
    finally:
        gc.enable()
    assert words == ["these", "words", "<eos>", "are", "few"]
    assert not kept


def test_missing_split_and_folder_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / "test.txt").unlink()
    with pytest.raises(BadInput, match=r"test\.txt: cannot be read: No such file"):
        Corpus(tmp_path)
    with pytest.raises(BadInput, match=r"no such file or folder; './getdata.sh NAME'"):
        Corpus(tmp_path / "penn")


@pytest.mark.parametrize("level, text, tokens", [
    ("char", "a ö\r\nb", ["a", " ", "ö", "<eos>", "b"]),
    ("char", b"\xef\xbb\xbfa\n", ["a", "<eos>"]),
    ("byte", b"a\xff\r\n", ["97", "255", "13", "<eos>"]),
    ("byte", "ö", ["195", "182"]),
])
def test_characters_and_bytes(tmp_path, level, text, tokens):
    corpus = Corpus(write(tmp_path, train=text), level)
    assert read(corpus, "train") == tokens
    assert corpus.dictionary.idx2word[:len(tokens)] == tokens


def test_a_folder_says_its_level(tmp_path):
    (write(tmp_path) / "level").write_text("byte\n")
    assert read(Corpus(tmp_path), "valid") == ["97", "<eos>"]
    assert read(Corpus(tmp_path, "word"), "valid") == ["a", "<eos>"]
    (tmp_path / "level").write_text("page")
    with pytest.raises(BadInput, match="'page' is none of the levels word, char, byte"):
        Corpus(tmp_path)


@pytest.mark.parametrize("level", ["word", "char", "byte"])
def test_one_file_is_cut_by_shares(tmp_path, level):
    book = tmp_path / "book.txt"
    book.write_text("some words\nand more\n" * 50)
    corpus = Corpus(book, level, shares=(8, 1, 1))
    whole = torch.cat([corpus.train, corpus.valid, corpus.test]).tolist()
    write(tmp_path, train=book.read_text())
    assert whole == Corpus(tmp_path, level).train.tolist()
    assert len(corpus.valid) == len(corpus.test) == len(whole) // 10


@pytest.mark.parametrize("text", [
    b"a" * (2**20 + 1), b"b " * 10 + b"a" * (2**20 + 1) + b" c\n" * 9, b"x\n" + b"a" * 2**23,
    b"x\n" + "ö".encode() * 600_000 + b"\ny\n", "ö".encode() * 600_000, "ö".encode() * 2**22,
    "\U0001f600".encode() * (2**18 + 1), b"x \n" + "\U0001f600".encode() * (2**18 + 1) + b"\n",
])
def test_a_word_of_more_than_a_megabyte_is_no_word(tmp_path, text):
    with pytest.raises(BadInput, match=r"train.txt: line [12] has a word of more than 1,048,576 bytes"):
        Corpus(write(tmp_path, train=text))
    assert len(Corpus(tmp_path, "byte").train) == len(text)


@pytest.mark.parametrize("letter", ["a", "\U0001f600"])
@pytest.mark.parametrize("end", ["", "\n", " b\n"])
def test_a_word_of_a_megabyte_is_one(tmp_path, letter, end):
    word = letter * (2**20 // len(letter.encode()))
    assert read(Corpus(write(tmp_path, train=word + end)), "train") == [word, *end.split(), "<eos>"]


@pytest.mark.parametrize("space", ["\r", "\f", "\u3000", "\n"])
def test_any_white_space_ends_a_word(tmp_path, space):
    corpus = Corpus(write(tmp_path, train=f"hello東{space}" * 600_000))
    assert (corpus.train == 0).sum() == 600_000
    assert corpus.dictionary.idx2word[0] == "hello東"


def test_a_mark_at_the_start_is_no_character_and_elsewhere_it_is_one(tmp_path):
    bom = b"\xef\xbb\xbf"
    assert read(Corpus(write(tmp_path, train=bom + b"a " + bom + b"b\n")), "train") == ["a", "\ufeffb", "<eos>"]
    with pytest.raises(BadInput, match="line 3 is not UTF-8"):
        Corpus(write(tmp_path, train=bom + b"\n\n\xff\n"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 2**22])
@pytest.mark.parametrize("bad, message", [
    (b"\xff", "line 4 is not UTF-8 text"), (b"c" * 20, "line 4 has a word of more than 8 bytes"),
    (b"d \xff", "line 4 is not UTF-8 text"), (b"d" * 9 + b" d", "line 4 has a word of more than 8 bytes")])
def test_a_line_that_is_no_text_is_named_by_its_number(tmp_path, monkeypatch, end, block, bad, message):
    """... whatever ends the lines before it, and however much is read at a time."""
    monkeypatch.setattr("text.BLOCK", block)
    monkeypatch.setattr("text.LONGEST_WORD", 8)
    start = end.join(["a b", "", "c c c", ""]).encode()
    for rest in (b"", end.encode() + b"e"):
        with pytest.raises(BadInput, match=message):
            Corpus(write(tmp_path, train=start + bad + rest))


def test_blocks_make_no_difference(tmp_path, monkeypatch):
    """A text read a few bytes at a time, cut within words, characters and lines, has the tokens of one read whole."""
    text = "größe  x\n\n  東京 a\tb\r\n" * 5 + "the end"
    whole = {level: read(Corpus(write(tmp_path, train=text), level), "train") for level in ("word", "char", "byte")}
    assert whole["word"] == [word for line in text.split("\n") for word in [*line.split(), "<eos>"]]
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr("text.BLOCK", block)
        for level, tokens in whole.items():
            assert read(Corpus(tmp_path, level), "train") == tokens


def test_a_line_end_cut_between_two_blocks_is_one_after_a_long_part_without_spaces(tmp_path, monkeypatch):
    monkeypatch.setattr("text.BLOCK", 8)
    monkeypatch.setattr("text.LONGEST_WORD", 4)
    for end in ("\r\n", "\r"):  # the first block ends in CR, and its one space is not ASCII's
        corpus = Corpus(write(tmp_path, train=f"東\u3000a{end}b{end}"))
        assert read(corpus, "train") == ["東", "a", "<eos>", "b", "<eos>"]


def test_ids_are_as_small_as_the_vocabulary_allows(tmp_path):
    for words, kind in ((256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)):
        names = [*map(str, range(words - 1)), "<eos>"]
        corpus = Corpus(write(tmp_path, train=" ".join(names), valid="1", test="2"))
        assert corpus.train.dtype == kind
        assert corpus.train[:-1].tolist() == list(range(words))


def test_batchify_reads_columns_top_to_bottom():
    assert batchify(torch.arange(13), 3).T.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_batchify_wants_enough_tokens():
    assert batchify(torch.arange(6), 3).shape == (2, 3)
    with pytest.raises(BadInput, match="5 tokens are too few for a batch of 3: it needs 6 or more"):
        batchify(torch.arange(5), 3)


def test_targets_are_the_next_words_and_the_end_cuts_the_batch():
    source = batchify(torch.arange(12, dtype=torch.int32), 2)
    words, targets = get_batch(source, 1, 3)
    assert torch.equal(words, source[1:4])
    assert torch.equal(targets, source[2:5])
    assert words.dtype == torch.int64
    words, targets = get_batch(source, 4, 3)
    assert torch.equal(words, source[4:5])
    assert torch.equal(targets, source[5:6])


def test_repackaged_hidden_state_has_no_history():
    value = torch.ones(2, requires_grad=True) * 2
    first, (second, third) = repackage_hidden([value, (value, value)])
    assert all(torch.equal(part, value) and not part.requires_grad for part in (first, second, third))
