"""Training that is killed at any instant and resumed ends as training that was never disturbed.

KILLS=100 kills as often (`make test-long`); a seed fixes the instants.
"""

import os
import random
import subprocess
import sys
import time

import pytest
from helpers import assert_undisturbed

import checkpoint
import main
import run_files

KILLS = int(os.environ.get("KILLS", 10))


def session(command, kill_after=None):
    """Run training, killing it so many seconds after it has set up; returns its exit status, -9 when killed."""
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    while run.poll() is None and "model:" not in run.stdout.readline():
        pass
    if kill_after is not None:
        time.sleep(kill_after)
        run.kill()
    run.communicate()
    return run.returncode


@pytest.mark.slow
def test_killed_and_resumed_training_is_undisturbed_training(corpus_dir, tmp_path):
    command = [sys.executable, main.__file__, "--no-cuda", "--data", corpus_dir, "--emsize", "5", "--nhid", "6",
               "--nlayers", "2", "--batch_size", "4", "--bptt", "7", "--lr", "20", "--nonmono", "2",
               "--log-interval", "5", "--epochs", str(25 + 5 * KILLS), "--save-interval", "0.0002"]
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    last = run_files.last_path(parts)
    assert session([*command, "--save", whole]) == 0
    instants = random.Random(0)
    for kill_after in [instants.uniform(0, 0.3) for _ in range(KILLS)] + [None]:
        again = ["--resume", parts] if last.exists() else []
        status = session([*command, "--save", parts, *again], kill_after)
        for path in (parts, last):
            assert not path.exists() or checkpoint.load(path), "readable at every instant"
        assert status in (0, -9 if kill_after is not None else 0), "a fast machine may be at its end by then"
    assert_undisturbed(whole, parts)
