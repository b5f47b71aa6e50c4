"""Reproduce a row of the papers: every stage of its recipe, and the row of figures that comes out.

    python benchmarks/reproduce.py ptb-qrnn                        (make reproduce ROW=ptb-qrnn)
    python benchmarks/reproduce.py ptb-qrnn --minutes 8            (stops in time; the same command goes on from there)

Training, fine-tuning, and the cache with the published setting and with the best one of a grid. All files of a row lie
in `runs/ROW`; the row is made from the metrics there and from nothing else.
"""

import argparse
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARGIN = 20  # seconds, at most a quarter of the time, that a stage gets to finish its batch and write its state

PTB_LSTM = "--batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epochs 500"
PTB_LSTM_2017 = "--batch_size 20 --data data/penn --dropouti 0.4 --seed 28 --epochs 300"
PTB_QRNN = ("--model QRNN --batch_size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400 --dropouth 0.3 "
            "--dropouti 0.4 --data data/penn")
WT2_LSTM = "--epochs 750 --data data/wikitext-2 --dropouth 0.2 --seed 1882"
WT2_QRNN = ("--epochs 500 --data data/wikitext-2 --clip 0.25 --dropouti 0.4 --dropouth 0.2 --nhid 1550 --nlayers 4 "
            "--seed 4002 --model QRNN --wdrop 0.1 --batch_size 40")
SMALL_LSTM = ("--data data/penn --batch_size 20 --emsize 200 --nhid 400 --dropout 0.2 --dropouth 0.125 --dropouti 0.2 "
              "--dropoute 0.05 --precision bf16 --nonmono 0 --seed 141")
PTB_CACHE = "--lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000"
WT2_CACHE = "--lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000"
GRID = "--window 500 2000 3785 --theta 0.3 0.66 1 1.5 --lambdasm 0.05 0.1 0.15 0.2 0.3"

# Flags by stage, and what was published for train, finetune and cache: valid / test perplexity, or test bpc.
RECIPES = {
    "ptb-lstm": {"train": PTB_LSTM, "finetune": PTB_LSTM, "cache": PTB_CACHE,
                 "published": ["61.2 / 58.8", "58.8 / 56.5", "53.2 / 52.5"]},
    "ptb-qrnn": {"train": f"{PTB_QRNN} --seed 9001 --epochs 550", "finetune": f"{PTB_QRNN} --seed 404 --epochs 300",
                 "cache": PTB_CACHE, "published": ["60.6 / 58.3", "59.1 / 56.7", "53.4 / 52.6"]},
    "ptb-lstm-2017": {"train": PTB_LSTM_2017, "finetune": PTB_LSTM_2017, "cache": PTB_CACHE,
                      "published": ["60.7 / 58.8", "60.0 / 57.3", "53.9 / 52.8"]},
    "ptbc": {"train": "--epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0 "
                      "--dropouth 0.25 --dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 "
                      "--batch_size 128 --optimizer adam --lr 2e-3 --data data/pennchar --when 300 400",
             "published": ["1.175 bpc"]},
    "wt2-lstm": {"train": WT2_LSTM, "finetune": WT2_LSTM, "cache": WT2_CACHE,
                 "published": ["68.7 / 65.6", "67.4 / 64.7", "52.2 / 50.6"]},
    "wt2-qrnn": {"train": WT2_QRNN, "finetune": WT2_QRNN, "cache": WT2_CACHE,
                 "published": ["69.3 / 66.8", "68.5 / 65.9", "53.6 / 52.1"]},
    "enwik8": {"train": "--epochs 50 --nlayers 3 --emsize 400 --nhid 1840 --alpha 0 --beta 0 --dropoute 0 "
                        "--dropouth 0.1 --dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200 "
                        "--batch_size 128 --optimizer adam --lr 1e-3 --data data/enwik8 --when 25 35",
               "published": ["1.232 bpc"]},
    "wt103-qrnn": {"train": "--epochs 14 --nlayers 4 --emsize 400 --nhid 2500 --alpha 0 --beta 0 --dropoute 0 "
                            "--dropouth 0.1 --dropouti 0.1 --dropout 0.1 --wdrop 0 --wdecay 0 --bptt 140 "
                            "--batch_size 60 --optimizer adam --lr 1e-3 --data data/wikitext-103 --when 12 "
                            "--model QRNN",
                   "published": ["32.0 / 33.0"]},
    # No rows of the papers: a third of the size and half the dropouts, with and without weight drop, on two cores.
    "small": {"train": f"{SMALL_LSTM} --wdrop 0.25 --epochs 16", "finetune": f"{SMALL_LSTM} --wdrop 0.25 --epochs 3",
              "cache": PTB_CACHE, "published": ["", "", ""]},
    "small-no-wdrop": {"train": f"{SMALL_LSTM} --wdrop 0 --epochs 16", "finetune": f"{SMALL_LSTM} --wdrop 0 --epochs 3",
                       "cache": PTB_CACHE, "published": ["", "", ""]},
}


