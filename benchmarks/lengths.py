"""Measure what `main.py --minutes` makes of several texts, by characters and by words.

    python benchmarks/lengths.py --data small.txt large.txt --minutes 3 15 --folder lengths
    python benchmarks/lengths.py --report lengths                        (the table of the records in a folder)

Each text is trained on each level, for each time and seed, with no flag that says sizes. With --neighbours it is also
trained with the next smaller and the next larger layers than those that were chosen. What is there already is not made
again, and what was stopped goes on. The choice goes by the speed at that moment, so the machine must do nothing else.
"""

import re
import sys
from itertools import product
from pathlib import Path

from records import is_done, records
from scripts import run_whole

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
from flags import Parser, positive_float, seed
from metrics import loss_metrics
from process import run_script
from run_files import last_path, metrics_path
from sizes import LADDER, embedding_size

LEVELS = {"char": "", "word": "--min-count 2"}  # and further flags
SHOWN = ("nlayers", "nhid", "dropout", "wdrop", "batch_size", "optimizer", "lr")  # what the table says of a choice
NEIGHBOURS = {"smaller": -1, "larger": 1}  # layers on the ladder of the rules, from the chosen ones
RECORD = re.compile(r"(?P<text>.+)\.(?P<level>char|word)\.(?P<minutes>[\d.]+)min(?P<size>smaller|larger|)"
                    r"\.seed\d+\.metrics\.jsonl")


def parse_flags():
    parser = Parser(description="Measure what --minutes makes of several texts.")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="text files")
    parser.add_argument("--folder", metavar="DIR", help="where the runs go")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="default: char word")
    parser.add_argument("--minutes", type=positive_float, nargs="+", default=[3, 15], metavar="N", help="default: 3 15")
    parser.add_argument("--seeds", type=seed, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--neighbours", action="store_true", help="also smaller and larger layers than those chosen")
    parser.add_argument("--report", metavar="DIR", help="run nothing: the table of the records in a folder")
    args = parser.parse_args()
    if not args.report and not (args.data and args.folder):
        parser.error("--data and --folder are needed, or --report")
    if args.report and not read_runs(args.report):
        parser.error(f"--report {args.report}: there is no record of a finished run in it")
    if args.data and len({Path(path).stem for path in args.data}) < len(args.data):
        parser.error("--data: texts of one name would have one record")
    return args


def train(data, level, minutes, number, folder, which=""):
    """Train on the text `data`, unless that is done, or go on with it. Returns the path of the record.

    `which` is "", or a name of NEIGHBOURS. Where there is no such neighbour nothing is trained, and None returned.
    """
    save = folder / f"{data.stem}.{level}.{minutes:g}min{which}.seed{number}.pt"
    if is_done(metrics_path(save)):
        return metrics_path(save)
    if last_path(save).exists():
        run_whole("main.py", "--resume", save)
        return metrics_path(save)
    flags = ["--level", level, *LEVELS[level].split()]
    if which:
        size = neighbour(chosen(train(data, level, minutes, number, folder))["nhid"], which)
        if size is None:
            return None
        flags += ["--nhid", size, "--emsize", embedding_size(size, level)]
    run_whole("main.py", "--data", data, *flags, "--minutes", f"{minutes:g}", "--seed", number, "--save", save)
    return metrics_path(save)


def chosen(path):
    """Return the flags that the record at `path` begins with."""
    return records(path, "run")[-1]["flags"]


def neighbour(size, which):
    """Return the next smaller or larger number of units on the ladder of the rules; None where it ends."""
    rung = LADDER.index(size) + NEIGHBOURS[which]
    return LADDER[rung] if 0 <= rung < len(LADDER) else None


# --- the table -------------------------------------------------------------------------------------------------------

def read_runs(folder):
    """Read the finished runs in `folder`: {(text, level, minutes): {which size: [path of each seed]}}, in order."""
    runs = {}
    for path in sorted(Path(folder).glob("*.metrics.jsonl")):
        match = RECORD.fullmatch(path.name)
        if match and is_done(path):
            cell = match["text"], match["level"], float(match["minutes"])
            runs.setdefault(cell, {}).setdefault(match["size"], []).append(path)
    return {cell: runs[cell] for cell in sorted(runs)}


def table(runs):
    """Yield the lines of a table: what was chosen for each text, level and time, and what it came to."""
    yield "| text | level | minutes | epochs | chosen | valid / test of each seed | smaller | larger |"
    yield "|---|---|---:|---:|---|---|---|---|"
    for (text, level, minutes), by_size in runs.items():
        if "" in by_size:
            flags, epochs = chosen(by_size[""][0]), end(by_size[""][0])["epochs"]
            size = " ".join(f"--{name} {flags[name]}" for name in SHOWN)
            cells = [", ".join(scores(path, level) for path in by_size.get(which, [])) for which in ("", *NEIGHBOURS)]
            yield f"| {text} | {level} | {minutes:g} | {epochs:.1f} | `{size}` | {' | '.join(cells)} |"


def end(path):
    return records(path, "test")[-1]


def scores(path, level):
    """Format validation and test: bits per character, or perplexity by words."""
    metric = {"char": "bpc", "word": "ppl"}[level]
    return " / ".join(f"{loss_metrics(loss)[metric]:.4g}" for loss in (end(path)["valid_loss"], end(path)["loss"]))


def main():
    args = parse_flags()
    if not args.report:
        folder = Path(args.folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        sizes = ["", *(NEIGHBOURS if args.neighbours else {})]
        for minutes, number, data, level, which in product(args.minutes, args.seeds, args.data, args.levels, sizes):
            train(Path(data).resolve(), level, minutes, number, folder, which)
    print("\n".join(table(read_runs(args.report or folder))))


if __name__ == "__main__":
    run_script(main)
