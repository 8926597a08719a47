"""Trains a backbone, or parts next to a frozen one, as its configuration says.

    python -m prophy_jax.train --config=configs/wan.py[:variant] --workdir=DIR [--config.KEY=VALUE ...]

Run the same command again to resume: WORKDIR holds the checkpoints (trainable parameters, EMA, optimizer,
data position), metrics.jsonl, TensorBoard events, sample clips and, at the end, the parameters to use.
A signal to stop (SIGTERM, Ctrl-C, ...) saves and exits with status 75; a loss that is not finite stops the
run with the step and the clips named.

B global batch, A microbatches per step, T h w latent grid, N video tokens, L text length, D text width.
"""

import contextlib
import functools
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from prophy_jax import losses
from prophy_jax.models.beside.part import Model
from prophy_jax.run import optim, parallel
from prophy_jax.run.errors import UserError

Batch = Mapping[str, jax.Array]  # arrays of `prophy_jax.data.batch`, leading B


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. Trees of the trainable parameters alone, fp32."""

    step: jax.Array  # () int32, steps done
    params: Any
    ema: Any
    optimizer: Any
    bad_step: jax.Array  # () int32, first step whose loss, gradient or result was not finite, -1 if none


# --- One step --------------------------------------------------------------------------------------


def draw_inputs(key: jax.Array, objective: Any, batch: Batch, empty: Batch, caption_dropout: float) -> Batch:
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


def forward(
    model: Model, objective: Any, chosen: losses.Chosen, params: Any, batch: Batch, counts: Mapping, key: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What the forward pass of one microbatch adds to each loss, and to what is logged besides.

    `counts` are what the losses are divided by over the whole batch: what this microbatch gives is its share.
    """
    noisy = objective.add_noise(batch["latents"], batch["noise"], batch["time"])
    prompt = dict(batch) | {"text": batch["input_text"], "text_mask": batch["input_text_mask"]}
    inputs = noisy, objective.model_time(batch["time"]), prompt
    output = model(params, *inputs, key=key)
    reference = jax.lax.stop_gradient(model.without()(params, *inputs)) if chosen.reference else None
    error = objective.per_sample_loss(output.prediction, batch["latents"], batch["noise"], batch["time"])
    terms = chosen.share(model, output, reference, error, batch, counts)
    share = len(error) / counts[losses.DIFFUSION]
    found = [part.statistics(output.seen[name]) for name, part in model.parts.items()]
    return terms, {name: share * value for values in found for name, value in values.items()}


def make_train_step(
    model: Model, objective: Any, chosen: losses.Chosen, optimizer: optax.GradientTransformation, config: Any
) -> Callable:
    """step(state, frozen, empty_text, batch) -> (state, metrics). Frozen parameters get no gradient."""

    @functools.partial(jax.grad, has_aux=True)
    def whole_gradient(trainable, frozen, batch):
        params = optim.merge(parallel.gathered(trainable), frozen)
        terms = chosen.whole(model, params, batch)
        return jnp.float32(chosen.total(terms)), terms

    @functools.partial(jax.grad, has_aux=True)
    def forward_gradient(trainable, frozen, batch, counts, key):
        params = optim.merge(parallel.gathered(trainable), frozen)
        terms, statistics = forward(model, objective, chosen, params, batch, counts, key)
        return chosen.total(terms), (terms, statistics)

    def step(state: TrainState, frozen, empty, batch):
        # 1. Noise, times and dropped captions: of the seed and the step alone.
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch = draw_inputs(key, objective, parallel.full_precision(batch), empty, config.caption_dropout)

        # 2. Losses of a forward pass, a microbatch at a time; each gives its share of the whole batch's.
        counts = chosen.counts(batch)
        parts_key = jax.random.fold_in(key, 3)  # 0, 1 and 2 are the three keys of `draw_inputs`

        def one(microbatch, index=0):
            own_key = jax.random.fold_in(parts_key, index)
            return forward_gradient(state.params, frozen, microbatch, counts, own_key)

        if config.accumulation == 1:
            gradient, (terms, statistics) = one(batch)
        else:
            microbatches = split_microbatches(batch, config.accumulation)
            zeros = jax.tree.map(
                jnp.zeros_like, jax.eval_shape(one, jax.tree.map(lambda x: x[0], microbatches))
            )
            (gradient, (terms, statistics)), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, one(*part)), None),
                zeros,
                (microbatches, jnp.arange(config.accumulation)),
            )

        # 3. Losses that compare clips with each other, once over the whole batch.
        whole, whole_terms = whole_gradient(state.params, frozen, batch)
        gradient = jax.tree.map(jnp.add, gradient, whole)

        # 4. The update.
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = config.optimizer.ema
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)

        # 5. What is logged.
        terms |= whole_terms
        total, norm = chosen.total(terms), optax.tree.norm(gradient)
        finite = jnp.isfinite(total) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(params))
        bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
        metrics = {"loss/total": total, "gradient/all": norm}
        metrics |= {f"loss/{name}": value for name, value in terms.items()}
        metrics |= {f"gradient/{name}": value for name, value in optim.group_norms(gradient).items()}
        return TrainState(state.step + 1, params, ema, optimizer_state, bad_step), metrics | statistics

    return step


