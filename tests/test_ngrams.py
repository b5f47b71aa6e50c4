"""Count models: Kneser-Ney by hand, against a naive loop, and as probabilities."""

from collections import Counter

import ngrams
import numpy
import pytest

from data import Corpus
from errors import BadInput


def test_a_case_worked_out_by_hand():
    """a b a c a b: bigrams ab 2, ba 1, ac 1, ca 1, so D = 3 / (3 + 2 * 1) = 0.6.

    Different tokens before a: 2 (b, c), before b: 1 (a), before c: 1 (a); of unigrams two were counted once and one
    twice, so D = 2 / (2 + 2 * 1) = 0.5. With V = 4 the unigram of b is (1 - 0.5) / 4 + 0.5 * 3 / 4 / 4 = 0.21875, that
    of d, never seen, 0.09375. After a (3 times, 2 kinds): p(b | a) = (2 - 0.6 + 0.6 * 2 * 0.21875) / 3.
    """
    model = ngrams.KneserNey([0, 1, 0, 2, 0, 1], 4, order=2)
    after_a = numpy.exp([model.logprob([0, token])[0] for token in (1, 3)])
    assert after_a == pytest.approx([(1.4 + 1.2 * 0.21875) / 3, 1.2 * 0.09375 / 3], rel=1e-12)
    assert numpy.exp(model.logprob([3, 1])) == pytest.approx(0.21875)  # after what was never seen: the unigram


def naive(train, context, word, ntoken, order):
    """Interpolated Kneser-Ney by dictionaries and recursion, for one word after `context`."""
    def gram_counts(n):
        grams = [tuple(train[i:i + n]) for i in range(len(train) - n + 1)]
        if n == order:
            return Counter(grams)
        return Counter(gram[1:] for gram in {tuple(train[i:i + n + 1]) for i in range(len(train) - n)})

    def probability(n):
        if n == 0:
            return 1 / ntoken
        counts, before = gram_counts(n), tuple(context[len(context) - n + 1:])
        once, twice = (sum(count == k for count in counts.values()) for k in (1, 2))
        discount = once / (once + 2 * twice) if once else 0.5
        following = {gram: count for gram, count in counts.items() if gram[:-1] == before}
        if len(before) < n - 1 or not following:
            return probability(n - 1)
        own = max(following.get((*before, word), 0) - discount, 0)
        return (own + discount * len(following) * probability(n - 1)) / sum(following.values())

    return probability(order)


def text(length, ntoken, seed):
    generator = numpy.random.default_rng(seed)
    return (generator.zipf(1.5, length) % ntoken).tolist()


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_it_is_that_of_a_naive_loop(order):
    train, ids = text(300, 9, 0), text(40, 9, 1)
    expected = [naive(train, ids[:i], ids[i], 9, order) for i in range(1, len(ids))]
    assert numpy.exp(ngrams.KneserNey(train, 9, order).logprob(ids)) == pytest.approx(expected, rel=1e-9)


def test_the_probabilities_of_all_tokens_after_a_context_sum_to_one():
    model = ngrams.KneserNey(text(500, 12, 2), 12, order=4)
    for context in (text(4, 12, seed) for seed in range(20)):
        assert sum(numpy.exp(model.logprob([*context, token])[-1]) for token in range(12)) == pytest.approx(1)


@pytest.mark.parametrize("train", [[0, 1] * 20, [0, 1, 2, 1, 0, 2] * 9, [3] * 9])
def test_a_text_that_repeats_itself_leaves_something_for_what_it_never_says(train):
    """No gram of some orders is counted once, so that the formula of the discount gives 0."""
    model = ngrams.KneserNey(train, 5, order=3)
    for context in ([0, 1], [1, 2], [3, 3], [4, 4]):
        p = numpy.exp([model.logprob([*context, token])[-1] for token in range(5)])
        assert p.sum() == pytest.approx(1)
        assert p.min() > 0


def test_the_simple_models_are_those_of_their_formulas():
    train, ids = numpy.array([0, 1, 0, 1, 2]), numpy.array([0, 1, 1])
    unigram, bigram = ngrams.simple_logprobs(train, ids, 4)
    p = 3 / 9
    assert numpy.exp(unigram) == pytest.approx([p, p])
    assert numpy.exp(bigram) == pytest.approx([(2 + p) / 3, p / 3])


@pytest.mark.parametrize(("shares", "splits"), [((50, 25, 25), ["valid", "test"]), ((60, 40), ["valid"])])
def test_each_split_that_there_is_has_the_mean_loss_of_each_model(tmp_path, shares, splits):
    (tmp_path / "book.txt").write_text(" ".join(f"w{i}" for i in text(200, 9, 0)))
    corpus = Corpus(tmp_path / "book.txt", shares=shares)
    found, ntoken = list(ngrams.losses(corpus, 3)), len(corpus.dictionary)
    assert [(split, name) for split, name, _ in found] == [
        (split, name) for split in splits for name in ("unigram", "bigram", "KN 3")]
    for split, name, loss in found:
        simple = ngrams.simple_logprobs(corpus.train, getattr(corpus, split), ntoken)
        logprob = {"unigram": simple[0], "bigram": simple[1]}.get(
            name, ngrams.KneserNey(corpus.train, ntoken, 3).logprob(getattr(corpus, split)))
        assert loss == pytest.approx(-logprob.sum() / (len(getattr(corpus, split)) - 1))


def test_a_text_shorter_than_the_order_is_bad_input():
    with pytest.raises(BadInput, match="order 5"):
        ngrams.KneserNey([0, 1, 2], 3, order=5)
