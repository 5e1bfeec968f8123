"""From what the user names (a folder, a bundled checkpoint, a hub id) to a folder with its files.

The hub is reached through huggingface_hub alone; files land in its cache, where other tools find
them. Only what a checkpoint needs is fetched: safetensors, their index, configs, tokenizer and chat
template of the root folder, or of original/ when the root has no safetensors. Pickles never.
"""

from __future__ import annotations

import glob
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import are_progress_bars_disabled
from tqdm import tqdm

from loaders.errors import CheckpointError
from loaders.files import CheckpointFiles
from loaders.hub_errors import hub_errors, is_unreachable, not_cached
from loaders.hub_fetch import BlobDownload, fetch_all
from loaders.hub_files import HubFile, HubFiles, HubRepo
from loaders.json_text import parse_json_object, shown
from loaders.safetensors_index import INDEX, SINGLE, safetensors_in

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "encoding/encoding_dsv4.py",  # of DeepSeek V4: texts of its chat format, never run
    "original/config.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
LARGEST_HTTP_FILE = constants.MAX_HTTP_DOWNLOAD_SIZE  # the hub serves larger ones by Xet only
_NONE_BUNDLED: Mapping[str, Path] = MappingProxyType({})


def resolve(
    path_or_id: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    bundled: Mapping[str, Path] = _NONE_BUNDLED,
    before_weights: Callable[[CheckpointFiles], None] | None = None,
) -> Path:
    """The folder of a checkpoint, downloaded first if it is a hub id that is not in the cache.

    path_or_id:      a name in `bundled`, an existing folder, or a hub id (OWNER/NAME)
    revision:        branch, tag or commit; for hub ids only
    before_weights:  called, when weights are about to be fetched, with the remote files: it may
                     open their configs and headers and raise
    Raises CheckpointError with what to do: not found, gated, refused, unreachable, disk too small.

    An interrupted download goes on from the last byte. With HF_HUB_OFFLINE or local_files_only the
    cache alone is asked; when the hub cannot be reached, a complete cached copy serves with a
    warning.
    """
    folder = local_folder(path_or_id, revision=revision, bundled=bundled)
    if folder is not None:
        return folder
    with hub_errors(path_or_id, revision):
        repo = None if local_files_only else find_repo(path_or_id, revision)
        if repo is None:
            return cached_folder(path_or_id, revision)
        return _download(repo, progress=progress, before_weights=before_weights)


@dataclass(frozen=True)
class HubSettings:
    """What huggingface_hub was told by its environment variables; never the token itself."""

    endpoint: str
    cache: Path
    offline: bool
    has_token: bool


def hub_settings() -> HubSettings:
    """The settings in force in this process."""
    return HubSettings(
        endpoint=constants.ENDPOINT,
        cache=Path(constants.HF_HUB_CACHE),
        offline=constants.HF_HUB_OFFLINE,
        has_token=get_token() is not None,
    )


def local_folder(
    path_or_id: str, *, revision: str | None = None, bundled: Mapping[str, Path] = _NONE_BUNDLED
) -> Path | None:
    """The folder when one is meant, None when it is a hub id; CheckpointError when neither."""
    path = bundled.get(path_or_id) or Path(path_or_id).expanduser()
    if path_or_id and path.is_dir():
        if revision is not None:
            raise ValueError(f"a revision applies to hub models, and {path_or_id} is a folder")
        return path
    if path_or_id in bundled:
        raise CheckpointError(
            f"the bundled checkpoint '{path_or_id}' is missing from this installation ({path})",
            hint="install moe_runtime again",
        )
    if path.is_file():
        raise CheckpointError(
            f"{path_or_id} is a file, not a checkpoint folder",
            hint=f"give the folder that holds it: {path.parent}",
        )
    if not _HUB_ID.fullmatch(path_or_id) or ".." in path_or_id or "--" in path_or_id:
        raise CheckpointError(
            f"{path_or_id!r}: no such folder, and not a hub id either",
            hint="give a folder that exists, or a hub id such as openai/gpt-oss-20b",
        )
    return None


