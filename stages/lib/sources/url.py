"""A file anywhere fsspec reaches, known by its sha256: fetched once, then read from this machine."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.registry import known_implementations

from stages.lib import files
from stages.lib.errors import ConfigError, ExternalError

_CHUNK = 4 << 20


def fetch(url: str, sha256: str) -> Path:
    """The file at an address, in the cache under its sha256; compressed ones as they are.

    Args: url: any address of fsspec, also a chain (zip://a.csv::https://...). sha256: of the file, 64 hex digits.
    Raises: ConfigError, for an address of no known kind; ExternalError, when a package is missing that reads such
        addresses, the address does not answer, or another file lies there.
    """
    kept = cache() / sha256
    if kept.exists() and files.sha256(kept) == sha256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    _check_kind(url)
    with tempfile.NamedTemporaryFile(dir=kept.parent, suffix=".partial", delete=False) as new:
        try:
            found = _copy(url, new)
            if found != sha256:
                raise ExternalError(
                    f"{shown(url)}: the file there has sha256 {found}, expected {sha256}. It is another file than "
                    "the one that was pinned: look at it, then change data.sha256 or data.url."
                )
            os.replace(new.name, kept)
        finally:
            Path(new.name).unlink(missing_ok=True)
    return kept


def cache() -> Path:
    """Where fetched files are kept, named by their sha256: XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qlora-pipeline", "sha256")


def name(url: str) -> str:
    """The file's own name: https://host/sets/chats.jsonl.gz?download=1 -> chats.jsonl.gz."""
    first = next((part for part in url.split("::") if "://" in part), url)
    path = urlsplit(first).path if first.startswith("http") else first
    return unquote(path.rstrip("/").rpartition("/")[2])


def shown(url: str) -> str:
    """An address without what may be secret in it: name and password, and the query of a signed address."""
    return re.sub(r"\?[^:]*", "", re.sub(r"://[^/@]*@", "://", url))


def _check_kind(url: str) -> None:
    for part in url.split("::"):
        protocol = part.partition("://")[0] if "://" in part else part if "::" in url else "file"
        if "/" in protocol:  # a path at the end of a chain
            continue
        if protocol not in fsspec.available_protocols():
            raise ConfigError(
                f"data.url: found {shown(url)!r}, expected an address that fsspec knows, like https:// or s3://; "
                f"{protocol!r} is none of them."
            )
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as fault:
            advice = known_implementations.get(protocol, {}).get("err", str(fault))
            raise ExternalError(
                f"data.url: {protocol}:// needs a package that the environment lacks ({advice}). Add it to "
                "pyproject.toml, then type `make lock` and `make env`; or change data.url."
            ) from None


def _copy(url: str, new: IO[bytes]) -> str:
    """Write what lies at an address to a file; its sha256."""
    digest = hashlib.sha256()
    try:
        with fsspec.open(url, "rb") as there:
            while chunk := there.read(_CHUNK):
                digest.update(chunk)
                new.write(chunk)
    except Exception as fault:  # each of fsspec's backends raises exceptions of its own
        if isinstance(fault, OSError) and fault.filename == new.name:
            raise
        reason = " ".join(str(fault).replace(url, shown(url)).split())[:200]
        raise ExternalError(
            f"{shown(url)}: could not be fetched ({type(fault).__name__}: {reason}). Is data.url right, and does this "
            "machine reach it with the permission it needs?"
        ) from None
    new.flush()
    return digest.hexdigest()
