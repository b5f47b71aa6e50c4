"""Define the error for what a person handed over that cannot be used.

Imports nothing, so that scripts can have it before torch.
"""


class BadInput(ValueError):
    """Say that something cannot be used; the message is one line that says what and why."""
