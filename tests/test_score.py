"""Lines are scored as the model scores them one at a time, in their order, however they come."""

import io
import json
import math
import os
import queue
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import read_metrics

import checkpoint
import pointer
import score
import stream
from data import Corpus
from errors import BadInput
from model import RNNModel
from vocabulary import Dictionary

ROOT = Path(score.__file__).parent


@pytest.fixture(params=["LSTM", "QRNN"])
def trained(request, train, tmp_path):
    train(tmp_path / "m.pt", "--epochs", "1", "--model", request.param)
    return tmp_path / "m.pt"


@pytest.fixture
def run(trained, tmp_path, capsys):
    """Score a text in a file; returns what is written and the totals."""
    def call(text, *flags):
        (tmp_path / "lines.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        capsys.readouterr()
        score.main(["--no-cuda", "--checkpoint", str(trained), str(tmp_path / "lines.txt"), *map(str, flags)])
        printed = capsys.readouterr()
        return printed.out, printed.err
    return call


def naive(trained, words):
    """The log-probabilities of words after an <eos>, a step at a time."""
    content = checkpoint.load(trained)
    model, known = checkpoint.restore_model(content, trained).eval(), Dictionary(content["vocabulary"]).word2idx
    hidden, before, found = model.init_hidden(1), "<eos>", []
    with torch.no_grad():
        for word in words:
            output, hidden, _ = model(torch.tensor([[known[before]]]), hidden)
            found.append(model.logprob(output)[0, 0, known[word]].item())
            before = word
    return found


LINES = ["the cat sat", "", "a mat and one dog run by", "the", "saw " * 40, "cat the on a"]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_a_batch_scores_as_a_step_at_a_time(run, trained, size):
    out, _ = run("\n".join(LINES) + "\n", "--batch-size", size)
    for line, row in zip(LINES, out.splitlines()):
        expected = naive(trained, [*line.split(), "<eos>"])
        logprob, tokens, unknown, ppl = row.split("\t")
        assert float(logprob) == pytest.approx(sum(expected), abs=1e-5 * len(expected))
        assert (int(tokens), int(unknown)) == (len(expected), 0)
        assert float(ppl) == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)


def test_long_lines_are_read_in_pieces(run, monkeypatch):
    """Pieces may round differently."""
    found, passes, forward = [], [], RNNModel.forward
    for logits in (score.LOGITS, 100):
        seen = []
        monkeypatch.setattr(RNNModel, "forward", lambda *args, seen=seen: (seen.append(1), forward(*args))[1])
        monkeypatch.setattr(score, "LOGITS", logits)
        out, _ = run("\n".join(LINES))
        found.append([float(value) for row in out.splitlines() for value in row.split("\t")])
        passes.append(len(seen))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert passes[0] < passes[1]


@pytest.mark.parametrize("size", [1, 64])
def test_no_pass_has_more_values_than_fit_into_the_cache(run, monkeypatch, size):
    """... of its softmax and of the gates of its layers, whatever the lines and their number, down to a step each."""
    largest, forward = [], RNNModel.forward

    def noting(model, words, hidden):
        widest = max(len(model.decoder.bias), *(4 * rnn.hidden_size for rnn in model.rnns))
        largest.append((len(words), words.numel() * widest))
        return forward(model, words, hidden)
    monkeypatch.setattr(RNNModel, "forward", noting)
    monkeypatch.setattr(score, "LOGITS", 500)
    run("\n".join(LINES), "--batch-size", size)
    assert all(steps == 1 or values <= 500 for steps, values in largest)
    assert max(steps for steps, _ in largest) > 1


def test_per_word_and_json_say_the_same(run, trained):
    out, _ = run("the cat\n", "--per-word")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows[1:4]] == ["the", "cat", "<eos>"]
    assert [float(row[1]) for row in rows[1:4]] == pytest.approx(naive(trained, ["the", "cat", "<eos>"]), abs=1e-5)
    assert rows[4] == [""]
    values = json.loads(run("the cat\n", "--per-word", "--json")[0])
    assert values["logprob"] == pytest.approx(float(rows[0][0]), abs=1e-5)
    assert values["words"] == [[word, pytest.approx(float(value), abs=1e-5)] for word, value in rows[1:4]]


