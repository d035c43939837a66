"""The one exception that a command turns into a sentence and exit code 2."""


class UserError(ValueError):
    """What was given cannot be used; the message is one sentence that says why and what to do."""
