"""What one input led to, and the ways of judging that all doors share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clip_adapter.errors import UserError
from tests.fuzz.command import LONGEST, Said, run

Read = Callable[[], Any]


@dataclass
class Attempt:
    """what: the input in words. faults: each begins with its kind and a colon."""

    what: str
    faults: list[str] = field(default_factory=list)

    def command(self, said: Said) -> Said:
        self.faults += said.faults()
        return said

    def read(self, read: Read, *refusals: type[Exception]) -> Any:
        """What a function returns, None where it refuses with a sentence (a UserError, or one of
        `refusals`)."""
        found: Any = None

        def call() -> None:
            nonlocal found
            try:
                found = read()
            except (UserError, *refusals) as error:
                self.sentence(str(error))

        self.command(run(call))
        return found

    def sentence(self, text: str) -> None:
        """Find fault with the words of a refusal."""
        if len(text) > LONGEST:
            self.faults.append(f"long: {text:.200}")
        if not text.strip() or "\n" in text:
            self.faults.append(f"no sentence: {text!r:.200}")

    def same(self, found: Any, wanted: Any) -> None:
        """What was accepted of damaged bytes has to be what it was before."""
        if found is not None and found != wanted:
            self.faults.append("silent acceptance: another content was used without a word")
