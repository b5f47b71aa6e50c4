"""Define every flag that scripts share: its name, its range, its help."""

import argparse
import math
import sys

import torch

from errors import BadInput
from files import follow

AS_TRAINED = "as the model was trained"  # what help says of a flag that comes from a model unless given


class Parser(argparse.ArgumentParser):
    """Parse flags; raises BadInput for an invalid one, also for an empty value of a flag without a type."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register("type", None, not_empty)

    def error(self, message):
        raise BadInput(message)

    def given(self, argv):
        """Return the names of the flags that `argv` gives, whatever their values."""
        missing = object()
        namespace = argparse.Namespace(**{action.dest: missing for action in self._actions})
        return {name for name, value in vars(self.parse_args(argv, namespace)).items() if value is not missing}

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(map(with_dashes, args)), namespace)


def with_dashes(argument):
    """Spell a flag with - between its words: --batch_size=20 is --batch-size=20. A value stays as it is.

    So does a whole command line, which is the value of another flag.
    """
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and " " not in name else argument


def command_line(name, value):
    """Spell the flag `name` with `value` as a command line would.

    Returns [] for a value that no command line can give.
    """
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        numbers = [str(number) for number in value if isinstance(number, (int, float))]
        return [flag, *numbers] if numbers else []
    return [f"{flag}={value}"] if isinstance(value, (str, int, float)) and value != "" else []


# --- types -----------------------------------------------------------------------------------------------------------

def not_empty(text):
    """Refuse an empty value, which a shell makes of an unset variable."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def model_path(text):
    """Read the name of a model's file; of a link it is what the link leads to."""
    return follow(not_empty(text))


def number(number_type, low, below=math.inf, exclusive=False):
    """Make the type of a flag: a number of `number_type`, int or float, in a range.

    The range is low <= value < below, or low < value < below if `exclusive`.
    """
    def convert(text):
        try:
            value = number_type(text)
        except ValueError:
            value = None
        if value is None or not low <= value < below or (exclusive and value == low):
            noun = "a whole number" if number_type is int else "a number"
            limits = f"above {low}" if exclusive else f"of {low} or more"
            limits += f" and below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {noun} {limits}, not {text!r}")
        return value
    return convert


NO_LIMIT = 8000  # epochs that nobody waits for: the default of --epochs
LARGEST_INT, LARGEST_FLOAT = 2**31, 1e30  # times the length of a batch they still fit int64 and fp32
positive_int, non_negative_int = number(int, 1, LARGEST_INT), number(int, 0, LARGEST_INT)
positive_float = number(float, 0, LARGEST_FLOAT, exclusive=True)
non_negative_float = number(float, 0, LARGEST_FLOAT)
probability = number(float, 0, 1)  # below 1
seed = number(int, 0, 2**32)  # what numpy takes


# What the authors of the cache's recipe found on WikiText-2.
CACHE_DEFAULTS = {"window": 3785, "theta": 0.6625523432485668, "lambdasm": 0.12785920428335693}


class Shares(argparse.Action):
    """Take a flag of two or three values."""

    def __call__(self, _parser, namespace, values, _option=None):
        if len(values) not in (2, 3):
            raise argparse.ArgumentError(self, "takes two parts (training, validation) or three (and test)")
        setattr(namespace, self.dest, values)


# --- groups ----------------------------------------------------------------------------------------------------------

def add_device_flags(parser):
    """Add the flags that every script has."""
    parser.add_argument("--cuda", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                        help="run on the GPU (default: if there is one)")


def add_data_flags(parser, trained=False, default="data/penn"):
    """Add the flags of the text; with `trained`, the help says that they come from a model unless given."""
    data, level, shares = [AS_TRAINED] * 3 if trained else [
        default or "none", "what the folder's file 'level' says, else word", "90 5 5"]
    parser.add_argument("--data", default=default, metavar="PATH",
                        help=f"folder with train.txt, valid.txt and test.txt, or one text file (default: {data})")
    parser.add_argument("--level", choices=["word", "char", "byte"], help=f"what a token is (default: {level})")
    parser.add_argument("--shares", type=positive_float, nargs="+", action=Shares, default=[90, 5, 5], metavar="PART",
                        help="the parts of one text file for training, validation and test; two parts leave no test "
                             f"split (default: {shares})")


def add_vocabulary_flags(group):
    """Add the flags that choose the vocabulary of a corpus."""
    group.add_argument("--min-count", type=positive_int, metavar="N",
                       help="least times that the training text has a word of the vocabulary; others become <unk> "
                            "(default: all words of the three splits)")
    group.add_argument("--max-vocab", type=number(int, 2, LARGEST_INT), metavar="N",
                       help="most words of the vocabulary, <unk> and <eos> among them: the most frequent ones "
                            "(default: no limit)")
    group.add_argument("--vocab-order", choices=["appearance", "frequency"], default="appearance",
                       help="how words are numbered; a split softmax wants the frequent ones first "
                            "(default: %(default)s)")


def add_cache_flags(group, optional=False):
    """Add the flags of the neural cache, each with several values for a grid.

    If `optional`, a flag that is not given is None.
    """
    for name, flag_type, metavar, what, off in (
            ("window", positive_int, "N", "words that the cache remembers", ""),
            ("theta", non_negative_float, "X", "sharpness of the cache: factor of the similarities", "0: flat; "),
            ("lambdasm", probability, "P", "share of the cache in the mixture, from 0 to below 1", "0: off; ")):
        default = CACHE_DEFAULTS[name]
        group.add_argument(f"--{name}", type=flag_type, nargs="+", default=None if optional else [default],
                           metavar=metavar, help=f"{what} ({off}default: {default:.5g})")


