"""Fine-tune a trained model: the same training with averaged SGD from the first step, until it stops getting better.

    python finetune.py --data data/penn --save PTB.pt                    (fine-tunes PTB.pt in place)
    python finetune.py --data data/penn --load PTB.pt --save PTB.tuned.pt --epochs 300 --seed 404

Every flag of main.py but those of its schedule may be repeated. Paper: arXiv 1708.02182, section 5.
"""

import checkpoint
import training
from model import ARCHITECTURE, DROPOUTS
from utils import (
    BadInput,
    Parser,
    add_training_flags,
    check_writable,
    copy_file,
    pick_device,
    run_script,
    same_file,
    score,
)

LR = 30.0

# The flags that are the model's own unless given.
INHERITED = (*ARCHITECTURE, *DROPOUTS, "data", "level", "shares", "alpha", "beta", "wdecay", "clip", "batch_size",
             "bptt")


class ModelsOwn:
    """The default of an inherited flag, as the help names it."""

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
    device = pick_device(args.cuda, args.cuda_graphs)
    if args.resume:
        return training.train("finetune", *training.resume(parse_flags, argv, "finetune", device))
    load = args.load or args.save
    if not load:
        raise BadInput("which model? --save FILE fine-tunes it in place, --load FILE --save OTHER keeps it as it is")
    content = checkpoint.load(load, device)
    args, _ = checkpoint.keep_flags(parse_flags, argv, content, load, INHERITED)
    args.load, args.save, args.lr = load, args.save or load, args.lr or LR
    check_writable(*checkpoint.files_of_run(args.save))
    dictionary, batches = training.open_corpus(args, device)
    checkpoint.check_vocabulary(content, args.load, dictionary, args.data)
    training.seed_everything(args.seed)
    model = checkpoint.restore_model(content, args.load, vars(args), device)
    optimizer = training.make_optimizer("asgd", model, args.lr, args.wdecay)
    progress = training.Progress()
    if not args.dry_run:
        progress.best_loss = training.evaluate(model, batches.valid, args.bptt)
        training.say(f"| {args.load} as loaded | {score('valid', progress.best_loss)}")
        if not same_file(args.load, args.save):
            copy_file(args.load, args.save)  # the best so far, until an epoch is better
    return training.train("finetune", args, dictionary, batches, model, optimizer, progress)


if __name__ == "__main__":
    run_script(main)
