"""Write text by sampling word after word from a trained model.

    python generate.py --checkpoint PTB.pt --words 1000 --outf generated.txt
    python generate.py --checkpoint PTB.pt --words 50 --prompt "the company said" --temperature 0.8 --top-k 40 --outf -
    python generate.py --checkpoint PTB.pt --words 1000 --batch 100 --outf texts.txt      (100 texts, much faster)
    python generate.py --checkpoint PTB.pt --words 100000 --precision bf16                (faster where the CPU can)

Needs no corpus: the vocabulary is in the checkpoint. Shapes are in the alphabet of `model.py`.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import process

    process.begin()


import math
import sys
from argparse import ArgumentTypeError
from itertools import chain

import torch

import checkpoint
from device import set_up_device
from errors import BadInput
from files import check_writable, replacing, same_file
from flags import Parser, add_device_flags, non_negative_float, non_negative_int, number, positive_int, seed
from metrics import log
from model import LAYERS
from process import run_script
from products import packs_bf16
from run_files import is_checkpoint
from text import detokenize, tokenize
from vocabulary import END, UNKNOWN, Dictionary


def positive_probability(text):
    """Read a value of --top-p: a number above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"must be a number above 0, at most 1, not {text!r}")
    return value


def parse_flags(argv):
    parser = Parser(description="Write text by sampling from a trained model.")
    parser.add_argument("--checkpoint", default="model.pt", metavar="FILE",
                        help="the trained model (default: %(default)s)")
    parser.add_argument("--outf", default="generated.txt", metavar="FILE",
                        help="where the text goes, - prints it (default: %(default)s)")
    parser.add_argument("--words", type=positive_int, default=1000, metavar="N",
                        help="words (characters, bytes) to sample (default: %(default)s)")
    parser.add_argument("--batch", type=number(int, 1, 10_001), default=1, metavar="B",
                        help="texts of so many words to sample at once, from one prompt, written with an empty line "
                             "between them (default: %(default)s)")
    parser.add_argument("--prompt", type=str, metavar="TEXT",
                        help="text to go on from (default: none, the start of a line)")
    parser.add_argument("--prompt-file", metavar="FILE", help="the same from a file (-: from standard input)")
    parser.add_argument("--temperature", type=non_negative_float, default=1.0, metavar="X",
                        help="above 1 more varied, below 1 likelier words (1: the model's own; 0: the likeliest word "
                             "each time; default: %(default)s)")
    parser.add_argument("--top-k", type=non_negative_int, default=0, metavar="K",
                        help="sample among the K likeliest words (0: all; default: %(default)s)")
    parser.add_argument("--top-p", type=positive_probability, default=1.0, metavar="P",
                        help="sample among the likeliest words that together have this probability (1: all; "
                             "default: %(default)s)")
    parser.add_argument("--no-unk", action="store_true", help="never write <unk>")
    parser.add_argument("--stop-at-eos", action="store_true", help="end each text at its first <eos>")
    parser.add_argument("--seed", type=seed, default=1111, metavar="N",
                        help="random seed (default: %(default)s)")
    parser.add_argument("--log-interval", type=positive_int, default=100, metavar="N",
                        help="words between progress lines (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
                        help="of the products with the weights; bf16 is faster, on x86 CPUs with instructions for it "
                             "(default: %(default)s)")
    parser.add_argument("--model", choices=list(LAYERS), help="recurrent layer; has to be that of the trained model")
    parser.add_argument("--data", metavar="PATH", help="not needed: the vocabulary is in the checkpoint")
    add_device_flags(parser)
    return parser.parse_args(argv)


# --- sampling --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(model, context, length, temperature=1.0, top_k=0, batch_size=1, top_p=1.0, never=()):
    """Sample continuations of `context` (t,), t > 0. Yields `length` lists of B = `batch_size` token ids.

    Each is drawn from p(w)^(1 / temperature), normalised. Temperature 0 takes the likeliest word. The draw is among the
    `top_k` likeliest words (0: all). Of these, `top_p` leaves the likeliest that together have this probability
    (Holtzman et al., arXiv 1904.09751, section 3.1). The ids in `never` are not drawn. Leaves the model in evaluation
    mode. Raises BadInput when the probabilities are not finite.
    """
    model.eval()
    hidden = model.init_hidden(batch_size)
    tokens = context.unsqueeze(1).expand(-1, batch_size)
    for _ in range(length):
        output, hidden, _ = model(tokens, hidden)
        scores = model.logprob(output[-1]).double()
        candidates = None
        scores[:, list(never)] = -math.inf
        if 0 < top_k < scores.size(-1):
            scores, candidates = scores.topk(top_k)
        scores -= scores.amax(-1, keepdim=True)  # the likeliest stays at 0, however small the temperature
        weights = scores.div_(temperature).exp_() if temperature else (scores == 0).double()
        chosen = sample_rows(nucleus(weights, top_p) if top_p < 1 else weights)
        tokens = chosen.t() if candidates is None else candidates.gather(1, chosen).t()
        yield tokens[0].tolist()


def nucleus(weights, top_p):
    """Keep the largest values in each row of `weights` (B, V) that together have the share `top_p`, zero the others."""
    ordered, places = weights.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # the weight of all that are larger
    ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(weights).scatter_(-1, places, ordered)


