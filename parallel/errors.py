"""The one error of this room: a layout that cannot work."""


class LayoutError(ValueError):
    """What somebody asked of ranks, degrees or engines cannot be; the message says what can."""
