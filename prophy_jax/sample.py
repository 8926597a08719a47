"""Samples videos from prompts, with the physical branch or with the backbone alone.

    python -m prophy_jax.sample --config=configs/wan.py --checkpoint=checkpoints/wan2.1-t2v-1.3b \
        --prompt="A red ball rolls off a table and bounces on the floor." --out=samples
    ... --branch=WORKDIR/branch   the physical branch of a finished run
    ... --prompts=FILE            one prompt a line
    ... --baseline                also the backbone alone, from the same noise
    ... --overlay                 also each clip with the token routing laid over it

Solver, steps, shift, guidance and the negative prompt are those of `config.samples`, size and length of the
clips those of `config.data`; override them as --config.samples.KEY. OUT/manifest.json says how each clip was
made. Run the same command again to make the clips that are missing.

B prompts, F H W video, T h w latent grid, N video tokens, L text length, D text width.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from prophy_jax.diffusion import solvers
from prophy_jax.models.beside.prophy import ProPhy
from prophy_jax.run import parallel
from prophy_jax.run.errors import UserError

PIECES = 10  # that a loop which shows its progress is called in


def make_sampler(model: ProPhy, config) -> tuple[Callable, Callable]:
    """Two compiled functions, (begin, loop): what a clip needs once, and any number of solver steps.

    begin(params, noise, text, text_mask, negative, rows) -> (prompt, state)
    loop(params, state, prompt, scale, first, last) -> state after steps first..last-1; the one given is
        donated. One program runs them all and holds the network once.

    Steps that `config.samples.skip` lists do not call the network. Where the configuration names no
    `samples.guidance_schedule`, guidance is constant. Rows, and with guidance the pairs of rows, are split
    over the mesh in force wherever they divide: a single guided clip takes two devices.
    """
    settings = config.samples
    solver = solvers.solver(settings.solver, settings.steps, settings.shift)
    solver = solvers.skipping(solver, settings.skip)
    guidance = solvers.guidance_schedule(settings.guidance_schedule, settings.guidance, settings.steps)

    @functools.partial(jax.jit, static_argnames="rows")
    def begin(params, noise, text, text_mask, negative, rows):
        text = solvers.pair_prompts(text, negative["text"], guidance)
        text_mask = solvers.pair_prompts(text_mask, negative["text_mask"], guidance)
        prompt = model.read_ahead(params, split_rows(text), split_rows(text_mask), rows)
        return prompt, jax.tree.map(split_rows, solvers.start(solver, noise))

    @functools.partial(jax.jit, donate_argnames="state")
    def loop(params, state, prompt, scale, first, last):
        def predict(x, t):
            return model.predict(params, split_rows(x), t, prompt, scale).velocity

        state = solvers.advance(solver, solvers.guided(predict, guidance), state, first, last)
        return jax.tree.map(split_rows, state)

    return begin, loop


def split_rows(x: jax.Array) -> jax.Array:
    """Splits (B, ...) over data and fsdp of the mesh in force; whole on every device if B does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    divides = x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    return jax.lax.with_sharding_constraint(x, parallel.BATCH if divides else PartitionSpec())


def make_generator(model: ProPhy, config) -> Callable[..., jax.Array]:
    """generate(params, noise, text, text_mask, negative, scale, after_steps) -> latents (B, T, h, w, 16).

    What the blocks read of the prompts is computed once; then all `config.samples.steps` solver steps are
    one call of one program. `negative` is the encoded negative prompt, {"text" (L, D), "text_mask" (L,)},
    that guidance compares with.

    `after_steps(n)` is told of every n steps that are done. The program is then called in a few pieces, and
    does not call back itself: jax 0.10 cannot keep such programs in its compile cache.
    """
    begin, loop = make_sampler(model, config)
    steps = config.samples.steps

    def generate(params, noise, text, text_mask, negative, scale=1.0, after_steps=None):
        rows = text_rows(np.concatenate([np.asarray(text_mask), np.asarray(negative["text_mask"])[None]]))
        prompt, state = begin(params, noise, text, text_mask, negative, rows=rows)
        pieces = min(PIECES, steps) if after_steps else 1
        for piece in np.array_split(np.arange(steps), pieces):
            state = loop(params, state, prompt, jnp.float32(scale), piece[0], piece[-1] + 1)
            if after_steps:
                jax.block_until_ready(state)
                after_steps(len(piece))
        return state.x

    return generate


