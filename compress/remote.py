"""Files behind a URL (s3://, gs://, hf://, https://, memory://, ...), copied into the user cache by fsspec.

A copy is a folder named after the URL and the state of its files: their sizes, and tags or times. Another
state is another folder. Files appear under their names only when they are whole, so what was cut off goes on
with the next file; the folder has its name when all are there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from compress import pins
from compress.disk import writing
from compress.errors import UserError
from compress.hub import Choose, check_room
from compress.user_cache import cache_dir

log = logging.getLogger(__name__)

URL = re.compile(r"([a-z][a-z0-9+.-]*)://")
LOCAL = ("file", "local")
# What filesystems call a tag of the content, or the time of its last change; the first that one has is taken.
STAMPS = (
    "ETag", "etag", "md5Hash", "content_md5", "sha256", "checksum", "blob_id", "generation",
    "LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified", "created",
)  # fmt: skip
# Of the disk that a copy is written to, not of the filesystem that is asked.
OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class Listed:
    """A file as its filesystem lists it. place: what the filesystem calls it; size: None if it is not told"""

    place: str
    size: int | None
    stamp: str


def is_url(source: str) -> bool:
    return URL.match(source) is not None


def local_path(source: str) -> str:
    """A file:// URL as the path that it is; anything else as it came."""
    found = URL.match(source)
    return source[found.end() :] if found and found[1] in LOCAL else source


def fetched_file(url: str) -> Path:
    """The copy of one file. Raises UserError, one sentence, if it cannot be had."""
    name = _name(url)
    if (copy := _copy(url)) is not None:
        return copy / name
    fs, path = _filesystem(url)
    with _speaking(url):
        found = fs.info(path)
    if found.get("type") == "directory":
        raise UserError(f"{url} is a folder: name a file in it")
    with _speaking(url):
        listed = _listed(fs, found)
    return _fetched(url, fs, {name: listed}) / name


def fetched_folder(url: str, choose: Choose) -> Path:
    """The copy of a folder, with the files that ``choose`` asks for. Raises UserError, one sentence, if it
    cannot be had, or lists what does not lie in it."""
    _name(url)
    if (copy := _copy(url)) is not None:
        return copy
    fs, path = _filesystem(url)
    with _speaking(url):
        entries = fs.ls(path, detail=True)
    files = {}
    for entry in entries:
        # Of a file alone some list the file itself.
        if entry.get("type") != "file" or entry["name"].strip("/") == path.strip("/"):
            continue
        name = _inside(url, path, entry)
        with _speaking(url):
            files[name] = _listed(fs, entry)
    with tempfile.TemporaryDirectory() as beside:

        def read(name: str) -> Path:
            with _speaking(url):
                fs.get_file(files[name].place, str(target := Path(beside, name)))
            return target

        wanted = choose(list(files), read)
    return _fetched(url, fs, {name: files[name] for name in wanted})


def _copy(url: str) -> Path | None:
    """The whole copy of the state that a URL is pinned to, if there is one: nothing is asked then."""
    pin = pins.known(url)
    return None if pin is None or not (copy := _place(url, pin)).is_dir() else copy


def _place(url: str, pin: str) -> Path:
    return cache_dir() / "fetched" / f"{_name(url)}-{pin[:16]}"


def _name(url: str) -> str:
    """The last part of a URL, as a file or folder may be called here."""
    name = posixpath.basename(url.rstrip("/"))
    if not _plain(name):
        raise UserError(f"{url} ends in no name of a file or folder")
    return name


def _plain(name: str) -> bool:
    """Whether this is a name in a folder, and no way out of it."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\")


def _filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, and the URL's path in it. Raises UserError."""
    import fsspec

    parts = urlsplit(url)
    if parts.password is not None or "?" in url:
        # Not repeated here: it is what nobody should see.
        raise UserError(
            f"a {parts.scheme}:// URL holds a password or a query, which would be recorded: leave it out, "
            "keys belong into the environment"
        )
    if "::" in url:
        raise UserError(f"{url} is a chain of filesystems: give the URL of plain files")
    try:
        fs, path = fsspec.core.url_to_fs(url)
        # Of an earlier look, in the same process.
        fs.invalidate_cache()
    except ImportError as error:
        raise UserError(f"{url} needs a package that is not here: {error}") from error
    except Exception as error:
        # Each filesystem raises its own.
        raise UserError(f"{url} cannot be opened: {_reason(error)}") from error
    return fs, path


@contextlib.contextmanager
def _speaking(url: str) -> Iterator[None]:
    """Whatever a filesystem raises while it is asked is a UserError that names the URL."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{url} does not exist, or may not be seen") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_DISK:
            raise
        raise UserError(f"{url} cannot be had: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _inside(url: str, path: str, entry: Mapping[str, Any]) -> str:
    """The name of a listed file. Raises UserError for a link, and for what does not lie in the folder."""
    name = posixpath.basename(entry["name"])
    if entry["name"].strip("/") != f"{path.strip('/')}/{name}".lstrip("/") or not _plain(name):
        raise UserError(f"{url} lists {entry['name']!r}, which does not lie in it")
    if entry.get("islink"):
        raise UserError(f"{url} lists {name}, a link: copy the file there")
    return name


def _listed(fs: Any, entry: Mapping[str, Any]) -> Listed:
    stamps = [entry[key] for key in STAMPS if entry.get(key) is not None]
    size = entry.get("size")
    stamp = str(stamps[0]) if stamps else str(fs.ukey(entry["name"]))
    return Listed(entry["name"], None if size is None else int(size), stamp)


def _fetched(url: str, fs: Any, files: Mapping[str, Listed]) -> Path:
    """The folder with copies of the files, which pins the URL to their state."""
    state = [[name, file.size, file.stamp] for name, file in sorted(files.items())]
    pin = hashlib.sha256(json.dumps([url, *state]).encode()).hexdigest()
    if pins.known(url) not in (None, pin):
        log.warning("%s has changed since the run began, and no copy of before is here", url)
        pins.forget(url)
    target = _place(url, pins.pinned(url, lambda: pin))
    partial = target.with_name(f"{target.name}.partial")
    with _alone(partial):
        if target.is_dir():
            # Another process was first.
            shutil.rmtree(partial, ignore_errors=True)
            return target
        missing = {name: file for name, file in files.items() if not (partial / name).exists()}
        check_room(url, partial, [file.size for file in missing.values()], "XDG_CACHE_HOME")
        for name, file in missing.items():
            _get(url, fs, file, partial / name)
        partial.rename(target)
    return target


def _get(url: str, fs: Any, file: Listed, target: Path) -> None:
    log.info("fetching %s of %s", target.name, url)
    unfinished = target.with_name(f"{target.name}.partial")
    with writing(unfinished), _speaking(url):
        fs.get_file(file.place, str(unfinished))
    if file.size is not None and (came := unfinished.stat().st_size) != file.size:
        raise UserError(
            f"{target.name} of {url} came with {came} bytes of {file.size}: start again"
        )
    unfinished.rename(target)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A folder, made if it is not there, while no other process fills it. The lock goes with the process."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)