@pytest.mark.parametrize("lengths, size, expected", [
    ([3, 0, 1, 2, 0], 64, [[2, 3, 0]]), ([1, 10], 64, [[0, 1]]), ([1, 11], 64, [[0], [1]]),
    ([5, 18, 19], 64, [[0, 1], [2]]),
    ([7, 7, 7, 7, 7], 2, [[0, 1], [2, 3], [4]]), ([0], 64, []), ([], 64, [])])
def test_lines_of_like_length_are_scored_together(lengths, size, expected):
    """A line of more than twice the tokens of the shortest, and 8, is not: padding would be most of the work."""
    assert list(score.groups(lengths, size)) == expected


def test_no_eos_leaves_the_end_of_a_line_out(run, trained):
    out, _ = run("the cat\n\n", "--no-eos")
    first, second = (line.split("\t") for line in out.splitlines())
    assert float(first[0]) == pytest.approx(sum(naive(trained, ["the", "cat"])), abs=1e-5)
    assert second == ["0.000000", "0", "0", "nan"]


def test_carried_lines_have_the_test_loss_of_training(run, trained, corpus_dir):
    out, err = run((corpus_dir / "test.txt").read_bytes(), "--carry")
    loss = read_metrics(trained)["test"][0]["loss"]
    rows = [line.split("\t") for line in out.splitlines()]
    total, tokens = sum(float(row[0]) for row in rows), sum(int(row[1]) for row in rows)
    assert -total / tokens == pytest.approx(loss, abs=1e-6)
    assert f"perplexity {math.exp(loss):.3f}" in err


def test_a_cache_on_carried_lines_has_the_loss_of_pointer(run, trained, corpus_dir):
    out, _ = run((corpus_dir / "test.txt").read_bytes(), "--carry", "--cache", 20, 0.7, 0.3)
    pointer.main(["--no-cuda", "--data", str(corpus_dir), "--save", str(trained), "--window", "20", "--theta", "0.7",
                  "--lambdasm", "0.3"])
    loss = read_metrics(trained)["pointer"][1]["loss"]
    rows = [line.split("\t") for line in out.splitlines()]
    assert -sum(float(row[0]) for row in rows) / sum(int(row[1]) for row in rows) == pytest.approx(loss, abs=1e-6)


def test_carried_lines_are_one_text_however_many_are_scored_together(run, corpus_dir, monkeypatch):
    """State, last token and cache go on from one list of lines to the next."""
    scores = []
    for lines in (100, 3):
        monkeypatch.setattr(score, "BATCHES", lines)
        out, _ = run((corpus_dir / "test.txt").read_bytes(), "--carry", "--batch-size", 1, "--per-word",
                     "--cache", 5, 0.7, 0.3)
        scores.append([float(row.split("\t")[1]) for row in out.splitlines() if row.count("\t") == 1])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("flags, message", [
    (["--cache", "5", "1", "0.1"], "needs --carry"), (["--carry", "--cache", "0", "1", "0.1"], "--cache: must be"),
    (["--carry", "--cache", "5", "1", "1"], "--cache: must be"),
    (["--carry", "--batch-size", "5"], "is 1 with --carry"),
])
def test_flags_that_cannot_be(run, flags, message):
    with pytest.raises(BadInput, match=message):
        run("the cat\n", *flags)


