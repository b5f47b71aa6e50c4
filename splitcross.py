"""Compute the softmax of the language model: one softmax, or a split one for large vocabularies.

A split softmax begins with a short head. The head has the words with the smallest ids, and one tombstone for each tail.
Ids follow first appearance, so small ids are mostly frequent words; `--vocab-order frequency` makes sure of it.

A word in a tail has the probability of the tail's tombstone times its probability within the tail. Only tails that hold
a target of the batch are computed. All splits use rows of the same weight matrix, tied to the embedding or not. The
tombstones are the only parameters that are added.

Papers:

- Merity, Keskar, Socher, "An Analysis of Neural Language Modeling at Multiple Scales" (arXiv 1803.08240), section 3.1.
- Grave, Joulin, Cisse, Grangier, Jegou, "Efficient softmax approximation for GPUs" (arXiv 1609.04309).

Shapes are in the alphabet of `model.py`.
"""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from padding import gpu_dtype, pad, padded_size, unpad
from products import PackedLinear, for_products

MIN_LOGITS = 2**20  # N x V from which on a loss in blocks pays; fewer logits stay in the cache anyway
MAX_LOGITS = 2**22  # of a block without gradient on a CPU: 16 MiB in fp32


def splits_for(ntoken):
    """Return the ids at which the papers' recipes split a vocabulary of `ntoken` words.

    The list is empty up to 75,000 words.
    """
    if ntoken > 500_000:
        return [4200, 35_000, 180_000]
    if ntoken > 75_000:
        return [2800, 20_000, 76_000]
    return []


class SoftmaxLoss(torch.autograd.Function):
    """Compute the mean cross entropy of a linear softmax, in nats, and its gradient.

    Takes `hidden` (N, E or H), `weight` (V, E or H), `bias` (V) and `targets` (N,). Products have the dtype that
    autocast says. The loss has that of `bias`.

    It works on a block of rows at a time, so no N x V matrix is written to memory and read again. In bfloat16 there is
    no fp32 matrix of ROWS x V either. On a CPU it takes about two thirds of the time of `cross_entropy`.
    """

    ROWS = 480  # of a block; its logits in bfloat16 are small enough for `device.keep_memory` up to V = 34,000
    PART = 64  # rows of a block on which elementwise operations work at a time

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        rows, w, b = for_products(hidden, weight, bias)
        grad_hidden, grad_weight, grad_bias = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros_like(bias)
        loss = bias.new_zeros(())
        for block, block_targets, grad_block in zip(*(t.split(SoftmaxLoss.ROWS) for t in (rows, targets, grad_hidden))):
            grad = torch.addmm(b, block, w.t())  # logits at first
            for part, target in zip(*(t.split(SoftmaxLoss.PART) for t in (grad, block_targets.unsqueeze(1)))):
                logits = part.to(bias.dtype)
                probability = logits.softmax(1)
                # -log p(target) by way of the likeliest word, whose p is at least 1/V. p(target) may be 0 in fp32
                distance = logits.amax(1, keepdim=True) - logits.gather(1, target)
                loss += (distance - probability.amax(1, keepdim=True).log()).sum()
                part.copy_(probability.scatter_add_(1, target, -distance.new_ones(distance.shape)))
                grad_bias += probability.sum(0)
            torch.mm(grad, w, out=grad_block)
            if grad.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad.t(), block)
            else:
                grad_weight += grad.t() @ block
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight, grad_bias)
        return loss / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        scale = grad_loss / len(ctx.saved_tensors[0])
        return *(grad * scale for grad in ctx.saved_tensors), None


