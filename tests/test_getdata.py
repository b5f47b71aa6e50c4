"""getdata.sh keeps what it can verify and nothing else; its downloads come from a server of this test's own."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import Corpus

SCRIPT = Path(__file__).parent.parent / "getdata.sh"
SPLITS = ("train", "valid", "test")
PENN = {"train": " no it was n't <unk> \n the N cats \n", "valid": " a b \n", "test": " b \n"}

pytestmark = pytest.mark.skipif(not (shutil.which("curl") or shutil.which("wget")), reason="needs curl or wget")


@pytest.mark.skipif(not (SCRIPT.parent / ".git").exists() or not shutil.which("git"), reason="no checkout")
def test_bash_can_read_it_in_a_checkout_on_windows():
    asked = ["git", "-C", SCRIPT.parent, "check-attr", "eol", "--", "getdata.sh"]
    answer = subprocess.run(asked, capture_output=True, text=True)
    if answer.returncode:
        pytest.skip("git refuses this checkout")
    assert answer.stdout == "getdata.sh: eol: lf\n"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder and the address under which it is served on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def archive(texts):
    """An archive laid out as simple-examples.tgz."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for split, text in texts.items():
            info = tarfile.TarInfo(f"./simple-examples/data/ptb.{split}.txt")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return file.getvalue()


@pytest.fixture
def getdata(tmp_path, served):
    """Run getdata.sh against the served folder, with checksums for the contents given by name."""
    def run(*corpora, known=None, **further):
        sums = "".join(f"{hashlib.md5(content).hexdigest()}  {name}\n" for name, content in (known or {}).items())
        (tmp_path / "sums").write_text(sums)
        environment = {**os.environ, "DATA_DIR": str(tmp_path / "data"), "PYTHON": sys.executable, "no_proxy": "*",
                       "GETDATA_URL": served[1], "GETDATA_CHECKSUMS": str(tmp_path / "sums"), **further}
        return subprocess.run([SCRIPT, *corpora], env=environment, capture_output=True, text=True, timeout=900)
    return run


def checksums_of(corpus, texts):
    return {f"{corpus}/{split}.txt": text.encode() for split, text in texts.items()}


def written(tmp_path):
    return sorted(str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").rglob("*") if path.is_file())


def test_penn_comes_out_of_the_archive_and_is_fetched_once(getdata, served, tmp_path):
    known = {**checksums_of("penn", PENN), "simple-examples.tgz": archive(PENN)}
    (served[0] / "simple-examples.tgz").write_bytes(known["simple-examples.tgz"])
    first, second = getdata("penn", known=known), getdata("penn", known=known)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert {split: (tmp_path / f"data/penn/{split}.txt").read_text() for split in SPLITS} == PENN
    assert "fetching" in first.stdout
    assert "fetching" not in second.stdout
    assert written(tmp_path) == ["penn/test.txt", "penn/train.txt", "penn/valid.txt"]


@pytest.mark.parametrize("answer", [None, b"<html>moved</html>"])
def test_penn_falls_back_to_single_files(getdata, served, tmp_path, answer):
    """... when the archive is gone, and when a page comes in its place."""
    if answer:
        (served[0] / "simple-examples.tgz").write_bytes(answer)
    for split in SPLITS:
        (served[0] / f"ptb.{split}.txt").write_text(PENN[split])
    ended = getdata("penn", known={**checksums_of("penn", PENN), "simple-examples.tgz": archive(PENN)})
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "data/penn/train.txt").read_text() == PENN["train"]


def test_a_file_with_the_wrong_checksum_is_not_kept(getdata, served, tmp_path):
    for split in SPLITS:
        (served[0] / f"ptb.{split}.txt").write_text("cut sho" if split == "test" else PENN[split])
    ended = getdata("penn", known=checksums_of("penn", PENN))
    assert ended.returncode == 2
    assert "penn/test.txt has the wrong checksum; nothing was kept" in ended.stderr
    assert written(tmp_path) == []


def test_no_source_at_all(getdata, tmp_path):
    ended = getdata("penn", known=checksums_of("penn", PENN))
    assert ended.returncode == 2
    assert "penn: no source answers" in ended.stderr
    assert written(tmp_path) == []


def test_pennchar_is_computed_from_penn(getdata, served, tmp_path):
    characters = {split: "".join(c + " " for line in text.splitlines() for c in line.strip().replace(" ", "_") + "\n")
                  for split, text in PENN.items()}
    assert characters["test"] == "b \n "
    for split in SPLITS:
        (served[0] / f"ptb.{split}.txt").write_text(PENN[split])
    ended = getdata("pennchar", known={**checksums_of("penn", PENN), **checksums_of("pennchar", characters)})
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "data/pennchar/train.txt").read_text() == characters["train"]


