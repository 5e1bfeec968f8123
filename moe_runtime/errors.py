"""Errors of the runtime itself. No torch here: the CLI imports this."""


class DoesNotFitError(MemoryError):
    """The model needs more memory than the device has: says needs, has, and what would fit."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n{hint}")
        self.message = message
        self.hint = hint
