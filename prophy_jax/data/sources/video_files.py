"""Finds videos in folders and in zip files, which are read in place, and tells equal ones.

The public WISA-80K comes as 128 zip files whose members have long absolute paths. Members are found
by their base names; their paths are never used as paths, and nothing is unpacked to disk.
"""

import functools
import hashlib
import io
import os
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from prophy_jax.run.errors import UserError


class Member(NamedTuple):
    """A member of a zip file, as the directory of the zip file says."""

    name: str
    crc: int


class VideoFile(NamedTuple):
    """A file, or a member of a zip file.

    Attributes:
        name: relative to the source: "videos/a.mp4", or "videos/0.zip:any/prefix/a.mp4".
        path: of the file, or of the zip file.
        size: bytes, not compressed.
        member: None for a file.
    """

    name: str
    path: str
    size: int
    member: Member | None = None

    def open(self) -> str | io.BytesIO:
        """What `prophy_jax.data.sources.video` reads. Safe in several threads and processes at once.

        Raises:
            UserError: a damaged member.
        """
        if self.member is None:
            return self.path
        file = io.BytesIO(self._read_member())
        file.name = f"{self.path}:{self.member.name}"
        return file

    def crc(self) -> int:
        """CRC-32 of the content, known for a member."""
        if self.member is not None:
            return self.member.crc
        crc = 0
        with open(self.path, "rb") as file:
            while chunk := file.read(1 << 20):
                crc = zlib.crc32(chunk, crc)
        return crc

    def sha256(self) -> bytes:
        if self.member is not None:
            return hashlib.sha256(self._read_member()).digest()
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def _read_member(self) -> bytes:
        try:
            return _open_archive(self.path, os.getpid()).read(self.member.name)
        except Exception as error:  # zipfile lets many kinds pass from a damaged or encrypted file
            raise UserError(f"{self.name}: cannot be read from the zip file ({error})") from error


@functools.lru_cache(maxsize=128)  # as many as WISA-80K has
def _open_archive(path: str, process: int) -> zipfile.ZipFile:
    """A zip file that stays open, for all threads of one process: forked ones would share its position."""
    return zipfile.ZipFile(path)


def content_keys(videos: Iterable[VideoFile]) -> dict[VideoFile, tuple]:
    """A key for each video; equal keys mean equal content.

    Size first, then CRC-32, then SHA-256: a video is read only if another one has its size, and
    hashed only if another one has its CRC too, which zip files state for their members.
    """
    keys = {video: (video.size,) for video in videos}
    for measure in (VideoFile.crc, VideoFile.sha256):
        count = Counter(keys.values())
        for video, key in keys.items():
            if count[key] > 1:
                try:
                    keys[video] = (*key, measure(video))
                except (UserError, OSError):
                    keys[video] = (*key, video.name, video.path)  # unreadable: equal to none
    return keys


class VideoFolder:
    """The videos below a folder, in its zip files too.

    Args:
        root: what names are relative to.
        folder: where to look, `root` or below it.

    Raises:
        UserError: a zip file cannot be read.
    """

    def __init__(self, root: Path, folder: Path):
        self.folder = folder
        prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        self._prefix = unicodedata.normalize("NFC", prefix)
        self._by_base_name: dict[str, list[VideoFile]] = defaultdict(list)
        for parent, folders, files in os.walk(folder, followlinks=True):
            # A link to a folder that contains it would lead round in circles.
            inside = os.path.realpath(parent) + os.sep
            folders[:] = sorted(
                name
                for name in folders
                if not inside.startswith(os.path.join(os.path.realpath(os.path.join(parent, name)), ""))
            )
            for file in sorted(files):
                path = os.path.join(parent, file)
                name = os.path.relpath(path, root).replace(os.sep, "/")
                found = _zip_members(name, path) if file.lower().endswith(".zip") else _file(name, path)
                for video in found:
                    self._by_base_name[_base_name(video.member.name if video.member else file)].append(video)

    def find(self, text: str) -> VideoFile:
        """The video that a record means: at that path, else the one of that base name.

        Where several videos have the base name, the folders in `text` may tell which. A record cannot
        point outside the folder: of another path, only the base name counts.

        Raises:
            UserError: there is none, or there are several of different content.
        """
        text = unicodedata.normalize("NFC", text.replace("\\", "/"))
        candidates = self._by_base_name.get(_base_name(text), [])
        names = {video: unicodedata.normalize("NFC", video.name) for video in candidates}
        exact = [video for video in candidates if names[video] == self._prefix + text]
        ends = (f"/{text}", f":{text}")
        below = [video for video in candidates if "/" in text and names[video].endswith(ends)]
        candidates = exact or below or candidates
        if not candidates:
            raise UserError(f"missing: no video {_base_name(text)}")
        if len(candidates) > 1 and len(set(content_keys(candidates).values())) > 1:
            raise UserError(f"ambiguous: {len(candidates)} different videos are called {_base_name(text)}")
        return candidates[0]


def _base_name(name: str) -> str:
    """Composed, since macOS writes names decomposed."""
    return unicodedata.normalize("NFC", name.replace("\\", "/").rpartition("/")[2])


def _file(name: str, path: str) -> list[VideoFile]:
    try:
        return [VideoFile(name, path, os.path.getsize(path))]
    except OSError:  # a link to nowhere
        return []


def _zip_members(name: str, path: str) -> list[VideoFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:  # zipfile lets many kinds pass from a damaged file
        raise UserError(f"{path} is not a readable zip file ({error}); download it again") from error
    return [
        VideoFile(
            f"{name}:{info.filename}",
            path,
            info.file_size,
            Member(info.filename, info.CRC),
        )
        for info in infos
        if not info.is_dir()
    ]
