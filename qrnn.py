"""Define the quasi-recurrent layer (QRNN with fo-pooling) and its recurrence, the forget-mult.

Paper: Bradbury, Merity, Xiong, Socher, "Quasi-Recurrent Neural Networks" (arXiv 1611.01576), section 2. All matrix
products of a layer run at once over the whole sequence. The steps that are left are elementwise:

    z_t, f_t, o_t = tanh, sigmoid, sigmoid of a linear map of [x_t, x_{t-1}]
    c_t = f_t * z_t + (1 - f_t) * c_{t-1}            the forget-mult
    h_t = o_t * c_t

Shapes are in the alphabet of `model.py`.
"""

import os
import shutil
from functools import cache

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from locked_dropout import column_mask
from padding import GPULayer, PaddedWeights, gpu_dtype, pad, padded_size, unpad
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

    Returns the output h (T, B, H) and the last c (B, H). The linear map may have a shorter dtype than c. All else has
    that of c.

    A loop of one operation a step is exact in every dtype. Cumulative sums of log(1 - f) need no loop, but overflow.
    """

    # Time steps worked on together, so that each operation finds its data in the cache: STEPS, or if that is more, as
    # many as have VALUES values.
    STEPS, VALUES = 4, 2**16

    @staticmethod
    def blocks(steps, values):
        """Cut `steps` time steps of `values` each, B x H, into slices that are worked on together."""
        return blocks(steps, max(FoPool.STEPS, FoPool.VALUES // values))

    @staticmethod
    def forward(ctx, linear_map, start, zoneout_mask):
        steps, (batch_size, hidden_size) = len(linear_map), start.shape
        source = linear_map.unflatten(2, (3, hidden_size)).permute(2, 0, 1, 3)
        gates = start.new_empty(3, steps, batch_size, hidden_size)
        states = start.new_empty(steps + 1, batch_size, hidden_size)  # c_{-1}, c_0, ...
        output = torch.empty_like(gates[0])
        states[0] = start
        for block in FoPool.blocks(steps, start.numel()):
            z = torch.tanh(source[0, block].to(start.dtype), out=gates[0, block])
            f, o = torch.sigmoid(source[1:, block].to(start.dtype), out=gates[1:, block])
            if zoneout_mask is not None:
                f = f * zoneout_mask[block]
            c, *following = states[block.start:block.stop + 1].unbind()
            for z_t, f_t, c_t in zip(z.unbind(), f.unbind(), following):
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
        for block in reversed(FoPool.blocks(steps, batch_size * hidden_size)):
            z, f, o = gates[:, block]
            grad, factors = grad_output[block], f if zoneout_mask is None else f * zoneout_mask[block]
            # sigmoid' is s(1 - s), tanh' is 1 - s^2, and addcmul(x, x, s, value=-1) is x(1 - s)
            through_o = (grad * states[block.start + 1:block.stop + 1]).mul_(o)
            torch.addcmul(through_o, through_o, o, value=-1, out=grad_o[block])
            total = grad * o  # d loss / d c_t
            for total_t, factor in zip(reversed(total.unbind()), reversed(factors.unbind())):
                total_t += carried
                carried = torch.addcmul(total_t, total_t, factor, value=-1)
            through_z = total * factors
            torch.addcmul(through_z, through_z * z, z, value=-1, out=grad_z[block])
            through_f = (z - states[block]).mul_(total).mul_(factors)
            torch.addcmul(through_f, through_f, f, value=-1, out=grad_f[block])
        return grad_map, carried, None


if triton is not None:
    @triton.jit
    def _forward_kernel(linear_map, zoneout_mask, states, output, steps, batch_size, hidden_size,
                        BLOCK: tl.constexpr, STAGES: tl.constexpr, ZONEOUT: tl.constexpr):
        row = tl.program_id(1)
        unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = unit < hidden_size
        column = row * hidden_size + unit
        columns = batch_size * hidden_size
        gate = linear_map + 3 * row * hidden_size + unit
        c = tl.load(states + column, inside)
        for step in tl.range(0, steps, num_stages=STAGES):
            here = step * columns + column
            z = tl.load(gate + 3 * step * columns, inside).to(c.dtype)
            f = tl.load(gate + 3 * step * columns + hidden_size, inside).to(c.dtype)
            o = tl.load(gate + 3 * step * columns + 2 * hidden_size, inside).to(c.dtype)
            f = 1 / (1 + tl.exp(-f))
            if ZONEOUT:
                f *= tl.load(zoneout_mask + here, inside)
            c += f * (2 / (1 + tl.exp(-2 * z)) - 1 - c)  # tanh(z) by its sigmoid
            tl.store(states + columns + here, c, inside)
            tl.store(output + here, c / (1 + tl.exp(-o)), inside)

    @triton.jit
    def _backward_kernel(linear_map, zoneout_mask, states, grad_output, grad_last, grad_map, grad_start,
                         steps, batch_size, hidden_size,
                         BLOCK: tl.constexpr, STAGES: tl.constexpr, ZONEOUT: tl.constexpr):
        row = tl.program_id(1)
        unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = unit < hidden_size
        column = row * hidden_size + unit
        columns = batch_size * hidden_size
        gate = 3 * row * hidden_size + unit
        carried = tl.load(grad_last + column, inside)  # d loss / d c_t through all later steps
        c = tl.load(states + steps * columns + column, inside)
        for back in tl.range(0, steps, num_stages=STAGES):
            step = steps - 1 - back
            here = step * columns + column
            there = gate + 3 * step * columns
            z = tl.load(linear_map + there, inside).to(c.dtype)
            f = tl.load(linear_map + there + hidden_size, inside).to(c.dtype)
            o = tl.load(linear_map + there + 2 * hidden_size, inside).to(c.dtype)
            z = 2 / (1 + tl.exp(-2 * z)) - 1
            f = 1 / (1 + tl.exp(-f))
            o = 1 / (1 + tl.exp(-o))
            factor = f
            if ZONEOUT:
                factor = f * tl.load(zoneout_mask + here, inside)
            grad = tl.load(grad_output + here, inside)
            before = tl.load(states + here, inside)
            total = carried + grad * o  # d loss / d c_t
            dtype = grad_map.dtype.element_ty
            tl.store(grad_map + there, (total * factor * (1 - z * z)).to(dtype), inside)
            tl.store(grad_map + there + hidden_size, (total * (z - before) * factor * (1 - f)).to(dtype), inside)
            tl.store(grad_map + there + 2 * hidden_size, (grad * c * o * (1 - o)).to(dtype), inside)
            carried = total * (1 - factor)
            c = before
        tl.store(grad_start + column, carried, inside)


class TritonFoPool(torch.autograd.Function):
    """Compute what `FoPool` does on a GPU, in one kernel for all time steps, forward and backward.

    A program has BLOCK units of one column of the batch. The backward pass computes the gates again, so only the linear
    map and the states are kept.
    """

    BLOCK, WARPS = 128, 2  # two values a thread: enough bytes for an asynchronous copy in bfloat16 too
    STAGES = 4  # steps whose loads are on their way at the same time

    @staticmethod
    def launch(kernel, start, zoneout_mask, *arguments):
        """Run `kernel` over all columns of `start` (B, H)."""
        grid = triton.cdiv(start.size(1), TritonFoPool.BLOCK), start.size(0)
        kernel[grid](*arguments, *start.shape, BLOCK=TritonFoPool.BLOCK, STAGES=TritonFoPool.STAGES,
                     ZONEOUT=zoneout_mask is not None, num_warps=TritonFoPool.WARPS)

    @staticmethod
    def forward(ctx, linear_map, start, zoneout_mask):
        linear_map, steps = linear_map.contiguous(), len(linear_map)
        zoneout_mask = None if zoneout_mask is None else zoneout_mask.contiguous()
        states = start.new_empty(steps + 1, *start.shape)
        states[0] = start
        output = torch.empty_like(states[1:])
        TritonFoPool.launch(_forward_kernel, states[0], zoneout_mask, linear_map, zoneout_mask, states, output, steps)
        ctx.save_for_backward(linear_map, states, zoneout_mask)
        return output, states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_last):
        linear_map, states, zoneout_mask = ctx.saved_tensors
        grad_map, grad_start = torch.empty_like(linear_map), torch.empty_like(states[0])
        TritonFoPool.launch(_backward_kernel, grad_start, zoneout_mask, linear_map, zoneout_mask, states,
                            grad_output.contiguous(), grad_last.contiguous(), grad_map, grad_start, len(linear_map))
        return grad_map, grad_start, None


@cache
def is_new_enough(device):
    """Return whether a GPU has compute capability 7.0 or more, which Triton needs."""
    return torch.cuda.get_device_capability(device) >= (7, 0)


@cache
def has_compiler():
    """Return whether there is a C compiler, which Triton needs to launch a kernel."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def fo_pool(linear_map, start, zoneout_mask=None):
    """Compute what `FoPool` does, on a GPU by Triton where it runs."""
    triton_runs = triton is not None and linear_map.is_cuda and is_new_enough(linear_map.device) and has_compiler()
    pool = TritonFoPool if triton_runs else FoPool
    return pool.apply(linear_map, start, zoneout_mask)