def test_unknown_words_are_counted_and_told_apart(train, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("the cat <unk> sat\n" * 200)
    train(tmp_path / "m.pt", "--epochs", "1", "--data", str(tmp_path / "book.txt"))
    (tmp_path / "lines.txt").write_text("the zebra sat\nthe <unk> sat\n")
    capsys.readouterr()
    score.main(["--no-cuda", "--checkpoint", str(tmp_path / "m.pt"), str(tmp_path / "lines.txt"), "--per-word"])
    printed = capsys.readouterr()
    blocks = [block.splitlines() for block in printed.out.split("\n\n")]
    assert [block[0].split("\t")[2] for block in blocks[:2]] == ["1", "0"], "a literal <unk> is a word of the model's"
    assert blocks[0][2].split("\t")[1] == blocks[1][2].split("\t")[1]
    assert "8 tokens, 1 unknown" in printed.err
    known = [float(row.split("\t")[1]) for block in blocks[:2] for row in block[1:]]
    del known[1]  # the zebra
    assert float(printed.err.split("without unknown ")[1]) == pytest.approx(math.exp(-sum(known) / 7), rel=1e-4)


@pytest.mark.parametrize("text, flags, message", [
    (b"the cat\n\xff\n", [], "lines.txt: line 2 is not UTF-8"),
    ("the cat\n".encode("utf-16"), [], "lines.txt: is UTF-16, not UTF-8 text: convert it .*Notepad"),
    (b"\x1f\x8b\x08\x00rest", ["--carry"], "lines.txt: is a gzip archive, not UTF-8 text: unpack it"),
    (b"the zebra\n", [], "line 1: .* does not include 'zebra', the first of 1 unknown tokens, and has no <unk>"),
])
def test_lines_that_cannot_be_scored(run, text, flags, message):
    with pytest.raises(BadInput, match=message):
        run(text, *flags)


@pytest.mark.parametrize("name, message", [("missing", "No such file"), (".", "Is a directory")])
def test_files_that_cannot_be_read(trained, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message):
        score.main(["--no-cuda", "--checkpoint", str(trained), name])


def test_without_a_standard_input_a_file_is_asked_for(trained, monkeypatch):
    """As under pythonw, or in a process that was started with it closed."""
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(BadInput, match="there is no standard input; give a file"):
        score.main(["--no-cuda", "--checkpoint", str(trained)])


def test_lines_before_an_error_are_answered(trained, tmp_path, capsys):
    (tmp_path / "lines.txt").write_bytes(b"the cat\n\xff\n")
    capsys.readouterr()
    with pytest.raises(BadInput):
        score.main(["--no-cuda", "--checkpoint", str(trained), str(tmp_path / "lines.txt")])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_levels_of_characters_and_bytes(train, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("größe\n" * 300)
    for level, tokens in (("char", 6), ("byte", 8)):
        save = tmp_path / f"{level}.pt"
        train(save, "--epochs", "1", "--data", str(tmp_path / "book.txt"), "--level", level)
        (tmp_path / "lines.txt").write_text("größe\n")
        capsys.readouterr()
        score.main(["--no-cuda", "--checkpoint", str(save), str(tmp_path / "lines.txt")])
        assert capsys.readouterr().out.split("\t")[1] == str(tokens)


@pytest.fixture
def arrive(monkeypatch):
    """Let lines arrive with a `pause` between them, by a clock that stands still but for that."""
    def call(lines, pause):
        now = 0.0

        class Arrivals(stream.Ahead):
            def get(self, timeout=None):
                nonlocal now
                now += pause if timeout is None else min(pause, timeout)
                if timeout is not None and timeout < pause:
                    raise queue.Empty
                return super().get()
        monkeypatch.setattr(stream, "Ahead", Arrivals)
        monkeypatch.setattr(stream, "time", SimpleNamespace(monotonic=lambda: now))
        return stream.batches(lines, 64)
    return call


def test_a_batch_waits_for_no_line_that_does_not_come(arrive):
    assert [len(batch) for batch in arrive([b"a", b"b", b"c"], 4 * stream.WAIT)] == [1, 1, 1]


@pytest.mark.parametrize("level", ["word", "char", "byte"])
@pytest.mark.parametrize("text", [
    b"a b\nc\n", b"a b\nc", b"a\r\nb\r\n", b"a\rb\r", b"a\rb", b"a\r\r\nb\n\r", b"\n\n a \n", b"\xef\xbb\xbfa\nb",
    b"a\n\xef\xbb\xbfb\n", b"\r", "größe\r\n東\r京\n\n".encode() * 3,
])
@pytest.mark.parametrize("block", [1, 2, 3, 2**16])
def test_lines_have_the_tokens_of_a_corpus(tmp_path, monkeypatch, level, text, block):
    monkeypatch.setattr(stream, "BLOCK", block)
    (tmp_path / "book.txt").write_bytes(text)
    corpus = Corpus(tmp_path / "book.txt", level)
    ids = torch.cat([corpus.train, corpus.valid, corpus.test]).tolist()
    lines = list(stream.read_lines(io.BytesIO(text), corpus.dictionary, level, no_eos=False))
    assert [i for line in lines for i in line.ids] == ids
    assert all("<eos>" not in line.tokens[:-1] for line in lines)


def line_of(tokens):
    return stream.Line(1, ["a"] * tokens, [0] * tokens, [False] * tokens)


def test_lines_without_a_token_are_read_ahead_and_handed_on():
    """They count too: else a reader would wait for the next word, and any number of them would be in memory."""
    ahead = stream.Ahead(3)
    for _ in range(3):
        ahead.put_nowait(line_of(0))
    with pytest.raises(queue.Full):
        ahead.put_nowait(line_of(0))
    assert [len(ahead.get_nowait().ids) for _ in range(3)] == [0, 0, 0]


def test_long_lines_are_not_read_ahead(monkeypatch):
    """... further than a number of tokens, and as many are handed on together."""
    monkeypatch.setattr(stream, "AHEAD", 1000)
    read = []

    def lines():
        for number in range(50):
            read.append(number)
            yield line_of(400)

    handed_on = 0
    for batch in stream.batches(lines(), 64):
        time.sleep(0.01)
        handed_on += len(batch)
        assert len(batch) <= 3
        assert len(read) <= handed_on + 3 + 1
    assert handed_on == 50


def test_a_line_waits_no_longer_than_a_moment_though_others_come(arrive):
    assert len(next(arrive([b"a"] * 64, 0.4 * stream.WAIT))) == 3


def test_lines_that_are_there_make_full_batches(arrive):
    assert [len(batch) for batch in arrive(range(130), 0)] == [64, 64, 2]


@pytest.mark.slow
def test_a_pipe_that_stays_open_is_answered_line_by_line(trained):
    run = subprocess.Popen([sys.executable, ROOT / "score.py", "--no-cuda", "--checkpoint", trained], text=True,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in ("the cat", "a mat"):
        run.stdin.write(line + "\n")
        run.stdin.flush()
        assert run.stdout.readline().split("\t")[1] == "3"
    run.communicate()
    assert run.returncode == 0


def test_json_is_ascii_so_that_a_console_of_windows_can_take_it():
    line = stream.Line(1, ["größe", "\U0001f600"], [0, 1], [False, False])
    formatted = score.format_line(line, [-1.0, -2.0], per_word=True, as_json=True)
    assert formatted.isascii()
    assert json.loads(formatted)["words"] == [["größe", -1.0], ["\U0001f600", -2.0]]


@pytest.mark.parametrize("scores, logprob, ppl", [
    ([], 0.0, None), ([None], 0.0, None), ([-800.0], -800.0, None), ([math.nan], None, None), ([-math.inf], None, None),
    ([None, -1.0], -1.0, math.e)])
def test_what_json_has_no_number_for_is_null(scores, logprob, ppl):
    """... as other programs read it; Python's own reader would take NaN and Infinity."""
    def refuse(name):
        raise AssertionError(name)
    line = stream.Line(1, ["w"] * len(scores), [0] * len(scores), [False] * len(scores))
    values = json.loads(score.format_line(line, scores, per_word=True, as_json=True), parse_constant=refuse)
    assert (values["logprob"], values["ppl"]) == (logprob, pytest.approx(ppl))
    assert values["words"] == [["w", None if found is None or not math.isfinite(found) else found] for found in scores]


def test_the_first_token_of_a_text_is_not_scored_so_neither_counted_as_unknown():
    line = stream.Line(1, ["zzz", "the"], [0, 1], [True, False])
    assert score.format_line(line, [None, -1.0], per_word=False, as_json=False).split("\t")[1:3] == ["1", "0"]
