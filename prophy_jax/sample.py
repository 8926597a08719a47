"""Samples videos from prompts, with the parts that a run trained or with the backbone alone.

    python -m prophy_jax.sample --config=configs/wan.py --checkpoint=checkpoints/wan2.1-t2v-1.3b \
        --prompt="A red ball rolls off a table and bounces on the floor." --out=samples
    ... --branch=WORKDIR/branch   a part of a finished run, such as the physical branch; several may be given
    ... --prompts=FILE            one prompt a line
    ... --baseline                also the backbone alone, from the same noise
    ... --overlay                 also each clip with the token routing laid over it: the strongest categories

Solver, steps, shift, guidance and the negative prompt are those of `config.samples`, size and length of the
clips those of `config.data`; override them as --config.samples.KEY. OUT/manifest.json says how each clip was
made. Run the same command again to make the clips that are missing. The processes of a job share the prompts
(--distributed), and so do the workers of a Ray cluster (--engine=ray, docs/launch.md).

B prompts, F H W video, T h w latent grid, N video tokens, L text length, D text width.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from prophy_jax.library.loaded import Loaded, use_checkpoint
from prophy_jax.run import engine, storage, workdir
from prophy_jax.run.errors import NotFinite, UserError, counted

BASELINE = "_baseline"  # in the names of clips of the backbone alone


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


def find_parts(config: Any, folders: list[str]) -> dict[str, str]:
    """Part -> folder of its trained parameters, as the manifests of the folders say.

    A folder may be of one part, a run, or a checkpoint of a run; these also have the backbone if it was
    trained. Raises UserError on a folder that is of no part of the configuration, and on a part given twice.
    """
    from prophy_jax.run import checkpoints

    found: dict[str, str] = {}
    for folder in folders:
        parts = checkpoints.find_parts(folder, "name a run of prophy_jax.train, or WORKDIR/branch of one")
        for name, place in parts.items():
            if name not in (config.parts or {}) and (name != "backbone" or len(parts) == 1):
                known = sorted(config.parts or {})
                raise UserError(f"--branch={folder} is of the part {name!r}; config.parts names {known}")
            if name in found:
                raise UserError(f"--branch names the part {name!r} twice: {found[name]} and {place}")
            found[name] = place
    return found


def claim_folder(out: str, settings: Mapping[str, Any], clips: list[dict[str, Any]]) -> None:
    """Writes OUT/manifest.json, or adds the clips to the one that is there.

    Raises UserError when the folder holds something else, or clips made in another way.
    """

    def by_file(manifest: dict[str, Any]) -> dict[str, Any]:
        return {clip["file"]: clip for clip in manifest["clips"]}

    def compare(stored: dict[str, Any], own: dict[str, Any]) -> str:
        both = by_file(stored).keys() & by_file(own).keys()

        def deciding(manifest: dict[str, Any]) -> dict[str, Any]:
            settings, clips = manifest["settings"], by_file(manifest)
            hashes = {name: value for name, value in settings.items() if name.endswith("_sha256")}
            return {
                **workdir.run_identity(settings, "clips"),
                **hashes,
                **{file: clips[file] for file in both},
            }

        return workdir.differences(deciding(stored), deciding(own))

    def add(stored: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        return {**stored, "clips": list({**by_file(stored), **by_file(own)}.values())}

    workdir.claim(out, "manifest.json", {"settings": dict(settings), "clips": clips}, "--out", compare, add)


@contextlib.contextmanager
def no_folder_without_clips(out: str) -> Iterator[None]:
    """Where the body raises, takes back `claim_folder` unless the folder has a clip by then."""
    try:
        yield
    except UserError:
        if [*storage.list_files(out)] == ["manifest.json"] and jax.process_count() == 1:
            storage.remove(out)
        raise


class Sampler:
    """Makes clips: a worker of this command, see `prophy_jax.run.engine`.

    Args:
        config: with the sizes of the weights, and the parts that `folders` has.
        folders: part -> folder of its parameters; the backbone's too.
        out: the folder of the clips.
        batch: prompts at a time; None is one per device.
        seed: of the noise.
        scale: strength of what the parts add.
        overlay: also write each clip with the token routing laid over it.
        adapters: (LoRA file, strength) of any number.

    Raises:
        UserError: weights that do not exist or fit, or a batch that does not.
    """

    def __init__(
        self,
        config: Any,
        folders: Mapping[str, str],
        out: str,
        batch: int | None,
        seed: int,
        scale: float,
        overlay: bool,
        adapters: Sequence[tuple[str, float]] = (),
    ) -> None:
        from prophy_jax import build

        self._config, self._out, self._seed, self._overlay = config, out, seed, overlay
        self._loaded = loaded = Loaded(config, folders, adapters)
        self._batch = batch or loaded.ways
        loaded.check_batch(self._batch, config.samples.guidance)
        self._sizes = build.sizes(config, loaded.model)
        if overlay and not loaded.routes(loaded.model, self._sizes.latent_shape):
            raise UserError("--overlay: these parts have no token routing; leave it out, or name another run")
        self._facts = {
            "batch": self._batch,
            "references": loaded.references,
            "shift": config.samples.shift or loaded.objective.shift,
        }
        self._ways = {"": (loaded.model, scale), BASELINE: (loaded.model.without(), 0.0)}

    def tell(self) -> dict[str, Any]:
        """{"batch": prompts at a time, "references": hashes of what is read, "shift": of the solver}."""
        return self._facts

    def encode(self, prompts: Sequence[str]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Words that do not fit, text (B, L, D) and mask (B, L) of prompts.

        The encoder is freed before the backbone is read, so that they need not both fit.
        """
        return self._loaded.encode(prompts)

    def sample(
        self, work: Iterable["Work"], tick: Callable[[int], Any], negative: Mapping[str, np.ndarray]
    ) -> Iterator[None]:
        """Makes clips, a batch at a time; each solver step of a clip counts as one."""
        for batch in work:
            workdir.wait_for_file(os.path.join(self._out, "manifest.json"))
            self._sample(batch, tick, negative)
            yield

    def _sample(self, work: "Work", tick: Callable[[int], Any], negative: Mapping[str, np.ndarray]) -> None:
        from prophy_jax.data.sources import video
        from prophy_jax.diffusion import generate
        from prophy_jax.evaluation import pictures

        indices, suffix = work.indices, work.suffix
        overlay = self._overlay and not suffix
        noise = np.asarray(generate.make_noise(self._seed, indices, self._sizes.latent_shape))
        prompt = {"text": work.text, "text_mask": work.text_mask}
        model, scale = self._ways[suffix]
        scales = dict.fromkeys(model.parts, scale)
        try:
            latents, frames = self._loaded.make_clips(
                model, self._config.samples, noise, prompt, negative, scales, self._batch, tick
            )
        except NotFinite as error:
            named = (f"{indices[row]:04d}{suffix}.mp4" for row in error.rows if row < len(indices))
            raise UserError(f"{', '.join(named)}: {error}") from error
        routing = self._loaded.find_routing(model, latents, prompt, self._batch) if overlay else None
        fps, grid = self._config.data.fps, self._sizes.token_grid
        for row, index in enumerate(indices):
            path, *more = name_files(self._out, index, suffix, overlay)
            video.write_mp4(path, frames[row], fps)
            for path in more:
                names, tokens = routing
                video.write_mp4(path, pictures.overlay_strongest(frames[row], tokens[row], grid, names), fps)


