"""Names on the Hugging Face hub, or on the mirror that ``HF_ENDPOINT`` names: which commit they are at, and
their files in the hub's own cache.

huggingface_hub does the rest by the environment: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, proxies.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from compress import pins
from compress.disk import DiskError, free_bytes, told, writing
from compress.errors import UserError

log = logging.getLogger(__name__)

NAME = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"
# Of the HTTP library that this version of the hub's client uses; where the hub is not reached, that speaks.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
# (names of the files there, the path of one of them on this machine) -> names of those that are needed
Choose = Callable[[Sequence[str], Callable[[str], Path]], list[str]]


class Unreachable(UserError):
    """The hub did not answer, or is not to be asked: what its cache has may do."""


def key(kind: str, name: str, revision: str | None) -> str:
    """How a name is called among the pins. kind: model or dataset"""
    return f"{kind} {name}" if revision is None else f"{kind} {name}@{revision}"


def commit_of(kind: str, name: str, revision: str | None) -> str:
    """The commit that a branch, a tag or a commit (None: main) of a name is at, asked once in a process.

    kind: model or dataset
    Where the hub is not reached, or HF_HUB_OFFLINE is set: that of the cache, with a warning. Raises
    UserError if there is no such name or revision, or none in the cache.
    """
    return pins.pinned(key(kind, name, revision), lambda: _ask(kind, name, revision))


def _ask(kind: str, name: str, revision: str | None) -> str:
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    ref = _ref(kind, name, revision)
    try:
        commit = str(_told(kind, name, revision).sha)
    except Unreachable as error:
        if not ref.is_file() or not COMMIT.fullmatch(ref.read_text().strip()):
            raise
        commit = ref.read_text().strip()
        log.warning("%s: taken at commit %s, which is in the cache", error, commit)
        return commit
    if not COMMIT.fullmatch(commit):
        raise UserError(f"the hub says {commit[:60]!r} is the commit of {name}, which is none")
    _fresh[ref] = commit
    return commit


# What the hub said in this process, by the file of its cache that is to hold it.
_fresh: dict[Path, str] = {}


def keep(kind: str, name: str, revision: str | None) -> None:
    """Note, now that the files are there, which commit a revision is at: where the hub's own library looks
    when it is offline."""
    ref = _ref(kind, name, revision)
    # Not what a run recorded long ago.
    if _fresh.get(ref) == commit_of(kind, name, revision):
        with writing(ref):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(_fresh.pop(ref))


def _ref(kind: str, name: str, revision: str | None) -> Path:
    refs = _cache(kind, name) / "refs"
    ref = refs / (revision or MAIN)
    if ".." in ref.parts or refs not in ref.parents:
        raise UserError(f"{revision!r} is no revision: choose a branch, a tag or a commit")
    return ref


def _told(kind: str, name: str, revision: str | None) -> Any:
    """What the hub says of a name: ``sha``, and ``siblings`` with their ``rfilename`` and ``size``."""
    try:
        return HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
    except GatedRepoError as error:
        raise UserError(
            f"{kind} {name} is gated: accept its terms at {constants.ENDPOINT}/{name}, and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{kind} {name} is not on {constants.ENDPOINT}, or needs a token that may read it (HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{kind} {name} has no revision {revision!r}: choose one of its branches, tags or commits"
        ) from error
    except (OSError, ValueError, HTTP_ERROR) as error:
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        raise (UserError if answered else Unreachable)(
            f"{kind} {name} cannot be had from the hub: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _cache(kind: str, name: str) -> Path:
    """Where the hub's cache keeps a name."""
    return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(
        repo_id=name, repo_type=kind
    )


def model_file(name: str, commit: str, file: str) -> Path:
    """One file of a model, fetched if the cache lacks it. Raises UserError."""
    try:
        with writing(_cache("model", name)):
            return Path(hf_hub_download(name, file, revision=commit))
    except (OSError, ValueError, HTTP_ERROR) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} of {name} cannot be had from the hub: {_reason(error)}") from error


@functools.cache
def model_folder(name: str, commit: str, choose: Choose) -> Path:
    """The folder of a model at a commit in the hub's cache, with the files that ``choose`` asks for fetched.

    Where the hub is not reached: what of it is there. Raises UserError if that is nothing, or the disk has no
    room for what is missing.
    """
    try:
        found = _told("model", name, commit)
    except Unreachable as error:
        config = try_to_load_from_cache(name, "config.json", revision=commit)
        if not isinstance(config, str):
            raise UserError(f"{error}, and its cache has no files of commit {commit}") from error
        log.warning("%s: its files are those of the cache", error)
        return Path(config).parent
    sizes = {file.rfilename: file.size for file in found.siblings or ()}
    wanted = choose(list(sizes), lambda file: model_file(name, commit, file))
    missing = [
        file
        for file in wanted
        if not isinstance(try_to_load_from_cache(name, file, revision=commit), str)
    ]
    check_room(name, _cache("model", name), [sizes[file] for file in missing], "HF_HOME")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        with writing(_cache("model", name)):
            return Path(snapshot_download(name, revision=commit, allow_patterns=wanted))
    except (OSError, ValueError, HTTP_ERROR) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model {name} cannot be had from the hub: {_reason(error)}") from error


def check_room(what: str, cache: Path, sizes: Sequence[int | None], moved_by: str) -> None:
    """Raises DiskError if files of these sizes (None: nobody says) have no room in a cache, which the
    variable ``moved_by`` moves."""
    needed, free = sum(size or 0 for size in sizes), free_bytes(cache)
    if needed > free:
        raise DiskError(
            f"{what} has no room in {cache}: it takes {told(needed)}, {told(free)} are free there: make "
            f"space, or move the cache by {moved_by}"
        )
