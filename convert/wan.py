"""Wan2.1 weights: official and diffusers files -> Orbax checkpoints that this package reads.

    python -m convert.wan --src=DIR --dst=DIR [--component=all] [--dtype=bfloat16] [--dry_run]

DIR is a download of Wan2.1-T2V in the official layout (diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth,
models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/) or in that of diffusers (transformer/, vae/, text_encoder/,
tokenizer/), or one file of weights. The result is DST/transformer, DST/vae and DST/text_encoder, each with
tree/ and manifest.json. A run that was cut off resumes when the same command is run again.

Both formats name the same tensors differently and store them alike, so one table of names per model covers
reading and writing (here and in `convert.t5`). `convert.export` converts in the other direction.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import command, files, t5
from convert import leaves as lv
from prophy_jax.models.codecs.wan_vae import WanVAE, WanVAEConfig
from prophy_jax.models.text.t5 import UMT5_XXL
from prophy_jax.models.wan import WAN_1_3B, Wan, WanConfig
from prophy_jax.run.errors import UserError

NAMINGS = ("official", "diffusers")

# ours: (official, diffusers)
_TOP = {
    "embed/patch": ("patch_embedding", "patch_embedding"),
    "embed/time_in": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "embed/time_out": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "embed/time_modulation": ("time_projection.1", "condition_embedder.time_proj"),
    "embed/text_in": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "embed/text_out": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "head/modulation": ("head.modulation", "scale_shift_table"),
    "head/out": ("head.head", "proj_out"),
}

# Below "blocks.<i>." in both formats; ours are stacked along a leading layer axis.
_BLOCK = {
    "blocks/modulation": ("modulation", "scale_shift_table"),
    "blocks/self_attn/q": ("self_attn.q", "attn1.to_q"),
    "blocks/self_attn/k": ("self_attn.k", "attn1.to_k"),
    "blocks/self_attn/v": ("self_attn.v", "attn1.to_v"),
    "blocks/self_attn/o": ("self_attn.o", "attn1.to_out.0"),
    "blocks/self_attn/norm_q": ("self_attn.norm_q", "attn1.norm_q"),
    "blocks/self_attn/norm_k": ("self_attn.norm_k", "attn1.norm_k"),
    # The official code numbers its norms by kind, diffusers by order of execution.
    "blocks/cross_norm": ("norm3", "norm2"),
    "blocks/cross_attn/q": ("cross_attn.q", "attn2.to_q"),
    "blocks/cross_attn/k": ("cross_attn.k", "attn2.to_k"),
    "blocks/cross_attn/v": ("cross_attn.v", "attn2.to_v"),
    "blocks/cross_attn/o": ("cross_attn.o", "attn2.to_out.0"),
    "blocks/cross_attn/norm_q": ("cross_attn.norm_q", "attn2.norm_q"),
    "blocks/cross_attn/norm_k": ("cross_attn.norm_k", "attn2.norm_k"),
    "blocks/ffn/up": ("ffn.0", "ffn.net.0.proj"),
    "blocks/ffn/down": ("ffn.2", "ffn.net.2"),
}

_SUFFIX = {"kernel": ".weight", "scale": ".weight", "bias": ".bias"}


# diffusers: official. Fragments of module names, in the order in which they are replaced.
_VAE = {
    # Of a residual block.
    ".norm1.": ".residual.0.",
    ".conv1.": ".residual.2.",
    ".norm2.": ".residual.3.",
    ".conv2.": ".residual.6.",
    ".conv_shortcut.": ".shortcut.",
    # Of the encoder and of the decoder.
    ".conv_in.": ".conv1.",
    ".mid_block.resnets.0.": ".middle.0.",
    ".mid_block.attentions.0.": ".middle.1.",
    ".mid_block.resnets.1.": ".middle.2.",
    ".down_blocks.": ".downsamples.",
    ".norm_out.": ".head.0.",
    ".conv_out.": ".head.2.",
    # Between the two. The second contains the first.
    "post_quant_conv.": "conv2.",
    "quant_conv.": "conv1.",
}
_VAE_LAST = {"kernel": "weight", "scale": "gamma", "bias": "bias"}


@functools.cache
def dit_leaves(config: WanConfig, naming: str) -> dict[str, lv.Leaf]:
    """Every leaf of `Wan(config)` by its path; naming is "official" or "diffusers"."""
    column = NAMINGS.index(naming)
    table = {}
    for path, shape in lv.shapes_of(Wan(config).init).items():
        module, _, last = path.rpartition("/")
        suffix = _SUFFIX.get(last, "")
        row = module if suffix else path  # A modulation table is a row of its own.
        stacked = row in _BLOCK
        name = (_BLOCK if stacked else _TOP)[row][column] + suffix
        names = [f"blocks.{i}.{name}" for i in range(config.num_layers)] if stacked else [name]
        torch_shape = ()
        if path == "embed/patch/kernel":  # (pt ph pw c, C), of a convolution (C, c, pt, ph, pw)
            torch_shape = (config.dim, config.in_channels, *config.patch_size)
        elif last == "modulation":
            torch_shape = (1, *shape[-2:])
        table[path] = lv.leaf(path, names, shape, stacked, torch_shape)
    return table


@functools.cache
def vae_leaves(config: WanVAEConfig, naming: str) -> dict[str, lv.Leaf]:
    """Every leaf of `WanVAE(config)` by its path; naming is "official" or "diffusers"."""
    table = {}
    for path, shape in lv.shapes_of(WanVAE(config).init).items():
        module, _, last = path.rpartition("/")
        name = f"{module.replace('/', '.')}.{_VAE_LAST[last]}"
        torch_shape = ()
        if last == "scale":  # (C,), of a tensor that spans the axes of a video, in attention of an image
            torch_shape = (*shape, *(1, 1, 1)[: 2 if ".attentions." in name else 3])
        if naming == "official":
            name = _vae_official(name, config.num_res_blocks)
        table[path] = lv.leaf(path, [name], shape, stacked=False, torch_shape=torch_shape)
    return table


def _vae_official(name: str, num_res_blocks: int) -> str:
    """The official name of a diffusers tensor."""
    # The official decoder counts through all stages: the residual blocks of a stage, one more than the
    # encoder has, then its upsampler.
    per_stage = num_res_blocks + 2

    def number(match: re.Match) -> str:
        stage, kind, index = int(match[1]), match[2], int(match[3])
        inner = per_stage - 1 if kind == "upsamplers" else index
        return f".upsamples.{stage * per_stage + inner}."

    name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", number, name)
    for theirs, official in _VAE.items():
        name = name.replace(theirs, official)
    return name


# Configuration files.

DIFFUSERS_VERSION = "0.33.0"  # the first with Wan2.1, whose fields our files have


def official_config(config: WanConfig) -> dict[str, Any]:
    """config.json for the reference code.

    Raises:
        UserError: two sizes have no field, and differ from those of Wan2.1, which the reference code uses.
    """
    for name in ("patch_size", "text_dim"):
        if getattr(config, name) != getattr(WAN_1_3B, name):
            raise UserError(
                f"has {name} {getattr(config, name)}, the official format knows only Wan2.1's "
                f"{getattr(WAN_1_3B, name)}: use --format=diffusers"
            )
    return {
        "_class_name": "WanModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "t2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
    }


def diffusers_config(config: WanConfig) -> dict[str, Any]:
    """config.json for diffusers."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def diffusers_vae_config(config: WanVAEConfig) -> dict[str, Any]:
    """config.json for diffusers."""
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attn_scales": [],
        "base_dim": config.base_dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "scale_factor_spatial": config.space,
        "scale_factor_temporal": config.time,
        "temperal_downsample": list(config.temporal_downsample),  # diffusers spells it so
        "z_dim": config.z_dim,
    }


