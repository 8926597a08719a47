"""The CogVideoX video VAE: clips to latents and back, 4 frames and 8 x 8 pixels to a latent.

It runs in pieces of two latents, 8 frames, and that is part of the model: a group norm takes its
statistics over all frames of a piece. A latent that is left over joins the first piece: 49 frames are
pieces of 9, 8, 8, 8, 8 and 8. Convolutions over time are causal and get the last frames that they saw in the
piece before (`causal_vae.History`). Only the first piece can have an odd length: its frame 0, latent 0, is
not resampled in time. So 8n + 1 frames make 2n + 1 latents, and 8n frames make 2n. CogVideoX1.5 takes an
even number of latents: for it the first one is repeated (`CogVideoXVAE.lead`).

The parameter tree has the paths of the diffusers tensor names, with kernel (T, H, W, in, out) for a
convolution's weight and scale (C,) for a norm's weight.

Legend: B batch, F frames, H W pixels, T latent times, h = H/8, w = W/8, z latent channels, C channels of
a layer. Inside the network T H W are the sizes of a layer.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax import models
from prophy_jax.models.codecs.causal_vae import (
    CausalVAE,
    History,
    Network,
    Params,
    Side,
    Tile,
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

Norm = Callable[[Params, jax.Array], jax.Array]

PIECE = 2  # latents


@dataclasses.dataclass(frozen=True)
class CogVideoXVAEConfig:
    """Sizes of the CogVideoX VAE, by diffusers' names. All its versions have the same weights.

    Attributes:
        block_out_channels: Width of each resolution.
        layers_per_block: Residual blocks at each resolution.
        latent_channels: Channels of a latent.
        temporal_compression_ratio: Frames of one latent, a power of two.
        norm_num_groups: Groups of channels that a norm takes together.
        norm_eps: Added to the variance in norms.
        scaling_factor: What latents are multiplied with: 0.7 for the transformers 5B and 1.5, 1.15258426 for
            2B (CogVideoX reference code).
    """

    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    latent_channels: int = 16
    temporal_compression_ratio: int = 4
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    scaling_factor: float = 0.7

    @property
    def space(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def time(self) -> int:
        """Frames of one latent, that of a single frame excepted."""
        return self.temporal_compression_ratio

    def resamples_time(self, block: int) -> bool:
        """Whether that block of the encoder or decoder has half or twice the frames, not only pixels."""
        return 2**block < self.time


def _causal_conv(p: Params, x: jax.Array, history: History) -> jax.Array:
    """Three frames long: each frame sees itself and the two before it, frame 0 before the clip."""
    t = x.shape[1]
    x = history.prepend(x, x[:, :1].repeat(2, axis=1))
    return conv(p["conv"], x[:, :t], x[:, 1 : t + 1], x[:, 2:])


def _group_norm(config: CogVideoXVAEConfig, p: Params, x: jax.Array) -> jax.Array:
    """Over all frames and pixels of a piece and the channels of a group. fp32 whatever x is."""
    c, groups = x.shape[-1], config.norm_num_groups

    def mean(x: jax.Array) -> jax.Array:
        channels = x.mean(axis=(1, 2, 3))  # (B, T, H, W, C) -> (B, C)
        means = channels.reshape(-1, groups, c // groups).mean(axis=-1)  # (B, C) -> (B, groups)
        return means.repeat(c // groups, axis=-1)[:, None, None, None]  # (B, 1, 1, 1, C)

    x = x.astype(jnp.float32)
    x = x - mean(x)
    return x * (jax.lax.rsqrt(mean(x * x) + config.norm_eps) * p["scale"]) + p["bias"]


def _spatial_norm(config: CogVideoXVAEConfig, latents: jax.Array, p: Params, x: jax.Array) -> jax.Array:
    """Group norm, then scaled and shifted by the latents (B, T, h, w, z) fp32 of the piece. fp32."""
    x = _group_norm(config, p["norm_layer"], x)
    # Each of these convolutions sees one latent only, so that its result can be repeated in place of its
    # input. Broadcasting repeats it without memory, if frame 0 of an odd piece joins the rest afterwards.
    scale, shift = conv(p["conv_y"]["conv"], latents), conv(p["conv_b"]["conv"], latents)

    def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
        if 0 in x.shape:
            return x
        (b, t, h, w, c), (_, times, rows, columns, _) = x.shape, scale.shape
        # (B, T', H', W', C) -> (B, T, T'/T, h, H'/h, w, W'/w, C)
        y = x.reshape(b, times, t // times, rows, h // rows, columns, w // columns, c)
        scale, shift = (a[:, :, None, :, None, :, None] for a in (scale, shift))
        return (y * scale + shift).reshape(x.shape)

    n = x.shape[1] % 2
    first = modulate(x[:, :n], scale[:, :n], shift[:, :n])
    rest = modulate(x[:, n:], scale[:, n:], shift[:, n:])
    return jnp.concatenate([first, rest], axis=1)


def _activation(norm: Norm, p: Params, x: jax.Array) -> jax.Array:
    return jax.nn.silu(norm(p, x).astype(x.dtype))


def _res_block(norm: Norm, p: Params, x: jax.Array, history: History) -> jax.Array:
    y = _causal_conv(p["conv1"], _activation(norm, p["norm1"], x), history)
    y = _causal_conv(p["conv2"], _activation(norm, p["norm2"], y), history)
    return y + (conv(p["conv_shortcut"], x) if "conv_shortcut" in p else x)


def _res_blocks(norm: Norm, p: Params, x: jax.Array, history: History) -> jax.Array:
    for resnet in list_blocks(p["resnets"]):
        x = _res_block(norm, resnet, x, history)
    return x


def _output(norm: Norm, p: Params, x: jax.Array, history: History) -> jax.Array:
    return _causal_conv(p["conv_out"], _activation(norm, p["norm_out"], x), history)


def _downsample(p: Params, x: jax.Array, time: bool) -> jax.Array:
    """Halves rows and columns and, if `time`, the frames: means of pairs; an odd frame 0 stays alone."""
    if time:
        b, t, *frame = x.shape
        n = t % 2
        pairs = x[:, n:].reshape(b, t // 2, 2, *frame).mean(axis=2)  # (B, 2T', ...) -> (B, T', ...)
        x = jnp.concatenate([x[:, :n], pairs], axis=1)
    return conv(p["conv"], x, stride=2)


def _upsample(p: Params, x: jax.Array, time: bool) -> jax.Array:
    """Doubles rows and columns and, if `time`, the frames after an odd frame 0."""
    if time:
        n = x.shape[1] % 2
        x = jnp.concatenate([x[:, :n], x[:, n:].repeat(2, axis=1)], axis=1)
    x = x.repeat(2, axis=2).repeat(2, axis=3)  # nearest pixel
    return conv(p["conv"], x)


def encoder(config: CogVideoXVAEConfig, params: Params, x: jax.Array, history: History) -> jax.Array:
    """Frames (B, F, H, W, 3) of a piece -> mean and log-variance (B, T, h, w, 2z)."""
    p, norm = params["encoder"], functools.partial(_group_norm, config)
    x = _causal_conv(p["conv_in"], _cast_like(x, p), history)
    for i, block in enumerate(list_blocks(p["down_blocks"])):
        x = _res_blocks(norm, block, x, history)
        for downsampler in list_blocks(block.get("downsamplers", {})):
            x = _downsample(downsampler, x, config.resamples_time(i))
    return _output(norm, p, _res_blocks(norm, p["mid_block"], x, history), history)


def decoder(config: CogVideoXVAEConfig, params: Params, x: jax.Array, history: History) -> jax.Array:
    """Latents (B, T, h, w, z) fp32 of a piece -> frames (B, F, H, W, 3), unclipped."""
    p, norm = params["decoder"], functools.partial(_spatial_norm, config, x)
    x = _causal_conv(p["conv_in"], _cast_like(x, p), history)
    x = _res_blocks(norm, p["mid_block"], x, history)
    for i, block in enumerate(list_blocks(p["up_blocks"])):
        x = _res_blocks(norm, block, x, history)
        for upsampler in list_blocks(block.get("upsamplers", {})):
            x = _upsample(upsampler, x, config.resamples_time(i))
    return _output(norm, p, x, history)


def _cast_like(x: jax.Array, p: Params) -> jax.Array:
    """x in the dtype that convolutions compute in."""
    return x.astype(p["conv_in"]["conv"]["kernel"].dtype)


def _causal_shape(inputs: int, outputs: int) -> dict[str, Any]:
    return {"conv": conv_shape((3, 3, 3), inputs, outputs)}


def _norm_shape(c: int, z: int | None) -> dict[str, Any]:
    """Of a group norm, or of a spatial norm if z latent channels are given."""
    norm = {"scale": (c,), "bias": (c,)}
    if z is None:
        return norm
    return {
        "norm_layer": norm,
        "conv_y": {"conv": conv_shape((1, 1, 1), z, c)},
        "conv_b": {"conv": conv_shape((1, 1, 1), z, c)},
    }


def _res_shapes(inputs: int, outputs: int, count: int, z: int | None) -> dict[str, Any]:
    """Of `count` residual blocks."""
    blocks = []
    for c in [inputs] + [outputs] * (count - 1):
        block = {
            "norm1": _norm_shape(c, z),
            "conv1": _causal_shape(c, outputs),
            "norm2": _norm_shape(outputs, z),
            "conv2": _causal_shape(outputs, outputs),
        }
        if c != outputs:
            block["conv_shortcut"] = conv_shape((1, 1, 1), c, outputs)
        blocks.append(block)
    return {"resnets": index_keys(blocks)}


def _half_shape(
    widths: tuple[int, ...], layers: int, sampler: str, inputs: int, outputs: int, z: int | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(blocks, the rest) of the encoder or decoder, whose widths are given from its input to its output."""
    blocks, c = [], widths[0]
    for i, width in enumerate(widths):
        block = _res_shapes(c, width, layers, z)
        if i < len(widths) - 1:
            block[sampler] = index_keys([{"conv": conv_shape((3, 3), width, width)}])
        blocks.append(block)
        c = width
    ends = {
        "conv_in": _causal_shape(inputs, widths[0]),
        "norm_out": _norm_shape(c, z),
        "conv_out": _causal_shape(c, outputs),
    }
    return blocks, ends


