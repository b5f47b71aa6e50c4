"""The LSTM and GRU layers: PyTorch's, with passes of their own where those are slow or in the way.

LSTM training on the CPU, for large layers in fp32 and for all in bfloat16. The input's product and the gradients of
weights are one matrix product each for all steps of a block; the hidden-to-hidden weight, by which the loop multiplies
at each step, is packed once a pass (`products.Packed`). For 1150 inputs and units, 70 x 20 words, forward and backward,
on 2 cores of an Intel Xeon with AMX: 366 ms for the 403 of PyTorch's pass in fp32, 136 for its 313 in bfloat16. In fp32
it gains less on wider batches (1150 units, 80 columns: 3 to 7%; 1840 units, 128 columns: 5 to 9%), nothing at 1024
units, and at 800 it takes 185 ms for 178.

Passes for cuDNN in bfloat16, where autocast hands it float16, and for CUDA graphs, which need the parameters to stay
where they lie in memory: `cudnn_pass`.

Shapes are in the alphabet of `model.py`.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from products import Packed, PackedLinear, for_products, packs_fp32, trains_in_bfloat16, transposed
from utils import blocks, map_hidden

LARGE = 1100  # hidden units from which on the pass below pays in fp32


class TrainingPass(torch.autograd.Function):
    """An LSTM layer over x (T, B, E) with the weights (4H, E) and (4H, H), in PyTorch's order i, f, g, o, and the bias
    (4H) from the state h, c (B, H): the outputs (T, B, H) and the last c (B, H).

    Products and their factors, the gradients of the gates among them, are in the type that autocast says, gates, cell
    and the gradients that are carried through time in that of `c`.

    Products that need not wait for the step before are of WORDS words or a little more at a time: as fast as of the
    whole sequence, and in bfloat16 with results small enough for `utils.keep_memory` to keep. A step of PTB characters
    in bfloat16, 19,200 of them, takes 81% of the time that it takes in one block (2 cores of an AMD EPYC).
    """

    WORDS = 2048

    @staticmethod
    def blocks(steps, batch_size):
        """The slices of so many time steps, each of WORDS words or a little more, the last of what is left."""
        return blocks(steps, -(-TrainingPass.WORDS // batch_size))

    @staticmethod
    def forward(ctx, x, weight_ih, weight_hh, bias, h, c):
        (steps, batch_size, _), hidden_size = x.shape, h.size(1)
        rows, w_ih, b = for_products(x.flatten(0, 1), weight_ih, bias)
        w_hh = weight_hh.to(rows.dtype)
        recurrence = Packed(w_hh, batch_size)
        gates = c.new_empty(steps, 4, batch_size, hidden_size)
        cells = c.new_empty(steps + 1, batch_size, hidden_size)
        squashed, outputs = torch.empty_like(cells[1:]), torch.empty_like(cells)
        outputs[0], cells[0] = h, c
        inputs = rows.unflatten(0, x.shape[:2])
        for block in TrainingPass.blocks(steps, batch_size):
            from_input = torch.addmm(b, inputs[block].flatten(0, 1), w_ih.t()).view(-1, batch_size, 4 * hidden_size)
            for t, from_step in enumerate(from_input, block.start):
                gate, state = gates[t], outputs[t].to(rows.dtype)
                gate.copy_(recurrence.plus(from_step, state).view(batch_size, 4, -1).transpose(0, 1))
                gate[:2].sigmoid_()
                gate[2].tanh_()
                gate[3].sigmoid_()
                i, f, g, o = gate.unbind()
                torch.mul(f, cells[t], out=cells[t + 1]).addcmul_(i, g)
                torch.mul(o, torch.tanh(cells[t + 1], out=squashed[t]), out=outputs[t + 1])
        ctx.save_for_backward(inputs, w_ih, w_hh, outputs, gates, cells, squashed)
        ctx.types = x.dtype, weight_hh.dtype
        return outputs[1:], cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs, grad_c):
        inputs, w_ih, w_hh, outputs, gates, cells, squashed = ctx.saved_tensors
        x_type, weight_type = ctx.types
        steps, _, batch_size, hidden_size = gates.shape
        recurrence = Packed(transposed(w_hh), batch_size)
        grad = torch.empty_like(gates[0])  # of one step
        grad_h, grad_c = torch.zeros_like(grad_c), grad_c.clone()
        grad_x, grad_weights = inputs.new_empty(inputs.shape, dtype=x_type), None
        for block in reversed(TrainingPass.blocks(steps, batch_size)):
            grad_gates = gates.new_empty(block.stop - block.start, batch_size, 4, hidden_size, dtype=inputs.dtype)
            for t, grad_gate in zip(reversed(range(block.start, block.stop)), reversed(grad_gates.unbind())):
                i, f, g, o = gates[t].unbind()
                tanh_c = squashed[t]
                # sigmoid' is s(1 - s), tanh' is 1 - s^2, and addcmul(x, x, s, value=-1) is x(1 - s)
                grad_h = grad_outputs[t] + grad_h
                through_o = grad_h * o
                torch.mul(through_o, tanh_c, out=grad[3])
                grad_c.add_(through_o).addcmul_(grad[3], tanh_c, value=-1)
                through_i = grad_c * i
                torch.mul(through_i, g, out=grad[0])
                torch.addcmul(through_i, grad[0], g, value=-1, out=grad[2])
                grad_c *= f
                torch.mul(grad_c, cells[t], out=grad[1])
                grad[:2].addcmul_(grad[:2], gates[t, :2], value=-1)
                grad[3].addcmul_(grad[3], o, value=-1)
                grad_gate.copy_(grad.transpose(0, 1))
                grad_h = recurrence(grad_gate.flatten(1))
            rows, states = inputs[block].flatten(0, 1), outputs[block].flatten(0, 1).to(inputs.dtype)
            by_word = grad_gates.view(-1, 4 * hidden_size)
            by_gate = transposed(by_word) if by_word.dtype == torch.bfloat16 else by_word.t()
            grad_x[block] = (by_word @ w_ih).view(-1, *grad_x.shape[1:])
            found = [part.to(weight_type) for part in (by_gate @ rows, by_gate @ states, by_word.sum(0))]
            grad_weights = [total.add_(part) for total, part in zip(grad_weights, found)] if grad_weights else found
        return grad_x, *grad_weights, grad_h.to(grad_c.dtype), grad_c


def cudnn_pass(function, rnn, x, hidden):
    """`function`, torch.lstm or torch.gru, over x (T, B, E) from `hidden` with copies of the weights of the layer
    `rnn`, in bfloat16 where autocast says so.

    Not by autocast itself, which hands cuDNN float16 whatever type it was told (PyTorch 2.6 to 2.11 at least): without
    a scaled loss most gradients are too small for it. Nor by PyTorch's own passes, which move the parameters into one
    buffer for cuDNN whenever one of them was exchanged, as weight drop does in every pass, there and back: a CUDA graph
    would go on reading and writing where they lay when it was captured.
    """
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        hidden = map_hidden(lambda part: part.to(kind), hidden)
        return function(x.to(kind), hidden, in_one_piece(rnn, kind), True, 1, 0.0, rnn.training, False, False)


def in_one_piece(rnn, kind):
    """Copies of the weights of an LSTM or GRU layer in one buffer, one after the other, as cuDNN takes them."""
    weights = (rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0)
    buffer = torch.cat([weight.flatten() for weight in weights]).to(kind)
    return [part.view_as(weight) for part, weight in zip(buffer.split([w.numel() for w in weights]), weights)]


def is_step(x):
    """Whether a layer over x (T, B, E) is to do one step without gradient on the CPU."""
    return len(x) == 1 and not x.is_cuda and not torch.is_grad_enabled()


class GRU(nn.GRU):
    """`torch.nn.GRU` of one layer, its parameters under its names. If `still`, no pass moves them in memory."""

    still = False
    packed = None

    def pack(self):
        """From here on single steps without gradient take their products from `PackedLinear`."""
        self.packed = (PackedLinear(self.weight_ih_l0, self.bias_ih_l0),
                       PackedLinear(self.weight_hh_l0, self.bias_hh_l0))

    def forward(self, x, h):
        """Run x (T, B, E) from `h` (1, B, H); returns the output (T, B, H) and the new h."""
        if self.still or (x.is_cuda and torch.is_autocast_enabled("cuda")):
            return cudnn_pass(torch.gru, self, x, h)
        if self.packed and is_step(x):
            h = self.step(x, h)
            return h, h
        return super().forward(x, h)

    def step(self, x, h):
        """One step with packed weights, for x, h (1, B, E or H)."""
        from_x, from_h = self.packed
        (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x(x).chunk(3, -1), from_h(h).chunk(3, -1)
        n = torch.addcmul(n_x, (r_x + r_h).sigmoid(), n_h).tanh()
        return torch.lerp(n, h, (z_x + z_h).sigmoid())


class LSTM(nn.LSTM):
    """`torch.nn.LSTM` of one layer, its parameters under its names. If `still`, no pass moves them in memory."""

    still = False
    packed = None

    def pack(self):
        """From here on single steps without gradient take their product from `PackedLinear`: one, of both weights side
        by side, which for 1150 inputs and units takes 0.47 ms where two take 0.55."""
        weight = torch.cat([self.weight_ih_l0, self.weight_hh_l0], 1)
        self.packed = PackedLinear(weight, self.bias_ih_l0 + self.bias_hh_l0)

    def forward(self, x, hidden):
        """Run x (T, B, E) from `hidden` (h, c), each (1, B, H); returns the output (T, B, H) and the new (h, c)."""
        h, c = hidden
        if self.still or (x.is_cuda and torch.is_autocast_enabled("cuda")):
            output, h, c = cudnn_pass(torch.lstm, self, x, hidden)
            return output, (h, c)
        if is_step(x):
            return self.step(x, h, c)
        if not self.by_own_pass(x):
            return super().forward(x, hidden)
        bias = self.bias_ih_l0 + self.bias_hh_l0
        outputs, c = TrainingPass.apply(x, self.weight_ih_l0, self.weight_hh_l0, bias, h[0], c[0])
        return outputs, (outputs[-1:], c.unsqueeze(0))

    def by_own_pass(self, x):
        """Whether to train over x (T, B, E) by `TrainingPass`, where that is faster than PyTorch's."""
        if trains_in_bfloat16(x):
            return True
        return (x.dtype == torch.float32 and not x.is_cuda and torch.is_grad_enabled()
                and self.hidden_size >= LARGE and packs_fp32())

    def step(self, x, h, c):
        """One step without gradient, for x, h, c (1, B, E or H), in less than half the time of PyTorch's pass, which
        first brings the weights into another order."""
        if self.packed:
            gates = self.packed(torch.cat([x, h], -1))
        else:
            gates = functional.linear(x, self.weight_ih_l0, self.bias_ih_l0)
            gates += functional.linear(h, self.weight_hh_l0, self.bias_hh_l0)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, (h, c)
