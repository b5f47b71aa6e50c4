"""Run a script of the project in a process of its own, so that it can write its state when it is stopped."""

import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
from errors import BadInput

ROOT = Path(__file__).parent.parent
GRACE = 60  # seconds that a script gets to end by itself after Ctrl-C, which tests the best model
STOPPED = [128 + number for number in (signal.SIGINT, signal.SIGTERM)]  # exit statuses of a script that was told to end


def flags_of(text):
    """Read a flag whose value is a command line; returns its arguments."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ArgumentTypeError(f"is no command line ({error}): {text!r}") from error


def run(arguments, deadline=None, folder=None):
    """Run a script in `folder` (None: the current one) until it ends or is told to, at the deadline or by a signal.

    `arguments` begin with its path in the project. Returns its exit status, as shells have it. The script is waited for
    after SIGTERM, which is passed on to it, and after Ctrl-C.
    """
    script, *flags = map(str, arguments)
    print("+", shlex.join(["python", script, *flags]), flush=True)
    process = subprocess.Popen([sys.executable, str(ROOT / script), *flags], cwd=folder)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # else it would go on alone
    try:
        try:
            status = process.wait(deadline and max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            status = process.wait()
            if os.name == "nt":  # where that kills the script, with status 1
                status = 128 + signal.SIGTERM
    except KeyboardInterrupt:  # the script has received it too, unless it was sent to this process alone
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    return status if status >= 0 else 128 - status


def run_whole(*arguments):
    """Run a script to its end; raises BadInput when it fails, and ends as it does when it is told to stop."""
    status = run(arguments)
    if status in STOPPED:
        sys.exit(status)
    if status:
        raise BadInput(f"{arguments[0]}: failed with status {status}, see above")
