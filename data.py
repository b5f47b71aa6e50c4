"""Hold a corpus: its vocabulary, and its splits laid out as batches.

A corpus is a folder with train.txt, valid.txt and test.txt, or a single text file, which `shares` cut into these
splits. `text.py` says what a token is. A file named `level` in the folder says which level the folder is made for.

The vocabulary has all words of the three splits, numbered by first appearance. `vocabulary.Rules` may choose another,
or that of a model is given. Then a token that is not in it becomes <unk>.

A corpus of more than CACHE_TOKENS tokens is read once and kept (`corpus_cache.py`): beside a file as
`.NAME.LEVEL.cache`, in a folder as `.LEVEL.cache`. Its ids are mapped from there. With another vocabulary they are
mapped from an unnamed file, which vanishes with the process.
"""

import math
import os
from pathlib import Path

import numpy
import torch

from corpus_cache import checksum_of_files, count_ids, first_id, load_cache, look_up, read_and_keep
from errors import BadInput
from text import LEVELS
from utils import batchify
from vocabulary import END, UNKNOWN, Dictionary, Rules, choose_vocabulary, id_table

SPLITS = ("train", "valid", "test")
CACHE_TOKENS = 2**22  # a text of this length is read in a second or two


class Corpus:
    """Hold the splits of a text and their `dictionary`.

    `train`, `valid` and `test` are tensors (tokens,) of integer ids.

    - `level`: None takes the level that the folder says, else "word".
    - `shares`: the parts of a single file that the splits get; two leave no test split.
    - `cache`: whether a cache may be written.
    - `rules`: how to choose the vocabulary.
    - `words`: a vocabulary to take as it is, that of a model.
    - `cache_error`: why there is no cache where there should be one.
    - `unknown`: how many tokens of each split are not in the vocabulary.
    - `ends_unknown`: whether the ends of lines are among these, and so <unk>.

    Raises BadInput when a split is missing, empty or not text at that level.
    """

    def __init__(self, path, level=None, shares=(90, 5, 5), cache=True, rules=None, words=None):
        path = self.path = Path(path)
        is_folder = os.path.isdir(path)  # unlike Path's own, false for an impossible path
        paths = [path / f"{split}.txt" for split in SPLITS] if is_folder else [path]
        if not os.path.exists(path):
            raise BadInput(f"{path}: no such file or folder; './getdata.sh NAME' fetches one of the corpora that "
                           "'./getdata.sh --list' names into data/NAME")
        self.has_test = is_folder or len(shares) == len(SPLITS)
        self.level = level or folder_level(path) or "word"
        rules = rules or Rules()
        if words is None:
            rules.check(self.level)
        self.checksum = checksum_of_files(paths)
        cached = (path / f".{self.level}.cache") if is_folder else path.with_name(f".{path.name}.{self.level}.cache")
        ids, lengths, tokens = self.read(paths, cached, cache)
        if not is_folder:
            lengths = [int(len(ids) * share / sum(shares)) for share in shares[:2]]
            if not self.has_test:
                lengths[1] = len(ids) - lengths[0]
            lengths.append(len(ids) - sum(lengths))
        self.unknown, self.first_unknown, self.ends_unknown = dict.fromkeys(SPLITS, 0), {}, False
        is_changed = rules.chooses() if words is None else words != tokens
        if is_changed:
            counts = count_ids(ids, lengths, len(tokens))
            words = choose_vocabulary(tokens, counts[0], rules) if words is None else words
            self.note_unknown(ids, lengths, tokens, counts, words)
            ids, tokens = self.renumber(ids, id_table(tokens, words), cached.parent if cache else None), words
        self.train, self.valid, self.test = torch.from_numpy(ids).split(lengths)
        self.dictionary = Dictionary(tokens)

    def read(self, paths, cached, cache):
        """Read the text from its cache or, where there is none, from its files; returns what `read_and_keep` does."""
        self.cache_error = None
        loaded = load_cache(cached, self.checksum)
        if loaded is None and cache:
            try:
                return read_and_keep(paths, self.level, CACHE_TOKENS, cached, self.checksum)
            except OSError as error:
                self.cache_error = (f"{cached} was not written: {error.strerror}; the text is in memory, and the next "
                                    "run reads it again")
        return loaded or read_and_keep(paths, self.level, math.inf, cached, self.checksum)

    def renumber(self, ids, table, folder):
        """Look `ids` up in `table`; many ids go to a file in `folder` (None: all stay in memory)."""
        try:
            return look_up(ids, table, math.inf if folder is None else CACHE_TOKENS, folder)
        except OSError as error:
            self.cache_error = f"{folder}: no room for ids of this vocabulary: {error.strerror}; they are in memory"
            return table[ids]

    def note_unknown(self, ids, lengths, tokens, counts, words):
        """Count the tokens of each split that `words` lacks; without an <unk> in it, note the first of them.

        `counts` (splits, V) are those of `count_ids`.
        """
        known, start = set(words), 0
        unknown = numpy.array([token not in known for token in tokens])
        self.ends_unknown = END in tokens and END not in known and UNKNOWN in known
        for split, length, row in zip(SPLITS, lengths, counts):
            self.unknown[split] = int(row[unknown].sum())
            if self.unknown[split] and UNKNOWN not in known:
                self.first_unknown[split] = tokens[first_id(ids, unknown, start, start + length)]
            start += length

    def describe(self):
        """Describe the corpus in one line, for the log."""
        test = f"{len(self.test):,}" if self.has_test else "no test"
        line = (f"corpus: {len(self.train):,} / {len(self.valid):,} / {test} tokens, "
                f"{len(self.dictionary):,} different, at {self.level} level")
        if any(self.unknown.values()):
            line += f"; as {UNKNOWN}: {' / '.join(f'{count:,}' for count in self.unknown.values())}"
            line += ", the ends of lines among them" if self.ends_unknown else ""
        return f"{line}; {self.cache_error}" if self.cache_error else line


