"""What can be wrong with a checkpoint, as the user sees it. No torch here: the CLI imports this."""


class CheckpointError(ValueError):
    """A checkpoint cannot be trusted or read: says file, tensor, got, expected, what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n{hint}")
        self.message = message
        self.hint = hint


class UnsupportedModelError(NotImplementedError):
    """A sound checkpoint of an architecture or with a feature that this version does not have."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n{hint}")
        self.message = message
        self.hint = hint
