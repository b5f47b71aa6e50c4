"""Whatever file, corpus or flag comes in, a script succeeds, or ends in one line and exit status 2, no file changed.

FUZZ=5000 tries so many inputs (`make test-long`), from number FUZZ_FIRST on; the number is the seed of each.
"""

import math
import os
import pickle
import random
import re
import shutil
import sys

import pytest
import torch
from helpers import files

import dynamic
import finetune
import generate
import main
import pointer
import run_files
from process import run_script

INPUTS, FIRST = int(os.environ.get("FUZZ", 200)), int(os.environ.get("FUZZ_FIRST", 0))
SCRIPTS = {"main": main.main, "finetune": finetune.main, "pointer": pointer.main, "dynamic": dynamic.main,
           "generate": generate.main}
TINY = ["--no-cuda", "--emsize", "5", "--nhid", "6", "--nlayers", "2", "--batch_size", "2", "--bptt", "7", "--lr", "1"]

USES = [  # of a checkpoint
    ["generate", "--checkpoint", "m.pt", "--words", "5", "--outf", "-"],
    ["pointer", "--save", "m.pt", "--window", "9"],
    ["dynamic", "--save", "m.pt", "--batch_size", "2", "--max-batches", "9", "--resume", "--no-cuda"],
    ["finetune", "--save", "m.pt", "--epochs", "1"],
    ["main", "--resume", "m.pt", "--epochs", "2"],
]
TEXTS = [b"", b"\n", b" \n\t\r\n", b"<eos>\n", b"a", b"a b c\n" * 9, b"\x00\x01 a\x00b\n" * 9, b"a " * 9999,
         b"\xef\xbb\xbfa\r\nb\r\n" * 9, b"\xe2\x80\xa8\xc2\x85 x\n" * 9, b"\xff\xfea\x00\n\x00",
         "\U0001f600\n".encode() * 9, b"a" * (2**20 + 9)]
VALUES = ["0", "1", "-1", "2", "0.5", "1e-320", "1e308", "inf", "nan", "", " ", "x", "--", "999999999999999999999", "٣",
          "1_0", "0x10", "é", "/", ".", "/dev/null", "word", "char", "byte", "LSTM", "QRNN", "GRU", "adam", "sgd",
          "bf16"]
FLAGS = {
    "main": ["--dropout", "--wdrop", "--dropoute", "--alpha", "--clip", "--lr", "--epochs", "--batch_size", "--bptt",
             "--max-bptt", "--nonmono", "--seed", "--log-interval", "--when", "--level", "--model", "--optimizer",
             "--wdecay", "--data", "--save", "--resume", "--save-interval", "--no-tied", "--shares",
             "--precision"],
    "finetune": ["--dropout", "--lr", "--bptt", "--nhid", "--model", "--level", "--load", "--seed", "--clip"],
    "pointer": ["--window", "--theta", "--lambdasm", "--bptt", "--data", "--level", "--model", "--save"],
    "dynamic": ["--lr", "--lamb", "--epsilon", "--bptt", "--batch_size", "--max-batches", "--rule", "--window",
                "--theta", "--lambdasm", "--data", "--level", "--model", "--save", "--shares", "--fast"],
    "generate": ["--temperature", "--top-k", "--words", "--prompt", "--seed", "--outf", "--checkpoint",
                 "--log-interval", "--batch", "--precision"],
}

DIVERGED = re.compile("epoch 1, batch|chunk [0-9,]+ of|no setting of the grid")  # after it began to write


@pytest.fixture
def place(corpus_dir, tmp_path, monkeypatch):
    """A folder with a corpus and a model trained on it, as the working directory, and a way back to how it was."""
    monkeypatch.chdir(tmp_path)
    main.main([*TINY, "--data", corpus_dir.name, "--epochs", "1", "--save", "m.pt"])
    dynamic.main(USES[2][1:])
    shutil.copytree(tmp_path, tmp_path.parent / "good")
    yield tmp_path
    shutil.rmtree(tmp_path.parent / "good")


