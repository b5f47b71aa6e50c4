"""Read the records of runs, as several benchmarks need them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts of the project are no package
from metrics import read_metrics


def records(path, kind=None):
    """Read the records in the metrics file at `path`, all or those of one `kind`; none where there is no file."""
    lines = read_metrics(path) if path.exists() else []
    return [line for line in lines if kind in (None, line["kind"])]


def is_done(path):
    """Return whether the record at `path` is that of a run that came to its end."""
    return any(map(is_end, records(path)))


def is_end(line):
    """Return whether a line of a record is the test of a run that came to its end."""
    return line["kind"] == "test" and line.get("finished", False)