def test_a_python_of_windows_gives_the_same_files(getdata, served, tmp_path, monkeypatch):
    """... in Git's bash. It ends the lines that it prints with CR LF."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.stdout.reconfigure(newline='\\r\\n')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    test_pennchar_is_computed_from_penn(getdata, served, tmp_path)


@pytest.mark.parametrize("python, status, said", [
    (f'exec "{sys.executable}" "$@"', 0, ""), ("exit 49", 2, "needs Python: 'python' does not run")])
def test_a_python3_that_does_not_run_is_not_taken(getdata, served, tmp_path, python, status, said):
    """Windows may have a stub of that name."""
    (tmp_path / "bin").mkdir()
    for name, does in (("python3", "exit 49"), ("python", python)):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    known = {**checksums_of("penn", PENN), "simple-examples.tgz": archive(PENN)}
    (served[0] / "simple-examples.tgz").write_bytes(known["simple-examples.tgz"])
    ended = getdata("penn", known=known, PYTHON="", PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert ended.returncode == status
    assert said in ended.stderr


@pytest.mark.slow
def test_the_checksums_of_the_real_corpora(tmp_path):
    """The real Penn Treebank, where it lies beside the project, counts as fetched, and gives the real pennchar."""
    real = SCRIPT.parent.parent / "shared" / "data" / "penn"
    if not real.is_dir():
        pytest.skip("no Penn Treebank beside the project")
    shutil.copytree(real, tmp_path / "data" / "penn")
    ended = subprocess.run([SCRIPT, "penn", "pennchar"], env={**os.environ, "DATA_DIR": str(tmp_path / "data")},
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "penn is there already" in ended.stdout
    assert len(written(tmp_path)) == 6


@pytest.mark.slow
def test_sample_is_offline_english_and_always_the_same(getdata, tmp_path):
    ended = getdata("sample")
    assert ended.returncode == 0, ended.stderr
    texts = {split: (tmp_path / f"data/sample/{split}.txt").read_text() for split in SPLITS}
    tokens = {split: len(text.split()) + text.count("\n") for split, text in texts.items()}
    assert 300_000 < tokens["train"] < 700_000
    assert min(tokens.values()) > 10_000
    assert all(text == text.lower() for text in texts.values())
    words = [word for text in texts.values() for word in text.split()]
    counts = {word: 0 for word in words}
    for word in words:
        counts[word] += 1
    assert "<unk>" in counts
    assert min(counts.values()) >= 3
    assert "is there already" in getdata("sample").stdout
    shutil.rmtree(tmp_path / "data")
    getdata("sample")
    assert texts == {split: (tmp_path / f"data/sample/{split}.txt").read_text() for split in SPLITS}


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103"])
def test_wikitext_comes_out_of_its_archive(getdata, served, tmp_path, name):
    texts = {"train": " = Title = \n \n", "valid": " b \n", "test": " c \n"}
    content = zipped(**{f"{name}/wiki.{split}.tokens": text for split, text in texts.items()}, **{"../evil": "x"})
    (served[0] / f"{name}-v1.zip").write_bytes(content)
    ended = getdata(name, known={f"{name}-v1.zip": content})
    assert ended.returncode == 0, ended.stderr
    assert {split: (tmp_path / f"data/{name}/{split}.txt").read_text() for split in SPLITS} == texts
    assert len(written(tmp_path)) == 3
    assert not list(tmp_path.rglob("evil"))
    assert "is there already" in getdata(name).stdout


def test_enwik8_is_cut_into_18_1_and_1_twentieths_of_its_bytes(getdata, served, tmp_path):
    text = bytes(range(200)) * 10_000  # so long that a part of it does not fit into a pipe
    content = zipped(enwik8=text)
    (served[0] / "enwik8.zip").write_bytes(content)
    ended = getdata("enwik8", known={"enwik8": text})
    assert ended.returncode == 2, "an archive without a checksum"
    assert "enwik8: no source answers" in ended.stderr
    ended = getdata("enwik8", known={"enwik8.zip": content, "enwik8": text})
    assert ended.returncode == 0, ended.stderr
    parts = [(tmp_path / f"data/enwik8/{split}.txt").read_bytes() for split in SPLITS]
    assert b"".join(parts) == text
    assert [len(part) for part in parts] == [1_800_000, 100_000, 100_000]
    corpus = Corpus(tmp_path / "data" / "enwik8")
    assert (corpus.level, len(corpus.train), len(corpus.dictionary)) == ("byte", 1_800_000, 200)


def test_unknown_corpus_and_list(getdata):
    ended = getdata("pen")
    assert ended.returncode == 2
    assert "unknown corpus 'pen'; there are: sample penn" in ended.stderr
    assert getdata("--list").stdout.split() == ["sample", "penn", "pennchar", "wikitext-2", "wikitext-103", "enwik8"]
