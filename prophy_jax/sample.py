"""Samples videos from prompts, with the physical branch or with the backbone alone.

    python -m prophy_jax.sample --config=configs/wan.py:demo --branch=runs/demo/branch \
        --prompt="on the left a red ball bounces" --out=samples/demo
    ... --prompts=FILE        one prompt a line
    ... --baseline            also the backbone alone, from the same noise
    ... --overlay             also each clip with the token routing laid over it

Solver, steps, shift and guidance are those of `config.samples`; override them as --config.samples.KEY.

B prompts, F H W video, T h w latent grid, N video tokens.
"""

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax import models
from prophy_jax.diffusion import solvers
from prophy_jax.errors import UserError
from prophy_jax.models.physics import ProPhy


def make_generator(model: ProPhy, config) -> Callable[..., jax.Array]:
    """generate(params, noise, text, text_mask, empty, scale, after_step) -> latents (B, T, h, w, 16).

    One compiled solver step, called `config.samples.steps` times. `empty` is the encoded empty prompt,
    {"text" (L, D), "text_mask" (L,)}, that guidance compares with.
    """
    settings = config.samples
    solver = solvers.solver(settings.solver, settings.steps, settings.shift)

    @jax.jit
    def advance(params, row, state, prompt, unprompted, scale):
        def predict(x, t, condition):
            return model(params, x, t, *condition, scale=scale).velocity

        velocity = solvers.guided(predict, prompt, unprompted, float(settings.guidance))
        return solvers.step(row, state, velocity)

    def generate(params, noise, text, text_mask, empty, scale=1.0, after_step=lambda: None):
        state = solvers.start(noise)
        unprompted = (
            jnp.broadcast_to(empty["text"], text.shape),
            jnp.broadcast_to(empty["text_mask"], text_mask.shape),
        )
        for i in range(solver.num_steps):
            row = jax.tree.map(lambda table, i=i: jnp.asarray(table[i]), solver.steps)
            prompt = (jnp.asarray(text), jnp.asarray(text_mask))
            state = advance(params, row, state, prompt, unprompted, jnp.float32(scale))
            after_step()
        return state.x

    return generate


def make_noise(seed: int, indices: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise (B, *shape). Row i depends on the seed and indices[i] alone."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(indices))
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def make_localiser(model: ProPhy, objective, sigma: float = 0.2) -> Callable[..., jax.Array]:
    """localise(params, latents, text, text_mask, seed) -> P'_r (B, N, 17) of clean latents.

    The routers read noisy latents: noise is added at `sigma`.
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
    """write(params, path): one mp4, the first validation prompts sampled above the real clips."""
    from prophy_jax.data import loader, video

    config = run.config
    batch = next(
        loader.make_loader(config.data.dir, "val", config.samples.clips, 0, shuffle=False, repeat=False)
    )
    noise = make_noise(config.seed, batch["index"], batch["latents"].shape[1:])
    text, text_mask = loader.load_empty_text(config.data.dir)
    empty = {"text": text, "text_mask": text_mask}
    generate = make_generator(run.model, config)
    codec = models.build(config.codec)

    def side_by_side(clips) -> np.ndarray:
        return np.concatenate([codec.decode(clip) for clip in np.asarray(clips)], axis=2)

    def write(params, path: str) -> None:
        latents = generate(params, noise, batch["text"], batch["text_mask"], empty)
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


def main(config) -> None:
    from absl import flags
    from tqdm import tqdm

    from prophy_jax import experiment, visualize
    from prophy_jax.data import video

    options = flags.FLAGS
    prompts = read_prompts(options.prompt, options.prompts)
    if not options.branch and options.overlay:
        raise UserError("--overlay shows the branch's routing: name a branch with --branch=DIR")
    if not options.branch:
        config.branch, config.losses = None, {}
        config.optimizer.groups = (("backbone/", None),)
    config.batch_size, config.accumulation = options.batch, 1
    run = experiment.build(config)
    params = experiment.load_params(run, options.checkpoint, options.branch)
    codec = models.build(config.codec)
    encoder = models.build(config.text_encoder)
    latent_shape = codec.latent_shape(config.data.frames, config.data.height, config.data.width)
    empty_text, empty_mask = encoder([""])
    empty = {"text": empty_text[0], "text_mask": empty_mask[0]}
    generate = make_generator(run.model, config)
    localise = make_localiser(run.model, run.objective)
    os.makedirs(options.out, exist_ok=True)

    scales = {"": options.scale} | ({"_baseline": 0.0} if options.baseline else {})
    with jax.set_mesh(run.mesh):
        bar = tqdm(total=len(prompts) * len(scales) * config.samples.steps, unit="step")
        for first in range(0, len(prompts), options.batch):
            chunk = prompts[first : first + options.batch]
            text, text_mask = encoder(chunk)
            indices = np.arange(first, first + len(chunk))
            for suffix, scale in scales.items():
                noise = make_noise(options.seed, indices, latent_shape)

                latents = generate(
                    params, noise, text, text_mask, empty, scale, functools.partial(bar.update, len(chunk))
                )
                maps = None
                if options.overlay and scale:
                    maps = np.asarray(localise(params, latents, text, text_mask))
                for row, (index, clip) in enumerate(zip(indices, np.asarray(latents), strict=True)):
                    frames = codec.decode(clip)
                    path = os.path.join(options.out, f"{index:04d}{suffix}")
                    video.write_mp4(path + ".mp4", frames, config.data.fps)
                    if maps is not None:
                        grid = run.model.backbone.grid(latent_shape)
                        shown = visualize.overlay_strongest(frames, maps[row], grid)
                        video.write_mp4(path + "_routing.mp4", shown, config.data.fps)
        bar.close()
    print(f"{len(prompts) * len(scales)} clips in {options.out}")


if __name__ == "__main__":
    from absl import flags

    from prophy_jax import cli

    flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
    flags.DEFINE_string("prompts", None, "A file with one prompt a line.")
    flags.DEFINE_string("checkpoint", None, "Backbone parameters; default config.backbone_params.")
    flags.DEFINE_string("branch", None, "Branch parameters of a run; without it, the backbone alone.")
    flags.DEFINE_string("out", "samples", "Folder for the clips.")
    flags.DEFINE_float("scale", 1.0, "Strength of the branch's hints.")
    flags.DEFINE_integer("seed", 0, "Of the noise; prompt i of a run has its own noise.")
    flags.DEFINE_integer("batch", 4, "Prompts sampled at a time.", lower_bound=1)
    flags.DEFINE_bool("baseline", False, "Also sample the backbone alone, from the same noise.")
    flags.DEFINE_bool("overlay", False, "Also write each clip with its token routing laid over it.")
    cli.run(main, __doc__)
