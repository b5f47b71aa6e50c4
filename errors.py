"""Define the error for input that cannot be used: a flag, a file, a text.

Imports nothing, so that scripts can import it before torch.
"""


class BadInput(ValueError):
    """Report input that cannot be used; the message is one line that says what and why."""
