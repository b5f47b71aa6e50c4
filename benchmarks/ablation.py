"""Take the parts of AWD-LSTM away one at a time, on a text that is small enough for the model to overfit.

    python benchmarks/ablation.py --data data/penn                            (make reproduce ROW=ablation)
    python benchmarks/ablation.py --data data/penn --minutes 60               (stops in time; the same command goes on)
    python benchmarks/ablation.py --report benchmarks/results                 (the table and the picture of records)

The rows are those of table 4 of arXiv 1708.02182, each by flags alone. The text is the first 100,000 words of the
training text, with the whole of validation and test. Every row is trained for the same number of epochs, well beyond
its switch to ASGD. The full model is also fine-tuned, which is the first row. All rows below the second are compared
with the second. A finished run is not repeated, nor one whose record was copied into the folder. A stopped run goes on.
The table comes from the records and from nothing else.
"""

import os
import shlex
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import torch
from records import is_end, records
from reproduce import ROOT, command, deadline_in, is_done
from table import rows

sys.path.insert(0, str(ROOT))  # the scripts of the project are no package
import plot
from curves import read_stages
from errors import BadInput
from files import replacing
from flags import Parser, positive_float, positive_int
from metrics import loss_metrics
from process import StopSignals, run_script
from run_files import metrics_path

WORDS = 100_000  # of the training text
SEEDS = (1, 2)
EPOCHS = 60      # of training
TUNING = 25      # epochs of fine-tuning at most; its plateau ends it
POLL = 0.5       # seconds between looks at the processes
STAGES = ("train", "finetune")

FULL = ("--batch_size 10 --lr 20 --emsize 200 --nhid 400 --nlayers 3 --dropout 0.4 --dropouth 0.25 --dropouti 0.4 "
        "--dropoute 0.1 --wdrop 0.5 --alpha 2 --beta 1 --wdecay 1.2e-6 --precision bf16")
NEVER = 10**6    # of --nonmono: no switch

# title, flags that differ, and what was published for PTB: perplexity on validation and test.
Row = namedtuple("Row", "title flags published")
ABLATION = {
    "full": Row("AWD-LSTM", "", (60.0, 57.3)),
    # The training stage of the full model.
    "no-finetuning": Row("fine-tuning", None, (60.7, 58.8)),
    # Plain SGD. Its learning rate is divided by 10 about when the others switch, and once more.
    "no-asgd": Row("NT-ASGD", f"--nonmono {NEVER} --when {3 * EPOCHS // 8} {5 * EPOCHS // 8}", (66.3, 63.7)),
    # Lengths around 700, or 350, are all capped at 70; with them the learning rate is scaled by 70 / 700.
    "no-lengths": Row("variable sequence lengths", "--bptt 700 --max-bptt 70 --lr 200", (61.3, 58.9)),
    "no-dropoute": Row("embedding dropout", "--dropoute 0", (65.1, 62.7)),
    "no-wdecay": Row("weight decay", "--wdecay 0", (63.7, 61.0)),
    "no-ar-tar": Row("AR/TAR", "--alpha 0 --beta 0", (62.7, 60.3)),
    # The embedding as large as the hidden layers.
    "full-embedding": Row("full-sized embedding", "--emsize 400", (68.0, 65.6)),
    "no-wdrop": Row("weight dropping", "--wdrop 0", (71.1, 68.9)),
}
TRAINED = [name for name, row in ABLATION.items() if row.flags is not None]


def source(name):
    """Return the row whose run has the figures of the row `name`, and their stage."""
    return name if name in TRAINED else "full", "finetune" if name == "full" else "train"


def base(name):
    """Return the row that the row `name` is compared with; None for the first."""
    return {"full": None, "no-finetuning": "full"}.get(name, "no-finetuning")


def recipe(name, seed, data, extra=""):
    """Spell the flags of each stage of a row, as in `recipes.RECIPES`; `extra` ones change all rows."""
    flags = f"--data {shlex.quote(str(data))} {FULL} {extra} {ABLATION[name].flags} --seed {seed}"
    stages = {"train": f"--epochs {EPOCHS} {flags} --min-count 1", "finetune": f"--epochs {TUNING} {flags}"}
    return stages if name == "full" else {"train": stages["train"]}


def cut_corpus(data, folder, words=WORDS):
    """Write the corpus of the ablation into `folder`: whole lines of the training text, with `words` words or more.

    Each line has an <eos>, which counts. Raises BadInput when another corpus is there, or `data` cannot be read.
    """
    try:
        splits = {split: (Path(data) / f"{split}.txt").read_bytes() for split in ("train", "valid", "test")}
    except OSError as error:
        raise BadInput(f"--data {data}: {error.filename} cannot be read: {error.strerror}") from error
    count, lines = 0, []
    for line in splits["train"].splitlines(True):
        if count >= words:
            break
        count += len(line.split()) + 1
        lines.append(line)
    splits["train"] = b"".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    for split, content in splits.items():
        path = folder / f"{split}.txt"
        if not path.exists():
            with replacing(path) as file:
                file.write(content)
        elif path.read_bytes() != content:
            raise BadInput(f"{path}: is not of the text {data}; another --folder begins anew")


