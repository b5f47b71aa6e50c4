"""Keep the token ids of a corpus: in memory, or for a long text in a memory-mapped file.

A long corpus has a cache beside its text, so that the next run need not read the text again. Its parts:

    ids      those of the text
    JSON     the vocabulary and the checksum of the text
    end      the length of the JSON, and a checksum of all that is before the checksum

It is written while the text is read, in memory that does not grow with the text. It is made again when the text has
changed or the cache is damaged.
"""

import errno
import hashlib
import json
import mmap
import os
from array import array
from contextlib import ExitStack

import numpy

from errors import BadInput
from files import nameless, remove_partial, replacing
from text import BLOCK, read_texts

CACHE_FORMAT, CACHE_VERSION = "awd-lstm-corpus", 3
ID_TYPES = ("uint8", "int16", "int32")  # the smallest that holds every id is used
BLOCK_IDS = 2**21  # ids worked on at a time
SIZE, CHECKSUM = 16, 64  # digits at the end of the cache


# --- checksums -------------------------------------------------------------------------------------------------------

def checksum_of_files(paths):
    """Compute a checksum of the contents of files; raises BadInput when one cannot be read."""
    total = hashlib.sha256()
    for path in paths:
        if os.path.exists(path) and not os.path.isfile(path):
            raise BadInput(f"{path}: is no file")
        try:
            total.update(checksum_of_file(path).encode())
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}; a corpus is a folder with train.txt, valid.txt "
                           "and test.txt, or a text file") from error
    return total.hexdigest()


