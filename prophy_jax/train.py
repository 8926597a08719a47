"""Trains a backbone, or the physical branch beside a frozen one, as its configuration says.

    python -m prophy_jax.train --config=configs/wan.py[:variant] --workdir=DIR [--config.KEY=VALUE ...]

Run the same command again to resume: WORKDIR holds the checkpoints (trainable parameters, EMA, optimizer,
data position), metrics.jsonl, TensorBoard events, sample clips and, at the end, the parameters to use.
SIGTERM saves and exits; a loss that is not finite stops the run with the step and the clips named.

B global batch, A microbatches per step, T h w latent grid, N video tokens, L text length, D text width.
"""

import contextlib
import functools
import math
import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from prophy_jax import losses
from prophy_jax.models.beside.prophy import ProPhy
from prophy_jax.run import optim, parallel
from prophy_jax.run.errors import UserError

Batch = Mapping[str, jax.Array]  # see `prophy_jax.data.loader`
MODEL_INPUTS = ("latents", "text", "text_mask", "category", "alignment", "alignment_present")


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. Trees of the trainable parameters alone, fp32."""

    step: jax.Array  # () int32, steps done
    params: Any
    ema: Any
    optimizer: Any
    bad_step: jax.Array  # () int32, first step whose loss or gradient was not finite, -1 if none


# --- The objective ---------------------------------------------------------------------------------


def draw_inputs(key, objective, batch: Batch, empty: Batch, caption_dropout: float) -> Batch:
    """Adds what is random in a step, for the whole batch: noise, time, and which captions are dropped."""
    noise_key, time_key, drop_key = jax.random.split(key, 3)
    size = batch["latents"].shape[0]
    dropped = jax.random.bernoulli(drop_key, caption_dropout, (size, 1))  # (B, 1)
    return dict(batch) | {
        "noise": jax.random.normal(noise_key, batch["latents"].shape),
        "time": objective.sample_time(time_key, size),
        "input_text": jnp.where(dropped[..., None], empty["text"], batch["text"]),
        "input_text_mask": jnp.where(dropped, empty["text_mask"], batch["text_mask"]),
    }


def coarse_losses(model: ProPhy, params, batch: Batch, config) -> dict[str, jax.Array]:
    """The losses that compare clips with each other. They read the text alone, captions never dropped."""
    terms = {}
    if set(config.losses) & set(losses.COARSE):
        logits = model.semantic_logits(params, batch["text"], batch["text_mask"])
        if "relative" in config.losses:
            reduction = config.reduction.relative
            terms["relative"] = losses.relative(logits, batch["category"], reduction)
        if "bce" in config.losses:
            terms["bce"] = losses.bce(logits, batch["category"])
    return terms


def alignment_masks(batch: Batch, config) -> dict[str, jax.Array]:
    """The entries (B, N, E_a) that each alignment loss of the configuration looks at."""
    return {
        name: losses.alignment_mask(
            batch["alignment"], batch["alignment_present"], positive=name == "alignment"
        )
        for name in ("alignment", "absolute_alignment")
        if name in config.losses
    }


def token_losses(model: ProPhy, objective, params, batch: Batch, counts, config):
    """The losses that need a forward pass, and router statistics, of one microbatch.

    `counts` are the sizes of the alignment masks over the whole batch: what this microbatch contributes
    is its share of a sum over all of them.
    """
    output = model(
        params,
        objective.add_noise(batch["latents"], batch["noise"], batch["time"]),
        objective.model_time(batch["time"]),
        batch["input_text"],
        batch["input_text_mask"],
    )
    per_clip = objective.per_sample_loss(output.velocity, batch["latents"], batch["noise"], batch["time"])
    share = 1 / config.accumulation
    terms, statistics = {"diffusion": share * per_clip.mean()}, {}
    routing = output.routing
    if routing.semantic_logits is not None:
        rho = jax.nn.softmax(routing.semantic_logits)
        statistics |= losses.router_statistics("semantic", rho)
    if routing.refinement is not None:
        top_k = model.branch.refinement.top_k
        for name, mask in alignment_masks(batch, config).items():
            terms[name] = losses.alignment(routing.alignment, batch["alignment"], mask, counts[name])
        if "balance" in config.losses:
            terms["balance"] = share * losses.balance(routing.refinement, top_k)
        statistics |= losses.router_statistics("refinement", routing.refinement, top_k)
    return terms, {name: share * value for name, value in statistics.items()}


# --- One step --------------------------------------------------------------------------------------


def make_train_step(model: ProPhy, objective, optimizer: optax.GradientTransformation, config):
    """step(state, frozen, empty_text, batch) -> (state, metrics). Frozen parameters get no gradient."""

    def weighted(terms: Mapping[str, jax.Array]) -> jax.Array:
        return sum(config.losses.get(name, 1.0) * value for name, value in terms.items())

    @functools.partial(jax.grad, has_aux=True)
    def coarse_gradient(trainable, frozen, batch):
        params = optim.merge(parallel.gathered(trainable), frozen)
        terms = coarse_losses(model, params, batch, config)
        return jnp.float32(weighted(terms)), terms

    @functools.partial(jax.grad, has_aux=True)
    def token_gradient(trainable, frozen, batch, counts):
        params = optim.merge(parallel.gathered(trainable), frozen)
        terms, statistics = token_losses(model, objective, params, batch, counts, config)
        return weighted(terms), (terms, statistics)

    def step(state: TrainState, frozen, empty, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch = draw_inputs(key, objective, parallel.full_precision(batch), empty, config.caption_dropout)
        counts = {
            name: jnp.float32(mask.sum() if config.reduction.alignment == "mean" else 1)
            for name, mask in alignment_masks(batch, config).items()
        }

        def one(microbatch):
            return token_gradient(state.params, frozen, microbatch, counts)

        if config.accumulation == 1:
            gradient, (terms, statistics) = one(batch)
        else:
            microbatches = split_microbatches(batch, config.accumulation)
            first = jax.tree.map(lambda x: x[0], microbatches)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, first))
            (gradient, (terms, statistics)), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None),
                zeros,
                microbatches,
            )
        coarse, coarse_terms = coarse_gradient(state.params, frozen, batch)
        gradient = jax.tree.map(jnp.add, gradient, coarse)

        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = config.optimizer.ema
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)

        terms |= coarse_terms
        total, norm = weighted(terms), optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
        metrics = {"loss/total": total, "gradient/all": norm}
        metrics |= {f"loss/{name}": value for name, value in terms.items()}
        metrics |= {f"gradient/{name}": value for name, value in optim.group_norms(gradient).items()}
        metrics |= {f"router/{name}": value for name, value in statistics.items()}
        return TrainState(state.step + 1, params, ema, optimizer_state, bad_step), metrics

    return step


def split_microbatches(batch: Batch, parts: int) -> Batch:
    """(B, ...) -> (A, B/A, ...). Rows are strided, so that each device keeps its own rows."""
    return {
        name: value.reshape(-1, parts, *value.shape[1:]).swapaxes(0, 1)  # via (B/A, A, ...)
        for name, value in batch.items()
    }


# --- The run ---------------------------------------------------------------------------------------


def train(config, workdir: str) -> None:
    """Trains from the configuration, or resumes WORKDIR. Raises UserError on bad input."""
    from tqdm import tqdm  # Here and below: the step above needs none of these.

    from prophy_jax import experiment, sample
    from prophy_jax.data import loader
    from prophy_jax.run import checkpoints, distributed, metrics

    # 1. What to train, on what. Everything that can be wrong, on any host, is found before the workdir is
    # touched.
    run = experiment.build(config)
    mesh, model = run.mesh, run.model
    references = {}

    def place(batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Batch]:
        inputs = {name: batch[name] for name in MODEL_INPUTS}
        return batch["id"], parallel.put_batch(inputs, mesh, config.batch_size)

    with distributed.all_or_none():
        if config.backbone_params:
            manifest = checkpoints.check_params(
                config.backbone_params, experiment.abstract_params(run)["backbone"], config.backbone_remedy
            )
            references["backbone_sha256"] = manifest["sha256"]
        experiment.check_data(run)
        data = loader.make_loader(
            config.data.dir,
            "train",
            config.batch_size,
            config.seed,
            rows=parallel.local_rows(mesh, config.batch_size),
            labels=config.data.labels,
            place=place,  # ahead of the step that needs it
        )
        text, text_mask = loader.load_empty_text(config.data.dir)
    empty = {"text": text, "text_mask": text_mask}

    with jax.set_mesh(mesh):
        # 2. Parameters, optimizer, state; all laid out on the mesh.
        trainable, frozen = experiment.init_params(run)
        adam = {name: value for name, value in config.optimizer.items() if name != "ema"}
        optimizer = optim.make_optimizer(trainable, steps=config.steps, **adam)
        state = place_state(trainable, optimizer, mesh)
        del trainable
        first = distributed.is_first()  # the one that prints and writes
        with distributed.all_or_none():
            if first:
                experiment.claim_workdir(workdir, config, references)
        with distributed.all_or_none():
            distributed.wait_for_file(os.path.join(workdir, "config.json"))

        # 3. Where a former run of this workdir stopped.
        saved = checkpoints.TrainCheckpoints(workdir, config.checkpoint.keep)
        first_step = saved.latest() or 0
        if first_step:
            state = saved.restore(first_step, jax.tree.map(checkpoints.abstract, state), data)
        writer = metrics.MetricsWriter(workdir, first_step) if first else None

        # 4. Compiled functions.
        train_step = jax.jit(
            make_train_step(model, run.objective, optimizer, config),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), parallel.replicated(mesh)),
        )
        validate = make_validation(run)
        write_clips = sample.make_validation_clips(run)

        # 5. The loop. The state and the data position are saved together, before the data advances.
        if first_step == 0:
            values = validate(optim.merge(state.ema, frozen))
            if writer:
                writer.write(0, values)
        stop = _StopSignal(first_step)
        recent_ids: deque = deque(maxlen=config.log.every)
        window = _Window(first_step)
        bar = tqdm(total=config.steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not first)
        step, stopping = first_step, False
        while step < config.steps and not stopping:
            with window.waiting():
                ids, inputs = next(data)
            recent_ids.append((step, ids))
            state, values = train_step(state, frozen, empty, inputs)
            step += 1
            tokens = math.prod(model.backbone.grid(inputs["latents"].shape[1:]))
            window.count(config.batch_size * tokens, config.batch_size * model.train_flops(tokens))
            bar.update()

            stopping = stop.requested(step)
            last = step == config.steps or stopping
            due = {
                name: last or step % config[name].every == 0
                for name in ("log", "validation", "samples", "checkpoint")
            }
            if not any(due.values()):
                continue
            values = {name: float(value) for name, value in jax.device_get(values).items()}
            _stop_if_not_finite(int(state.bad_step), recent_ids, saved)
            values |= window.close(step)
            bar.set_postfix_str(f"loss {values['loss/total']:.4f}", refresh=False)
            if due["validation"]:
                values |= validate(optim.merge(state.ema, frozen))
            if due["samples"]:
                path = os.path.join(workdir, "samples", f"step_{step:07d}.mp4")
                write_clips(optim.merge(state.ema, frozen), path)
            if writer:
                writer.write(step, values)
            if due["checkpoint"]:
                saved.save(step, state, data, experiment.config_as_json(config))
            window.open(step)

        # 6. What remains: the last checkpoint, and the parameters to sample with.
        data.close()
        saved.close()
        bar.close()
        if writer:
            writer.close()
        if step < config.steps:
            if first:
                print(f"stopped by a signal, saved at step {step}: run the same command to go on")
            return
        own = experiment.config_as_json(config)
        parts = {"backbone": own["backbone"], "branch": {key: own[key] for key in ("backbone", "branch")}}
        for part, tree in state.ema.items():
            about = {"part": part, "model": parts[part], "step": step, **references}
            checkpoints.save_params(os.path.join(workdir, part), tree, about)


def new_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 of these trainable parameters."""
    none = jnp.int32(-1)
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params), none)


