"""Command: makes training records from the physics sandbox or from a folder of captioned videos.

    python -m prophy_jax.prepare --config=configs/wan.py:demo                  # the sandbox
    python -m prophy_jax.prepare --config=configs/wan.py --source=WISA --out=DIR

Without --source it draws the clips of `config.data.sandbox` (seed and the counts train, val, test),
keeps them as a TFDS data set, and stores their exact token masks as alignment labels. With --source
it reads a folder in the layout of WISA-80K (stated in `prophy_jax.data.wisa`), centre-crops and
resizes its videos, and stores no alignment. Clips have the height, width, frames and fps of
`config.data`; `config.codec` encodes them, and `config.text_encoder` their captions.
"""

import contextlib
import io
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

import prophy_jax
from prophy_jax import cli
from prophy_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from prophy_jax.data.records import Recorder
    from prophy_jax.data.wisa import Clip, Report

PACKAGES = ("numpy", "tensorflow-datasets", "array_record", "av", "pymunk")  # these shape the data
SHOWN = 20  # entries of a list that the summary prints; the manifest has all of them


def _record_sandbox(data: "ConfigDict", folder: Path, recorder: "Recorder") -> dict[str, Any]:
    """Draws the sandbox into `folder`/sandbox and records it; returns its part of the manifest."""
    if "sandbox" not in data:
        raise UserError("this config has no config.data.sandbox to draw; give videos with --source")
    if data.height != data.width:
        raise UserError(
            f"the sandbox draws square clips, but config.data is {data.height}x{data.width} pixels"
        )
    import tensorflow_datasets as tfds
    import tqdm

    from prophy_jax.data import records
    from prophy_jax.data.sandbox import builder

    settings = {"size": data.height, "frames": data.frames, "fps": data.fps, **data.sandbox}
    total = sum(data.sandbox[split] for split in records.SPLITS)
    print(f"drawing {total} sandbox clips", flush=True)
    tfds.disable_progress_bar()  # it would speak of downloads
    with contextlib.redirect_stdout(io.StringIO()):
        sandbox = builder.PhysicsSandbox(
            data_dir=folder / "drawing",
            config=builder.SandboxConfig(name="clips", **settings),
            file_format="array_record",
        )
        sandbox.download_and_prepare()
    Path(sandbox.data_path).rename(folder / "sandbox")  # beside "records", without TFDS's levels
    shutil.rmtree(folder / "drawing")
    sources = {split: records.open_source(folder, "sandbox", split) for split in records.SPLITS}
    with tqdm.tqdm(total=total, desc="encoding", unit="clip") as bar:
        for split, source in sources.items():
            for clip in source:
                clip_id, caption = clip["id"].decode(), clip["caption"].decode()
                recorder.write(split, clip_id, caption, clip["frames"], clip["category"], clip["masks"])
                bar.update()
    return {"source": {"sandbox": data.sandbox.to_dict()}}


