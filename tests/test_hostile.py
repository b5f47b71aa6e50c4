"""Files that are not what they say: one line, exit status 2, nothing run, nothing written, little memory."""

import io
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import files
from test_convert import CORPUS, FOREIGN, ITOS, ORIGINAL, refused
from test_fuzz import Payload, damaged

import checkpoint
import containers
import unpickle
from errors import BadInput


@pytest.fixture
def run(run_converter):
    return run_converter


def call(module, name, *arguments):
    """A pickle that calls a function with strings."""
    return (f"\x80\x02c{module}\n{name}\n(".encode() + b"".join(b"X" + struct.pack("<I", len(text)) + text.encode()
                                                              for text in arguments) + b"tR.")


GETATTR = (b"\x80\x02c__builtin__\ngetattr\n(c__builtin__\n__import__\n(X\x08\x00\x00\x00builtinstR"
           b"X\x04\x00\x00\x00evaltR")
RUN = "open('payload-ran', 'w')"
NEST = 2**16
P63 = struct.pack("<Q", 2**63 - 1)

HOSTILE = {
    "os.system": call("os", "system", "touch payload-ran"),
    "posix.system": call("posix", "system", "touch payload-ran"),
    "eval": call("builtins", "eval", RUN), "eval of Python 2": call("__builtin__", "eval", RUN),
    "eval through getattr": GETATTR + b"(X" + struct.pack("<I", len(RUN)) + RUN.encode() + b"tR.",
    "a function made": b"\x80\x02ctypes\nFunctionType\n(ctypes\nCodeType\n(K\x00tR}tR(tR.",
    "a class with state": b"\x80\x02csubprocess\nPopen\n)\x81}X\x04\x00\x00\x00argsX\x01\x00\x00\x00asb.",
    "a call in the state": b"\x80\x02cm\nC\n)\x81" + call("os", "system", "touch payload-ran")[2:-1] + b"b.",
    "INST": b"(S'touch payload-ran'\nios\nsystem\n.", "OBJ": b"(cos\nsystem\nX\x01\x00\x00\x00ao.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x11touch payload-ran\x85R.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01a\x85}\x92.",
    "an extension": b"\x80\x02\x82\x01.", "a reference outside": b"\x80\x02X\x01\x00\x00\x000Q.",
    "a reference outside, as text": b"P0\n.", "a buffer outside": b"\x80\x05\x97.",
    "lists in lists": b"\x80\x02" + b"]" * NEST + b"a" * (NEST - 1) + b".",
    "tuples in tuples": b"\x80\x02)" + b"\x85" * NEST + b".",
    "dicts in dicts": b"\x80\x02" + b"}N" * NEST + b"}" + b"s" * NEST + b".",
    "calls in calls": b"\x80\x02" + b"cm\nC\n" * NEST + b")" + b"R\x85" * (NEST - 1) + b"R.",
    "marks": b"\x80\x02" + b"(" * NEST + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "tuples doubled": b"\x80\x02)" + b"2\x86" * 100 + b".",
    "tuples doubled, as a key": b"\x80\x02})" + b"2\x86" * 100 + b"Ns.",
    "tensors of doubled tuples, as a key": (b"\x80\x02}ctorch._utils\n_rebuild_tensor_v2\n()" + b"2\x86" * 100
                                            + b"NNNtRNs."),
    "tensors of nested tuples, as a key": (b"\x80\x02}ctorch._utils\n_rebuild_tensor_v2\n()" + b"\x85" * 2**16
                                           + b"NNNtRNs."),
    "pairs copied": (b"\x80\x02]q\x00(" + b"NN\x86" * 2**12 + b"e"
                     + b"ccollections\nOrderedDict\nh\x00\x85R0" * 2**12 + b"."),
    "names joined": b"\x80\x02X\xf3\x01\x00\x00" + b"m" * 499 + b"q\x00" + b"h\x00h\x00\x93" * 2**16 + b".",
    "a long name": b"\x80\x02X" + struct.pack("<I", 2**16) + b"m" * 2**16 + b"q\x00h\x00\x93.",
    "keys that collide": b"\x80\x02}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N"
                                                 for i in range(2**12)) + b"u.",
    "keys that collide, in the memo": b"N" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(2**12)) + b".",
    "a place in the memo far away": b"\x80\x02Nr\xff\xff\xff\xff.",
    "bytes claimed": b"\x80\x04B" + struct.pack("<I", 2**30) + b".", "bytes claimed, 8": b"\x80\x04\x8e" + P63 + b".",
    "text claimed": b"\x80\x02X" + struct.pack("<I", 2**30) + b".", "text claimed, 8": b"\x80\x04\x8d" + P63 + b".",
    "a byte array claimed": b"\x80\x05\x96" + P63 + b".", "a string claimed": b"T\xff\xff\xff\x3f.",
    "a string of negative length": b"T\xff\xff\xff\xff.", "a number claimed": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a number of negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "a long number": b"\x80\x02\x8b" + struct.pack("<i", 2**20) + b"\x01" * 2**20 + b".",
    "a long number, as text": b"L" + b"9" * 2**20 + b"L\n.", "a frame claimed": b"\x80\x04\x95" + P63 + b".",
    "a line without end": b"S'" + b"a" * (unpickle.MAX_LINE + 9), "nothing": b"", "a stop": b".", "pops": b"00.",
    "a mark that is not there": b"t.", "a memo that is not there": b"h\x07.", "text": b"hello world\n",
}