def find_repo(repo_id: str, revision: str | None) -> HubRepo | None:
    """Ask the hub for the list of files; None when the cache must do instead.

    That is so offline, and, with a warning, when the hub does not answer but the cache is complete.
    """
    try:
        info = HfApi().model_info(
            repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except OfflineModeIsEnabled:
        return None
    except HTTPError as error:
        if not is_unreachable(error) or not _is_cached(repo_id, revision):
            raise
        warnings.warn(
            f"{constants.ENDPOINT} does not answer: using the copy of {repo_id} in the cache, "
            "which may not be the newest",
            stacklevel=2,
        )
        return None
    files = {
        entry.rfilename: HubFile(entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
        for entry in info.siblings or []
    }
    return HubRepo(repo_id, revision or constants.DEFAULT_REVISION, info.sha or "", files)


def cached_folder(repo_id: str, revision: str | None) -> Path:
    """The folder in the cache, checked to hold all weights; CheckpointError otherwise."""
    if not _is_cached(repo_id, revision):
        message, hint = not_cached(revision or constants.DEFAULT_REVISION)
        raise CheckpointError(f"{repo_id}: {message}", hint=hint)
    return _snapshot(repo_id, revision, ["config.json"], local_files_only=True)


def small_files(names: Collection[str]) -> list[str]:
    """Of a repository's files: configs, tokenizer, chat template and the index of the weights."""
    index = weight_index(names)
    return [name for name in SMALL_FILES if name in names] + ([index] if index else [])


def weight_index(names: Collection[str]) -> str | None:
    """The file that lists the shards, if there is one."""
    index = _weights_prefix(names) + INDEX
    return index if index in names else None


def weight_files(names: Collection[str], raw_index: bytes | None) -> list[str]:
    """Of a repository's files: the safetensors to read. An index decides; without it, all of them.

    Raises CheckpointError when there are only pickles, or the index names a file that is not there.
    """
    prefix = _weights_prefix(names)
    if raw_index is None:
        single = prefix + SINGLE
        return [single] if single in names else safetensors_in(prefix, names)
    shards = {prefix + shard for shard in _indexed_shards(raw_index, prefix + INDEX)}
    missing = sorted(shards - set(names))
    if missing:
        raise CheckpointError(
            f"{prefix}{INDEX} names {shown(missing[0])}, which is not there "
            f"({len(missing)} missing)",
            hint="the upload is incomplete: try another revision",
        )
    return sorted(shards)


def _weights_prefix(names: Collection[str]) -> str:
    for prefix in ("", "original/"):
        if safetensors_in(prefix, names):
            return prefix
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    found = f"only {pickles[0]} and the like" if pickles else "no weights at all"
    raise CheckpointError(
        f"no safetensors in the root or in original/, {found}",
        hint="pickle files can run code and are never opened: look for a safetensors version",
    )


def _indexed_shards(raw_index: bytes, name: str) -> set[str]:
    weight_map = parse_json_object(raw_index, file=name).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{name}: weight_map: expected a JSON object of names",
            hint="the index is damaged: download it again",
        )
    return {str(shard) for shard in weight_map.values()}


def _download(
    repo: HubRepo, *, progress: bool, before_weights: Callable[[CheckpointFiles], None] | None
) -> Path:
    if _is_cached(repo.repo_id, repo.commit):
        return _snapshot(repo.repo_id, repo.revision, small_files(repo.files))
    index = weight_index(repo.files)  # refuses a repository without safetensors
    files = HubFiles(repo)
    weights = weight_files(repo.files, files.text(index) if index else None)
    if before_weights is not None:
        files.read_headers(weights)
        before_weights(files)
    small = _blob_downloads(repo, small_files(repo.files))
    large = _blob_downloads(repo, weights)
    _check_disk(repo, small + large)
    fetch_all(small, lambda count: None)
    _fetch_with_bar(repo, large, progress=progress)
    return _snapshot(repo.repo_id, repo.revision, small_files(repo.files) + weights)


def _blob_downloads(repo: HubRepo, names: list[str]) -> list[BlobDownload]:
    """The files to fetch by ourselves; the rest is cached, kept in git, or too large for HTTP."""
    cache = Path(constants.HF_HUB_CACHE)
    folder = repo_folder_name(repo_id=repo.repo_id, repo_type="model")
    downloads = []
    for name in names:
        file = repo.files[name]
        cached = isinstance(try_to_load_from_cache(repo.repo_id, name, revision=repo.commit), str)
        if cached or file.sha256 is None or file.size > LARGEST_HTTP_FILE:
            continue
        blob = cache / folder / "blobs" / file.sha256
        lock = cache / ".locks" / folder / f"{file.sha256}.lock"
        downloads.append(BlobDownload(name, repo.url(name), blob, lock, file.size, file.sha256))
    return downloads


def _check_disk(repo: HubRepo, downloads: list[BlobDownload]) -> None:
    needed = sum(download.missing_bytes for download in downloads)
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{repo.repo_id}: {_size(needed)} are still to be downloaded, and the disk of {cache} "
            f"has {_size(free)} free",
            hint="free some space, or point HF_HOME to a folder on a larger disk",
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _fetch_with_bar(repo: HubRepo, downloads: list[BlobDownload], *, progress: bool) -> None:
    total = sum(download.size for download in downloads)
    missing = sum(download.missing_bytes for download in downloads)
    silent = not progress or are_progress_bars_disabled()
    with tqdm(
        desc=f"Downloading {repo.repo_id}",
        total=total,
        initial=total - missing,
        unit="B",
        unit_scale=True,
        disable=True if silent or not missing else None,  # None: off unless stderr is a terminal
    ) as bar:
        fetch_all(downloads, bar.update)


def _is_cached(repo_id: str, revision: str | None) -> bool:
    """Whether the cache holds a revision with every shard that its index names."""
    try:
        folder = _snapshot(repo_id, revision, ["config.json"], local_files_only=True)
        files = (path for path in folder.rglob("*") if path.is_file())
        names = {path.relative_to(folder).as_posix() for path in files}
        index = weight_index(names)
        weight_files(names, (folder / index).read_bytes() if index else None)
    except (FileNotFoundError, ValueError):  # no such snapshot; not whole, or damaged
        return False
    return True


def _snapshot(
    repo_id: str, revision: str | None, names: list[str], *, local_files_only: bool = False
) -> Path:
    """huggingface_hub's folder for a revision, holding at least the files named."""
    return Path(
        snapshot_download(
            repo_id,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=[glob.escape(name) for name in names],
            tqdm_class=_SilentBar,
        )
    )


class _SilentBar(tqdm):
    """Small files and finished blobs need no bar."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})
