"""Results as frames of pandas, which need not be installed, and as what a notebook shows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any

from clip_adapter.errors import UserError

if TYPE_CHECKING:
    import pandas


SHOWN = 20
PICTURE = "data:image/"


def rows_of(columns: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def html_table(rows: Iterable[Mapping[str, Any]], note: str = "") -> str:
    """The first twenty rows as HTML, below a note; what is a data URI of an image is shown as one.

    Text is escaped. Rows are read no further than is shown.
    """
    listed = list(islice(rows, SHOWN + 1))
    names = list(dict.fromkeys(name for row in listed for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td>{_shown(row.get(name))}</td>' for name in names)}</tr>"
        for row in listed[:SHOWN]
    )
    more = "<p>…</p>" if len(listed) > SHOWN else ""
    first = f"<p>{escape(note)}</p>" if note else ""
    return f"{first}<table><tr>{head}</tr>{body}</table>{more}"


def _shown(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = escape(str(value))
    return f'<img src="{text}">' if text.startswith(PICTURE) else text


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
