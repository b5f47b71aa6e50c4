"""Run the forward and backward pass of training as CUDA graphs, one for each length of batch.

At the sizes of the papers a pass is thousands of very short kernels. A current GPU waits for Python to launch them. A
graph launches all of them at once.

A graph holds the addresses that it was captured with. This has three consequences:

- Inputs are copied to where they were at the capture.
- Parameters must not move, and in training none does (`padding.GPULayer`).
- Gradients are zeroed where they lie.

Random numbers are drawn anew in every replay. Clipping, the optimizer and the check of the loss stay outside, so a
graph serves any optimizer and learning rate.
"""

import torch

from utils import map_hidden


class CudaGraphs:
    """Run and capture functions on the GPU, on one stream, with one memory pool for all graphs.

    One graph may write where another left its result, so a result has to be copied before the next replay.
    """

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, function):
        """Call `function` on the stream of the captures.

        PyTorch requires this for work that comes before a capture.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, function):
        """Capture `function` as a graph.

        Returns a function that replays it, and its result, which each replay overwrites.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = function()
        return graph.replay, result


class GraphedPass:
    """Run forward and backward of one model in training mode as replays of CUDA graphs.

    `function(model, tokens, targets, hidden)` is `steps.forward_backward` bound to its settings, with keep_grads=True.
    `backend` (default: `CudaGraphs`) runs and captures.

    The first batch of each length runs eagerly as warm-up. The second is captured. Later ones are replayed. The warm-up
    compiles and loads what the length needs, which a capture does not allow. Lengths that come once cost no graph.
    """

    def __init__(self, function, backend=None):
        self.function, self.backend = function, backend or CudaGraphs()
        self.seen, self.graphs = set(), {}

    def __call__(self, model, tokens, targets, hidden):
        """Return what `function` does, (hidden, loss_and_norm), in tensors that the next call leaves alone."""
        batch = (tokens, targets, hidden)
        if tokens.shape not in self.seen:
            self.seen.add(tokens.shape)
            return self.backend.run(lambda: self.function(model, *batch))
        if tokens.shape not in self.graphs:
            inputs = map_hidden(torch.clone, batch)
            self.graphs[tokens.shape] = (inputs, *self.backend.capture(lambda: self.function(model, *inputs)))
        inputs, replay, result = self.graphs[tokens.shape]
        copy_hidden(batch, inputs)
        replay()
        return map_hidden(torch.clone, result)


def copy_hidden(source, target):
    """Copy the tensors of `source` into those of `target`, both nested as hidden states are."""
    if isinstance(source, torch.Tensor):
        target.copy_(source)
        return
    for part, place in zip(source, target):
        copy_hidden(part, place)
