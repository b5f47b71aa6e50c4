"""Drop weights (DropConnect) of any module, black-box cuDNN recurrences included.

The mask is elementwise Bernoulli on the hidden-to-hidden matrix, rescaled by 1/(1 - p). It is drawn once per forward
pass, so it is the same at every time step.

Paper: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182), section 2.
"""

from torch.func import functional_call

from locked_dropout import dropout_mask
from padding import GPULayer


def weight_drop(module, name, p, *inputs):
    """Run `module(*inputs)` with its parameter `name` dropped at rate `p`, in training mode only.

    The parameter itself is neither changed nor renamed. The pass sees `parameter * mask`. The gradient goes through
    that product, so it reaches the parameter only where the mask kept it.

    On a GPU the layers of this project multiply by the mask themselves, while they copy their weights. Elsewhere
    `functional_call` puts the parameter back even when the pass raises. An assignment to the module would not.
    """
    if not module.training or p == 0:
        return module(*inputs)
    weight = module.get_parameter(name)
    mask = dropout_mask(weight, weight.shape, p)
    if isinstance(module, GPULayer) and module.pads(inputs[0]):
        return module(*inputs, mask)
    return functional_call(module, {name: weight * mask}, inputs)