def restore(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(folder.parent / "good", folder, dirs_exist_ok=True)


def damaged(chance, content):
    """The bytes with some of them cut off, flipped, swapped, repeated, overwritten or added."""
    content = bytearray(content)
    start, end = sorted(chance.randrange(len(content)) for _ in range(2))
    kind = chance.randrange(6)
    if kind == 0:
        del content[start:]
    elif kind == 1:
        for _ in range(chance.randrange(1, 9)):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        content = content[end:] + content[start:end] + content[:start]
    elif kind == 3:
        content[start:start] = content[start:end]
    elif kind == 4:
        content[start:end] = bytes(end - start)
    else:
        content[start:start] = chance.randbytes(chance.randrange(1, 99))
    return bytes(content)


class Payload:
    """What a hostile pickle does when it is loaded: it leaves a file."""

    def __reduce__(self):
        return open, ("payload-ran", "w")


STRANGE = ["", "x", "--save=lost", "\ud800", -1, 0, 1, 5, 0.5, 2**70, 1e308, math.inf, math.nan, True, None, [], ["x"],
           [1, [2]], {}, torch.zeros(3), torch.full((5, 5), math.nan)]


def edit(chance, content):
    """Replace or drop a value somewhere in a nest of dicts and lists."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = chance.choice(keys) if keys else None
    if key is not None and isinstance(content[key], (dict, list)) and chance.random() < 0.9:
        edit(chance, content[key])
    elif key is not None and chance.random() < 0.2:
        del content[key]
    elif key is not None:
        content[key] = chance.choice(STRANGE)


def a_checkpoint(chance, folder):
    command = chance.choice(USES)
    path = folder / (run_files.last_path("m.pt") if "--resume" in command and chance.random() < 0.8 else "m.pt")
    kind = chance.randrange(12)
    if command[0] == "dynamic":
        path = folder / chance.choice(["m.pt", "m.statistics.pt", "m.metrics.jsonl"])
    if path.suffix == ".pt" and kind > 9:  # written anew with strange values: no checksum tells
        content = torch.load(path, weights_only=True)
        for _ in range(chance.choice([1, 1, 3])):
            edit(chance, content)
        torch.save(content, path)
    elif kind == 0:
        torch.save([Payload()], path, _use_new_zipfile_serialization=chance.random() < 0.5)
    elif kind == 1:
        path.write_bytes(pickle.dumps({"format": "awd-lstm", "version": 1, "model": Payload()}))
    elif kind == 2:
        torch.save({**torch.load(path, weights_only=True), "flags": Payload()}, path)
    elif kind == 3:  # one file in the place of another
        shutil.copy(chance.choice(["m.last.pt", "m.pt", "m.metrics.jsonl", "corpus/train.txt"]), folder / "swapped")
        (folder / "swapped").replace(path)
    else:
        path.write_bytes(damaged(chance, path.read_bytes()))
    return command


def a_corpus(chance, folder):
    for split in ("train", "valid", "test"):
        text = chance.choice([*TEXTS, (folder / "m.pt").read_bytes()[:9999]])
        text *= chance.choice([1, 1, 30]) if len(text) < 999 else 1
        if chance.random() < 0.3:
            text = chance.randbytes(chance.randrange(300))
        elif chance.random() < 0.5:
            text = (folder / "corpus" / f"{split}.txt").read_bytes()
        (folder / "corpus" / f"{split}.txt").write_bytes(text)
    level = chance.choice([[], ["--level", "char"], ["--level", "byte"]])
    where = chance.choice(["corpus", "corpus", "corpus/train.txt"])
    return ["main", *TINY, "--data", where, "--epochs", "1", "--save", "new.pt", "--bptt", "300", *level]


def a_flag(chance, _):
    script = chance.choice(list(FLAGS))
    command = {"main": ["main", *TINY, "--data", "corpus", "--epochs", "1", "--save", "new.pt"],
               "generate": USES[0], "pointer": USES[1], "dynamic": USES[2], "finetune": USES[3]}[script]
    for _ in range(chance.randrange(1, 4)):
        command = [*command, chance.choice(FLAGS[script]), *[chance.choice(VALUES)] * chance.choice([1, 1, 1, 0, 3])]
    return command


@pytest.mark.slow
def test_any_input_ends_well(place, monkeypatch, capsys):
    for number in range(FIRST, FIRST + INPUTS):
        chance = random.Random(number)
        restore(place)
        script, *arguments = chance.choice([a_checkpoint, a_corpus, a_flag])(chance, place)
        if "--words" in arguments and len(arguments) > 8:
            arguments += ["--words", "5"]  # what is asked for is not the point
        if {"--epochs", "--nonmono"} & set(arguments):
            arguments += ["--epochs", "2" if "--resume" in arguments else "1"]
        before = files(place)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        try:
            with pytest.raises(SystemExit) as end:
                run_script(SCRIPTS[script])
        except Exception as error:
            raise AssertionError(f"input {number}: {script} {arguments}") from error
        err = capsys.readouterr().err
        status = end.value.code or 0
        assert status in (0, 2), (number, script, arguments)
        if status == 2:
            assert err.count("\n") == 1, (number, script, arguments, err)
            assert "error: " in err, (number, script, arguments, err)
            assert files(place) == before or DIVERGED.search(err), (number, script, arguments)
        assert not (place / "payload-ran").exists(), (number, script, arguments)
