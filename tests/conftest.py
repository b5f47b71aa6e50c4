import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: what the reference was recorded with, and small tensors gain nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture
def corpus_dir(tmp_path):
    """A folder of plain text in three splits: 12 words and <eos>, a few hundred tokens."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "by"]
    for split, lines in (("train", 90), ("valid", 20), ("test", 20)):
        text = "".join(" ".join(words[(i * k + k) % 12] for k in range(1, 4 + i % 5)) + "\n" for i in range(lines))
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder


def pytest_terminal_summary(terminalreporter):
    from test_reference import FOLLOWED
    for name, batches in FOLLOWED.items():
        terminalreporter.write_line(f"reference {name}: {batches} batches as recorded, to 1e-4")
    terminalreporter.write_line(f"reference trajectories followed: {len(FOLLOWED)}")
