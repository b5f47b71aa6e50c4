"""Reproduce a row of the papers: every stage of its recipe, and the row of figures that comes out.

    python benchmarks/reproduce.py ptb-qrnn                        (make reproduce ROW=ptb-qrnn)
    python benchmarks/reproduce.py ptb-qrnn --minutes 8            (stops in time; the same command goes on from there)

The stages are training, fine-tuning, the cache with the published setting and with the best of a grid, and dynamic
evaluation. All files of a row lie in `runs/ROW`. The row is made from the metrics there and from nothing else.

Training that was stopped goes on with the next batch. Dynamic evaluation repeats the pass that it was in, the cache its
stage.
"""

import math
import shlex
import signal
import sys
import time
from itertools import zip_longest
from pathlib import Path

from recipes import GRID, RECIPES
from records import is_end, records
from scripts import ROOT, flags_of, run
from table import perplexity, rows

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
import finetune as finetune_script
import main as train_script
from errors import BadInput
from files import replacing
from flags import Parser, positive_float
from process import run_script
from run_files import last_path, metrics_path

# The stages after training, and their scripts.
SCORES = {"cache": "pointer.py", "grid": "pointer.py", "dynamic": "dynamic.py", "both": "dynamic.py"}
MARGIN = 20  # seconds, at most a quarter of the time, that scripts get to finish a batch and write their state


def records_of(save):
    """Read the record of the run whose best model is at `save`; empty before there is one."""
    return records(ROOT / metrics_path(save))


def is_done(stage, folder):
    """Return whether a stage has come to its end."""
    lines = records_of(folder / f"{stage if stage in ('train', 'finetune') else 'finetune'}.pt")
    if stage in ("train", "finetune"):
        return any(map(is_end, lines))
    if stage == "grid":
        return any(line["kind"] == "grid" for line in lines)
    return bool(scored(lines, stage))


def scored(lines, stage):
    """List (validation, test) perplexities of a stage after training; those of the grid are among the cache's."""
    return [(valid, test) for name, _, valid, test, _ in rows(lines) if name == stage]


def command(stage, recipe, folder, extra):
    """Return the command that begins a stage, or goes on with it."""
    save = folder / f"{stage}.pt"
    if stage in SCORES:
        flags = GRID if stage == "grid" else recipe[stage]
        resume = ["--resume"] if SCORES[stage] == "dynamic.py" else []
        return [SCORES[stage], "--save", str(folder / "finetune.pt"), *resume, *shlex.split(flags)]
    script = {"train": "main.py", "finetune": "finetune.py"}[stage]
    if (ROOT / last_path(save, stage)).exists():
        return [script, "--resume", str(save), *extra]
    load = ["--load", str(folder / "train.pt")] if stage == "finetune" else []
    return [script, *shlex.split(recipe[stage]), *extra, *load, "--save", str(save)]


def check_extra(extra, recipe, folder):
    """Raise BadInput when a script does not take the flags `extra`, or the run in `folder` began with others."""
    for stage, script in (("train", train_script), ("finetune", finetune_script)):
        if stage in recipe:
            script.parse_flags(shlex.split(recipe[stage]) + extra)
    path, said = ROOT / folder / "extra.txt", shlex.join(extra)
    begun = path.read_text(encoding="utf-8") if path.exists() else ""
    if begun != said and records_of(folder / "train.pt"):
        raise BadInput(f"{folder}: began with {f'--extra={begun!r}' if begun else 'no --extra'}; another --folder "
                       "begins anew")
    with replacing(path) as file:
        file.write(said.encode())


def deadline_in(minutes):
    """Return when to stop, by the monotonic clock, so that all ends within `minutes`; None without a limit."""
    return minutes and time.monotonic() + 60 * minutes - min(MARGIN, 15 * minutes)


def finish(arguments, deadline):
    """Run the script of a stage; returns whether it came to its end. If it fails, this script ends as it does."""
    status = run(arguments, deadline, folder=ROOT)
    if status not in (0, 128 + signal.SIGTERM):
        sys.exit(status)
    return status == 0


def row(name, folder):
    """Format the row for a table of results: figures of each stage beside the published ones."""
    recipe, cells = RECIPES[name], []
    lines, tuned = records_of(folder / "train.pt"), records_of(folder / "finetune.pt")
    ends, in_bpc = list(filter(is_end, [*lines, *tuned])), "bpc" in "".join(recipe["published"])
    for line in ends:
        valid, test = perplexity(line["valid_loss"]), perplexity(line.get("loss", math.nan))  # NaN without a test split
        cells.append(f"{math.log2(test):.3f} bpc" if in_bpc else f"{valid:.2f} / {test:.2f}")
    for stage in ("cache", "dynamic", "both"):
        cells += [f"{valid:.2f} / {test:.2f}" for valid, test in scored(tuned, stage)]
    begun = next(line for line in lines if line["kind"] == "run")
    minutes = sum(line["seconds"] for line in ends) / 60
    published = [*recipe["published"][:3], "", *recipe["published"][3:]]  # none for the grid
    pairs = [f"{cell} ({figure})" if figure else cell for cell, figure in zip_longest(cells, published[:len(cells)])]
    return " | ".join(["", name, *pairs, f"seed {begun['seed']}", f"commit {(begun['commit'] or 'unknown')[:7]}",
                       begun["device"], f"{minutes:,.0f} minutes", ""]).strip()


def main():
    parser = Parser(description="Reproduce a row of the papers.")
    parser.add_argument("row", choices=list(RECIPES))
    parser.add_argument("--minutes", type=positive_float, metavar="N", help="stop in time (default: run to the end)")
    parser.add_argument("--folder", type=Path, help="where the files go (default: runs/ROW)")
    parser.add_argument("--extra", type=flags_of, default=[], metavar="FLAGS",
                        help="further flags for training and fine-tuning: --extra=\"--epochs 2\"")
    args = parser.parse_args()
    deadline = deadline_in(args.minutes)
    folder = args.folder.resolve() if args.folder else Path("runs", args.row)  # the latter below ROOT, as all commands
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[args.row]
    check_extra(args.extra, recipe, folder)
    stages = [stage for stage in ("train", "finetune", *SCORES)
              if stage in recipe or (stage == "grid" and "cache" in recipe)]
    for stage in stages:
        if is_done(stage, folder):
            continue
        if not finish(command(stage, recipe, folder, args.extra), deadline):
            print(f"stopped in the stage {stage}; the same command goes on")
            return 0 if deadline and time.monotonic() >= deadline else 128 + signal.SIGTERM
    print(row(args.row, folder))
    return 0


if __name__ == "__main__":
    run_script(main)
