"""What goes wrong here because of what a person asked or stored, not because of us."""


class LayoutError(ValueError):
    """What somebody asked of ranks, degrees or engines cannot be; the message says what can."""


class DamagedError(ValueError):
    """Stored tensors are not what was written; the message says which file, and what is wrong."""
