"""What was read of a text is kept beside it, and is used only while it is whole and the text is the same."""

import hashlib
import json
import os
import sys
import weakref
from itertools import product
from pathlib import Path

import numpy
import pytest
from test_data import read, write

import corpus_cache
import data
from corpus_cache import IdStore
from data import Corpus
from errors import BadInput
from files import replacing, take
from text import read_texts


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


@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
def test_ids_are_counted_found_and_looked_up_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    """... as Python does it, an id at a time. One split is empty, another ends within a block."""
    monkeypatch.setattr("corpus_cache.BLOCK_IDS", block)
    ids, lengths = numpy.array([0, 1, 1, 3, 0, 1, 4, 4, 3, 1, 0, 3], numpy.uint8), [5, 0, 7]
    parts = [ids[:5].tolist(), [], ids[5:].tolist()]
    expected = [[part.count(token) for token in range(6)] for part in parts]
    assert corpus_cache.count_ids(ids, lengths, 6).tolist() == expected
    for token, (start, stop) in product([0, 1, 3, 4], [(0, 12), (5, 12), (2, 8)]):
        assert corpus_cache.first_id(ids, numpy.arange(6) >= token, start, stop) == next(
            found for found in ids[start:stop] if found >= token)
    with pytest.raises(LookupError):
        corpus_cache.first_id(ids, numpy.arange(6) == 4, 0, 6)
    table = numpy.array([5, -1, 300, 2, 7, 0], numpy.int16)
    for limit in (11, 12):
        assert corpus_cache.look_up(ids, table, limit, tmp_path).tolist() == [table[i] for i in ids]


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


def test_processes_of_one_number_write_a_file_each(tmp_path):
    """... as in containers, where many are process 1. If one cut a file that another has mapped, that one would die."""
    path = tmp_path / "cache"
    with replacing(path, "w+b") as file:
        file.write(b"first")
        ids = corpus_cache.map_file(file, "uint8", 5)
        with replacing(path) as other:
            other.write(b"second")
        assert path.read_bytes() == b"second"
        assert bytes(ids) == b"first"
        del ids
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


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
