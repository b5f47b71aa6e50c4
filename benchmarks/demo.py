"""Run the whole demo: a small AWD-LSTM from nothing, on any system.

    python benchmarks/demo.py                (make demo; the files go to the folder demo)
    python benchmarks/demo.py FOLDER

Makes the sample corpus, trains, fine-tunes, adds the cache and writes text. At the end come the table of the three
stages and the text. Needs no network.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package

from sample import SPLITS, write_sample
from scripts import STOPPED, run
from table import table

import main as train_script
from data import Corpus, load_split
from device import set_up_device
from errors import BadInput
from files import check_writable, try_to_write
from flags import Parser
from metrics import log, read_metrics
from model import ARCHITECTURE, DROPOUTS, RNNModel
from optimizers import make_optimizer
from process import run_script
from run_files import remove_run
from steps import choose_pass, train_step
from utils import get_batch

# The dropouts, AR and TAR are a fraction of the published ones: in three epochs this model does not overfit.
EPOCHS, FINETUNE_EPOCHS = 2, 1
TRAIN = ("--emsize 128 --nhid 256 --nlayers 2 --batch_size 20 --bptt 35 --dropout 0.1 --dropouth 0.05 --dropouti 0.1 "
         "--dropoute 0.01 --wdrop 0.1 --alpha 0.5 --beta 0.25 --seed 1")
CACHE = "--window 500 --theta 1.0 --lambdasm 0.1"
TEXT = "--words 120 --temperature 0.7"

WARM_UP, TIMED = 3, 10  # batches
EVALUATION = 0.07  # share of the time of training that validation, test and cache take in addition
STARTS = 10  # seconds that four processes take to start


def make_sample(folder):
    """Make the sample corpus in `folder`, unless all of it is there.

    It is written to another folder first, so that an error leaves no part of it.
    """
    if all((folder / f"{split}.txt").is_file() for split in SPLITS):
        return
    log(f"demo: making the sample corpus in {folder}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try_to_write(folder)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            write_sample(temporary)
            folder.mkdir(exist_ok=True)
            for split in SPLITS:
                os.replace(Path(temporary, f"{split}.txt"), folder / f"{split}.txt")
    except OSError as error:
        raise BadInput(f"{folder}: the corpus cannot be written: {error.strerror}") from error


def commands(folder):
    """List the commands of the demo, each a script and its flags."""
    save = str(folder / "demo.pt")
    return [
        ["main.py", "--data", str(folder / "sample"), *TRAIN.split(), "--epochs", str(EPOCHS), "--save", save],
        ["finetune.py", "--epochs", str(FINETUNE_EPOCHS), "--save", save],
        ["pointer.py", *CACHE.split(), "--save", save],
        ["generate.py", "--checkpoint", save, *TEXT.split(), "--outf", str(folder / "generated.txt")],
    ]


def estimate(args):
    """Estimate from a few timed batches how many seconds the demo takes.

    `args` are the flags of main.py.
    """
    device = set_up_device(args.cuda)
    corpus = Corpus(args.data, args.level, args.shares)
    source = load_split(corpus, "train", args.batch_size, device, rows=3)
    flags = {name: getattr(args, name) for name in ARCHITECTURE + DROPOUTS}
    model = RNNModel(len(corpus.dictionary), **flags).to(device)
    optimizer = make_optimizer("sgd", model, 1.0, args.wdecay)
    forward_backward = choose_pass(model, args.precision, args.alpha, args.beta)
    hidden = model.init_hidden(args.batch_size)
    words, targets = get_batch(source, 0, args.bptt)
    seconds = []
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        hidden, _ = train_step(model, optimizer, forward_backward, words, targets, hidden, 1.0, args.clip)
        seconds.append(time.perf_counter() - start)
    batches = (EPOCHS + FINETUNE_EPOCHS) * len(source) / len(words)
    return median(seconds[WARM_UP:]) * batches * (1 + EVALUATION) + STARTS


def format_seconds(seconds):
    """Format a time as roughly as it is known.

    It is in steps of ten seconds, from two minutes on in minutes.
    """
    return f"{max(10, round(seconds, -1)):.0f} seconds" if seconds < 115 else f"{seconds / 60:.0f} minutes"


def main(argv=None):
    parser = Parser(description="Run the whole demo: corpus, training, fine-tuning, cache, text.")
    parser.add_argument("folder", nargs="?", type=Path, default="demo", help="where the files go (default: demo)")
    folder = parser.parse_args(argv).folder
    make_sample(folder / "sample")
    check_writable(folder / "demo.pt")
    remove_run(folder / "demo.pt")
    steps = commands(folder)
    seconds = estimate(train_script.parse_flags(steps[0][1:]))
    log(f"demo: training, fine-tuning, cache and text: about {format_seconds(seconds)} on this machine")
    for step in steps:
        status = run(step)
        if status:
            return status
    picture = folder / "curves.png"
    status = run(["plot.py", folder / "demo.metrics.jsonl", "--out", picture])
    if status in STOPPED:
        return status
    if status:  # matplotlib is an extra
        picture = None
    print("", *table(read_metrics(folder / "demo.metrics.jsonl")), "", sep="\n")
    print((folder / "generated.txt").read_text(encoding="utf-8"), end="")
    if picture:
        print(f"\nthe curves are in {picture}")
    return 0


if __name__ == "__main__":
    run_script(main)
