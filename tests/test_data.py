"""Text becomes token ids, and ids become batches, without losing or inventing a token."""

import pytest
import torch

from data import Corpus
from utils import BadInput, batchify, get_batch, repackage_hidden


def write(folder, train="a b\nb c\n", valid="a\n", test="d\n"):
    for split, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def read(corpus, split):
    return [corpus.dictionary.idx2word[index] for index in getattr(corpus, split)]


def test_words_are_numbered_by_first_appearance_over_all_splits(tmp_path):
    corpus = Corpus(write(tmp_path))
    assert corpus.dictionary.idx2word == ["a", "b", "<eos>", "c", "d"]
    assert corpus.dictionary.word2idx == {"a": 0, "b": 1, "<eos>": 2, "c": 3, "d": 4}
    assert corpus.train.tolist() == [0, 1, 2, 1, 3, 2]
    assert (corpus.valid.tolist(), corpus.test.tolist()) == ([0, 2], [4, 2])


@pytest.mark.parametrize("text, tokens", [
    ("a\n\nb\n", ["a", "<eos>", "<eos>", "b", "<eos>"]),                        # an empty line is a line
    ("a b", ["a", "b", "<eos>"]),                                              # no newline at the end
    ("a\r\nb\r\n", ["a", "<eos>", "b", "<eos>"]),                              # Windows lines
    (b"\xef\xbb\xbfa b\n", ["a", "b", "<eos>"]),                               # byte order mark
    ("  a\t b  \n", ["a", "b", "<eos>"]),
    ("größe 東京 <eos>\n", ["größe", "東京", "<eos>", "<eos>"]),
])
def test_lines_and_words(tmp_path, text, tokens):
    assert read(Corpus(write(tmp_path, train=text)), "train") == tokens


@pytest.mark.parametrize("bad, message", [
    ({"train": ""}, "train.txt: is empty"),
    ({"valid": b"good\nbad \xff\n"}, "valid.txt: line 2 is not UTF-8 text"),
])
def test_bad_splits_are_named(tmp_path, bad, message):
    with pytest.raises(BadInput, match=message):
        Corpus(write(tmp_path, **bad))


def test_missing_split_and_folder_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / "test.txt").unlink()
    with pytest.raises(BadInput, match=r"test\.txt: cannot be read: No such file"):
        Corpus(tmp_path)
    with pytest.raises(BadInput, match=r"no such file or folder; './getdata.sh NAME'"):
        Corpus(tmp_path / "penn")


def test_batchify_reads_columns_top_to_bottom():
    assert batchify(torch.arange(13), 3).T.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_batchify_wants_enough_tokens():
    assert batchify(torch.arange(6), 3).shape == (2, 3)
    with pytest.raises(BadInput, match="5 tokens are too few for a batch of 3: it needs 6 or more"):
        batchify(torch.arange(5), 3)


def test_targets_are_the_next_words_and_the_end_cuts_the_batch():
    source = batchify(torch.arange(12, dtype=torch.int32), 2)
    words, targets = get_batch(source, 1, 3)
    assert torch.equal(words, source[1:4]) and torch.equal(targets, source[2:5]) and words.dtype == torch.int64
    words, targets = get_batch(source, 4, 3)
    assert torch.equal(words, source[4:5]) and torch.equal(targets, source[5:6])


def test_repackaged_hidden_state_has_no_history():
    value = torch.ones(2, requires_grad=True) * 2
    first, (second, third) = repackage_hidden([value, (value, value)])
    assert all(torch.equal(part, value) and not part.requires_grad for part in (first, second, third))
