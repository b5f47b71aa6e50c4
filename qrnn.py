"""Define the quasi-recurrent layer (QRNN with fo-pooling) and its recurrence, the forget-mult.

Paper: Bradbury, Merity, Xiong, Socher, "Quasi-Recurrent Neural Networks" (arXiv 1611.01576), section 2. All matrix
products of a layer run at once over the whole sequence. The steps that are left are elementwise:

    z_t, f_t, o_t = tanh, sigmoid, sigmoid of a linear map of [x_t, x_{t-1}]
    c_t = f_t * z_t + (1 - f_t) * c_{t-1}            the forget-mult
    h_t = o_t * c_t

Shapes are in the alphabet of `model.py`.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from locked_dropout import column_mask
from products import PackedLinear, linear
from utils import blocks

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of PyTorch for the CPU lack it; the step-by-step form runs everywhere
    triton = None


class FoPool(torch.autograd.Function):
    """Compute activations, forget-mult and output gate of a QRNN layer (fo-pooling), forward and backward.

    Takes:

    - The linear map (T, B, 3H) of Z, F, O.
    - The state c_{-1} (B, H).
    - `zoneout_mask` (T, B, H), factors of f, or None.

    Returns the output h (T, B, H) and the last c (B, H). The linear map may have a shorter dtype. All else has that of
    c.

    A loop of one operation a step is exact in every dtype. Cumulative sums of log(1 - f) need no loop, but overflow.
    """

    BLOCK = 4  # time steps worked on together, so that each operation finds its data in the cache

    @staticmethod
    def forward(ctx, linear_map, start, zoneout_mask):
        steps, (batch_size, hidden_size) = len(linear_map), start.shape
        source = linear_map.unflatten(2, (3, hidden_size)).permute(2, 0, 1, 3)
        gates = start.new_empty(3, steps, batch_size, hidden_size)
        states = start.new_empty(steps + 1, batch_size, hidden_size)  # c_{-1}, c_0, ...
        output = torch.empty_like(gates[0])
        states[0] = start
        for block in blocks(steps, FoPool.BLOCK):
            gates[:, block] = source[:, block]
            z, f, o = gates[0, block].tanh_(), *gates[1:, block].sigmoid_()
            if zoneout_mask is not None:
                f = f * zoneout_mask[block]
            c, *following = states[block.start:block.stop + 1].unbind()
            for z_t, f_t, c_t in zip(z, f, following):
                c = torch.lerp(c, z_t, f_t, out=c_t)
            torch.mul(o, states[block.start + 1:block.stop + 1], out=output[block])
        ctx.save_for_backward(gates, states, zoneout_mask)
        ctx.dtype = linear_map.dtype
        return output, states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_last):
        gates, states, zoneout_mask = ctx.saved_tensors
        _, steps, batch_size, hidden_size = gates.shape
        grad_map = gates.new_empty(steps, batch_size, 3 * hidden_size, dtype=ctx.dtype)
        grad_z, grad_f, grad_o = grad_map.chunk(3, -1)
        carried = grad_last  # d loss / d c_t through all later steps
        for block in reversed(blocks(steps, FoPool.BLOCK)):
            z, f, o = gates[:, block]
            grad, factors = grad_output[block], f if zoneout_mask is None else f * zoneout_mask[block]
            # sigmoid' is s(1 - s), tanh' is 1 - s^2, and addcmul(x, x, s, value=-1) is x(1 - s)
            through_o = grad * states[block.start + 1:block.stop + 1]
            grad_o[block] = torch.addcmul(through_o, through_o, o, value=-1).mul_(o)
            total = grad * o  # d loss / d c_t
            through_z = torch.empty_like(total)
            for t in reversed(range(len(total))):
                total[t] += carried
                carried = total[t] - torch.mul(total[t], factors[t], out=through_z[t])
            grad_z[block] = torch.addcmul(through_z, through_z * z, z, value=-1)
            through_f = (z - states[block]).mul_(total).mul_(factors)
            grad_f[block] = torch.addcmul(through_f, through_f, f, value=-1)
        return grad_map, carried, None


if triton is not None:
    @triton.jit
    def _forward_kernel(f, z, states, steps, columns, BLOCK: tl.constexpr):
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        state = tl.load(states + column, inside)
        for step in range(steps):
            here = step * columns + column
            f_t = tl.load(f + here, inside)
            z_t = tl.load(z + here, inside)
            state = state + f_t * (z_t - state)
            tl.store(states + columns + here, state, inside)

    @triton.jit
    def _backward_kernel(f, z, states, grad_h, grad_f, grad_z, grad_start, steps, columns, BLOCK: tl.constexpr):
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        total = tl.zeros((BLOCK,), grad_start.dtype.element_ty)
        for step in range(steps):
            here = (steps - 1 - step) * columns + column
            f_t = tl.load(f + here, inside)
            total += tl.load(grad_h + here, inside)
            tl.store(grad_f + here, total * (tl.load(z + here, inside) - tl.load(states + here, inside)), inside)
            tl.store(grad_z + here, total * f_t, inside)
            total = total * (1 - f_t)
        tl.store(grad_start + column, total, inside)


class TritonForgetMult(torch.autograd.Function):
    """Compute the forget-mult for f, z (T, B, H) from c_{-1} (B, H) on a GPU.

    Returns c (T, B, H). One kernel does all time steps, with a thread for each of the B * H columns.
    """

    BLOCK = 256  # columns of a program

    @staticmethod
    def forward(ctx, f, z, start):
        f, z = f.contiguous(), z.contiguous()
        states = torch.cat([start.unsqueeze(0), torch.empty_like(z)])
        grid = (triton.cdiv(start.numel(), TritonForgetMult.BLOCK),)
        _forward_kernel[grid](f, z, states, len(z), start.numel(), BLOCK=TritonForgetMult.BLOCK)
        ctx.save_for_backward(f, z, states)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h):
        f, z, states = ctx.saved_tensors
        grad_f, grad_z, grad_start = torch.empty_like(f), torch.empty_like(z), torch.empty_like(states[0])
        grid = (triton.cdiv(grad_start.numel(), TritonForgetMult.BLOCK),)
        _backward_kernel[grid](f, z, states, grad_h.contiguous(), grad_f, grad_z, grad_start, len(z),
                               grad_start.numel(), BLOCK=TritonForgetMult.BLOCK)
        return grad_f, grad_z, grad_start


def fo_pool(linear_map, start, zoneout_mask=None):
    """Compute what `FoPool` does, on a GPU by Triton's forget-mult where there is Triton."""
    if triton is None or not linear_map.is_cuda:
        return FoPool.apply(linear_map, start, zoneout_mask)
    z, f, o = (part.to(start.dtype) for part in linear_map.chunk(3, -1))
    f = f.sigmoid()
    c = TritonForgetMult.apply(f if zoneout_mask is None else f * zoneout_mask, z.tanh(), start)
    return o.sigmoid() * c, c[-1]


