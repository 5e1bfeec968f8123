"""Opening MODEL by its headers alone, for the verbs that read no weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.bundled import BUNDLED

if TYPE_CHECKING:
    from loaders.checkpoint import Checkpoint


def open_headers(model: str, revision: str | None) -> Checkpoint:
    """A folder, a hub model by range requests, or a bundled one. Raises CheckpointError."""
    # Slow imports: torch and huggingface_hub.
    from loaders.checkpoint import open_folder
    from loaders.hub import local_folder
    from loaders.hub_headers import remote_headers

    folder = local_folder(model, revision=revision, bundled=BUNDLED)
    return remote_headers(model, revision) if folder is None else open_folder(folder)