def zipped(content, storages=None, how=zipfile.ZIP_STORED):
    """PyTorch's archive around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("archive/data.pkl", content)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return file.getvalue()


def legacy(content, storages=None):
    """The container before PyTorch 1.6 around a pickle; `storages` are bytes of fp32 by key."""
    storages = storages or {}
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    start = b"".join(pickle.dumps(part, 2) for part in (containers.MAGIC, 1001, system))
    ends = [struct.pack("<q", len(data) // 4) + data for data in storages.values()]
    return start + content + pickle.dumps(list(storages), 2) + b"".join(ends)


@pytest.mark.parametrize("container", [bytes, zipped, legacy])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_runs_nothing_and_takes_little_memory(run, monkeypatch, name, container):
    monkeypatch.setattr(os, "system", None)
    content = container(HOSTILE[name])
    Path("in.pt").write_bytes(content)
    memory = 2**22 + 256 * len(content)  # an opcode is a byte or more, and makes one object
    refused(run, "in.pt", "--data", CORPUS, "--vocabulary", ITOS, "--save", "new.pt", memory=memory)
    if container is bytes:
        refused(run, FOREIGN / "fastai_lstm.pth", "--vocabulary", "in.pt", "--save", "new.pt", memory=memory)
    assert not Path("payload-ran").exists()


def test_steps_are_counted(run, monkeypatch):
    Path("in.pkl").write_bytes(b"N0" * 60 + b"N.")
    assert "no language model" not in refused(run, "in.pkl", "--save", "new.pt")
    monkeypatch.setattr(unpickle, "MAX_STEPS", 120)
    assert "more than 120 steps" in refused(run, "in.pkl", "--save", "new.pt")
    monkeypatch.setattr(unpickle, "MAX_BYTES", 100)
    assert "claims more than there is" in refused(run, "in.pkl", "--save", "new.pt")


@pytest.mark.parametrize("name", ["keys that collide", "keys that collide, in the memo", "tuples doubled, as a key"])
def test_keys_take_no_time_that_a_file_chooses(run, name):
    Path("in.pkl").write_bytes(HOSTILE[name])
    assert "keys that are not read" in refused(run, "in.pkl", "--save", "new.pt")


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}])
def test_an_object_of_python_that_runs_something(run, how):
    for thing in (Payload(), [Payload()], {"model": Payload(), "0.rnns.0": Payload()}):
        torch.save(thing, "in.pt", **how)
        refused(run, "in.pt", "--data", CORPUS, "--vocabulary", ITOS, "--save", "new.pt")
    assert not Path("payload-ran").exists()


def storage(key="0", size=720, kind="FloatStorage"):
    """The opcodes of a reference to a storage."""
    return (b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x00" + key.encode()
            + b"X\x03\x00\x00\x00cpu\x8a\x09" + size.to_bytes(9, "little") + b"tQ")


def tensor(shape, stride, offset=0, **stored):
    numbers = [b"(" + b"".join(b"\x8a\x09" + n.to_bytes(9, "little", signed=True) for n in part) + b"t"
               for part in (shape, stride)]
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(**stored) + b"\x8a\x09" +
            offset.to_bytes(9, "little", signed=True) + b"".join(numbers) + b"\x89}tR")


def model_of(one, other="0.rnns.0.module.weight_ih_l0"):
    """The pickle of a state dict in which a tensor is as the opcodes `one` say."""
    names = ["0.encoder.weight", "0.rnns.0.weight_hh_l0_raw", other, "1.decoder.weight"]
    return b"\x80\x02}(" + b"".join(b"X" + struct.pack("<I", len(name)) + name.encode() + one for name in names) + b"u."


TENSORS = {
    "a gigabyte claimed": tensor([2**14, 2**14], [2**14, 1], size=2**28),
    "more than can be counted": tensor([2**62, 2**62], [2**62, 1], size=2**59),
    "more than its storage": tensor([721], [1]), "far from its start": tensor([1], [1], offset=720),
    "before its start": tensor([1], [1], offset=-1), "one value a million times": tensor([2**20, 2**20], [0, 0]),
    "steps out of it": tensor([2, 2], [2**40, 1]), "steps back": tensor([2, 2], [-1, 1]),
    "nothing": tensor([0], [1]), "one number": tensor([], []), "no dimensions for its steps": tensor([2, 2], [1]),
    "many dimensions": tensor([1] * 99, [1] * 99), "of bools": tensor([1], [1], size=2880, kind="BoolStorage"),
    "of objects": tensor([1], [1], kind="ObjectStorage"), "of a storage that is not there": tensor([1], [1], key="9"),
}


@pytest.mark.parametrize("container", [zipped, legacy])
@pytest.mark.parametrize("name", TENSORS)
def test_a_hostile_tensor(run, name, container):
    Path("in.pth").write_bytes(container(model_of(TENSORS[name]), {"0": bytes(2880)}))
    refused(run, "in.pth", "--vocabulary", ITOS, "--save", "new.pt", memory=2**22)


def test_one_storage_as_many_weights_is_no_way_to_much_memory(run):
    one = tensor([720], [1])
    names = [f"0.rnns.{layer}.module.{name}" for layer in range(99)
             for name in ("weight_hh_l0", "weight_ih_l0", "bias_ih_l0", "bias_hh_l0")]
    content = b"\x80\x02}(" + b"".join(b"X" + struct.pack("<I", len(name)) + name.encode() + one
                                       for name in ["0.encoder.weight", *names]) + b"u."
    Path("in.pth").write_bytes(zipped(content, {"0": bytes(2880)}))
    assert "more values than it has" in refused(run, "in.pth", "--vocabulary", ITOS, "--save", "new.pt")


def test_hostile_archives(run):
    content = model_of(tensor([720], [1]))
    big = io.BytesIO()
    with zipfile.ZipFile(big, "w") as archive:
        for number in range(2**16):
            archive.writestr(zipfile.ZipInfo(f"a/{number:032}"), b"")
    whole = zipped(content, {"0": bytes(2880)})
    claims = whole.replace(struct.pack("<II", 2880, 2880), struct.pack("<II", 2**30, 2**30))
    two = io.BytesIO()
    with zipfile.ZipFile(two, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("b/data.pkl", content)
    assert claims != whole
    for data in (big.getvalue(), claims, two.getvalue(), zipped(content, {"0": bytes(2880)}, zipfile.ZIP_DEFLATED),
                 zipped(content, {"0": bytes(2876)}), whole[:-30], whole[:200] + whole[300:], b"PK\x03\x04"):
        Path("in.pth").write_bytes(data)
        refused(run, "in.pth", "--vocabulary", ITOS, "--save", "new.pt", memory=2**22)


def test_a_part_of_a_storage_as_old_files_have_them(tmp_path, monkeypatch):
    """PyTorch before 0.4 named a part by its key, its first value and its size, after those of the whole."""
    monkeypatch.chdir(tmp_path)
    one = tensor([2, 2], [2, 1], offset=1, size=20)
    view = b"(X\x01\x00\x00\x00vK\x05K\x06t"
    content = b"\x80\x02" + one.replace(b"tQ", view + b"tQ") + b"."
    values = torch.arange(20.0)
    Path("in.pt").write_bytes(legacy(content, {"0": values.numpy().tobytes()}))
    contents = containers.read("in.pt")
    assert contents.tensor(contents.root).tolist() == [[6, 7], [8, 9]]
    Path("in.pt").write_bytes(legacy(content.replace(b"K\x05K\x06", b"K\x05K\x10"), {"0": values.numpy().tobytes()}))
    with pytest.raises(BadInput, match="not in it"):
        containers.read("in.pt")


def repacked(path, container, change=bytes):
    """A file of PyTorch in another container, its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        content = archive.read(f"{path.stem}/data.pkl")
        storages = {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist() if "/data/" in name}
    return container(change(content), storages)


