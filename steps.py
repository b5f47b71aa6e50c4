"""Take a step of training, and evaluate a model.

Paper: "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182), sections 4.1 (variable-length BPTT) and
4.6 (AR and TAR). Shapes are in the alphabet of `model.py`.
"""

import math
from contextlib import nullcontext
from functools import partial

import numpy
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from device import computes_in, tf32
from graphs import GraphedPass
from metrics import log
from optimizers import guard
from utils import get_batch, repackage_hidden

MIN_SEQ_LEN = 5  # time steps
MAX_VALUES = 2**26  # of the widest activation in a chunk of evaluation on a GPU: 256 MiB in fp32


def seed_everything(seed):
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # seeds CUDA too


def sample_seq_len(bptt, max_bptt=None):
    """Sample the length of the next batch, in time steps, from numpy's generator.

    It is drawn from N(bptt, 5), or with probability 0.05 from N(bptt / 2, 5). It is at least 5 and at most `max_bptt`
    (0 or None: no limit). Paper: 1708.02182, section 4.1.
    """
    base = bptt if numpy.random.random() < 0.95 else bptt / 2
    seq_len = max(MIN_SEQ_LEN, int(numpy.random.normal(base, 5)))
    return min(seq_len, max_bptt) if max_bptt else seq_len


def train_step(model, optimizer, forward_backward, words, targets, hidden, lr_scale, clip):
    """Take one step of `optimizer` on the batch `words`, `targets` (T, B).

    The learning rate is multiplied by `lr_scale`. Returns the new hidden state and the cross entropy, in nats per
    token, without AR and TAR. Raises FloatingPointError when loss or gradient is not finite. In that case no weight has
    changed; on a GPU averages may have.
    """
    hidden, loss_and_norm = forward_backward(model, words, targets, hidden)
    if loss_and_norm.is_cuda:
        read = read_later(loss_and_norm)
        guard(optimizer, loss_and_norm, clip)
    else:
        read = loss_and_norm.tolist
        check_finite(*read())
        if clip:
            clip_grads_with_norm_(model.parameters(), clip, loss_and_norm[1])
    group = optimizer.param_groups[0]
    lr = group["lr"]
    group["lr"] = lr * lr_scale
    optimizer.step()
    group["lr"] = lr
    loss, norm = read()  # the only time in a step that the CPU waits for a GPU, which has the optimizer's work by now
    check_finite(loss, norm)
    return hidden, loss


def check_finite(loss, norm):
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(f"the loss is {loss} and the norm of the gradient {norm}")


def read_later(values):
    """Begin to copy `values` from the GPU to the CPU.

    Returns a function that waits for them and returns a list. It does not wait for what was launched after this call.
    """
    copy, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def read():
        copied.synchronize()
        return copy.tolist()
    return read


def forward_backward(model, words, targets, hidden, alpha=0, beta=0, precision="fp32", keep_grads=False):
    """Run forward and backward on one batch `words`, `targets` (T, B): gradients of loss + AR + TAR.

    - AR is `alpha` times the mean square of the dropped output.
    - TAR is `beta` times that of the raw output's change over time.

    Gradients are new tensors. With `keep_grads` they are zeroed where they lie instead. Returns the new hidden state
    and one tensor (2,): the cross entropy, nats per token, and the norm of the gradient. Paper: 1708.02182, section
    4.6.
    """
    device = words.device
    model.zero_grad(set_to_none=not keep_grads)
    with tf32(precision != "fp32") if device.type == "cuda" else nullcontext():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output, hidden, raw = model(words, hidden)
            cross_entropy = objective = model.loss(output, targets)
        if alpha:
            objective = objective + alpha * output.pow(2).mean()
        if beta:
            objective = objective + beta * (raw[1:] - raw[:-1]).pow(2).mean()
        objective.backward()
    norm = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    return repackage_hidden(hidden), torch.stack([cross_entropy.detach(), norm])


def choose_pass(model, precision, alpha, beta, cuda_graphs=False, backend=None):
    """Choose how `model` runs forward and backward, by CUDA graphs if asked.

    Returns `forward_backward` bound to these settings. If the device has no instructions for `precision`, the precision
    is fp32, and a line says so. `backend` is that of `GraphedPass`.
    """
    device = next(model.parameters()).device
    if not computes_in(precision, device):
        processor = "GPU" if device.type == "cuda" else "CPU"
        log(f"--precision {precision}: this {processor} has no instructions for it; training in fp32")
        precision = "fp32"
    settings = {"alpha": alpha, "beta": beta, "precision": precision}
    if not cuda_graphs:
        return partial(forward_backward, **settings)
    return GraphedPass(partial(forward_backward, **settings, keep_grads=True), backend)


@torch.no_grad()
def evaluate(model, source, bptt):
    """Compute the cross entropy over `source` (N, B), in nats per predicted token.

    The hidden state is carried along, from chunk to chunk of `bptt` rows. On a GPU chunks are longer if MAX_VALUES
    allows, and the CPU waits once, at the end. The widest activation has as many columns as the longest parameter has
    rows: the logits, or with few words the gates of a layer.

    No loss of a chunk is kept as a tensor of its own. It would leave a gap in the heap, too small for the next logits.
    """
    model.eval()
    hidden = model.init_hidden(source.size(1))
    if source.is_cuda:
        bptt = max(bptt, MAX_VALUES // (source.size(1) * max(map(len, model.parameters()))))
    total = source.new_zeros((), dtype=torch.float64)
    for row in range(0, len(source) - 1, bptt):
        words, targets = get_batch(source, row, bptt)
        output, hidden, _ = model(words, hidden)
        total += len(words) * model.loss(output, targets).double()
    return total.item() / (len(source) - 1)
