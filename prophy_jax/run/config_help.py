"""What every key of a configuration means: `--print_config` of every command.

`MEANINGS` has the keys that the commands read. The arguments of a part that a configuration names by
`module=` are explained where they are declared: in the docstring of its `build` function ("Args:") or of the
dataclasses of its file ("Attributes:"). A loss is explained by the
docstring of its `share` or `whole`.
"""

import dataclasses
import fnmatch
import functools
import inspect
import re
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

MEANINGS = {
    "seed": "Seed of initial weights, the order of the data, noise and samples",
    "steps": "Training steps",
    "batch_size": "Clips in a step, over all devices",
    "accumulation": "Microbatches that a step is split into",
    "*.module": "File that has this part",
    "backbone_params": "Folder of the backbone's parameters; empty: random ones",
    "codec_params": "Folder of the codec's parameters; empty: it has none",
    "text_encoder_params": "Folder of the text encoder's parameters; empty: it has none",
    "backbone_remedy": "What the message says when backbone_params are missing",
    "frozen_dtype": "Dtype of parameters that do not train",
    "parts": "What is trained next to the backbone, by name",
    "losses": "Weights of the losses next to the diffusion loss",
    "reduction.*": '"sum" as in the paper, or "mean"',
    "caption_dropout": "Share of clips that a step shows the empty prompt",
    "optimizer.groups": "(pattern of parameter paths, learning rate; None freezes); the first match counts",
    "optimizer.warmup": "Steps over which learning rates rise linearly",
    "optimizer.decay": '"constant", or "cosine" to 0 at the last step',
    "optimizer.clip": "Largest norm of the gradient",
    "optimizer.b1": "AdamW: decay of the mean gradient",
    "optimizer.b2": "AdamW: decay of the mean squared gradient",
    "optimizer.eps": "AdamW: added to the divisor",
    "optimizer.weight_decay": "AdamW: decay of the parameters, times the learning rate",
    "optimizer.ema": "Decay of the averaged parameters",
    "data.dir": "Folder of training records",
    "data.side.alignment": "Folder of token labels; empty: those in data.dir",
    "data.buckets": "Further (frames, height, width): each clip takes its shape, and the longest it fills",
    "data.max_upscale": "Clips that would have to grow by more are skipped",
    "data.categories": '"answers": the 17 phenomena of WISA-80K\'s q0, q1 and q2; "label": its single label',
    "data.subset": "Clips drawn at random; 0: all",
    "data.seed": "Seed of the subset and the splits",
    "data.val_share": "Share of the validation split",
    "data.shard": "Clips in a file",
    "data.height": "Height of clips in pixels",
    "data.width": "Width of clips in pixels",
    "data.frames": "Length of clips in frames",
    "data.fps": "Frames per second that clips are read and written at",
    "data.sandbox.seed": "Seed of the clips that the physics sandbox draws",
    "data.sandbox.*": "How many clips of this split the physics sandbox draws",
    "label.layers": "Layers of the vision-language model: two fractions of its depth, or indices",
    "label.heads": 'How heads are combined: "mean" or "max"',
    "label.rows": '"generated": tokens of the answer ask where; or "predicting", "last_prompt"',
    "label.tokens": '"content": those of them that mean something; or "all"',
    "label.denoise": '"difference" from the background; or "ratio", "log_ratio", "none"',
    "label.scale": '"max": targets are divided by max |Q|; or "std"',
    "label.max_new_tokens": "Longest answer",
    "label.every": "Latent times in a frame pair of the model",
    "label.cell": "Tokens a side in a cell of the model",
    "label.batch": "Clips that the model is shown at a time",
    "label.dtype": "Dtype of the vision-language model",
    "label_check.*": "Number, size and seed of the sandbox clips that --check labels",
    "mesh.data": "Devices that split the batch; -1: what is left",
    "mesh.fsdp": "Devices that split the batch and the trained parameters",
    "mesh.context": "Devices that split the tokens of a clip",
    "attention": '"auto": by platform; or "xla", "blockwise", "cudnn", "splash"',
    "log.every": "Steps between lines of metrics",
    "checkpoint.every": "Steps between checkpoints",
    "checkpoint.keep": "Checkpoints that stay",
    "validation.every": "Steps between validations",
    "validation.batches": "Batches of a validation",
    "validation.batch_size": "Clips in a validation batch",
    "validation.times": "Diffusion times that losses are measured at",
    "samples.every": "Steps between sample clips",
    "samples.clips": "How many sample clips",
    "samples.solver": "How the sampler steps: the objective lists its solvers",
    "samples.steps": "Steps of the sampler",
    "samples.shift": "How far the sampler's times are shifted towards noise; None: as in training",
    "samples.guidance": "Strength of classifier-free guidance; 1: none",
    "samples.guidance_schedule": '"constant", or "dynamic", CogVideoX\'s',
    "samples.skip": "Steps, from 1, that do not call the network: docs/benchmarks.md has what it costs",
    "samples.negative_prompt": "What guidance leads away from",
}
PACKAGES = {"objective": "prophy_jax.diffusion"}  # of `module=`; others are in prophy_jax.models