def place_state(params: Any, optimizer: optax.GradientTransformation, mesh) -> TrainState:
    """Step 0 on the mesh: large leaves over fsdp, the rest on every device."""
    create = functools.partial(new_state, optimizer=optimizer)
    layout = parallel.shard_largest(jax.eval_shape(create, params), mesh)
    return jax.jit(create, out_shardings=layout)(params)


def make_validation(run):
    """validate(params) -> mean diffusion loss on validation clips, at fixed times and fixed noise."""
    from prophy_jax.data import loader

    config, model, objective = run.config, run.model, run.objective
    times = tuple(config.validation.times)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(run.mesh))
    def losses_at(params, batch):
        batch = parallel.full_precision(batch)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(config.seed), i))(batch["index"])
        noise = jax.vmap(lambda key: jax.random.normal(key, batch["latents"].shape[1:]))(keys)

        def at(sigma):
            time = jnp.full((batch["latents"].shape[0],), sigma)
            noisy = objective.add_noise(batch["latents"], noise, time)
            output = model(params, noisy, objective.model_time(time), batch["text"], batch["text_mask"])
            return objective.per_sample_loss(output.velocity, batch["latents"], noise, time).mean()

        return jax.lax.map(at, jnp.float32(times))  # (len(times),)

    def validate(params) -> dict[str, float]:
        batches = loader.make_loader(
            config.data.dir, "val", config.validation.batch_size, 0, shuffle=False, repeat=False
        )
        results = []
        for _, batch in zip(range(config.validation.batches), batches, strict=False):
            inputs = {name: batch[name] for name in ("latents", "text", "text_mask", "index")}
            results.append(jax.device_get(losses_at(params, parallel.put_batch(inputs, run.mesh))))
        mean = np.mean(results, axis=0)
        values = {f"validation/sigma_{t:g}": float(v) for t, v in zip(times, mean, strict=True)}
        return values | {"validation/loss": float(mean.mean())}

    return validate


