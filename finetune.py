"""Fine-tune a trained model with averaged SGD from the first step, until it stops getting better.

    python finetune.py --data data/penn --save PTB.pt                    (fine-tunes PTB.pt in place)
    python finetune.py --data data/penn --load PTB.pt --save PTB.tuned.pt --epochs 300 --seed 404
    python finetune.py --data book.txt --vocab corpus --load WT103.pt --save book.pt       (another text, its own words)

All flags of main.py may be repeated, except those of its schedule. Paper: arXiv 1708.02182, section 5.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import process

    process.begin(alone=False)


from functools import partial

import checkpoint
import distributed
import run_files
from data import check_level, check_shares
from device import set_up_device
from errors import BadInput
from files import copy_file, follow, same_file
from flags import AS_TRAINED, Parser, add_training_flags, model_path
from metrics import check_board, format_loss, log
from model import ARCHITECTURE, DROPOUTS
from optimizers import make_optimizer
from process import run_script
from resume import is_unfinished, resume
from run import Run, open_batches, open_corpus
from steps import evaluate, seed_everything
from training import save_model, train
from vocabulary import ALWAYS, Dictionary

LR, CLIP = 30.0, 0.25

# Flags that come from the model unless given.
INHERITED = (*ARCHITECTURE, *DROPOUTS, "data", "level", "shares", "alpha", "beta", "wdecay", "clip", "batch_size",
             "bptt")

FIXED = (*ARCHITECTURE, "level")  # the rest may change with the text


class ModelsOwn:
    """Say in the help what the default of an inherited flag is."""

    def __init__(self, otherwise=""):
        self.text = AS_TRAINED + otherwise

    def __str__(self):
        return self.text


def make_parser():
    parser = Parser(description="Fine-tune a trained AWD-LSTM language model with averaged SGD.")
    add_training_flags(parser, max_bptt="bptt + 10", plateau="training ends", save="that of --load",
                       trained=True)
    parser.add_argument("--vocab", choices=["model", "corpus"], default="model",
                        help="whose words the tuned model knows: those of the model, others being <unk>, or those of "
                             "the corpus, new ones beginning with the mean of the old (default: %(default)s)")
    parser.add_argument("--load", type=model_path, metavar="FILE",
                        help="the model to fine-tune (default: that of --save)")
    parser.set_defaults(minutes=None, **dict.fromkeys(INHERITED, ModelsOwn()))
    parser.set_defaults(clip=ModelsOwn(f" if by SGD, else {CLIP}"))
    return parser


def parse_flags(argv):
    return make_parser().parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    distributed.check_flags(args)
    device = set_up_device(args.cuda, args.cuda_graphs)
    check_board(args.tensorboard, args.dry_run)
    load = follow(args.load or args.save)
    if not (load or args.resume):
        raise BadInput("which model? --save FILE fine-tunes it in place, --load FILE --save OTHER keeps it as it is")
    save = follow(args.save or (run_files.best_path(args.resume) if args.resume else load))
    with run_files.claimed(save, "finetune", args.dry_run):
        argv = distributed.after_restart(argv, save, "finetune")
        again = parse_flags(argv).resume
        run = resume(parse_flags, argv, "finetune", device) if again else start(argv, load, save, device)
        return train(distributed.hand_over(run))


def check_place(load, save, vocab, overwrite):
    """Raise BadInput when fine-tuning the model at `load` would harm what lies at `save`."""
    if not overwrite and is_unfinished(save, "finetune"):
        raise BadInput(f"--save {save}: a fine-tuning was stopped there; --resume {save} goes on with it, "
                       "--overwrite begins anew")
    if same_file(load, save):
        if vocab == "corpus":
            raise BadInput(f"--vocab corpus changes the model: --save OTHER keeps {load} as it is")
        return
    if any(same_file(load, path) for path in run_files.all_files(save)):
        raise BadInput(f"--load {load}: that is a file of the run at --save {save}; another --save keeps both")
    run_files.check_free(save, overwrite)


def start(argv, load, save, device):
    """Begin to fine-tune the model at `load`, whose flags are those of the run unless `argv` gives others.

    Raises BadInput where another model lies at `save`, or a fine-tuning that was stopped.
    """
    content = checkpoint.load_model(load, device)
    args, changed = checkpoint.merge_flags(parse_flags, argv, content, load, INHERITED, fixed=FIXED)
    if args.vocab == "model" and (args.min_count or args.max_vocab or args.vocab_order != "appearance"):
        raise BadInput("--min-count, --max-vocab and --vocab-order choose a vocabulary: with --vocab corpus")
    args.load, args.save, args.lr = load, save, args.lr or LR
    if content["flags"].get("optimizer") == "adam" and "clip" not in make_parser().given(argv):
        args.clip = CLIP  # Adam's step does not grow with the gradient, so what it was clipped at says nothing here
    if not args.dry_run:
        check_place(load, save, args.vocab, args.overwrite)
    checkpoint.check_data(content, load, args.data)
    if "level" not in make_parser().given(argv) and args.data != content["flags"].get("data"):
        check_level(args.data, args.level, load)
    if "shares" in changed:
        check_shares(args.data)
    corpus = open_corpus(args, content["vocabulary"] if args.vocab == "model" else None)
    batches = open_batches(corpus, args, device)
    if args.vocab == "corpus":
        special = [word for word in ALWAYS if word in content["vocabulary"]]
        corpus.dictionary = Dictionary(dict.fromkeys([*corpus.dictionary.idx2word, *special]))
        content = checkpoint.carry_vocabulary(content, load, corpus.dictionary.idx2word)
    seed_everything(args.seed)
    model = checkpoint.restore_model(content, load, vars(args), device)
    optimizer = make_optimizer("asgd", model, args.lr, args.wdecay)
    run = Run("finetune", args, corpus.dictionary.idx2word, batches, model, optimizer, checksum=corpus.checksum)
    if not args.dry_run:
        run.progress.best_loss = evaluate(model, batches.valid, args.bptt)
        log(f"| {args.load} as loaded | {format_loss('valid', run.progress.best_loss)}")
        run.prepare_save = partial(keep_loaded, run, content["stage"])
    return run


def keep_loaded(run, stage):
    """Put the model that was loaded, whose stage is `stage`, at --save, as the best so far.

    One that is tuned in place is copied instead, unless it has been tuned before. Raises BadInput when a file cannot be
    written or removed.
    """
    load, save = run.args.load, run.args.save
    if not same_file(load, save):
        if run.args.overwrite:
            run_files.remove_run(save, keep_model=True)
        save_model(run, save, run.progress.best_loss)
    elif stage == "train":
        copy_file(load, run_files.untuned_path(save))  # training may go on from it


if __name__ == "__main__":
    run_script(distributed.in_group(main, train))
