"""Tell what a user can mend, such as a flag, a file or a text, from a bug.

Imports nothing, so that scripts can import it before torch.
"""


class BadInput(ValueError):
    """Report input that cannot be used; the message is one line that says what and why."""


def lacks_memory(error):
    """Return whether an error means out of memory; other errors of PyTorch that mention memory are bugs."""
    phrases = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)


def is_of_machine(error):
    """Return whether an error tells of the machine, whatever the input: of its memory, or of CUDA."""
    return lacks_memory(error) or any(name in str(error) for name in ("CUDA error", "cuDNN error"))


def line_of(error):
    """Return the line that tells a user of an error; None for a bug, which keeps its traceback."""
    if isinstance(error, BadInput):
        return " ".join(str(error).splitlines())
    if lacks_memory(error):
        return ": ".join(["out of memory", *str(error).splitlines()[:1]])
    return None