def checksum_of_file(path):
    """Compute a checksum of the contents of a file; raises OSError when it cannot be read."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()


# --- ids -------------------------------------------------------------------------------------------------------------

def id_blocks(ids, start=0, stop=None):
    """Yield `ids` (tokens,) from `start` to `stop` in blocks; those mapped from a file do not stay in memory."""
    stop = len(ids) if stop is None else stop
    for first in range(start, stop, BLOCK_IDS):
        yield ids[first:min(first + BLOCK_IDS, stop)]
        if isinstance(ids.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            ids.base.madvise(mmap.MADV_DONTNEED)


def map_file(file, dtype, length):
    """Map the first `length` ids of an open file into memory, copy-on-write."""
    file.flush()
    return numpy.memmap(file, dtype, "c", shape=(length,))


def smallest_type(largest):
    """Return the smallest of ID_TYPES that holds the id `largest`."""
    return next(numpy.dtype(name) for name in ID_TYPES if largest <= numpy.iinfo(name).max)


class IdStore:
    """Collect ids: in memory, or in the file that `open_file` opens once there are more than `limit`."""

    def __init__(self, limit, open_file):
        self.limit, self.open_file = limit, open_file
        self.memory, self.largest = array("i"), 0
        self.file, self.dtype, self.length = None, numpy.dtype(ID_TYPES[0]), 0

    def append(self, ids):
        """Append `ids` (n,), of int32."""
        self.largest = max(self.largest, int(ids.max()))
        if self.file is None:
            self.memory.frombytes(memoryview(ids).cast("B"))
            if len(self.memory) <= self.limit:
                return
            self.file, ids = self.open_file(), numpy.frombuffer(self.memory, numpy.int32)
        self.widen(smallest_type(self.largest))
        self.file.write(ids.astype(self.dtype))
        self.length += len(ids)
        self.memory = None

    def widen(self, dtype):
        """Convert the ids in the file to a wider dtype, from the last to the first, so that none is overwritten."""
        if dtype == self.dtype:
            return
        for start in reversed(range(0, self.length, BLOCK_IDS)):
            self.file.seek(start * self.dtype.itemsize)
            count = min(BLOCK_IDS, self.length - start)
            block = numpy.frombuffer(self.file.read(count * self.dtype.itemsize), self.dtype)
            self.file.seek(start * dtype.itemsize)
            self.file.write(block.astype(dtype))
        self.file.seek(self.length * dtype.itemsize)
        self.dtype = dtype

    def collected(self):
        """Return all ids (tokens,) in the smallest dtype."""
        if self.file is None:
            return numpy.frombuffer(self.memory, numpy.int32).astype(smallest_type(self.largest), copy=False)
        return map_file(self.file, self.dtype, self.length)


def look_up(ids, table, limit, folder):
    """Look each of `ids` (tokens,) up in `table`.

    More than `limit` go to an unnamed file in `folder`, which vanishes with the process. Raises OSError if it cannot be
    written.
    """
    if len(ids) <= limit:
        return table[ids]
    with nameless(folder) as file:
        for block in id_blocks(ids):
            file.write(table[block])
        return map_file(file, table.dtype, len(ids))


def count_ids(ids, lengths, ntoken):
    """Count how often each of `ntoken` ids is in each split; returns (splits, V).

    `ids` (tokens,) are those of the splits one after the other, which have these `lengths`.
    """
    counts, start = numpy.zeros((len(lengths), ntoken), numpy.int64), 0
    for row, length in zip(counts, lengths):
        for block in id_blocks(ids, start, start + length):
            row += numpy.bincount(block, minlength=ntoken)
        start += length
    return counts


def first_id(ids, wanted, start, stop):
    """Return the first of `ids` (tokens,) from `start` to `stop` that is `wanted`, a table (V,) of bools."""
    for block in id_blocks(ids, start, stop):
        if wanted[block].any():
            return block[wanted[block].argmax()]
    raise LookupError("none of these ids is wanted")


# --- the cache -------------------------------------------------------------------------------------------------------

def read_and_keep(paths, level, limit, path, key):
    """Read text files; more than `limit` ids go to the cache at `path`, with the checksum `key` of the files.

    Returns the ids of all (tokens,), the number of ids of each file, and the tokens by id. Raises OSError where the
    cache cannot be written.
    """
    with ExitStack() as stack:
        def open_file():
            remove_partial(path)
            return stack.enter_context(replacing(path, "w+b"))

        store = IdStore(limit, open_file)
        lengths, words = read_texts(paths, level, store.append)
        ids = store.collected()
        if store.file is None:
            return ids, lengths, words
        values = {"format": CACHE_FORMAT, "version": CACHE_VERSION, "key": key, "type": ids.dtype.name,
                  "lengths": lengths, "words": words}
        trailer = json.dumps(values).encode()
        trailer += f"{len(trailer):{SIZE}}".encode()
        store.file.write(trailer + check_ids(ids, trailer)[0])
        del ids, words, values, trailer  # Windows renames no file that is mapped, and the vocabulary is loaded again
    kept = load_cache(path, key)
    if kept is None:
        raise OSError(errno.EBUSY, "it was changed at once")
    return kept


def load_cache(path, key):
    """Load what `read_and_keep` returned when the cache at `path` was made.

    The ids are mapped from the file. Returns None when the cache is missing, damaged, or of files with another checksum
    than `key`.
    """
    try:
        with open(path, "rb") as file:
            end = file.seek(-SIZE - CHECKSUM, os.SEEK_END)
            size = int(file.read(SIZE))
            start = file.seek(end - size)
            trailer, checksum = file.read(size + SIZE), file.read()
            values = json.loads(trailer[:size])
            if (values["format"], values["version"], values["key"]) != (CACHE_FORMAT, CACHE_VERSION, key):
                return None
            dtype, lengths, words = values["type"], values["lengths"], values["words"]
            if dtype not in ID_TYPES or sum(lengths) * numpy.dtype(dtype).itemsize != start or min(lengths) < 0:
                return None
            ids = map_file(file, dtype, sum(lengths))
        computed, low, high = check_ids(ids, trailer)
        if computed != checksum or low < 0 or high >= len(words) or len(set(words)) < len(words):
            return None
        return ids, lengths, words
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # the caller makes it again


def check_ids(ids, trailer):
    """Compute a checksum of `ids` and the `trailer` behind them, and the range of the ids.

    Returns the hex digits of the checksum, bytes, and the smallest and the largest of the ids and 0.
    """
    total, low, high = hashlib.sha256(), 0, 0
    for block in id_blocks(ids):
        total.update(block)
        low, high = min(low, block.min()), max(high, block.max())
    total.update(trailer)
    return total.hexdigest().encode(), low, high
