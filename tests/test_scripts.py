"""A script that runs in a process of its own gets the time to write its state, whatever stops it."""

import signal
from types import SimpleNamespace

import pytest
import scripts


def test_sigterm_is_for_the_script_that_runs(monkeypatch):
    """It would go on alone, and the same command would find its files in use."""
    told = []

    class Running:
        def __init__(self, *_, **__):
            pass

        def wait(self, _):
            signal.raise_signal(signal.SIGTERM)
            return 128 + signal.SIGTERM

        def terminate(self):
            told.append("terminate")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(scripts.subprocess, "Popen", Running)
    assert scripts.run(["main.py"]) == 128 + signal.SIGTERM
    assert told == ["terminate"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("ends", [True, False], ids=["of the terminal", "of this process alone"])
def test_after_ctrl_c_a_script_gets_the_time_to_write_its_state(monkeypatch, ends):
    told = []

    class Running:
        def __init__(self, *_, **__):
            pass

        def wait(self, timeout=None):
            told.append("wait")
            if told == ["wait"]:
                raise KeyboardInterrupt
            if timeout and not ends:
                raise scripts.subprocess.TimeoutExpired("main.py", timeout)

        def terminate(self):
            told.append("terminate")
    monkeypatch.setattr(scripts.subprocess, "Popen", Running)
    with pytest.raises(KeyboardInterrupt):
        scripts.run(["main.py"])
    assert told == (["wait", "wait"] if ends else ["wait", "wait", "terminate", "wait"])


@pytest.mark.parametrize(("deadline", "waited"), [(130.0, 30.0), (90.0, 0)])
def test_at_its_deadline_a_script_is_told_to_end_and_waited_for(monkeypatch, deadline, waited):
    """Its exit status is that of a shell: 128 and the number of the signal."""
    told = []

    class Running:
        def __init__(self, *_, **__):
            pass

        def wait(self, timeout=None):
            told.append(timeout)
            if timeout is not None:
                raise scripts.subprocess.TimeoutExpired("main.py", timeout)
            return -signal.SIGTERM

        def terminate(self):
            told.append("terminate")
    monkeypatch.setattr(scripts.subprocess, "Popen", Running)
    monkeypatch.setattr(scripts, "time", SimpleNamespace(monotonic=lambda: 100.0))
    assert scripts.run(["main.py"], deadline) == 128 + signal.SIGTERM
    assert told == [waited, "terminate", None]
