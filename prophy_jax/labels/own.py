"""Token labels of one's own: a file for each clip.

    DIR/ID.npz    shares (T, h, w, E) or (N, E), from 0 to 1: how much of each token each category covers
                  present (E,), optional: 1 for the categories whose shares are known; without it, those
                  with a share above 0
                  names (E,), optional: the categories in the file's order, any of the taxonomy; without it,
                  all of them in the order of the taxonomy
    DIR/ID.npy    shares alone

ID is the id of the clip; one with a / is a path below DIR. The token grid T h w of each bucket is in the
manifest of the data ("token_grid"). Token time 0 shows the first frame and time k the next frames, as many
for each k; rows and columns cut the frame evenly.

N = T h w tokens, E categories, P of them present.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import prophy_jax
from prophy_jax.data import records, taxonomy
from prophy_jax.data.batch import Sizes
from prophy_jax.data.job import Job
from prophy_jax.data.taxonomy import Taxonomy
from prophy_jax.labels.prepared import list_files, list_ids
from prophy_jax.run import storage
from prophy_jax.run.errors import UserError, counted, shortage

ENDINGS = (".npz", ".npy")


def import_labels(
    config: ConfigDict, folder: str | Path, data: str | Path, out: str | Path, only_check: bool = False
) -> dict[str, Any] | None:
    """Makes a folder of labels from files of one's own (see the top of this file), once all are right.

    Returns the manifest, None with `only_check`. Prints each wrong file and why. Raises UserError then, and
    on data that do not exist or are of other categories; nothing is written.
    """
    # 1. Every file, and what is wrong with it.
    storage.require_gs(out, "labels")
    known, manifest = taxonomy.of(config), records.read_manifest(data)
    known.check(manifest, data)
    sizes = {bucket: Sizes.of(manifest, bucket) for bucket in manifest["buckets"]}
    files = list_files(data, manifest)
    ids = {file: list_ids(data, file) for shards in files.values() for file in shards}
    clips = {name: file.bucket for file, names in ids.items() for name in names}
    found, others = find(folder, clips)
    wrong, empty, digest = [], [], hashlib.sha256()
    for name, paths in found.items():
        try:
            if name not in clips:
                raise ValueError(f"{data} has no clip {name!r}; its ids are such as {next(iter(clips))!r}")
            if len(paths) > 1:
                raise ValueError("the clip has another file: " + ", ".join(path.name for path in paths))
            present, _ = read(paths[0], sizes[clips[name]].token_grid, known)
            if not present.any():
                empty.append(name)
            digest.update(json.dumps(name).encode() + paths[0].read_bytes())
        except ValueError as error:
            if shortage(error):
                raise
            wrong.append(f"{paths[0]}: {error}")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if wrong:
        raise UserError(
            f"{len(wrong)} of {counted(len(found), 'file')} of {folder} cannot be used, as listed; "
            "nothing was written"
        )
    unlabelled = [name for name in clips if name not in found]
    print(f"{folder}: no fault in {counted(len(found), 'file')}")
    records.print_list("files left out, which are not labels", others, "")
    records.print_list("files that label no category, with shares of 0 alone", empty, "")
    if unlabelled:
        more = "" if len(unlabelled) < 9 else ", ..."
        print(f"clips of {data} without labels: {len(unlabelled)}: {', '.join(unlabelled[:8])}{more}")
    if only_check:
        return None

    # 2. The data set, in the order of the records.
    plan = {
        "data_fingerprint": manifest["fingerprint"],
        "files_sha256": digest.hexdigest(),
        "program": prophy_jax.__version__,
    }
    job = Job(out, plan, {split: len(shards) for split, shards in files.items()})
    features = {f"alignment/{bucket}": records.features("alignment", size) for bucket, size in sizes.items()}
    for split, index in job.missing():
        file = files[split][index]
        size, dataset = sizes[file.bucket], f"alignment/{file.bucket}"
        with job.shard(split, index) as shard:
            for name in ids[file]:
                present, maps = known.multi_hot([]), np.zeros((0, size.tokens), np.float16)
                if name in found:
                    present, maps = read(found[name][0], size.token_grid, known)
                shard.write(dataset, features[dataset], {"id": name, "present": present, "maps": maps})
    about = {**plan, "categories": list(known.names), "clips": len(clips), "unlabelled": unlabelled}
    made = job.finish(lambda reports: (features, about))
    print(
        f"{out}: labels of {len(found)} of {counted(len(clips), 'clip')}; "
        f"train with --config.data.side.alignment={out}"
    )
    return made


def find(folder: str | Path, ids: Iterable[str]) -> tuple[dict[str, list[Path]], list[str]]:
    """Id -> its files, of which there should be one; and what else is in the folder, relative to it.

    `ids` are those of the clips: a file whose name differs in its Unicode form alone is found. Raises
    UserError when there is no label at all.
    """
    found: dict[str, list[Path]] = {}
    others: list[str] = []
    forms = {unicodedata.normalize("NFC", name): name for name in ids}
    for path in sorted(Path(folder).rglob("*")):
        own = path.relative_to(folder)
        if path.suffix.lower() in ENDINGS and path.is_file() and not own.name.startswith("._"):
            name = own.with_suffix("").as_posix()
            found.setdefault(forms.get(unicodedata.normalize("NFC", name), name), []).append(path)
        elif path.suffix.lower() in ENDINGS or not path.is_dir():
            others.append(own.as_posix())
    if not found:
        holds = f", which holds {others[0]}" if others else ""
        raise UserError(
            f"no labels in {folder}{holds}: --import names a folder with a file ID.npz for each clip"
        )
    return found, others


def read(path: Path, grid: Iterable[int], known: Taxonomy) -> tuple[np.ndarray, np.ndarray]:
    """The labels of one clip.

    Args:
        path: its file.
        grid: T h w.
        known: the categories.

    Returns:
        present (E,) float32 and maps (P, N) float16, as the data set "alignment" holds them.

    Raises:
        ValueError: says what is wrong with the file.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"shares": loaded}
        else:
            with loaded:
                arrays = dict(loaded)
    except Exception as error:  # numpy and zipfile let many kinds pass from a damaged file
        pickled = "it holds Python objects, which are not read" if "pickle" in str(error) else error
        raise ValueError(
            f"no readable {path.suffix} file ({pickled}): write arrays of numbers with numpy.savez"
        ) from error
    if strange := sorted(arrays.keys() - {"shares", "present", "names"}):
        raise ValueError(f"has arrays {strange}: expected shares, and if you like present and names")
    if "shares" not in arrays:
        raise ValueError("has no array shares")
    names = arrays.get("names", np.array(known.names)).reshape(-1).astype(str).tolist()
    if not names:
        raise ValueError("names no category")
    if unknown := [name for name in names if name not in known.index]:
        raise ValueError(f"names {unknown}, which are none of the categories {list(known.names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"names a category twice: {names}")
    shares, (times, height, width) = arrays["shares"], grid
    tokens, count = times * height * width, len(names)
    if shares.shape not in ((times, height, width, count), (tokens, count)):
        raise ValueError(
            f"shares are {shares.shape}: the clip has {times} x {height} x {width} tokens, so expected "
            f"{(times, height, width, count)} or {(tokens, count)}"
        )
    if shares.dtype.kind not in "fiub":
        raise ValueError(f"shares are {shares.dtype}: expected numbers")
    shares = shares.reshape(tokens, count).astype(np.float32)
    if not np.isfinite(shares).all() or shares.min() < 0 or shares.max() > 1:
        raise ValueError(f"shares reach from {shares.min():g} to {shares.max():g}: expected 0 to 1")
    covered = shares.any(0)
    present = np.asarray(arrays.get("present", covered))
    if present.shape != (count,) or present.dtype.kind not in "fiub" or not np.isin(present, (0, 1)).all():
        raise ValueError(f"present is {present.dtype} {present.shape}: expected {count} of 0 or 1")
    present = present.astype(bool)
    if hidden := [name for name, no, yes in zip(names, ~present, covered, strict=True) if no and yes]:
        raise ValueError(f"has shares of {hidden}, which present says are not there")
    columns = dict(zip(names, shares.T, strict=True))
    kept = sorted((name for name, yes in zip(names, present, strict=True) if yes), key=known.names.index)
    maps = [columns[name] for name in kept]
    stored = np.stack(maps) if maps else np.zeros((0, tokens))
    return known.multi_hot(kept), stored.astype(np.float16)
