"""Checksums of the files below a folder: written with it, compared when it is read.

{"tree/a": [bytes, sha256], ...} by path below the folder, in its manifest or in a file of its own.
"""

import concurrent.futures
import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from prophy_jax.run.errors import UserError, counted

# Marks of Orbax, of when and where a tree was written; it writes them last.
MARKS = ("_CHECKPOINT_METADATA", "commit_success.txt")
THREADS = 4  # Hashing releases Python's lock.
enabled = True  # The flag --noverify of the commands switches it off.


def hash_file(path: str | os.PathLike) -> str:
    """sha256 of its bytes."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hash_files(folder: str | os.PathLike, without: Collection[str] = ()) -> dict[str, list]:
    """[bytes, sha256] of every file below a folder, by its path there; `without` files of some names."""
    root, without = Path(folder), (*MARKS, *without)
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name not in without)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        digests = threads.map(hash_file, files)
        return {
            path.relative_to(root).as_posix(): [path.stat().st_size, digest]
            for path, digest in zip(files, digests, strict=True)
        }


@contextlib.contextmanager
def verified(
    folder: str | os.PathLike, listed: Mapping[str, Any], remedy: str, share: tuple[int, int] = (0, 1)
) -> Iterator[None]:
    """Compares the files of a folder with what `hash_files` gave, in threads, while the body reads them.

    Args:
        folder: the folder.
        listed: what `hash_files` gave when it was written.
        remedy: what the user can do about a damaged file.
        share: (i, P): this process compares every P-th file, from number i.

    Raises:
        UserError: files are missing or have other bytes; it names them, also where the body raised.
    """
    names = sorted(listed)[share[0] :: share[1]] if enabled else []
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda name: _fault(os.path.join(folder, name), listed[name]), names)
        try:
            yield
        except Exception as error:
            _refuse([fault for fault in found if fault], remedy, error)
            raise
        _refuse([fault for fault in found if fault], remedy)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON types with "checksum", that of all the rest."""
    return {**content, "checksum": _hash_json(content)}


def unsealed(content: dict[str, Any], where: str, remedy: str) -> dict[str, Any]:
    """What was `sealed`, as it was before. Raises UserError, with `remedy`, where it has changed since."""
    if not is_intact(content):
        raise UserError(f"{where} is damaged (not as it was written): {remedy}")
    content = copy.copy(content)
    content.pop("checksum", None)
    return content


def is_intact(content: Mapping[str, Any]) -> bool:
    """Whether JSON is as it was `sealed`; so is what never was."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return content.get("checksum", "") in ("", _hash_json(rest))


def _hash_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fault(path: str, entry: Any) -> str:
    """What is wrong with a file; "" where it is as it was written."""
    try:
        size, digest = entry
        found = os.path.getsize(path)
        if found != size:
            return f"{path} is damaged, it has {found} bytes and not the {size} that were written"
        return "" if hash_file(path) == digest else f"{path} is damaged, its bytes are not those written"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except (TypeError, ValueError):
        return f"the checksum of {path} is damaged"


def _refuse(faults: list[str], remedy: str, error: Exception | None = None) -> None:
    if faults:
        more = f", and {counted(len(faults) - 1, 'more file')} damaged" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}: {remedy}") from error
