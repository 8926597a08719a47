"""CogVideoX weights: diffusers and SAT files -> Orbax checkpoints that this package reads.

    python -m convert.cogvideox --src=DIR --dst=DIR [--component=all] [--dtype=bfloat16] [--dry_run]

DIR is a download of CogVideoX-2b, -5b or 1.5-5B (text to video) in the layout of diffusers (transformer/,
vae/, text_encoder/, tokenizer/) or in that of the reference code, SAT (vae/3d-vae.pt, t5-v1_1-xxl/,
transformer/1000/mp_rank_00_model_states.pt). The result is DST/transformer, DST/vae and DST/text_encoder,
each with tree/ and manifest.json. A run that was cut off resumes when the same command is run again.

SAT keeps queries, keys and values of a layer in one tensor, and the modulation of both its norms in another.
Each of our leaves is made of some of their rows. `convert.export` converts in the other direction, to the
format of diffusers alone.

Legend: C model width, E time width, c latent channels.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import command, files, t5
from convert import leaves as lv
from prophy_jax.models.codecs.cogvideox_vae import CogVideoXVAE, CogVideoXVAEConfig
from prophy_jax.models.cogvideox import COGVIDEOX_2B, COGVIDEOX_5B, CogVideoX, CogVideoXConfig
from prophy_jax.models.text.t5 import T5_V1_1_XXL
from prophy_jax.run.errors import UserError

NAMINGS = ("diffusers", "sat")

_SAT_PREFIX = "model.diffusion_model."

# ours: (diffusers, SAT behind its prefix)
_TOP = {
    "embed/patch": ("patch_embed.proj", "mixins.patch_embed.proj"),
    "embed/text": ("patch_embed.text_proj", "mixins.patch_embed.text_proj"),
    "embed/time_in": ("time_embedding.linear_1", "time_embed.0"),
    "embed/time_out": ("time_embedding.linear_2", "time_embed.2"),
    "head/norm1": ("norm_final", "transformer.final_layernorm"),
    "head/norm2": ("norm_out.norm", "mixins.final_layer.norm_final"),
    "head/modulation": ("norm_out.linear", "mixins.final_layer.adaLN_modulation.1"),
    "head/out": ("proj_out", "mixins.final_layer.linear"),
}

# With the number of the layer in place of "*"; ours are stacked along a leading layer axis.
_QKV, _ADALN = "transformer.layers.*.attention.query_key_value", "mixins.adaln_layer.adaLN_modulations.*.1"
_BLOCK = {
    "blocks/norm1/modulation": ("transformer_blocks.*.norm1.linear", _ADALN),
    "blocks/norm1/norm": ("transformer_blocks.*.norm1.norm", "transformer.layers.*.input_layernorm"),
    "blocks/attn/q": ("transformer_blocks.*.attn1.to_q", _QKV),
    "blocks/attn/k": ("transformer_blocks.*.attn1.to_k", _QKV),
    "blocks/attn/v": ("transformer_blocks.*.attn1.to_v", _QKV),
    "blocks/attn/norm_q": (
        "transformer_blocks.*.attn1.norm_q",
        "mixins.adaln_layer.query_layernorm_list.*",
    ),
    "blocks/attn/norm_k": ("transformer_blocks.*.attn1.norm_k", "mixins.adaln_layer.key_layernorm_list.*"),
    "blocks/attn/o": ("transformer_blocks.*.attn1.to_out.0", "transformer.layers.*.attention.dense"),
    "blocks/norm2/modulation": ("transformer_blocks.*.norm2.linear", _ADALN),
    "blocks/norm2/norm": (
        "transformer_blocks.*.norm2.norm",
        "transformer.layers.*.post_attention_layernorm",
    ),
    "blocks/ffn/up": ("transformer_blocks.*.ff.net.0.proj", "transformer.layers.*.mlp.dense_h_to_4h"),
    "blocks/ffn/down": ("transformer_blocks.*.ff.net.2", "transformer.layers.*.mlp.dense_4h_to_h"),
}

# The rows of a leaf in a tensor that SAT shares, in units of C. Its modulation is shift, scale and gate of
# attention, then of the MLP, for the video, then the same for the text.
_SAT_ROWS = {
    "blocks/attn/q": ((0, 1),),
    "blocks/attn/k": ((1, 2),),
    "blocks/attn/v": ((2, 3),),
    "blocks/norm1/modulation": ((0, 3), (6, 9)),
    "blocks/norm2/modulation": ((3, 6), (9, 12)),
}

_SUFFIX = {"kernel": "weight", "scale": "weight", "bias": "bias"}

# SAT files have more than the weights: tables of positions, which are computed here, and a vocabulary that is
# not used. The file of the VAE also has networks of its training.
_SAT_UNUSED = re.compile(
    r"^model\.diffusion_model\.(mixins\.pos_embed\.pos_embedding"
    r"|(.*\.)?(freqs_sin|freqs_cos|position_embeddings?|word_embeddings|embed_tokens)(\..*)?)$"
)
_SAT_VAE_UNUSED = re.compile("loss")


@functools.cache
def dit_leaves(config: CogVideoXConfig, naming: str) -> dict[str, lv.Leaf]:
    """Every leaf of `CogVideoX(config)` by its path; naming is "diffusers" or "sat"."""
    column, sat = NAMINGS.index(naming), naming == "sat"
    table = {}
    for path, shape in lv.shapes_of(CogVideoX(config).init).items():
        module, _, last = path.rpartition("/")
        stacked = module in _BLOCK
        name = f"{(_BLOCK if stacked else _TOP)[module][column]}.{_SUFFIX[last]}"
        names = [name.replace("*", str(i)) for i in range(config.num_layers)] if stacked else [name]
        names = [_SAT_PREFIX + name for name in names] if sat else names
        entry = lv.leaf(path, names, shape, stacked)
        if path == "embed/patch/kernel" and config.patch_size[0] == 1:
            # (c ph pw, C), of a convolution (C, c, ph, pw). With frames in a patch it is a linear layer.
            torch_shape = (config.dim, config.in_channels, *config.patch_size[1:])
            entry = lv.Leaf(entry.names, torch_shape, entry.shape, False, (1, 2, 3, 0))
        elif sat and module in _SAT_ROWS:
            rows = tuple((config.dim * start, config.dim * stop) for start, stop in _SAT_ROWS[module])
            entry = lv.Leaf(entry.names, entry.torch_shape, entry.shape, True, entry.axes, rows)
        table[path] = entry
    return table


@functools.cache
def vae_leaves(config: CogVideoXVAEConfig, naming: str) -> dict[str, lv.Leaf]:
    """Every leaf of `CogVideoXVAE(config)` by its path; naming is "diffusers" or "sat"."""
    table = {}
    for path, shape in lv.shapes_of(CogVideoXVAE(config).init).items():
        module, _, last = path.rpartition("/")
        name = f"{module.replace('/', '.')}.{_SUFFIX[last]}"
        if naming == "sat":
            name = _vae_sat(name, len(config.block_out_channels))
        table[path] = lv.leaf(path, [name], shape, stacked=False)
    return table


def _vae_sat(name: str, stages: int) -> str:
    """SAT's name of a diffusers tensor. SAT's decoder counts its stages from the output."""
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{stages - 1 - int(match[1])}.", name)
    name = name.replace(".down_blocks.", ".down.").replace(".conv_shortcut.", ".nin_shortcut.")
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda match: f".mid.block_{int(match[1]) + 1}.", name)
    name = name.replace(".resnets.", ".block.")
    return re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", name)


# Configuration files.

DIFFUSERS_VERSION = "0.32.0"  # the first with 1.5, whose fields our files have

# What every CogVideoX for text has.
_DIT_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "ofs_embed_dim": None,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
}
_VAE_FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
# Sizes of the clips that the public models were trained on: frames of 2B and 5B, frames and sides of 1.5. The
# sides of 2B and 5B come from `base_grid`.
_FRAMES, _FRAMES_1_5, _SIDE_1_5 = 49, 81, 300


def diffusers_config(config: CogVideoXConfig) -> dict[str, Any]:
    """config.json for diffusers. Raises UserError on sizes for which it has no fields."""
    frames, rows, columns = config.patch_size
    slices = config.positions == "rope_slice"
    if config.ffn_dim != 4 * config.dim or rows != columns or (frames > 1) != slices:
        raise UserError(
            f"has ffn_dim {config.ffn_dim}, patches {config.patch_size} and positions {config.positions!r}: "
            f"diffusers has fields for ffn_dim {4 * config.dim}, for square patches, and for several frames "
            "in a patch where positions are 'rope_slice' and only there; change the model"
        )
    height, width = (_SIDE_1_5, _SIDE_1_5) if slices else (side * rows for side in config.base_grid)
    return {
        "_class_name": "CogVideoXTransformer3DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        **_DIT_FIXED,
        "attention_head_dim": config.head_dim,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "max_text_seq_length": config.text_len,
        "norm_eps": config.eps,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_bias": not slices,  # as published; the layer of 1.5 has a bias all the same
        "patch_size": rows,
        "patch_size_t": frames if slices else None,
        "sample_frames": _FRAMES_1_5 if slices else _FRAMES,
        "sample_height": height,
        "sample_width": width,
        "text_embed_dim": config.text_dim,
        "time_embed_dim": config.time_dim,
        "use_rotary_positional_embeddings": config.positions != "sincos",
    }


def diffusers_vae_config(config: CogVideoXVAEConfig) -> dict[str, Any]:
    """config.json for diffusers."""
    stages = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKLCogVideoX",
        "_diffusers_version": DIFFUSERS_VERSION,
        **_VAE_FIXED,
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["CogVideoXDownBlock3D"] * stages,
        "force_upcast": True,
        "invert_scale_latents": False,  # read for image-to-video alone
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.norm_num_groups,
        "sample_height": 480,
        "sample_width": 720,
        "scaling_factor": config.scaling_factor,
        "temporal_compression_ratio": config.temporal_compression_ratio,
        "up_block_types": ["CogVideoXUpBlock3D"] * stages,
    }


def diffusers_pipeline(config: CogVideoXConfig) -> tuple[str, dict[str, Any]]:
    """The class of the pipeline, and the scheduler that the reference code advises for the model."""
    two_b = config.positions == "sincos"
    return "CogVideoXPipeline", {
        "_class_name": "CogVideoXDDIMScheduler" if two_b else "CogVideoXDPMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "snr_shift_scale": 3.0 if two_b else 1.0,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }


# The command.


def _check_fixed(fields: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises UserError where a config.json has another value; a field may be absent."""
    for name, value in fixed.items():
        if fields.get(name, value) != value:
            raise UserError(f"it has {name} {fields[name]!r}, every public CogVideoX for text has {value!r}")


