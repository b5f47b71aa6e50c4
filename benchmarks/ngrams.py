"""Bits per token of two count models, to stand beside a neural one: unigrams, and bigrams that back off to them.

    python benchmarks/ngrams.py data/pennchar

Counted on train.txt, scored on valid.txt and test.txt. p(w) = (n(w) + 1) / (N + V) and p(w | v) = (n(v w) + p(w)) /
(n(v) + 1): each context counts one token more, spread as the unigrams are, so that no bigram has probability 0.
"""

import sys
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Corpus  # noqa: E402  the scripts of the project are no package


def bits(path):
    """{split: (bits per token under unigrams, under bigrams)}; as in the papers the first token is not predicted."""
    corpus = Corpus(path)
    words = len(corpus.dictionary)
    train = corpus.train.numpy().astype(numpy.int64)
    unigram = (numpy.bincount(train, minlength=words) + 1) / (len(train) + words)
    pairs = numpy.bincount(train[:-1] * words + train[1:], minlength=words**2).reshape(words, words)
    bigram = (pairs + unigram) / (pairs.sum(1, keepdims=True) + 1)
    scores = {}
    for split in ("valid", "test"):
        ids = getattr(corpus, split).numpy().astype(numpy.int64)
        scores[split] = (-numpy.log2(unigram[ids[1:]]).mean(), -numpy.log2(bigram[ids[:-1], ids[1:]]).mean())
    return scores


if __name__ == "__main__":
    for split, (unigram, bigram) in bits(sys.argv[1]).items():
        print(f"{split:5}  unigram {unigram:.3f}  bigram {bigram:.3f}  bits per token")
