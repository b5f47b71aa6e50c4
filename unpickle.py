"""Read pickles of other programs without running code.

    root = Unpickler(file, size).load()

A pickle is a program for a small stack machine. Python's own machine calls whatever the program names. The one here
calls nothing. It makes:

- Plain values, lists, tuples and dicts. A set is made as a list.
- A `Tensor` for a tensor of PyTorch, which says where its values are (`containers.py` reads them).
- A `Record` for an object of any other class, or a call of any other function: the name, the arguments, the state.

Memory and time are bounded. An opcode takes a byte or more of the file, and makes one object. There are at most
MAX_STEPS of them, in at most MAX_BYTES. Nothing recurses. A length that a file claims is compared with what the file
has before memory is allocated.
"""

import codecs
import pickle
import struct
from dataclasses import dataclass

import torch

MAX_STEPS = 2**21  # opcodes and copied items; a vocabulary of a million words has fewer
MAX_BYTES = 2**26  # of all pickles of a file; tensors are not counted
MAX_LINE = 2**20  # bytes of an argument in a text opcode
MAX_NAME = 1000  # bytes of a name, or of a number as text, which takes quadratic time to read
MAX_INT_BYTES = 255  # of an integer; PyTorch's magic number has ten
LARGEST_KEY = 2**60  # of an int as key of a dict: larger ones can be made to collide

DTYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
          "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
          "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
          "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128}


class Malformed(ValueError):
    """Report a pickle that is damaged, or larger than that of a model."""


# --- what a pickle holds ---------------------------------------------------------------------------------------------

class Record:
    """Stand in for an object, a function or a class that is not made.

    `name` is its name in the file, "module.name". `args` are those that it was called with, `state` is what was put
    into it. A function or class itself has neither.
    """

    __slots__ = ("name", "args", "state")

    def __init__(self, name, args=None):
        self.name, self.args, self.state = name, args, None

    def __repr__(self):
        return f"<record of {self.name:.60}>"


@dataclass(frozen=True, eq=False)
class Storage:
    """Name the values of one or several tensors.

    `first` is where a part of a storage begins, in values; `size` is the number of values.
    """

    key: str
    dtype: torch.dtype
    size: int
    first: int = 0


@dataclass(frozen=True, eq=False)
class Tensor:
    """Say which values of a storage a tensor has."""

    storage: Storage
    offset: int
    shape: tuple
    stride: tuple


def is_count(value):
    return type(value) is int and 0 <= value < LARGEST_KEY


# --- the machine -----------------------------------------------------------------------------------------------------

