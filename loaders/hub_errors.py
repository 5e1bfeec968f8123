"""What can go wrong between us and the hub, each as one CheckpointError with what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

# HTTPError is httpx's in huggingface_hub 1.x and httpx2's in 2.x; this name is right in both.
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loaders.errors import CheckpointError

LOGIN = "run `hf auth login` or set HF_TOKEN"


@contextmanager
def hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the hub, the network or the disk raises inside into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (HTTPError, OSError, HFValidationError) as error:
        message, hint = _explain(error, repo_id, revision or "main")
        raise CheckpointError(f"{repo_id}: {message}", hint=hint) from error


def is_unreachable(error: Exception) -> bool:
    """Whether the hub did not answer or had a fault of its own, so that a cached copy will do."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, (HTTPError, OfflineModeIsEnabled))


def _explain(error: Exception, repo_id: str, revision: str) -> tuple[str, str]:
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HTTPError):
        return _explain(error.__cause__, repo_id, revision)  # asked, failed, and not cached either
    if isinstance(error, GatedRepoError):
        return (
            "this model is gated: the hub gives it only to accounts that accepted its licence",
            f"accept the licence at {page}, then {LOGIN} with that account's token",
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "no such model on the hub, or it is private (and there is no folder of that name here)",
            f"check the spelling at {page}; if the model is private, {LOGIN}",
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"the model exists but has no revision '{revision}'",
            f"branches, tags and commits are listed at {page}/commits/main",
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return f"a file is missing on the hub: {_first_line(error)}", f"see {page}/tree/{revision}"
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return not_cached(revision)
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk of {constants.HF_HUB_CACHE} is full; what arrived is kept",
            "free some space or point HF_HOME to a larger disk, then run the same command again",
        )
    if isinstance(error, HTTPError):
        return (
            f"cannot reach {constants.ENDPOINT}: {_first_line(error)}",
            "check the network, proxy and HF_ENDPOINT; a download goes on from where it stopped",
        )
    if isinstance(error, HFValidationError):
        return "not a hub id", "a hub id is NAME or OWNER/NAME; a folder must exist"
    return _first_line(error), f"see {page}"


def not_cached(revision: str) -> tuple[str, str]:
    """Message and hint for a model that is not on this machine while the hub may not be asked."""
    return (
        f"revision '{revision}' is not complete in the cache {constants.HF_HUB_CACHE}, "
        "and the hub may not be asked (HF_HUB_OFFLINE or local_files_only)",
        "run once with the network on, or give a folder",
    )


def _explain_status(error: HfHubHTTPError) -> tuple[str, str]:
    status = error.response.status_code
    if status == 401:
        return "the hub refused the token (401)", f"{LOGIN} with a valid token, or unset HF_TOKEN"
    if status == 403:
        return (
            "the token has no right to read this model (403)",
            f"{LOGIN} with a token that has read access",
        )
    if status == 429:
        return "the hub asks to slow down (429)", f"wait a minute, or {LOGIN} for higher limits"
    if status >= 500:
        return f"the hub has a fault (HTTP {status})", "try again later; status.huggingface.co"
    return f"the hub answered HTTP {status}: {_first_line(error)}", "add --debug for the details"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
