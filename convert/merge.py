"""Adds LoRA files into converted weights: the same model without adapters, to sample, train or export.

    python -m convert.merge --checkpoint=checkpoints/wan2.1-t2v-1.3b --lora=FILE --dst=checkpoints/merged
    ... --lora=FILE=0.8 --lora=OTHER         several, each with a strength

--checkpoint is a folder that `convert.wan` or `convert.cogvideox` wrote, or its transformer/. W + scale * A B
is computed in fp32 and stored in the dtype of W. The other components are linked, or copied where that is not
possible. DST must not exist; it appears when it is whole. Memory holds the transformer twice.
"""

import os
import shutil
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from convert import lora
from prophy_jax import models, sample
from prophy_jax.run import checkpoints, cli, storage
from prophy_jax.run.errors import UserError, one_line_errors

_COMPUTED = ("sha256", "shapes", "files", "checksum")  # of a manifest, when parameters are saved


def merge(checkpoint: str, adapters: list[tuple[str, float]], dst: str) -> str:
    """Writes `checkpoint` with adapters added to `dst`. Returns the hash of the merged transformer.

    Args:
        checkpoint: Folder of converted weights, or of the transformer alone.
        adapters: (file, strength).
        dst: A folder that does not exist yet.

    Raises:
        UserError: on bad input or a full disk. Nothing is at `dst` then.
    """
    target = Path(dst).absolute()
    if os.path.lexists(target):
        raise UserError(f"{dst} exists: name another --dst, or remove it")
    if not adapters:
        raise UserError("nothing to add: name a LoRA with --lora=FILE")
    whole = (Path(checkpoint) / "transformer").is_dir()
    source = os.path.join(checkpoint, "transformer") if whole else checkpoint
    remedy = f"name a folder of converted weights, not {checkpoint}"
    manifest = checkpoints.read_manifest(source, remedy)
    spec = manifest.get("model") or {}
    if "module" not in spec:
        raise UserError(f"{source} is of no transformer alone: {remedy}")
    backbone = models.build(spec)
    merged = list(manifest.get("merged", []))
    opened = []
    for file, strength in adapters:
        opened.append(lora.read(file, backbone, strength))
        digest = storage.hash_file(file)
        if digest in merged:
            raise UserError(f"{source} has {file} merged into it already")
        merged.append(digest)
    shapes = flatten_dict(jax.eval_shape(backbone.init, jax.random.key(0)), sep="/")
    dtypes = {path: dtype for path, (_, dtype) in manifest["shapes"].items()}
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtypes.get(path, leaf.dtype)) for path, leaf in shapes.items()
    }
    params = {"backbone": checkpoints.load_params(source, unflatten_dict(wanted, sep="/"), remedy)}
    for part, own in opened:
        params = part.merge(own, params)

    temporary = target.with_name(target.name + ".writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
        about = {key: value for key, value in manifest.items() if key not in _COMPUTED} | {"merged": merged}
        place = temporary / "transformer" if whole else temporary
        digest = checkpoints.save_params(str(place), params["backbone"], about)
        for part in sorted(Path(checkpoint).iterdir()) if whole else ():
            if part.name != "transformer":
                copy = shutil.copytree if part.is_dir() else shutil.copy2
                options = {"copy_function": _link} if part.is_dir() else {}
                copy(part, temporary / part.name, **options)
        storage.put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest


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
    digest = merge(options.checkpoint, sample.read_adapters(options.lora), options.dst)
    print(f"{options.dst}: {len(options.lora)} LoRA merged, transformer sha256 {digest}")


if __name__ == "__main__":
    with one_line_errors(), storage.one_line_errors():
        try:
            main()
        except KeyboardInterrupt:
            raise UserError("interrupted: nothing was written") from None
