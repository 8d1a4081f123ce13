"""Files behind a URL: what is there, or why it cannot be seen. fsspec knows the protocols."""

from __future__ import annotations

import glob
import re

import fsspec  # type: ignore[import-untyped]
from fsspec.registry import known_implementations  # type: ignore[import-untyped]

# The names that pip knows them by; fsspec's own message names some of them in prose.
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "adl": "adlfs", "sftp": "paramiko", "ssh": "paramiko", "oss": "ossfs", "webhdfs": "requests", "hdfs": "pyarrow",
    "dropbox": "dropboxdrivefs", "smb": "smbprotocol",
}  # fmt: skip


def is_url(name: str) -> bool:
    """Whether a dataset's name has a protocol; `hf://` is left to `datasets`."""
    return re.match(r"[a-z][a-z0-9+.-]+://", name) is not None


def list_remote(url: str) -> list[str]:
    """URLs of the file that `url` is, of those that it matches, or of all files below the folder that it is.

    Raises:
        ValueError: an unknown protocol, a package that is missing (with its name), nothing there, or no access.
    """
    protocol = url.partition("://")[0]
    if protocol not in known_implementations and protocol not in fsspec.registry:
        raise ValueError(
            f"{url!r}: unknown protocol {protocol!r}. Known: {', '.join(sorted(known_implementations))}"
        )
    try:
        files, path = fsspec.core.url_to_fs(url)
        if glob.has_magic(url) and protocol not in ("http", "https"):  # there `?` begins a query
            found = sorted(file for file in files.glob(path) if files.isfile(file))
        elif files.isfile(path):
            return [url]
        else:
            found = sorted(files.find(path))
    except ImportError as error:
        package = PACKAGES.get(protocol)
        advice = f"pip install {package}" if package else str(error)
        raise ValueError(f"{url!r}: {protocol}:// needs a package that is not installed: {advice}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{url!r} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{url!r}: there is nothing")
    return [files.unstrip_protocol(file) for file in found]
