"""One hyper-parameter: its default, its range, what is tried, and when it has an effect."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = float | int | str | bool
"""Plain Python values: a NumPy scalar would turn a float32 formula into float64."""

LARGEST_COUNT = 1_000_000
"""Of epochs and the like: steps are counted in int32."""
_LARGEST_FLOAT = 3.4e38  # of float32, in which all arithmetic is done


@dataclass(frozen=True)
class Hyper:
    """One row of a method's table.

    default: the value where nothing is given and nothing chooses. help: a sentence.
    tried: the values to try where the user gives none; () for the default alone.
    ablated: the values that an ablation shows where the user gives none.
    low, high: the range, ends included. above: an end that is excluded.
    words: values beside numbers, such as `learned`; a word selects the compiled program.
    static: whether a number selects the program too, because it changes shapes or steps.
    single: one value holds for all settings. flag: its name on the command line, where that is
    another. when: hyper-parameters further up the table and values of theirs, without any of which
    this one has no effect; {} for always.
    meaning: what some values amount to, for figures: a method's name where they are that method.
    absent: of a row that came after files of its method were written: the value that reproduces
    what those files hold, which need not be the default; None for a row that every file states.
    needs: what a cache may have and without which a setting has no such row: `second`, the features
    of a second encoder. least_shots: with fewer images a class the default is taken and nothing is
    tried, unless values are given.

    Examples:
        >>> from clip_adapter import Hyper
        >>> alpha = Hyper(0.2, "How much of the adapter's features.", low=0, high=1)
        >>> alpha.checked("alpha", 1)
        1.0
        >>> alpha.checked("alpha", 2)
        Traceback (most recent call last):
        ValueError: alpha is 2, not a number in [0, 1]
    """

    default: Value
    help: str
    tried: tuple[Value, ...] = ()
    ablated: tuple[Value, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    words: tuple[str, ...] = ()
    static: bool = False
    single: bool = False
    flag: str = ""
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    meaning: Mapping[float, str] = field(default_factory=dict)
    absent: Value | None = None
    needs: str = ""
    least_shots: int = 0

    @property
    def is_numeric(self) -> bool:
        """Whether numbers are allowed."""
        ranged = self.low > -math.inf or self.above > -math.inf
        return ranged if isinstance(self.default, str) else not isinstance(self.default, bool)

    @property
    def kind(self) -> type:
        """bool, int, float, or str where only words are allowed."""
        if isinstance(self.default, str):
            return float if self.is_numeric else str
        return type(self.default)

    def applies(self, setting: Mapping[str, Value]) -> bool:
        """Whether it has an effect in a setting whose earlier values are these."""
        return not self.when or any(
            setting.get(name) in values for name, values in self.when.items()
        )

    def applies_to_cells(self, row: Mapping[str, str]) -> bool:
        """The same of a setting whose values are written as text."""
        return not self.when or any(
            row.get(name, "") in map(str, values) for name, values in self.when.items()
        )

    def checked(self, name: str, value: Any) -> Value:
        """`value` as a plain Python value.

        Raises ValueError, in a sentence, where it is none of those that are allowed.
        """
        if isinstance(value, str) and value in self.words:
            return value
        if self.kind is bool and isinstance(value, bool):
            return value
        if self.is_numeric and self._is_within(value):
            return int(value) if self.kind is int else float(value)
        wanted = "more than a float32 holds" if self._is_too_large(value) else f"not {self.wanted}"
        raise ValueError(f"{name} is {reprlib.repr(value)}, {wanted}")

    def checked_values(self, name: str, values: Sequence[Any]) -> tuple[Value, ...]:
        """The same for several values to try, each of which may be named once."""
        checked = tuple(self.checked(name, value) for value in values)
        if len(set(checked)) < len(checked):
            raise ValueError(f"{name} names a value twice")
        if self.single and len(checked) > 1:
            raise ValueError(f"{name} takes one value, which holds for all settings")
        return checked

    def _is_within(self, value: Any) -> bool:
        try:
            number = float(value) if not isinstance(value, str | bool) else math.nan
            whole = self.kind is not int or number == int(number)
        except (TypeError, ValueError, OverflowError):
            return False
        within = self.low <= number <= self.high and number > self.above
        return whole and within and abs(number) <= _LARGEST_FLOAT

    def _is_too_large(self, value: Any) -> bool:
        unbounded = self.kind is float and self.high == math.inf
        return unbounded and isinstance(value, float) and value > _LARGEST_FLOAT

    @property
    def wanted(self) -> str:
        """What is allowed, in words."""
        if self.kind is bool:
            return "true or false"
        allowed = [f"`{word}`" for word in self.words]
        if self.is_numeric:
            allowed.insert(0, ("an integer" if self.kind is int else "a number") + self._range)
        return " or ".join(allowed)

    @property
    def _range(self) -> str:
        if self.high < math.inf:
            opening, low = ("(", self.above) if self.above > -math.inf else ("[", self.low)
            high = int(self.high) if self.kind is int else f"{self.high:g}"
            return f" in {opening}{low:g}, {high}]"
        if self.above > -math.inf:
            return f" > {self.above:g}"
        return f" ≥ {self.low:g}" if self.low > -math.inf else ""
