"""What a configuration describes, built: mesh, model, objective and parameters.

Shared by the commands that train, sample and measure.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from prophy_jax import losses, models
from prophy_jax.data import records
from prophy_jax.data.records import differences
from prophy_jax.models import attention
from prophy_jax.models.beside.prophy import BranchConfig, ProPhy
from prophy_jax.run import checkpoints, optim, parallel
from prophy_jax.run.errors import UserError

# These may differ between the run that wrote a workdir and the run that resumes it.
MAY_CHANGE = ("mesh", "attention", "log", "checkpoint", "samples", "label", "label_check")


@dataclasses.dataclass(frozen=True)
class Experiment:
    config: ConfigDict
    mesh: jax.sharding.Mesh
    model: ProPhy
    objective: Any  # see prophy_jax.diffusion.flow


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Builds what `config` names, on all devices or those given.

    Raises UserError on parts that do not fit together.
    """
    unknown = set(config.losses) - set(losses.COARSE) - set(losses.FINE)
    if unknown:
        known = losses.COARSE + losses.FINE
        raise UserError(f"config.losses names {sorted(unknown)}; choose from {known}")
    if config.batch_size % config.accumulation:
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide into "
            f"config.accumulation={config.accumulation} microbatches"
        )
    microbatch = config.batch_size // config.accumulation
    mesh = parallel.make_mesh(config.mesh, microbatch, devices or jax.devices())
    backbone = models.build(config.backbone)
    backend = attention.choose(config.attention, mesh.devices.flat[0].platform, backbone.dtype)
    on_device = functools.partial(attention.attention, backend=backend)
    backbone = dataclasses.replace(backbone, attention=parallel.over_mesh(on_device, mesh))
    branch = BranchConfig.from_dict(config.branch) if config.branch else None
    for names, part in ((losses.COARSE, "semantic"), (losses.FINE, "refinement")):
        listed = sorted(set(config.losses) & set(names))
        if listed and not (branch and getattr(branch, part)):
            raise UserError(f"config.losses lists {listed} but config.branch.{part} is absent")
    objective = models.build(config.objective, package="prophy_jax.diffusion")
    return Experiment(config, mesh, ProPhy(backbone, branch), objective)


def abstract_params(experiment: Experiment) -> dict[str, Any]:
    """Shape, dtype and place of every parameter: one description for init, restore and sampling.

    Trainable parameters are fp32 and split over fsdp; frozen ones are `config.frozen_dtype` and whole on
    every device: gathering them in every step would cost more than it saves.
    """
    config, model, mesh = experiment.config, experiment.model, experiment.mesh
    shapes = {"backbone": jax.eval_shape(model.backbone.init, jax.random.key(0))}
    if model.branch:
        shapes["branch"] = jax.eval_shape(model.init_branch, jax.random.key(0), shapes["backbone"])
    trainable, frozen = optim.split(shapes, config.optimizer.groups)

    def describe(tree, dtype, shardings):
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding),
            tree,
            shardings,
        )

    whole = jax.tree.map(lambda _: parallel.replicated(mesh), frozen)
    return optim.merge(
        describe(trainable, "float32", parallel.shard_largest(trainable, mesh)),
        describe(frozen, config.frozen_dtype, whole),
    )


def init_params(experiment: Experiment) -> tuple[Any, Any]:
    """(trainable, frozen) parameters at step 0.

    The backbone is read from `config.backbone_params`, or drawn at random when that is empty; the branch
    starts from the backbone. Raises UserError when the backbone is missing or does not fit.
    """
    config, model = experiment.config, experiment.model
    layout = abstract_params(experiment)
    backbone_key, branch_key = jax.random.split(jax.random.key(config.seed))

    def place(init, target, *args):
        def cast(*args):
            return jax.tree.map(lambda x, like: x.astype(like.dtype), init(*args), target)

        return jax.jit(cast, out_shardings=jax.tree.map(lambda like: like.sharding, target))(*args)

    if config.backbone_params:
        params = {
            "backbone": checkpoints.load_params(
                config.backbone_params, layout["backbone"], config.backbone_remedy
            )
        }
    else:
        params = {"backbone": place(model.backbone.init, layout["backbone"], backbone_key)}
    if model.branch:
        params["branch"] = place(model.init_branch, layout["branch"], branch_key, params["backbone"])
    return optim.split(params, config.optimizer.groups)


def token_grid(experiment: Experiment, latent_shape: Sequence[int]) -> tuple[int, int, int]:
    """The backbone's token grid for latents (T, h, w, 16). Raises UserError on sizes it cannot take."""
    try:
        return experiment.model.backbone.grid(tuple(latent_shape))
    except ValueError as error:
        raise UserError(f"{error}: change config.data.height, width or frames") from error


