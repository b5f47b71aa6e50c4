"""Begin and end a script: streams, signals, exit status.

Needs no torch, so that it can be imported first.
"""

import builtins
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress

from errors import BadInput, line_of

INTERRUPTED = 130  # exit status after Ctrl-C, 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE
began = None  # when the script began, by the monotonic clock; in a notebook, when its `main` did
STOP, SAVE = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"), ("SIGUSR1",)  # not every system has all of them


def begin(alone=True):
    """Prepare a script before torch is imported, which takes seconds.

    Ctrl-C prints one line. SIGUSR1 is ignored. A script that runs `alone` ends here when torchrun has started it in
    several processes.
    """
    global began
    if hasattr(builtins, "__IPYTHON__"):  # %run in a notebook, whose process began before and is not to end
        return
    began = time.monotonic()
    if alone and int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        refuse_torchrun()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    for name in SAVE:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextmanager
def timed():
    """Start the clock of --minutes unless a script has: in a notebook, or when a program calls `main`."""
    global began
    if began is not None:
        yield
        return
    began = time.monotonic()
    try:
        yield
    finally:
        began = None


def refuse_torchrun():
    """End a script that several processes cannot share, with one line from rank 0."""
    if os.environ["RANK"] == "0":
        tell(f"{sys.argv[0]}: error: torchrun: this script runs in one process, with python; main.py and finetune.py "
             "run in several")
    else:
        time.sleep(10)  # torchrun ends all processes when the first has ended: let rank 0 print
    sys.exit(2)


def leave(*_):
    """End the process at once, whatever is being imported."""
    print(f"{sys.argv[0]}: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def run_script(main):
    """Run a script's `main` and exit.

    Bad input is one line on stderr and exit status 2, and so are a lack of memory and an output that cannot be written.
    A bug keeps its traceback.
    """
    global began
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # a notebook's cannot be reconfigured; without a terminal there are none
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not stop the run
    try:
        status = main()
        flush(sys.stdout)
    except KeyboardInterrupt:
        tell(f"{sys.argv[0]}: interrupted")
        status = INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone
        status = BROKEN_PIPE
    except Exception as error:
        line = line_of(error)
        if line is None:
            raise
        tell(f"{sys.argv[0]}: error: {line}")
        status = 2
    finally:
        began = None  # what a notebook calls later did not begin then
    if status in (2, BROKEN_PIPE):
        abandon(sys.stdout)
        abandon(sys.stderr)
    sys.exit(status)


def tell(line):
    """Print a line to stderr, if that can be written."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def flush(stream):
    """Flush a stream, if there is one; raises BadInput when it cannot be written to."""
    try:
        if stream is not None:
            stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BadInput(f"standard output: could not be written: {error.strerror}") from error


def abandon(stream):
    """Discard what a stream still holds if it cannot be written, so that the end of the process does not fail."""
    try:
        flush(stream)
    except (BadInput, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class StopSignals:
    """Turn signals into requests that code looks at, inside `with StopSignals() as signals`.

    SIGINT, SIGTERM, SIGHUP and SIGBREAK (Windows) set `signals.stop` to their number, SIGUSR1 sets `signals.save`. A
    second signal to stop ends the process at once. A signal to stop that is ignored stays so (nohup). Outside of the
    main thread, and for signals that the system lacks, nothing changes.
    """

    def __init__(self):
        self.stop, self.save, self.previous = None, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only there can they be received
            for name in (*STOP, *SAVE):
                number = getattr(signal, name, None)
                if number and (name in SAVE or signal.getsignal(number) is not signal.SIG_IGN):
                    self.previous[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        if signal.Signals(number).name in SAVE:
            self.save = True
        elif self.stop is None:
            self.stop = number
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