class QRNN(GPULayer, nn.Module):
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

    def forward(self, x, hidden, mask=None):
        """Run x (T, B, E) from `hidden`.

        `mask`, factors of the weight, is for a pass that `pads`. Returns the output (T, B, H) and the new hidden state.
        """
        c, *previous = hidden
        source = torch.cat([x, torch.cat([previous[0], x[:-1]])], -1) if self.window == 2 else x
        size = self.hidden_size
        if self.packed and not torch.is_grad_enabled():
            linear_map = self.packed(source)
        elif self.pads(x):
            linear_map, size = self.padded_linear(source, mask), padded_size(size)
        else:
            linear_map = linear(source, self.linear.weight, self.linear.bias)
        zoneout_mask = None
        if self.zoneout:
            shape, keep = (*x.shape[:2], self.hidden_size), 1 - self.zoneout
            zoneout_mask = column_mask(c, shape, self.zoneout) * keep if self.training else c.new_full(shape, keep)
            zoneout_mask = pad(zoneout_mask, size)
        output, c = (unpad(part, self.hidden_size) for part in fo_pool(linear_map, pad(c[0], size), zoneout_mask))
        return output, (c.unsqueeze(0), x[-1:]) if self.window == 2 else (c.unsqueeze(0),)

    def padded_linear(self, source, mask):
        """Compute the linear map of `source` (T, B, window * E) with padded copies of the weights."""
        dtype = gpu_dtype(source)
        with torch.autocast(source.device.type, enabled=False):
            weight, bias = PaddedWeights.apply(3, dtype, 0, mask, self.linear.weight, self.linear.bias)
            return functional.linear(pad(source.to(dtype), weight.size(1)), weight, bias)
