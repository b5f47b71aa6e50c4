"""Define the LSTM and GRU layers: PyTorch's, with passes of their own where PyTorch's are slow or do not fit.

`LSTMFunction` trains an LSTM on a CPU. In fp32 it does so only where the layer is large. On a CPU with AMX it is more
than twice as fast as PyTorch's pass in bfloat16. In fp32 it is about a tenth faster. The products of the input and the
gradients of the weights are each one matrix product for many steps. The hidden-to-hidden weight is packed once a pass
(`products.Packed`), since the loop multiplies by it at each step.

`cudnn_pass` trains both layers on a GPU with copies of their weights (`padding.PaddedWeights`).

Shapes are in the alphabet of `model.py`.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from padding import GPULayer, PaddedWeights, gpu_dtype, pad, unpad
from products import Packed, PackedLinear, for_products, packs_fp32, trains_in_bfloat16, transposed
from utils import blocks, map_hidden

MIN_HIDDEN = 1100  # `LSTMFunction` pays in fp32 from so many hidden units on


class LSTMFunction(torch.autograd.Function):
    """Run an LSTM layer over a sequence, forward and backward, in few and large matrix products.

    Takes:

    - Inputs x (T, B, E).
    - Weights (4H, E) and (4H, H), rows in PyTorch's order i, f, g, o.
    - The bias (4H).
    - The state h, c (B, H).

    Returns the outputs (T, B, H) and the last c (B, H).

    Products and their factors have the dtype that autocast says, also the gradients of the gates. Gates, cell, and the
    gradients carried through time have the dtype of `c`.
    """

    # Rows (T x B), or a little more, of a product that need not wait for the step before. Such a product is as fast as
    # one of the whole sequence. In bfloat16 its result is small enough for `device.keep_memory`.
    ROWS_PER_PRODUCT = 2048

    @staticmethod
    def blocks(steps, batch_size):
        """Cut `steps` time steps into slices of ROWS_PER_PRODUCT rows or a little more; the last has the rest."""
        return blocks(steps, -(-LSTMFunction.ROWS_PER_PRODUCT // batch_size))

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
        for block in LSTMFunction.blocks(steps, batch_size):
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
        ctx.dtypes = x.dtype, weight_hh.dtype
        return outputs[1:], cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs, grad_c):
        inputs, w_ih, w_hh, outputs, gates, cells, squashed = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        steps, _, batch_size, hidden_size = gates.shape
        recurrence = Packed(transposed(w_hh), batch_size)
        grad = torch.empty_like(gates[0])  # of one step
        grad_h, grad_c = torch.zeros_like(grad_c), grad_c.clone()
        grad_x, grad_weights = inputs.new_empty(inputs.shape, dtype=x_dtype), None
        for block in reversed(LSTMFunction.blocks(steps, batch_size)):
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
            by_row = grad_gates.view(-1, 4 * hidden_size)
            by_gate = transposed(by_row) if by_row.dtype == torch.bfloat16 else by_row.t()
            grad_x[block] = (by_row @ w_ih).view(-1, *grad_x.shape[1:])
            of_block = [part.to(weight_dtype) for part in (by_gate @ rows, by_gate @ states, by_row.sum(0))]
            if grad_weights is None:
                grad_weights = of_block
            else:
                grad_weights = [total.add_(part) for total, part in zip(grad_weights, of_block)]
        return grad_x, *grad_weights, grad_h.to(grad_c.dtype), grad_c


def cudnn_pass(function, rnn, x, hidden, mask=None):
    """Run `rnn` in training on a GPU over x (T, B, E) from `hidden`, with `PaddedWeights`.

    `function` is torch.lstm or torch.gru. `mask` has factors of W_hh, or is None. Returns what `function` does, in the
    dtype of the copies.
    """
    dtype, size, gates = gpu_dtype(x), rnn.hidden_size, len(rnn.bias_hh_l0) // rnn.hidden_size
    with torch.autocast(x.device.type, enabled=False):
        weights = PaddedWeights.apply(gates, dtype, 1, mask, rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0,
                                      rnn.bias_hh_l0)
        x = pad(x.to(dtype), weights[0].size(1))
        hidden = map_hidden(lambda part: pad(part.to(dtype), weights[1].size(1)), hidden)
        results = function(x, hidden, weights, True, 1, 0.0, rnn.training, False, False)
    return [unpad(part, size) for part in results]


def is_step(x):
    """Return whether a layer over x (T, B, E) does one step without gradient on a CPU."""
    return len(x) == 1 and not x.is_cuda and not torch.is_grad_enabled()


class GRU(GPULayer, nn.GRU):
    """Run one GRU layer: `torch.nn.GRU` with the same names of parameters."""

    packed = None

    def pack(self):
        """Pack copies of the weights as they are now, for single steps without gradient (`PackedLinear`)."""
        self.packed = (PackedLinear(self.weight_ih_l0, self.bias_ih_l0),
                       PackedLinear(self.weight_hh_l0, self.bias_hh_l0))

    def forward(self, x, h, mask=None):
        """Run x (T, B, E) from `h` (1, B, H).

        `mask`, factors of W_hh, is for a pass that `pads`. Returns the output (T, B, H) and the new h.
        """
        if self.pads(x):
            return cudnn_pass(torch.gru, self, x, h, mask)
        if self.packed and is_step(x):
            h = self.step(x, h)
            return h, h
        return super().forward(x, h)

    def step(self, x, h):
        """Compute one step with packed weights, for x (1, B, E) and h (1, B, H).

        Returns the new h.
        """
        from_x, from_h = self.packed
        (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x(x).chunk(3, -1), from_h(h).chunk(3, -1)
        n = torch.addcmul(n_x, (r_x + r_h).sigmoid(), n_h).tanh()
        return torch.lerp(n, h, (z_x + z_h).sigmoid())


class LSTM(GPULayer, nn.LSTM):
    """Run one LSTM layer: `torch.nn.LSTM` with the same names of parameters."""

    packed = None

    def pack(self):
        """Pack copies of the weights as they are now, for single steps without gradient (`PackedLinear`).

        Both weights lie side by side, since one product is somewhat faster than two.
        """
        weight = torch.cat([self.weight_ih_l0, self.weight_hh_l0], 1)
        self.packed = PackedLinear(weight, self.bias_ih_l0 + self.bias_hh_l0)

    def forward(self, x, hidden, mask=None):
        """Run x (T, B, E) from `hidden` (h, c), each (1, B, H).

        `mask`, factors of W_hh, is for a pass that `pads`. Returns the output (T, B, H) and the new (h, c).
        """
        if self.pads(x):
            output, h, c = cudnn_pass(torch.lstm, self, x, hidden, mask)
            return output, (h, c)
        h, c = hidden
        if is_step(x):
            return self.step(x, h, c)
        if not self.by_own_pass(x):
            return super().forward(x, hidden)
        bias = self.bias_ih_l0 + self.bias_hh_l0
        outputs, c = LSTMFunction.apply(x, self.weight_ih_l0, self.weight_hh_l0, bias, h[0], c[0])
        return outputs, (outputs[-1:], c.unsqueeze(0))

    def by_own_pass(self, x):
        """Return whether `LSTMFunction` trains over x (T, B, E) faster than PyTorch's pass."""
        if trains_in_bfloat16(x):
            return True
        return (x.dtype == torch.float32 and not x.is_cuda and torch.is_grad_enabled()
                and self.hidden_size >= MIN_HIDDEN and packs_fp32())

    def step(self, x, h, c):
        """Compute one step without gradient, for x (1, B, E) and h, c (1, B, H).

        Returns the output and the new (h, c). It takes less than half the time of PyTorch's pass, which first brings
        the weights into another order.
        """
        if self.packed:
            gates = self.packed(torch.cat([x, h], -1))
        else:
            gates = functional.linear(x, self.weight_ih_l0, self.bias_ih_l0)
            gates += functional.linear(h, self.weight_hh_l0, self.bias_hh_l0)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, (h, c)
