"""Write text by sampling word after word from a trained model.

    python generate.py --checkpoint PTB.pt --words 1000 --outf generated.txt
    python generate.py --checkpoint PTB.pt --words 50 --prompt "the company said" --temperature 0.8 --top-k 40 --outf -

Needs no corpus: the vocabulary is in the checkpoint. Shapes are in the alphabet of `model.py`.
"""

import sys
from itertools import chain

import torch

import checkpoint
from data import Dictionary
from utils import BadInput, Parser, add_run_flags, count, natural, number, pick_device, positive, run_script


def parse_flags(argv):
    parser = Parser(description="Write text by sampling from a trained model.")
    parser.add_argument("--checkpoint", default="model.pt", metavar="FILE",
                        help="the trained model (default: %(default)s)")
    parser.add_argument("--outf", default="generated.txt", metavar="FILE",
                        help="where the text goes, - prints it (default: %(default)s)")
    parser.add_argument("--words", type=count, default=1000, metavar="N",
                        help="words to sample (default: %(default)s)")
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
    add_run_flags(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def sample(model, context, length, temperature=1.0, top_k=0):
    """Yield `length` word ids sampled after the ids `context` (t,), t > 0, from p(w)^(1 / temperature), normalised,
    among the `top_k` likeliest words (0: all)."""
    model.eval()
    hidden = model.init_hidden(1)
    words = context.unsqueeze(1)
    for _ in range(length):
        output, hidden, _ = model(words, hidden)
        scores = model.logprob(output[-1]) / temperature
        if 0 < top_k < scores.size(-1):
            scores, candidates = scores.topk(top_k)
            words = candidates.gather(1, torch.multinomial(scores.softmax(-1), 1))
        else:
            words = torch.multinomial(scores.softmax(-1), 1)
        yield words.item()


def encode(prompt, dictionary):
    """The ids of a prompt's words, unknown ones as <unk>; without a prompt that of <eos>, the start of a line. Raises
    BadInput for an unknown word when the model knows no <unk>."""
    known = dictionary.word2idx
    words = prompt.split() or ["<eos>"]
    for word in words:
        if word not in known and "<unk>" not in known:
            raise BadInput(f"--prompt: the model's {len(dictionary)} words do not include {word!r}")
    return [known.get(word, known.get("<unk>")) for word in words]


def write_text(file, words):
    """Write the words with spaces between them, and a new line after each <eos> and at the end."""
    separator = ""
    for word in words:
        file.write(separator + word)
        separator = "\n" if word == "<eos>" else " "
    file.write("\n")


def logged(words, total, interval):
    """The same words, with a progress line after each `interval` of them."""
    for done, word in enumerate(words, 1):
        yield word
        if done % interval == 0:
            print(f"| generated {done:6d}/{total:6d} words", flush=True)


def main(argv=None):
    args = parse_flags(argv)
    device = pick_device(args.cuda)
    if args.outf != "-":
        checkpoint.check_writable(args.outf)
    content = checkpoint.load(args.checkpoint, device)
    model = checkpoint.restore_model(content, args.checkpoint, device=device)
    dictionary = Dictionary(content["vocabulary"])
    context = torch.tensor(encode(args.prompt, dictionary), device=device)
    torch.manual_seed(args.seed)
    words = (dictionary.idx2word[index] for index in sample(model, context, args.words, args.temperature, args.top_k))
    if args.outf == "-":
        write_text(sys.stdout, chain(args.prompt.split(), words))
    else:
        with checkpoint.replacing(args.outf, "w", encoding="utf-8") as file:
            write_text(file, chain(args.prompt.split(), logged(words, args.words, args.log_interval)))


if __name__ == "__main__":
    run_script(main)
