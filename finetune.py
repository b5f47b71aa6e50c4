"""Fine-tune a trained model with averaged SGD from the first step.

Training goes on until it stops getting better.

    python finetune.py --data data/penn --save PTB.pt                    (fine-tunes PTB.pt in place)
    python finetune.py --data data/penn --load PTB.pt --save PTB.tuned.pt --epochs 300 --seed 404

All flags of main.py may be repeated, except those of its schedule. Paper: arXiv 1708.02182, section 5.
"""

import checkpoint
from device import set_up_device
from files import check_writable, copy_file, same_file
from flags import Parser, add_training_flags
from metrics import format_loss, log
from model import ARCHITECTURE, DROPOUTS
from optimizers import make_optimizer
from process import run_script
from resume import resume
from steps import evaluate, seed_everything
from training import Run, open_batches, train
from utils import BadInput

LR = 30.0

# Flags that come from the model unless given.
INHERITED = (*ARCHITECTURE, *DROPOUTS, "data", "level", "shares", "alpha", "beta", "wdecay", "clip", "batch_size",
             "bptt")


class ModelsOwn:
    """Say in the help what the default of an inherited flag is."""

    def __str__(self):
        return "as the model was trained"


def parse_flags(argv):
    parser = Parser(description="Fine-tune a trained AWD-LSTM language model with averaged SGD.")
    add_training_flags(parser, max_bptt="bptt + 10", plateau="training ends", save="that of --load")
    parser.add_argument("--load", metavar="FILE", help="the model to fine-tune (default: that of --save)")
    parser.set_defaults(**dict.fromkeys(INHERITED, ModelsOwn()))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    device = set_up_device(args.cuda, args.cuda_graphs)
    if args.resume:
        run = resume(parse_flags, argv, "finetune", device)
        return train(run)
    load = args.load or args.save
    if not load:
        raise BadInput("which model? --save FILE fine-tunes it in place, --load FILE --save OTHER keeps it as it is")
    content = checkpoint.load(load, device)
    args, _ = checkpoint.merge_flags(parse_flags, argv, content, load, INHERITED)
    args.load, args.save, args.lr = load, args.save or load, args.lr or LR
    check_writable(*checkpoint.files_of_run(args.save))
    dictionary, batches = open_batches(args, device)
    checkpoint.check_vocabulary(content, args.load, dictionary, args.data)
    seed_everything(args.seed)
    model = checkpoint.restore_model(content, args.load, vars(args), device)
    optimizer = make_optimizer("asgd", model, args.lr, args.wdecay)
    run = Run("finetune", args, dictionary.idx2word, batches, model, optimizer)
    if not args.dry_run:
        run.progress.best_loss = evaluate(model, batches.valid, args.bptt)
        log(f"| {args.load} as loaded | {format_loss('valid', run.progress.best_loss)}")
        if not same_file(args.load, args.save):
            copy_file(args.load, args.save)  # the best so far, until an epoch is better
    return train(run)


if __name__ == "__main__":
    run_script(main)
