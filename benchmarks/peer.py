"""Train the model that others train on a book on a CPU: a small transformer, as nanoGPT's README does it.

    python benchmarks/peer.py --data shakespeare.txt --save peer.metrics.jsonl

Written anew in plain PyTorch from the recipe's published settings: 4 layers, 4 heads, 128 wide, 64 characters of
context, batches of 12, 2,000 steps of AdamW, no dropout. The first 90% of the text are for training. The loss is that
of all the rest, each piece of 64 characters read by itself, as the recipe's own estimate samples it. The time of
training is the unit of budgets in `quality.py`.
"""

import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
from data import Corpus, load_split
from errors import BadInput
from files import check_writable
from flags import Parser, positive_int, seed
from metrics import Metrics, describe_run, format_loss, loss_metrics, parse_lines
from process import run_script

LAYERS, HEADS, WIDTH, CONTEXT, BATCH = 4, 4, 128, 64, 12
LR, LAST_LR, WARM_UP, DECAY, BETAS, CLIP = 1e-3, 1e-4, 100, 0.1, (0.9, 0.99), 1.0


class Block(nn.Module):
    """Apply attention and a feed-forward layer to x (B, T, WIDTH), each with its residual."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.attention, self.output = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        parts = self.attention(self.norm_1(x)).chunk(3, 2)
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """Model V = `ntoken` tokens; the softmax shares its weight with the embedding."""

    def __init__(self, ntoken):
        super().__init__()
        self.tokens, self.places = nn.Embedding(ntoken, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, 0, 0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, tokens):
        """Compute the logits (B, T, V) of what follows each of tokens (B, T)."""
        x = self.tokens(tokens) + self.places.weight[:tokens.size(1)]
        return self.norm(self.blocks(x)) @ self.tokens.weight.t()

    def loss(self, tokens):
        """Compute the mean cross entropy, nats per token, of tokens (B, T + 1) after the first of each row."""
        return functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def rate(step, steps):
    """Return the learning rate of a step: it rises, then falls as a cosine."""
    if step < WARM_UP:
        return LR * (step + 1) / (WARM_UP + 1)
    return LAST_LR + (LR - LAST_LR) * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


@torch.no_grad()
def evaluate(model, ids):
    """Compute the loss over ids (N,) in pieces of CONTEXT tokens."""
    pieces = ids[:(len(ids) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    return sum(len(part) * model.loss(part).item() for part in pieces.split(256)) / len(pieces)


def train(model, ids, valid, steps, every, metrics):
    """Train `model` for `steps` on ids (N,); returns the loss over ids `valid`.

    Writes a line of kind "epoch" to `metrics` after each `every`. Its seconds leave validation out.
    """
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY},
                                   {"params": vectors, "weight_decay": 0}], betas=BETAS)
    seconds = before = 0.0
    for step in range(steps):
        start = time.perf_counter()
        first = torch.randint(len(ids) - CONTEXT, (BATCH, 1))
        loss = model.loss(ids[first + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.step()
        seconds += time.perf_counter() - start
        if (step + 1) % every == 0 or step + 1 == steps:
            score = evaluate(model, valid)
            metrics.write("epoch", epoch=step + 1, seconds=seconds - before, total_tokens=(step + 1) * BATCH * CONTEXT,
                          train_loss=loss.item(), **loss_metrics(score))
            before = seconds
            print(f"| step {step + 1:5d} | {seconds:6.1f} s | {format_loss('valid', score)}", flush=True)
    return score


def is_record(path):
    """Return whether the file at `path` begins as a record that this script wrote."""
    with open(path, "rb") as file:
        records, _ = parse_lines([file.readline()])
    return any(line["kind"] == "run" and line.get("stage") == "peer" for line in records)


def main():
    parser = Parser(description="Train a small transformer on a text, as a peer to compare with.")
    parser.add_argument("--data", required=True, metavar="FILE", help="a text file")
    parser.add_argument("--save", required=True, metavar="FILE", help="where the record goes")
    parser.add_argument("--steps", type=positive_int, default=2000, metavar="N", help="steps (default: %(default)s)")
    parser.add_argument("--every", type=positive_int, default=250, metavar="N",
                        help="steps between validations (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1337, metavar="N", help="random seed (default: %(default)s)")
    args = parser.parse_args()
    check_writable(args.save)
    if Path(args.save).exists() and not is_record(args.save):
        raise BadInput(f"--save {args.save}: is there already, and is no record of this script")
    corpus = Corpus(args.data, "char", (90, 10))
    print(corpus.describe())
    ids, valid = (load_split(corpus, split, 1, "cpu", CONTEXT + 1).flatten().long() for split in ("train", "valid"))
    torch.manual_seed(args.seed)
    Path(args.save).unlink(missing_ok=True)
    metrics = Metrics(args.save)
    model = Transformer(len(corpus.dictionary))
    parameters = sum(weight.numel() for weight in model.parameters())
    metrics.write("run", stage="peer", **describe_run(vars(args), parameters, torch.device("cpu")))
    loss = train(model, ids, valid, args.steps, args.every, metrics)
    metrics.write("test", epochs=args.steps, finished=True, valid_loss=loss)


if __name__ == "__main__":
    run_script(main)
