"""What a person handed over and cannot be used. Imports nothing, so that scripts can have it before torch."""


class BadInput(ValueError):
    """Something cannot be used; the message is one line that says what and why."""
