"""The one exception that a command turns into a sentence and exit code 2."""

from typing import Self


class UserError(ValueError):
    """What was given cannot be used; the message is one sentence that says why and what to do.

    Notes, such as the traceback of a user's own code, are shown below it.
    """

    def with_notes_of(self, error: BaseException) -> Self:
        for note in getattr(error, "__notes__", ()):
            self.add_note(note)
        return self


def first_line(error: BaseException) -> str:
    """What an error says, without what follows; its kind where it says nothing."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def require_within(name: str, value: int, most: int, least: int = 1) -> None:
    """Raises UserError unless `value`, given as `name`, lies between both."""
    if not least <= value <= most:
        raise UserError(f"{name} must be at least {least} and at most {most:,}, not {value:.0f}.")


class Contradiction(ValueError):
    """How a file contradicts its format, as a clause: `labels of train lie outside the classes`.

    Whoever opened the file knows its name and what to advise, and makes a sentence of it.
    """
