"""Open a trained model with the text that it is scored on, and record the scores."""

import checkpoint
import run_files
from data import Corpus, check_level, check_shares, load_split
from errors import BadInput
from flags import add_data_flags, model_path
from metrics import Metrics, format_loss, log, loss_metrics
from model import LAYERS


def add_trained_flags(parser):
    """Add the flags that say which model is scored, on which text."""
    add_data_flags(parser, trained=True)
    parser.add_argument("--save", type=model_path, default="best.pt",
                        metavar="FILE", help="the trained model (default: %(default)s)")
    parser.add_argument("--model", choices=list(LAYERS), help="recurrent layer; has to be that of the trained model")


def open_trained(parse_flags, argv, device):
    """Read the model that --save names, and the corpus.

    Flags that `argv` does not give are those that trained the model: --model, --data, --level and --shares. Returns
    the flags, the Corpus and the model on `device`. Raises BadInput when they do not belong together.
    """
    given = parse_flags(argv)
    save = given.save
    content = checkpoint.load_model(save, device)
    args, changed = checkpoint.merge_flags(parse_flags, argv, content, save, ["model", "data", "level", "shares"],
                                           fixed=["model", "level"])
    checkpoint.check_data(content, save, args.data)
    if given.level is None and args.data != content["flags"].get("data"):
        check_level(args.data, args.level, save)
    if "shares" in changed:
        check_shares(args.data)
    corpus = Corpus(args.data, args.level, args.shares, words=content["vocabulary"])
    log(corpus.describe())
    return args, corpus, checkpoint.restore_model(content, save, device=device)


def load_scored(corpus, device):
    """Lay out the splits to score, as a dict: "valid" (N, 1), and "test" (N, 1) where `corpus` has a test split.

    Raises BadInput when one is too short.
    """
    splits = {"valid": load_split(corpus, "valid", 1, device)}
    if corpus.has_test:
        splits["test"] = load_split(corpus, "test", 1, device)
    else:
        log("no test split: validation alone is scored")
    return splits


def log_idle(kind, windows, **splits):
    """Log which of `splits`, each (N, 1), are too short for the longest of `windows` to be used."""
    for name, source in splits.items():
        if max(windows) >= len(source) - 2:
            log(f"| {kind} | {name} has {len(source) - 1} words: with --window {max(windows)} the cache never joins")


def report(kind, split, setting, loss, seconds, **further):
    """Log the loss of a `setting`, a dict by the names of its flags.

    Returns the kind and the values of its line in the metrics file, `further` ones among them.
    """
    named = " | ".join(f"{name} {value:6.4g}" for name, value in setting.items())
    log(f"| {kind:7} | {named} | {format_loss(split, loss)}")
    return kind, {"split": split, **setting, **further, "seconds": seconds, **loss_metrics(loss)}


def record(save, lines):
    """Add lines, each a kind and its values, to the record of the model at `save`; returns whether it could.

    A read-only folder is not an error: its model can still be scored.
    """
    try:
        metrics = Metrics(run_files.metrics_path(save))
        for kind, values in lines:
            metrics.write(kind, **values)
    except (OSError, BadInput) as error:
        log(f"not recorded: {error}")
        return False
    return True
