"""Write files whole or not at all, and check paths before the work."""

import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from contextlib import contextmanager, suppress
from itertools import count

from errors import BadInput

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    with suppress(ImportError):
        import msvcrt

PARTIAL = ".partial"  # ends the name of a file that is being written
PATIENCE, PAUSE = 30, 0.2  # seconds: how long `patiently` tries again on Windows, and between two tries


@contextmanager
def replacing(path, mode="wb", **how):
    """Write a file at `path` whole, or not at all if the block raises.

    Use it as `with replacing(path) as file`. The file is written under another name in the same folder, flushed to the
    disk, then renamed. A link stays a link.
    """
    path = os.path.realpath(path)
    partial = partial_name(path)
    try:
        with open(partial, mode, **how) as file:
            if fcntl:
                take(file)  # so that `remove_partial` leaves it alone
            yield file
            file.flush()
            os.fsync(file.fileno())
        patiently(os.replace, partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise


def partial_name(path):
    """Name the temporary file for `path`: at random, since in containers many processes have the same id."""
    return f"{path}.{secrets.token_hex(4)}{PARTIAL}"


def remove(path):
    """Remove the file at `path`, if there is one; raises BadInput when it cannot be removed."""
    try:
        patiently(os.unlink, path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise BadInput(f"{path}: could not be removed: {error.strerror}") from error


def patiently(replace_or_remove, *paths):
    """Call `replace_or_remove(*paths)`, on Windows again and again while another program has the old file open.

    OneDrive and virus scanners there open a file for a moment after each write. Raises OSError.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return replace_or_remove(*paths)
        except PermissionError:
            if fcntl or time.monotonic() > end:
                raise
        time.sleep(PAUSE)


def disk_error(error):
    """Return the disk's error behind an error of `torch.save`, which may hide it in one of PyTorch; raises others."""
    cause = error
    while not isinstance(cause, OSError):
        if cause is None:
            raise error
        cause = cause.__context__
    return cause


def follow(path):
    """Resolve a link, so that a file has one name whatever it is called by; other paths stay as they are."""
    return os.path.realpath(path) if path and os.path.islink(path) else path


def remove_partial(*paths):
    """Remove the unfinished files of `paths` that killed processes left; other files with this ending stay."""
    for path in paths:
        folder, name = os.path.split(os.path.realpath(path))
        with suppress(OSError):
            for entry in os.listdir(folder or "."):
                if re.fullmatch(rf"{re.escape(name)}\.[0-9a-f]+{re.escape(PARTIAL)}", entry):
                    remove_unless_open(os.path.join(folder, entry))


def remove_unless_open(path):
    """Remove the file `path` unless a process is writing it (`replacing`)."""
    with suppress(OSError):
        if fcntl is None:  # Windows removes no file that is open, here or elsewhere
            os.unlink(path)
            return
        with open(path, "r+b") as file:  # NFS locks no file that is open for reading alone
            if take(file):
                os.unlink(path)


def copy_file(source, target):
    """Copy a file to `target` whole or not at all; raises BadInput when it cannot be copied."""
    try:
        with open(source, "rb") as old, replacing(target) as new:
            shutil.copyfileobj(old, new)
    except OSError as error:
        raise BadInput(f"{source}: could not be copied to {target}: {error.strerror}") from error


def same_file(path, other):
    """Return whether two paths lead to the same place; no file needs to be there.

    Names that differ only in case are the same place if the disk finds the same file by both.
    """
    path, other = os.path.realpath(path), os.path.realpath(other)
    if path.casefold() != other.casefold():
        return False
    return path == other or (os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other))


def check_writable(*paths):
    """Raise BadInput unless a file can be written at each of `paths`."""
    for path in paths:
        real = os.path.realpath(path)
        try:
            if os.path.lexists(real) and not stat.S_ISREG(os.lstat(real).st_mode):
                raise BadInput(f"{path}: cannot be written: there is something that is no file")
            try_to_write(real)
        except OSError as error:
            raise BadInput(f"{path}: cannot be written: {error.strerror}") from error


def try_to_write(path):
    """Raise OSError unless a file can be written at `path`.

    Writes an empty file, with the longest name that `path` will need, and removes it. `tempfile` is no substitute: in a
    read-only folder on Windows it tries up to 2^31 names (Python 3.10 to 3.13).
    """
    partial = partial_name(path)
    open(partial, "xb").close()
    with suppress(PermissionError):  # on Windows a virus scanner may have it; then it stays, empty
        os.unlink(partial)


def nameless(folder):
    """Open an unnamed file in `folder`, which vanishes with the process; raises OSError if it cannot be written."""
    try_to_write(os.path.join(folder, "ids"))
    return tempfile.TemporaryFile(dir=folder)


# --- locks -----------------------------------------------------------------------------------------------------------

FAR = 2**30  # the byte locked on Windows: beyond the content, so that others can read who has the lock
TRIES = 100  # after so many, the disk cannot tell which file lies at a name


@contextmanager
def locked(path, required=True):
    """Lock `path` for this process inside `with locked(path)`; raises BadInput when another one has it.

    The lock is on a hidden file beside it that names the process. The system lifts it when the process ends, however
    that happens. If no file can be written there is no lock, which raises BadInput if it is `required`.
    """
    real = os.path.realpath(path)
    name = os.path.join(os.path.dirname(real), f".{os.path.basename(real)}.lock")
    for tries in count(1):
        try:
            file = open(name, "a+", encoding="utf-8")  # noqa: SIM115  kept open for as long as the lock holds
        except OSError as error:
            if not required:
                yield
                return
            raise BadInput(f"{path}: cannot be written: {error.strerror}") from error
        if not take(file):
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise BadInput(f"{path}: in use by process {owner or 'unknown'}")
        if is_at(file, name) or tries == TRIES:  # else the process that had it has just removed it
            break
        file.close()
    try:
        with suppress(OSError):  # on a full disk others are not told who has it
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield
    finally:
        if fcntl is None:  # Windows removes no file that is open, so neither one that another process has by then
            file.close()
        with suppress(OSError):
            os.unlink(name)
        with suppress(OSError):
            file.close()


def take(file):
    """Lock an open file; returns False when another process has it, True also on a file system without locks."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except BlockingIOError:
        return False
    except OSError:
        return fcntl is not None  # Windows raises this where another process has the lock
    return True


def is_at(file, name):
    """Return whether an open file is the one that lies at `name`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(name))
    except OSError:
        return False
