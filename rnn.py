"""The LSTM and GRU layers: PyTorch's, with passes of their own where those are slow or in the way.

LSTM training in bfloat16 on the CPU. In fp32 there is nothing to gain over PyTorch's pass, which is oneDNN's. In
bfloat16 that one is slower than in fp32 (356 ms for 298, forward and backward, 1150 units, 70 x 20 words, 2 cores of an
AMD EPYC with AVX512-BF16), and the one here faster (171 ms): the input's product and the gradients of weights are one
matrix product each for the whole sequence, and only the product with the hidden-to-hidden weight stays in the loop.

Passes for cuDNN in bfloat16, where autocast hands it float16, and for CUDA graphs, which need the parameters to stay
where they lie in memory: `cudnn_pass`.

Shapes are in the alphabet of `model.py`.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from utils import for_products, map_hidden


class Recurrence(torch.autograd.Function):
    """The loop of an LSTM layer: from the input's share of the gates (T, B, 4H), in PyTorch's order i, f, g, o, the
    weight (4H, H) and the state h, c (B, H) to the outputs (T, B, H) and the last c (B, H).

    Products and the gradients of the gates, their factors, are in the type that autocast says, gates, cell and the
    gradients that are carried through time in that of `c`.
    """

    @staticmethod
    def forward(ctx, from_input, weight, h, c):
        steps, batch_size, width = from_input.shape
        factor, first = for_products(weight, h)
        gates = c.new_empty(steps, batch_size, 4, width // 4)
        cells = c.new_empty(steps + 1, *c.shape)
        squashed, outputs = c.new_empty(steps, *c.shape), c.new_empty(steps, *c.shape)
        states = first.new_empty(steps + 1, *h.shape)  # the outputs as factors of the products
        cells[0], states[0] = c, first
        for t in range(steps):
            gate = gates[t]
            torch.add(from_input[t], (states[t] @ factor.t()).to(c.dtype), out=gate.view(batch_size, width))
            gate[:, :2].sigmoid_()
            gate[:, 2].tanh_()
            gate[:, 3].sigmoid_()
            i, f, g, o = gate.unbind(1)
            torch.mul(f, cells[t], out=cells[t + 1]).addcmul_(i, g)
            torch.mul(o, torch.tanh(cells[t + 1], out=squashed[t]), out=outputs[t])
            states[t + 1] = outputs[t]
        ctx.save_for_backward(gates, cells, squashed, states, factor)
        ctx.types = weight.dtype, from_input.dtype
        return outputs, cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs, grad_c):
        gates, cells, squashed, states, factor = ctx.saved_tensors
        weight_type, input_type = ctx.types
        steps, batch_size, _, hidden_size = gates.shape
        grads = states.new_empty(gates.shape)
        grad_h, grad_c = torch.zeros_like(grad_c), grad_c.clone()
        for t in range(steps - 1, -1, -1):
            i, f, g, o = gates[t].unbind(1)
            grad, tanh_c = grads[t], squashed[t]
            grad_h = grad_outputs[t] + grad_h
            through_o = grad_h * o
            grad_c += torch.addcmul(through_o, through_o * tanh_c, tanh_c, value=-1)
            through_i = grad_c * i
            grad[:, 0] = (through_i * g).mul_(1 - i)
            grad[:, 1] = (grad_c * cells[t]).mul_(f).mul_(1 - f)
            grad[:, 2] = torch.addcmul(through_i, through_i * g, g, value=-1)
            grad[:, 3] = (through_o * tanh_c).mul_(1 - o)
            grad_c *= f
            grad_h = grad.view(batch_size, -1) @ factor
        flat = grads.view(steps * batch_size, -1)
        grad_weight = flat.t() @ states[:-1].view(steps * batch_size, hidden_size)
        return (flat.view(steps, batch_size, -1).to(input_type), grad_weight.to(weight_type), grad_h.to(grad_c.dtype),
                grad_c)


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


class GRU(nn.GRU):
    """`torch.nn.GRU` of one layer, its parameters under its names. If `still`, no pass moves them in memory."""

    still = False

    def forward(self, x, h):
        """Run x (T, B, E) from `h` (1, B, H); returns the output (T, B, H) and the new h."""
        if self.still or (x.is_cuda and torch.is_autocast_enabled("cuda")):
            return cudnn_pass(torch.gru, self, x, h)
        return super().forward(x, h)


class LSTM(nn.LSTM):
    """`torch.nn.LSTM` of one layer, its parameters under its names. If `still`, no pass moves them in memory."""

    still = False

    def forward(self, x, hidden):
        """Run x (T, B, E) from `hidden` (h, c), each (1, B, H); returns the output (T, B, H) and the new (h, c)."""
        h, c = hidden
        if self.still or (x.is_cuda and torch.is_autocast_enabled("cuda")):
            output, h, c = cudnn_pass(torch.lstm, self, x, hidden)
            return output, (h, c)
        if len(x) == 1 and not x.is_cuda and not torch.is_grad_enabled():
            return self.step(x, h, c)
        if x.is_cuda or not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
            return super().forward(x, hidden)
        from_input = functional.linear(x, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)
        outputs, c = Recurrence.apply(from_input, self.weight_hh_l0, h[0], c[0])
        return outputs, (outputs[-1:], c.unsqueeze(0))

    def step(self, x, h, c):
        """One step without gradient, for x, h, c (1, B, E or H), in less than half the time of PyTorch's pass, which
        first brings the weights into another order."""
        gates = functional.linear(x, self.weight_ih_l0, self.bias_ih_l0)
        gates += functional.linear(h, self.weight_hh_l0, self.bias_hh_l0)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, (h, c)
