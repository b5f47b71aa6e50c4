"""Train an AWD-LSTM (or GRU, or QRNN) language model.

    python main.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epochs 500 --save PTB.pt
    python main.py --data data/penn --save PTB.pt --resume PTB.pt         (goes on where the first command stopped)
    python main.py --data book.txt --minutes 4 --save book.pt             (chooses all else)

SGD turns into averaged SGD when the validation loss stops falling (NT-ASGD). The other choice is Adam with drops of the
learning rate. Papers: arXiv 1708.02182 and 1803.08240.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import process

    process.begin(alone=False)


import time
from functools import partial

import distributed
import run_files
import sizes
from data import check_shares
from device import set_up_device
from files import follow
from flags import Parser, add_training_flags, positive_float, positive_int
from metrics import check_board, log
from optimizers import make_optimizer
from process import run_script, timed
from resume import resume
from run import Run, make_model, open_batches, open_corpus
from steps import seed_everything
from training import train

NEVER = -1  # of --when
DEFAULT_LR = {"sgd": 30.0, "adam": 1e-3}


def epoch_or_never(text):
    """Read a value of --when: an epoch, from 1, or -1 for none."""
    return NEVER if text == str(NEVER) else positive_int(text)


def make_parser():
    parser = Parser(description="Train an AWD-LSTM language model.")
    add_training_flags(parser, max_bptt="no limit", plateau="SGD turns into ASGD", save="a name made from the time",
                       lr="30; 0.001 for Adam")
    group, most = parser.add_argument_group("schedule"), sizes.MOST_EPOCHS
    group.add_argument("--optimizer", choices=list(DEFAULT_LR), default="sgd",
                       help="sgd, which turns into ASGD at a plateau, or adam (default: %(default)s)")
    group.add_argument("--minutes", type=positive_float, metavar="N",
                       help="time for the whole run, test included: the learning rate falls to nothing by then, and "
                            "level, sizes, dropouts, batch, optimizer, its flags and --save-interval are chosen where "
                            f"no flag says, and words are read {most['word']} times at most, characters {most['char']} "
                            "(default: no limit, and no choice)")
    group.add_argument("--when", type=epoch_or_never, nargs="+", default=[], metavar="E",
                       help="epochs after which a copy of the model is kept as SAVE.eE and the rate is divided "
                            "by 10 (default and -1: none; no longer once ASGD runs)")
    return parser


def parse_flags(argv):
    return make_parser().parse_args(argv)


@timed()
def main(argv=None):
    args = parse_flags(argv)
    distributed.check_flags(args)
    device = set_up_device(args.cuda, args.cuda_graphs)
    check_board(args.tensorboard, args.dry_run)
    named = args.save or args.resume
    if args.resume:
        save = follow(args.save or run_files.best_path(args.resume))
    else:
        save = args.save = follow(args.save or f"{time.time_ns() // 10**6}.pt")
    with run_files.claimed(save, dry_run=args.dry_run):
        if not (named or args.dry_run):
            log(f"no --save: the model goes to {save}")
        argv = distributed.after_restart(argv, save, "train")
        going_on = parse_flags(argv).resume
        run = resume(parse_flags, argv, "train", device) if going_on else start(args, argv, device)
        return train(distributed.hand_over(run))


def start(args, argv, device):
    """Begin a run: text, model and optimizer as the flags say.

    With --minutes, what `argv` does not say is chosen to suit the text and the time. Raises BadInput when a run lies at
    --save.
    """
    args.when = [epoch for epoch in args.when if epoch != NEVER]
    if not args.dry_run:
        run_files.check_free(args.save, args.overwrite)
        run_files.check_copies(args.save, args.when, args.overwrite)
    given = make_parser().given(argv)
    if "shares" in given:
        check_shares(args.data)
    if args.minutes:
        sizes.choose_level(args, given)
    corpus = open_corpus(args)
    if args.minutes:
        sizes.choose_flags(args, given, corpus, device, **distributed.describe())
        log(f"the same by flags: {sizes.describe(args, given)}")
    args.lr = args.lr or DEFAULT_LR[args.optimizer]
    batches = open_batches(corpus, args, device)
    seed_everything(args.seed)
    model = make_model(len(corpus.dictionary), args, device)
    optimizer = make_optimizer(args.optimizer, model, args.lr, args.wdecay)
    run = Run("train", args, corpus.dictionary.idx2word, batches, model, optimizer, checksum=corpus.checksum)
    if not args.dry_run:
        run.set_budget()
    if args.overwrite:
        run.prepare_save = partial(run_files.remove_run, args.save)
    return run


if __name__ == "__main__":
    run_script(distributed.in_group(main, train))