class _Window:
    """Wall time between two looks at the metrics, so that no other step waits for the device."""

    def __init__(self, step: int):
        self.open(step)

    def open(self, step: int) -> None:
        self._step, self._start, self._wait = step, time.perf_counter(), 0.0
        self._tokens = self._flops = 0

    @contextlib.contextmanager
    def waiting(self):
        before = time.perf_counter()
        yield
        self._wait += time.perf_counter() - before

    def count(self, tokens: int, flops: int) -> None:
        self._tokens, self._flops = self._tokens + tokens, self._flops + flops

    def close(self, step: int) -> dict[str, float]:
        steps, seconds = step - self._step, time.perf_counter() - self._start
        return {
            "time/step_s": seconds / steps,
            "time/data_wait_s": self._wait / steps,
            "speed/tokens_per_s": self._tokens / seconds,
            "speed/model_tflop_per_s": self._flops / seconds / 1e12,
        }


class _StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save between two steps, on every process at the same."""

    def __init__(self, first_step: int):
        self._noted, self._first_step, self._alone = False, first_step, jax.process_count() == 1
        signal.signal(signal.SIGINT, self._note)
        if self._alone:  # otherwise JAX has its own handler, which tells the other processes
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_):
        self._noted = True
        if not self._alone:
            signal.raise_signal(signal.SIGTERM)

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`. To be asked after every step: so processes agree on a later one."""
        if self._alone:
            return self._noted
        # Counted from the start of this process: a signal that came before it stops at the first.
        return multihost_utils.reached_preemption_sync_point(step - self._first_step)


def _stop_if_not_finite(bad_step: int, recent_ids, saved) -> None:
    if bad_step < 0:
        return
    saved.close()
    ids = next((", ".join(ids) for step, ids in recent_ids if step == bad_step), "unknown")
    latest = saved.latest()
    raise UserError(
        f"the loss was not finite at step {bad_step + 1}, clips {ids}; last good checkpoint: "
        f"{os.path.join(saved.folder, str(latest)) if latest else 'none yet'}. "
        "Lower the learning rates or fix these clips, then run again to resume from it"
    )


def main(config) -> None:
    if not flags.FLAGS.workdir:
        raise UserError("name a folder for the run: --workdir=DIR")
    train(config, flags.FLAGS.workdir)


if __name__ == "__main__":
    from absl import flags

    from prophy_jax.run import cli

    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.")
    cli.run(main, __doc__, distributed=True)
