"""Measure what a book's model is worth after some minutes, beside the model that others train on a CPU.

    python benchmarks/quality.py --data shakespeare.txt --folder quality

Trains the peer (`peer.py`) once. Its time T is the unit of the budgets. Then trains by `main.py --minutes`, for each
budget and seed, with no flag that says sizes. What is there already is not made again. Prints a table of the records in
the folder, and draws the curves.

With --on-top each model is also scored with the neural cache and by dynamic evaluation. There is no test split, so the
best setting of a small grid is chosen on the text that it is reported on.
"""

import argparse
import statistics
import sys
from itertools import chain
from pathlib import Path

from records import is_done, records
from scripts import run_whole

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
import plot
from flags import Parser, positive_float, seed
from process import run_script
from run_files import last_path, metrics_path

# What the table says of a model.
SIZES = ("model", "nlayers", "nhid", "emsize", "batch_size", "optimizer", "lr", "dropout", "wdrop")
# What is scored on top of a trained model: the kind of the record, the column of the table, and the grid.
ON_TOP = {"pointer": ("cache", "--no-cuda --window 500 2000 --theta 0.3 0.6 1 --lambdasm 0.02 0.05 0.1"),
          "dynamic": ("dynamic", "--no-cuda --resume --fast --bptt 20 --lr 3e-5 1e-4 3e-4 --lamb 0.01 0.1")}
SAME_TEXT = "the best setting of a grid, chosen on the text that is reported, since there is no test split"


def parse_flags():
    parser = Parser(description="Measure loss over time, beside a peer.")
    parser.add_argument("--data", required=True, metavar="FILE", help="a text file")
    parser.add_argument("--folder", required=True, metavar="DIR", help="where runs and picture go")
    parser.add_argument("--budgets", type=positive_float, nargs="+", default=[0.25, 1, 4, 20], metavar="X",
                        help="times of a run, in times of the peer (default: 0.25 1 4 20)")
    parser.add_argument("--seeds", type=seed, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--on-top", action="store_true", help="also score each run with cache and dynamic evaluation")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of main.py, the last ones")
    return parser.parse_args()


def train_peer(data, folder):
    """Train the peer unless it is there. Returns its seconds and the path of its record."""
    path = folder / "peer.metrics.jsonl"
    if not is_done(path):
        run_whole("benchmarks/peer.py", "--data", data, "--save", path)
    return sum(line["seconds"] for line in records(path, "epoch")), path


def train(data, folder, budget, seconds, number, flags):
    """Train for `budget` times `seconds`, unless that is done, or go on with it. Returns the path of the model."""
    save = folder / f"{budget:g}T.seed{number}.pt"
    if is_done(metrics_path(save)):
        return save
    if last_path(save).exists():
        run_whole("main.py", "--resume", save, "--no-cuda")
    else:
        minutes = f"{budget * seconds / 60:.3f}"
        run_whole("main.py", "--data", data, "--shares", 90, 10, "--minutes", minutes, "--seed", number,
                  "--save", save, "--no-cuda", *flags)  # as the peer
    return save


def score_on_top(save):
    """Score the model at `save` in the ways of ON_TOP that its record does not have."""
    for kind, (_, grid) in ON_TOP.items():
        if scored(metrics_path(save), kind) is None:
            run_whole(f"{kind}.py", "--save", save, *grid.split())


def scored(path, kind):
    """Return the validation loss that the record at `path` has last for a kind of ON_TOP; None where it has none."""
    losses = [line["loss"] for line in records(path, kind) if line["split"] == "valid"
              and ("window" in line) == (kind == "pointer")]  # not dynamic evaluation with the cache
    return losses[-1] if losses else None


def format_cell(loss):
    return "-" if loss is None else f"{loss:.3f}"


def rows(paths, budgets):
    """Yield the lines of a table of the runs: `paths` are lists of records, one for each budget.

    It has the columns of ON_TOP that a record has.
    """
    kinds = [kind for kind in ON_TOP if any(scored(path, kind) is not None for path in chain(*paths))]
    titles = ["budget", "minutes", "epochs", "loss of each seed", *(ON_TOP[kind][0] for kind in kinds)]
    yield f"| {' | '.join(titles)} | what was chosen |"
    yield f"|---:|---:|---:|---|{'---|' * len(kinds)}---|"
    for budget, records_of_budget in zip(budgets, paths):
        tests = [records(path, "test")[-1] for path in records_of_budget]
        flags = records(records_of_budget[0], "run")[-1]["flags"]
        columns = [[test["valid_loss"] for test in tests]]
        columns += [[scored(path, kind) for path in records_of_budget] for kind in kinds]
        cells = " | ".join(", ".join(map(format_cell, column)) for column in columns)
        epochs = statistics.mean(test["epochs"] for test in tests)
        chosen = " ".join(f"--{name} {flags[name]}" for name in SIZES)
        yield f"| {budget:g} T | {flags['minutes']:.1f} | {epochs:.1f} | {cells} | `{chosen}` |"
    if kinds:
        yield f"\n{' and '.join(ON_TOP[kind][0] for kind in kinds)}: {SAME_TEXT}"


def main():
    args = parse_flags()
    folder, data = Path(args.folder).resolve(), Path(args.data).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    seconds, peer = train_peer(data, folder)
    paths = []
    for budget in args.budgets:
        paths.append([])
        for number in args.seeds:
            save = train(data, folder, budget, seconds, number, args.flags)
            if args.on_top:
                score_on_top(save)
            paths[-1].append(metrics_path(save))
    loss = records(peer, "epoch")[-1]["loss"]
    print(f"\nthe peer: {loss:.3f} nats per token after T = {seconds:.0f} s\n")
    print("\n".join(rows(paths, args.budgets)))
    drawn = [peer, *(of_budget[0] for of_budget in paths)]
    plot.draw(drawn, folder / "quality.png", "minutes", "loss", log_axis=False, log_x=True)


if __name__ == "__main__":
    run_script(main)
