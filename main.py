"""Train an AWD-LSTM (or GRU, or QRNN) language model.

    python main.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epochs 500 --save PTB.pt
    python main.py --data data/penn --save PTB.pt --resume PTB.pt         (goes on where the first command stopped)

SGD turns into averaged SGD when the validation loss stops falling (NT-ASGD). The other choice is Adam with drops of the
learning rate. Papers: arXiv 1708.02182 and 1803.08240.
"""

import time

import checkpoint
from device import set_up_device
from files import check_writable
from flags import Parser, add_training_flags, positive_int
from model import ARCHITECTURE, DROPOUTS, RNNModel
from optimizers import make_optimizer
from process import run_script
from resume import resume
from steps import seed_everything
from training import Run, open_batches, train
from utils import BadInput

DEFAULT_LR = {"sgd": 30.0, "adam": 1e-3}


def parse_flags(argv):
    parser = Parser(description="Train an AWD-LSTM language model.")
    add_training_flags(parser, max_bptt="no limit", plateau="SGD turns into ASGD", save="a name made from the time")
    group = parser.add_argument_group("schedule")
    group.add_argument("--optimizer", choices=list(DEFAULT_LR), default="sgd",
                       help="sgd, which turns into ASGD at a plateau, or adam (default: %(default)s)")
    group.add_argument("--when", type=positive_int, nargs="+", default=[], metavar="E",
                       help="epochs after which a copy of the model is kept as SAVE.eE and the rate is divided "
                            "by 10 (default: none; no longer once ASGD runs)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    device = set_up_device(args.cuda, args.cuda_graphs)
    if args.resume:
        run = resume(parse_flags, argv, "train", device)
        return train(run)
    args.lr = args.lr or DEFAULT_LR[args.optimizer]
    args.save = args.save or f"{time.time_ns() // 10**6}.pt"
    check_writable(*checkpoint.files_of_run(args.save))
    dictionary, batches = open_batches(args, device)
    seed_everything(args.seed)
    flags = {name: getattr(args, name) for name in ARCHITECTURE + DROPOUTS}
    try:
        model = RNNModel(len(dictionary), **flags).to(device)
    except RuntimeError as error:  # what PyTorch raises when it gets no memory
        raise BadInput(f"no model of this size: {str(error).splitlines()[0]}") from error
    optimizer = make_optimizer(args.optimizer, model, args.lr, args.wdecay)
    return train(Run("train", args, dictionary.idx2word, batches, model, optimizer))


if __name__ == "__main__":
    run_script(main)
