"""Make the optimizers: SGD, Adam, and averaged SGD with its trigger and its averages.

Paper: "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182), section 3 (NT-ASGD).
"""

from contextlib import contextmanager

import torch


def make_optimizer(name, model, lr, wdecay):
    """Make the optimizer `name` ("sgd", "asgd" or "adam") over every trainable parameter of `model`.

    How ASGD is set:

    - It averages from the start (t0 = 0). In PyTorch's, the second step overwrites the first.
    - It never decays the learning rate (lambd = 0).
    - It steps with the learning rate of the step before, as PyTorch's ASGD does. Under variable-length BPTT that rate
      is scaled for the batch before. The published numbers were made that way, so it is kept.

    On a GPU ASGD has to be "capturable" and Adam fused. Otherwise they wait for the GPU for each parameter. On a CPU
    fused SGD takes half the time.
    """
    cuda = next(model.parameters()).is_cuda
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=wdecay, fused=True)
    if name == "asgd":
        return torch.optim.ASGD(model.parameters(), lr=lr, t0=0, lambd=0.0, weight_decay=wdecay, capturable=cuda)
    return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=wdecay, fused=True)


def is_averaging(optimizer):
    return isinstance(optimizer, torch.optim.ASGD)


@contextmanager
def averaged_weights(optimizer):
    """Let the parameters hold their ASGD averages inside `with averaged_weights(optimizer)`.

    Afterwards they hold their own values again, also when the block raises. Under another optimizer nothing changes.
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

    `history` are the validation losses. The last is compared with those at least `nonmono` + 1 epochs older. It is a
    plateau when the last is worse than the best of these. The authors corrected Algorithm 1 of 1708.02182 to this in
    their code.
    """
    earlier = history[:-1]
    return len(earlier) > nonmono and history[-1] > min(earlier[:len(earlier) - nonmono])