class Unpickler:
    """Run pickles that follow each other in `file`, which has `size` bytes.

    `storages` takes those of PyTorch's tensors, by key; None where there may be none.
    """

    def __init__(self, file, size, storages=None):
        self.file, self.left, self.steps, self.storages = file, min(size, MAX_BYTES), 0, storages

    def load(self):
        """Run one pickle; returns its object. Raises Malformed."""
        self.stack, self.marks, self.memo = [], [], {}
        try:
            while (opcode := self.read(1)) != pickle.STOP:
                self.charge(1)
                if opcode not in OPCODES:
                    raise Malformed(f"no pickle, or a damaged one (opcode {opcode!r})")
                OPCODES[opcode](self)
            return self.stack.pop()
        except Malformed:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
            raise Malformed(f"no pickle, or a damaged one ({type(error).__name__})") from error

    def charge(self, steps):
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise Malformed(f"a pickle of more than {MAX_STEPS:,} steps")

    def read(self, count):
        if not 0 <= count <= self.left:
            raise Malformed("a pickle that is cut short, or claims more than there is")
        self.left -= count
        data = self.file.read(count)
        if len(data) < count:
            raise Malformed("a pickle that is cut short")
        return data

    def number(self, form):
        return struct.unpack(f"<{form}", self.read(struct.calcsize(form)))[0]

    def line(self, limit=MAX_LINE):
        data = self.file.readline(min(limit, self.left))
        self.left -= len(data)
        if not data.endswith(b"\n"):
            raise Malformed("a pickle that is cut short, or has a line that is too long")
        return data[:-1]

    def push(self, value):
        self.stack.append(value)

    def pop_mark(self):
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    # --- opcodes that take more than a line

    def text(self, data):
        """Decode a string that Python 2 wrote."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data.decode("latin-1")

    def quoted(self):
        data = self.line()
        if len(data) < 2 or data[:1] != data[-1:] or data[:1] not in b"\"'":
            raise ValueError
        self.push(self.text(codecs.escape_decode(data[1:-1])[0]))

    def integer(self):
        data = self.line(MAX_NAME)
        self.push(data == b"01" if data in (b"00", b"01") else int(data.rstrip(b"L")))  # protocol 0 spells bools so

    def long(self, form):
        count = self.number(form)
        if not 0 <= count <= MAX_INT_BYTES:
            raise Malformed("an integer that is too large")
        self.push(int.from_bytes(self.read(count), "little", signed=True))

    def take(self, count):
        """Push a tuple of the last `count` values."""
        if count > len(self.stack):
            raise IndexError
        items = tuple(self.stack[len(self.stack) - count:])
        del self.stack[len(self.stack) - count:]
        self.push(items)

    def append(self, items):
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def set_items(self, items):
        """Put keys and values into the dict on the stack; an object of another class is left as it is."""
        if len(items) % 2:
            raise IndexError
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(map(checked_key, items[::2]), items[1::2]))

    def make_dict(self, items):
        self.push({})
        self.set_items(items)

    def name(self, module, name):
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError
        if len(module) + len(name) > MAX_NAME:
            raise Malformed("a name that is too long")
        self.charge((len(module) + len(name)) // 16)  # a file may join two strings more often than it has them
        self.push(Record(f"{module}.{name}"))

    def global_lines(self):
        self.name(self.line(MAX_NAME).decode("utf-8"), self.line(MAX_NAME).decode("utf-8"))

    def instance(self):
        self.global_lines()
        function = self.stack.pop()
        self.push(self.make(function, tuple(self.pop_mark())))

    def object(self):
        function, *args = self.pop_mark()
        self.push(self.make(function, tuple(args)))

    def reduce(self, drop=0):
        """Make what a call gives, without calling; `drop` values of the stack (keywords) are left out."""
        del self.stack[len(self.stack) - drop:]
        args, function = self.stack.pop(), self.stack.pop()
        self.push(self.make(function, args))

    def make(self, function, args):
        if not (isinstance(function, Record) and isinstance(args, tuple)):
            raise TypeError
        name = function.name if function.args is None else "a call's result"
        if name in DICTS and len(args) <= 1:
            pairs = args[0] if args and isinstance(args[0], list) else []
            self.charge(len(pairs))
            return {checked_key(key): value for key, value in pairs}
        if name in TENSORS and len(args) >= 4:
            storage, offset, shape, stride = args[:4]
            return Tensor(storage, offset, shape, stride)
        if name in PARAMETERS and args and isinstance(args[0], Tensor):
            return args[0]
        return Record(name, args)

    def build(self):
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def persistent(self):
        """Push what PyTorch keeps outside of a pickle: a storage, or a class with its source."""
        reference = self.stack.pop()
        if self.storages is None or not isinstance(reference, tuple):
            raise Malformed("a pickle that refers to something outside of it")
        if reference[0] == "module":  # and two strings, the file and the source of the class
            self.push(reference[1])
            return
        kind, storage_type, key, _, size, *view = reference
        dtype = DTYPES.get(storage_type.name.rpartition(".")[2])
        if kind != "storage" or dtype is None or not is_count(size) or not isinstance(key, str):
            raise Malformed("a tensor of a kind that is not read")
        storage = self.storages.setdefault(key, Storage(key, dtype, size))
        if (storage.dtype, storage.size) != (dtype, size):
            raise Malformed("a storage of two kinds")
        if view and view[0] is not None:
            _, first, part = view[0]
            if not (is_count(first) and is_count(part) and first + part <= size):
                raise Malformed("a part of a storage that is not in it")
            storage = Storage(key, dtype, part, first)
        self.push(storage)


DICTS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict"}
TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
              "torch.nn.parameter.Parameter", "torch.autograd.variable.Variable"}


def checked_key(key):
    """Return the key of a dict; raises Malformed for one that a hostile file could make slow to hash."""
    is_small = isinstance(key, int) and abs(key) < LARGEST_KEY
    if key is None or is_small or isinstance(key, (str, bytes, Record, Tensor)):
        return key
    raise Malformed("a dict with keys that are not read")


def put(machine, place):
    machine.memo[checked_key(place)] = machine.stack[-1]


OPCODES = {
    pickle.PROTO: lambda m: m.read(1), pickle.FRAME: lambda m: m.read(8),
    pickle.MARK: lambda m: m.marks.append(len(m.stack)), pickle.POP_MARK: lambda m: m.pop_mark(),
    pickle.POP: lambda m: m.stack.pop(), pickle.DUP: lambda m: m.push(m.stack[-1]),
    pickle.NONE: lambda m: m.push(None), pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.INT: lambda m: m.integer(), pickle.LONG: lambda m: m.integer(),
    pickle.BININT: lambda m: m.push(m.number("i")), pickle.BININT1: lambda m: m.push(m.number("B")),
    pickle.BININT2: lambda m: m.push(m.number("H")),
    pickle.LONG1: lambda m: m.long("B"), pickle.LONG4: lambda m: m.long("i"),
    pickle.FLOAT: lambda m: m.push(float(m.line(MAX_NAME))),
    pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.read(8))[0]),
    pickle.STRING: lambda m: m.quoted(),
    pickle.BINSTRING: lambda m: m.push(m.text(m.read(m.number("i")))),
    pickle.SHORT_BINSTRING: lambda m: m.push(m.text(m.read(m.number("B")))),
    pickle.UNICODE: lambda m: m.push(codecs.decode(m.line(), "raw-unicode-escape")),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.read(m.number("B")).decode("utf-8")),
    pickle.BINUNICODE: lambda m: m.push(m.read(m.number("I")).decode("utf-8")),
    pickle.BINUNICODE8: lambda m: m.push(m.read(m.number("Q")).decode("utf-8")),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.read(m.number("B"))),
    pickle.BINBYTES: lambda m: m.push(m.read(m.number("I"))),
    pickle.BINBYTES8: lambda m: m.push(m.read(m.number("Q"))),
    pickle.BYTEARRAY8: lambda m: m.push(m.read(m.number("Q"))),
    pickle.EMPTY_LIST: lambda m: m.push([]), pickle.EMPTY_SET: lambda m: m.push([]),
    pickle.EMPTY_TUPLE: lambda m: m.push(()), pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.LIST: lambda m: m.push(m.pop_mark()), pickle.FROZENSET: lambda m: m.push(m.pop_mark()),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())), pickle.DICT: lambda m: m.make_dict(m.pop_mark()),
    pickle.TUPLE1: lambda m: m.take(1), pickle.TUPLE2: lambda m: m.take(2), pickle.TUPLE3: lambda m: m.take(3),
    pickle.APPEND: lambda m: m.append([m.stack.pop()]), pickle.APPENDS: lambda m: m.append(m.pop_mark()),
    pickle.ADDITEMS: lambda m: m.append(m.pop_mark()), pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    pickle.SETITEM: lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    pickle.PUT: lambda m: put(m, int(m.line(MAX_NAME))), pickle.GET: lambda m: m.push(m.memo[int(m.line(MAX_NAME))]),
    pickle.BINPUT: lambda m: put(m, m.number("B")), pickle.BINGET: lambda m: m.push(m.memo[m.number("B")]),
    pickle.LONG_BINPUT: lambda m: put(m, m.number("I")), pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number("I")]),
    pickle.MEMOIZE: lambda m: put(m, len(m.memo)),
    pickle.GLOBAL: lambda m: m.global_lines(), pickle.STACK_GLOBAL: lambda m: m.name(m.stack.pop(-2), m.stack.pop()),
    pickle.REDUCE: lambda m: m.reduce(), pickle.NEWOBJ: lambda m: m.reduce(),
    pickle.NEWOBJ_EX: lambda m: m.reduce(drop=1), pickle.INST: lambda m: m.instance(),
    pickle.OBJ: lambda m: m.object(), pickle.BUILD: lambda m: m.build(), pickle.BINPERSID: lambda m: m.persistent(),
}
