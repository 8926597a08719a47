"""A configuration, built: the model, its objective and losses, the mesh, and parameters placed on it.

Every function takes what it uses; none needs a whole run.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from prophy_jax import losses, models
from prophy_jax.data import batch, records, taxonomy
from prophy_jax.diffusion import generate
from prophy_jax.models import attention
from prophy_jax.models.beside.part import Model, Part
from prophy_jax.run import checkpoints, distributed, optim, parallel, storage, workdir
from prophy_jax.run.errors import UserError, counted

# --- What is computed --------------------------------------------------------------------------------


def build_mesh(
    shape: Mapping[str, int], rows: int = 0, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh of `config.mesh` over all devices or those given; `rows` clips must divide over it.

    Raises UserError when the shape fits neither.
    """
    return parallel.make_mesh(shape, rows, devices or jax.devices())


def build_model(config: ConfigDict, mesh: jax.sharding.Mesh | None = None) -> Model:
    """The backbone and the parts that `config` names.

    Its attention is that of the mesh's devices; plain attention without a mesh, to describe or trace it.
    Raises UserError on names and sizes that do not exist or do not fit together.
    """
    for old, new in workdir.RENAMED.items():
        table, _, key = old.rpartition(".")
        if key in (config[table] if table else config):
            raise UserError(f"config.{old} is now config.{new}: rename it in the configuration")
    backbone = models.build(config.backbone)
    if mesh is not None:
        backend = attention.choose(config.attention, mesh.devices.flat[0].platform, backbone.dtype)
        on_device = functools.partial(attention.attention, backend=backend)
        backbone = dataclasses.replace(backbone, attention=parallel.over_mesh(on_device, mesh))
    known = {"categories": taxonomy.of(config).names}
    parts = {name: models.build(spec, known=known) for name, spec in (config.parts or {}).items() if spec}
    for name, part in parts.items():
        if not isinstance(part, Part):
            raise UserError(f"config.parts.{name}.module={config.parts[name].module!r} is no part")
    return Model(backbone, parts)


def build_objective(config: ConfigDict) -> Any:
    """The diffusion family, see `prophy_jax.diffusion.flow`.

    Raises UserError on settings that do not exist, and on a sampler that does not fit the objective: clips
    would come out wrong without a word.
    """
    objective = models.build(config.objective, package="prophy_jax.diffusion")
    generate.make_tables(objective, config.samples)
    return objective


def build_losses(config: ConfigDict, model: Model) -> losses.Chosen:
    """The losses that `config` lists. Raises UserError on one that the model has no part for."""
    return losses.choose(config.losses, config.reduction, model)


def microbatch(config: ConfigDict) -> int:
    """Clips that go through the model at a time. Raises UserError where they do not divide."""
    if config.batch_size % config.accumulation:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide into "
            f"config.accumulation={config.accumulation} microbatches: "
            f"--config.accumulation={math.gcd(config.batch_size, config.accumulation)} does"
        )
    return config.batch_size // config.accumulation


# --- Parameters --------------------------------------------------------------------------------------


def place(
    model: Model, mesh: jax.sharding.Mesh, frozen_dtype: str, groups: optim.Groups | None = None
) -> dict[str, Any]:
    """Shape, dtype and place of every parameter: one description for init, restore and sampling.

    Trainable parameters are fp32 and split over fsdp; frozen ones are `frozen_dtype` and whole on every
    device: gathering them in every step would cost more than it saves.

    Args:
        model: The backbone and its parts.
        mesh: Any.
        frozen_dtype: `config.frozen_dtype`.
        groups: `optim.groups_of(config.optimizer)`; None: the parts are trainable and the backbone is not.

    Raises:
        UserError: on groups that do not claim every parameter.
    """
    shapes = {"backbone": jax.eval_shape(model.backbone.init, jax.random.key(0))}
    for name in model.parts:
        init = functools.partial(model.init_part, name)
        shapes[name] = jax.eval_shape(init, jax.random.key(0), shapes)
    if groups is None:
        groups = [("backbone/", None), *((f"{name}/", 1.0) for name in model.parts)]
    trainable, frozen = optim.split(shapes, groups)

    whole = jax.tree.map(lambda _: parallel.replicated(mesh), frozen)
    return optim.merge(
        parallel.placed(trainable, parallel.shard_largest(trainable, mesh), "float32"),
        parallel.placed(frozen, whole, frozen_dtype),
    )


