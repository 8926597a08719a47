"""The Wan2.1 video VAE: clips to latents and back, 4 frames and 8 x 8 pixels to a latent.

It is causal in time: no latent depends on later frames. Frame 0 makes latent 0 alone, frames 4k-3 .. 4k
make latent k. So a clip can run in pieces: each causal convolution gets the last frames that it
saw in the piece before (`History`). The network below is written once for a piece of any length;
`WanVAE` runs it either on the whole clip or on one latent at a time, in a loop of constant shapes.

The parameter tree has the paths of the diffusers tensor names, with kernel (T, H, W, in, out) for a
convolution's weight and scale (C,) for a norm's gamma.

Legend: B batch, F frames, H W pixels, T latent times, h = H/8, w = W/8, z latent channels, C channels of
a layer. Inside the network T H W are the sizes of a layer.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax import models
from prophy_jax.models.codecs.causal_vae import (
    CausalVAE,
    History,
    Layers,
    Network,
    Params,
    Side,
    by_axis,
    check_sides,
    conv,
    conv_shape,
    in_pieces,
    index_keys,
    list_blocks,
    tiled,
)
from prophy_jax.run.errors import UserError


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of the Wan2.1 VAE, and the statistics of its latents (Wan2.1 reference code).

    Attributes:
        base_dim: Width of the blocks of full resolution.
        z_dim: Channels of a latent.
        dim_mult: Width of each resolution, as a multiple of `base_dim`.
        num_res_blocks: Residual blocks at each resolution.
        temporal_downsample: Whether time is halved too between two resolutions.
        latents_mean: Mean of each channel, which normalising subtracts.
        latents_std: Standard deviation of each channel, which normalising divides by.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    # fmt: off
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on

    @property
    def space(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def time(self) -> int:
        """Frames of one latent, the first excepted."""
        return 2 ** sum(self.temporal_downsample)


def _causal_conv(p: Params, x: jax.Array, history: History) -> jax.Array:
    """Three frames long: each frame sees itself and the two before it, zeros before the clip."""
    b, t, *frame = x.shape
    x = history.prepend(x, jnp.zeros((b, 2, *frame), x.dtype))
    return conv(p, x[:, :t], x[:, 1 : t + 1], x[:, 2:])


def _norm(p: Params, x: jax.Array) -> jax.Array:
    """Root mean square over channels, in fp32. There is no epsilon; the length has a floor."""
    wide = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(wide * wide, axis=-1, keepdims=True))
    wide = wide / jnp.maximum(length, 1e-12) * (math.sqrt(x.shape[-1]) * p["scale"])
    return wide.astype(x.dtype)


def _res_block(p: Params, x: jax.Array, history: History) -> jax.Array:
    y = _causal_conv(p["conv1"], jax.nn.silu(_norm(p["norm1"], x)), history)
    y = _causal_conv(p["conv2"], jax.nn.silu(_norm(p["norm2"], y)), history)
    return y + (conv(p["conv_shortcut"], x) if "conv_shortcut" in p else x)


def _attention(p: Params, x: jax.Array) -> jax.Array:
    """One head over the pixels of each frame alone."""
    b, t, h, w, c = x.shape
    qkv = conv(p["to_qkv"], _norm(p["norm"], x))
    # (B, T, H, W, 3C) -> three of (B T, H W, 1, C)
    q, k, v = jnp.split(qkv.reshape(b * t, h * w, 1, 3 * c), 3, axis=-1)
    # C is 384: more than the fused kernels take.
    y = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return x + conv(p["proj"], y.reshape(x.shape))


def _mid_block(p: Params, x: jax.Array, history: History) -> jax.Array:
    x = _res_block(p["resnets"]["0"], x, history)
    x = _attention(p["attentions"]["0"], x)
    return _res_block(p["resnets"]["1"], x, history)


def _downsample(p: Params, x: jax.Array, history: History) -> jax.Array:
    """Halves rows and columns and, where the block has a time convolution, the frames after frame 0."""
    x = conv(p["resample"]["1"], x, stride=2)
    if "time_conv" not in p:
        return x
    head, rest = history.split_first(x)
    x = history.prepend(rest, head)
    taps = (x[:, :-2:2], x[:, 1:-1:2], x[:, 2::2])  # frames 0 1 2, 2 3 4, ...
    return jnp.concatenate([head, conv(p["time_conv"], *taps)], axis=1)


def _upsample(p: Params, x: jax.Array, history: History) -> jax.Array:
    """Doubles rows and columns and, where the block has a time convolution, the frames after frame 0."""
    if "time_conv" in p:
        head, x = history.split_first(x)
        x = _causal_conv(p["time_conv"], x, history)
        b, t, h, w, c = x.shape
        # Channels hold the earlier and the later frame: (B, T, H, W, 2C) -> (B, 2T, H, W, C)
        x = x.reshape(b, t, h, w, 2, c // 2).transpose(0, 1, 4, 2, 3, 5)
        x = jnp.concatenate([head, x.reshape(b, 2 * t, h, w, c // 2)], axis=1)
    x = x.repeat(2, axis=2).repeat(2, axis=3)  # nearest pixel
    return conv(p["resample"]["1"], x)


def _output(p: Params, x: jax.Array, history: History) -> jax.Array:
    return _causal_conv(p["conv_out"], jax.nn.silu(_norm(p["norm_out"], x)), history)


def encoder(params: Params, x: jax.Array, history: History) -> jax.Array:
    """Frames (B, F, H, W, 3) -> mean and log-variance (B, T, h, w, 2z)."""
    p = params["encoder"]
    stages: list[list[Layers]] = [[functools.partial(_causal_conv, p["conv_in"])]]
    for block in list_blocks(p["down_blocks"]):
        if "time_conv" in block:
            stages.append([])
        layer = _downsample if "resample" in block else _res_block
        stages[-1].append(functools.partial(layer, block))
    stages[-1] += [functools.partial(_mid_block, p["mid_block"]), functools.partial(_output, p)]

    def run(stages: list[list[Layers]], x: jax.Array, history: History) -> jax.Array:
        *earlier, last = stages
        if earlier:  # these run on twice as many frames
            x = history.in_halves(functools.partial(run, earlier), x)
        for layer in last:
            x = layer(x, history)
        return x

    return conv(params["quant_conv"], run(stages, x, history))


def decoder(params: Params, x: jax.Array, history: History) -> jax.Array:
    """Latents (B, T, h, w, z) -> frames (B, F, H, W, 3), unclipped."""
    p = params["decoder"]
    stages: list[list[Layers]] = [
        [functools.partial(_causal_conv, p["conv_in"]), functools.partial(_mid_block, p["mid_block"])]
    ]
    for block in list_blocks(p["up_blocks"]):
        stages[-1] += [functools.partial(_res_block, resnet) for resnet in list_blocks(block["resnets"])]
        for upsampler in list_blocks(block.get("upsamplers", {})):
            stages[-1].append(functools.partial(_upsample, upsampler))
            if "time_conv" in upsampler:
                stages.append([])
    stages[-1].append(functools.partial(_output, p))

    def run(stages: list[list[Layers]], x: jax.Array, history: History) -> jax.Array:
        first, *later = stages
        for layer in first:
            x = layer(x, history)
        return history.in_halves(functools.partial(run, later), x) if later else x

    return run(stages, conv(params["post_quant_conv"], x), history)


def _res_shape(inputs: int, outputs: int) -> dict[str, Any]:
    shapes = {
        "norm1": {"scale": (inputs,)},
        "conv1": conv_shape((3, 3, 3), inputs, outputs),
        "norm2": {"scale": (outputs,)},
        "conv2": conv_shape((3, 3, 3), outputs, outputs),
    }
    if inputs != outputs:
        shapes["conv_shortcut"] = conv_shape((1, 1, 1), inputs, outputs)
    return shapes


def _mid_shape(c: int) -> dict[str, Any]:
    attention = {
        "norm": {"scale": (c,)},
        "to_qkv": conv_shape((1, 1), c, 3 * c),
        "proj": conv_shape((1, 1), c, c),
    }
    return {"resnets": index_keys([_res_shape(c, c)] * 2), "attentions": index_keys([attention])}


def _resample_shape(inputs: int, outputs: int, time: tuple[int, int] | None) -> dict[str, Any]:
    """`time` is the inputs and outputs of the time convolution, if there is one."""
    shapes: dict[str, Any] = {"resample": {"1": conv_shape((3, 3), inputs, outputs)}}
    if time is not None:
        shapes["time_conv"] = conv_shape((3, 1, 1), *time)
    return shapes


def _ends_shape(first: int, inputs: int, last: int, outputs: int) -> dict[str, Any]:
    return {
        "conv_in": conv_shape((3, 3, 3), inputs, first),
        "norm_out": {"scale": (last,)},
        "conv_out": conv_shape((3, 3, 3), last, outputs),
    }


def _encoder_shape(config: WanVAEConfig) -> dict[str, Any]:
    widths = [config.base_dim * m for m in config.dim_mult]
    blocks, c = [], widths[0]
    for i, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            blocks.append(_res_shape(c, width))
            c = width
        if i < len(config.temporal_downsample):
            blocks.append(_resample_shape(c, c, (c, c) if config.temporal_downsample[i] else None))
    ends = _ends_shape(widths[0], 3, c, 2 * config.z_dim)
    return {**ends, "down_blocks": index_keys(blocks), "mid_block": _mid_shape(c)}


def _decoder_shape(config: WanVAEConfig) -> dict[str, Any]:
    widths = [config.base_dim * m for m in reversed(config.dim_mult)]
    temporal = config.temporal_downsample[::-1]
    blocks, c = [], widths[0]
    for i, width in enumerate(widths):
        inputs = [c] + [width] * config.num_res_blocks
        block = {"resnets": index_keys([_res_shape(c, width) for c in inputs])}
        if i < len(temporal):
            time = (width, 2 * width) if temporal[i] else None
            block["upsamplers"] = index_keys([_resample_shape(width, width // 2, time)])
        blocks.append(block)
        c = width // 2  # an upsampler halves the channels
    ends = _ends_shape(widths[0], config.z_dim, widths[-1], 3)
    return {**ends, "up_blocks": index_keys(blocks), "mid_block": _mid_shape(widths[0])}


def _shapes(config: WanVAEConfig) -> dict[str, Any]:
    """The shape of every parameter."""
    return {
        "encoder": _encoder_shape(config),
        "quant_conv": conv_shape((1, 1, 1), 2 * config.z_dim, 2 * config.z_dim),
        "post_quant_conv": conv_shape((1, 1, 1), config.z_dim, config.z_dim),
        "decoder": _decoder_shape(config),
    }


@dataclasses.dataclass(frozen=True)
class WanVAE(CausalVAE):
    """The Wan VAE; see `CausalVAE`.

    Attributes:
        config: Sizes.
        dtype: Of convolutions and attention. Norms, softmax, latents and frames are fp32 whatever it is.
        tile: (size, stride) in pixels: a clip with a side above the size is cut into square tiles that
            overlap by size - stride, run one after another and blended. The result differs slightly from
            the untiled one: a tile sees zeros beyond its border. None: off.
        whole: Run all frames at once instead of a latent at a time: the same values, for short clips.
    """

    config: WanVAEConfig
    dtype: Any = jnp.float32
    tile: tuple[int, int] | None = None
    whole: bool = False

    name = "Wan VAE"
    shapes = staticmethod(_shapes)
    encoder = staticmethod(encoder)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, h, w, z) of a clip of that size.

        Raises:
            UserError: unless frames = 4n + 1 and height and width are multiples of 8. The reference
                code drops the frames that are left over; here the caller cuts them off.
        """
        time, space = self.config.time, self.config.space
        if frames < 1 or (frames - 1) % time:
            short = max(frames - 1, 0) // time * time + 1
            raise UserError(
                f"Wan VAE: {frames} frames are not {time}n + 1: cut the clip to {short} frames"
                f" or extend it to {short + time}"
            )
        check_sides(self.name, height, width, space)
        return (frames - 1) // time + 1, height // space, width // space, self.config.z_dim

    def encode(self, params: Params, video: jax.Array) -> jax.Array:
        """(B, F, H, W, 3) in [-1, 1] -> normalised mean latents (B, T, h, w, z) fp32.

        These are what the transformer is trained on (Wan2.1 reference code: no sampling). Raises
        UserError as `moments` does.
        """
        mean, std = self._statistics()
        return (self.moments(params, video)[0] - mean) / std

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Normalised latents (B, T, h, w, z) -> frames (B, 4(T-1)+1, 8h, 8w, 3) fp32 in [-1, 1].

        Raises UserError on another shape.
        """
        z = self.config.z_dim
        if latents.ndim != 5 or latents.shape[-1] != z or 0 in latents.shape:
            raise UserError(
                f"Wan VAE: latents must be (B, T, h, w, {z}), got {latents.shape}; bring them to that"
            )
        mean, std = self._statistics()
        latents = latents.astype(jnp.float32) * std + mean
        video = self._run(decoder, params, latents, self._latents, self._pixels)
        return jnp.clip(video, -1, 1)

    @property
    def _pixels(self) -> Side:
        return Side(self.config.time, self.tile)

    @property
    def _latents(self) -> Side:
        tile = self.tile and (self.tile[0] // self.config.space, self.tile[1] // self.config.space)
        return Side(1, tile)

    def _statistics(self) -> np.ndarray:
        """Mean and standard deviation (2, z) of the latents."""
        return np.array([self.config.latents_mean, self.config.latents_std], np.float32)

    def _cast(self, path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        """A parameter in the dtype of its layer."""
        return leaf.astype(jnp.float32 if path[-1].key == "scale" else self.dtype)

    def _run(self, network: Network, params: Params, x: jax.Array, source: Side, target: Side) -> jax.Array:
        """The network on x, piece by piece or whole, tiled or not. Returns fp32."""
        # Here rather than in the layers: once, not once for each piece.
        params = jax.tree.map_with_path(self._cast, params)

        def run(x: jax.Array) -> jax.Array:
            if self.whole:
                y = network(params, x, History(None))
            else:
                y = in_pieces(network, params, x, 1, source.frames, target.frames)
            return y.astype(jnp.float32)

        x = x.astype(self.dtype)
        if source.tile and target.tile and max(x.shape[2:4]) > by_axis(source.tile)[0][0]:
            return tiled(run, x, source.tile, target.tile)
        return run(x)


def build(
    dtype: str = "float32", tile: tuple[int, int] | None = None, whole: bool = False, **overrides: Any
) -> WanVAE:
    """Builds the Wan2.1 VAE, or one with some sizes changed.

    Args:
        dtype: Compute dtype, "float32" or "bfloat16".
        tile: See `WanVAE`; diffusers' choice is (256, 192).
        whole: See `WanVAE`.
        **overrides: Fields of `WanVAEConfig`.

    Raises:
        UserError: on an unknown dtype or field, or sizes that do not fit together.
    """
    config = models.configure("Wan VAE", WanVAEConfig, overrides)
    if len(config.temporal_downsample) != len(config.dim_mult) - 1:
        raise UserError(
            f"Wan VAE: temporal_downsample has {len(config.temporal_downsample)} entries, "
            f"dim_mult {len(config.dim_mult)}: it must have one fewer"
        )
    for name in ("latents_mean", "latents_std"):
        if len(getattr(config, name)) != config.z_dim:
            raise UserError(f"Wan VAE: {name} must have z_dim = {config.z_dim} entries")
    if tile is not None:
        tile = tuple(np.atleast_1d(tile).tolist())
        if len(tile) != 2 or not 0 < tile[1] <= tile[0] or any(side % config.space for side in tile):
            raise UserError(
                f"Wan VAE: tile {tile} must be (size, stride) in pixels, multiples of {config.space}, "
                "the stride not above the size"
            )
    return WanVAE(config, models.compute_dtype(dtype), tile, whole)
