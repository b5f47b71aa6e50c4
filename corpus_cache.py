"""Keep a corpus that was read beside its text, so that the next run maps it into memory.

The parts of the file:

    line 1   a checksum of what follows
    line 2   JSON: the vocabulary and the checksum of the text
    rest     the ids

It is made anew when the text has changed or the file is not whole.
"""

import hashlib
import json
import os

import numpy

from errors import BadInput
from files import replacing
from text import BLOCK, ID_TYPES

CACHE_FORMAT, CACHE_VERSION = "awd-lstm-corpus", 2


def checksum_of_files(paths):
    """Compute a checksum of what the files hold.

    Raises BadInput when a file cannot be read.
    """
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
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def save_cache(path, key, ids, lengths, words):
    """Write the cache of a corpus that was read from files with the checksum `key`."""
    header = {"format": CACHE_FORMAT, "version": CACHE_VERSION, "key": key, "type": ids.dtype.name, "lengths": lengths,
              "words": words}
    header = json.dumps(header).encode() + b"\n"
    with replacing(path) as file:
        file.write(checksum_of_cache(header, ids) + header)
        file.write(ids)


def load_cache(path, key):
    """Load what `read_texts` returned when the cache at `path` was made.

    The ids are mapped from the file. Returns None when the cache is missing, damaged, or of files with another checksum
    than `key`.
    """
    try:
        with open(path, "rb") as file:
            checksum, header = file.readline(100), file.readline()
            start = file.tell()
        about = json.loads(header)
        if (about["format"], about["version"], about["key"]) != (CACHE_FORMAT, CACHE_VERSION, key):
            return None
        lengths, words = about["lengths"], about["words"]
        ids = numpy.memmap(path, ID_TYPES[ID_TYPES.index(about["type"])], mode="c", offset=start)
        whole = (checksum == checksum_of_cache(header, ids) and sum(lengths) == len(ids) and min(lengths) >= 0
                 and ids.min() >= 0 and ids.max() < len(words) == len(set(words)))
        return (ids, lengths, words) if whole else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # it will be made anew


def checksum_of_cache(header, ids):
    """Compute the first line of the cache, over all that follows it."""
    total = hashlib.sha256(header)
    total.update(ids)
    return total.hexdigest().encode() + b"\n"