def sample_rows(weights):
    """Sample a column for each row of `weights` (B, V).

    The probability of a column is in proportion to its weight. Returns columns (B, 1). The cumulative sum is faster by
    far than `torch.multinomial`, which draws a random number for each column. Raises BadInput when the sum is 0 or not
    finite.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    if not (total.isfinite() & (total > 0)).all():
        raise BadInput("the model's weights make no finite probabilities")
    below = torch.rand_like(total) * total
    return torch.searchsorted(cumulative, below, right=True).clamp_(max=weights.size(-1) - 1)


# --- prompts -----------------------------------------------------------------------------------------------------

def read_prompt(args):
    """Return the prompt that the flags give: a str, or the bytes of a file."""
    if args.prompt is not None and args.prompt_file is not None:
        raise BadInput("--prompt and --prompt-file: one of them")
    if args.prompt_file is None:
        return args.prompt or ""
    try:
        if args.prompt_file == "-":
            if sys.stdin is None:
                raise BadInput("--prompt-file -: there is no standard input")
            return sys.stdin.buffer.read()
        with open(args.prompt_file, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadInput(f"--prompt-file {args.prompt_file}: cannot be read: {error.strerror}") from error


def encode(tokens, dictionary):
    """Look up the ids of a prompt's tokens.

    Unknown tokens become <unk>, with a line on stderr. An empty prompt becomes <eos>, the start of a line, or fastai's
    xxbos. Raises BadInput for an unknown token when the model knows no <unk>.
    """
    if not tokens:
        return [dictionary.start_id()]
    ids, unknown = dictionary.encode(tokens, "--prompt")
    if any(unknown):
        print(f"the prompt has {sum(unknown)} unknown of {len(tokens)} tokens, taken as {UNKNOWN}", file=sys.stderr)
    return ids


# --- the script ------------------------------------------------------------------------------------------------------

def logged(steps, total, interval):
    """Yield `steps`, `total` in all, and log a line after each `interval` of them."""
    for done, tokens in enumerate(steps, 1):
        yield tokens
        if done % interval == 0:
            log(f"| generated {done:6d}/{total:6d} words")


def until(steps, end, batch_size):
    """Yield `steps` until each of `batch_size` texts has had the id `end`; what follows it in a text is None."""
    over = [False] * batch_size
    for tokens in steps:
        yield [None if done else token for done, token in zip(over, tokens)]
        over = [done or token == end for done, token in zip(over, tokens)]
        if all(over):
            return


def write_texts(file, prompt, steps, batch_size, dictionary, level):
    """Write the texts that `steps` make, each after the prompt's tokens; a single text is written as it comes."""
    only = (tokens[0] for tokens in steps)  # each token is sampled when it is written
    texts = [only] if batch_size == 1 else zip(*steps)
    for place, text in enumerate(texts):
        if place:
            file.write("\n" if level == "word" else "\n\n")  # only words already end in a new line
        words = (dictionary.idx2word[token] for token in text if token is not None)
        file.writelines(detokenize(chain(prompt, words), level))


def check_output(path, model, prompt):
    """Raise BadInput unless the text can be written to `path` (-: stdout), which is not a file that is read."""
    if path == "-":
        if sys.stdout is None:
            raise BadInput("--outf -: there is no standard output")
        return
    check_writable(path)
    if same_file(path, model):
        raise BadInput(f"--outf {path}: that is the model")
    if prompt not in (None, "-") and same_file(path, prompt):
        raise BadInput(f"--outf {path}: that is the prompt")
    if is_checkpoint(path):
        raise BadInput(f"--outf {path}: a checkpoint lies there")


def main(argv=None):
    args = parse_flags(argv)
    device = set_up_device(args.cuda)
    check_output(args.outf, args.checkpoint, args.prompt_file)
    content = checkpoint.load_model(args.checkpoint, device)
    model = checkpoint.restore_model(content, args.checkpoint, device=device)
    if args.precision == "bf16":
        if not args.cuda and packs_bf16():
            model.pack()
        else:
            print("--precision bf16: for x86 CPUs with instructions for it; writing in fp32", file=sys.stderr)
    if args.model and args.model != content["flags"]["model"]:
        raise BadInput(f"--model {args.model} contradicts {args.checkpoint}, which is of model "
                       f"{content['flags']['model']}")
    level, dictionary = content["flags"].get("level", "word"), Dictionary(content["vocabulary"])
    if args.stop_at_eos and END not in dictionary.word2idx:
        raise BadInput(f"--stop-at-eos: {args.checkpoint} has no {END} in its vocabulary")
    prompt = tokenize(read_prompt(args), level)
    context = torch.tensor(encode(prompt, dictionary), device=device)
    torch.manual_seed(args.seed)
    never = [dictionary.word2idx[UNKNOWN]] if args.no_unk and UNKNOWN in dictionary.word2idx else []
    steps = sample(model, context, args.words, args.temperature, args.top_k, args.batch, args.top_p, never)
    if args.stop_at_eos:
        steps = until(steps, dictionary.word2idx[END], args.batch)
    try:
        if args.outf == "-":
            write_texts(sys.stdout, prompt, steps, args.batch, dictionary, level)
        else:
            steps = logged(steps, args.words, args.log_interval)
            with replacing(args.outf, "w", encoding="utf-8", newline="\n") as file:
                write_texts(file, prompt, steps, args.batch, dictionary, level)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BadInput(f"--outf {args.outf}: could not be written: {error.strerror}") from error
    log.check()


if __name__ == "__main__":
    run_script(main)