def _folders(
    experiment: Experiment, checkpoint: str | None, branch: str | None
) -> dict[str, tuple[str, str]]:
    """Folder of every part's trained parameters, and what to do when it is missing."""
    config = experiment.config
    folders = {"backbone": (checkpoint or config.backbone_params or "(none)", config.backbone_remedy)}
    if experiment.model.branch:
        remedy = "name WORKDIR/branch of a finished run of prophy_jax.train"
        folders["branch"] = (branch or "(none)", remedy)
    return folders


def check_params(experiment: Experiment, branch: str | None = None) -> dict[str, str]:
    """{part_sha256} of the parameters that `load_params` would read, without reading them.

    Raises UserError when they are missing, do not fit, or the branch belongs to another backbone.
    """
    layout, manifests = abstract_params(experiment), {}
    for part, (folder, remedy) in _folders(experiment, None, branch).items():
        manifests[part] = checkpoints.check_params(folder, layout[part], remedy)
    hashes = {f"{part}_sha256": manifest["sha256"] for part, manifest in manifests.items()}
    beside = manifests.get("branch", {}).get("backbone_sha256", hashes["backbone_sha256"])
    if beside != hashes["backbone_sha256"]:
        raise UserError(
            f"{branch} was trained beside another backbone than {experiment.config.backbone_params}: "
            "name that one with --checkpoint=DIR"
        )
    return hashes


def load_params(
    experiment: Experiment, checkpoint: str | None = None, branch: str | None = None
) -> dict[str, Any]:
    """Trained parameters, as the model takes them.

    `checkpoint` is a folder of backbone parameters (default: `config.backbone_params`), `branch` one of
    branch parameters, WORKDIR/branch of a finished run. Raises UserError when one is missing or does not
    fit.
    """
    layout = abstract_params(experiment)
    return {
        part: checkpoints.load_params(folder, layout[part], remedy)
        for part, (folder, remedy) in _folders(experiment, checkpoint, branch).items()
    }


def check_data(experiment: Experiment) -> dict[str, Any]:
    """The manifest of `config.data.dir`. Raises UserError unless it was prepared as the configuration says,
    in latents that the backbone takes."""
    config = experiment.config
    manifest, own = records.read_manifest(config.data.dir), config_as_json(config)
    encoders = ("codec", "text_encoder")
    different = differences(
        {"data": manifest["video"], **{key: manifest[key] for key in encoders}},
        {
            "data": {key: own["data"][key] for key in manifest["video"]},
            **{key: own[key] for key in encoders},
        },
    )
    if different:
        raise UserError(
            f"{config.data.dir} was prepared with another configuration ({different}): "
            "prepare it again with this one, or name another --config.data.dir"
        )
    for bucket in manifest["buckets"].values():
        grid = token_grid(experiment, bucket["latent_shape"])
        if list(grid) != bucket["token_grid"]:
            raise UserError(
                f"{config.data.dir} has labels for {bucket['token_grid']} tokens of a clip, the backbone has "
                f"{list(grid)}: training beside patches of several latent times is not possible yet"
            )
    labels = records.find_labels(config.data.dir, config.data.labels)
    if labels is None and set(config.losses) & {"alignment", "absolute_alignment"}:
        print(
            f"warning: {config.data.dir} has no token labels, so the alignment loss stays 0; make them with "
            "python -m prophy_jax.label, and name them with --config.data.labels=DIR",
            file=sys.stderr,
        )
    return manifest


def config_as_json(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def claim_workdir(workdir: str, config: ConfigDict, references: Mapping[str, str]) -> None:
    """Writes WORKDIR/config.json, or checks that it is of this configuration and frozen backbone.

    Raises UserError when the folder belongs to something else; nothing is overwritten.
    """
    own = {"config": config_as_json(config), "references": dict(references)}
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path):
        with open(path) as file:
            old = json.load(file)
        for part in (old["config"], own["config"]):
            for key in MAY_CHANGE:
                part.pop(key, None)
        different = differences(old, own)
        if different:
            raise UserError(
                f"{path} is of another configuration ({different}): name another "
                "--workdir, or the configuration it was made with"
            )
        return
    os.makedirs(workdir, exist_ok=True)
    if os.listdir(workdir):
        raise UserError(f"{workdir} is not empty and holds no config.json: name another --workdir")
    with open(path + ".tmp", "w") as file:
        json.dump(own, file, indent=1)
    os.replace(path + ".tmp", path)