def text_rows(mask: np.ndarray) -> int | None:
    """How many rows of text a sampler keeps, in steps of 32; None for all: see the backbone's `text_ahead`.

    On CPUs, where it was measured to be faster. Fused kernels elsewhere take no cheap bias.
    """
    rows = 32 * (int(mask.sum(-1).max()) // 32 + 1)
    return rows if jax.default_backend() == "cpu" and rows < mask.shape[-1] else None


def make_noise(seed: int, indices: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise (B, *shape) to start from. Row i depends on the seed and indices[i] alone.

    What a stochastic solver adds later follows from it, see `solvers.sample_keys`.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(indices))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def make_localiser(model: ProPhy, objective, sigma: float = 0.2) -> Callable[..., jax.Array]:
    """localise(params, latents, text, text_mask, seed) -> P'_r (B, N, 17) of clean latents.

    The routers read noisy latents: noise is added until its share is `sigma`, in every family.
    """

    @jax.jit
    def localise(params, latents, text, text_mask, seed=0):
        noise = jax.random.normal(jax.random.key(seed), latents.shape)
        time = jnp.full((latents.shape[0],), sigma)
        noisy = objective.add_noise(latents, noise, time)
        output = model(params, noisy, objective.model_time(time), text, text_mask)
        return output.routing.alignment

    return localise


def make_validation_clips(run) -> Callable[[dict, str], None]:
    """write(params, path): one mp4, the first validation prompts sampled above the real clips.

    All processes of a job call it and sample together; the first one decodes and writes.
    """
    from prophy_jax.data import loader
    from prophy_jax.data.sources import video
    from prophy_jax.run import distributed, encoders

    config = run.config
    batch = next(
        loader.make_loader(config.data.dir, "val", config.samples.clips, 0, shuffle=False, repeat=False)
    )
    batch = parallel.full_precision(batch)
    noise = make_noise(config.seed, batch["index"], batch["latents"].shape[1:])
    text, text_mask = loader.load_empty_text(config.data.dir)
    empty = {"text": text, "text_mask": text_mask}
    generate = make_generator(run.model, config)
    first = distributed.is_first()
    codec = encoders.load_codec(config, run.mesh.local_mesh) if first else None

    def side_by_side(clips) -> np.ndarray:
        return np.concatenate(list(codec.decode(clips)), axis=2)

    def write(params, path: str) -> None:
        latents = distributed.fetch(generate(params, noise, batch["text"], batch["text_mask"], empty))
        if not first:
            return
        rows = [side_by_side(latents), side_by_side(batch["latents"])]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        video.write_mp4(path, np.concatenate(rows, axis=1), config.data.fps)

    return write


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
    """Prompts of the command line and of a file with one a line. Raises UserError when there are none."""
    prompts = list(prompts)
    if file:
        try:
            with open(file, encoding="utf-8") as lines:
                prompts += [line.strip() for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read prompts from {file}: {error}") from error
    if not prompts:
        raise UserError("no prompt: give --prompt=TEXT or --prompts=FILE with one prompt a line")
    return prompts


def use_checkpoint(config, folder: str) -> None:
    """Points the configuration at a folder of converted weights, or at one of backbone parameters."""
    if os.path.isdir(os.path.join(folder, "transformer")):
        config.backbone_params = os.path.join(folder, "transformer")
        config.codec_params = os.path.join(folder, "vae")
        config.text_encoder_params = os.path.join(folder, "text_encoder")
    else:
        config.backbone_params = folder


def claim_folder(out: str, settings: Mapping[str, Any], clips: list[dict[str, Any]]) -> None:
    """Writes OUT/manifest.json, or adds the clips to the one that is there.

    Raises UserError when the folder holds something else, or clips made in another way.
    """
    from prophy_jax import experiment

    path = os.path.join(out, "manifest.json")
    earlier: list[dict[str, Any]] = []
    if os.path.exists(path):
        with open(path) as file:
            manifest = json.load(file)
        earlier = manifest["clips"]
        was = {clip["file"]: clip for clip in earlier}
        now = {clip["file"]: clip for clip in clips if clip["file"] in was}
        different = experiment.differences(
            {**manifest["settings"], **{file: was[file] for file in now}}, {**settings, **now}
        )
        if different:
            raise UserError(f"the clips of {out} were made in another way ({different}): name another --out")
        clips = earlier + [clip for clip in clips if clip["file"] not in was]
    elif os.path.isdir(out) and os.listdir(out):
        raise UserError(f"{out} is not empty and holds no manifest.json: name another --out")
    os.makedirs(out, exist_ok=True)
    with open(path + ".tmp", "w") as file:
        json.dump({"settings": settings, "clips": clips}, file, indent=1, ensure_ascii=False)
    os.replace(path + ".tmp", path)


def main(config) -> None:
    from absl import flags
    from tqdm import tqdm

    from prophy_jax import experiment
    from prophy_jax.data.sources import video
    from prophy_jax.evaluation import pictures as visualize
    from prophy_jax.run import distributed, encoders

    # 1. What to sample, and with what. Everything that can be wrong is found before OUT is touched.
    options = flags.FLAGS
    prompts = read_prompts(options.prompt, options.prompts)
    if not options.branch:
        if options.overlay or options.baseline:
            raise UserError("--overlay and --baseline are about the branch: name one with --branch=DIR")
        config.branch, config.losses = None, {}
        config.optimizer.groups = (("backbone/", None),)
    if options.checkpoint:
        use_checkpoint(config, options.checkpoint)
    config.batch_size, config.accumulation = 0, 1  # divides over any mesh; what is sampled is checked below
    run = experiment.build(config, jax.local_devices())  # each process of a job samples its own share
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    batch = options.batch or ways
    rows = batch * (2 if config.samples.guidance > 1 else 1)
    if rows % ways:
        raise UserError(
            f"--batch={batch} is {rows} rows with those of guidance, which do not divide over "
            f"data x fsdp = {ways}: name another --batch or fix config.mesh"
        )
    references = experiment.check_params(run, options.branch)
    codec = encoders.load_codec(config, run.mesh)
    encoder = encoders.load_text_encoder(config, encoders.default_cache())
    latent_shape = codec.latent_shape(config.data.frames, config.data.height, config.data.width)
    grid = experiment.token_grid(run, latent_shape)
    for name, part in (("codec", codec), ("text_encoder", encoder)):
        if hasattr(part, "sha256"):
            references[f"{name}_sha256"] = part.sha256

    models = {"": (run.model, options.scale if options.branch else 0.0)}
    if options.baseline:
        models["_baseline"] = (dataclasses.replace(run.model, branch=None), 0.0)
    generators = {suffix: make_generator(model, config) for suffix, (model, _) in models.items()}
    clips = [
        {"file": f"{index:04d}{suffix}.mp4", "prompt": prompt, "seed": options.seed, "scale": scale}
        for index, prompt in enumerate(prompts)
        for suffix, (_, scale) in models.items()
    ]
    own = experiment.config_as_json(config)
    settings = {key: own[key] for key in ("backbone", "branch", "codec", "text_encoder", "samples")}
    settings["data"] = {key: own["data"][key] for key in ("height", "width", "frames", "fps")}
    process, processes = jax.process_index(), jax.process_count()
    with distributed.all_or_none():
        if process == 0:
            claim_folder(options.out, settings | references, clips)
    with distributed.all_or_none():
        distributed.wait_for_file(os.path.join(options.out, "manifest.json"))

    # 2. The prompts. The encoder is freed before the backbone is read, so that they need not both fit.
    for prompt in prompts:
        if lost := encoder.words_lost(prompt):
            words = " ".join(prompt.split()[-lost:])
            print(f"warning: no room for the last {lost} words of a prompt, lost: {words}", file=sys.stderr)
    text, text_mask = encoder([*prompts, config.samples.negative_prompt])
    negative = {"text": text[-1], "text_mask": text_mask[-1]}
    del encoder

    # 3. The clips, a batch at a time. A batch with a missing file is made again, from the same noise.
    def files(index: int, suffix: str) -> list[str]:
        endings = [".mp4", "_routing.mp4"] if options.overlay and not suffix else [".mp4"]
        return [os.path.join(options.out, f"{index:04d}{suffix}{ending}") for ending in endings]

    batches = np.split(np.arange(len(prompts)), range(batch, len(prompts), batch))
    share = [(indices, suffix) for indices in batches for suffix in models][process::processes]
    work = [
        (indices, suffix)
        for indices, suffix in share
        if not all(os.path.exists(path) for index in indices for path in files(index, suffix))
    ]
    made = sum(len(indices) for indices, _ in work)
    params = experiment.load_params(run, branch=options.branch) if work else {}
    localise = make_localiser(run.model, run.objective)
    with jax.set_mesh(run.mesh), tqdm(total=made * config.samples.steps, unit="step") as bar:
        for indices, suffix in work:
            rows = np.minimum(np.arange(indices[0], indices[0] + batch), indices[-1])  # the last fills up
            noise = np.asarray(make_noise(options.seed, rows, latent_shape))
            inputs = {"noise": noise, "text": text[rows], "text_mask": text_mask[rows]}
            inputs = parallel.put_batch(inputs, run.mesh)
            latents = generators[suffix](
                params,
                **inputs,
                negative=negative,
                scale=models[suffix][1],
                after_steps=lambda steps, indices=indices: bar.update(steps * len(indices)),
            )
            frames = codec.decode(np.asarray(latents)[: len(indices)])
            if options.overlay and not suffix:
                maps = np.asarray(localise(params, latents, inputs["text"], inputs["text_mask"]))
            for row, index in enumerate(indices):
                path, *overlay = files(index, suffix)
                video.write_mp4(path, frames[row], config.data.fps)
                for path in overlay:
                    shown = visualize.overlay_strongest(frames[row], maps[row], grid)
                    video.write_mp4(path, shown, config.data.fps)
    here = sum(len(indices) for indices, _ in share)
    whose = f", process {process} of {processes}" if processes > 1 else ""
    print(f"{here} clips in {options.out}, {here - made} of them from before{whose}")


if __name__ == "__main__":
    from absl import flags

    from prophy_jax.run import cli

    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
    flags.DEFINE_string("prompts", None, "A file with one prompt a line.")
    flags.DEFINE_string("checkpoint", None, "Folder of converted weights, or of backbone parameters.")
    flags.DEFINE_string("branch", None, "Branch parameters of a run; without it, the backbone alone.")
    flags.DEFINE_string("out", "samples", "Folder for the clips.")
    flags.DEFINE_float("scale", 1.0, "Strength of the branch's hints.")
    flags.DEFINE_integer("seed", 0, "Of the noise; prompt i of a run has its own noise.")
    flags.DEFINE_integer("batch", None, "Prompts sampled at a time; default: one per device.", lower_bound=1)
    flags.DEFINE_bool("baseline", False, "Also sample the backbone alone, from the same noise.")
    flags.DEFINE_bool("overlay", False, "Also write each clip with its token routing laid over it.")
    cli.run(main, __doc__, distributed=True)
