"""Turn text into tokens and back: files of any size, prompts and lines.

What a token is depends on the level:

    word   what stands between white space, and <eos> at the end of each line (LF, CR LF or CR); UTF-8
    char   a character, a newline (also as CR or CR LF) being <eos>; UTF-8
    byte   a byte by its decimal number, a newline being <eos>
"""

import os
from array import array
from codecs import BOM_UTF8, getincrementaldecoder
from collections import defaultdict

import numpy

from errors import BadInput

LEVELS = ("word", "char", "byte")
BYTES = {"<eos>", *map(str, range(256))}  # the tokens at byte level

BLOCK = 2**22             # bytes read at a time
LONGEST_WORD = 2**20      # bytes; a longer one is not a word
IDS = 2**20               # ids handed on at a time

TO_UTF8 = "convert it (iconv -f {} -t UTF-8; on Windows save it as UTF-8 in Notepad)"
SIGNATURES = (  # how a file begins, what it then is, and what to do
    (b"\xff\xfe", "UTF-16", TO_UTF8.format("UTF-16")), (b"\xfe\xff", "UTF-16", TO_UTF8.format("UTF-16")),
    (b"\x1f\x8b", "a gzip archive", "unpack it (gunzip)"), (b"PK\x03\x04", "a zip archive", "unpack it (unzip)"),
    (b"BZh", "a bzip2 archive", "unpack it (bunzip2)"), (b"\xfd7zXZ", "an xz archive", "unpack it (unxz)"),
)


# --- prompts and lines -----------------------------------------------------------------------------------------------

def decode_prompt(text):
    """Decode a prompt, of the command line or bytes, as UTF-8, whatever the locale is.

    A byte order mark at its beginning is left out, as in a corpus. Raises BadInput when it is not UTF-8.
    """
    try:
        return prompt_bytes(text).decode("utf-8-sig")
    except UnicodeEncodeError:  # the locale has no such character, so the text did not come from its command line
        return text
    except UnicodeDecodeError as error:
        what = archive_or_utf16(prompt_bytes(text)) or "is not UTF-8 text (a model at byte level takes any bytes)"
        raise BadInput(f"the prompt {what}") from error


def prompt_bytes(text):
    """Return the bytes of a prompt, those that a str of the command line stands for."""
    return text if isinstance(text, bytes) else os.fsencode(text)


def tokenize(text, level):
    """Split a prompt, str or bytes, into tokens, at the level of the model; a new line is an <eos>."""
    if level == "byte":
        return ["<eos>" if byte == ord("\n") else str(byte) for byte in prompt_bytes(text)]
    tokens = []
    *ended, last = split_lines(decode_prompt(text))
    for line in ended:
        line = line.split() if level == "word" else list(line)
        tokens += line if line[-1:] == ["<eos>"] else [*line, "<eos>"]  # text that this toolkit wrote spells it out
    return tokens + (last.split() if level == "word" else list(last))


def split_line(line, level):
    """Split a line, bytes without its line end, into tokens; raises UnicodeDecodeError when it is not UTF-8."""
    if level == "byte":
        return list(map(str, line))
    line = line.decode("utf-8")
    return line.split() if level == "word" else list(line)


def detokenize(tokens, level):
    """Yield the text of tokens, piece by piece.

    - Words have spaces between them, a new line after each <eos>, and one at the end.
    - Characters have a new line in place of each <eos>.
    - Bytes have the same. They are decoded as UTF-8, with U+FFFD where they are not valid.
    """
    if level == "word":
        separator = ""
        for word in tokens:
            yield separator + word
            separator = "\n" if word == "<eos>" else " "
        yield "\n"
    elif level == "char":
        yield from ("\n" if character == "<eos>" else character for character in tokens)
    else:
        decoder = getincrementaldecoder("utf-8")(errors="replace")
        yield from (decoder.decode(b"\n" if byte == "<eos>" else bytes([int(byte)])) for byte in tokens)
        yield decoder.decode(b"", final=True)