def _dit_of_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `CogVideoXConfig` from a config.json of diffusers."""
    _check_fixed(fields, _DIT_FIXED)
    names = {
        "num_attention_heads": "num_heads",
        "text_embed_dim": "text_dim",
        "max_text_seq_length": "text_len",
        "time_embed_dim": "time_dim",
        "norm_eps": "eps",
    }
    ours = command.known_fields(CogVideoXConfig, fields, names)
    patch, frames = fields.get("patch_size", 2), fields.get("patch_size_t")
    ours["dim"] = fields["num_attention_heads"] * fields["attention_head_dim"]
    ours["ffn_dim"] = 4 * ours["dim"]
    ours["patch_size"] = (frames or 1, patch, patch)
    if not fields["use_rotary_positional_embeddings"]:
        ours["positions"] = "sincos"
    else:
        ours["positions"] = "rope_slice" if frames else "rope_crop"
    if ours["positions"] != "rope_slice":  # which counts from 0, whatever the size
        ours["base_grid"] = (fields["sample_height"] // patch, fields["sample_width"] // patch)
    return ours


def _dit_of_sat(shapes: Mapping[str, lv.Shape], _: Path) -> dict[str, Any]:
    """Fields of `CogVideoXConfig` from SAT's tensors."""
    shapes = {name.removeprefix(_SAT_PREFIX): shape for name, shape in shapes.items()}
    time_dim, dim = shapes["time_embed.0.weight"]
    patch = shapes["mixins.patch_embed.proj.weight"]
    patch_size = (1, *patch[2:]) if len(patch) == 4 else (2, 2, 2)
    if len(patch) == 2:
        positions = "rope_slice"
    else:  # The file of 2B may have its table; a file without one is recognised by the width of the model.
        table = "mixins.pos_embed.pos_embedding" in shapes
        positions = "sincos" if table or dim == COGVIDEOX_2B.dim else "rope_crop"
    volume = patch_size[0] * patch_size[1] * patch_size[2]
    return {
        "dim": dim,
        "num_heads": dim // shapes["mixins.adaln_layer.query_layernorm_list.0.weight"][0],
        "num_layers": lv.count_layers(shapes, "transformer.layers."),
        "ffn_dim": shapes["transformer.layers.0.mlp.dense_h_to_4h.weight"][0],
        "text_dim": shapes["mixins.patch_embed.text_proj.weight"][1],
        "time_dim": time_dim,
        "in_channels": patch[1] if len(patch) == 4 else patch[1] // volume,
        "out_channels": shapes["mixins.final_layer.linear.weight"][0] // volume,
        "patch_size": patch_size,
        "positions": positions,
        "text_len": 224 if positions == "rope_slice" else 226,  # diffusers takes 226 for 1.5, too
    }


