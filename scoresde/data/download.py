"""Files from the net, checked before they stand under their name. Nothing here runs unless a caller asks for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.request import urlopen

from tqdm.auto import tqdm

from scoresde.files import write_whole

__all__ = ["fetch"]

_BLOCK = 2**20  # bytes
_PATIENCE = 60.0  # seconds that a server may keep silent


def fetch(path: Path, urls: Sequence[str], md5: str, progress: bool = True) -> Path:
    """Download a file, unless it is there.

    Args:
        path: where to; its folder is made. A file that is there stays as it is.
        urls: where from: the first that answers.
        md5: of its content, 32 hexadecimal digits, as data sets publish it. It tells damage, not an attacker: what is
            downloaded is only ever read by readers that execute nothing.
        progress: a bar.

    Returns:
        the path.

    Raises:
        ConnectionError: if no server gives it; the message says why, and what to do by hand.
        ValueError: if what came is something else. Nothing is kept of it.
    """
    if path.exists():
        return path
    failed = []
    for url in urls:
        try:
            write_whole(path, partial(_copy, url, md5, path.name if progress else ""))
            return path
        except (OSError, HTTPException) as error:
            failed.append(f"{url}: {error}")
    raise ConnectionError(f"{path.name} could not be downloaded ({'; '.join(failed)}): put it in {path.parent} by hand")


def _copy(url: str, md5: str, bar_name: str, file: BinaryIO) -> None:
    """
    Raises:
        ValueError: if the content has another checksum.
    """
    found = hashlib.md5(usedforsecurity=False)
    with urlopen(url, timeout=_PATIENCE) as answer:
        length = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm(desc=bar_name, total=length, unit="B", unit_scale=True, disable=not bar_name, leave=False) as bar:
            while block := answer.read(_BLOCK):
                file.write(block)
                found.update(block)
                bar.update(len(block))
    if found.hexdigest() != md5:
        raise ValueError(f"{url} gave a file with the MD5 checksum {found.hexdigest()}, expected {md5}: try again")