def load_split(corpus, split, batch_size, device, rows=2):
    """Lay a split of `corpus` out as `utils.batchify` does.

    Raises BadInput when the split is too short, or has words that a model without <unk> does not know.
    """
    if split in corpus.first_unknown:
        raise BadInput(f"{corpus.path}, {split}: the model does not know {corpus.unknown[split]} of its tokens and has "
                       f"no {UNKNOWN} for them: {corpus.first_unknown[split]!r} is the first")
    try:
        return batchify(getattr(corpus, split), batch_size, device, rows)
    except BadInput as error:
        spaces = "; text without spaces between its words needs --level char" if corpus.level == "word" else ""
        parts = "; --shares sets the parts of the text" if split != "train" and os.path.isfile(corpus.path) else ""
        raise BadInput(f"{corpus.path}, {split}: {error}{parts}{spaces}") from error


def folder_level(path):
    """Return the level in the file `level` of the folder `path`, None without one; raises BadInput for another word."""
    try:
        level = (Path(path) / "level").read_text(encoding="utf-8-sig", errors="replace").strip()
    except OSError:
        return None
    if level not in LEVELS:
        raise BadInput(f"{Path(path) / 'level'}: {level!r} is none of the levels {', '.join(LEVELS)}")
    return level


def check_shares(path):
    """Raise BadInput when the text at `path`, for which --shares is given, is a folder."""
    if os.path.isdir(path):
        raise BadInput(f"--shares cuts one text file: the folder {path} has its own splits")


def check_level(path, level, model):
    """Raise BadInput when the folder `path` is made for another level than that of the model at `model`."""
    made_for = folder_level(path)
    if made_for not in (None, level):
        raise BadInput(f"{path} is made for --level {made_for}, and {model} is a model at {level} level; with --level "
                       f"{level} it is read so")
