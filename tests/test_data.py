"""Text becomes token ids, and ids become batches, without losing or inventing a token."""

import gc
import hashlib
import json
import os
import sys
import weakref
from collections import defaultdict
from pathlib import Path

import numpy
import pytest
import torch

import corpus_cache
import data
from corpus_cache import IdStore
from data import Corpus
from errors import BadInput
from files import take
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
])
def test_a_word_of_more_than_a_megabyte_is_no_word(tmp_path, text):
    with pytest.raises(BadInput, match=r"train.txt: line [12] has a word of more than 1,048,576 bytes"):
        Corpus(write(tmp_path, train=text))
    assert len(Corpus(tmp_path, "byte").train) == len(text)


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


def test_blocks_make_no_difference(tmp_path, monkeypatch):
    """A text read a few bytes at a time, cut within words, characters and lines, has the tokens of one read whole."""
    text = "größe  x\n\n  東京 a\tb\r\n" * 5 + "the end"
    whole = {level: read(Corpus(write(tmp_path, train=text), level), "train") for level in ("word", "char", "byte")}
    assert whole["word"] == [word for line in text.split("\n") for word in [*line.split(), "<eos>"]]
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr("text.BLOCK", block)
        for level, tokens in whole.items():
            assert read(Corpus(tmp_path, level), "train") == tokens


# --- the cache -------------------------------------------------------------------------------------------------------

@pytest.fixture(params=["word", "char", "byte"])
def cached(request, tmp_path, monkeypatch):
    """A corpus that is worth a cache, with it: a folder, the cache's path, the level, and what was read."""
    monkeypatch.setattr(data, "CACHE_TOKENS", 3)
    corpus = Corpus(write(tmp_path), request.param)
    cache = tmp_path / f".{request.param}.cache"
    assert cache.exists()
    assert corpus.cache_error is None
    return tmp_path, cache, request.param, content(corpus)


def content(corpus):
    return [read(corpus, split) for split in ("train", "valid", "test")]


def forbid_reading(monkeypatch):
    def read_again(*_):
        raise AssertionError("the text was read again")
    monkeypatch.setattr("corpus_cache.read_texts", read_again)


def test_the_cache_takes_the_place_of_reading(cached, monkeypatch):
    folder, _, level, expected = cached
    forbid_reading(monkeypatch)
    assert content(Corpus(folder, level)) == expected