def diffusers_pipeline(config: WanConfig) -> tuple[str, dict[str, Any]]:
    """The class of the pipeline, and the scheduler of the public 1.3B repository."""
    return "WanPipeline", {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "flow_shift": 3.0,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "use_flow_sigmas": True,
    }


# The command.


def _dit_of_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `WanConfig` from a config.json of either format."""
    names = {"in_dim": "in_channels", "out_dim": "out_channels", "num_attention_heads": "num_heads"}
    ours = command.known_fields(WanConfig, fields, names)
    if "attention_head_dim" in fields:
        ours["dim"] = ours["num_heads"] * fields["attention_head_dim"]
    return ours


def _dit_of_shapes(shapes: Mapping[str, lv.Shape], _: Path) -> dict[str, Any]:
    """Fields of `WanConfig` from official tensors. The heads of every Wan2.1 are 128 wide."""
    dim, in_channels, *patch_size = shapes["patch_embedding.weight"]
    return {
        "dim": dim,
        "num_heads": max(1, dim // 128),
        "num_layers": lv.count_layers(shapes, "blocks."),
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "in_channels": in_channels,
        "out_channels": shapes["head.head.weight"][0] // math.prod(patch_size),
        "patch_size": patch_size,
    }


def _vae_of_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `WanVAEConfig` from a config.json of diffusers."""
    if fields.get("is_residual") or fields.get("patch_size") is not None:
        raise UserError("it describes the VAE of Wan2.2, not of Wan2.1")
    spelling = {"temperal_downsample": "temporal_downsample"}  # of diffusers, and ours
    return command.known_fields(WanVAEConfig, fields, spelling)


