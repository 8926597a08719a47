"""Files on disks and in buckets, gs://BUCKET/... and s3://BUCKET/..., by the same calls.

`path` gives a `pathlib.Path` on a disk and an `etils.epath.Path` in a bucket, which have most methods in
common. What they do not have in common is here. A bucket has neither folders nor renames nor links; but its
objects appear whole, at most one of several writers can create one, and it knows the MD5 of what it holds.
"""

import atexit
import base64
import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import fsspec
from etils import epath

from prophy_jax.run.errors import UserError

PACKAGES = {
    "gs": "gcsfs",
    "s3": "s3fs",
}  # scheme -> what reads and writes it; the extra has the scheme's name
# What raises errors of its own, and also OSError (403), ValueError and the like, when a bucket refuses.
CLIENTS = {"gcsfs", "s3fs", "aiohttp", "google", "botocore", "aiobotocore"}
WAIT_S = 5.0  # until a bucket that does not answer is worth a line
AnyPath: TypeAlias = Path | epath.Path
# Of what is in a bucket nothing is remembered, also for `epath` and TFDS: other processes change it.
for _scheme in (*PACKAGES, "gcs"):
    fsspec.config.conf.setdefault(_scheme, {})["use_listings_cache"] = False
# They log what they raise, with a traceback.
for _package in PACKAGES.values():
    logging.getLogger(_package).addHandler(logging.NullHandler())
    logging.getLogger(_package).propagate = False


def path(text: str | os.PathLike) -> AnyPath:
    """A path with methods: `pathlib.Path`, or `epath.Path` of an address."""
    return epath.Path(text) if in_bucket(text) else Path(text)


def in_bucket(text: str | os.PathLike) -> bool:
    """Whether this is an address of a bucket."""
    return os.fspath(text).startswith(tuple(f"{scheme}://" for scheme in PACKAGES))


def absolute(text: str | os.PathLike) -> str:
    """The path from the root; an address as it is, without a slash at its end."""
    return os.fspath(text).rstrip("/") if in_bucket(text) else os.path.abspath(text)


def resolved(text: str | os.PathLike) -> str:
    """The path from the root, without links; an address as it is."""
    return absolute(text) if in_bucket(text) else str(Path(text).resolve())


def check_address(text: str, where: str, schemes: Sequence[str]) -> str:
    """An address, without slashes that are no part of it.

    Raises UserError, about `where`, unless it is one of `schemes`, and in reach.
    """
    scheme, slashes, rest = re.match(r"\s*([A-Za-z][\w+.-]*):(/*)(.*)", text, re.DOTALL).groups()
    if scheme not in schemes:
        places = "".join(f" or in {own}://" for own in schemes)
        raise UserError(
            f"{where} is an address, and this must be on a disk{places}: copy it, and give the path"
        )
    names = [name for name in rest.split("/") if name]
    if text[0].isspace() or slashes != "//" or not names or {".", ".."} & set(names):
        raise UserError(f"{where} is no address: write {scheme}://BUCKET/FOLDER")
    if found := re.search(r"[][*?#\s]", rest.replace(" ", "")):  # patterns, versions of objects
        raise UserError(
            f"{where} has {found[0]!r}, which stands for something else in addresses: name another folder"
        )
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise UserError(f'{where}: buckets need another package: pip install "prophy_jax[{scheme}]"')
    address = f"{scheme}://{'/'.join(names)}"
    with one_line_errors(), _waiting(address):
        if not path(address).exists():  # without credentials, this says so
            try:
                # A name that nobody gave: nothing is listed there, but where there is no bucket.
                _system_of(address).find(f"{scheme}://{names[0]}/{secrets.token_hex(8)}")
            except FileNotFoundError as error:
                raise UserError(
                    f"{where}: there is no bucket {names[0]}: name another, or make it"
                ) from error
    return address


