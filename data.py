"""Text to token ids.

A corpus is a folder with train.txt, valid.txt and test.txt, UTF-8, words separated by white space. Each line ends with
the word <eos>. Words are numbered by first appearance over train, valid and test: the vocabulary is that of all three.
"""

from array import array
from collections import defaultdict
from pathlib import Path

import torch

from utils import BadInput

SPLITS = ("train", "valid", "test")


class Dictionary:
    """The vocabulary: `word2idx` maps a word to its id, `idx2word` an id to its word."""

    def __init__(self, words=()):
        self.idx2word = list(words)
        self.word2idx = {word: index for index, word in enumerate(self.idx2word)}

    def __len__(self):
        return len(self.idx2word)


class Corpus:
    """The three splits of a folder of text: `train`, `valid`, `test`, each a tensor (tokens,) of int32 ids, and their
    `dictionary`. Raises BadInput when a split is missing, empty or not UTF-8."""

    def __init__(self, path):
        path = Path(path)
        if not path.is_dir():
            raise BadInput(f"{path}: no such folder; './getdata.sh {path.name}' fetches the corpora it knows "
                           "into data/, './getdata.sh --list' names them")
        numbering = defaultdict()
        numbering.default_factory = numbering.__len__  # a new word gets the next number
        for split in SPLITS:
            setattr(self, split, tokenize(path / f"{split}.txt", numbering))
        self.dictionary = Dictionary(numbering)


def tokenize(path, numbering):
    """Read a text file into a tensor (tokens,) of int32, numbering its words with the mapping `numbering`."""
    ids = array("i")
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                words = line.decode("utf-8-sig" if number == 1 else "utf-8").split()
                ids.extend(map(numbering.__getitem__, words + ["<eos>"]))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}; a corpus needs train.txt, valid.txt and test.txt "
                       "('./getdata.sh --list' names the corpora that it fetches)") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: line {number} is not UTF-8 text") from error
    if not ids:
        raise BadInput(f"{path}: is empty")
    return torch.frombuffer(ids, dtype=torch.int32)
