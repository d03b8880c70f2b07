"""The one exception whose text is meant for the user, and what goes into such texts."""


class LayerShapError(Exception):
    """Something the user can put right; the message is one plain sentence that says how."""


def first_line(error: Exception, longest: int = 200) -> str:
    """What another library says went wrong, fit for the middle of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:longest]