def split_microbatches(batch: Batch, parts: int) -> Batch:
    """(B, ...) -> (A, B/A, ...). Rows are strided, so that each device keeps its own rows."""
    return {
        name: value.reshape(-1, parts, *value.shape[1:]).swapaxes(0, 1)  # via (B/A, A, ...)
        for name, value in batch.items()
    }


def new_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 of these trainable parameters."""
    none = jnp.int32(-1)
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params), none)


def place_state(params: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Step 0 on the mesh: large leaves over fsdp, the rest on every device."""
    create = functools.partial(new_state, optimizer=optimizer)
    layout = parallel.shard_largest(jax.eval_shape(create, params), mesh)
    return jax.jit(create, out_shardings=layout)(params)


# --- The run ---------------------------------------------------------------------------------------


def train(config: Any, workdir: str, init: Sequence[str] = ()) -> bool:
    """Trains from the configuration, or resumes WORKDIR. Returns whether it is finished, or was stopped.

    A new run begins with the trained parameters in the folders `init`. Raises UserError on bad input.
    """
    from prophy_jax import build  # Here and below: the step above needs none of these.
    from prophy_jax.data import loader, taxonomy
    from prophy_jax.evaluation import validation
    from prophy_jax.plan import flops
    from prophy_jax.run import checkpoints, distributed, goodput, lock, loop, metrics
    from prophy_jax.run import workdir as folders

    # 1. What to train, on what. Everything that can be wrong, on any host, is found before the workdir is
    # touched.
    mesh = build.build_mesh(config.mesh, build.microbatch(config))
    model, objective = build.build_model(config, mesh), build.build_objective(config)
    chosen = build.build_losses(config, model)
    layout = build.place(model, mesh, config.frozen_dtype, optim.groups_of(config.optimizer))
    fields = build.list_fields(model, chosen)
    references = {}

    def place(batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Batch]:
        inputs = {name: batch[name] for name in fields}
        return batch["id"], parallel.put_batch(inputs, mesh, config.batch_size)

    with distributed.all_or_none():
        build.check_backbone(config, layout)
        if config.backbone_params:
            manifest = checkpoints.check_params(
                config.backbone_params,
                layout["backbone"],
                build.remedy(config, "backbone", config.backbone_params),
            )
            references["backbone_sha256"] = manifest["sha256"]
        if distributed.is_first():
            metrics.check_wandb(config.log.get("wandb", ""))
        starts = build.find_starts(config, layout, init)
        for name, folder in starts.items():
            references[f"init_{name}_sha256"] = checkpoints.read_manifest(folder, "")["sha256"]
        manifest = build.check_data(config, model, chosen)
        build.check_validation(config, manifest)
        references |= build.find_references(config, manifest)
        categories = list(taxonomy.of(config).names)
        if distributed.is_first():
            build.warn_of_idle_losses(config, model, chosen)
            optim.warn_of_unused_rates(config.optimizer)
        data = loader.make_loader(
            config.data.dir,
            "train",
            config.batch_size,
            config.seed,
            rows=parallel.local_rows(mesh, config.batch_size),
            side=config.data.side,
            fields=fields,
            place=place,  # ahead of the step that needs it
            weights=config.data.get("weights", ()),
        )
        empty = loader.load_empty_text(config.data.dir)

    with contextlib.ExitStack() as held, jax.set_mesh(mesh):
        # 2. Parameters, optimizer, state; all laid out on the mesh.
        params = build.init_params(config, model, layout)
        params |= build.load_params(config, {name: layout[name] for name in starts}, starts)
        trainable, frozen = optim.split(params, optim.groups_of(config.optimizer))
        optimizer = optim.make_optimizer(trainable, config.steps, config.optimizer)
        rates = optim.learning_rates(config.steps, config.optimizer)
        state = place_state(trainable, optimizer, mesh)
        del trainable, params
        first = distributed.is_first()  # the one that prints and writes
        with distributed.all_or_none():
            if first and (changed := folders.claim_run(workdir, config, references, categories)):
                print(f"{workdir} goes on with other settings, noted in its config.json: {changed}")
            if first:
                held.enter_context(lock.held(workdir, "a run of prophy_jax.train"))
        with distributed.all_or_none():
            folders.wait_for_file(os.path.join(workdir, "config.json"))

        # 3. Where a former run of this workdir stopped.
        saved = checkpoints.TrainCheckpoints(workdir, config.checkpoint.keep)
        first_step = saved.latest() or 0
        lines = metrics.read_metrics(workdir) if first else []
        clock = goodput.Goodput(lines, first_step)
        clock.spend("start")
        if first_step:
            state = saved.restore(first_step, jax.tree.map(checkpoints.abstract, state), data)
            clock.spend("restore")
        writer = None
        with distributed.all_or_none():
            if first:
                board = metrics.start_wandb(config.log.get("wandb", ""), workdir, config)
                writer = metrics.MetricsWriter(workdir, first_step, board)
                if lines and first_step < config.steps:
                    writer.write(first_step, clock.values())

        # 4. Compiled functions.
        train_step = jax.jit(
            make_train_step(model, objective, chosen, optimizer, config),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), parallel.replicated(mesh)),
        )
        plain_step = make_train_step(flops.plain(model), objective, chosen, optimizer, config)
        step_flops: dict[int, int] = {}  # by the tokens of a clip

        # 5. Validation and sample clips follow the checkpoint of their step: a signal cuts them short, and a
        # run that resumes makes up for them.
        stop = loop.StopSignal(first_step)
        look = validation.Looks(config, model, objective, mesh, workdir, writer, clock, stop)
        clock.spend("start")
        look.make_up(first_step, optim.merge(state.ema, frozen), lines)

        # 6. The loop. The state and the data position are saved together, before the data advances.
        recent_ids: deque = deque(maxlen=config.log.every or None)
        profile = loop.Profile(workdir, first_step, config.log.get("profile", ()))
        progress = loop.Progress(config.steps, first_step, first)
        window = loop.Window(first_step)
        step, stopping = first_step, False
        while step < config.steps and not stopping:
            with window.waiting():
                ids, inputs = next(data)
            recent_ids.append((step, ids))
            tokens = math.prod(model.backbone.grid(inputs["latents"].shape[1:]))
            new = tokens not in step_flops  # so that it is compiled
            with clock.compiling(window) if new else contextlib.nullcontext():
                state, values = train_step(state, frozen, empty, inputs)
            step += 1
            if new:  # while the device is at work
                step_flops[tokens] = flops.model_flops(plain_step, state, frozen, empty, inputs)
            window.count(config.batch_size * tokens, step_flops[tokens], values["loss/total"])
            progress.advance(step)
            profile.advance(step, values)

            last = step == config.steps
            stopping = stop.requested(step) and not last
            due = {
                name: loop.is_due(step, config[name].every, last or (stopping and always), always)
                for name, always in (("log", 1), ("validation", 0), ("samples", 0), ("checkpoint", 1))
            }
            if not any(due.values()):
                continue
            values = {name: float(value) for name, value in jax.device_get(values).items()}
            loop.stop_if_not_finite(int(state.bad_step), recent_ids, saved)
            values |= window.close(step)
            values |= {f"learning_rate/{name}": float(rate(step - 1)) for name, rate in rates.items()}
            progress.show(step, window.mean_loss, values["time/step_s"])
            clock.spend("train")
            if writer:
                writer.write(step, values | clock.values())
            if due["checkpoint"]:
                saved.save(step, state, data, folders.config_as_json(config))
                clock.spend("save")
            if not stopping:
                look(step, optim.merge(state.ema, frozen), due)
                if stop.noted:
                    saved.save(step, state, data, folders.config_as_json(config))
                    stopping = True
            window.open(step)

        # 7. What remains: the last checkpoint, and the parameters to sample with.
        profile.close()
        data.close()
        saved.close()
        progress.close()
        if not stopping:
            own, trained = folders.config_as_json(config), optim.merge(state.ema, frozen)
            for name in sorted(state.ema, key=lambda name: name != "backbone"):  # parts name their backbone
                about = checkpoints.describe_part(own, name, step, references)
                if name != "backbone":
                    about["categories"] = categories
                digest = checkpoints.save_params(os.path.join(workdir, name), trained[name], about)
                if name == "backbone":
                    references["backbone_sha256"] = digest
        clock.spend("save")
        if writer:
            if step > first_step:
                writer.write(step, clock.values())
                print(clock.describe())
            writer.close()
        if first and stopping:
            print(f"stopped by a signal, saved at step {step}: run the same command to resume")
        elif first:
            print(loop.describe_folder(workdir, sorted(state.ema)))
        return not stopping


def main(config: Any) -> int:
    """The command, with its flags parsed; returns the exit status."""
    if not flags.FLAGS.workdir:
        raise UserError("name a folder for the run: --workdir=DIR")
    return 0 if train(config, flags.FLAGS.workdir, flags.FLAGS.init) else signals.STOPPED


if __name__ == "__main__":
    from absl import flags

    from prophy_jax.run import cli, signals

    about = "A run, a checkpoint of it or a folder of parameters that a new run begins with; may be repeated."
    flags.DEFINE_multi_string("init", [], about)
    flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics, samples.")
    cli.run(main, __doc__, distributed=True, saves=True)
