"""Read the lines of a stream as they come, each as the tokens that a corpus of it would have."""

import queue
import threading
import time
from codecs import BOM_UTF8
from collections import deque, namedtuple

from errors import BadInput
from text import archive_or_utf16, split_line
from vocabulary import END

WAIT = 0.05  # seconds that a line waits for others, where they come slowly
BLOCK = 2**16  # bytes read at a time
AHEAD = 2**16  # tokens that are read ahead, and that are handed on together

Line = namedtuple("Line", "number tokens ids unknown")  # unknown: where its tokens are not the model's


def split_stream(file, level):
    """Yield the lines of a binary file as they come, each with whether a line end follows it.

    A line end is LF at byte level, LF, CR LF or CR at the others.
    """
    parts, after_cr = [], False
    while block := file.read1(BLOCK):
        if level != "byte":
            ends_in_cr = block.endswith(b"\r")
            block = block.removeprefix(b"\n") if after_cr else block
            block, after_cr = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n"), ends_in_cr
        *ended, rest = block.split(b"\n")
        for line in ended:
            yield b"".join([*parts, line]), True
            parts = []
        if rest:
            parts.append(rest)
    if parts:
        yield b"".join(parts), False


def read_lines(file, dictionary, level, no_eos):
    """Yield the lines of a binary file as Lines, with the tokens that a corpus of it has.

    Raises BadInput for one that the model cannot read.
    """
    for number, (line, is_ended) in enumerate(split_stream(file, level), 1):
        if number == 1:
            what = archive_or_utf16(line)
            line = line.removeprefix(BOM_UTF8) if level != "byte" else line
        try:
            tokens = split_line(line, level)
        except UnicodeDecodeError as error:
            raise BadInput(what or f"line {number} is not UTF-8 text") from error
        if not no_eos and (is_ended or level == "word"):  # else the text just ends
            tokens.append(END)
        yield Line(number, tokens, *dictionary.encode(tokens, f"line {number}"))


def weight(item):
    """Return the size of a line in a queue: its tokens, and one, so that no line is free."""
    return 1 + len(item.ids) if isinstance(item, Line) else 1


class Ahead(queue.Queue):
    """Queue the lines that are read ahead; it is full when they have `maxsize` tokens."""

    def _init(self, _):
        self.queue, self.tokens = deque(), 0

    def _qsize(self):
        return self.tokens

    def _put(self, item):
        self.queue.append(item)
        self.tokens += weight(item)

    def _get(self):
        item = self.queue.popleft()
        self.tokens -= weight(item)
        return item


def batches(lines, size):
    """Yield lists of up to `size` lines as they come; a line does not wait for others for more than WAIT seconds.

    A list also ends with the line that brings it to AHEAD tokens. A thread reads ahead. Its errors are raised here,
    after the lines before them.
    """
    arrived, end = Ahead(AHEAD), object()

    def read():
        try:
            for line in lines:
                arrived.put(line)
            arrived.put(end)
        except OSError as error:
            arrived.put(BadInput(f"cannot be read: {error.strerror or error}"))
        except BaseException as error:  # any one: the caller's thread is the one to end the script
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    batch, tokens, due, last = [], 0, 0, None
    while last is None:
        try:
            item = arrived.get(timeout=max(0, due - time.monotonic()) if batch else None)
        except queue.Empty:
            item = None
        if item is end or isinstance(item, BaseException):
            last = item
        elif item is not None:
            due = due if batch else time.monotonic() + WAIT
            batch.append(item)
            tokens += weight(item)
        if batch and (item is None or last is not None or len(batch) == size or tokens >= AHEAD):
            yield batch
            batch, tokens = [], 0
    if last is not end:
        raise last
