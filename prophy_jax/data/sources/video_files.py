"""Finds videos in folders and in zip files, which are read in place, and tells equal ones.

The public WISA-80K comes as 128 zip files whose members have long absolute paths. Members are found
by their base names; their paths are never used as paths, and nothing is unpacked to disk.

Names match whatever their Unicode form (macOS decomposes letters with accents), the case of their ending, and
the code page of a zip file's directory.
"""

import functools
import hashlib
import io
import os
import stat
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prophy_jax.run import storage
from prophy_jax.run.errors import UserError, shortage

# Endings of what is taken for a clip where no table names it: of videos, then of images.
VIDEOS = (
    *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif"),
    *(".3gp", ".3g2", ".mts", ".m2ts", ".m2t", ".m2v", ".vob", ".ogv", ".asf", ".f4v", ".mxf", ".dv", ".qt"),
    *(".divx", ".rm", ".rmvb", ".y4m", ".ivf", ".apng", ".h264", ".264", ".h265", ".265", ".hevc"),
)
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
# Endings of files that have the name of a text, and are no videos.
_NO_VIDEOS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".srt", ".vtt", ".zip")
_CODE_PAGES = ("cp850", "cp1252", "gbk", "cp932", "euc_kr", "cp1251", "cp866")  # of zip files' directories


class Member(NamedTuple):
    """A member of a zip file, as the directory of the zip file says.

    Attributes:
        name: as `zipfile` reads it.
        crc: CRC-32 of the content.
        names: what it may be called: several, where the directory does not say its code page.
    """

    name: str
    crc: int
    names: tuple[str, ...]


class VideoFile(NamedTuple):
    """A file, or a member of a zip file.

    Attributes:
        name: relative to the source: "videos/a.mp4", or "videos/0.zip:any/prefix/a.mp4".
        path: of the file, or of the zip file; an address, if it is in a bucket.
        size: bytes, not compressed.
        marks: when a file's content and its entry last changed, in nanoseconds, or its MD5 in a bucket; ()
            for a member.
        member: None for a file.
    """

    name: str
    path: str
    size: int
    marks: tuple[int | str, ...] = ()
    member: Member | None = None

    @property
    def stamp(self) -> list[int | str]:
        """What differs when the content does, known without reading it; equal ones mean equal content.

        Of two different ones, the contents may still be equal: a file may have been copied.
        """
        return [self.size, self.member.crc] if self.member else [self.size, *self.marks]

    def read(self) -> bytes:
        """The content. Raises UserError as `open` does, and for a file that cannot be read."""
        if self.member is not None:
            return self._read_member()
        try:
            return storage.path(self.path).read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error

    def open(self) -> str | io.BytesIO:
        """What `prophy_jax.data.sources.video` reads. Safe in several threads and processes at once.

        Raises:
            UserError: a damaged member.
        """
        if self.member is None and not storage.in_bucket(self.path):
            return self.path
        file = io.BytesIO(self.read())
        file.name = f"{self.path}:{self.member.name}" if self.member else self.path
        return file

    def crc(self) -> int:
        """CRC-32 of the content, known for a member."""
        if self.member is not None:
            return self.member.crc
        crc = 0
        with storage.open_file(self.path) as file:
            while chunk := file.read(1 << 20):
                crc = zlib.crc32(chunk, crc)
        return crc

    def sha256(self) -> bytes:
        if self.member is not None:
            return hashlib.sha256(self._read_member()).digest()
        return bytes.fromhex(storage.hash_file(self.path))

    def _read_member(self) -> bytes:
        try:
            return _open_archive(self.path, os.getpid()).read(self.member.name)
        except Exception as error:  # zipfile lets many kinds pass from a damaged or encrypted file
            raise UserError(f"{self.name}: cannot be read from the zip file ({error})") from error


