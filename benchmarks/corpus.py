"""Measure the loading of large corpora: seconds, peak memory and disk, at several sizes.

    python benchmarks/corpus.py                                        (20 and 100 million words, 100 million bytes)
    python benchmarks/corpus.py --words 20e6 100e6 200e6 1e9 --bytes 0     (13 GB of disk, 20 minutes)

Texts are generated, words with a frequency of 1 / rank as in English, each of `--types` at least once. A text is loaded
three times: first, then from its cache, then with another vocabulary. Each load is a process of its own that imports
PyTorch first. The time is that of `Corpus(...)` alone. A text is removed when it has been measured.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from scripts import ROOT

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
from files import check_writable
from flags import Parser, non_negative_float, positive_int
from process import run_script

LOADS = {"first": "", "cached": "", "--min-count 3": "Rules(min_count=3)"}
LOAD = """
import sys, time
from data import Corpus
from device import peak_memory
from vocabulary import Rules
base = peak_memory()
start = time.perf_counter(), time.process_time()
corpus = Corpus(sys.argv[1], rules={rules})
seconds = time.perf_counter() - start[0], time.process_time() - start[1]
tokens = len(corpus.train) + len(corpus.valid) + len(corpus.test)
print(*seconds, peak_memory() / 2**20, base / 2**20, tokens, len(corpus.dictionary))
"""
SHARES = (("valid", 0.02), ("test", 0.02), ("train", 0.96))
LINE, BLOCK, POOL = 25, 2_000_000, 50  # words of a line, words of a block, blocks


def draw_block(random, within, last):
    """Draw the text of BLOCK words; the word of rank r has a probability near 1 / r."""
    ids = numpy.minimum((len(within) + 1) ** random.random(BLOCK) - 1, len(within) - 1).astype(int)
    words = within[ids]
    words[LINE - 1::LINE] = last[ids[LINE - 1::LINE]]
    return "".join(words.tolist())


def generate_words(folder, tokens, types):
    """Write about `tokens` words over the three splits, <eos> of each line among them.

    After POOL blocks, which take the time, blocks come again in random order.
    """
    random = numpy.random.default_rng(0)
    spelling = str.maketrans("012345", "etaoin")  # short words are frequent; five letters and a space on average
    names = [numpy.base_repr(rank, 6).translate(spelling) for rank in range(1, types)]
    within, last = (numpy.array([name + end for name in names], dtype=object) for end in (" ", "\n"))
    pool = []
    for split, share in SHARES:
        with open(folder / f"{split}.txt", "w", encoding="utf-8") as file:
            left = int(tokens * share * LINE / (LINE + 1))
            while left > 0:
                if len(pool) < POOL:
                    block = draw_block(random, within, last)
                    pool.append(block)
                else:
                    block = pool[random.integers(POOL)]
                file.write(block if left >= BLOCK else block[:int(len(block) * left / BLOCK)] + "\n")
                left -= BLOCK
            if split == "train":
                file.write(" ".join(names) + "\n")


def generate_bytes(folder, tokens, _):
    """Write `tokens` bytes over the three splits: 205 different ones, the newline among them."""
    random = numpy.random.default_rng(0)
    for split, share in SHARES:
        symbols = numpy.minimum(206 ** random.random(int(tokens * share)) - 1, 204).astype(numpy.uint8)
        (folder / f"{split}.txt").write_bytes((symbols + 10).tobytes())
    (folder / "level").write_text("byte\n")


def measure(name, folder, loads):
    """Print a row for each load of the text in `folder`."""
    text = sum(path.stat().st_size for path in folder.glob("*.txt"))
    for load in loads:
        command = [sys.executable, "-c", LOAD.format(rules=LOADS[load] or None), folder]
        output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds, cpu, peak, base, tokens, types = map(float, output.split())
        disk = sum(path.stat().st_size for path in folder.glob(".*"))
        print(f"| {name} | {tokens:13,.0f} | {types:7,.0f} | {text / 2**20:6,.0f} | {load:13} | {seconds:7,.1f} | "
              f"{cpu:7,.1f} | {peak:8,.0f} | {base:4,.0f} | {disk / 2**20:6,.0f} |", flush=True)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--words", type=non_negative_float, nargs="+", default=[20e6, 100e6], metavar="N",
                        help="sizes of texts of words (0: none)")
    parser.add_argument("--bytes", type=non_negative_float, nargs="+", default=[100e6], metavar="N",
                        help="sizes of texts of bytes (0: none)")
    parser.add_argument("--types", type=positive_int, default=793_471, metavar="V",
                        help="different words, <eos> among them (default: those of the One Billion Word Benchmark)")
    parser.add_argument("--folder", metavar="DIR", help="where there is room for the texts (default: the system's)")
    parser.add_argument("--keep", action="store_true", help="leave the texts in --folder, and use those there")
    args = parser.parse_args()
    if args.keep and not args.folder:
        parser.error("--keep: in which --folder?")
    if args.folder:
        check_writable(Path(args.folder, "words"))
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        print("| text  |        tokens |   types | of MiB | load          | seconds |  of CPU | peak MiB | idle | "
              "cache, MiB |")
        print("|-------|--------------:|--------:|-------:|---------------|--------:|--------:|---------:|-----:|"
              "-----------:|")
        for name, generate, sizes in (("words", generate_words, args.words), ("bytes", generate_bytes, args.bytes)):
            for size in map(int, filter(None, sizes)):
                folder = Path(args.folder if args.keep else temporary).resolve() / f"{name}-{size}"
                if not folder.is_dir():
                    folder.mkdir(parents=True)
                    generate(folder, size, args.types)
                for cache in folder.glob(".*.cache"):
                    os.unlink(cache)
                measure(name, folder, list(LOADS)[:3 if name == "words" else 2])
                if not args.keep:
                    shutil.rmtree(folder)


if __name__ == "__main__":
    run_script(main)
