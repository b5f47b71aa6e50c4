"""Time training steps of small models beside the floor of their own matrix products.

    python benchmarks/small_steps.py

The floor is the time of the products alone, each at its own shape, as `@` does them. The products of the inputs and of
the softmax are done at once, the recurrent ones a time step at a time, in the backward pass likewise. Step and floor
take turns, and the medians are compared. A step can be below the floor, since PyTorch's LSTM packs its weight once for
all time steps.
"""

import statistics
import sys
from pathlib import Path

import torch
from timing import seconds

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
from device import set_up_device
from flags import Parser, positive_int
from model import DROPOUTS, RNNModel, layer_sizes
from optimizers import make_optimizer
from process import run_script
from steps import choose_pass, train_step

NTOKEN, T, B = 65, 64, 16
MODELS = (("LSTM", 64, 256, 2), ("LSTM", 256, 256, 1), ("LSTM", 384, 384, 1), ("LSTM", 512, 512, 1),
          ("GRU", 256, 256, 1), ("QRNN", 256, 256, 2))


def make_step(model, emsize, nhid, nlayers):
    """Make a function that takes one training step of a model with these flags."""
    network = RNNModel(NTOKEN, model, emsize, nhid, nlayers, **{**dict.fromkeys(DROPOUTS, 0), "dropouth": 0.1}).train()
    optimizer, forward_backward = make_optimizer("adam", network, 1e-3, 0), choose_pass(network, "fp32", 0, 0)
    tokens, hidden = torch.randint(NTOKEN, (T, B)), network.init_hidden(B)
    return lambda: train_step(network, optimizer, forward_backward, tokens, tokens, hidden, 1, 1)


def make_floor(model, emsize, nhid, nlayers):
    """Make a function that computes the matrix products of such a step and nothing else."""
    gates, sizes = {"LSTM": 4, "GRU": 3, "QRNN": 3}[model], layer_sizes(emsize, nhid, nlayers, tied=True)
    whole, stepwise = [(emsize, NTOKEN)], []  # (inputs, outputs) of products over all time steps, and over one
    for layer, (size, hidden) in enumerate(zip(sizes, sizes[1:])):
        whole.append((size * (2 if model == "QRNN" and layer == 0 else 1), gates * hidden))
        if model != "QRNN":
            stepwise.append((hidden, gates * hidden))
    whole = [(torch.randn(T * B, n), torch.randn(m, n), torch.randn(T * B, m)) for n, m in whole]
    stepwise = [(torch.randn(T, B, n), torch.randn(m, n), torch.randn(T, B, m)) for n, m in stepwise]

    def products():
        for x, weight, grad in whole:
            x @ weight.t(), grad @ weight, grad.t() @ x
        for x, weight, grad in stepwise:
            for x_t, grad_t in zip(x, grad):
                x_t @ weight.t(), grad_t @ weight
            grad.flatten(0, 1).t() @ x.flatten(0, 1)
    return products


def main():
    parser = Parser(description="Time steps of small models beside the floor of their products.")
    parser.add_argument("--repetitions", type=positive_int, default=30, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    set_up_device(cuda=False)  # as the commands do
    print(f"{torch.get_num_threads()} threads, B = {B}, T = {T}, V = {NTOKEN}, fp32, Adam\n")
    print("| model | emsize / nhid x nlayers | step, ms | floor, ms | floor / step | tokens/s |")
    print("|---|---|---:|---:|---:|---:|")
    for model, emsize, nhid, nlayers in MODELS:
        flags = model, emsize, nhid, nlayers
        step, floor = make_step(*flags), make_floor(*flags)
        times = [(seconds(step), seconds(floor)) for _ in range(args.repetitions + 3)][3:]
        step_ms, floor_ms = (1000 * statistics.median(column) for column in zip(*times))
        print(f"| {model} | {emsize} / {nhid} x {nlayers} | {step_ms:.1f} | {floor_ms:.1f} | "
              f"{floor_ms / step_ms:.0%} | {1000 * T * B / step_ms:,.0f} |")


if __name__ == "__main__":
    run_script(main)
