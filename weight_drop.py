"""Weight drop (DropConnect) on the weights of any module, black-box cuDNN recurrences included.

An elementwise Bernoulli mask on the hidden-to-hidden matrix, rescaled by 1/(1 - p). It is drawn once per forward pass,
so it is the same at every time step.

Paper: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182), section 2.
"""

from torch.func import functional_call

from locked_dropout import dropout_mask


def weight_drop(module, name, p, *inputs):
    """Run `module(*inputs)` with its parameter `name` dropped at rate `p`, while the module is in training mode.

    The parameter itself is neither changed nor renamed: the pass sees `parameter * mask`. Autograd carries the gradient
    through that product, so it reaches the parameter where the mask kept it and nowhere else.

    `functional_call`, instead of an assignment to the module, puts the parameter back even when the pass raises.
    `torch.nn.LSTM` notices the exchange, there and back, and hands cuDNN the dropped weights in one buffer.
    """
    if not module.training or p == 0:
        return module(*inputs)
    weight = module.get_parameter(name)
    dropped = weight * dropout_mask(weight, weight.shape, p)
    return functional_call(module, {name: dropped}, inputs)