def _vae_of_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `CogVideoXVAEConfig` from a config.json of diffusers."""
    _check_fixed(fields, _VAE_FIXED)
    return {"scaling_factor": fields["scaling_factor"]} | command.known_fields(CogVideoXVAEConfig, fields)


# The scaling factor of the latents. SAT has it in a file for its own program; the weights are the same.
SCALING = {"sincos": 1.15258426, "rope_crop": 0.7, "rope_slice": 0.7}


def _vae_of_sat(shapes: Mapping[str, lv.Shape], src: Path) -> dict[str, Any]:
    """Fields of `CogVideoXVAEConfig` from SAT's tensors, and the scaling factor from the transformer's."""
    blocks = [
        re.fullmatch(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.conv\.weight", name) for name in shapes
    ]
    last = max((int(match[1]), int(match[2])) for match in blocks if match)
    widths = [shapes[f"encoder.down.{i}.block.0.conv2.conv.weight"][0] for i in range(last[0] + 1)]
    return {
        "block_out_channels": widths,
        "layers_per_block": last[1] + 1,
        "latent_channels": shapes["decoder.conv_in.conv.weight"][1],
        "scaling_factor": SCALING[_positions(src)],
    }


def _positions(src: Path) -> str:
    """The `positions` of the transformer in a download."""
    source = _find(src, "transformer")
    if source is None:
        raise UserError(
            "nothing in it says how latents are scaled, which 2B and 5B do differently: put the transformer "
            f"into {src} as well"
        )
    if source.config.is_file():
        return _dit_of_json(files.read_json(source.config))["positions"]
    tensors = files.tensors(source.weights, _SAT_UNUSED)
    return _dit_of_sat({tensor.name: tensor.shape for tensor in tensors}, src)["positions"]


PARTS = {
    "transformer": command.Part(
        module="cogvideox",
        public=COGVIDEOX_5B,
        namings=NAMINGS,
        leaves=dit_leaves,
        of_json=_dit_of_json,
        of_shapes={"sat": _dit_of_sat},
        unused=_SAT_UNUSED,
    ),
    "vae": command.Part(
        module="cogvideox_vae",
        public=CogVideoXVAEConfig(),
        namings=NAMINGS,
        leaves=vae_leaves,
        of_json=_vae_of_json,
        of_shapes={"sat": _vae_of_sat},
        unused=_SAT_VAE_UNUSED,
        beside="transformer",
    ),
    "text_encoder": command.Part(
        module="t5",
        public=T5_V1_1_XXL,
        namings=("diffusers",),
        leaves=t5.leaves,
        of_json=t5.sizes_of_json,
        of_shapes={},
    ),
}
# SAT has the text encoder and the tokenizer in the files of diffusers, in one folder.
_SAT_WEIGHTS = "mp_rank_00_model_states.pt"
_SAT_TEXT = "t5-v1_1-xxl"


def _find(src: Path, part: str) -> command.Source | None:
    folder = src / part
    weights, tokenizer = files.find(folder, command.STEMS[part]), src / "tokenizer"
    if part == "transformer":
        sat = _find_sat_transformer(src)
    elif part == "vae":
        sat = [file for file in (src / "vae" / "3d-vae.pt", src / "3d-vae.pt") if file.is_file()][:1]
    else:
        sat = files.find(src / _SAT_TEXT, command.STEMS[part])
    command.refuse_both(part, weights, sat)
    if sat and part == "text_encoder":
        folder = tokenizer = src / _SAT_TEXT
    weights = weights or sat
    return command.Source(weights, folder / "config.json", tokenizer) if weights else None


def _find_sat_transformer(src: Path) -> list[Path]:
    """One file, in a folder named after the step. Raises UserError on several, and on a training state."""
    for folder in (src / "transformer", src / "transformer_t2v", src):
        states = sorted({*folder.glob("*.pt"), *folder.glob("[0-9]*/*.pt")})
        found = [file for file in states if file.name == _SAT_WEIGHTS]
        if len(found) > 1:
            raise UserError(f"{folder} has {_SAT_WEIGHTS} of several steps: leave only one of them there")
        # Next to whole weights, only the optimizer may be in pieces.
        pieces = [file for file in states if file.name.endswith("_model_states.pt") and file not in found]
        pieces += [file for file in states if file.name.endswith("_optim_states.pt") and not found]
        if pieces:
            raise UserError(
                f"{pieces[0]} is a piece of a training state, which DeepSpeed saved in several files: give "
                f"whole weights, in one {_SAT_WEIGHTS}"
            )
        if found:
            return found
    return []


def _wanted(part: str) -> str:
    sat = {
        "transformer": f"transformer/*/{_SAT_WEIGHTS}",
        "vae": "vae/3d-vae.pt",
        "text_encoder": f"{_SAT_TEXT}/{command.STEMS[part]}*.safetensors",
    }
    return f"neither {part}/{command.STEMS[part]}*.safetensors nor {sat[part]}"


def _refuse_other_models(where: str, shapes: Mapping[str, lv.Shape], fields: Mapping[str, Any]) -> None:
    """Raises UserError if a file holds another known kind of model, and says which."""
    command.refuse_names(where, shapes, {})
    kind = str(fields.get("_class_name", ""))
    if kind and not kind.startswith(("CogVideoXTransformer", "AutoencoderKLCogVideoX")):
        raise UserError(f"{where} is a {kind}: give a CogVideoX for text to video")
    inputs = r"(^patch_embed|\.mixins\.patch_embed)\.proj\.weight$"
    wide = next((n for n, shape in shapes.items() if re.search(inputs, n) and _channels(shape) == 32), None)
    learned = r"^patch_embed\.pos_embedding$|(^|\.)ofs_embed(ding)?\."
    found = wide or next(filter(re.compile(learned).search, shapes), None)
    if found:
        raise UserError(f"{where} is an image-to-video model (it has {found} {shapes[found]}): give a T2V")
    patch = next((shape for name, shape in shapes.items() if re.search(inputs, name)), ())
    last = r"(^proj_out|\.mixins\.final_layer\.linear)\.weight$"
    head = next((shape for name, shape in shapes.items() if re.search(last, name)), ())
    if patch and head:
        outputs = head[0] // max(1, patch[2] * patch[3] if len(patch) == 4 else 8)
        if _channels(patch) != outputs:
            raise UserError(
                f"{where} has {_channels(patch)} input channels for {outputs} of the video, as a model that "
                "is given an image or a control: give a T2V"
            )


def _channels(patch: lv.Shape) -> int:
    """Input channels of a patch embedding: a convolution, or a linear layer of 2 x 2 x 2 latents."""
    return patch[1] if len(patch) == 4 else sum(patch[-1:]) // 8


MODEL = command.Model(
    name="CogVideoX",
    hub="zai-org/CogVideoX-5b",
    give="CogVideoX for text to video",
    command="convert.cogvideox",
    about=__doc__,
    parts=PARTS,
    find=_find,
    wanted=_wanted,
    refuse=_refuse_other_models,
    pipelines=("CogVideoXPipeline", "CogVideoXVideoToVideoPipeline"),
    others={r"transformer_i2v|image_encoder|.*cogvideox.*-i2v": "image-to-video is not supported"},
    patterns={
        "transformer": ("transformer/*", f"*{_SAT_WEIGHTS}"),
        "vae": ("vae/*", "*3d-vae.pt", "transformer/config.json"),
        "text_encoder": ("text_encoder/*", "tokenizer/*", f"{_SAT_TEXT}/*"),
    },
)

main = functools.partial(command.main, MODEL)

if __name__ == "__main__":
    command.run(MODEL)
