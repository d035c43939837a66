"""A method of the user's own, named on the command line for an adapter that it was fitted with."""

from clip_adapter.adapters.registry import find_method
from clip_adapter.errors import UserError


def know_method(name: str | None) -> None:
    """Import `MODULE:NAME`, so that its method is known by the name that adapters state.

    Nothing but the user's own word imports a module: an adapter that names one is refused.
    Raises UserError where there is no such method.
    """
    if name is None:
        return
    try:
        find_method(name)
    except LookupError as error:
        raise UserError(f"--method: {error}.").with_notes_of(error) from None
