"""The optimizers: SGD, averaged SGD with its trigger and its averages, Adam.

Paper: "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182), section 3 (NT-ASGD).
"""

from contextlib import contextmanager

import torch


def make_optimizer(name, model, lr, wdecay):
    """Make the optimizer `name` ("sgd", "asgd" or "adam") over every trainable parameter of `model`.

    ASGD averages from the start (t0 = 0; in PyTorch's the second step overwrites the first) and never decays the
    learning rate (lambd = 0). PyTorch's ASGD steps with the learning rate that it was given one step earlier; under
    variable-length BPTT that is the rate scaled for the batch before. The published numbers were made that way, so it
    is kept. On a GPU ASGD has to be "capturable" and Adam fused, or they wait for the GPU for each parameter.
    """
    cuda = next(model.parameters()).is_cuda
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=wdecay, fused=True)  # half the time, on a CPU
    if name == "asgd":
        return torch.optim.ASGD(model.parameters(), lr=lr, t0=0, lambd=0.0, weight_decay=wdecay, capturable=cuda)
    return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=wdecay, fused=cuda or None)


def is_averaging(optimizer):
    return isinstance(optimizer, torch.optim.ASGD)


@contextmanager
def averaged_weights(optimizer):
    """`with averaged_weights(optimizer)`: the parameters hold their ASGD averages, and afterwards their own values.

    They are put back when the block raises, too. Under another optimizer nothing changes.
    """
    averages = {}
    if is_averaging(optimizer):
        averages = {parameter: state["ax"] for parameter, state in optimizer.state.items()}
    current = {parameter: parameter.detach().clone() for parameter in averages}
    try:
        for parameter, average in averages.items():
            parameter.data.copy_(average)
        yield
    finally:
        for parameter, value in current.items():
            parameter.data.copy_(value)


def at_plateau(history, nonmono):
    """Return whether training has stopped getting better: the non-monotonic trigger.

    It has when the last of the validation losses `history` is worse than the best of those at least `nonmono` + 1
    epochs older. The authors corrected Algorithm 1 of 1708.02182 to this in their code.
    """
    earlier = history[:-1]
    return len(earlier) > nonmono and history[-1] > min(earlier[:len(earlier) - nonmono])
