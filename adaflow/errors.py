"""The one exception that every stage raises for input it cannot use."""


class InputError(ValueError):
    """Bad input at a node's boundary.

    Args:
        where: the node or function that refuses.
        what: the input's name as the user sees it.
        got: what came, with numbers.
        expected: what would have been accepted, or what to change.
    """

    def __init__(self, where: str, what: str, got: object, expected: str):
        self.where, self.what, self.got, self.expected = where, what, got, expected
        super().__init__(f"{where}: input '{what}' is {got}; expected {expected}")


def require_one_of(value: object, options, where: str, what: str) -> None:
    """Raise :class:`InputError` unless ``value`` is among ``options``, which ComfyUI does not check over HTTP."""
    options = list(options)
    require(value in options, where, what, repr(value)[:80], "one of " + ", ".join(map(str, options)))


def require(condition: bool, where: str, what: str, got: object, expected: str) -> None:
    """Raise :class:`InputError` with these four facts unless ``condition`` holds."""
    if not condition:
        raise InputError(where, what, got, expected)
