"""Make the optimizers: SGD, Adam, and averaged SGD with its trigger and its averages.

Paper: "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182), section 3 (NT-ASGD).
"""

from contextlib import contextmanager

import torch
from torch.nn.utils import clip_grads_with_norm_


class ASGD(torch.optim.ASGD):
    """Compute PyTorch's ASGD with lambd = 0 on a GPU, in a third of its passes over memory.

    Step, rate and weight of the average lie on the CPU, as tensors that round as PyTorch's do, so no step waits for the
    GPU. All parameters have made equally many steps.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.state[parameter] for parameter in parameters]
            for parameter, state in zip(parameters, states):
                if not state:
                    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
                    state["step"], state["mu"] = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
                    state["eta"], state["ax"] = torch.tensor(group["lr"], dtype=dtype), torch.zeros_like(parameter)
            gradients, averages = [p.grad for p in parameters], [state["ax"] for state in states]
            torch._fused_sgd_(parameters, gradients, [], weight_decay=group["weight_decay"], momentum=0.0,
                              lr=states[0]["eta"].item(), dampening=0.0, nesterov=False, maximize=False,
                              is_first_step=False, grad_scale=getattr(self, "grad_scale", None),
                              found_inf=getattr(self, "found_inf", None))
            torch._foreach_lerp_(averages, parameters, states[0]["mu"].item())
            for state in states:
                state["step"] += 1
                state["eta"].fill_(group["lr"])
                state["mu"].fill_(1 / max(1, state["step"].item() - group["t0"]))

    def __setstate__(self, state):  # called by load_state_dict and by unpickling in another process
        super().__setstate__(state)
        for values in self.state.values():
            values.update({name: values[name].cpu() for name in ("step", "eta", "mu")})


def guard(optimizer, loss_and_norm, clip):
    """Let the next step of a fused `optimizer` clip the gradient, and do nothing where loss or norm is not finite.

    `loss_and_norm` (2,) stays on the GPU: nothing waits for it. `clip` is the largest norm (0: no clipping). The
    attributes are those that PyTorch's GradScaler sets. They are in fp32, which is not enough for weights in float64.
    """
    optimizer.found_inf = (loss_and_norm.sum() * 0).ne(0).float()  # inf * 0 is NaN, and NaN is not 0
    optimizer.grad_scale, norm = None, loss_and_norm[1]
    if clip and norm.dtype == torch.float32:
        optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1)  # a divisor
    elif clip:
        clip_grads_with_norm_(optimizer.param_groups[0]["params"], clip, norm)


def make_optimizer(name, model, lr, wdecay):
    """Make the optimizer `name` ("sgd", "asgd" or "adam") over every trainable parameter of `model`.

    How ASGD is set:

    - It averages from the start (t0 = 0). In PyTorch's ASGD the second step has weight 1, and replaces the first.
    - It never decays the learning rate (lambd = 0).
    - It steps with the learning rate of the step before, as PyTorch's ASGD does. Under variable-length BPTT that rate
      is scaled for the batch before. The published numbers were made that way, so it is kept.

    On a GPU all are fused, so that `guard` works and nothing waits for the GPU. On a CPU fused SGD takes half the
    time.
    """
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=wdecay, fused=True)
    if name == "asgd":
        optimizer_class = ASGD if next(model.parameters()).is_cuda else torch.optim.ASGD
        return optimizer_class(model.parameters(), lr=lr, t0=0, lambd=0.0, weight_decay=wdecay)
    return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=wdecay, fused=True)


def is_averaging(optimizer):
    return isinstance(optimizer, torch.optim.ASGD)


@contextmanager
def restored_weights(parameters):
    """Yield copies of the `parameters`, and restore their values at the end, also when the block raises."""
    parameters = list(parameters)
    copies = [parameter.detach().clone() for parameter in parameters]
    try:
        yield copies
    finally:
        for parameter, value in zip(parameters, copies):
            parameter.data.copy_(value)


@contextmanager
def averaged_weights(optimizer):
    """Swap in the ASGD averages of the parameters inside `with averaged_weights(optimizer)`.

    Afterwards the parameters have their own values again, also when the block raises. Under another optimizer nothing
    changes.
    """
    averages = {}
    if is_averaging(optimizer):
        averages = {parameter: state["ax"] for parameter, state in optimizer.state.items()}
    with restored_weights(averages):
        for parameter, average in averages.items():
            parameter.data.copy_(average)
        yield


def at_plateau(history, nonmono):
    """Return whether training has stopped getting better: the non-monotonic trigger.

    `history` are the validation losses. The last is compared with those at least `nonmono` + 1 epochs older. It is a
    plateau when the last is worse than the best of these, even if an epoch in between was better. The authors corrected
    Algorithm 1 of 1708.02182 to this in their code.
    """
    earlier = history[:-1]
    return len(earlier) > nonmono and history[-1] > min(earlier[:len(earlier) - nonmono])