def describe(config: ConfigDict) -> str:
    """One line for each key of `config`: its value and what it means."""
    lines = [(f"{key} = {value!r}", find_meaning(config, key)) for key, value in list_keys(config)]
    width = min(48, max(len(setting) for setting, _ in lines))
    return "\n".join(f"{setting:{width}}  # {meaning}".rstrip() for setting, meaning in lines)


def list_keys(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in `config` that is not itself a table of keys."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from list_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def find_meaning(config: ConfigDict, key: str) -> str:
    """What a key of `config` means; "" when nothing explains it."""
    from prophy_jax import losses, models

    if pattern := next((pattern for pattern in MEANINGS if fnmatch.fnmatchcase(key, pattern)), None):
        return MEANINGS[pattern]
    top, *path = key.split(".")
    if top == "losses":
        loss = losses.TABLE[path[0]]
        return f"Weight of: {first_sentence((loss.share or loss.whole).__doc__ or '')}"
    names = key.split(".")
    for depth in range(len(names) - 1, 0, -1):
        spec = functools.reduce(lambda table, name: table[name], names[:depth], config)
        if "module" in spec:
            return argument(models.find(spec.module, PACKAGES.get(top, models.__name__)), names[depth:])
    return ""


def argument(module: ModuleType, path: list[str]) -> str:
    """What the docstrings of `module` say of an argument of its `build`, or of a field of that argument."""
    own = [value for value in vars(module).values() if isinstance(value, type)]
    documented = [kind for value in own if dataclasses.is_dataclass(value) for kind in value.__mro__]
    for name in path[:-1]:  # the classes that the field may hold
        types = [typing.get_type_hints(value).get(name) for value in documented]
        documented = [kind for hint in types for kind in (typing.get_args(hint) or (hint,))]
    if len(path) == 1 and hasattr(module, "build"):
        documented.insert(0, module.build)
    meanings = [arguments(value.__doc__ or "").get(path[-1], "") for value in documented]
    meanings = sorted(filter(None, meanings), key=lambda text: text.startswith("See `"))  # a reference last
    return meanings[0] if meanings else ""


def arguments(doc: str) -> dict[str, str]:
    """{name: first sentence} of the section "Args:" or "Attributes:" of a docstring."""
    section = re.search(r"\n *(?:Args|Attributes):\n(.*?)(?=\n\n|\Z)", inspect.cleandoc(doc), re.DOTALL)
    found = re.findall(r"^ {4}\**(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: first_sentence(text) for name, text in found}


def first_sentence(text: str) -> str:
    """Up to the first full stop, on one line."""
    return re.split(r"\.(?= |$)", " ".join(text.split()), maxsplit=1)[0]