# --- files -----------------------------------------------------------------------------------------------------------

def read_texts(paths, level, append):
    """Read text files, and hand their ids on to `append`, arrays (n,) of int32.

    Returns the number of ids of each file, and the tokens by id. Raises BadInput when a file is empty, or not text at
    that level.
    """
    numbering = defaultdict()
    numbering.default_factory = numbering.__len__  # a new token gets the next number
    lengths = []
    for path in paths:
        if level != "byte":
            check_head(path)
        length = 0
        parts = read_word_ids(path, numbering) if level == "word" else read_symbols(path, level, numbering)
        for ids in parts:
            append(ids)
            length += len(ids)
        if not length:
            raise BadInput(f"{path}: is empty")
        lengths.append(length)
    numbering.default_factory = None  # it refers back to the mapping, which would stay in memory
    return lengths, list(numbering)


def read_word_ids(path, numbering):
    """Yield arrays (n,) of the ids of a text's words; the mapping `numbering` gives the ids.

    Raises BadInput as `read_words` does.
    """
    ids = array("i")
    for words in read_words(path):
        ids.extend(map(numbering.__getitem__, words))
        if len(ids) >= IDS:
            yield numpy.array(ids, numpy.int32)
            del ids[:]
    if ids:
        yield numpy.array(ids, numpy.int32)


def read_words(path):
    """Yield lists of the words of a text, with <eos> at the end of each line.

    Raises BadInput for what is no text in UTF-8, or has a word that is too long.
    """
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


def count_line_ends(block):
    """Count the line ends in bytes, those of `split_lines`."""
    return block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")


def cut_long_rest(block, start, path, number):
    """Find where to cut a block of bytes that ends in a long part without a space.

    The part begins at `start` and has no LF, space or tab, and no CR but one at its end. That stays for the next block,
    which may begin with the LF that belongs to it. Raises BadInput for a word that is too long.
    """
    rest = block[start:].removesuffix(b"\r").decode("utf-8", errors="ignore")
    words = rest.split()
    check_words(words, rest, path, number + count_line_ends(block[:start]))
    unfinished = "" if not words or rest[-1].isspace() else words[-1]
    return start + len(rest[:len(rest) - len(unfinished)].encode())


def check_words(words, line, path, number):
    """Raise BadInput when a line has a word that is too long for a text."""
    if len(line) > LONGEST_WORD // 4 and max((len(word.encode()) for word in words), default=0) > LONGEST_WORD:
        raise BadInput(f"{path}: line {number} has a word of more than {LONGEST_WORD:,} bytes, so it is no text at "
                       "word level (--level char and --level byte have no such limit)")


def decode(block, path, number):
    """Decode bytes that start in line `number`; raises BadInput when they are not UTF-8."""
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        number += count_line_ends(block[:error.start])
        raise not_text(path, f"line {number} ") from error


def check_head(path):
    """Raise BadInput when many of the first bytes of a file are 0, as in no UTF-8 text."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.count(0) * 10 > len(head):
        raise not_text(path, "is binary, or UTF-16 without a mark: it ", "UTF-16LE")


def not_text(path, where="", encoding="WINDOWS-1252"):
    """Make the BadInput for a file that is not UTF-8; it names what the file looks like, else a likely `encoding`."""
    with open(path, "rb") as file:
        what = archive_or_utf16(file.read(8))
    remedy = f"{TO_UTF8.format(encoding)}, or --level byte takes any bytes"
    return BadInput(f"{path}: {what or f'{where}is not UTF-8 text: {remedy}'}")


def archive_or_utf16(head):
    """Recognise an archive or UTF-16 by its first bytes; returns what it is and what to do, or None."""
    for start, what, remedy in SIGNATURES:
        if head.startswith(start):
            return f"is {what}, not UTF-8 text: {remedy}"
    return None


def read_symbols(path, level, numbering):
    """Yield arrays (n,) of the ids of a text's characters or bytes; the mapping `numbering` gives the ids.

    Raises BadInput for characters that are not in UTF-8.
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