def add_training_flags(parser, max_bptt, plateau, save, lr="30", trained=False):
    """Add the flags of training, which main.py and finetune.py share.

    The other arguments are words of the help.
    """
    group = parser.add_argument_group("data")
    add_data_flags(group, trained)
    add_vocabulary_flags(group)
    add_model_flags(parser.add_argument_group("model"))
    add_dropout_flags(parser.add_argument_group("dropout", "probabilities of dropping, from 0 (off) to below 1"))
    add_regularisation_flags(parser.add_argument_group("regularisation"))
    add_optimisation_flags(parser.add_argument_group("optimisation"), max_bptt, plateau, lr)
    add_run_flags(parser.add_argument_group("run"), save)


def add_model_flags(group):
    group.add_argument("--model", choices=["LSTM", "QRNN", "GRU"], default="LSTM",
                       help="recurrent layer (default: %(default)s)")
    group.add_argument("--emsize", type=positive_int, default=400, metavar="E",
                       help="embedding size, units (default: %(default)s)")
    group.add_argument("--nhid", type=positive_int, default=1150, metavar="H",
                       help="hidden units per layer (default: %(default)s)")
    group.add_argument("--nlayers", type=positive_int, default=3, metavar="L",
                       help="recurrent layers (default: %(default)s)")
    group.add_argument("--tied", action=argparse.BooleanOptionalAction, default=True,
                       help="share the softmax weight with the embedding (default: %(default)s)")


def add_dropout_flags(group):
    for name, default, what in (
            ("dropout", 0.4, "the last layer's output"), ("dropouth", 0.3, "the other layers' outputs"),
            ("dropouti", 0.65, "the embedded words"), ("dropoute", 0.1, "whole words of the vocabulary"),
            ("wdrop", 0.5, "the hidden-to-hidden weights (QRNN: all weights of a layer)")):
        group.add_argument(f"--{name}", type=probability, default=default, metavar="P",
                           help=f"on {what} (default: %(default)s)")


def add_regularisation_flags(group):
    group.add_argument("--alpha", type=non_negative_float, default=2, metavar="A",
                       help="AR: weight of the squared dropped output in the loss (0: off; default: %(default)s)")
    group.add_argument("--beta", type=non_negative_float, default=1, metavar="B",
                       help="TAR: weight of the squared change of the output over time in the loss "
                            "(0: off; default: %(default)s)")
    group.add_argument("--wdecay", type=non_negative_float, default=1.2e-6, metavar="W",
                       help="weight decay on all parameters (0: off; default: %(default)s)")


def add_optimisation_flags(group, max_bptt, plateau, lr):
    group.add_argument("--lr", type=positive_float, metavar="LR", help=f"learning rate (default: {lr})")
    group.add_argument("--clip", type=non_negative_float, default=0.25, metavar="C",
                       help="largest norm of the gradient (0: no clipping; default: %(default)s)")
    group.add_argument("--epochs", type=non_negative_int, default=NO_LIMIT, metavar="N",
                       help="upper limit of epochs (default: %(default)s)")
    group.add_argument("--batch-size", type=positive_int, default=80, metavar="B",
                       help="columns of a batch (default: %(default)s)")
    group.add_argument("--bptt", type=positive_int, default=70, metavar="T",
                       help="mean length of a training batch, time steps; each has 5 or more, and the learning rate is "
                            "scaled by its length / bptt (default: %(default)s)")
    group.add_argument("--max-bptt", type=non_negative_int, metavar="T",
                       help=f"longest training batch, time steps (0: no limit; default: {max_bptt})")
    group.add_argument("--nonmono", type=non_negative_int, default=5, metavar="N",
                       help=f"{plateau} after an epoch that validates worse than some epoch more than N before it, "
                            "whatever came between (default: %(default)s)")
    group.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32",
                       help="of the matrix products of training, and on a GPU of LSTM and GRU layers as a whole; "
                            "weights, loss and all scores are fp32; tf32 needs a GPU (default: %(default)s)")


def add_run_flags(group, save):
    group.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False,
                       help="launch the passes of training on a GPU as CUDA graphs, one for each length of batch; like "
                            "--cuda not remembered by --resume (default: %(default)s)")
    group.add_argument("--seed", type=seed, default=1111, metavar="N",
                       help="random seed (default: %(default)s)")
    group.add_argument("--log-interval", type=positive_int, default=200, metavar="N",
                       help="batches between log lines (default: %(default)s)")
    group.add_argument("--save", metavar="FILE", help=f"where the best model goes (default: {save})")
    group.add_argument("--resume", metavar="FILE", help="the --save of an earlier run, to go on where it stopped")
    group.add_argument("--overwrite", action="store_true",
                       help="begin anew where a run or a model lies at --save; what lies there is lost")
    group.add_argument("--save-interval", type=non_negative_float, default=30, metavar="MINUTES",
                       help="time between states written to resume from, besides those at the end of each epoch, "
                            "or on a GPU of each minute of epochs (0: only those; default: %(default)s)")
    group.add_argument("--tensorboard", metavar="DIR",
                       help="folder for the figures of the metrics file as TensorBoard reads them; needs pip install "
                            "tensorboard; like --cuda not remembered by --resume (default: none)")
    group.add_argument("--dry-run", action="store_true",
                       help="one training batch, one validation batch, the number of parameters and the peak memory; "
                            "writes nothing")
    add_device_flags(group)