@pytest.mark.parametrize("container", [zipped, legacy])
def test_the_same_pickle_in_both_containers(run, container):
    run(FOREIGN / "original_qrnn.pt", "--data", CORPUS, "--save", "one.pt")
    Path("in.pt").write_bytes(repacked(FOREIGN / "original_qrnn.pt", container))
    assert run("in.pt", "--data", CORPUS, "--save", "two.pt")[0] == 0
    first, second = checkpoint.load("one.pt"), checkpoint.load("two.pt")
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    assert first["flags"] == second["flags"]


@pytest.mark.parametrize("container", [zipped, legacy])
def test_a_file_cut_anywhere(run, container):
    content = repacked(FOREIGN / "fastai_lstm.pth", container)
    for length in range(0, len(content), 997):
        Path("in.pth").write_bytes(content[:length])
        refused(run, "in.pth", "--vocabulary", ITOS, "--save", "new.pt")


# --- fuzz ------------------------------------------------------------------------------------------------------------

def a_stream(chance):
    """Opcodes at random, with arguments that mean something now and then."""
    parts = [*map(bytes, ([code] for code in range(256))), b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"h\x00",
             b"q\x00", b"X\x01\x00\x00\x00a", b"K\x07", b"]", b"}", b")", b"(", b"(", b"(", storage(), tensor([1], [1]),
             b"ctorch._utils\n_rebuild_tensor_v2\n", b"\x85R", b"}b", b"NNs", b"\x8a\x01\x05", b"2", b"\x94"]
    return b"\x80\x02" + b"".join(chance.choices(parts, [1] * 256 + [20] * (len(parts) - 256),
                                                 k=chance.randrange(1, 300))) + b"."


