"""Mix a model with a continuous neural cache (a pointer to the recent past), in blocks of matrix products.

Papers:

- Grave, Joulin, Usunier, "Improving Neural Language Models with a Continuous Cache" (arXiv 1612.04426).
- 1708.02182, on pointer models.

Shapes are in the alphabet of `model.py`.
"""

import math

import torch

QUERY_ROWS = 256  # predictions scored at once; QUERY_ROWS x (window + QUERY_ROWS) similarities are in memory


def cache_logprob(similarities, same, first, window, theta):
    """Compute the log-probability (Q,), nats, that the cache alone gives to the target of each of Q predictions.

    Queries are the outputs of the predictions. Keys are the outputs that came before or among them.

    - `similarities` (Q, K) are the products of queries and keys.
    - `same` (Q, K) says where the word that followed the key is the target.
    - `first`: query q is key number `first` + q. It sees the `window` keys before it.

    The probability is a softmax over theta * similarity, summed over the keys where `same`. The result is -inf where no
    key is `same`. It is NaN where there are no keys at all.
    """
    nearest = max(0, first - window)
    queries, keys = len(similarities), similarities.size(1)
    number = torch.arange(nearest, keys, device=similarities.device)
    own = number[first - nearest:first - nearest + queries].unsqueeze(1)
    weight = similarities[:, nearest:] * theta
    weight.masked_fill_((number >= own) | (number < own - window), -math.inf)
    weight.sub_(weight.amax(1, keepdim=True)).exp_()
    return ((weight * same[:, nearest:]).sum(1) / weight.sum(1)).log()


class Cache:
    """Remember the outputs of a text and the words that followed, and mix a model with them.

    All combinations of `windows`, `thetas` and `lambdasms` are computed, the last being shares of the cache in the
    mixture. A cache joins after `window` + 1 predictions. Until then the model stands alone, as for the published
    numbers.
    """

    def __init__(self, windows, thetas, lambdasms):
        self.windows, self.thetas, self.lambdasms = windows, thetas, lambdasms
        self.keys = self.followers = None
        self.seen = 0  # predictions so far

    def mix(self, outputs, targets, logprob):
        """Mix the model's log-probabilities `logprob` (t,), nats, of `targets` (t,) after `outputs` (t, H).

        Returns those of (1 - lambdasm) * model + lambdasm * cache, (windows, thetas, lambdasms, t). Each call goes on
        where the last one ended.
        """
        longest = max(self.windows)
        keys = outputs if self.keys is None else torch.cat([self.keys, outputs])
        followers = targets if self.followers is None else torch.cat([self.followers, targets])
        share = torch.tensor(self.lambdasms, dtype=torch.double, device=logprob.device).unsqueeze(1)
        model_part, cache_part = (-share).log1p().to(logprob.dtype), share.log().to(logprob.dtype)
        past = len(keys) - len(outputs)
        mixed = logprob.new_empty(len(self.windows), len(self.thetas), len(self.lambdasms), len(outputs))
        for start in range(0, len(outputs), QUERY_ROWS):
            block = slice(start, start + QUERY_ROWS)
            alone, first = logprob[block], past + start
            near = slice(max(0, first - longest), first + len(alone))
            similarities = outputs[block] @ keys[near].t()
            same = followers[near] == targets[block].unsqueeze(1)
            behind = torch.arange(self.seen, self.seen + len(alone), device=alone.device)
            for w, window in enumerate(self.windows):
                for t, theta in enumerate(self.thetas):
                    cached = cache_logprob(similarities, same, first - near.start, window, theta)
                    both = torch.logaddexp(alone + model_part, cached + cache_part)
                    mixed[w, t, :, block] = torch.where(behind > window, both, alone)
            self.seen += len(alone)
        self.keys, self.followers = keys[-longest:], followers[-longest:]
        return mixed


def mixture_losses(chunks, windows, thetas, lambdasms):
    """Compute the mean cross entropy of a model with a Cache over `chunks`.

    Each of `chunks` is what `pointer.scored_chunks` yields. The model may change between them. Returns nats per token
    for all combinations, a tensor (windows, thetas, lambdasms).
    """
    cache, total = Cache(windows, thetas, lambdasms), 0.0
    for outputs, targets, logprob in chunks:
        total = total - cache.mix(outputs, targets, logprob).double().sum(-1).cpu()
    return total / cache.seen
