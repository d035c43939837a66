"""Results as frames of pandas, which need not be installed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clip_adapter.errors import UserError

if TYPE_CHECKING:
    import pandas


def frame(columns: Mapping[str, Sequence[Any]]) -> "pandas.DataFrame":
    """The columns, of one length, by their names. Raises UserError without pandas."""
    try:
        import pandas
    except ImportError as error:
        raise UserError(f"to_frame() needs pandas ({error}): pip install pandas.") from None
    return pandas.DataFrame(dict(columns))


def frame_of_rows(rows: Iterable[Mapping[str, Any]]) -> "pandas.DataFrame":
    """The same of rows, some of which may lack columns of others: None stands there."""
    listed = list(rows)
    names = dict.fromkeys(name for row in listed for name in row)
    return frame({name: [row.get(name) for row in listed] for name in names})