def _vae_of_shapes(shapes: Mapping[str, lv.Shape], _: Path) -> dict[str, Any]:
    """Fields of `WanVAEConfig` from official tensors. The statistics of the latents are Wan2.1's."""
    pattern = re.compile(r"encoder\.downsamples\.(\d+)\.resample\.1\.weight")
    ends = sorted(int(match[1]) for match in map(pattern.fullmatch, shapes) if match)
    base_dim = shapes["encoder.conv1.weight"][0]
    if not ends:
        raise KeyError("encoder.downsamples.2.resample.1.weight")
    stages = range(0, (len(ends) + 1) * (ends[0] + 1), ends[0] + 1)  # first block of each
    widths = [shapes[f"encoder.downsamples.{i}.residual.6.weight"][0] for i in stages]
    return {
        "base_dim": base_dim,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": [width // base_dim for width in widths],
        "num_res_blocks": ends[0],
        "temporal_downsample": [f"encoder.downsamples.{i}.time_conv.weight" in shapes for i in ends],
    }


PARTS = {
    "transformer": command.Part(
        module="wan",
        public=WAN_1_3B,
        namings=NAMINGS,
        leaves=dit_leaves,
        of_json=_dit_of_json,
        of_shapes={"official": _dit_of_shapes},
    ),
    "vae": command.Part(
        module="wan_vae",
        public=WanVAEConfig(),
        namings=NAMINGS,
        leaves=vae_leaves,
        of_json=_vae_of_json,
        of_shapes={"official": _vae_of_shapes},
    ),
    "text_encoder": command.Part(
        module="t5",
        public=UMT5_XXL,
        namings=NAMINGS,
        leaves=t5.leaves,
        of_json=t5.sizes_of_json,
        of_shapes={"official": lambda shapes, _: t5.sizes_of_shapes(shapes)},
        unused=re.compile("^spiece_model$"),  # the tokenizer, which ComfyUI's files have among the weights
    ),
}
# Stems of the weight files in the folder of all official files.
OFFICIAL = {
    "transformer": "diffusion_pytorch_model",
    "vae": "Wan2.1_VAE",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
}