def check_flags(folder, extra):
    """Raise BadInput when `folder` has runs with other flags, which would be taken for those of the table."""
    recipes = [recipe(name, SEEDS[0], "", extra) for name in TRAINED]
    said = "".join(f"{stage}: {flags}\n" for stages in recipes for stage, flags in stages.items())
    path = folder / "flags.txt"
    if path.exists() and path.read_text(encoding="utf-8") == said:
        return
    if any(folder.glob("*/train.metrics.jsonl")):
        raise BadInput(f"{path}: the runs there have other flags; another --folder begins anew")
    with replacing(path) as file:
        file.write(said.encode())


# --- the runs --------------------------------------------------------------------------------------------------------

def next_command(name, seed, folder, corpus, extra=""):
    """Return the command that begins the next stage of a run, or goes on with it; None when all is done."""
    stages, place = recipe(name, seed, corpus, extra), run_folder(folder, name, seed)
    for stage in stages:
        if not is_done(stage, place):
            return command(stage, stages, place, [])
    return None


def run_folder(folder, name, seed):
    return folder / f"{name}-{seed}"


def start(arguments, place):
    """Start a script on one thread; what it prints goes to the file `log.txt` in the folder `place`.

    It is in a session of its own. Ctrl-C would reach it a second time from here, and a second signal ends it at once.
    """
    print("+", shlex.join(["python", *arguments]), flush=True)
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "log.txt", "ab") as log:
        return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def run_all(runs, folder, corpus, jobs, deadline=None, extra=""):
    """Take all `runs`, each a row and a seed, to their end, with at most `jobs` processes at a time.

    At the `deadline`, and at a signal, all processes are told to write their state and stop. Returns the exit status.
    """
    waiting, running, failed = list(runs), {}, False
    with StopSignals() as signals:
        while (waiting or running) and not signals.stop and (deadline is None or time.monotonic() < deadline):
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                arguments = next_command(*run, folder, corpus, extra)
                if arguments:
                    running[run] = start(arguments, run_folder(folder, *run))
            for run, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode == 0:
                    waiting.insert(0, run)  # its next stage
                else:
                    failed = True
                    print(f"{run_folder(folder, *run)}: ended with {process.returncode}; log.txt there says why")
            time.sleep(POLL)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    if running or waiting:
        print("stopped; the same command goes on")
    return 128 + signals.stop if signals.stop else int(failed)


def gather(runs, folder):
    """Join the records of each of the `runs`, stage by stage, into one file; `report` reads those."""
    for name, seed in runs:
        parts = [metrics_path(run_folder(folder, name, seed) / f"{stage}.pt") for stage in STAGES]
        content = b"".join(path.read_bytes() for path in parts if path.exists())
        if content:
            with replacing(record_path(folder, name, seed)) as file:
                file.write(content)


# --- what came out ---------------------------------------------------------------------------------------------------

def record_path(folder, name, seed):
    return Path(folder) / f"ablation-{name}-{seed}.metrics.jsonl"


def has_records(folder):
    return any(record_path(folder, name, seed).exists() for name in TRAINED for seed in SEEDS)


def read_scores(folder):
    """Read what came out of each row whose runs are finished: {row: {seed: (valid, test)}}, perplexities."""
    scores = {}
    for name in ABLATION:
        run, stage = source(name)
        for seed in SEEDS:
            lines = records(record_path(folder, run, seed))
            lines = [line for line in lines if line["kind"] != "test" or is_end(line)]
            stages = {stage: (valid, test) for stage, _, valid, test, _ in rows(lines)}
            if stage in stages:
                scores.setdefault(name, {})[seed] = stages[stage]
    return scores


def differences(scores, name):
    """Subtract the perplexities of its `base` from those of a row: {seed: (valid, test)}."""
    others = scores.get(base(name), {})
    return {seed: tuple(value - other for value, other in zip(pair, others[seed]))
            for seed, pair in scores.get(name, {}).items() if seed in others}


def published_difference(name):
    return tuple(value - other for value, other in zip(ABLATION[name].published, ABLATION[base(name)].published))


def percents(scores, name):
    """Return by how many percent a row's perplexity on test is above that of its `base`: of each seed, and published.

    The perplexities here are more than twice the published ones, so points of perplexity are not comparable.
    """
    measured = [100 * pair[1] / scores[base(name)][seed][1] for seed, pair in differences(scores, name).items()]
    return measured, 100 * published_difference(name)[1] / ABLATION[base(name)].published[1]


def sign(by_seed):
    """Say whether the differences `by_seed` have the published sign: "same", "other" or "unclear"; "" without any.

    As published, every part helps. A difference that the table shows as 0 is none.
    """
    values = [round(value, 2) for pair in by_seed.values() for value in pair]
    if not values:
        return ""
    if min(values) > 0:
        return "same"
    return "other" if max(values) < 0 else "unclear"


