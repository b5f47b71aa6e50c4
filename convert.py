"""Convert models from other toolkits, and to them.

    python convert.py OLD.pt --data data/penn --save NEW.pt                            (of the original toolkit)
    python convert.py lstm_fwd.pth --vocabulary itos_wt103.pkl --save NEW.pt           (of fastai, ULMFiT)
    python convert.py NEW.pt --to fastai --save x.pth --vocabulary x.pkl

The kind of file that comes in is recognised, not asked for. No code in it runs (`containers.py`, `unpickle.py`).

Shapes are in the alphabet of `model.py`.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import process

    process.begin()


import math
import os
import pickle
from collections import Counter

import torch

import checkpoint
import containers
import run_files
from data import Corpus, check_shares
from errors import BadInput, is_of_machine
from files import check_writable, disk_error, follow, replacing, same_file
from flags import Parser, add_data_flags, add_training_flags
from foreign import fastai_state, other_kind, read_fastai, read_original, resized, to_fastai
from metrics import log
from model import DROPOUTS, parameter_shapes
from process import run_script
from splitcross import splits_for
from unpickle import Record
from vocabulary import END, UNKNOWN, is_text

XXUNK = "xxunk"    # fastai's <unk>
FILLER = "xxfake"  # fastai fills vocabularies up with it, so it may occur several times


def make_parser():
    parser = Parser(description="Convert a model of the original toolkit or of fastai to this one, or one of this one "
                                "to fastai. No code in the file runs.")
    parser.add_argument("file", metavar="FILE", help="the model")
    parser.add_argument("--save", required=True, metavar="FILE", help="where the converted model goes")
    parser.add_argument("--to", choices=["fastai"], help="convert a model of this toolkit (default: to this toolkit)")
    parser.add_argument("--vocabulary", metavar="FILE.pkl",
                        help="fastai's vocabulary, a pickled list of words: read, or with --to written")
    parser.add_argument("--unk", default=XXUNK, metavar="WORD",
                        help="fastai's word that is <unk> here (default: %(default)s)")
    parser.add_argument("--eos", metavar="WORD", help="fastai's word that is <eos> here, such as xxbos (default: none)")
    parser.add_argument("--overwrite", action="store_true", help="replace what lies at --save")
    add_data_flags(parser, default=None)
    return parser


def parse_flags(argv):
    return make_parser().parse_args(argv)


# --- words -----------------------------------------------------------------------------------------------------------

def renamed(words, pairs, path):
    """Return `words` with `pairs` of (old, new) names applied, and lines that say what was done.

    A word is left as it is where its new name is taken. Raises BadInput when a word comes twice.
    """
    twice = [word for word, count in Counter(words).items() if count > 1 and word != FILLER]
    if twice:
        raise BadInput(f"{path}: the word {twice[0]!r:.60} comes twice")
    notes, words = [], list(words)
    for old, new in pairs:
        if old and new and old in words and new not in words:
            words[words.index(old)] = new
            notes.append(f"the word {shown(old)} is {shown(new)}")
        elif old and new and old not in words:
            notes.append(f"there is no word {shown(old)} to be {shown(new)}")
        elif old and new and old != new:
            notes.append(f"the word {shown(old)} keeps its name, since there is a word {shown(new)}")
    return words, notes


def shown(word):
    """Format a word for a line of the log; fastai has words such as a new line."""
    return word[:60] if word.isprintable() else ascii(word[:60])


def read_vocabulary(args):
    """Read the words that --vocabulary names.

    Returns them as this toolkit calls them, and lines that say what was done. Raises BadInput when they cannot be read,
    or a flag names none of them.
    """
    if not args.vocabulary:
        raise BadInput(f"{args.file}: a model of fastai; --vocabulary says where its words are, a pickled list")
    words = containers.read_words(args.vocabulary)
    for flag, word, default in (("--unk", args.unk, XXUNK), ("--eos", args.eos, None)):
        if word != default and word not in words:
            raise BadInput(f"{flag} {shown(word)}: {args.vocabulary} has no such word")
    if args.eos == args.unk:
        raise BadInput(f"--eos {shown(args.eos)}: that word is {UNKNOWN}")
    if args.eos not in (None, END) and END in words:
        raise BadInput(f"--eos {shown(args.eos)}: {args.vocabulary} has the word {END} already")
    words, notes = renamed(words, [(args.unk, UNKNOWN), (args.eos, END)], args.vocabulary)
    if END not in words and UNKNOWN in words:
        notes.append(f"no word is {END}, so the end of a line is {UNKNOWN}, as all that it does not know; --eos WORD "
                     "names one, such as xxbos, which begins each text in fastai")
    if not is_text(words):
        raise BadInput(f"{args.vocabulary}: words that are no text")
    return words, notes


# --- the model of this toolkit ---------------------------------------------------------------------------------------

def architecture(foreign, path):
    """Return the flags that fix the shapes of the ForeignModel `foreign`, and its weights in fp32.

    Raises BadInput when no model of this toolkit has these shapes, or a weight is not finite.
    """
    weights = {name: value.float() for name, value in foreign.weights.items()}
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise BadInput(f"{path}: {broken[0]} has values that are not finite")
    embedding, decoder = weights["encoder.weight"], weights["decoder.weight"]
    nlayers = len({name.split(".")[1] for name in weights if name.startswith("rnns.")})
    tied = embedding.shape == decoder.shape and torch.equal(embedding, decoder)
    try:
        emsize = embedding.size(1)
        if "rnns.0.linear.weight" in weights:
            model, sizes = "QRNN", [len(weights[f"rnns.{layer}.linear.bias"]) // 3 for layer in range(nlayers)]
        else:
            sizes = [weights[f"rnns.{layer}.weight_hh_l0"].size(1) for layer in range(nlayers)]
            model = {4 * sizes[0]: "LSTM", 3 * sizes[0]: "GRU"}[len(weights["rnns.0.weight_hh_l0"])]
        nhid = sizes[0]
        if nlayers == 1 and tied:  # of E units, whatever --nhid was
            nhid = foreign.flags.get("nhid")
            nhid = nhid if type(nhid) is int and 0 < nhid < 2**31 else emsize
        last = f"rnns.{nlayers - 1}."
        if not tied and model == "LSTM" and sizes[-1] == emsize != nhid:
            weights = resized(weights, last, nhid)
            if weights is None:
                raise ValueError
            foreign.notes.append(f"the softmax is not tied: of the last layer's {max(nhid, emsize)} units "
                                 f"{min(nhid, emsize)} are in use")
        flags = {"model": model, "emsize": emsize, "nhid": nhid, "nlayers": nlayers, "tied": tied}
        if parameter_shapes(len(embedding), **flags) != {name: tuple(value.shape) for name, value in weights.items()}:
            raise ValueError
    except (LookupError, ValueError, RuntimeError) as error:
        if is_of_machine(error):
            raise
        raise BadInput(f"{path}: its weights have the shapes of no model of this toolkit") from error
    return flags, weights


def default_flags():
    """Return the flags of training at their defaults, which later runs on the model ask for."""
    parser = Parser()
    add_training_flags(parser, max_bptt=0, plateau="", save="")
    return vars(parser.parse_args([]))


def convert(args, given):
    """Convert the model at `args.file` to one of this toolkit, at `args.save`, which the caller has checked.

    `given` are the names of the flags on the command line. Raises BadInput when the file is no such model, or a flag
    does not go with it.
    """
    contents = containers.read(args.file)
    name = os.fsencode(os.path.basename(args.file)).decode("utf-8", errors="replace")
    if args.data and "shares" in given:
        check_shares(args.data)
    text = {"data": args.data or f"the text of {name}", "level": "word", "shares": args.shares}
    if fastai_state(contents.root) is not None:
        if args.level not in (None, "word"):
            raise BadInput(f"--level {args.level}: a model of fastai is one of words")
        foreign = read_fastai(contents)
        words, notes = read_vocabulary(args)
        foreign.notes += notes
        origin = args.vocabulary
    elif isinstance(contents.root, dict) and contents.root.get("format") == checkpoint.FORMAT:
        raise BadInput(f"{args.file}: a model of this toolkit already; --to fastai converts it")
    elif what := other_kind(contents.root):
        raise BadInput(f"{args.file}: {what}")
    elif isinstance(contents.root, (list, Record)):
        foreign = read_original(contents)
        if unused := given & {"vocabulary", "unk", "eos"}:
            raise BadInput(f"--{max(unused)}: goes with models of fastai; the original toolkit's have their words in "
                           "their corpus")
        if not args.data:
            raise BadInput(f"{args.file}: a model of the original toolkit, whose vocabulary is that of its corpus; "
                           "--data says where that is")
        corpus = Corpus(args.data, args.level, args.shares)
        text["level"] = corpus.level
        log(corpus.describe())
        words, origin = corpus.dictionary.idx2word, args.data
    else:
        raise BadInput(f"{args.file}: neither a model of the original toolkit nor one of fastai")
    shapes, weights = architecture(foreign, args.file)
    if len(words) != len(weights["encoder.weight"]):
        raise BadInput(f"{origin}: {len(words):,} words, the model has {len(weights['encoder.weight']):,}")
    flags = default_flags() | {name: foreign.flags[name] for name in DROPOUTS if name in foreign.flags} | shapes | text
    content = {"flags": flags, "vocabulary": words, "model": weights}
    model = checkpoint.restore_model(content, args.file)
    if args.overwrite:
        run_files.remove_run(args.save, keep_model=True)  # the model itself is replaced whole
    checkpoint.save(args.save, model, flags, words, loss=math.nan, epoch=0)  # nothing says what its loss was
    log(f"{args.file}: a model of {foreign.source}, {shapes['model']} {shapes['emsize']}/{shapes['nhid']} x "
        f"{shapes['nlayers']}, {len(words):,} words, {'tied' if shapes['tied'] else 'not tied'} -> {args.save}")
    for note in foreign.notes:
        log(f"  {note}")


def convert_back(args):
    """Write a model of this toolkit as fastai's state dict and vocabulary.

    Raises BadInput when fastai has no such model, or a file cannot be written.
    """
    if not args.vocabulary:
        raise BadInput("--to fastai: --vocabulary says where the words go")
    paths = [args.save, args.vocabulary]
    check_writable(*paths)
    for number, path in enumerate(paths):
        if any(same_file(path, other) for other in [args.file, *paths[:number]]):
            raise BadInput(f"{path}: that is another of the files named")
        if os.path.lexists(path) and not args.overwrite:
            raise BadInput(f"{path}: is there already; --overwrite replaces it")
    containers.read(args.file)  # a file that claims too much is refused before PyTorch reads it
    content = checkpoint.load_model(args.file)
    checkpoint.restore_model(content, args.file)
    if content["flags"]["model"] != "LSTM":
        raise BadInput(f"{args.file}: has {content['flags']['model']} layers; only LSTM layers go to fastai")
    if splits_for(len(content["vocabulary"])):
        raise BadInput(f"{args.file}: has a split softmax, which fastai's model lacks")
    words, notes = renamed(content["vocabulary"], [(UNKNOWN, args.unk), (END, args.eos)], args.file)
    state = to_fastai(content["model"], args.file)
    try:
        with replacing(args.save) as weights_file, replacing(args.vocabulary) as words_file:
            torch.save(state, weights_file)
            pickle.dump(words, words_file)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{args.save}, {args.vocabulary}: could not be written: {disk_error(error)}") from error
    log(f"{args.file} -> {args.save}, {args.vocabulary}, {len(words):,} words")
    for note in notes:
        log(f"  {note}")


def main(argv=None):
    args, given = parse_flags(argv), make_parser().given(argv)
    if args.to:
        unused = given & {"data", "level", "shares"}
        if unused:
            raise BadInput(f"--{min(unused)}: not used with --to fastai, whose files do not say what the text was")
        convert_back(args)
    else:
        args.save = follow(args.save)
        inputs = [path for path in (args.file, args.vocabulary) if path]
        if any(same_file(path, taken) for path in inputs for taken in run_files.all_files(args.save)):
            raise BadInput(f"--save {args.save}: a file to convert is one of those of a run there")
        with run_files.claimed(args.save):
            run_files.check_free(args.save, args.overwrite)
            convert(args, given)
    log.check()


if __name__ == "__main__":
    run_script(main)
