"""JSON from files we do not trust: one object, no key twice, bounded, one error type. No torch."""

from __future__ import annotations

import json
from typing import Any

from loaders.errors import CheckpointError

_LONGEST_INTEGER = 100  # digits; Python 3.10 takes quadratic time over millions of them


def parse_json_object(raw: bytes, *, file: str) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises CheckpointError, naming `file`, for anything else: other encodings, other JSON values,
    a key given twice, nesting or integers out of all proportion.
    """
    try:
        value = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys, parse_int=_bounded_integer
        )
    except UnicodeDecodeError as error:
        raise _not_json(file, f"byte {error.start} is not UTF-8 text") from error
    except RecursionError as error:
        raise _not_json(file, "nested too deeply") from error
    except ValueError as error:
        raise _not_json(file, str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file}: expected a JSON object, found {shown(value)}",
            hint="the file is damaged: download the checkpoint again",
        )
    return value


def shown(value: object) -> str:
    """A value as it appears in a message: at most 60 characters, on one line."""
    text = str(value) if isinstance(value, tuple) else ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: list[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{shown(key)} is given twice")
        values[key] = value
    return values


def _bounded_integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _not_json(file: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: not a valid JSON file: {reason}",
        hint="the file is damaged: download the checkpoint again",
    )