def _record_wisa(
    clips: list["Clip"], report: "Report", data: "ConfigDict", recorder: "Recorder"
) -> dict[str, Any]:
    """Decodes the videos of a WISA folder and records them; returns its part of the manifest.

    The last tenth of the clips that can be read, at least one, is the validation split.
    """
    import tqdm

    from prophy_jax.data import video

    skipped = list(report.skipped)
    readable: dict[str, list[Clip]] = {"train": [], "val": []}

    with tqdm.tqdm(total=len(clips), desc="clips", unit="clip") as bar:

        def record(split: str, clip: "Clip") -> None:
            try:
                frames = video.read_clip(clip.path, data.frames, data.fps, data.height, data.width)
            except UserError as error:
                skipped.append((clip.id, str(error)))
            else:
                recorder.write(split, clip.id, clip.caption, frames, clip.category)
                readable[split].append(clip)
            bar.update()

        remaining = list(clips)
        while remaining and len(readable["val"]) < max(1, len(clips) // 10):
            record("val", remaining.pop())
        for clip in remaining:
            record("train", clip)

    if not readable["val"]:
        raise UserError(f"none of the {len(clips)} videos can be used; the first: {skipped[-1][1]}")
    if not readable["train"]:
        print(f"only {len(readable['val'])} usable: the validation split is the training split")
        for clip in readable["val"]:
            frames = video.read_clip(clip.path, data.frames, data.fps, data.height, data.width)
            recorder.write("train", clip.id, clip.caption, frames, clip.category)
    labels = {
        label: {"clips": count, "first": report.examples[label]}
        for label, count in report.unknown_labels.most_common()
    }
    return {
        "records_listed": report.records,
        "skipped": skipped,
        "labels_not_understood": labels,
        "unannotated": report.unannotated,
        "label_not_among_answers": report.label_differs,
    }


def _versions() -> dict[str, str]:
    """Versions of this program and of the packages that shape the data, where installed."""
    versions = {"prophy_jax": prophy_jax.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _print_list(title: str, entries: list[str]) -> None:
    if entries:
        print(f"{title}: {len(entries)}")
        for entry in entries[:SHOWN]:
            print(f"  {entry}")
        if len(entries) > SHOWN:
            print(f"  ... and {len(entries) - SHOWN} more in manifest.json")


def _print_summary(out: Path, manifest: dict[str, Any]) -> None:
    counts = ", ".join(f"{split} {count}" for split, count in manifest["counts"].items())
    print(f"wrote {out}: {counts} clips of latents {tuple(manifest['latent_shape'])}")
    _print_list("skipped", [f"{name}: {reason}" for name, reason in manifest["skipped"]])
    _print_list(
        "labels not understood",
        [
            f"{label} in {found['clips']}, first {found['first']}"
            for label, found in manifest["labels_not_understood"].items()
        ],
    )
    _print_list("clips without q0, q1, q2: no category", manifest["unannotated"])
    _print_list("clips whose label is not among q0, q1, q2", manifest["label_not_among_answers"])
    _print_list(
        f"captions cut to {manifest['text_length']} text rows",
        [f"{name}: {lost} words lost" for name, lost in manifest["captions_cut"].items()],
    )


def prepare(
    config: "ConfigDict", source: str | Path | None = None, out: str | Path | None = None
) -> dict[str, Any]:
    """Makes a folder of training records (see `prophy_jax.data.records`) and prints a summary.

    Nothing appears at `out` before it is complete, and nothing is left behind on failure.

    Args:
        config: with `data` (dir, height, width, frames, fps, sandbox), `codec` and `text_encoder`.
        source: a folder in WISA-80K's layout; None draws the sandbox.
        out: where to write; None is `config.data.dir`.

    Returns:
        The manifest, as in `out`/manifest.json.

    Raises:
        UserError: `out` exists, the source is not usable, or no clip can be read.
    """
    import jax

    from prophy_jax import encoders, parallel
    from prophy_jax.data import records, wisa

    out = Path(out or config.data.dir)
    with records.new_folder(out) as folder:
        # Before the models load, so that a wrong folder shows at once.
        listing = None if source is None else wisa.read_wisa(source)
        mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "context": 1}, 0, jax.devices())
        codec, text_encoder = encoders.load_codec(config, mesh), encoders.load_text_encoder(config)
        recorder = records.Recorder(folder, codec, text_encoder)
        manifest = {
            "skipped": [],
            "labels_not_understood": {},
            "unannotated": [],
            "label_not_among_answers": [],
        }
        if listing is None:
            manifest |= _record_sandbox(config.data, folder, recorder)
        else:
            manifest |= {"source": {"wisa": str(Path(source).resolve())}}
            manifest |= _record_wisa(*listing, config.data, recorder)
        manifest |= recorder.close() | {
            "video": {key: config.data[key] for key in ("height", "width", "frames", "fps")},
            "codec": config.codec.to_dict(),
            "text_encoder": config.text_encoder.to_dict(),
            "versions": _versions(),
        }
        records.write_manifest(folder, manifest)
    manifest = records.read_manifest(out)
    _print_summary(out, manifest)
    return manifest


def main(config: "ConfigDict") -> None:
    prepare(config, flags.FLAGS.source, flags.FLAGS.out)


if __name__ == "__main__":
    # Defined here, so that importing several commands into one program does not define flags twice.
    flags.DEFINE_string("source", None, "Folder in WISA-80K's layout; without it, the sandbox.")
    flags.DEFINE_string("out", None, "Folder to make; default: config.data.dir.")
    cli.run(main, __doc__)
