"""What needs torchrun itself: processes killed at random, its signals, its restarts.

KILLS=20 kills as often (`make test-long`); a seed fixes who and when.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import assert_undisturbed

import checkpoint
import main
import run_files

KILLS = int(os.environ.get("KILLS", 3))
LIMIT = 900  # seconds that a job may take to end, if it does not hang
SIZE = 2

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs the processes of Linux")]


class Job:
    """torchrun with main.py in SIZE processes."""

    def __init__(self, folder, *flags, options=()):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={SIZE}", *options, main.__file__]
        self.out, self.err = folder / "job.out", folder / "job.err"
        self.out.unlink(missing_ok=True)
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen([*map(str, [*command, *flags])], stdout=out, stderr=err,
                                            env={**os.environ, "OMP_NUM_THREADS": "1"})

    def starts(self):
        return self.out.read_text().count(f"{SIZE} processes")

    def wait_for(self, condition):
        """Wait until `condition()` holds, or the job has ended."""
        while self.process.poll() is None and not condition():
            time.sleep(0.02)

    def workers(self):
        """The process ids of the workers, by rank."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(number) for number in path.read_text().split()]

    def end(self, limit=None):
        """Wait for the end, at most `limit` seconds; returns the exit status and the lines of errors of main.py."""
        status = self.process.wait(limit)
        return status, [line for line in self.err.read_text().splitlines() if "main.py: error:" in line]


def two_states(path, states):
    """Note the state that there is, and return whether there have been two. So the job has noted the first."""
    last = run_files.last_path(path)
    states |= {last.stat().st_ino} if last.exists() else set()
    return len(states) > 1


@pytest.fixture
def flags(corpus_dir):
    return ["--no-cuda", "--data", corpus_dir, "--emsize", "5", "--nhid", "6", "--nlayers", "2", "--batch_size", "5",
            "--bptt", "7", "--lr", "20", "--nonmono", "2", "--log-interval", "5", "--epochs", str(15 + 4 * KILLS),
            "--save-interval", "0.0002"]


@pytest.fixture
def whole(tmp_path, flags):
    """The model of training that nothing disturbed."""
    assert Job(tmp_path, *flags, "--save", tmp_path / "whole.pt").end() == (0, [])
    return tmp_path / "whole.pt"


def test_a_job_of_which_any_process_is_killed_ends_and_goes_on_undisturbed(whole, flags, tmp_path):
    parts, chance = tmp_path / "parts.pt", random.Random(0)
    last = run_files.last_path(parts)
    for _ in range(KILLS):
        job = Job(tmp_path, *flags, "--save", parts, *(["--resume", parts] if last.exists() else []))
        job.wait_for(job.starts)
        time.sleep(chance.uniform(0, 0.5))
        workers = job.workers()
        for pid in chance.sample(workers, min(1, len(workers))):  # a fast machine may be at its end by then
            os.kill(pid, signal.SIGKILL)
        status, errors = job.end(LIMIT)
        assert status == (1 if workers else 0)
        assert len(errors) <= 1
        for path in (parts, last):
            assert not path.exists() or checkpoint.load(path), "readable at every instant"
    again = ["--resume", parts] if last.exists() else []
    assert Job(tmp_path, *flags, "--save", parts, *again).end() == (0, [])
    assert_undisturbed(whole, parts)


def test_a_job_that_restarts_goes_on_from_its_last_state(whole, flags, tmp_path):
    parts, kills = tmp_path / "parts.pt", 2
    job = Job(tmp_path, *flags, "--save", parts, options=[f"--max-restarts={kills}"])
    for kill in range(kills):
        job.wait_for(lambda so_far=kill, states=set(): job.starts() > so_far and two_states(parts, states))
        os.kill(job.workers()[kill % SIZE], signal.SIGKILL)
    assert job.end()[0] == 0
    assert "resuming" in job.out.read_text()
    assert_undisturbed(whole, parts)


def test_a_signal_to_torchrun_saves_once_and_ends_all(whole, flags, tmp_path):
    parts = tmp_path / "parts.pt"
    job = Job(tmp_path, *flags[:-2], "--save", parts)
    job.wait_for(lambda: "| epoch" in job.out.read_text())
    job.process.send_signal(signal.SIGTERM)
    status, errors = job.end(LIMIT)
    assert (status, errors) == (1, [])
    assert job.out.read_text().count("stopped by SIGTERM | --resume") == 1
    assert Job(tmp_path, *flags, "--save", parts, "--resume", parts).end() == (0, [])
    assert_undisturbed(whole, parts)


def test_bad_flags_are_one_line(flags, tmp_path):
    job = Job(tmp_path, *flags, "--emsize", "x")
    _, errors = job.end(LIMIT)
    assert len(errors) == 1
    assert "exitcode  : 2" in job.err.read_text()
