"""Names ORG/NAME[@REVISION] of the Hugging Face hub, where a command asks for a folder of public files.

What exists here always wins, and paths such as ./a/b, ~/a or /a are never names. Of a repository only those
files are fetched that the command reads, into the cache that huggingface_hub keeps and locks, so several
processes may ask for the same. Without a network the files in this cache are used.
"""

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub import errors

from prophy_jax.run.errors import UserError, counted

_WORD = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?:@([\w./-]+))?", re.ASCII)
_TIMEOUT = 10  # seconds until the hub counts as out of reach
_SMALL = ("config.json", "index.json")  # ends of the names of files that tell which others are needed

# Of a folder like a repository, and whether it has all files of it or only those cached, the files needed.
Choose = Callable[[Path, bool], Iterable[Path]]


@dataclasses.dataclass(frozen=True)
class Repository:
    """A model on the hub at one commit, which `find` makes.

    Attributes:
        name: ORG/NAME.
        revision: the branch, tag or commit that was asked for, None for the main branch.
        commit: its hash.
        sizes: bytes of its files by their paths; without a network, of those in the cache.
        offline: why the hub cannot be reached, "" if it can.
        remedy: what to do then.
    """

    name: str
    revision: str | None
    commit: str
    sizes: Mapping[str, int]
    offline: str
    remedy: str

    def fetch(self, choose: Choose, dry_run: bool = False) -> Path | None:
        """The folder with the files needed, those that the cache lacks downloaded.

        Args:
            choose: gets a folder named NAME in which files are empty, but for configurations and lists of
                shards, once it has chosen them. Without a network, it chooses what is not there to say so.
            dry_run: prints what the cache lacks, and downloads configurations and lists of shards only.

        Returns:
            The folder; None if nothing is needed, or if a dry run lacks files.

        Raises:
            UserError: as `choose` does; no access, no network, or the download broke off.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / self.name.split("/")[1]
            folder.mkdir()
            fill = set(self.sizes)
            while True:
                for name in fill:
                    cached = name.endswith(_SMALL) and self._find_cached(name)
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(Path(cached).read_bytes() if cached else b"")
                try:
                    needed = {
                        path.relative_to(folder).as_posix() for path in choose(folder, not self.offline)
                    }
                except UserError as error:
                    raise UserError(str(error).replace(str(folder), self.name)) from error
                lacking = sorted(needed - self.sizes.keys())
                if lacking and not self.offline:
                    raise UserError(f"{self.name} has no {lacking[0]}, which another file of it names")
                missing = sorted(name for name in needed if not self._find_cached(name))
                fill = {name for name in missing if name.endswith(_SMALL)}
                if not fill:
                    break
                self._download(fill)
        what = (
            f"{counted(len(missing), 'file')} of {self.name}, revision {self.commit[:12]}, "
            f"{sum(self.sizes.get(name, 0) for name in missing) / 1e9:.3f} GB"
        )
        if missing and dry_run:
            print(f"would fetch {what}; the tensors are checked once they are here")
            return None
        if missing:
            print(f"fetching {what}", flush=True)
            self._download(missing)
        name = next(iter(needed), None)
        return Path(self._find_cached(name).removesuffix(name)) if name else None

    def _find_cached(self, name: str) -> str | None:
        found = huggingface_hub.try_to_load_from_cache(self.name, name, revision=self.commit)
        return found if isinstance(found, str) else None

    def _download(self, files: Iterable[str]) -> None:
        files = sorted(files)
        if not files:
            return
        of = f"{self.name}, revision {self.commit[:12]}"
        if self.offline:
            more = f" and {len(files) - 3} more" if len(files) > 3 else ""
            raise UserError(
                f"{of}: {', '.join(files[:3])}{more} not in the cache, {self.offline}: {self.remedy}"
            )
        try:
            # Of the branch, not of its commit: the cache then knows the branch when there is no network.
            folder = huggingface_hub.snapshot_download(
                self.name, revision=self.revision, allow_patterns=files, etag_timeout=_TIMEOUT
            )
        except Exception as error:  # of httpx, of the disk, of hf_xet
            raise _refuse(error, self.name, self.name, self.revision) or UserError(
                f"{of} could not be fetched ({_reason(error)}): run the same command again, files that are "
                "complete are kept"
            ) from error
        if Path(folder).name != self.commit or not all(map(self._find_cached, files)):
            raise UserError(f"{self.name} was changed on the hub just now: run the same command again")


def find(text: str, patterns: Sequence[str]) -> Repository | None:
    """The repository that `text` names; None if it is a path.

    Args:
        text: ORG/NAME, ORG/NAME@REVISION, or a path of any file or folder.
        patterns: which files of a repository may be needed, for the command that messages name.

    Raises:
        UserError: `text` may be a name, and there is neither such a file here nor such a repository, or it
            gives no access, or the hub cannot be reached and the cache has nothing of it.
    """
    match = _NAME.fullmatch(text)
    if not match or os.path.exists(text):
        return None
    name, revision = match.groups()
    command = " ".join(
        [
            f"hf download {name}",
            *[f"--revision {revision}"] * bool(revision),
            *[f"--include '{p}'" for p in patterns],
        ]
    )
    remedy = f"run {command} where there is a network, and copy the cache ($HF_HOME) if that is elsewhere"
    try:
        info = huggingface_hub.HfApi().model_info(
            name, revision=revision, timeout=_TIMEOUT, files_metadata=True
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        inside = {path: size for path, size in sizes.items() if ".." not in PurePosixPath("/", path).parts}
        return Repository(name, revision, info.sha, inside, "", remedy)
    except Exception as error:  # of httpx, and of huggingface_hub
        if refused := _refuse(error, text, name, revision):
            raise refused from error
        offline = f"and the hub cannot be reached ({_reason(error)})"
    try:  # which files there are is no matter to this
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[], local_files_only=True
        )
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{text}: there is no such folder, {offline}: {remedy}") from error
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return Repository(name, revision, Path(folder).name, sizes, offline, remedy)


def _refuse(error: Exception, text: str, name: str, revision: str | None) -> UserError | None:
    """What to say of an answer of the hub that no retry will change; None if there was none."""
    answer: BaseException | None = error
    while answer and not isinstance(answer, errors.HfHubHTTPError | errors.HFValidationError):
        answer = answer.__cause__
    match answer:
        case None | errors.RemoteEntryNotFoundError():
            return None
        case errors.RevisionNotFoundError():
            return UserError(f"{name} has no revision {revision}: name a branch, a tag or a commit of it")
        case errors.HFValidationError():
            return UserError(f"{text}: there is no such folder, and no repository can have this name")
    status = answer.response.status_code
    missing = isinstance(answer, errors.RepositoryNotFoundError) and not isinstance(
        answer, errors.GatedRepoError
    )
    if missing or status == 404:
        return UserError(
            f"{text}: there is no such folder, and no such repository on the hub; if it is private, run "
            "`hf auth login` and the same command again"
        )
    if status in (401, 403):
        return UserError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, run `hf auth login`, "
            "then the same command again"
        )
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