class Work(NamedTuple):
    """A batch of prompts: their numbers (b,), which of the models, and text (b, L, D), text_mask (b, L)."""

    indices: np.ndarray
    suffix: str
    text: np.ndarray
    text_mask: np.ndarray


def name_files(out: str, index: int, suffix: str, overlay: bool) -> list[str]:
    """The files of a clip: its video, and with `overlay` that with the token routing."""
    endings = [".mp4", "_routing.mp4"] if overlay else [".mp4"]
    return [os.path.join(out, f"{index:04d}{suffix}{ending}") for ending in endings]


def main(config: Any) -> None:
    """The command, with its flags parsed."""
    from convert import lora
    from prophy_jax.run import distributed

    # 1. What to sample, and with what. Everything that can be wrong is found before OUT is touched.
    options = flags.FLAGS
    prompts = read_prompts(options.prompt, options.prompts)
    folders = find_parts(config, options.branch)
    config.parts = {name: spec for name, spec in config.parts.items() if name in folders}
    if checkpoint := options.checkpoint or folders.get("backbone"):
        use_checkpoint(config, checkpoint)
    adapters = lora.parse(options.lora)
    if not config.parts and (options.overlay or (options.baseline and not adapters)):
        raise UserError("--overlay and --baseline are about a trained part: name one with --branch=DIR")
    if options.engine:
        if options.distributed:
            raise UserError("--engine shares the work by itself: leave out --distributed")
        jax.config.update("jax_platforms", "cpu")  # the devices are the workers'
    folders["backbone"] = config.backbone_params
    scales = {"": options.scale if config.parts else 0.0}
    if options.baseline:
        scales[BASELINE] = 0.0
    make = functools.partial(
        Sampler,
        config,
        folders,
        options.out,
        options.batch,
        options.seed,
        scales[""],
        options.overlay,
        adapters,
    )
    with engine.workers(options.engine, make, options.devices) as workers:
        facts = workers.ask(Sampler.tell)
        clips = [
            {"file": f"{index:04d}{suffix}.mp4", "prompt": prompt, "seed": options.seed, "scale": scale}
            for index, prompt in enumerate(prompts)
            for suffix, scale in scales.items()
        ]
        settings = workdir.run_identity(config, "clips")
        settings["samples"]["shift"] = facts["shift"]
        process, processes = jax.process_index(), jax.process_count()
        with distributed.all_or_none():
            if process == 0:
                claim_folder(options.out, settings | facts["references"], clips)
        with distributed.all_or_none():
            workdir.wait_for_file(os.path.join(options.out, "manifest.json"))

        with no_folder_without_clips(options.out):
            # 2. The prompts.
            all_lost, text, text_mask = workers.ask(
                Sampler.encode, [*prompts, config.samples.negative_prompt]
            )
            for prompt, lost in zip(prompts, all_lost[:-1], strict=True):
                if lost:
                    words = " ".join(prompt.split()[-lost:])
                    print(
                        f"warning: no room for the end of a prompt, {counted(lost, 'word')} lost: {words}",
                        file=sys.stderr,
                    )
            negative = {"text": text[-1], "text_mask": text_mask[-1]}

            # 3. The clips, a batch at a time. A batch with a missing file is made again, from the same noise.
            batch = facts["batch"]
            batches = np.split(np.arange(len(prompts)), range(batch, len(prompts), batch))
            share = [(indices, suffix) for indices in batches for suffix in scales][process::processes]
            work = [
                Work(
                    indices,
                    suffix,
                    text[indices[0] : indices[-1] + 1],
                    text_mask[indices[0] : indices[-1] + 1],
                )
                for indices, suffix in share
                if not all(
                    storage.path(path).exists()
                    for index in indices
                    for path in name_files(options.out, index, suffix, options.overlay and not suffix)
                )
            ]
            made = sum(len(one.indices) for one in work)
            do = functools.partial(Sampler.sample, negative=negative)
            workers.share(do, work, total=made * config.samples.steps, unit="step")
    here = sum(len(indices) for indices, _ in share)
    whose = f", process {process} of {processes}" if processes > 1 else ""
    before = "" if made == here else f", {here - made} of them from before"
    done = ", already there: nothing to do" if here and not made else before
    print(f"{counted(here, 'clip')} in {options.out}{done}{whose}")


