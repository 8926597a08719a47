"""The diffusion loss of held-out clips at fixed noise, with the parts next to the backbone and without.

B batch, M clips, S noise levels, T h w latent grid.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax.diffusion import generate
from prophy_jax.models.beside.part import Model
from prophy_jax.run import parallel

SIGMAS = (0.2, 0.5, 0.8)  # shares of noise, see `diffusion.flow`; headline numbers are of the first


def make_measure(
    model: Model,
    objective: Any,
    mesh: jax.sharding.Mesh,
    seed: int,
    keep: Mapping[str, Callable[[Any, Any], dict[str, jax.Array]]],
) -> Callable[..., dict[str, Any]]:
    """A function that passes a batch of clips through the model at every noise level.

    Args:
        model: The backbone and its parts.
        objective: What it was trained with.
        mesh: Its devices.
        seed: Of the noise.
        keep: By part, what to keep of what it saw at step 0 and sees now; see `prophy_jax.evaluation`.

    Returns:
        measure(before, after, batch, size), of the parameters of step 0, needed where there is something to
        keep, those of now, and a batch that is filled up to `size` clips. It returns NumPy arrays of the
        clips of the batch: those of the batch; noise (B, T, h, w, 16); loss (B, S); if the model has parts,
        loss_without (B, S); and by part what is kept, (B, S, ...).
    """

    @jax.jit
    def look(before, after, batch, noise):
        def at(sigma):
            def run(model, params):
                return generate.diffusion_error(model, objective, params, batch, noise, sigma)

            loss, seen = run(model, after)
            found = {"loss": loss}
            if model.parts:
                found["loss_without"], _ = run(model.without(), after)
            if keep:
                _, seen_before = run(model, before)
                found |= {name: own(seen_before[name], seen[name]) for name, own in keep.items()}
            return found

        found = jax.lax.map(at, jnp.float32(SIGMAS))  # (S, B, ...)
        return jax.tree.map(lambda value: value.swapaxes(0, 1), found)  # (B, S, ...)

    def measure(before, after, batch, size) -> dict[str, Any]:
        count = len(batch["id"])
        rows = np.minimum(np.arange(size), count - 1)  # the last clip fills up a smaller batch
        batch = parallel.full_precision(batch)
        inputs = {name: batch[name][rows] for name in ("latents", *model.fields)}
        noise = np.asarray(generate.make_noise(seed, batch["index"], inputs["latents"].shape[1:]))
        inputs = parallel.put_batch(inputs | {"noise": noise[rows]}, mesh)
        found = jax.device_get(look(before, after, inputs, inputs["noise"]))
        return batch | {"noise": noise} | jax.tree.map(lambda value: value[:count], found)

    return measure


def compare(loss: np.ndarray, without: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Mean losses for each noise level and, last, over all of them.

    Args:
        loss: (M, S) of each clip.
        without: (M, S) of the backbone alone, if there is more.

    Returns:
        Rows of sigma and loss, and of loss_without, the ratio and the difference of both, and its standard
        error. Differences are paired by clip: the noise is the same.
    """
    rows = []
    for name, columns in [(s, [i]) for i, s in enumerate(SIGMAS)] + [("all", slice(None))]:
        a = loss[:, columns].mean(1)  # (M,)
        rows.append({"sigma": name, "loss": float(a.mean())})
        if without is not None:
            b = without[:, columns].mean(1)  # (M,)
            error = (a - b).std(ddof=1) / len(a) ** 0.5 if len(a) > 1 else float("nan")
            rows[-1] |= {
                "loss_without": float(b.mean()),
                "ratio": float(a.mean() / b.mean()),
                "difference": float((a - b).mean()),
                "standard_error": float(error),
            }
    return rows


def no_worse(row: Mapping[str, Any]) -> bool | str:
    """Whether the loss is above the one without by no more than chance explains: two standard errors.

    "not measured" where there is no standard error: of one clip.
    """
    error = row["standard_error"]
    return "not measured" if error is None or np.isnan(error) else row["difference"] <= 2 * error
