"""The demo makes its corpus whole or not at all, and runs stage after stage to the table and the text."""

import re

import demo
import pytest
import sample
from helpers import TINY


@pytest.fixture
def tiny(corpus_dir, tmp_path, monkeypatch):
    """Make the demo tiny and put its corpus in a folder; returns the folder."""
    monkeypatch.setattr(demo, "TRAIN", " ".join(TINY))
    monkeypatch.setattr(demo, "CACHE", "--window 5 --no-cuda")
    monkeypatch.setattr(demo, "TEXT", "--words 5 --no-cuda")
    folder = tmp_path / "a folder"
    folder.mkdir()
    corpus_dir.rename(folder / "sample")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_sample_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    """An error in between leaves nothing, a file that is missing is made again, and a whole sample stays."""
    def documents(number):
        for place in range(number):
            yield f"Each word has to be seen often.\n\nOnly once: word{place}"
        if number < 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample, "read_documents", lambda: documents(39))
    with pytest.raises(KeyboardInterrupt):
        demo.make_sample(tmp_path / "demo" / "sample")
    assert names(tmp_path / "demo") == []
    monkeypatch.setattr(sample, "read_documents", lambda: documents(40))
    for _ in range(2):
        demo.make_sample(tmp_path / "demo" / "sample")
        assert names(tmp_path / "demo") == ["sample"]
        assert names(tmp_path / "demo" / "sample") == ["test.txt", "train.txt", "valid.txt"]
        text = (tmp_path / "demo" / "sample" / "test.txt").read_text()
        assert text == "each word has to be seen often .\nonly once : word <unk>\n" * 2
        (tmp_path / "demo" / "sample" / "valid.txt").unlink()
    (tmp_path / "demo" / "sample" / "valid.txt").write_text("mine")
    demo.make_sample(tmp_path / "demo" / "sample")
    assert (tmp_path / "demo" / "sample" / "valid.txt").read_text() == "mine"


@pytest.mark.parametrize(("seconds", "text"), [(1, "10 seconds"), (94, "90 seconds"), (114, "110 seconds"),
                                               (116, "2 minutes"), (600, "10 minutes")])
def test_a_time_is_named_roughly(seconds, text):
    assert demo.format_seconds(seconds) == text


@pytest.mark.slow
def test_every_stage_runs_and_the_table_and_the_text_come_last(tiny, capfd):
    pytest.importorskip("matplotlib")
    (tiny / "demo.last.pt").write_text("of an earlier demo")
    (tiny / "demo.key").write_text("of someone's talk")
    assert demo.main([str(tiny)]) == 0
    printed = capfd.readouterr().out
    table, text, picture = printed.split("\n\n")[-3:]
    assert [row.split()[1] for row in table.splitlines()[2:]] == ["train", "finetune", "cache"]
    assert text + "\n" == (tiny / "generated.txt").read_text()
    assert picture == f"the curves are in {tiny / 'curves.png'}\n"
    assert (tiny / "curves.png").exists()
    assert (tiny / "demo.key").read_text() == "of someone's talk"
    assert len(text.split()) == 5
    assert re.search(r"about \d+ (seconds|minutes) on this machine", printed)
    assert printed.count("\n+ python ") == 5


@pytest.mark.slow
def test_a_stage_that_fails_ends_the_demo(tiny, capfd, monkeypatch):
    monkeypatch.setattr(demo, "CACHE", "--window none")
    assert demo.main([str(tiny)]) == 2
    assert "--window" in capfd.readouterr().err
    assert not (tiny / "generated.txt").exists()


@pytest.mark.parametrize("flag", ["-h", "--help", "--folder"])
def test_a_flag_is_no_folder_of_the_sample(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "read_documents", lambda: ["some text"] * 39)
    with pytest.raises(SystemExit):
        sample.main([flag])
    assert "usage:" in "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())
