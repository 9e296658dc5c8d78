"""The error for what a person gave the data pipeline. Not for our own faults: those are asserts."""


class DataError(ValueError):
    """Wrong data or data settings: says what came, what was expected and what to change."""
