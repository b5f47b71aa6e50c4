"""Write files whole or not at all, and check paths before the work."""

import os
import shutil
import stat
import tempfile
from contextlib import contextmanager, suppress

from utils import BadInput

PARTIAL = ".partial"  # ends the name of a file that is being written


@contextmanager
def replacing(path, mode="wb", **how):
    """Write a file at `path` whole, or not at all if the block raises.

    Use it as `with replacing(path) as file`. The file is written under another name in the same folder. It is flushed
    to the disk, then renamed. A link stays a link.
    """
    path = os.path.realpath(path)
    partial = path + PARTIAL
    try:
        with open(partial, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def copy_file(source, target):
    """Copy a file so that all of it or nothing appears at `target`."""
    with open(source, "rb") as old, replacing(target) as new:
        shutil.copyfileobj(old, new)


def same_file(path, other):
    """Return whether two paths lead to one place, whether a file is there or not."""
    return os.path.realpath(path) == os.path.realpath(other)


def check_writable(*paths):
    """Raise BadInput unless a file can be written at each of `paths`."""
    for path in paths:
        real = os.path.realpath(path)
        try:
            if os.path.lexists(real) and not stat.S_ISREG(os.lstat(real).st_mode):
                raise BadInput(f"{path}: cannot be written: there is something that is no file")
            with tempfile.TemporaryFile(dir=os.path.dirname(real)), suppress(FileNotFoundError):
                os.lstat(real + PARTIAL)  # fails when the name is too long
        except OSError as error:
            raise BadInput(f"{path}: cannot be written: {error.strerror}") from error
