"""Open the files of other programs that hold pickles and tensors.

    contents = containers.read("model.pt")            the pickled object, its tensors still in the file
    weight = contents.tensor(contents.root["0.encoder.weight"])

Three containers are read, and none runs code (`unpickle.py`):

- A plain pickle.
- The zip archive that PyTorch writes from 1.6 on: `data.pkl`, and a file for each storage.
- What PyTorch wrote before: five pickles in a row (magic number, protocol, system, object, keys of the storages), then
  each storage after its number of values.

A size that a file claims is compared with that of the file before memory is allocated.
"""

import io
import math
import os
import zipfile
from contextlib import contextmanager

import torch

from errors import BadInput, is_of_machine
from text import SIGNATURES
from unpickle import MAX_BYTES, Malformed, Record, Storage, Unpickler, is_count

MAX_DIRECTORY = 2**22  # bytes of the directory of a zip archive
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how PyTorch's files before 1.6 begin


class Contents:
    """Hold what a file has: `root`, the pickled object, and a way to the values of its tensors.

    Values are read when they are asked for. Storages may take as many bytes as the file has, tensors twice as many. The
    storage that goes beyond is read before it is refused.
    """

    def __init__(self, path, root, load_storage, size):
        self.path, self.root, self.load_storage, self.loaded = path, root, load_storage, {}
        self.tensor_bytes_left, self.storage_bytes_left = 2 * size, size

    def tensor(self, where):
        """Read the tensor that the Tensor `where` describes.

        Raises BadInput unless it lies in the file, with one value or more.
        """
        storage, shape, stride = where.storage, where.shape, where.stride
        if not (isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(stride, tuple)
                and 1 <= len(shape) == len(stride) <= 4 and all(map(is_count, (where.offset, *shape, *stride)))
                and all(shape) and storage.dtype.is_floating_point):
            raise BadInput(f"{self.path}: damaged: a weight that is no tensor of numbers")
        last = where.offset + sum((length - 1) * step for length, step in zip(shape, stride))
        values = math.prod(shape)
        self.tensor_bytes_left -= values * storage.dtype.itemsize
        if last >= storage.size or values > storage.size or self.tensor_bytes_left < 0:
            raise BadInput(f"{self.path}: damaged: tensors of more values than it has")
        if storage.key not in self.loaded:
            with reading(self.path):
                whole = self.load_storage(storage.key)  # all of it, though `storage` may be a part
            self.storage_bytes_left -= whole.nbytes
            if self.storage_bytes_left < 0:  # the entries of an archive may overlap
                raise BadInput(f"{self.path}: damaged: storages of more values than it has")
            self.loaded[storage.key] = whole
        return self.loaded[storage.key].as_strided(shape, stride, storage.first + where.offset).contiguous()


class Cautious(io.BufferedReader):
    """Read a zip archive, and refuse to read more than MAX_DIRECTORY bytes at once, which its directory may claim."""

    def read(self, size=-1):
        if size is not None and size > MAX_DIRECTORY:
            raise Malformed("an archive of too many files")
        return super().read(size)


@contextmanager
def reading(path):
    """Turn any error inside `with reading(path)` into a BadInput that names the file."""
    try:
        yield
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except Malformed as error:
        raise BadInput(f"{path}: {error}") from error
    except Exception as error:  # a damaged archive can make zipfile raise anything
        if is_of_machine(error):
            raise
        raise BadInput(f"{path}: damaged ({type(error).__name__})") from error


def read(path):
    """Read a file, whatever its container; returns its `Contents`. Raises BadInput."""
    with reading(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(16)
        file.seek(0)
        if head.startswith(b"PK\x03\x04"):
            if not zipfile.is_zipfile(path):
                raise Malformed("damaged: its end is missing")
            return read_archive(path, size)
        if what := no_pickle(head):
            raise BadInput(f"{path}: {what}")
        return read_stream(path, file, size)


def no_pickle(head):
    """Recognise by its first bytes a file that is no pickle; returns what it is and what to do, or None."""
    if not head:
        return "is empty"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:  # the length of a header, and the header
        return "is a file of safetensors; torch.save(safetensors.torch.load_file(FILE), OTHER) makes one that is read"
    return next((f"is {what}, which is not read: {remedy}" for start, what, remedy in SIGNATURES
                 if head.startswith(start)), None)


def read_archive(path, size):
    """Read the zip archive that PyTorch writes from 1.6 on."""
    storages = {}
    with Cautious(open(path, "rb", buffering=0)) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    members = {member.filename: member for member in entries}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Malformed("a zip archive that is no model")
    folder = pickles[0].removesuffix("data.pkl")

    def member_bytes(name, most):
        member = members.get(folder + name)
        if member is None or member.file_size > min(most, size) \
                or member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise Malformed("damaged: what it holds is not what its pickle says")
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            return archive.read(member)

    def load_storage(key):
        storage = storages[key]
        count = storage.size * storage.dtype.itemsize
        return as_tensor(member_bytes(f"data/{key}", count), storage)

    if folder + "byteorder" in members and member_bytes("byteorder", 10) != b"little":
        raise Malformed("of a machine with another byte order")
    data = member_bytes("data.pkl", MAX_BYTES)
    return Contents(path, Unpickler(io.BytesIO(data), len(data), storages).load(), load_storage, size)


def read_stream(path, file, size):
    """Read a plain pickle, or the stream that PyTorch wrote before 1.6."""
    storages = {}
    machine = Unpickler(file, size, storages)
    root = machine.load()
    if type(root) is not int or root != MAGIC:
        if storages:
            raise Malformed("a pickle that refers to something outside of it")
        return Contents(path, root, None, size)
    protocol, system, root, keys = (machine.load() for _ in range(4))
    if protocol != PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Malformed("of a machine with another byte order, or damaged")
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise Malformed("damaged: it has storages that its pickle does not know")
    starts, place = {}, file.tell()
    for key in keys:
        file.seek(place)
        count = int.from_bytes(file.read(8), "little")
        starts[key] = place + 8
        place += 8 + count * storages[key].dtype.itemsize
        if count != storages[key].size or place > size:
            raise Malformed("damaged: what it holds is not what its pickle says")

    def load_storage(key):
        with open(path, "rb") as file:
            file.seek(starts[key])
            return as_tensor(file.read(storages[key].size * storages[key].dtype.itemsize), storages[key])

    return Contents(path, root, load_storage, size)


def as_tensor(data, storage):
    """Make a tensor (size,) from the bytes of a storage."""
    if len(data) != storage.size * storage.dtype.itemsize:
        raise Malformed("damaged: it is cut short")
    return torch.frombuffer(bytearray(data), dtype=storage.dtype)


def read_words(path):
    """Read a pickled list of words. Raises BadInput for anything else."""
    words = read(path).root
    if not isinstance(words, (list, tuple)) or not words or not all(isinstance(word, str) for word in words):
        raise BadInput(f"{path}: no pickled list of words{what_instead(words)}")
    return list(words)


def what_instead(value):
    """Recognise another form of fastai's vocabulary; returns what it is and how to get the list of words, or ""."""
    if isinstance(value, Record):
        return f" but an object, {ascii(value.name):.60}; pickle list(dls.vocab), or in fastai 1 data.vocab.itos"
    if isinstance(value, dict):
        return " but a dict; pickle the list, dls.vocab, or in fastai 1 data.vocab.itos"
    if isinstance(value, (list, tuple)) and any(isinstance(part, (list, tuple, Record)) for part in value):
        return " but one of lists, as a classifier has; the first of them, list(dls.vocab[0]), is that of words"
    return ""