def init_params(config: ConfigDict, model: Model, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters at step 0, as `layout` (of `place`) says.

    The backbone is read from `config.backbone_params`, or drawn at random when that is empty; parts start
    from the backbone. Raises UserError when the backbone is missing or does not fit.
    """
    backbone_key, parts_key = jax.random.split(jax.random.key(config.seed))

    def draw(init: Any, target: Any, *args: Any) -> Any:
        def cast(*args: Any) -> Any:
            return jax.tree.map(lambda x, like: x.astype(like.dtype), init(*args), target)

        return jax.jit(cast, out_shardings=jax.tree.map(lambda like: like.sharding, target))(*args)

    if config.backbone_params:
        params = {"backbone": load_part(config, "backbone", config.backbone_params, layout)}
    else:
        params = {"backbone": draw(model.backbone.init, layout["backbone"], backbone_key)}
    for name in model.parts:
        init = functools.partial(model.init_part, name)
        params[name] = draw(init, layout.get(name, {}), parts_key, params)
    return params


def load_part(config: ConfigDict, name: str, folder: str | None, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Trained parameters of the backbone or of a part, from a folder of its own.

    Raises UserError when the folder is missing or does not fit.
    """
    return checkpoints.load_params(named(config, name, folder), layout[name], remedy(config, name, folder))


def find_starts(config: ConfigDict, layout: Mapping[str, Any], folders: Sequence[str]) -> dict[str, str]:
    """Part -> folder of the trained parameters that a new run begins with, of runs, checkpoints or parts.

    Raises UserError on a part that is frozen, not of the model, or does not fit; warns of other settings.
    """
    trainable, _ = optim.split(layout, optim.groups_of(config.optimizer))
    found: dict[str, str] = {}
    for folder in folders:
        parts = checkpoints.find_parts(
            folder, "name a run of prophy_jax.train, or parameters of one with --init"
        )
        for name, place in parts.items():
            if name not in trainable and len(parts) > 1:
                continue  # of a run that trained more than this one does
            if name not in trainable:
                known = sorted(trainable)
                raise UserError(f"--init={folder} is of {name!r}, which this run does not train, but {known}")
            if name in found:
                raise UserError(f"--init names {name!r} twice: {found[name]} and {place}")
            manifest = checkpoints.check_params(place, layout[name], remedy(config, name, place))
            if name != "backbone":
                taxonomy.of(config).check(manifest, place)
                different = compare_part(config, name, manifest, place)
                if different and distributed.is_first():
                    print(
                        f"warning: --init={folder} was trained with another configuration ({different}): "
                        "what it learned may do something else here",
                        file=sys.stderr,
                    )
            found[name] = place
        if not found.keys() & parts.keys():
            raise UserError(f"--init={folder} has {sorted(parts)}; this run trains {sorted(trainable)}")
    return found


def load_params(
    config: ConfigDict, layout: Mapping[str, Any], folders: Mapping[str, str | None]
) -> dict[str, Any]:
    """Trained parameters of the backbone and of all parts of `layout`, each from its folder."""
    return {name: load_part(config, name, folders.get(name), layout) for name in layout}


def check_params(
    config: ConfigDict, layout: Mapping[str, Any], folders: Mapping[str, str | None]
) -> dict[str, str]:
    """{NAME_sha256} of the parameters that `load_params` would read, without reading them.

    Raises UserError when they are missing, do not fit, or a part belongs to another backbone.
    """
    manifests = {
        name: checkpoints.check_params(
            named(config, name, folders.get(name)), layout[name], remedy(config, name, folders.get(name))
        )
        for name in layout
    }
    hashes = {f"{name}_sha256": manifest["sha256"] for name, manifest in manifests.items()}
    own = hashes["backbone_sha256"]
    for name, manifest in manifests.items():
        if name != "backbone" and manifest.get("backbone_sha256", own) != own:
            raise UserError(
                f"{folders[name]} was trained next to another backbone than {folders['backbone']}: "
                "name that one with --checkpoint=DIR"
            )
        if name != "backbone" and manifest.get("model", {}).get(name):
            taxonomy.of(config).check(manifest, folders[name] or "")
            if different := compare_part(config, name, manifest, folders[name] or ""):
                raise UserError(
                    f"{folders[name]} was trained with another configuration ({different}): give that one"
                )
    return hashes


def compare_part(config: ConfigDict, name: str, manifest: Mapping[str, Any], folder: str) -> str:
    """Where `config.parts` differs from the part in `folder`, of that manifest; "" where nothing does."""
    stored = manifest.get("model", {}).get(name)
    own = workdir.identify_part(workdir.config_as_json(config)["parts"][name])
    try:
        return workdir.differences(workdir.identify_part(stored), own) if stored else ""
    except (TypeError, AttributeError, ValueError) as error:
        again = remedy(config, name, folder)
        raise UserError(f"{folder}/manifest.json is damaged ({error}): {again}") from error


def named(config: ConfigDict, name: str, folder: str | None) -> str:
    """`folder`, of the parameters of the backbone or of a part. Raises UserError when none is named."""
    if folder:
        return folder
    if name != "backbone":
        raise UserError(f"no parameters of {name!r} are named: {remedy(config, name, None)}")
    raise UserError(
        "config.backbone_params is empty: name WORKDIR/backbone of a run that trained one, or converted "
        f"weights, with --checkpoint=DIR or --config.backbone_params=DIR; or {remedy(config, name, None)}"
    )


def check_backbone(config: ConfigDict, layout: Mapping[str, Any]) -> None:
    """Raises UserError when the backbone would be random, stay so, and not be saved."""
    trainable, _ = optim.split(layout, optim.groups_of(config.optimizer))
    if not config.backbone_params and "backbone" not in trainable:
        raise UserError(
            "the backbone is random and frozen: config.backbone_params is empty and its learning rate is 0: "
            "name its weights with --config.backbone_params=DIR, or let it train with a learning rate above "
            "0, such as --config.optimizer.learning_rates.backbone=1e-3"
        )


def remedy(config: ConfigDict, name: str, folder: str | None) -> str:
    """What to do when parameters are missing from `folder`: it names that one, not the configuration's."""
    if name == "backbone":
        return checkpoints.name_folder(config.backbone_remedy, folder)
    return f"name WORKDIR/{name} of a finished run of prophy_jax.train"


# --- Data --------------------------------------------------------------------------------------------


def check_data(config: ConfigDict, model: Model, chosen: losses.Chosen) -> dict[str, Any]:
    """The manifest of `config.data.dir`.

    Raises UserError unless the data were prepared as the configuration says, in latents that the backbone
    takes.
    """
    manifest = records.read_manifest(config.data.dir)
    taxonomy.of(config).check(manifest, config.data.dir)
    for key in ("video", "buckets", "counts", "codec", "text_encoder"):
        if not isinstance(manifest.get(key), dict):
            raise UserError(f"{config.data.dir}/manifest.json is damaged (no {key}): prepare the data again")
    own = workdir.run_identity(config, "data")
    own["data"] = {key: own["data"].get(key) for key in manifest["video"]}
    was = {"data": manifest["video"], **{key: manifest[key] for key in own if key != "data"}}
    if different := workdir.differences(was, own):
        raise UserError(
            f"{config.data.dir} was prepared with another configuration ({different}): "
            "prepare it again with this one, or name another --config.data.dir"
        )
    for bucket in manifest["buckets"].values():
        grid = token_grid(model, bucket["latent_shape"])
        if list(grid) != bucket["token_grid"]:
            raise UserError(
                f"{config.data.dir} was prepared for {bucket['token_grid']} tokens of a clip, the backbone "
                f"has {list(grid)}: prepare it again with this configuration"
            )
    for bucket in manifest["buckets"]:
        check_shapes(model, chosen, batch.Sizes.of(manifest, bucket))
    return manifest


def find_references(config: ConfigDict, manifest: Mapping[str, Any]) -> dict[str, str]:
    """{NAME_sha256} of the data of `config.data`, and of the encoders that they were made with.

    Raises UserError where the configuration names other encoders than those.
    """
    hashes = {"data_sha256": manifest["fingerprint"]}
    for name, folder in config.data.side.items():
        if folder and storage.path(folder).exists():
            hashes[f"{name}_sha256"] = records.read_manifest(folder)["fingerprint"]
    for name in ("codec", "text_encoder"):
        if was := manifest.get("plan", {}).get(f"{name}_sha256"):
            folder = config.get(workdir.FOLDERS[name])
            if folder and (storage.path(folder) / "manifest.json").exists():
                check_same(
                    name,
                    checkpoints.read_manifest(folder, "")["sha256"],
                    folder,
                    manifest["plan"],
                    config.data.dir,
                )
            hashes[f"{name}_sha256"] = was
    return hashes


def check_same(name: str, own: str, folder: str, made_with: Mapping[str, Any], where: str | None) -> None:
    """Raises UserError where `made_with`, a manifest of `where`, notes another NAME_sha256 than `own`."""
    was = made_with.get(f"{name}_sha256", own)
    if was != own:
        raise UserError(
            f"{where} was made with another {name} ({was[:12]}) than {folder} ({own[:12]}): name that one "
            f"with --config.{workdir.FOLDERS[name]}=DIR, or make {where} again with this one"
        )


def check_shapes(model: Model, chosen: losses.Chosen, sizes: batch.Sizes) -> None:
    """Raises UserError when the losses cannot compare the parts with clips of these sizes."""
    chosen.check(model, {name: batch.FIELDS[name].shape(sizes) for name in list_fields(model, chosen)})


def check_validation(config: ConfigDict, manifest: Mapping[str, Any]) -> None:
    """Raises UserError when a run would measure or sample validation clips and the data have none."""
    if (config.validation.every or config.samples.every) and not manifest["counts"].get("val"):
        raise UserError(
            f"{config.data.dir} has no validation clips: prepare it with a --config.data.val_share above 0, "
            "or train without them: --config.validation.every=0 --config.samples.every=0"
        )


def warn_of_idle_losses(config: ConfigDict, model: Model, chosen: losses.Chosen) -> None:
    """Says on stderr which losses are constant on these data, why, and what that means."""
    from prophy_jax.data import loader  # the planner needs no Grain

    zero, looked = loader.find_zero_fields(config.data, "train", chosen.fields)
    where = f" (looked at {counted(looked, 'clip')} of {config.data.dir})" if zero else ""
    for name, reason in chosen.idle(model, config.batch_size, zero).items():
        print(f"warning: the loss {name!r} {reason}{where}", file=sys.stderr)


def list_fields(model: Model, chosen: losses.Chosen) -> tuple[str, ...]:
    """Fields of the batch that a training step reads."""
    return tuple(dict.fromkeys(("latents", *model.fields, *chosen.fields)))


def sizes(config: ConfigDict, model: Model) -> batch.Sizes:
    """Of the clips that `config.data` describes. Raises UserError on sizes that the model cannot take."""
    data = config.data
    latents, grid = fit(models.build(config.codec), model.backbone, (data.frames, data.height, data.width))
    text, categories = config.text_encoder.length, len(taxonomy.of(config).names)
    return batch.Sizes(latents, grid, text, model.backbone.config.text_dim, categories)


def fit(
    codec: Any, backbone: Any, size: Sequence[int]
) -> tuple[tuple[int, int, int, int], tuple[int, int, int]]:
    """The latents (T, h, w, 16) and the token grid of clips of (frames, height, width).

    Raises UserError on a size that the codec or the backbone cannot take, with the multiple that both need.
    """

    def attempt(frames: int, height: int, width: int) -> tuple[Any, Any]:
        latents = codec.latent_shape(frames, height, width)
        try:
            return latents, backbone.grid(latents)
        except ValueError as error:
            raise UserError(f"{error}: change config.data.height, width or frames") from error

    frames, height, width = size
    try:
        return attempt(*size)
    except UserError:
        for side in range(1, 129):
            with contextlib.suppress(UserError):
                attempt(frames, side, side)
                break
        else:
            raise  # The frames do not fit.
        if min(height, width) > 0 and height % side == width % side == 0:
            raise
        near = [max(side, round(pixels / side) * side) for pixels in (height, width)]
        raise UserError(
            f"clips of {height} x {width} pixels (H x W): both must be multiples of {side}, such as "
            f"{near[0]} x {near[1]}: change config.data.height or width"
        ) from None


def token_grid(model: Model, latent_shape: Sequence[int]) -> tuple[int, int, int]:
    """The backbone's token grid for latents (T, h, w, 16). Raises UserError on sizes it cannot take."""
    try:
        return model.backbone.grid(tuple(latent_shape))
    except ValueError as error:
        raise UserError(f"{error}: change config.data.height, width or frames") from error