def metrics(save):
    """The lines of the metrics file beside the checkpoint `save`."""
    path = ROOT / save.with_suffix(".metrics.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def is_done(stage, folder):
    """Whether a stage has come to its end."""
    lines = metrics(folder / f"{'finetune' if stage in ('cache', 'grid') else stage}.pt")
    if stage in ("train", "finetune"):
        return any(line["kind"] == "test" and line["finished"] for line in lines)
    return any(line["kind"] == ("grid" if stage == "grid" else "pointer") for line in lines)  # written in the end


def command(stage, recipe, folder, extra):
    """The command that begins a stage, or goes on with it."""
    save = folder / f"{stage}.pt"
    if stage in ("cache", "grid"):
        flags = recipe["cache"] if stage == "cache" else GRID
        return ["pointer.py", "--save", str(folder / "finetune.pt"), *shlex.split(flags)]
    script = {"train": "main.py", "finetune": "finetune.py"}[stage]
    if (ROOT / save.with_name(f"{stage}.last.pt")).exists():
        return [script, "--resume", str(save)]
    load = ["--load", str(folder / "train.pt")] if stage == "finetune" else []
    return [script, *shlex.split(recipe[stage]), *extra, *load, "--save", str(save)]


def run(arguments, deadline):
    """Run a script until it ends or, at the deadline, is told to; returns whether it came to its end."""
    print("+", shlex.join(["python", *arguments]), flush=True)
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT)
    try:
        status = process.wait(deadline and max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()
        status = process.wait()
    if status not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
        sys.exit(status if status > 0 else 128 - status)
    return status == 0


def row(name, folder):
    """The row for a table of results: figures of each stage beside the published ones."""
    recipe, cells = RECIPES[name], []
    lines, tuned = metrics(folder / "train.pt"), metrics(folder / "finetune.pt")
    for stage in (lines, tuned):
        for line in stage:
            if line["kind"] == "test" and line["finished"]:
                words = f"{math.exp(line['valid_loss']):.2f} / {line['ppl']:.2f}"
                cells.append(f"{line['bpc']:.3f} bpc" if "bpc" in recipe["published"][0] else words)
    pointers = [line for line in tuned if line["kind"] == "pointer"]
    cells += [f"{valid['ppl']:.2f} / {test['ppl']:.2f}" for valid, test in zip(pointers[::2], pointers[1::2])]
    begun = next(line for line in lines if line["kind"] == "run")
    minutes = sum(line["seconds"] for line in [*lines, *tuned] if line["kind"] == "test" and line["finished"]) / 60
    published = [*recipe["published"], "" if "cache" in recipe else None]
    pairs = [f"{cell} ({there})" if there else cell for cell, there in zip(cells, published)]
    return " | ".join(["", name, *pairs, f"seed {begun['seed']}", f"commit {(begun['commit'] or 'unknown')[:7]}",
                       begun["device"], f"{minutes:,.0f} minutes", ""]).strip()


def main():
    parser = argparse.ArgumentParser(description="Reproduce a row of the papers.")
    parser.add_argument("row", choices=list(RECIPES))
    parser.add_argument("--minutes", type=float, help="stop in time (default: run to the end)")
    parser.add_argument("--folder", type=Path, help="where the files go (default: runs/ROW)")
    parser.add_argument("--extra", default="", metavar="FLAGS",
                        help="further flags for training and fine-tuning, for a smaller trial")
    args = parser.parse_args()
    seconds = args.minutes and 60 * args.minutes
    deadline = seconds and time.monotonic() + seconds - min(MARGIN, seconds / 4)
    folder = args.folder.resolve() if args.folder else Path("runs", args.row)  # the latter below ROOT, as all commands
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[args.row]
    stages = [stage for stage in ("train", "finetune", "cache", "grid")
              if stage in recipe or (stage == "grid" and "cache" in recipe)]
    for stage in stages:
        if not is_done(stage, folder) and not run(command(stage, recipe, folder, shlex.split(args.extra)), deadline):
            print(f"stopped in the stage {stage}; the same command goes on")
            return
    print(row(args.row, folder))


if __name__ == "__main__":
    main()