def test_the_words_that_were_read_go_before_those_of_the_cache_come(tmp_path, monkeypatch):
    """A large vocabulary is in memory once."""
    class Words(list):
        """A list to which a reference can be weak."""

    seen, load_cache = [], corpus_cache.load_cache

    def read_and_note(*given):
        lengths, words = read_texts(*given)
        words = Words(words)
        seen.append(weakref.ref(words))
        return lengths, words

    def load(*given):
        assert all(reference() is None for reference in seen)
        return load_cache(*given)
    monkeypatch.setattr(data, "CACHE_TOKENS", 3)
    monkeypatch.setattr(corpus_cache, "read_texts", read_and_note)
    monkeypatch.setattr(corpus_cache, "load_cache", load)
    assert Corpus(write(tmp_path)).cache_error is None
    assert len(seen) == 1


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_an_edited_text_is_read_again(cached, split):
    folder, _, level, _ = cached
    path = folder / f"{split}.txt"
    times = path.stat()
    path.write_text(path.read_text().replace("a", "z").replace("d", "z"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and date, other content
    assert any(token in ("z", "122") for token in read(Corpus(folder, level), split))


def test_a_cache_that_is_not_whole_is_made_again(cached):
    folder, cache, level, expected = cached
    whole = cache.read_bytes()
    damaged = [whole[:length] for length in (0, 10, len(whole) // 2, len(whole) - 1)]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:] for i in range(len(whole))]
    damaged += [whole + b"x", b"[]\n" + whole, b"{}\n", b"x\n" + b"[" * 100_000]
    for content_of_file in damaged:
        cache.write_bytes(content_of_file)
        assert content(Corpus(folder, level)) == expected
        assert cache.read_bytes() == whole


def rebuilt(whole, change):
    """A cache with a change in its header, and the checksum that belongs to it."""
    start = whole.index(b'{"format"')
    header = json.dumps({**json.loads(whole[start:-80]), **change}).encode()
    before = whole[:start] + header + f"{len(header):16}".encode()
    return before + hashlib.sha256(before).hexdigest().encode()


@pytest.mark.parametrize("change", [
    {"version": 2}, {"format": "other"}, {"key": "0"}, {"type": "float64"}, {"words": ["a"]}, {"words": ["a"] * 9},
    {"words": [["a"], "b", "c", "d", "e"]}, {"lengths": [1]}, {"lengths": None}, {"lengths": [99, -99]},
    {"lengths": [2**70]}, {"lengths": []},
])
def test_a_cache_with_other_content_is_made_again(cached, change):
    """... though its checksum is right."""
    folder, cache, level, expected = cached
    whole = cache.read_bytes()
    assert rebuilt(whole, {}) == whole
    cache.write_bytes(rebuilt(whole, change))
    assert content(Corpus(folder, level)) == expected
    assert cache.read_bytes() == whole


def test_a_long_text_has_a_cache_and_is_mapped_from_it(tmp_path):
    (tmp_path / "book.txt").write_bytes(bytes(range(256)) * (2**14 + 1))
    for _ in range(2):
        corpus = Corpus(tmp_path / "book.txt", "byte")
        assert (tmp_path / ".book.txt.byte.cache").stat().st_size > 2**22
    if sys.platform.startswith("linux"):
        assert str(tmp_path / ".book.txt.byte.cache") in Path("/proc/self/maps").read_text()
    assert corpus.train[:256].tolist() == list(range(256))


def test_a_corpus_without_room_for_the_cache_says_so(cached, monkeypatch):
    folder, cache, level, expected = cached
    cache.unlink()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    corpus = Corpus(folder, level)
    assert content(corpus) == expected
    assert "was not written: No space left on device" in corpus.cache_error
    assert not cache.exists()
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("limit", [0, 100, 300, 40_000, 10**6])
def test_ids_are_widened_on_the_way_and_none_is_lost(tmp_path, monkeypatch, limit):
    """... in blocks of all sizes, whether they go to memory or to a file, and from whichever id on."""
    monkeypatch.setattr("corpus_cache.BLOCK_IDS", 1000)
    ids, dtypes = numpy.concatenate([numpy.arange(40_000), numpy.arange(500)]).astype(numpy.int32), []
    with open(tmp_path / "ids", "w+b") as file:
        store, start = IdStore(limit, lambda: file), 0
        for size in (1, 200, 54, 1, 1, 2000, 30_000, 7000, 2000):
            store.append(ids[start:start + size])
            dtypes.append(store.dtype.name)
            start += size
        assert start > 40_000
        assert store.collected().tolist() == ids[:start].tolist()
    if limit < 100:
        assert dtypes == ["uint8"] * 3 + ["uint8", "int16", "int16", "int16", "int32", "int32"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, BadInput, MemoryError])
def test_an_interrupted_reading_leaves_nothing_behind(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(data, "CACHE_TOKENS", 3)
    monkeypatch.setattr("text.IDS", 2)
    write(tmp_path)
    before, appended = sorted(tmp_path.iterdir()), IdStore.append

    def append(self, ids):
        appended(self, ids)
        if self.length == 8:
            assert list(tmp_path.glob(".word.cache.*.partial"))
            raise stop

    monkeypatch.setattr(IdStore, "append", append)
    with pytest.raises(stop):
        Corpus(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_killed_run_left_is_removed_and_what_another_is_writing_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE_TOKENS", 3)
    left, written = (write(tmp_path) / f".word.cache.{pid}.partial" for pid in (1, 2))
    left.write_bytes(b"x")
    with open(written, "wb") as file:
        take(file)
        Corpus(tmp_path)
        assert (left.exists(), written.exists()) == (False, True)


def test_another_vocabulary_of_a_long_text_is_mapped_and_leaves_no_file(cached):
    folder, _, level, expected = cached
    before = sorted(folder.iterdir())
    words = [*sorted({token for split in expected for token in split}), "more"]
    corpus = Corpus(folder, level, words=words)
    assert content(corpus) == expected
    if sys.platform.startswith("linux"):
        lines = Path("/proc/self/maps").read_text().splitlines()
        assert any(str(folder) in line and line.endswith("(deleted)") for line in lines)
    assert sorted(folder.iterdir()) == before


def test_without_room_for_another_vocabulary_it_is_in_memory_and_says_so(cached, monkeypatch):
    folder, _, level, expected = cached

    def full_disk(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full_disk)
    corpus = Corpus(folder, level, words=sorted({token for split in expected for token in split}))
    assert content(corpus) == expected
    assert "No space left on device; they are in memory" in corpus.describe()


def test_a_dry_run_keeps_a_long_text_in_memory(cached):
    folder, cache, level, expected = cached
    cache.unlink()
    before = sorted(folder.iterdir())
    assert content(Corpus(folder, level, cache=False)) == expected
    assert sorted(folder.iterdir()) == before


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
