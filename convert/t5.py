"""Key table of the text encoders: UMT5 (Wan2.1) and T5 v1.1 (CogVideoX), encoder only.

The official naming is that of the Wan2.1 reference code, the diffusers naming that of transformers.
"""

import functools
from collections.abc import Mapping
from typing import Any

from convert import leaves as lv
from prophy_jax.models.text.t5 import T5, T5Config
from prophy_jax.run.errors import UserError

NAMINGS = ("official", "diffusers")

# A file of transformers may hold the embedding under both names.
EMBEDDING, ALIAS = "shared.weight", "encoder.embed_tokens.weight"

# ours: (official, diffusers)
_TOP = {
    "embedding/embedding": ("token_embedding.weight", EMBEDDING),
    "norm/scale": ("norm.weight", "encoder.final_layer_norm.weight"),
    # T5 v1.1 has one table of position biases; transformers keeps it in the first layer.
    "position_bias/embedding": (
        "pos_embedding.embedding.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
}

# Below "blocks.<i>." and "encoder.block.<i>."; ours are stacked along a leading layer axis.
_BLOCK = {
    "blocks/attn_norm/scale": ("norm1.weight", "layer.0.layer_norm.weight"),
    "blocks/attn/q/kernel": ("attn.q.weight", "layer.0.SelfAttention.q.weight"),
    "blocks/attn/k/kernel": ("attn.k.weight", "layer.0.SelfAttention.k.weight"),
    "blocks/attn/v/kernel": ("attn.v.weight", "layer.0.SelfAttention.v.weight"),
    "blocks/attn/o/kernel": ("attn.o.weight", "layer.0.SelfAttention.o.weight"),
    "blocks/position_bias/embedding": (
        "pos_embedding.embedding.weight",
        "layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    "blocks/ffn_norm/scale": ("norm2.weight", "layer.1.layer_norm.weight"),
    "blocks/ffn/gate/kernel": ("ffn.gate.0.weight", "layer.1.DenseReluDense.wi_0.weight"),
    "blocks/ffn/up/kernel": ("ffn.fc1.weight", "layer.1.DenseReluDense.wi_1.weight"),
    "blocks/ffn/down/kernel": ("ffn.fc2.weight", "layer.1.DenseReluDense.wo.weight"),
}
_BLOCKS = ("blocks", "encoder.block")


@functools.cache
def leaves(config: T5Config, naming: str) -> dict[str, lv.Leaf]:
    """Every leaf of `T5(config)` by its path; naming is "official" or "diffusers"."""
    column = NAMINGS.index(naming)
    table = {}
    for path, shape in lv.shapes_of(T5(config).init).items():
        if path in _BLOCK:
            name = _BLOCK[path][column]
            names = [f"{_BLOCKS[column]}.{i}.{name}" for i in range(shape[0])]
            table[path] = lv.leaf(path, names, shape, stacked=True)
        else:
            table[path] = lv.leaf(path, [_TOP[path][column]], shape, stacked=False)
    return table


def sizes_of_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `T5Config` from a config.json of transformers. Raises UserError on another kind of model."""
    kind, ffn = fields.get("model_type"), fields.get("feed_forward_proj")
    if kind not in ("t5", "umt5") or ffn != "gated-gelu":
        raise UserError(f"it describes a model {kind!r} with {ffn!r}, not a UMT5 or T5 v1.1 encoder")
    same = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    return {name: fields[name] for name in same} | {
        "shared_bias": kind == "t5",
        "num_buckets": fields.get("relative_attention_num_buckets", 32),
        "max_distance": fields.get("relative_attention_max_distance", 128),
        "eps": fields.get("layer_norm_epsilon", 1e-6),
    }


def sizes_of_shapes(shapes: Mapping[str, lv.Shape]) -> dict[str, Any]:
    """Fields of `T5Config` from the tensors of an official file. Raises KeyError if one is missing."""
    vocab_size, d_model = shapes["token_embedding.weight"]
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // num_heads,
        "d_ff": shapes["blocks.0.ffn.gate.0.weight"][0],
        "num_layers": lv.count_layers(shapes, "blocks."),
        "num_heads": num_heads,
        "shared_bias": False,
        "num_buckets": num_buckets,
    }


def transformers_config(config: T5Config) -> dict[str, Any]:
    """config.json for transformers, without the dtype."""
    return {
        "architectures": ["T5EncoderModel" if config.shared_bias else "UMT5EncoderModel"],
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": config.eps,
        "model_type": "t5" if config.shared_bias else "umt5",
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.num_buckets,
        "vocab_size": config.vocab_size,
    }


def official_config(config: T5Config) -> None:
    """The official format has no config.json. Raises UserError for a T5 v1.1."""
    if config.shared_bias:
        raise UserError("is a T5 v1.1, the official Wan2.1 format has none: use --format=diffusers")
