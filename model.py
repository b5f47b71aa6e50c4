"""Define the language model: embedding, recurrent layers with their dropouts, softmax.

Papers by Merity, Keskar, Socher:

- "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182).
- "An Analysis of Neural Language Modeling at Multiple Scales" (arXiv 1803.08240).

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

# The layer types, each with the weight that weight drop acts on.
LAYERS = {"LSTM": "weight_hh_l0", "GRU": "weight_hh_l0", "QRNN": "linear.weight"}

# Flags that fix the shapes of the parameters, and flags that may change from run to run.
ARCHITECTURE = ("model", "emsize", "nhid", "nlayers", "tied")
DROPOUTS = ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")


def make_layer(model, input_size, hidden_size, first):
    """Make a recurrent layer of the type `model`.

    The first layer of a QRNN looks at two tokens at a time.
    """
    if model == "QRNN":
        return QRNN(input_size, hidden_size, window=2 if first else 1)
    return {"LSTM": LSTM, "GRU": GRU}[model](input_size, hidden_size)


def layer_sizes(emsize, nhid, nlayers, tied):
    """Return the L + 1 sizes between the layers: E, H, ..., H, and at the end E when tied, else H."""
    return [emsize] + [nhid] * (nlayers - 1) + [emsize if tied else nhid]


def parameter_shapes(ntoken, model, emsize, nhid, nlayers, tied):
    """Return the shapes of the state dict of an RNNModel with these flags, by name, without building it."""
    sizes = layer_sizes(emsize, nhid, nlayers, tied)
    shapes = {"encoder.weight": (ntoken, emsize)}
    for layer, (size, hidden) in enumerate(zip(sizes, sizes[1:])):
        if model == "QRNN":
            rows, inputs = 3 * hidden, size * (2 if layer == 0 else 1)
            parts = {"linear.weight": (rows, inputs), "linear.bias": (rows,)}
        else:
            rows = {"LSTM": 4, "GRU": 3}[model] * hidden
            parts = {"weight_ih_l0": (rows, size), "weight_hh_l0": (rows, hidden), "bias_ih_l0": (rows,),
                     "bias_hh_l0": (rows,)}
        shapes |= {f"rnns.{layer}.{name}": shape for name, shape in parts.items()}
    shapes |= {"decoder.weight": (ntoken, sizes[-1]), "decoder.bias": (ntoken,)}
    if tails := len([split for split in splits_for(ntoken) if split < ntoken]):
        shapes |= {"softmax.tail_vectors": (tails, sizes[-1]), "softmax.tail_bias": (tails,)}
    return shapes


class RNNModel(nn.Module):
    """Model a language of V = `ntoken` words with recurrent layers.

    The other arguments are flags of the command line, by name. `splits` are the ids at which the softmax is split
    (default: `splits_for`).

    Layers have the sizes E -> H -> ... -> H. With `tied`, the softmax shares its weight with the embedding. The last
    layer then ends in E.

    The parameters are:

    - `encoder.weight` (V, E).
    - `rnns.{l}.*`, as the layers name them.
    - `decoder.weight` (V, E or H) and `decoder.bias` (V).
    - Those that a split softmax adds.
    """

    def __init__(self, ntoken, model="LSTM", emsize=400, nhid=1150, nlayers=3, tied=True,
                 dropout=0.4, dropouth=0.3, dropouti=0.65, dropoute=0.1, wdrop=0.5, splits=None):
        super().__init__()
        self.dropout, self.dropouth, self.dropouti = dropout, dropouth, dropouti
        self.dropoute, self.wdrop = dropoute, wdrop
        self.dropped_weight = LAYERS[model]
        sizes = layer_sizes(emsize, nhid, nlayers, tied)
        self.encoder = nn.Embedding(ntoken, emsize)
        self.rnns = nn.ModuleList(make_layer(model, n, m, first=layer == 0)
                                  for layer, (n, m) in enumerate(zip(sizes, sizes[1:])))
        self.decoder = nn.Linear(sizes[-1], ntoken)
        if tied:
            self.decoder.weight = self.encoder.weight
        self.softmax = SplitCrossEntropy(sizes[-1], ntoken, splits_for(ntoken) if splits is None else splits)
        self.init_weights()

    def init_weights(self):
        """Draw embedding and softmax weights from U(-0.1, 0.1), and set the softmax bias to 0.

        The recurrent layers keep their own initial values.
        """
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def init_hidden(self, batch_size):
        """Return the zero hidden state for B columns, a list with one entry a layer.

        - LSTM: (h, c), each (1, B, H).
        - GRU: h (1, B, H).
        - QRNN: what `QRNN.init_hidden` returns.
        """
        def zeros(rnn):
            if isinstance(rnn, QRNN):
                return rnn.init_hidden(batch_size)
            h = self.decoder.bias.new_zeros(1, batch_size, rnn.hidden_size)
            return (h, h) if isinstance(rnn, LSTM) else h
        return [zeros(rnn) for rnn in self.rnns]

    def pack(self):
        """Pack copies of the weights, so that a trained model samples text faster on a CPU.

        Single steps and `logprob`, without gradient, then multiply in bfloat16 (`products.PackedLinear`). The copies
        are of the weights as they are now. Nothing unpacks them.
        """
        for rnn in self.rnns:
            rnn.pack()
        self.softmax.pack(self.decoder.weight, self.decoder.bias)

    def forward(self, tokens, hidden):
        """Run `tokens` (T, B) from `hidden`.

        Returns the output, the new hidden state, and the raw output. Both outputs (T, B, E or H) are those of the last
        layer: the first with dropout, the raw one without.

        Masks are drawn in this order: embedding rows, input, then each layer's weight and output. The rate of a layer's
        output is `dropouth`. After the last layer it is `dropout`.
        """
        return self.recur(self.embed(tokens), hidden)

    def embed(self, tokens):
        """Compute the first half of `forward`: the input (T, B, E) of the first layer."""
        embedded = embedded_dropout(self.encoder.weight, tokens, self.dropoute, self.training)
        return locked_dropout(embedded, self.dropouti, self.training)

    def recur(self, embedded, hidden):
        """Compute the second half of `forward`: run the layers from `embedded` (T, B, E).

        Returns what `forward` does.
        """
        output, new_hidden = embedded, []
        for layer, (rnn, state) in enumerate(zip(self.rnns, hidden), 1):
            raw, state = weight_drop(rnn, self.dropped_weight, self.wdrop, output, state)
            raw = raw.to(embedded.dtype)  # cuDNN's are in bfloat16 under autocast
            new_hidden.append(map_hidden(lambda part: part.to(embedded.dtype), state))
            output = locked_dropout(raw, self.dropout if layer == len(self.rnns) else self.dropouth, self.training)
        return output, new_hidden, raw

    def loss(self, output, targets):
        """Compute the mean cross entropy of `output` (T, B, E or H) against `targets` (T, B).

        The unit is nats per token.
        """
        return self.softmax(self.decoder.weight, self.decoder.bias, output, targets)

    def target_logprob(self, output, targets):
        """Compute the log-probabilities (T, B), in nats, of `targets` (T, B).

        `output` (T, B, E or H) is that of `forward`.
        """
        return self.softmax.target_logprob(self.decoder.weight, self.decoder.bias, output, targets)

    def logprob(self, output):
        """Compute the log-probabilities (..., V), in nats, of each word.

        `output` (..., E or H) is that of `forward`, or a part of it.
        """
        return self.softmax.logprob(self.decoder.weight, self.decoder.bias, output)

    def parameter_count(self):
        """Return the number of trainable values, a shared weight counted once."""
        return sum(p.numel() for p in self.parameters())
