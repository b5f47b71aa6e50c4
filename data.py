"""Turn text into token ids, and cache them.

A corpus is a folder with train.txt, valid.txt and test.txt. Or it is a single text file, cut into these splits by
`shares`. What a token is depends on the `level`:

    word   what stands between white space, and <eos> at the end of each line (LF, CR LF or CR); UTF-8
    char   a character, a newline (also as CR or CR LF) being <eos>; UTF-8
    byte   a byte by its decimal number, a newline being <eos>

A file named `level` in the folder says which level the folder is made for. Tokens are numbered by first appearance over
train, valid and test. The vocabulary is that of all three.

A corpus of more than CACHE_TOKENS tokens is read once. It is then kept beside the text as `.NAME.LEVEL.cache`. The
parts of that file:

    line 1   a checksum of what follows
    line 2   JSON: the vocabulary and the checksum of the text
    rest     the ids

The next run maps the cache into memory. The cache is made anew when the text has changed or the file is not whole.
"""

import hashlib
import json
import os
from array import array
from codecs import BOM_UTF8
from collections import defaultdict
from pathlib import Path

import numpy
import torch

from errors import BadInput
from files import replacing
from utils import batchify

SPLITS = ("train", "valid", "test")
LEVELS = ("word", "char", "byte")
BYTES = {"<eos>", *map(str, range(256))}  # the tokens at byte level

SIGNATURES = (  # how a file begins, what it then is, and what to do
    (b"\xff\xfe", "UTF-16", "convert it (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16", "convert it (iconv -f UTF-16 -t UTF-8)"),
    (b"\x1f\x8b", "a gzip archive", "unpack it (gunzip)"), (b"PK\x03\x04", "a zip archive", "unpack it (unzip)"),
    (b"BZh", "a bzip2 archive", "unpack it (bunzip2)"), (b"\xfd7zXZ", "an xz archive", "unpack it (unxz)"),
)

CACHE_FORMAT, CACHE_VERSION = "awd-lstm-corpus", 2
CACHE_TOKENS = 2**22      # a text of this length is read in a second or two
BLOCK = 2**22             # bytes read at a time
LONGEST_WORD = 2**20      # bytes; a longer one is not a word
ID_TYPES = ("uint8", "int16", "int32")  # the smallest that holds every id is used


class Dictionary:
    """Hold a vocabulary: `word2idx` maps a token to its id, `idx2word` an id to its token."""

    def __init__(self, words=()):
        self.idx2word = list(words)
        self.word2idx = {word: index for index, word in enumerate(self.idx2word)}

    def __len__(self):
        return len(self.idx2word)


class Corpus:
    """Hold the splits of a text and their `dictionary`.

    `train`, `valid` and `test` are tensors (tokens,) of integer ids.

    - `level` None: the level that the folder says, else "word".
    - `shares`: the parts of a single file that the three splits get.
    - `cache`: whether a cache may be written.
    - `cache_error`: why there is no cache where there should be one.

    Raises BadInput when a split is missing, empty or not text at that level.
    """

    def __init__(self, path, level=None, shares=(90, 5, 5), cache=True):
        path = self.path = Path(path)
        is_folder = os.path.isdir(path)  # unlike Path's own, false for an impossible path
        paths = [path / f"{split}.txt" for split in SPLITS] if is_folder else [path]
        if not os.path.exists(path):
            raise BadInput(f"{path}: no such file or folder; './getdata.sh NAME' fetches one of the corpora that "
                           "'./getdata.sh --list' names into data/NAME")
        self.level = level or default_level(path)
        cached = (path / f".{self.level}.cache") if is_folder else path.with_name(f".{path.name}.{self.level}.cache")
        key = self.checksum = checksum_of_files(paths)
        self.cache_error = None
        loaded = load_cache(cached, key)
        if loaded is None:
            loaded = read_texts(paths, self.level)
            if cache and len(loaded[0]) > CACHE_TOKENS:
                try:
                    save_cache(cached, key, *loaded)
                except OSError as error:
                    self.cache_error = f"{cached} was not written: {error.strerror}; the next run reads the text again"
        ids, lengths, words = loaded
        if len(paths) == 1:
            lengths = [int(len(ids) * share / sum(shares)) for share in shares[:2]]
            lengths.append(len(ids) - sum(lengths))
        self.train, self.valid, self.test = torch.from_numpy(ids).split(lengths)
        self.dictionary = Dictionary(words)

    def describe(self):
        """Describe the corpus in one line, for the log."""
        line = (f"corpus: {len(self.train):,} / {len(self.valid):,} / {len(self.test):,} tokens, "
                f"{len(self.dictionary):,} different, at {self.level} level")
        return f"{line}; {self.cache_error}" if self.cache_error else line


def load_split(corpus, split, batch_size, device, rows=2):
    """Lay a split of `corpus` out as `utils.batchify` does.

    Raises BadInput that names the split.
    """
    try:
        return batchify(getattr(corpus, split), batch_size, device, rows)
    except BadInput as error:
        spaces = "; text without spaces between its words needs --level char" if corpus.level == "word" else ""
        raise BadInput(f"{corpus.path}, {split}: {error}{spaces}") from error


