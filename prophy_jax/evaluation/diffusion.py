"""The diffusion loss of held-out clips at fixed noise, with the parts next to the backbone and without.

B batch, M clips, S noise levels, T h w latent grid.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax.run import parallel

SIGMAS = (0.2, 0.5, 0.8)  # shares of noise, see `diffusion.flow`; headline numbers are of the first


def make_measure(run, keep: Mapping[str, Callable[[Any, Any], dict[str, jax.Array]]]):
    """A function that passes a batch of clips through the model at every noise level.

    Args:
        run: The model, its objective and the mesh.
        keep: For each part what to keep of a pass, from what its routers said at step 0 and say now.

    Returns:
        measure(before, after, batch, size), from the parameters of step 0 and those of now. It gives NumPy
        arrays of the clips of the batch: those of the batch, their noise (B, T, h, w, 16), loss (B, S), and
        where the model has parts, loss_without (B, S) and a dict of each part's arrays (B, S, ...).
    """
    from prophy_jax import sample

    model, objective = run.model, run.objective

    @jax.jit
    def look(before, after, batch, noise):
        def at(sigma):
            time = jnp.full((noise.shape[0],), sigma)
            noisy = objective.add_noise(batch["latents"], noise, time)
            inputs = noisy, objective.model_time(time), batch["text"], batch["text_mask"]

            def loss(velocity):
                return objective.per_sample_loss(velocity, batch["latents"], noise, time)

            output, output_before = model(after, *inputs), model(before, *inputs)
            found = {"loss": loss(output.velocity)}
            found["loss_without"] = loss(model(after, *inputs, scale=0.0).velocity)
            kept = {part: own(output_before.routing, output.routing) for part, own in keep.items()}
            return found | kept

        found = jax.lax.map(at, jnp.float32(SIGMAS))  # (S, B, ...)
        return jax.tree.map(lambda value: value.swapaxes(0, 1), found)  # (B, S, ...)

    def measure(before, after, batch, size) -> dict[str, Any]:
        count = len(batch["id"])
        rows = np.minimum(np.arange(size), count - 1)  # the last clip fills up a smaller batch
        batch = parallel.full_precision(batch)
        inputs = {name: batch[name][rows] for name in ("latents", "text", "text_mask")}
        noise = sample.make_noise(run.config.seed, batch["index"], inputs["latents"].shape[1:])
        noise = np.asarray(noise)
        inputs = parallel.put_batch(inputs | {"noise": noise[rows]}, run.mesh)
        found = jax.device_get(look(before, after, inputs, inputs["noise"]))
        return batch | {"noise": noise} | jax.tree.map(lambda value: value[:count], found)

    return measure


def compare(loss: np.ndarray, without: np.ndarray) -> list[dict[str, Any]]:
    """Mean losses, their ratio and the paired difference, for each noise level and, last, over all of them.

    Args:
        loss: (M, S) of each clip.
        without: (M, S) of the backbone alone. Differences are paired by clip: the noise is the same.
    """
    rows = []
    for name, columns in [(s, [i]) for i, s in enumerate(SIGMAS)] + [("all", slice(None))]:
        a, b = loss[:, columns].mean(1), without[:, columns].mean(1)  # (M,)
        error = (a - b).std(ddof=1) / len(a) ** 0.5 if len(a) > 1 else float("nan")
        rows.append(
            {
                "sigma": name,
                "loss": float(a.mean()),
                "loss_without": float(b.mean()),
                "ratio": float(a.mean() / b.mean()),
                "difference": float((a - b).mean()),
                "standard_error": float(error),
            }
        )
    return rows


def no_worse(row: Mapping[str, Any]) -> bool:
    """Whether the loss is above the one without by no more than chance explains: two standard errors."""
    return row["difference"] <= 2 * (row["standard_error"] or 0)