def try_one(run, number):
    """One input, by number; whatever it is, the script succeeds, or refuses it in one line and changes nothing."""
    chance = random.Random(number)
    path = FOREIGN / chance.choice([*(known["file"] for known in ORIGINAL), "fastai_lstm.pth",
                                    "fastai_lstm_with_opt.pth"])
    container, words = chance.choice([zipped, legacy]), ITOS.read_bytes()
    kind = chance.randrange(5)
    if kind == 0:
        content = damaged(chance, path.read_bytes())
    elif kind == 1:  # whole but for its pickle: no checksum tells
        content = repacked(path, container, lambda content: damaged(chance, content))
    elif kind == 2:
        content = damaged(chance, repacked(path, container))
    elif kind == 3:
        content = chance.choice([bytes, zipped, legacy])(a_stream(chance))
    else:
        path, content, words = FOREIGN / "fastai_lstm.pth", path.read_bytes(), damaged(chance, words)
    flags = ["--vocabulary", "itos.pkl"] if path.suffix == ".pth" else ["--data", CORPUS]
    Path("in.pt").write_bytes(content)
    Path("itos.pkl").write_bytes(words)
    Path("new.pt").unlink(missing_ok=True)
    before = files(Path.cwd())
    status, _, err = run("in.pt", *flags, "--save", "new.pt")
    assert status in (0, 2), (number, err)
    if status == 2:
        assert err.count("\n") == 1, (number, err)
        assert files(Path.cwd()) == before, number
    else:
        checkpoint.restore_model(checkpoint.load_model("new.pt"), "new.pt")
    assert not Path("payload-ran").exists(), number


def test_damaged_files_end_well(run):
    for number in range(150):
        try_one(run, number)


@pytest.mark.slow
def test_many_damaged_files_end_well(run):
    first = int(os.environ.get("FUZZ_FIRST", 0))
    for number in range(first, first + int(os.environ.get("FUZZ", 200)) * 5):
        try_one(run, number)


@pytest.mark.parametrize("size", [200, 1], ids=["whole", "in part"])
def test_storages_that_lie_in_each_other_are_not_all_loaded(size):
    """An archive's entries may overlap, so that each has nearly all of the file, and be named for a part of them."""
    loaded = []

    def load_storage(key):
        loaded.append(key)
        return torch.zeros(200)

    contents = containers.Contents("m.pt", None, load_storage, 1000)
    where = [unpickle.Tensor(unpickle.Storage(key, torch.float32, size), 0, (1,), (1,)) for key in "abc"]
    with pytest.raises(BadInput, match="storages of more values than it has"):
        for one in where:
            contents.tensor(one)
    assert loaded == ["a", "b"]


@pytest.mark.parametrize("content, why", [
    (b"", "is empty"), (b"\x1f\x8b\x08" + bytes(20), "gzip"), (b"BZh9" + bytes(20), "bzip2"),
    (struct.pack("<Q", 80) + b'{"0.encoder.weight":' + bytes(80), "safetensors"),
    (b"PK\x03\x04" + bytes(99), "its end"),
])
def test_what_is_no_pickle_is_told_what_it_is(run, content, why):
    Path("in.pth").write_bytes(content)
    assert why in refused(run, "in.pth", "--vocabulary", ITOS, "--save", "new.pt")
    assert why in refused(run, FOREIGN / "fastai_lstm.pth", "--vocabulary", "in.pth", "--save", "new.pt")
