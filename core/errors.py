"""The one exception whose text is meant for the user."""


class LayerShapError(Exception):
    """Something the user can put right; the message is one plain sentence that says how."""