def default_level(path):
    """Return the level that the folder `path` says it is made for, else "word"."""
    try:
        level = (path / "level").read_text(encoding="utf-8-sig", errors="replace").strip()
    except OSError:
        return "word"
    if level not in LEVELS:
        raise BadInput(f"{path / 'level'}: {level!r} is none of the levels {', '.join(LEVELS)}")
    return level


# --- reading ---------------------------------------------------------------------------------------------------------

def read_texts(paths, level):
    """Read text files.

    Returns the ids of all (tokens,), the number of ids of each file, and the tokens by id.
    """
    numbering = defaultdict()
    numbering.default_factory = numbering.__len__  # a new token gets the next number
    ids, lengths = array("i"), []
    for path in paths:
        before = len(ids)
        if level == "word":
            for words in read_words(path):
                ids.extend(map(numbering.__getitem__, words))
        else:
            for part in read_symbols(path, level, numbering):
                ids.frombytes(memoryview(part).cast("B"))
        if len(ids) == before:
            raise BadInput(f"{path}: is empty")
        lengths.append(len(ids) - before)
    smallest = next(dtype for dtype in ID_TYPES if len(numbering) - 1 <= numpy.iinfo(dtype).max)
    return numpy.frombuffer(ids, dtype=numpy.int32).astype(smallest, copy=False), lengths, list(numbering)


def read_words(path):
    """Yield lists of the words of a text, with <eos> at the end of each line."""
    number, rest, last = 1, b"", b""  # of the line; bytes not yet yielded; byte read last
    with open(path, "rb") as file:
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        while block := file.read(BLOCK):
            last = block[-1:]
            block = rest + block
            end = max(map(block.rfind, (b"\n", b" ", b"\t"))) + 1  # cut between two words
            end = max(end, block.rfind(b"\r", 0, -1) + 1)  # but not between CR and LF
            if len(block) - end > LONGEST_WORD:
                end = cut_long_rest(block, end, path, number)
            *lines, part = split_lines(decode(block[:end], path, number))
            for line in lines:
                words = line.split()
                check_words(words, line, path, number)
                words.append("<eos>")
                yield words
                number += 1
            words = part.split()
            check_words(words, part, path, number)
            yield words
            rest = block[end:]
    words = decode(rest, path, number).split()
    check_words(words, rest, path, number)
    yield words
    if last not in (b"", b"\n"):
        yield ["<eos>"]


def split_lines(text):
    """Split text at its line ends: LF, CR LF, and CR as on old Macs."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n")


def cut_long_rest(block, start, path, number):
    """Find where to cut a block of bytes that ends in a long part without a space.

    The part begins at `start` and has no white space of ASCII's.
    """
    rest = block[start:].decode("utf-8", errors="ignore")
    words = rest.split()
    check_words(words, rest, path, number + block.count(b"\n"))
    unfinished = "" if not words or rest[-1].isspace() else words[-1]
    return start + len(rest[:len(rest) - len(unfinished)].encode())


def check_words(words, line, path, number):
    """Raise BadInput when a line has a word that is too long for a text."""
    if len(line) > LONGEST_WORD // 4 and max((len(word.encode()) for word in words), default=0) > LONGEST_WORD:
        raise BadInput(f"{path}: line {number} has a word of more than {LONGEST_WORD:,} bytes, so it is no text at "
                       "word level (--level char and --level byte have no such limit)")


def decode(block, path, number):
    """Decode bytes that start in line `number`."""
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        number += block[:error.start].count(b"\n")
        raise not_text(path, f"line {number} ") from error


def not_text(path, where=""):
    """Make the BadInput for a file that is not UTF-8; it names what the file looks like."""
    with open(path, "rb") as file:
        head = file.read(8)
    for start, what, remedy in SIGNATURES:
        if head.startswith(start):
            return BadInput(f"{path}: is {what}, not UTF-8 text: {remedy}")
    return BadInput(f"{path}: {where}is not UTF-8 text (--level byte takes any bytes)")


def read_symbols(path, level, numbering):
    """Yield arrays (n,) of the ids of a text's characters or bytes.

    The mapping `numbering` gives the ids.
    """
    if level == "byte":
        how, dtype, spell = {"mode": "rb"}, numpy.uint8, str
    else:
        how, dtype, spell = {"encoding": "utf-8-sig"}, numpy.uint32, chr
    known = numpy.full(256 if level == "byte" else 0x110000, -1, numpy.int32)  # code to id
    with open(path, **how) as file:
        try:
            while part := file.read(BLOCK):
                codes = numpy.frombuffer(part if level == "byte" else part.encode("utf-32-le"), dtype)
                fresh, first = numpy.unique(codes[known[codes] < 0], return_index=True)
                for code in fresh[first.argsort()].tolist():
                    known[code] = numbering["<eos>" if code == ord("\n") else spell(code)]
                yield known[codes]
        except UnicodeDecodeError as error:
            raise not_text(path) from error


# --- the cache -------------------------------------------------------------------------------------------------------

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
