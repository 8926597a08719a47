"""Adds LoRA files into converted weights: the same model without adapters, to sample, train or export.

    python -m convert.merge --checkpoint=checkpoints/wan2.1-t2v-1.3b --lora=FILE --dst=checkpoints/merged
    ... --lora=FILE=0.8 --lora=OTHER         several, each with a strength

--checkpoint is a folder that `convert.wan` or `convert.cogvideox` wrote, or its transformer/. W + scale * A B
is computed in fp32 and stored in the dtype of W. The other components are linked, or copied where that is not
possible. DST must not exist, unless the same command made it; it appears when it is whole. Memory holds the
transformer twice.
"""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from convert import leaves as lv
from convert import lora
from prophy_jax import models
from prophy_jax.run import checkpoints, checksums, cli, storage
from prophy_jax.run.errors import UserError, explain_system

_COMPUTED = ("sha256", "shapes", "files", "checksum")  # of a manifest, when parameters are saved


def merge(checkpoint: str, adapters: list[tuple[str, float]], dst: str) -> str:
    """Writes `checkpoint` with adapters added to `dst`. Returns the hash of the merged transformer.

    Args:
        checkpoint: Folder of converted weights, or of the transformer alone.
        adapters: (file, strength).
        dst: A folder that does not exist yet, or that a former run made of the same: it stays as it is.

    Raises:
        UserError: on bad input or a full disk. Nothing is at `dst` then.
    """
    target = Path(dst).absolute()
    if not adapters:
        raise UserError("nothing to add: name a LoRA with --lora=FILE")
    if target.resolve().is_relative_to(Path(checkpoint).resolve()):
        raise UserError(f"{dst} would be inside of {checkpoint}: name another --dst")
    for file, strength in adapters:
        if strength == 0:
            raise UserError(f"--lora={file}=0 adds nothing: give another strength, or leave it out")
    whole = (Path(checkpoint) / "transformer").is_dir()
    source = os.path.join(checkpoint, "transformer") if whole else checkpoint
    remedy = f"name a folder of converted weights or WORKDIR/backbone, not {checkpoint}"
    manifest = checkpoints.read_manifest(source, remedy)
    spec = manifest.get("model") or {}
    if "module" not in spec or manifest.get("part") not in ("transformer", "backbone"):
        raise UserError(f"{source} is of no transformer alone: {remedy}")
    backbone = models.build(spec)
    opened = list(lora.read_all(adapters, backbone, source))
    digests = [digest for _, _, digest in opened]
    for (file, _), digest in zip(adapters, digests, strict=True):
        if digests.count(digest) > 1:
            raise UserError(f"--lora={file} is named twice: add up its strengths")
    made_of = {
        "source": manifest["sha256"],
        "adapters": [[digest, strength] for digest, (_, strength) in zip(digests, adapters, strict=True)],
    }
    if os.path.lexists(target):
        return _finished(target, whole, made_of, dst)
    dtypes = {path: dtype for path, (_, dtype) in manifest["shapes"].items()}
    wanted = {
        path: jax.ShapeDtypeStruct(shape, dtypes.get(path, "float32"))
        for path, shape in lv.shapes_of(backbone.init).items()
    }
    params = {"backbone": checkpoints.load_params(source, unflatten_dict(wanted, sep="/"), remedy)}
    for (file, strength), (part, own, _) in zip(adapters, opened, strict=True):
        params = part.merge(own, params)
        if not all(checkpoints.is_finite(np.asarray(leaf)) for leaf in jax.tree.leaves(params)):
            raise UserError(f"--lora={file}={strength:g} leaves NaN or infinity: give a lower strength")

    temporary = target.with_name(target.name + ".writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
        about = {key: value for key, value in manifest.items() if key not in _COMPUTED}
        about |= {"merged": [*lora.read_merged(source), *digests], "made_of": made_of}
        place = temporary / "transformer" if whole else temporary
        digest = checkpoints.save_params(str(place), params["backbone"], about)
        for part in sorted(Path(checkpoint).iterdir()) if whole else ():
            if part.name != "transformer":
                copy = shutil.copytree if part.is_dir() else shutil.copy2
                options = {"copy_function": _link} if part.is_dir() else {}
                copy(part, temporary / part.name, **options)
        storage.put_in_place(temporary, target)
    except OSError as error:
        if explain_system(error):
            raise
        raise UserError(f"cannot write {error.filename or dst}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest


def _finished(target: Path, whole: bool, made_of: dict, dst: str) -> str:
    """The hash of what is at `target`. Raises UserError unless it was made of the same by a former run."""
    place = str(target / "transformer" if whole else target)
    if target.is_dir() and checkpoints.holds_params(place):
        manifest = checkpoints.read_manifest(place, f"remove {dst}, and run the same command again")
        if manifest.get("made_of") == made_of:
            with checksums.verified(
                place, manifest["files"], f"remove {dst}, and run the same command again"
            ):
                print(f"{dst} was made of the same before: nothing is left to do")
            return manifest["sha256"]
    raise UserError(f"{dst} exists: name another --dst, or remove it")


def _link(source: str, target: str) -> str:
    storage.copy(Path(source), Path(target))
    return target


def main(arguments: list[str] | None = None) -> None:
    """The command; `arguments` are those of the process by default."""
    jax.config.update("jax_platforms", "cpu")
    parser = cli.ArgumentParser("python -m convert.merge", __doc__)
    parser.add_argument("--checkpoint", required=True, help="Folder of converted weights.")
    parser.add_argument(
        "--lora", action="append", default=[], help="A LoRA file, FILE or FILE=STRENGTH; may be repeated."
    )
    parser.add_argument("--dst", required=True, help="Folder to write, a new one.")
    options = parser.parse_args(arguments)
    digest = merge(options.checkpoint, lora.parse(options.lora), options.dst)
    print(f"{options.dst}: {len(options.lora)} LoRA merged, transformer sha256 {digest}")


if __name__ == "__main__":
    cli.run_plain(main, "interrupted: nothing was written")
