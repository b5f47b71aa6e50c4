"""Write text by sampling word after word from a trained model.

    python generate.py --checkpoint PTB.pt --words 1000 --outf generated.txt
    python generate.py --checkpoint PTB.pt --words 50 --prompt "the company said" --temperature 0.8 --top-k 40 --outf -
    python generate.py --checkpoint PTB.pt --words 1000 --batch 100 --outf texts.txt      (100 texts, much faster)
    python generate.py --checkpoint PTB.pt --words 100000 --precision bf16                (faster where the CPU can)

Needs no corpus: the vocabulary is in the checkpoint. Shapes are in the alphabet of `model.py`.
"""

import os
import sys
from codecs import getincrementaldecoder
from itertools import chain

import torch

import checkpoint
from data import Dictionary
from products import packs_bf16
from utils import (
    BadInput,
    Parser,
    add_run_flags,
    check_writable,
    count,
    natural,
    number,
    pick_device,
    positive,
    replacing,
    run_script,
    same_file,
)


def parse_flags(argv):
    parser = Parser(description="Write text by sampling from a trained model.")
    parser.add_argument("--checkpoint", default="model.pt", metavar="FILE",
                        help="the trained model (default: %(default)s)")
    parser.add_argument("--outf", default="generated.txt", metavar="FILE",
                        help="where the text goes, - prints it (default: %(default)s)")
    parser.add_argument("--words", type=count, default=1000, metavar="N",
                        help="words (characters, bytes) to sample (default: %(default)s)")
    parser.add_argument("--batch", type=number(int, 1, 10_001), default=1, metavar="B",
                        help="texts of so many words to sample at once, from one prompt, written with an empty line "
                             "between them (default: %(default)s)")
    parser.add_argument("--prompt", default="", metavar="TEXT",
                        help="words to go on from (default: none, the start of a line)")
    parser.add_argument("--temperature", type=positive, default=1.0, metavar="X",
                        help="above 1 more varied, below 1 likelier words (1: the model's own; default: %(default)s)")
    parser.add_argument("--top-k", type=natural, default=0, metavar="K",
                        help="sample among the K likeliest words (0: all; default: %(default)s)")
    parser.add_argument("--seed", type=number(int, 0, 2**32), default=1111, metavar="N",
                        help="random seed (default: %(default)s)")
    parser.add_argument("--log-interval", type=count, default=100, metavar="N",
                        help="words between progress lines (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
                        help="of the products with the weights; bf16 is faster, on x86 CPUs with instructions for it "
                             "(default: %(default)s)")
    add_run_flags(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def sample(model, context, length, temperature=1.0, top_k=0, batch_size=1):
    """Yield `length` times the B = `batch_size` word ids, a list, that are sampled next, independently, after the ids
    `context` (t,), t > 0, and those before, from p(w)^(1 / temperature), normalised, among the `top_k` likeliest words
    (0: all). Raises BadInput when the model has no probabilities to offer."""
    model.eval()
    hidden = model.init_hidden(batch_size)
    words = context.unsqueeze(1).expand(-1, batch_size)
    for _ in range(length):
        output, hidden, _ = model(words, hidden)
        scores = model.logprob(output[-1]).double()
        candidates = None
        if 0 < top_k < scores.size(-1):
            scores, candidates = scores.topk(top_k)
        scores -= scores.amax(-1, keepdim=True)  # the likeliest stays at 0, however small the temperature
        chosen = draw(scores.div_(temperature).exp_())
        words = chosen.t() if candidates is None else candidates.gather(1, chosen).t()
        yield words[0].tolist()


def draw(weights):
    """For each row of `weights` (B, V) a column, with a probability in proportion to its weight: (B, 1).

    By the cumulative sum: for 100 rows of 10,000 words in 0.4 ms, where `torch.multinomial`, which draws a random
    number for each of them, takes 17.5 (2 cores of an AMD EPYC).
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise BadInput("the model's weights make no finite probabilities")
    below = torch.rand_like(total) * total
    return torch.searchsorted(cumulative, below, right=True).clamp_(max=weights.size(-1) - 1)


def tokens_of(text, level):
    """The tokens of a prompt, at the level of the model."""
    if level == "word":
        return text.split()
    symbols = text.replace("\r\n", "\n") if level == "char" else map(str, os.fsencode(text))
    newline = "\n" if level == "char" else str(ord("\n"))
    return ["<eos>" if symbol == newline else symbol for symbol in symbols]


def encode(tokens, dictionary):
    """The ids of a prompt's tokens, unknown ones as <unk>; without a prompt that of <eos>, the start of a line. Raises
    BadInput for an unknown token when the model knows no <unk>."""
    known = dictionary.word2idx
    for token in tokens:
        if not token.isascii() and token != token.encode(errors="replace").decode():
            raise BadInput("--prompt: is not UTF-8 text")
        if token not in known and "<unk>" not in known:
            raise BadInput(f"--prompt: the model's vocabulary of {len(dictionary)} does not include {token!r}")
    if not tokens:
        return [known.get("<eos>", 0)]
    return [known.get(token, known.get("<unk>")) for token in tokens]


def spell(tokens, level):
    """Yield the text of tokens: words with spaces between them and a new line after each <eos> and at the end;
    characters, and bytes as the UTF-8 they are (U+FFFD where they are none), with a new line for each <eos>."""
    if level == "word":
        separator = ""
        for word in tokens:
            yield separator + word
            separator = "\n" if word == "<eos>" else " "
        yield "\n"
    elif level == "char":
        yield from ("\n" if character == "<eos>" else character for character in tokens)
    else:
        decoder = getincrementaldecoder("utf-8")(errors="replace")
        yield from (decoder.decode(b"\n" if byte == "<eos>" else bytes([int(byte)])) for byte in tokens)
        yield decoder.decode(b"", final=True)


def logged(steps, total, interval):
    """The same steps, with a progress line after each `interval` of them."""
    for done, words in enumerate(steps, 1):
        yield words
        if done % interval == 0:
            print(f"| generated {done:6d}/{total:6d} words", flush=True)


def main(argv=None):
    args = parse_flags(argv)
    device = pick_device(args.cuda)
    if args.outf != "-":
        check_writable(args.outf)
        if same_file(args.outf, args.checkpoint):
            raise BadInput(f"--outf {args.outf}: that is the model")
    content = checkpoint.load(args.checkpoint, device)
    model = checkpoint.restore_model(content, args.checkpoint, device=device)
    if args.precision == "bf16":
        if not args.cuda and packs_bf16():
            model.pack()
        else:
            print("--precision bf16: for x86 CPUs with instructions for it; writing in fp32", file=sys.stderr)
    level, dictionary = content["flags"].get("level", "word"), Dictionary(content["vocabulary"])
    prompt = tokens_of(args.prompt, level)
    context = torch.tensor(encode(prompt, dictionary), device=device)
    torch.manual_seed(args.seed)
    steps = sample(model, context, args.words, args.temperature, args.top_k, args.batch)
    if args.outf != "-":
        steps = logged(steps, args.words, args.log_interval)
    texts = zip(*steps) if args.batch > 1 else [(word for (word,) in steps)]  # one text is written as it comes

    def write(file):
        for place, text in enumerate(texts):
            if place:
                file.write("\n" if level == "word" else "\n\n")  # only words end in a new line of their own
            file.writelines(spell(chain(prompt, (dictionary.idx2word[word] for word in text)), level))

    if args.outf == "-":
        write(sys.stdout)
    else:
        with replacing(args.outf, "w", encoding="utf-8") as file:
            write(file)


if __name__ == "__main__":
    run_script(main)
