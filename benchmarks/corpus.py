"""Measure the loading of a corpus of 100 million tokens: time and peak memory of the first load and of the cached one.

    python benchmarks/corpus.py                          (generates about 600 MB of text in a temporary folder)
    python benchmarks/corpus.py --tokens 10000000

Two texts are generated: words out of a vocabulary of 267,735 (that of WikiText-103) with a Zipf-like distribution, and
bytes. Each load runs in a process of its own, which imports PyTorch first; the time is that of `Corpus(...)` alone.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

ROOT = Path(__file__).parent.parent
LOAD = """
import sys, time
from data import Corpus
from device import peak_memory
base = peak_memory()
start = time.perf_counter()
corpus = Corpus(sys.argv[1])
seconds = time.perf_counter() - start
tokens = len(corpus.train) + len(corpus.valid) + len(corpus.test)
print(f"{seconds:.2f} {peak_memory() / 2**20:.0f} {base / 2**20:.0f} {tokens} {len(corpus.dictionary)}")
"""


def generate_words(folder, tokens, words=267_735):
    """Write `tokens` words over the three splits, each of the vocabulary at least once."""
    random = numpy.random.default_rng(0)
    names = numpy.array([numpy.base_repr(index, 36).lower() for index in range(words - 1)], dtype=object)
    for split, share in (("train", 0.96), ("valid", 0.02), ("test", 0.02)):
        with open(folder / f"{split}.txt", "w", encoding="utf-8") as file:
            left = int(tokens * share)
            if split == "train":
                file.write(" ".join(names) + "\n")
                left -= words
            while left > 0:
                size = min(left, 2_000_000)
                ids = numpy.minimum(words ** random.random(size) - 1, words - 2).astype(int)
                lines = names[ids].reshape(-1)
                for start in range(0, size, 25):
                    file.write(" ".join(lines[start:start + 25]) + "\n")
                left -= size + size // 25


def generate_bytes(folder, tokens):
    """Write `tokens` bytes over the three splits: 205 different ones, the newline among them."""
    random = numpy.random.default_rng(0)
    for split, share in (("train", 0.9), ("valid", 0.05), ("test", 0.05)):
        symbols = numpy.minimum(206 ** random.random(int(tokens * share)) - 1, 204).astype(numpy.uint8)
        (folder / f"{split}.txt").write_bytes((symbols + 10).tobytes())
    (folder / "level").write_text("byte\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000, help="more than data.CACHE_TOKENS")
    parser.add_argument("--keep", metavar="DIR", help="generate the texts here and keep them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print("| text  |      tokens | vocabulary | load   | seconds | peak MiB | of it before loading |")
        print("|-------|------------:|-----------:|--------|--------:|---------:|---------------------:|")
        for name, generate in (("words", generate_words), ("bytes", generate_bytes)):
            folder = Path(args.keep or temporary).resolve() / name
            folder.mkdir(parents=True, exist_ok=True)
            generate(folder, args.tokens)
            for cache in folder.glob(".*.cache"):
                cache.unlink()
            for load in ("first", "cached"):
                ended = subprocess.run([sys.executable, "-c", LOAD, folder], cwd=ROOT, check=True,
                                       capture_output=True, text=True)
                seconds, peak, base, tokens, words = ended.stdout.split()
                print(f"| {name} | {int(tokens):11,} | {int(words):10,} | {load:6} | "
                      f"{seconds:>7} | {peak:>8} | {base:>20} |", flush=True)


if __name__ == "__main__":
    main()