@contextlib.contextmanager
def _waiting(address: str) -> Iterator[None]:
    """Says that a bucket does not answer, while the packages try it again and again, for up to a minute."""
    line = f"{address} has not answered yet: still trying, for up to a minute"
    timer = threading.Timer(WAIT_S, print, (line,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def require_gs(text: str | os.PathLike, what: str) -> None:
    """Raises UserError for an address of another kind, for which `what` has no driver."""
    if in_bucket(text) and not os.fspath(text).startswith("gs://"):
        raise UserError(f"{text}: {what} must be on a disk or in gs://: name another folder")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What the packages for buckets raise in the body becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not {name.partition(".")[0] for name in (*frames, type(error).__module__)} & CLIENTS:
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"the bucket cannot be used ({reason}): check its name and your rights; log in with `gcloud auth "
            "application-default login` for gs://, or as boto3 does for s3://; what was finished is there"
        ) from error


def tensorstore_spec(text: str) -> dict[str, str]:
    """What TensorStore calls a folder of a disk or of gs://."""
    if not in_bucket(text):
        return {"driver": "file", "path": text}
    bucket, _, inside = text.partition("://")[2].partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": inside}


def _system_of(text: str | os.PathLike) -> Any:
    return fsspec.filesystem(os.fspath(text).partition(":")[0])


# --- Listing and reading -----------------------------------------------------------------------------


def list_files(folder: str | os.PathLike) -> dict[str, tuple[int, str]]:
    """(bytes, MD5 in hex) of every file below a folder, by its path there; "" for an MD5 that is not known.

    No file is read: the MD5 is known of most objects in buckets, and of no file on a disk.
    """
    if not in_bucket(folder):
        root, found = Path(folder), {}
        for own in sorted(root.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
                about = own.stat()
                if stat.S_ISREG(about.st_mode):
                    found[own.relative_to(root).as_posix()] = (about.st_size, "")
        return found
    system, root = _system_of(folder), absolute(folder).partition("://")[2]
    found = system.find(root, detail=True)
    return {
        name.removeprefix(f"{root}/"): (int(about["size"]), _md5(about))
        for name, about in sorted(found.items())
        if about["type"] == "file" and name.startswith(f"{root}/")
    }


def files_in(folder: AnyPath) -> list[AnyPath]:
    """The files right in a folder, in order of their names."""
    if not in_bucket(folder):
        return sorted(own for own in folder.iterdir() if own.is_file())
    found = _system_of(folder).ls(os.fspath(folder), detail=True)
    return sorted(folder / own["name"].rpartition("/")[2] for own in found if own["type"] == "file")


def is_same(first: AnyPath, second: AnyPath) -> bool:
    """Whether two paths, of files that exist, are of one file."""
    if in_bucket(first) or in_bucket(second):
        return absolute(first) == absolute(second)
    return first.samefile(second)


def _md5(about: dict[str, Any]) -> str:
    """MD5 in hex, as a listing says it; "" where it does not, as of objects put together from several."""
    if text := about.get("md5Hash"):  # of Google
        return base64.b64decode(text).hex()
    text = str(about.get("ETag", "")).strip('"')
    return text if re.fullmatch("[0-9a-f]{32}", text) else ""


def hash_file(text: str | os.PathLike, kind: str = "sha256") -> str:
    """A hash of a file's bytes, in hex."""
    with open_file(text) as opened:
        if not in_bucket(text):
            return hashlib.file_digest(opened, kind).hexdigest()
        digest = hashlib.new(kind)
        while part := opened.read(1 << 22):
            digest.update(part)
        return digest.hexdigest()


def open_file(text: str | os.PathLike) -> Any:
    """The open file, in bytes."""
    return _system_of(text).open(os.fspath(text), "rb") if in_bucket(text) else open(text, "rb")


def size(text: str | os.PathLike) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return _system_of(text).size(os.fspath(text)) if in_bucket(text) else os.path.getsize(text)


def stamp(text: str | os.PathLike) -> str | None:
    """What differs when a file was written or touched anew; None where there is none.

    S3 tells only whole seconds apart.
    """
    try:
        if not in_bucket(text):
            return str(os.stat(text).st_mtime_ns)
        about = _system_of(text).info(os.fspath(text))
        return " ".join(str(about.get(key)) for key in ("generation", "ETag", "LastModified"))
    except FileNotFoundError:
        return None


def fetched(text: str | os.PathLike) -> Path:
    """A local folder or file with this content, for libraries that read only such.

    A copy of what is in a bucket is deleted when the process ends.
    """
    if not in_bucket(text):
        return Path(text)
    # What is listed tells the content, without reading it.
    return _fetch(absolute(text), hashlib.sha256(repr(list_files(text)).encode()).hexdigest())


def cache_folder(name: str) -> str:
    """A folder of the user's cache, which may be deleted at any time."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if in_bucket(root):
        raise UserError(f"XDG_CACHE_HOME={root} must be on a disk: name a folder of one")
    return os.path.join(root, "prophy_jax", name)


def scratch_folder() -> str:
    """A new folder on a disk, deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="prophy_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.lru_cache(64)
def _fetch(address: str, stamp: str) -> Path:
    target = Path(scratch_folder()) / address.rpartition("/")[2]
    system = _system_of(address)
    if system.isfile(address):
        system.get_file(address, str(target))
    else:
        target.mkdir()
        for name in list_files(address):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            system.get_file(f"{address}/{name}", str(target / name))
    return target


# --- Writing -----------------------------------------------------------------------------------------


def name_partial(target: AnyPath) -> AnyPath:
    """A hidden name beside `target` that no other process uses."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def is_partial(name: str) -> bool:
    """Whether `name_partial` gave a file its name: a process that was killed may have left it."""
    return bool(re.fullmatch(r"\..+\.[0-9a-f]{8}", name.rpartition("/")[2]))


def create(target: AnyPath, content: bytes) -> bool:
    """Writes a file, whole, unless it is there, and says so; of several processes that try, one succeeds."""
    if in_bucket(target):
        try:
            _system_of(target).pipe_file(os.fspath(target), content, mode="create")
        except FileExistsError:
            return False
        return True
    partial = name_partial(target)
    try:
        partial.write_bytes(content)
        sync(partial)
        try:
            os.link(partial, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links, such as a mounted bucket
            try:
                with open(target, "xb") as file:
                    file.write(content)
            except FileExistsError:
                return False
        sync(target.parent)
        return True
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(text: str | os.PathLike, content: str | bytes | Callable[[BinaryIO], Any]) -> None:
    """Writes a file that appears under its name only when it is whole and stored.

    It replaces an older one. When it cannot be written, the older one stays and OSError is raised.

    Args:
        text: the file, in a folder that exists.
        content: text (UTF-8), bytes, or a function that writes to the open file it is given.
    """
    with replacing(text) as partial, partial.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)


def touch(target: AnyPath, content: bytes) -> None:
    """Gives a file of this content another `stamp`."""
    if in_bucket(target):
        _system_of(target).pipe_file(os.fspath(target), content)
    else:
        os.utime(target)


@contextlib.contextmanager
def replacing(text: str | os.PathLike) -> Iterator[Path]:
    """Gives the body the name of a local file to write; at its end that file is at `text`, whole.

    It replaces an older one. When the body raises, nothing remains of the file.
    """
    target = path(text)
    if in_bucket(target):
        with tempfile.TemporaryDirectory(prefix="prophy_jax-") as scratch:
            partial = Path(scratch) / target.name
            yield partial
            place(partial, target)
        return
    partial = name_partial(target)
    try:
        yield partial
        put_in_place(partial, target)
    except BaseException:  # also on Ctrl-C
        partial.unlink(missing_ok=True)
        raise


def send(source: str | os.PathLike, address: str | os.PathLike) -> None:
    """Copies a local file into a bucket."""
    _system_of(address).put_file(os.fspath(source), os.fspath(address))


def place(partial: Path, target: AnyPath) -> None:
    """Gives a written local file its final name, or copies it into a bucket; the folder is not synced."""
    if in_bucket(target):
        send(partial, target)
    else:
        sync(partial)
        os.replace(partial, target)


def put_in_place(partial: str | os.PathLike, target: str | os.PathLike) -> None:
    """Renames a written file or folder on a disk once it is on it; a file replaces an older one."""
    place(partial, target)
    sync(os.path.dirname(os.path.abspath(target)))


def copy(source: AnyPath, target: AnyPath) -> None:
    """A second name for a file; a copy where there are no hard links, as in buckets."""
    if in_bucket(target):
        _system_of(target).cp_file(os.fspath(source), os.fspath(target))
        return
    try:
        os.link(source, target)
    except OSError:
        with replacing(target) as partial:
            shutil.copyfile(source, partial)


def upload(folder: Path, address: str | os.PathLike, without: Collection[str] = ()) -> None:
    """Makes a folder of a bucket equal to a local one, but for files `without`; what is equal already stays.

    Raises UserError where the bucket then has another MD5 than the file.
    """
    root, there = absolute(address), list_files(address)
    own = {name: size for name, (size, _) in list_files(folder).items() if name not in without}
    hashes = {name: (size, hash_file(folder / name, "md5")) for name, size in own.items()}
    for name in sorted(there.keys() - own.keys()):
        path(f"{root}/{name}").unlink(missing_ok=True)
    for name in sorted(own):
        if there.get(name) != hashes[name]:
            send(folder / name, f"{root}/{name}")
    there = list_files(address)
    if wrong := [name for name in own if there.get(name, (0, ""))[1] not in ("", hashes[name][1])]:
        raise UserError(f"{root}/{wrong[0]} is not as it was sent: run the same command again")


def remove(folder: str | os.PathLike) -> None:
    """Removes a folder and what is in it, if it is there."""
    if not in_bucket(folder):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        return
    names = [f"{absolute(folder)}/{name}" for name in list_files(folder)]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            _system_of(folder).rm_file(name)


def sync(text: str | os.PathLike) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(text, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not os.path.isdir(text):  # folders of some network file systems cannot be synced
            raise
    finally:
        os.close(descriptor)
