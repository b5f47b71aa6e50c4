"""Score count models, to compare with a neural one: unigrams, bigrams, and Kneser-Ney of some order.

    python benchmarks/ngrams.py --data data/pennchar
    python benchmarks/ngrams.py --data book.txt --min-count 2 --order 5

They are counted on the training text and scored on validation and test. As in the papers, the first token is not
predicted.

- Unigram: p(w) = (n(w) + 1) / (N + V).
- Bigram: p(w | v) = (n(v w) + p(w)) / (n(v) + 1). Each context has one token more, spread as the unigrams are.
- Kneser-Ney: interpolated, one discount an order, of Chen and Goodman, "An Empirical Study of Smoothing Techniques for
  Language Modeling" (1998), section 2.7.
"""

import sys
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
from data import Corpus
from errors import BadInput
from flags import Parser, add_data_flags, add_vocabulary_flags, positive_int
from metrics import format_loss
from process import run_script
from vocabulary import Rules

UNSEEN = -1
FALLBACK = 0.5  # discount of an order without a gram that was counted once; 0 would leave an unseen token no chance


class Grams:
    """Count the n-grams of one order: all grams that occur, in the order of their codes.

    The code of a gram is (index of its first n - 1 tokens) * V + last token. `counts` are numbers of occurrences.
    KneserNey, below its highest order, makes them numbers of different tokens before the gram.
    """

    def __init__(self, contexts, tokens, ntoken):
        """Find the grams of the tokens (t,) that follow the contexts (t,)."""
        self.ntoken = ntoken
        self.codes, self.first, self.index, self.counts = numpy.unique(
            contexts * ntoken + tokens, return_index=True, return_inverse=True, return_counts=True)

    def find(self, contexts, tokens):
        """Return the index of each gram, UNSEEN for one that does not occur or whose context is UNSEEN."""
        codes = contexts * self.ntoken + tokens
        place = numpy.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        return numpy.where((self.codes[place] == codes) & (contexts != UNSEEN), place, UNSEEN)


class KneserNey:
    """Hold an interpolated Kneser-Ney model of `order`, counted on the ids `train` (N,) of a vocabulary of V tokens."""

    def __init__(self, train, ntoken, order=5):
        train = numpy.asarray(train, dtype=numpy.int64)
        if len(train) < order:
            raise BadInput(f"a text of {len(train)} tokens has no n-grams of order {order}")
        self.ntoken, self.levels = ntoken, []
        contexts = numpy.zeros(len(train), dtype=numpy.int64)  # the one context of unigrams
        for n in range(1, order + 1):
            grams = Grams(contexts, train[n - 1:], ntoken)
            self.levels.append(grams)
            contexts = grams.index[:-1]
        for grams, longer in zip(self.levels, self.levels[1:]):
            suffix = grams.index[longer.first + 1]  # longer grams begin a token later, and so end a place further on
            grams.counts = numpy.bincount(suffix, minlength=len(grams.codes))
        for grams in self.levels:
            once, twice = (grams.counts == 1).sum(), (grams.counts == 2).sum()
            grams.discount = once / (once + 2 * twice) if once else FALLBACK
            context, kept = grams.codes // ntoken, grams.counts > 0
            grams.totals = numpy.bincount(context, grams.counts)
            grams.kinds = numpy.bincount(context[kept], minlength=len(grams.totals))

    def logprob(self, ids):
        """Compute the log-probabilities (N - 1,), in nats, of the tokens of `ids` (N,) after the first."""
        ids = numpy.asarray(ids, dtype=numpy.int64)
        probability = numpy.full(len(ids), 1 / self.ntoken)
        contexts = numpy.zeros(len(ids), dtype=numpy.int64)
        for grams in self.levels:
            place = grams.find(contexts, ids)
            known = (contexts >= 0) & (contexts < len(grams.totals))
            known[known] = grams.totals[contexts[known]] > 0
            count = numpy.where(place == UNSEEN, 0, grams.counts[place])[known]
            total, kinds = grams.totals[contexts[known]], grams.kinds[contexts[known]]
            probability[known] = (numpy.maximum(count - grams.discount, 0) + grams.discount * kinds
                                  * probability[known]) / total
            contexts = numpy.concatenate([[UNSEEN], place[:-1]])  # nothing stands before the first token
        return numpy.log(probability[1:])


def simple_logprobs(train, ids, ntoken):
    """Compute the log-probabilities (N - 1,) of `ids` (N,) after the first, under unigrams and under bigrams."""
    train, ids = (numpy.asarray(part, dtype=numpy.int64) for part in (train, ids))
    unigram = (numpy.bincount(train, minlength=ntoken) + 1) / (len(train) + ntoken)
    pairs = Grams(train[:-1], train[1:], ntoken)
    place = pairs.find(ids[:-1], ids[1:])
    count = numpy.where(place == UNSEEN, 0, pairs.counts[place])
    before = numpy.bincount(train[:-1], minlength=ntoken)[ids[:-1]]
    return numpy.log(unigram[ids[1:]]), numpy.log((count + unigram[ids[1:]]) / (before + 1))


def losses(corpus, order):
    """Yield (split, name of the model, loss in nats per token)."""
    ntoken = len(corpus.dictionary)
    model = KneserNey(corpus.train, ntoken, order)
    for split in ("valid", "test") if corpus.has_test else ("valid",):
        ids = getattr(corpus, split)
        unigram, bigram = simple_logprobs(corpus.train, ids, ntoken)
        for name, logprob in (("unigram", unigram), ("bigram", bigram), (f"KN {order}", model.logprob(ids))):
            yield split, name, -logprob.mean()


def main():
    parser = Parser(description="Score count models on a corpus.")
    add_data_flags(parser)
    add_vocabulary_flags(parser)
    parser.add_argument("--order", type=positive_int, default=5, metavar="N", help="of Kneser-Ney (default: 5)")
    args = parser.parse_args()
    rules = Rules(args.min_count, args.max_vocab, args.vocab_order)
    corpus = Corpus(args.data, args.level, args.shares, rules=rules)
    print(corpus.describe())
    for split, name, loss in losses(corpus, args.order):
        print(f"{name:8} | {format_loss(f'{split:5}', loss)}")


if __name__ == "__main__":
    run_script(main)