@functools.lru_cache(maxsize=128)  # as many as WISA-80K has
def _open_archive(path: str, process: int) -> zipfile.ZipFile:
    """A zip file that stays open, for all threads of one process: forked ones would share its position."""
    return zipfile.ZipFile(storage.open_file(path))


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
                except (UserError, OSError) as error:
                    if shortage(error):
                        raise
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

    def __init__(self, root: storage.AnyPath, folder: storage.AnyPath):
        self.folder = folder
        self._prefix = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        self._files: list[VideoFile] = []
        self._by_base_name: dict[str, list[VideoFile]] = defaultdict(list)
        self._no_files: dict[str, str] = {}  # name -> what it is instead
        for name, path, file in _list(root, folder):
            if isinstance(file, str):
                self._no_files[name] = file
                continue
            found = _zip_members(name, path) if path.lower().endswith(".zip") else [file]
            self._files += found
            for video in found:
                names = video.member.names if video.member else (name,)
                for key in {_key(_base_name(own)) for own in names}:
                    self._by_base_name[key].append(video)

    def find(self, text: str) -> VideoFile:
        """The video that a record means: at that path, else the one of that base name.

        Where several videos have the base name, the folders in `text` may tell which; a name without an
        ending finds the video of that stem. A record cannot point outside the folder: of another path, only
        what it shares with one inside counts.

        Raises:
            UserError: there is none, or there are several of different content.
        """
        text = text.replace("\\", "/").removeprefix("./")
        candidates = self._by_base_name.get(_key(_base_name(text)), [])
        names = {video: video.name for video in candidates}
        bare = not candidates and os.path.splitext(text)[1].lower() not in VIDEOS + IMAGES
        for endings in (VIDEOS, IMAGES) if bare else ():
            found = [self._by_base_name.get(_key(_base_name(text)) + ending, []) for ending in endings]
            candidates = candidates or sum(found, [])
            names = {video: os.path.splitext(video.name)[0] for video in candidates}
        own, whole = _key(text), _key(self._prefix + text)
        keys = {video: _key(names[video]) for video in candidates}
        ends = (f"/{own}", f":{own}")
        exact = [video for video in candidates if names[video] == self._prefix + text]
        exact = exact or [video for video in candidates if keys[video] == whole]
        below = [video for video in candidates if "/" in own and keys[video].endswith(ends)]
        # An absolute path, or one of another machine, that ends in a path below the folder.
        short = {video: keys[video].removeprefix(_key(self._prefix)) for video in candidates}
        above = [video for video in candidates if "/" in short[video] and own.endswith(f"/{short[video]}")]
        longest = max((len(short[video]) for video in above), default=0)
        candidates = (
            exact or below or [video for video in above if len(short[video]) == longest] or candidates
        )
        if not candidates:
            for name, instead in self._no_files.items():
                if _key(_base_name(name)) == _key(_base_name(text)):
                    raise UserError(f"no file: {name} is {instead}")
            raise UserError(f"missing: no video {_base_name(text)}")
        if len(candidates) > 1 and len(set(content_keys(candidates).values())) > 1:
            endings = sorted({os.path.splitext(video.name)[1] for video in candidates})
            raise UserError(
                f"ambiguous: {len(candidates)} different videos are called {_base_name(text)}"
                + (f"; write its ending ({', '.join(endings)})" if len(endings) > 1 else "")
            )
        return candidates[0]

    def captioned(self) -> Iterator[tuple[VideoFile, VideoFile | None]]:
        """Every video with the text file of its name beside it, None where there is none.

        An image counts as a clip where no video has its name.
        """
        videos: dict[str, list[VideoFile]] = defaultdict(list)
        texts = {}
        for file in self._files:
            if _base_name(file.name).startswith("."):  # what macOS leaves
                continue
            stem, ending = os.path.splitext(file.name)
            if ending.lower() == ".txt":
                texts[_key(stem)] = file
            elif ending.lower() in VIDEOS + IMAGES:
                videos[_key(stem)].append(file)
        for stem, files in videos.items():
            moving = [file for file in files if os.path.splitext(file.name)[1].lower() in VIDEOS]
            for file in moving or files[:1]:
                yield file, texts.get(stem)

    def left_out(self) -> Iterator[tuple[str, str]]:
        """What has the name of a video and is no file, and of texts that have none what else has their name.

        Gives names relative to the source, and what is wrong with them.
        """
        endings: dict[str, dict[str, str]] = defaultdict(dict)  # of each stem, to the names
        for name in (*self._no_files, *(file.name for file in self._files)):
            stem, ending = os.path.splitext(name)
            if not _base_name(name).startswith("."):
                endings[_key(stem)].setdefault(ending.lower(), name)
        for name, instead in self._no_files.items():
            if name.lower().endswith(VIDEOS + IMAGES):
                yield name, f"is {instead}"
        for found in endings.values():
            others = [name for ending, name in found.items() if ending not in _NO_VIDEOS]
            if ".txt" in found and others and not found.keys() & {*VIDEOS, *IMAGES}:
                ending = os.path.splitext(others[0])[1]
                yield others[0], f"has an ending ({ending}) that is not read" if ending else "has no ending"


def walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """The paths of all files below a folder, in order; of links that lead in a circle, no turn twice.

    The order is that of `os.walk` with sorted names: a folder's files come before those below it.
    """
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from error
    folders = {entry.path: None for entry in entries if os.path.isdir(entry.path)}
    yield from (entry.path for entry in entries if entry.path not in folders)
    for path in folders:
        yield from walk(path, above | {here})


def _base_name(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _key(name: str) -> str:
    """Equal for names that differ in their Unicode form or in the case of their ending."""
    stem, ending = os.path.splitext(name)
    return unicodedata.normalize("NFC", stem + ending.lower())


def _list(root: storage.AnyPath, folder: storage.AnyPath) -> Iterator[tuple[str, str, VideoFile | str]]:
    """Of all files below `folder`: name below `root`, path, and the file or what is there instead.

    A folder's own files come before those of the folders in it.
    """
    if not storage.in_bucket(folder):
        for path in walk(str(folder)) if folder.is_dir() else ():
            name = os.path.relpath(path, root).replace(os.sep, "/")
            yield name, path, _file(name, path)
        return
    below = storage.absolute(folder).removeprefix(storage.absolute(root)).lstrip("/")
    found = storage.list_files(folder)
    for own in sorted(found, key=_in_order):
        size, md5 = found[own]
        name, path = os.path.join(below, own), f"{storage.absolute(folder)}/{own}"
        yield name, path, VideoFile(name, path, size, (md5,))


def _in_order(name: str) -> list[tuple[bool, str]]:
    """Sorts as `walk` does."""
    *folders, last = name.split("/")
    return [*((True, folder) for folder in folders), (False, last)]


def _file(name: str, path: str) -> VideoFile | str:
    """The file at a path, or what is there instead."""
    try:
        status = os.stat(path)
    except OSError:
        return "a link to nothing"
    if not stat.S_ISREG(status.st_mode):  # reading it may never end
        return "a pipe, a socket or a device, and no file"
    return VideoFile(name, path, status.st_size, (status.st_mtime_ns, status.st_ctime_ns))


def _zip_members(name: str, path: str) -> list[VideoFile]:
    try:
        with storage.open_file(path) as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except Exception as error:  # zipfile lets many kinds pass from a damaged file
        raise UserError(f"{path} is not a readable zip file ({error}); download it again") from error
    return [
        VideoFile(
            f"{name}:{info.filename}",
            path,
            info.file_size,
            member=Member(info.filename, info.CRC, tuple(_member_names(info))),
        )
        for info in infos
        if not info.is_dir()
    ]


def _member_names(info: zipfile.ZipInfo) -> Iterator[str]:
    """What a member may be called. Without a flag its name is in any code page; `zipfile` takes cp437."""
    yield info.filename
    if info.filename.isascii() or info.flag_bits & 0x800:
        return
    raw = info.filename.encode("cp437")
    for page in ("utf-8", *_CODE_PAGES):
        try:
            yield raw.decode(page)
        except UnicodeDecodeError:
            continue
        if page == "utf-8":  # which other text hardly ever is
            return
