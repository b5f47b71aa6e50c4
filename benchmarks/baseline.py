"""Define the baseline of the benchmarks: model, cache and corpus in plain PyTorch, as in the original.

It has:

- `nn.LSTM` in fp32, with weight masks by `F.dropout` over whole matrices.
- Embedding dropout on the whole matrix.
- Softmax and loss unfused.
- The forget-mult a step at a time under autograd.
- The cache a token at a time over one-hot vectors.
"""

from collections import namedtuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from splitcross import SplitCrossEntropy, splits_for


def locked(x, p):
    return x * x.new_empty(1, *x.shape[1:]).bernoulli_(1 - p).div_(1 - p) if p else x


class PlainQRNN(nn.Module):
    def __init__(self, input_size, hidden_size, window):
        super().__init__()
        self.hidden_size, self.window = hidden_size, window
        self.linear = nn.Linear(window * input_size, 3 * hidden_size)

    def forward(self, x, hidden):
        source = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], -1) if self.window == 2 else x
        z, f, o = self.linear(source).chunk(3, -1)
        z, f, o, c, cells = z.tanh(), f.sigmoid(), o.sigmoid(), hidden[0], []
        for z_t, f_t in zip(z.split(1), f.split(1)):
            c = f_t * z_t + (1 - f_t) * c
            cells.append(c)
        return o * torch.cat(cells), (c,)


class PlainModel(nn.Module):
    """Hold the model of the flags `args` over V words, tied."""

    def __init__(self, ntoken, args):
        super().__init__()
        self.args, self.encoder, self.decoder = args, nn.Embedding(ntoken, args.emsize), nn.Linear(args.emsize, ntoken)
        self.decoder.weight = self.encoder.weight
        self.splits = SplitCrossEntropy(args.emsize, ntoken, splits_for(ntoken)) if splits_for(ntoken) else None
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        sizes = [args.emsize] + [args.nhid] * (args.nlayers - 1) + [args.emsize]
        self.rnns = nn.ModuleList(nn.LSTM(n, m) if args.model == "LSTM" else PlainQRNN(n, m, 2 if layer == 0 else 1)
                                  for layer, (n, m) in enumerate(zip(sizes, sizes[1:])))

    def init_hidden(self, batch_size):
        zeros = [self.decoder.bias.new_zeros(1, batch_size, rnn.hidden_size) for rnn in self.rnns]
        return [(state, state) if self.args.model == "LSTM" else (state,) for state in zeros]

    def forward(self, words, hidden):
        args, weight = self.args, self.encoder.weight
        dropped = "weight_hh_l0" if args.model == "LSTM" else "linear.weight"
        if self.training and args.dropoute:
            weight = weight * weight.new_empty(len(weight), 1).bernoulli_(1 - args.dropoute).expand_as(weight).div(
                1 - args.dropoute)
        output, new_hidden = functional.embedding(words, weight), []
        output = locked(output, args.dropouti) if self.training else output
        for layer, (rnn, state) in enumerate(zip(self.rnns, hidden), 1):
            masked = functional.dropout(rnn.get_parameter(dropped), args.wdrop, self.training)
            raw, state = functional_call(rnn, {dropped: masked}, (output, state))
            new_hidden.append(state)
            p = args.dropout if layer == len(self.rnns) else args.dropouth
            output = locked(raw, p) if self.training else raw
        return output, new_hidden, raw

    def loss(self, output, targets):
        if self.splits:  # as the original had them
            return self.splits(self.decoder.weight, self.decoder.bias, output, targets)
        logits = functional.linear(output.flatten(0, 1), self.decoder.weight, self.decoder.bias)
        return -functional.log_softmax(logits, 1).gather(1, targets.view(-1, 1)).mean()


def train_step(model, optimizer, words, targets, hidden, args):
    """Take one step of the optimizer on `words`, `targets` (T, B)."""
    output, hidden, raw = model(words, hidden)
    loss = model.loss(output, targets)
    if args.alpha:
        loss = loss + args.alpha * output.pow(2).mean()
    if args.beta:
        loss = loss + args.beta * (raw[1:] - raw[:-1]).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()


def cache_loss(outputs, targets, logprob, words, window, theta, lambdasm):
    """Score the cache over `outputs` (N, H), `targets` (N,), `logprob` (N,), from prediction `window` + 1 on.

    `words` (N, V) are the targets as one-hot vectors.
    """
    total, ntoken = 0.0, words.size(1)
    for t in range(window + 1, len(targets)):
        words[t] = functional.one_hot(targets[t], ntoken)
        attention = torch.softmax(theta * (outputs[t - window:t] @ outputs[t]), 0).unsqueeze(1)
        cached = (attention.expand(window, ntoken) * words[t - window:t]).sum(0)
        total -= torch.log(lambdasm * cached[targets[t]] + (1 - lambdasm) * logprob[t].exp()).item()
    return total


Splits = namedtuple("Splits", "train valid test")


def load_corpus(folder):
    """Read the token ids of a folder of text, each file twice, a token at a time."""
    word2idx, splits = {}, []
    for split in Splits._fields:
        tokens = 0
        with open(folder / f"{split}.txt", encoding="utf-8") as file:
            for line in file:
                for word in [*line.split(), "<eos>"]:
                    word2idx.setdefault(word, len(word2idx))
                    tokens += 1
        ids, token = torch.LongTensor(tokens), 0
        with open(folder / f"{split}.txt", encoding="utf-8") as file:
            for line in file:
                for word in [*line.split(), "<eos>"]:
                    ids[token] = word2idx[word]
                    token += 1
        splits.append(ids)
    return Splits(*splits)
