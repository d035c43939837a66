"""What hears of a long run while it lasts."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Advance = Callable[[float, str], None]


class Listener:
    """Is told what happens, a sentence at a time; this one lets it pass."""

    def result(self, text: str) -> None:
        """What has been made, one line or several."""

    def note(self, sentence: str) -> None:
        """What somebody who waits may want to know."""

    def warn(self, sentence: str) -> None:
        """What those should know who get a result all the same."""

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """Work on `total` things begins, of which `done` are there already.

        Within the context, `advance(count, note)` is called as they get done.
        """
        return nullcontext(lambda count, note: None)
