"""The quasi-recurrent layer (QRNN with fo-pooling) and its recurrence, the forget-mult.

Paper: Bradbury, Merity, Xiong, Socher, "Quasi-Recurrent Neural Networks" (arXiv 1611.01576), section 2. All matrix
products of a layer run at once over the whole sequence; what is left to do step by step is elementwise:

    z_t, f_t, o_t = tanh, sigmoid, sigmoid of a linear map of [x_t, x_{t-1}]
    c_t = f_t * z_t + (1 - f_t) * c_{t-1}            the forget-mult
    h_t = o_t * c_t

Shapes are in the alphabet of `model.py`.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from locked_dropout import dropout_mask

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of PyTorch for the CPU come without it; the step-by-step form runs everywhere
    triton = None


class ForgetMult(torch.autograd.Function):
    """h_t = f_t * z_t + (1 - f_t) * h_{t-1} for f, z (T, B, H) from h_{-1} (B, H); returns h (T, B, H).

    One kernel per time step and direction, each reading and writing slices in place, exact in every type. A loop that
    autograd records allocates and saves every step; a form by cumulative sums of log(1 - f) has no loop and overflows.
    """

    @staticmethod
    def forward(ctx, f, z, start):
        states = torch.cat([start.unsqueeze(0), torch.empty_like(z)])  # h_{-1}, h_0, ...
        last, *following = states.unbind()
        for f_t, z_t, h_t in zip(f.unbind(), z.unbind(), following):
            torch.lerp(last, z_t, f_t, out=h_t)
            last = h_t
        ctx.save_for_backward(f, z, states)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h):
        f, z, states = ctx.saved_tensors
        keep = (1 - f).unbind()
        total = grad_h.clone(memory_format=torch.contiguous_format)  # d loss / d h_t, through all later steps too
        steps = total.unbind()
        for t in range(len(steps) - 1, 0, -1):
            steps[t - 1].addcmul_(keep[t], steps[t])
        return total * (z - states[:-1]), total * f, keep[0] * steps[0]


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
    """The same on a GPU: one kernel for all time steps, a thread for each of the B * H columns."""

    BLOCK = 256

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


def forget_mult(f, z, start):
    """h_t = f_t * z_t + (1 - f_t) * h_{t-1} for f, z (T, B, H) from h_{-1} = `start` (B, H); returns h (T, B, H)."""
    function = TritonForgetMult if f.is_cuda and triton is not None else ForgetMult
    return function.apply(f, z, start)


class QRNN(nn.Module):
    """One QRNN layer, E -> H, that looks at the last `window` (1 or 2) inputs.

    With `zoneout` a unit keeps its state at a step with that probability (in evaluation it moves by the expected
    share). The weight is `linear.weight` (3H, window * E), rows in the order Z, F, O, columns x_t before x_{t-1}.
    """

    def __init__(self, input_size, hidden_size, window=1, zoneout=0.0):
        super().__init__()
        self.input_size, self.hidden_size, self.window, self.zoneout = input_size, hidden_size, window, zoneout
        self.linear = nn.Linear(window * input_size, 3 * hidden_size)

    def init_hidden(self, batch_size):
        """The zero hidden state: c (1, B, H) and, for a window of 2, the previous input (1, B, E)."""
        c = self.linear.bias.new_zeros(1, batch_size, self.hidden_size)
        return (c, c.new_zeros(1, batch_size, self.input_size)) if self.window == 2 else (c,)

    def forward(self, x, hidden):
        """Run x (T, B, E) from `hidden`; returns the output (T, B, H) and the new hidden state."""
        c, *previous = hidden
        source = torch.cat([x, torch.cat([previous[0], x[:-1]])], -1) if self.window == 2 else x
        z, f, o = self.linear(source).to(c.dtype).chunk(3, -1)  # under autocast only the product is in bfloat16
        z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
        if self.zoneout:
            moves = dropout_mask(f, f.shape, self.zoneout) if self.training else 1
            f = f * moves * (1 - self.zoneout)
        c = forget_mult(f, z, c[0])
        return o * c, (c[-1:], x[-1:]) if self.window == 2 else (c[-1:],)
