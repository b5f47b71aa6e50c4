"""Run and end a script: its streams, its signals, its exit status."""

import os
import signal
import sys
import threading

from utils import BadInput

INTERRUPTED = 130  # exit status after Ctrl-C, 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE
STOP, SAVE = ("SIGINT", "SIGTERM"), ("SIGUSR1",)  # not every system has all of them


def run_script(main):
    """Run a script's `main` and exit.

    Bad input is one line on stderr and exit status 2. A bug keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a notebook's cannot be reconfigured; without a terminal there are none
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not stop the run
    try:
        status = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BadInput as error:
        print(f"{sys.argv[0]}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    sys.exit(status)


class StopSignals:
    """Let the code go on to where it can stop or save, inside `with StopSignals() as signals`.

    - SIGINT and SIGTERM set `signals.stop` to their number.
    - SIGUSR1 sets `signals.save`.
    - A second signal to stop ends the process at once.

    Outside of the main thread nothing changes. The same holds for signals that the system lacks.
    """

    def __init__(self):
        self.stop, self.save, self.previous = None, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only there can they be received
            for name in (*STOP, *SAVE):
                if hasattr(signal, name):
                    number = getattr(signal, name)
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