def _shapes(config: CogVideoXVAEConfig) -> dict[str, Any]:
    """The shape of every parameter."""
    widths, layers, z = config.block_out_channels, config.layers_per_block, config.latent_channels
    middle = widths[-1]
    down, ends = _half_shape(widths, layers, "downsamplers", 3, 2 * z, None)
    encoder = {**ends, "down_blocks": index_keys(down), "mid_block": _res_shapes(middle, middle, 2, None)}
    up, ends = _half_shape(widths[::-1], layers + 1, "upsamplers", z, 3, z)
    decoder = {**ends, "up_blocks": index_keys(up), "mid_block": _res_shapes(middle, middle, 2, z)}
    return {"encoder": encoder, "decoder": decoder}


@dataclasses.dataclass(frozen=True)
class CogVideoXVAE(CausalVAE):
    """The CogVideoX VAE; see `CausalVAE`.

    Attributes:
        config: Sizes.
        dtype: Of convolutions. Norms, latents and frames are fp32 whatever it is.
        tile: ((size, stride) of rows, (size, stride) of columns) in pixels, or one (size, stride) for both:
            a clip with a side above its size is cut into tiles that overlap by size - stride, run one
            after another and blended. The result differs from the untiled one, more than the Wan VAE's
            does: a tile sees zeros beyond its border, and its norms see the tile alone. None: off.
        lead: How many copies of a clip's first latent `encode` puts before it and `decode` drops, whatever
            is in their place. 1 for the transformer 1.5, whose patches are two latents long, else 0.
        encode_whole: Encode a clip in one piece, as the CogVideoX reference code does to train; diffusers
            encodes in pieces, the default. Above 9 frames the latents differ, as norms see the whole clip,
            and memory grows with its length. Decoding is in pieces in both.
    """

    config: CogVideoXVAEConfig
    dtype: Any = jnp.float32
    tile: Tile | None = None
    lead: int = 0
    encode_whole: bool = False

    name = "CogVideoX VAE"
    shapes = staticmethod(_shapes)
    encoder = staticmethod(encoder)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, h, w, z) of a clip of that size, its lead included.

        Raises:
            UserError: unless frames are 1, 8n or 8n + 1, and height and width are multiples of 8. The
                reference code takes other counts too, but decodes the latents to another count. With a
                lead, unless frames are 16n + 1, as the model card of CogVideoX1.5 says; its patches alone
                would divide all of 8n + 1.
        """
        space, piece = self.config.space, PIECE * self.config.time
        if self.lead and (frames < 1 or frames % (2 * piece) != 1):
            short = max(frames - 1, 0) // (2 * piece) * 2 * piece
            raise UserError(
                f"CogVideoX VAE: {frames} frames are not {2 * piece}n + 1, as CogVideoX1.5 takes them: cut "
                f"the clip to {short + 1} frames or extend it to {short + 2 * piece + 1}"
            )
        if frames < 1 or (frames != 1 and frames % piece > 1):
            short = max(frames, 0) // piece * piece
            raise UserError(
                f"CogVideoX VAE: {frames} frames are neither {piece}n nor {piece}n + 1: cut the clip to "
                f"{short + 1} frames or extend it to {short + piece}"
            )
        check_sides(self.name, height, width, space)
        times = self.lead + frames // piece * PIECE + frames % piece
        return times, height // space, width // space, self.config.latent_channels

    def encode(self, params: Params, video: jax.Array) -> jax.Array:
        """(B, F, H, W, 3) in [-1, 1] -> normalised mean latents (B, T, h, w, z) fp32, the lead first.

        The reference code trains its transformer on (mean + deviation * noise) * scaling_factor; the
        noise is left out here, as `moments` has both. Raises UserError as `moments` does.
        """
        latents = self.moments(params, video)[0] * self.config.scaling_factor
        return jnp.concatenate([latents[:, :1].repeat(self.lead, axis=1), latents], axis=1)

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Normalised latents (B, T, h, w, z) -> frames (B, F, 8h, 8w, 3) fp32 in [-1, 1].

        Without the lead, F is 4(T-1)+1 if T is odd, 4T if it is even. Raises UserError on another shape.
        """
        z, lead = self.config.latent_channels, self.lead
        if latents.ndim != 5 or latents.shape[-1] != z or 0 in latents.shape or latents.shape[1] <= lead:
            raise UserError(
                f"CogVideoX VAE: latents must be (B, T, h, w, {z}) with T above {lead}, got {latents.shape}; "
                "bring them to that"
            )
        latents = latents[:, lead:].astype(jnp.float32) / self.config.scaling_factor
        video = self._run(decoder, params, latents, self._latents, self._pixels)
        return jnp.clip(video, -1, 1)

    @property
    def _pixels(self) -> Side:
        return Side(PIECE * self.config.time, self.tile)

    @property
    def _latents(self) -> Side:
        return Side(PIECE, self.tile and (np.array(self.tile) // self.config.space).tolist())

    def _cast(self, path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        """A parameter in the dtype of its layer."""
        in_norm = any("norm" in key.key for key in path)
        return leaf.astype(jnp.float32 if in_norm else self.dtype)

    def _run(
        self, network: Callable[..., jax.Array], params: Params, x: jax.Array, source: Side, target: Side
    ) -> jax.Array:
        """The network on x, piece by piece, tiled or not. Returns fp32."""
        # Here rather than in the layers: once, not once for each piece.
        params = jax.tree.map_with_path(self._cast, params)
        piece: Network = functools.partial(network, self.config)
        whole = self.encode_whole and network is encoder
        pieces = 1 if whole else max(x.shape[1] // source.frames, 1)
        first = x.shape[1] - (pieces - 1) * source.frames

        def run(x: jax.Array) -> jax.Array:
            return in_pieces(piece, params, x, first, source.frames, target.frames).astype(jnp.float32)

        if source.tile and target.tile:
            limits = (size for size, _ in by_axis(source.tile))
            if any(side > limit for side, limit in zip(x.shape[2:4], limits, strict=True)):
                return tiled(run, x, source.tile, target.tile)
        return run(x)


def build(
    dtype: str = "float32",
    tile: Tile | None = None,
    lead: int = 0,
    encode_whole: bool = False,
    **overrides: Any,
) -> CogVideoXVAE:
    """Builds the CogVideoX VAE, or one with some sizes changed.

    Args:
        dtype: Compute dtype, "float32" or "bfloat16".
        tile: See `CogVideoXVAE`; diffusers' choice is ((240, 200), (360, 288)).
        lead: See `CogVideoXVAE`; 0 or 1.
        encode_whole: Encode a clip in one piece, as the reference code does; see `CogVideoXVAE`.
        **overrides: Fields of `CogVideoXVAEConfig`, such as the scaling_factor of 2B.

    Raises:
        UserError: on an unknown dtype, lead or field, or sizes that do not fit together.
    """
    if lead not in (0, 1):
        raise UserError(f"CogVideoX VAE: lead must be 1 for CogVideoX1.5 and 0 for the others, got {lead!r}")
    config = models.configure("CogVideoX VAE", CogVideoXVAEConfig, overrides)
    if any(width % config.norm_num_groups for width in config.block_out_channels):
        raise UserError(
            f"CogVideoX VAE: block_out_channels {config.block_out_channels} must be multiples of "
            f"norm_num_groups = {config.norm_num_groups}"
        )
    if config.time not in (2**i for i in range(len(config.block_out_channels))):
        raise UserError(
            f"CogVideoX VAE: temporal_compression_ratio {config.time} must be a power of two, at most "
            f"{config.space}: a block halves the frames once"
        )
    if not config.scaling_factor > 0:
        raise UserError(f"CogVideoX VAE: scaling_factor must be positive, got {config.scaling_factor}")
    if tile is not None:
        if not _is_tile(tile, config.space):
            raise UserError(
                f"CogVideoX VAE: tile {tile} must be (size, stride) in pixels, or that of rows and that of "
                f"columns, multiples of {config.space}, the stride not above the size"
            )
        rows, columns = by_axis(tile)
        tile = (rows[0], rows[1]), (columns[0], columns[1])
    return CogVideoXVAE(config, models.compute_dtype(dtype), tile, int(lead), encode_whole)


def _is_tile(tile: Any, space: int) -> bool:
    try:
        sides = np.asarray(tile)
    except ValueError:  # of rows and columns of different lengths
        return False
    if sides.dtype.kind != "i" or sides.shape not in ((2,), (2, 2)) or (sides % space).any():
        return False
    return all(0 < stride <= size for size, stride in by_axis(tile))