class QRNN(nn.Module):
    """Run one QRNN layer, E -> H, that looks at the last `window` (1 or 2) inputs.

    With `zoneout` a unit keeps its state at a step with that probability. In evaluation it moves by the expected share.
    The weight is `linear.weight` (3H, window * E). Rows are in the order Z, F, O. Columns have x_t before x_{t-1}.

    Paper: 1611.01576, sections 2 and 2.1.
    """

    packed = None

    def __init__(self, input_size, hidden_size, window=1, zoneout=0.0):
        super().__init__()
        self.input_size, self.hidden_size, self.window, self.zoneout = input_size, hidden_size, window, zoneout
        self.linear = nn.Linear(window * input_size, 3 * hidden_size)

    def pack(self):
        """Pack copies of the weights as they are now, for passes without gradient (`PackedLinear`)."""
        self.packed = PackedLinear(self.linear.weight, self.linear.bias)

    def init_hidden(self, batch_size):
        """Return the zero hidden state.

        It is c (1, B, H) and, for a window of 2, the previous input (1, B, E).
        """
        c = self.linear.bias.new_zeros(1, batch_size, self.hidden_size)
        return (c, c.new_zeros(1, batch_size, self.input_size)) if self.window == 2 else (c,)

    def forward(self, x, hidden):
        """Run x (T, B, E) from `hidden`.

        Returns the output (T, B, H) and the new hidden state.
        """
        c, *previous = hidden
        source = torch.cat([x, torch.cat([previous[0], x[:-1]])], -1) if self.window == 2 else x
        if self.packed and not torch.is_grad_enabled():
            linear_map = self.packed(source)
        else:
            linear_map = linear(source, self.linear.weight, self.linear.bias)
        zoneout_mask = None
        if self.zoneout:
            shape, keep = (*x.shape[:2], self.hidden_size), 1 - self.zoneout
            zoneout_mask = column_mask(c, shape, self.zoneout) * keep if self.training else c.new_full(shape, keep)
        output, c = fo_pool(linear_map, c[0], zoneout_mask)
        return output, (c.unsqueeze(0), x[-1:]) if self.window == 2 else (c.unsqueeze(0),)
