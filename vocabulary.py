"""Choose a vocabulary, map a text through one, and carry a model from one to another.

Shapes are in the alphabet of `model.py`.
"""

from dataclasses import dataclass

import numpy
import torch

from errors import BadInput

UNKNOWN, END = "<unk>", "<eos>"
BEGINS = (END, "xxbos")  # what comes before a text: the first of these in the vocabulary; xxbos is fastai's
ALWAYS = (UNKNOWN, END)  # in every vocabulary that is chosen


class Dictionary:
    """Hold a vocabulary: `word2idx` maps a token to its id, `idx2word` an id to its token."""

    def __init__(self, words=()):
        self.idx2word = list(words)
        self.word2idx = {word: index for index, word in enumerate(self.idx2word)}

    def __len__(self):
        return len(self.idx2word)

    def start_id(self):
        """Return the id of what comes before a text, or 0 if the vocabulary has no such word."""
        return next((self.word2idx[word] for word in BEGINS if word in self.word2idx), 0)

    def encode(self, tokens, where):
        """Return the ids of `tokens`, and for each whether it is unknown and so becomes <unk>.

        Raises BadInput, which begins with `where`, for an unknown token when there is no <unk>.
        """
        unknown = [token not in self.word2idx for token in tokens]
        if any(unknown) and UNKNOWN not in self.word2idx:
            raise BadInput(f"{where}: the model's vocabulary of {len(self)} does not include "
                           f"{tokens[unknown.index(True)]!r}, the first of {sum(unknown)} unknown tokens, and has no "
                           f"{UNKNOWN} for them")
        unknown_id = self.word2idx.get(UNKNOWN)
        return [self.word2idx.get(token, unknown_id) for token in tokens], unknown


@dataclass(frozen=True)
class Rules:
    """Say which tokens of the training text make the vocabulary, and in which order they are numbered.

    Without `min_count` and `max_vocab` it is all tokens of the three splits.
    """

    min_count: int | None = None   # the least times that train has a token
    max_vocab: int | None = None   # the most tokens, <unk> and <eos> among them: the most frequent ones
    order: str = "appearance"      # or "frequency", in train

    def restricts(self):
        return self.min_count is not None or self.max_vocab is not None

    def chooses(self):
        return self.restricts() or self.order != "appearance"

    def check(self, level):
        """Raise BadInput when these rules choose at a `level` whose vocabulary is fixed."""
        if level == "byte" and self.chooses():
            raise BadInput("--min-count, --max-vocab and --vocab-order are for words and characters")


def choose_vocabulary(tokens, counts, rules):
    """Choose a vocabulary among `tokens`, numbered by appearance, of which the training text has `counts`.

    Equally frequent tokens stay in the order of their appearance.
    """
    counts = [int(count) for count in counts]
    kept = list(range(len(tokens)))
    if rules.restricts():
        always = [i for i in kept if tokens[i] in ALWAYS]
        frequent = [i for i in kept if tokens[i] not in ALWAYS and counts[i] >= (rules.min_count or 1)]
        frequent.sort(key=lambda i: -counts[i])
        if rules.max_vocab:
            frequent = frequent[:rules.max_vocab - len({UNKNOWN, *(tokens[i] for i in always)})]
        kept = sorted(always + frequent)
    frequency = {tokens[i]: counts[i] for i in kept}
    if rules.restricts():
        frequency[UNKNOWN] = frequency.get(UNKNOWN, 0) + sum(counts) - sum(frequency.values())
    if rules.order == "frequency":
        return sorted(frequency, key=lambda token: -frequency[token])  # stable: else by appearance
    return list(frequency)


def is_text(tokens):
    """Return whether `tokens` are strings that UTF-8 can encode, not all of them empty."""
    try:
        return len("".join(tokens).encode()) > 0
    except (TypeError, UnicodeEncodeError):
        return False


def id_table(tokens, words):
    """Make the table (V,) of the ids that `tokens` have in the vocabulary `words`; what is not in it is <unk>.

    Where `words` has no <unk> such an id is -1.
    """
    known = Dictionary(words).word2idx
    table = numpy.array([known.get(token, known.get(UNKNOWN, -1)) for token in tokens])
    return table.astype("int32" if len(words) > 2**15 else "int16")


def carry_rows(weights, words, new_words):
    """Carry the weights of a model from the vocabulary `words` to `new_words`.

    Rows of embedding, softmax and its bias follow their words. A new word begins with the mean row, as in fastai's code
    of ULMFiT (Howard and Ruder, arXiv 1801.06146). Returns a state dict.
    """
    known = Dictionary(words).word2idx
    sources = torch.tensor([known.get(word, len(words)) for word in new_words])
    carried = dict(weights)
    for name in ("encoder.weight", "decoder.weight", "decoder.bias"):
        rows = weights[name]
        carried[name] = torch.cat([rows, rows.mean(0, keepdim=True)])[sources.to(rows.device)]
    return carried