if __name__ == "__main__":
    from prophy_jax import sample as command  # by the name that workers elsewhere import it by
    from prophy_jax.run import cli

    flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
    flags.DEFINE_string("prompts", None, "A file with one prompt a line.")
    flags.DEFINE_string("checkpoint", None, "Folder of converted weights, or of backbone parameters.")
    flags.DEFINE_multi_string(
        "branch",
        [],
        "Folder of a part that a run trained, WORKDIR/branch; may be repeated; without it, no part.",
    )
    about = "A LoRA file of diffusers, PEFT, kohya or ComfyUI, FILE or FILE=STRENGTH; may be repeated."
    flags.DEFINE_multi_string("lora", [], about)
    flags.DEFINE_string("out", "samples", "Folder to write the clips to.")
    flags.DEFINE_float("scale", 1.0, "Strength of what the parts add.")
    about = "Of the noise; prompt i of a run has its own noise."
    flags.DEFINE_integer("seed", 0, about, lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("batch", None, "Prompts sampled at a time; default: one per device.", lower_bound=1)
    flags.DEFINE_string("engine", None, engine.HELP)
    flags.DEFINE_integer("devices", 1, engine.DEVICES_HELP, lower_bound=1)
    flags.DEFINE_bool("baseline", False, "Also sample the backbone alone, from the same noise.")
    flags.DEFINE_bool("overlay", False, "Also write each clip with the token routing laid over it.")
    cli.run(command.main, __doc__, distributed=True)
