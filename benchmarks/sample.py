"""Make a sample corpus of English from the documentation of the Python that runs this.

    python benchmarks/sample.py FOLDER          (writes train.txt, valid.txt and test.txt there)

The text is the language reference that help() shows and the docstrings of the standard library. It is lower-case, a
paragraph a line. Words seen fewer than 3 times are <unk>. Every 20th document is validation text, the one ten later
test text. Needs no network and nothing but the standard library.
"""

import argparse
import ast
import collections
import pathlib
import pydoc_data.topics
import re
import sysconfig

SPLITS = ("train", "valid", "test")
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo",
            "tkinter"}
RULER = re.compile(r"([^\w\s])\1{3,}")
TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[^\sa-z0-9]")
MIN_COUNT = 3


def read_docstrings(folder):
    """Yield the docstrings of all Python files below `folder`, empty ones too."""
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.as_posix()):
        if LEFT_OUT.isdisjoint(path.relative_to(folder).parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield ast.get_docstring(node) or ""


def read_documents():
    """Yield the text of each document: the topics of help(), then the docstrings."""
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield text
    yield from read_docstrings(pathlib.Path(sysconfig.get_paths()["stdlib"]))


def tokenize(text):
    """Split a document into its paragraphs, each a list of tokens.

    Paragraphs without tokens are left out.
    """
    paragraphs = re.split(r"\n\s*\n", RULER.sub(" ", text.lower()))
    return [tokens for tokens in map(TOKEN.findall, paragraphs) if tokens]


def write_sample(folder):
    """Write the corpus to train.txt, valid.txt and test.txt in `folder`."""
    documents = [paragraphs for paragraphs in map(tokenize, read_documents()) if paragraphs]
    counts = collections.Counter(token for paragraphs in documents for tokens in paragraphs for token in tokens)
    lines = {split: [] for split in SPLITS}
    for number, paragraphs in enumerate(documents):
        split = {9: "valid", 19: "test"}.get(number % 20, "train")
        for tokens in paragraphs:
            lines[split].append(" ".join(token if counts[token] >= MIN_COUNT else "<unk>" for token in tokens) + "\n")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        with open(folder / f"{split}.txt", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines[split])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make a sample corpus of English from Python's documentation.")
    parser.add_argument("folder", metavar="FOLDER", help="where train.txt, valid.txt and test.txt go")
    write_sample(parser.parse_args(argv).folder)


if __name__ == "__main__":
    main()