def table(scores):
    """Yield the lines of a Markdown table: each row, and what it loses to its `base`, here and as published."""
    yield "| | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | " + " | ".join(
        f"difference, seed {seed}" for seed in SEEDS) + " | published | sign |"
    yield "|---|" + "---:|" * (2 * len(SEEDS) + 1) + "---|"
    for name, row in ABLATION.items():
        by_seed = differences(scores, name)
        cells = [format_pair(scores.get(name, {}).get(seed), "{:.2f}") for seed in SEEDS]
        cells += [format_pair(by_seed.get(seed), "{:+.2f}") for seed in SEEDS]
        cells += [format_pair(published_difference(name) if name != "full" else None, "{:+.1f}"), sign(by_seed)]
        yield f"| {row.title if name == 'full' else f'− {row.title}'} | {' | '.join(cells)} |"


def format_pair(pair, form):
    return " / ".join(map(form.format, pair)) if pair else ""


def draw(folder, out):
    """Draw the curves of the first seed with records, and what parts are worth on test beside the published figures.

    Raises BadInput when matplotlib is missing, or no epoch is recorded.
    """
    matplotlib, scores = plot.import_matplotlib(), read_scores(folder)
    seed = next(seed for seed in SEEDS for name in TRAINED if record_path(folder, name, seed).exists())
    runs = {}
    for name in TRAINED:
        if (path := record_path(folder, name, seed)).exists():
            with suppress(BadInput):  # a run that has just begun
                runs[ABLATION[name].title if name == "full" else f"− {ABLATION[name].title}"] = read_stages(path)
    if not runs:
        raise BadInput(f"{folder}: there is no epoch of seed {seed} in it")
    figure = matplotlib.figure.Figure(figsize=(8, 10), layout="constrained")
    curves, bars = figure.subplots(2, 1, height_ratios=(3, 2))
    names = [name for name in ABLATION if name != "full"][::-1]
    for place, name in enumerate(names):
        measured, published = percents(scores, name)
        bars.plot(measured, [place] * len(measured), "ko", markersize=6)
        bars.plot([published], [place], "kD", markersize=8, markerfacecolor="none")
    bars.plot([], [], "ko", label="here, a dot a seed")
    bars.plot([], [], "kD", markerfacecolor="none", label="published (PTB, the large model)")
    bars.axvline(0, color="0.5", linewidth=1)
    bars.set_yticks(range(len(names)), labels=[f"− {ABLATION[name].title}" for name in names])
    bars.set_xlabel("test perplexity without the part, % above that with it (right of 0: the part helps)")
    bars.grid(axis="x", color="0.88", linewidth=0.6)
    bars.set_axisbelow(True)
    bars.legend(fontsize="small")
    best = min(epoch.valid for stages in runs.values() for stage in stages for epoch in stage.epochs.values())
    low = loss_metrics(best)["ppl"]
    curves.set_title(f"Validation and training, seed {seed}")
    plot.draw_runs(curves, runs, "epochs", "ppl", log_axis=False, y_range=(0.9 * low, 1.6 * low))
    with replacing(out) as file:
        figure.savefig(file, format="png", dpi=120)


def report(folder, out):
    """Print the table of the records in `folder` and draw their picture into `out`, where there is matplotlib."""
    print("\n".join(table(read_scores(folder))))
    if has_records(folder):
        try:
            draw(folder, out)
            print(f"picture: {out}")
        except (BadInput, OSError) as error:  # no epoch yet, no matplotlib, or a folder of someone else
            print(f"no picture: {error}")


def main(argv=None):
    parser = Parser(description="Take the parts of AWD-LSTM away one at a time.")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "penn", metavar="PATH",
                        help="folder with train.txt, valid.txt and test.txt (default: data/penn)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ablation", metavar="PATH",
                        help="where the files go (default: runs/ablation)")
    parser.add_argument("--jobs", type=positive_int, default=1 if torch.cuda.is_available() else os.cpu_count(),
                        metavar="N", help="runs at a time, each on one thread (default: one a core; on a GPU 1)")
    parser.add_argument("--minutes", type=positive_float, metavar="N",
                        help="stop in time; the same command goes on (default: to the end)")
    parser.add_argument("--rows", nargs="+", choices=TRAINED, default=TRAINED, metavar="ROW",
                        help=f"the runs to take to their end (default: all): {', '.join(TRAINED)}")
    parser.add_argument("--extra", type=str, default="", metavar="FLAGS",
                        help="further flags of all rows: --extra=\"--no-cuda\"")
    parser.add_argument("--report", type=Path, metavar="PATH",
                        help="run nothing: the table and the picture (PATH/ablation.png) of the records in a folder")
    args = parser.parse_args(argv)
    if args.report:
        if not has_records(args.report):
            raise BadInput(f"{args.report}: there is no record of the ablation in it")
        report(args.report, args.report / "ablation.png")
        return 0
    folder = args.folder.resolve()
    cut_corpus(args.data, folder / "corpus")
    check_flags(folder, args.extra)
    scores = read_scores(folder)
    runs = [(name, seed) for seed in SEEDS for name in args.rows if seed not in scores.get(name, {})]
    status = run_all(runs, folder, folder / "corpus", args.jobs, deadline_in(args.minutes), args.extra)
    gather(runs, folder)
    report(folder, folder / "ablation.png")
    return status


if __name__ == "__main__":
    run_script(main)
