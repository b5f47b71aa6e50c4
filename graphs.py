"""CUDA graphs around the forward and backward pass of training, one for each length of batch.

At the sizes of the papers a pass is thousands of kernels of some microseconds each, and a current GPU waits for Python
to launch them. A graph launches all of them at once. It holds the addresses that it was captured with, so inputs are
copied to where they were then, parameters must not move (`RNNModel.keep_still`), and gradients have to be zeroed where
they lie. Random numbers are drawn anew in every replay. Optimizer, clipping and the look at the loss, some tens of
kernels, stay outside: they change with the optimizer and the learning rate, the graphs do not.
"""

import torch

from utils import map_hidden


class CudaGraphs:
    """How `GraphedPass` runs and captures a function on the GPU: on one stream, with one memory pool for all graphs.

    One graph may write where another left its result: that has to be copied before the next replay.
    """

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, function):
        """Call `function` on the stream of the captures, as PyTorch asks of what comes before one."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, function):
        """A function that replays `function`, and the result of it, which each replay writes anew."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = function()
        return graph.replay, result


class GraphedPass:
    """`training.gradients`, or another function of its signature, as replays of graphs, for one model in training mode
    and one set of flags.

    A length that is met for the first time is run as it is: what it needs is compiled and loaded by then, which a
    capture does not allow. The second time it is captured. So lengths that do not come again cost no graph.
    """

    def __init__(self, function, backend=None):
        self.function, self.backend = function, backend or CudaGraphs()
        self.met, self.graphs = set(), {}

    def __call__(self, model, words, targets, hidden, args):
        """As `training.gradients`. What it returns is the caller's: the next call does not write there."""
        tensors = (words, targets, hidden)
        if words.shape not in self.met:
            self.met.add(words.shape)
            return self.backend.run(lambda: self.function(model, *tensors, args))
        if words.shape not in self.graphs:
            inputs = map_hidden(torch.clone, tensors)
            self.graphs[words.shape] = (inputs, *self.backend.capture(lambda: self.function(model, *inputs, args)))
        inputs, replay, result = self.graphs[words.shape]
        copy_hidden(tensors, inputs)
        replay()
        return map_hidden(torch.clone, result)


def copy_hidden(source, target):
    """Copy the tensors of `source` into those of `target`, both nested as hidden states are."""
    if isinstance(source, torch.Tensor):
        target.copy_(source)
        return
    for part, place in zip(source, target):
        copy_hidden(part, place)