class GPUSoftmaxLoss(SoftmaxLoss):
    """Compute what `SoftmaxLoss` does, in the few and large operations that suit a GPU.

    Blocks are large, since each one reads the whole weight. Sizes are padded (`padding.py`). A word of the pads has the
    bias -inf, so its probability and its gradient are 0.
    """

    LOGITS = 2**26  # of a block: 256 MiB in fp32

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        dtype, (ntoken, size) = gpu_dtype(hidden), map(padded_size, weight.shape)
        with torch.autocast(hidden.device.type, enabled=False):
            rows, w = pad(hidden.to(dtype), size), padded_matrix(weight, ntoken, size, dtype)
            b = functional.pad(bias, (0, ntoken - len(bias)), value=-math.inf).to(dtype)
            grad_rows, grad_weight, grad_bias = torch.empty_like(rows), None, None
            losses, minus_one = bias.new_empty(len(rows)), bias.new_full((len(rows), 1), -1.0)
            count = max(1, GPUSoftmaxLoss.LOGITS // ntoken)
            for block, target, loss, grad_block in zip(*(t.split(count) for t in (
                    rows, targets.unsqueeze(1), losses, grad_rows))):
                logprob = torch.addmm(b, block, w.t()).to(bias.dtype).log_softmax(1)
                loss.copy_(logprob.gather(1, target).squeeze(1))
                grad = logprob.exp_().scatter_add_(1, target, minus_one[:len(block)])  # p - 1 at the targets, else p
                of_bias, grad = grad.sum(0), grad.to(dtype)
                torch.mm(grad, w, out=grad_block)
                of_weight = (grad.t() @ block).to(weight.dtype)
                grad_weight = of_weight if grad_weight is None else grad_weight.add_(of_weight)
                grad_bias = of_bias if grad_bias is None else grad_bias.add_(of_bias)
        ctx.save_for_backward(unpad(grad_rows, hidden.size(1)).to(hidden.dtype),
                              grad_weight[:len(weight), :weight.size(1)], grad_bias[:len(weight)])
        return -losses.mean()


def linear_logprob(weight, bias, hidden, targets):
    """Compute the log-probability (N,), in nats, of `targets` (N,) after `hidden` (N, E or H), by one softmax.

    Without gradient, a CPU takes a block of rows at a time. This needs less memory, and in a long chunk less time.
    """
    blocks = 1 if hidden.is_cuda or torch.is_grad_enabled() else 1 + len(hidden) * len(weight) // MAX_LOGITS
    losses = [functional.cross_entropy(functional.linear(rows, weight, bias), row_targets, reduction="none")
              for rows, row_targets in zip(hidden.chunk(blocks), targets.chunk(blocks))]
    return -torch.cat(losses)


def padded_matrix(matrix, rows, columns, dtype):
    """Return `matrix` in `dtype`, with zeros up to (rows, columns)."""
    if matrix.shape == (rows, columns):
        return matrix.to(dtype)
    result = matrix.new_zeros(rows, columns, dtype=dtype)
    result[:len(matrix), :matrix.size(1)] = matrix
    return result


class SplitCrossEntropy(nn.Module):
    """Compute loss and log-probabilities over V = `ntoken` words from vectors of `hidden_size` (E or H).

    `splits` are the rising ids at which the tails begin. A split at or past the last word makes no tail. The tombstone
    of tail i, counted from 1, is the i-th column from the right of the head. Tombstones have vectors and biases of
    their own, `tail_vectors` (tails, E or H) and `tail_bias` (tails,), which begin at 0.
    """

    packed = None

    def __init__(self, hidden_size, ntoken, splits=()):
        super().__init__()
        bounds = [0, *(split for split in splits if split < ntoken), ntoken]
        self.sizes = [end - start for start, end in zip(bounds, bounds[1:])]
        if len(self.sizes) > 1:
            self.tail_vectors = nn.Parameter(torch.zeros(len(self.sizes) - 1, hidden_size))
            self.tail_bias = nn.Parameter(torch.zeros(len(self.sizes) - 1))

    def pack(self, weight, bias):
        """Pack copies of `weight` and `bias` as they are now, for `logprob` without gradient (`PackedLinear`)."""
        self.packed = PackedLinear(weight, bias)

    def forward(self, weight, bias, hidden, targets):
        """Compute the mean cross entropy, nats per token, of `hidden` (..., E or H) against `targets` (...).

        `weight` (V, E or H) and `bias` (V) are those of the softmax, here and in the other methods.
        """
        if len(self.sizes) == 1:
            hidden, targets = hidden.flatten(0, -2), targets.flatten()
            if hidden.requires_grad and len(hidden) * len(weight) >= MIN_LOGITS:
                softmax_loss = GPUSoftmaxLoss if hidden.is_cuda else SoftmaxLoss
                return softmax_loss.apply(hidden, weight, bias, targets)
            if torch.is_grad_enabled():
                return functional.cross_entropy(functional.linear(hidden, weight, bias), targets)
        return -self.target_logprob(weight, bias, hidden, targets).mean()

    def target_logprob(self, weight, bias, hidden, targets):
        """Compute the log-probability (...), in nats, of each of `targets` (...) after `hidden` (..., E or H).

        With splits the head takes memory for all targets, each tail only for its own, less than all V words would take.
        """
        shape, hidden, targets = targets.shape, hidden.flatten(0, -2), targets.flatten()
        if len(self.sizes) == 1:
            return linear_logprob(weight, bias, hidden, targets).view(shape)
        (head, *tails), head_logits = self._head(weight, bias, hidden)
        columns, start, tail_logprobs = targets.clone(), self.sizes[0], []
        for tail, (tail_weight, tail_bias) in enumerate(tails, 1):
            inside = (targets >= start) & (targets < start + len(tail_weight))
            columns[inside] = head_logits.size(1) - tail
            rows = inside.nonzero().squeeze(1)
            if len(rows):
                logits = functional.linear(hidden[rows], tail_weight, tail_bias)
                within = -functional.cross_entropy(logits, targets[rows] - start, reduction="none")
                tail_logprobs.append((rows, within))
            start += len(tail_weight)
        logprob = -functional.cross_entropy(head_logits, columns, reduction="none")
        for rows, within in tail_logprobs:
            logprob = logprob.index_add(0, rows, within)
        return logprob.view(shape)

    def logprob(self, weight, bias, hidden):
        """Compute the log-probabilities (..., V), in nats, of every word after `hidden` (..., E or H)."""
        packed = self.packed and not torch.is_grad_enabled()
        logits = self.packed(hidden) if packed else functional.linear(hidden, weight, bias)
        if len(self.sizes) == 1:
            return logits.log_softmax(-1)
        frequent, *tails = logits.split(self.sizes, -1)
        tombstones = functional.linear(hidden, self.tail_vectors, self.tail_bias)
        head = torch.cat([frequent, tombstones], -1).log_softmax(-1)
        within = [head[..., -tail, None] + part.log_softmax(-1) for tail, part in enumerate(tails, 1)]
        return torch.cat([head[..., :self.sizes[0]], *within], -1)

    def _head(self, weight, bias, hidden):
        """Return (weight, bias) of each split, and the logits (..., head words + tails) of the head."""
        # One split of the whole matrix: its gradient is one matrix. Each slice would make a whole one.
        (head_weight, head_bias), *tails = splits = list(zip(weight.split(self.sizes), bias.split(self.sizes)))
        if tails:
            head_weight, head_bias = torch.cat([head_weight, self.tail_vectors]), torch.cat([head_bias, self.tail_bias])
        return splits, functional.linear(hidden, head_weight, head_bias)
