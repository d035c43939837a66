"""The one exception that a command turns into a sentence and exit code 2."""


class UserError(ValueError):
    """What was given cannot be used; the message is one sentence that says why and what to do."""


def require_within(name: str, value: int, most: int, least: int = 1) -> None:
    """Raises UserError unless `value`, given as `name`, lies between both."""
    if not least <= value <= most:
        raise UserError(f"{name} must be at least {least} and at most {most:,}, not {value:.0f}.")


class Contradiction(Exception):
    """How a file contradicts its format, as a clause: `labels of train lie outside the classes`.

    Whoever opened the file knows its name and what to advise, and makes a sentence of it.
    """
