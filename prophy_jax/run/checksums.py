"""Checksums of the files below a folder: written with it, compared when it is read.

{"tree/a": [bytes, hash], ...} by path below the folder, in its manifest or in a file of its own. On a disk
the hash is a SHA-256 ("a3f..."). A bucket knows the MD5 of its objects ("md5:9d1..."): nothing is read again.
"""

import concurrent.futures
import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from prophy_jax.run import storage
from prophy_jax.run.errors import UserError, counted

# Marks of Orbax, of when and where a tree was written; it writes them last.
MARKS = ("_CHECKPOINT_METADATA", "commit_success.txt")
THREADS = 4  # Hashing releases Python's lock.
enabled = True  # The flag --noverify of the commands switches it off.


def hash_files(
    folder: str | os.PathLike, without: Collection[str] = (), known: Mapping[str, list] | None = None
) -> dict[str, list]:
    """[bytes, hash] of every file below a folder, by its path there.

    Args:
        folder: the folder.
        without: names of files that are left out.
        known: what this function gave of some of them, which are not read again if they have as many bytes.
    """
    listed = storage.list_files(folder)

    def entry(name: str) -> tuple[str, list]:
        size, md5 = listed[name]
        found = (known or {}).get(name, [None])
        if found[0] == size:
            return name, found
        return name, [size, f"md5:{md5}" if md5 else storage.hash_file(os.path.join(folder, name))]

    left_out = (*MARKS, *without)
    names = [
        name for name in listed if name.rpartition("/")[2] not in left_out and not storage.is_partial(name)
    ]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        return dict(threads.map(entry, names))


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
    there = storage.list_files(folder) if names and storage.in_bucket(folder) else {}
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda name: _fault(folder, name, listed[name], there), names)
        try:
            yield
        except Exception as error:
            _refuse([fault for fault in found if fault], remedy, error)
            raise
        _refuse([fault for fault in found if fault], remedy)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON types with "checksum", that of all the rest."""
    return {**content, "checksum": hash_json(content)}


def unsealed(content: dict[str, Any], where: str, remedy: str) -> dict[str, Any]:
    """What was `sealed`, as it was before. Raises UserError, with `remedy`, where it has changed since."""
    if not is_intact(content):
        by_hand = 'if you changed it yourself, take its "checksum" out'
        raise UserError(f"{where} is damaged (not as it was written; {by_hand}): {remedy}")
    content = copy.copy(content)
    content.pop("checksum", None)
    return content


def is_intact(content: Mapping[str, Any]) -> bool:
    """Whether JSON is as it was `sealed`; so is what never was."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return content.get("checksum", "") in ("", hash_json(rest))


def hash_json(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON types, in whatever order their keys are."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fault(folder: str | os.PathLike, name: str, entry: Any, there: Mapping[str, tuple[int, str]]) -> str:
    """What is wrong with a file; "" where it is as it was written. `there`: what a bucket knows of it."""
    path = os.path.join(folder, name)
    try:
        size, digest = entry
        kind, md5 = ("md5", digest[4:]) if digest.startswith("md5:") else ("sha256", "")
        if not storage.in_bucket(path):
            found, known = os.path.getsize(path), ""
        elif name in there:
            found, known = there[name]
        else:
            return f"{path} is missing"
        if found != size:
            return f"{path} is damaged, it has {found} bytes and not the {size} that were written"
        same = known == md5 if known and md5 else storage.hash_file(path, kind) == (md5 or digest)
        return "" if same else f"{path} is damaged, its bytes are not those written"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except (TypeError, ValueError, AttributeError):
        return f"the checksum of {path} is damaged"


def _refuse(faults: list[str], remedy: str, error: Exception | None = None) -> None:
    if faults:
        more = f", and {counted(len(faults) - 1, 'more file')} damaged" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}: {remedy}") from error
