"""The language model: embedding, recurrent layers with their dropouts, softmax.

Papers: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182), and "An Analysis
of Neural Language Modeling at Multiple Scales" (arXiv 1803.08240).

The shape alphabet of the whole project:

    T  time steps          E  embedding size (--emsize)      V  vocabulary, words
    B  batch columns       H  hidden units (--nhid)          L  layers (--nlayers)

Token ids travel as (T, B), activations as (T, B, H): time first.
"""

from torch import nn

from embed_regularize import embedded_dropout
from locked_dropout import locked_dropout
from qrnn import QRNN
from rnn import GRU, LSTM
from splitcross import SplitCrossEntropy, splits_for
from utils import map_hidden
from weight_drop import weight_drop

# The layer types, each with the name of the weight that weight drop acts on.
LAYERS = {"LSTM": "weight_hh_l0", "GRU": "weight_hh_l0", "QRNN": "linear.weight"}

# The flags that fix the shapes of the parameters, and those that may change from one run on a model to the next.
ARCHITECTURE = ("model", "emsize", "nhid", "nlayers", "tied")
DROPOUTS = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")


def make_layer(model, input_size, hidden_size, first):
    """Make a recurrent layer of the type `model`; the first layer of a QRNN looks at two tokens at a time."""
    if model == "QRNN":
        return QRNN(input_size, hidden_size, window=2 if first else 1)
    return {"LSTM": LSTM, "GRU": GRU}[model](input_size, hidden_size)


class RNNModel(nn.Module):
    """A recurrent language model over V = `ntoken` words; the other arguments are flags of the command line, by name.

    Layers have the sizes E -> H -> ... -> H. When the softmax shares its weight with the embedding (`tied`), the last
    one ends in E instead. `splits` are the ids at which the softmax is split (default: `splits_for`).

    The parameters are `encoder.weight` (V, E), `rnns.{l}.*` as the layers name them, `decoder.weight` (V, E or H),
    `decoder.bias` (V), and what a split softmax adds.
    """

    def __init__(self, ntoken, model="LSTM", emsize=400, nhid=1150, nlayers=3, tied=True,
                 dropout=0.4, dropouth=0.3, dropouti=0.65, dropoute=0.1, wdrop=0.5, splits=None):
        super().__init__()
        self.dropout, self.dropouth, self.dropouti = dropout, dropouth, dropouti
        self.dropoute, self.wdrop = dropoute, wdrop
        self.dropped_weight = LAYERS[model]
        sizes = [emsize] + [nhid] * (nlayers - 1) + [emsize if tied else nhid]
        self.encoder = nn.Embedding(ntoken, emsize)
        self.rnns = nn.ModuleList(make_layer(model, n, m, first=layer == 0)
                                  for layer, (n, m) in enumerate(zip(sizes, sizes[1:])))
        self.decoder = nn.Linear(sizes[-1], ntoken)
        if tied:
            self.decoder.weight = self.encoder.weight
        self.softmax = SplitCrossEntropy(sizes[-1], ntoken, splits_for(ntoken) if splits is None else splits)
        self.init_weights()

    def init_weights(self):
        """Draw embedding and softmax weights from U(-0.1, 0.1), set the softmax bias to 0, leave the layers alone."""
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def init_hidden(self, batch_size):
        """Return the zero hidden state for B columns, a list with one entry a layer.

        An entry is (h, c), each (1, B, H), for an LSTM, h for a GRU, and for a QRNN what `QRNN.init_hidden` returns.
        """
        def zeros(rnn):
            if isinstance(rnn, QRNN):
                return rnn.init_hidden(batch_size)
            h = self.decoder.bias.new_zeros(1, batch_size, rnn.hidden_size)
            return (h, h) if isinstance(rnn, LSTM) else h
        return [zeros(rnn) for rnn in self.rnns]

    def make_capturable(self):
        """Make every later pass leave the parameters where they lie in memory, as a CUDA graph needs (`cudnn_pass`)."""
        for rnn in self.rnns:
            rnn.capturable = True  # a QRNN is anyway

    def pack(self):
        """Pack copies of the weights, so that a trained model samples text faster on a CPU.

        Single steps and `logprob`, both without gradient, then multiply in bfloat16 by the weights as they are now
        (`products.PackedLinear`). Nothing unpacks them.
        """
        for rnn in self.rnns:
            rnn.pack()
        self.softmax.pack(self.decoder.weight, self.decoder.bias)

    def forward(self, tokens, hidden):
        """Run `tokens` (T, B) from `hidden`; returns the output, the new hidden state, the raw output.

        Both outputs (T, B, E or H) are the last layer's, the first with dropout, the raw one without. Masks are drawn
        in this order: embedding rows, input, then for each layer its weight and its output. The output's rate is
        `dropouth`, after the last layer `dropout`.
        """
        return self.recur(self.embed(tokens), hidden)

    def embed(self, tokens):
        """Compute the first half of `forward`: the input (T, B, E) of the first layer."""
        embedded = embedded_dropout(self.encoder.weight, tokens, self.dropoute, self.training)
        return locked_dropout(embedded, self.dropouti, self.training)

    def recur(self, embedded, hidden):
        """Compute the second half: run the layers from `embedded` (T, B, E); returns what `forward` does."""
        output, new_hidden = embedded, []
        for layer, (rnn, state) in enumerate(zip(self.rnns, hidden), 1):
            raw, state = weight_drop(rnn, self.dropped_weight, self.wdrop, output, state)
            raw = raw.to(embedded.dtype)  # cuDNN's are in bfloat16 under autocast
            new_hidden.append(map_hidden(lambda part: part.to(embedded.dtype), state))
            output = locked_dropout(raw, self.dropout if layer == len(self.rnns) else self.dropouth, self.training)
        return output, new_hidden, raw

    def loss(self, output, targets):
        """Compute the mean cross entropy, nats per token, of `output` (T, B, E or H) against `targets` (T, B)."""
        return self.softmax(self.decoder.weight, self.decoder.bias, output, targets)

    def target_logprob(self, output, targets):
        """Compute the log-probabilities (T, B), in nats, of `targets` (T, B) after `output` (T, B, E or H)."""
        return self.softmax.target_logprob(self.decoder.weight, self.decoder.bias, output, targets)

    def logprob(self, output):
        """Compute the log-probabilities (..., V), in nats, of each word after `output` (..., E or H)."""
        return self.softmax.logprob(self.decoder.weight, self.decoder.bias, output)

    def parameter_count(self):
        """Return the number of trainable values, a shared weight counted once."""
        return sum(p.numel() for p in self.parameters())
