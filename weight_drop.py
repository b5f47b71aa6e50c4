"""Weight drop (DropConnect) on the weights of any module, black-box cuDNN recurrences included.

Paper: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models", section 2: an elementwise Bernoulli
mask on the hidden-to-hidden matrix, drawn once per forward pass and so the same at every time step, rescaled by
1/(1 - p).
"""

from torch.func import functional_call

from locked_dropout import dropout_mask


def weight_drop(module, name, p, *inputs):
    """Run `module(*inputs)` with its parameter `name` dropped at rate `p`, while the module is in training mode.

    The parameter itself is neither changed nor renamed: the pass sees `parameter * mask`, and autograd carries the
    gradient through that product, so it reaches the parameter where the mask kept it and nowhere else.
    `functional_call` rather than an assignment to the module: it puts the parameter back even when the pass raises,
    and `torch.nn.LSTM` notices the exchange (and back again) and hands cuDNN the dropped weights in one piece.
    """
    if not module.training or p == 0:
        return module(*inputs)
    weight = module.get_parameter(name)
    dropped = weight * dropout_mask(weight, weight.shape, p)
    return functional_call(module, {name: dropped}, inputs)