def _find(src: Path, part: str) -> command.Source | None:
    folder = src / part
    weights, config = files.find(folder, command.STEMS[part]), folder / "config.json"
    official = files.find(src, OFFICIAL[part])
    command.refuse_both(part, weights, official)
    if official:
        weights, config = official, src / "config.json" if part == "transformer" else config
    tokenizer = src / "tokenizer" if (src / "text_encoder").is_dir() else src / "google" / "umt5-xxl"
    return command.Source(weights, config, tokenizer) if weights else None


def _wanted(part: str) -> str:
    suffix = "*.safetensors" if part == "transformer" else ".pth"
    return f"neither {OFFICIAL[part]}{suffix} nor {part}/{command.STEMS[part]}*.safetensors"


# What finds the names of tensors of other models, and what those models are.
_OTHER_MODELS = {
    r"(^|[._])(img_emb|image_embedder|k_img|add_k_proj)[._]": "an image-to-video model: give a Wan2.1-T2V",
    r"(^|[._])vace_": "a VACE model: give a Wan2.1-T2V",
}


def _refuse_other_models(where: str, shapes: Mapping[str, lv.Shape], fields: Mapping[str, Any]) -> None:
    """Raises UserError if a file holds another known kind of model, and says which."""
    command.refuse_names(where, shapes, _OTHER_MODELS)
    name = fields.get("_class_name", _CLASSES[0])
    if name not in _CLASSES:
        raise UserError(f"{where} is a {name}: give a Wan2.1-T2V")
    patch = shapes.get("patch_embedding.weight", (0, 16))
    head = next((shapes[name] for name in ("head.head.weight", "proj_out.weight") if name in shapes), ())
    outputs = head[0] // max(1, math.prod(patch[2:])) if head and len(patch) == 5 else 0
    kind = fields.get("model_type", "t2v")
    if outputs == 48 or kind == "ti2v" or shapes.get("conv2.weight", ())[:1] == (48,):
        raise UserError(f"{where}: Wan2.2 is not supported (48 channels): give a Wan2.1-T2V")
    if kind not in ("t2v", "umt5", "t5"):
        raise UserError(f"{where} is a model of type {kind}: give a Wan2.1-T2V")
    if fields.get("image_dim") is not None or patch[1:2] == (36,):
        raise UserError(f"{where} is an image-to-video model (36 input channels): give a Wan2.1-T2V")
    if outputs and patch[1] != outputs:
        raise UserError(
            f"{where} has {patch[1]} input channels for {outputs} of the video, as a model that is given "
            "an image or a control: give a Wan2.1-T2V"
        )


_CLASSES = ("WanTransformer3DModel", "WanModel", "AutoencoderKLWan")

MODEL = command.Model(
    name="Wan2.1",
    hub="Wan-AI/Wan2.1-T2V-1.3B",
    give="Wan2.1-T2V",
    command="convert.wan",
    about=__doc__,
    parts=PARTS,
    find=_find,
    wanted=_wanted,
    refuse=_refuse_other_models,
    pipelines=("WanPipeline", "WanVideoToVideoPipeline"),
    others={
        r"transformer_\d+|boundary_ratio|expand_timesteps|.*wan[_-]?2[._]?2(\D.*)?|.*(high|low)[_-]noise.*": (
            "Wan2.2 is not supported"
        ),
        "image_encoder|image_processor|models_clip_.*|xlm-roberta-large": "image-to-video is not supported",
    },
    patterns={
        "transformer": ("transformer/*", "config.json", f"{OFFICIAL['transformer']}*"),
        "vae": ("vae/*", f"{OFFICIAL['vae']}*"),
        "text_encoder": (
            "text_encoder/*",
            "tokenizer/*",
            f"{OFFICIAL['text_encoder']}*",
            "google/umt5-xxl/*",
        ),
    },
)

main = functools.partial(command.main, MODEL)

if __name__ == "__main__":
    command.run(MODEL)
