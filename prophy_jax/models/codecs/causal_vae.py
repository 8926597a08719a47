"""What the causal video VAEs share: clips in pieces and in tiles, convolutions, parameter trees.

A causal network can run on a clip in pieces: each convolution over time gets the last frames that it saw
in the piece before (`History`). It is written once for a piece of any length.

Legend: B batch, T H W frames, rows and columns of a layer, C its channels.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prophy_jax.run.errors import UserError

Params = Mapping[str, Any]
Layers = Callable[[jax.Array, "History"], jax.Array]
Network = Callable[[Params, jax.Array, "History"], jax.Array]
Tile = tuple[int, int] | tuple[tuple[int, int], tuple[int, int]]  # size and stride, or those of rows, columns


class Side(NamedTuple):
    """Sizes at one end of the network: in frames and pixels, or in latents."""

    frames: int  # of a piece
    tile: Tile | None


class History:
    """What the convolutions over time keep of a clip from one piece to the next, in order of execution.

    Args:
        past: `present` of the piece before; None for the first piece.

    Attributes:
        first: Whether this is the first piece.
        present: What the next piece needs.
    """

    def __init__(self, past: list[Any] | None):
        self.first = past is None
        self.present: list[Any] = []
        self._past = iter(past or ())

    def prepend(self, x: jax.Array, start: jax.Array) -> jax.Array:
        """x after the frames kept from the piece before, `start` in the first piece.

        As many frames, the last of the result, are kept for the next piece.
        """
        past = start if self.first else next(self._past)
        x = jnp.concatenate([past, x], axis=1)
        # The barrier makes the compiler cut the kept frames from the joined ones at once. Without it, it cuts
        # them from the parts at the end of the piece, and every layer's parts stay in memory until then.
        x, kept = lax.optimization_barrier((x, x[:, -past.shape[1] :]))
        self.present.append(kept)
        return x

    def split_first(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(frame 0 of the clip or nothing, the other frames), where frame 0 is not resampled in time."""
        n = int(self.first)
        return x[:, :n], x[:, n:]

    def in_halves(self, layers: Layers, x: jax.Array) -> jax.Array:
        """Runs layers on the first half of the frames and then on the second; the first piece undivided."""
        if self.first:
            inner = History(None)
            x = layers(x, inner)
            self.present.append(inner.present)
            return x

        def step(past: list[Any], half: jax.Array) -> tuple[list[Any], jax.Array]:
            inner = History(past)
            y = layers(half, inner)
            return inner.present, y

        b, t, *rest = x.shape
        halves = jnp.moveaxis(x.reshape(b, 2, t // 2, *rest), 1, 0)  # (B, T, ...) -> (2, B, T/2, ...)
        present, y = lax.scan(step, next(self._past), halves)
        self.present.append(present)
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(b, -1, *y.shape[3:])  # (B, 2, T', ...) -> (B, 2 T', ...)


def check_sides(model: str, height: int, width: int, space: int) -> None:
    """Raises UserError unless both sides of a clip are positive multiples of `space` pixels."""
    if min(height, width) < 1 or height % space or width % space:
        raise UserError(
            f"{model}: {height} x {width} pixels (H x W) are not multiples of {space}: "
            "crop or resize the clip"
        )


def check_video(model: str, video: jax.Array) -> None:
    """Raises UserError unless a video is (B, F, H, W, 3) floating point."""
    if video.ndim != 5 or video.shape[-1] != 3 or not jnp.issubdtype(video.dtype, jnp.floating):
        raise UserError(
            f"{model}: a video must be (B, F, H, W, 3) floating point in [-1, 1], "
            f"got {video.shape} {video.dtype}; convert it"
        )


def conv(p: Params, *taps: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution over time and space.

    Space is padded by half the kernel; at stride 2 it is padded at the right and bottom only.

    Args:
        p: kernel (T, H, W, in, out), or (H, W, in, out) for single frames, and bias.
        *taps: (B, T, H, W, C) each: what each of the kernel's frames sees.
        stride: In rows and columns.
    """
    kernel = p["kernel"]
    if kernel.ndim == 4:
        kernel = kernel[None]
    side = kernel.shape[1]
    pad = (0, 1) if stride == 2 else (side // 2, side // 2)
    b, t, *frame = taps[0].shape

    # A sum of two-dimensional convolutions: on CPUs up to twice as fast as a three-dimensional one.
    y = p["bias"]
    for tap, weights in zip(taps, kernel, strict=True):
        y = y + lax.conv_general_dilated(
            tap.reshape(b * t, *frame),  # (B, T, H, W, C) -> (B T, H, W, C)
            weights,
            window_strides=(stride, stride),
            padding=(pad, pad),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    return y.reshape(b, t, *y.shape[1:])  # (B T, H', W', C') -> (B, T, H', W', C')


def list_blocks(blocks: Params) -> list[Params]:
    """The values of a dict with the keys "0", "1", ..."""
    return [blocks[str(i)] for i in range(len(blocks))]


def conv_shape(kernel: tuple[int, ...], inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of one convolution."""
    return {"kernel": (*kernel, inputs, outputs), "bias": (outputs,)}


def index_keys(blocks: list[Any]) -> dict[str, Any]:
    """The dict that `list_blocks` reads."""
    return {str(i): block for i, block in enumerate(blocks)}


def draw(key: jax.Array, shapes: Any) -> Any:
    """Random fp32 parameters of a tree of shapes: kernels of variance 1 / fan-in, biases 0, scales 1."""
    leaves, treedef = jax.tree.flatten_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple))
    drawn = []
    for i, (path, shape) in enumerate(leaves):
        if path[-1].key == "kernel":
            noise = jax.random.normal(jax.random.fold_in(key, i), shape)
            drawn.append(noise / math.sqrt(math.prod(shape[:-1])))
        else:
            drawn.append(jnp.full(shape, float(path[-1].key == "scale")))
    return jax.tree.unflatten(treedef, drawn)


def in_pieces(
    network: Network, params: Params, x: jax.Array, first: int, frames_in: int, frames_out: int
) -> jax.Array:
    """Runs the network piece by piece: memory does not grow with the length of the clip.

    The first piece is `first` frames of x; each further `frames_in` of x make `frames_out` of the result.
    """

    def run(piece: jax.Array, past: list[Any] | None) -> tuple[jax.Array, list[Any]]:
        history = History(past)
        return network(params, piece, history), history.present

    head, start = run(x[:, :first], None)
    steps = (x.shape[1] - first) // frames_in
    if steps == 0:
        return head
    done = head.shape[1]
    out = jnp.zeros((head.shape[0], done + steps * frames_out, *head.shape[2:]), head.dtype)
    out = out.at[:, :done].set(head)

    # The loop carries the result and writes each piece to its place: nothing is joined afterwards.
    def step(i: jax.Array, carry: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, list[Any]]:
        out, past = carry
        piece = lax.dynamic_slice_in_dim(x, first + i * frames_in, frames_in, axis=1)
        y, present = run(piece, past)
        return lax.dynamic_update_slice_in_dim(out, y, done + i * frames_out, axis=1), present

    out, _ = lax.fori_loop(0, steps, step, (out, start))
    return out


def by_axis(tile: Tile) -> list[list[int]]:
    """[size, stride] in rows, [size, stride] in columns."""
    return np.broadcast_to(tile, (2, 2)).tolist()


def _blend(before: jax.Array, tile: jax.Array, overlap: int, axis: int) -> jax.Array:
    """The tile, its first `overlap` rows or columns faded in from the last ones of the tile before."""
    overlap = min(before.shape[axis], tile.shape[axis], overlap)
    ramp = (jnp.arange(overlap) / max(overlap, 1)).reshape(-1, *[1] * (tile.ndim - 1 - axis))
    old = lax.slice_in_dim(before, before.shape[axis] - overlap, None, axis=axis)
    new = lax.slice_in_dim(tile, 0, overlap, axis=axis)
    rest = lax.slice_in_dim(tile, overlap, None, axis=axis)
    return jnp.concatenate([old * (1 - ramp) + new * ramp, rest], axis=axis)


def tiled(
    run: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    tile_in: Tile,
    tile_out: Tile,
) -> jax.Array:
    """`run` on overlapping tiles of x (B, T, H, W, C), blended linearly (diffusers' tiled VAE).

    Tiles are cut at multiples of the stride; the last ones are smaller. Tiles of one shape run in one
    loop, so that the program holds the network once per shape, not once per tile.

    Args:
        run: The network, for one tile.
        x: The whole clip.
        tile_in: Size and stride in rows and columns of x, of both or of each.
        tile_out: The same, in rows and columns of the result.
    """
    (height, row_stride), (width, column_stride) = by_axis(tile_in)
    (height_out, row_stride_out), (width_out, column_stride_out) = by_axis(tile_out)
    rows, columns = range(0, x.shape[2], row_stride), range(0, x.shape[3], column_stride)
    corners = defaultdict(list)
    for i in rows:
        for j in columns:
            corners[min(height, x.shape[2] - i), min(width, x.shape[3] - j)].append((i, j))

    tiles: dict[tuple[int, int], jax.Array] = {}
    for shape, group in corners.items():

        def run_at(corner: jax.Array, shape: tuple[int, int] = shape) -> jax.Array:
            start = (0, 0, corner[0], corner[1], 0)
            return run(lax.dynamic_slice(x, start, (*x.shape[:2], *shape, x.shape[-1])))

        tiles.update(zip(group, lax.map(run_at, jnp.array(group)), strict=True))

    joined = []
    for i in rows:
        strips = []
        for j in columns:
            if i > 0:
                above = tiles[i - row_stride, j]
                tiles[i, j] = _blend(above, tiles[i, j], height_out - row_stride_out, axis=2)
            if j > 0:
                before = tiles[i, j - column_stride]
                tiles[i, j] = _blend(before, tiles[i, j], width_out - column_stride_out, axis=3)
            strips.append(tiles[i, j][:, :, :row_stride_out, :column_stride_out])
        joined.append(jnp.concatenate(strips, axis=3))
    return jnp.concatenate(joined, axis=2)


@dataclasses.dataclass(frozen=True)
class CausalVAE:
    """Pure functions of a parameter tree {"encoder", "decoder", ...}.

    In fp32, convolutions follow the setting `jax_default_matmul_precision`, whose default on GPUs and
    TPUs is less than fp32. Under `jit`, a clip sharded over batch, rows or columns stays so in all
    layers if the devices divide that side, counted in latents.
    """

    config: Any

    name: ClassVar[str]  # as messages call the model
    shapes: ClassVar[Any]  # config -> the shape of every parameter
    encoder: ClassVar[Any]  # the network that `_run` takes

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random fp32 parameters: kernels of variance 1 / fan-in, biases 0, scales 1."""
        return draw(key, self.shapes(self.config))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(T, h, w, z) of a clip of that size. Raises UserError on a size that the model does not take."""
        raise NotImplementedError

    def moments(self, params: Params, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the latents, as the network gives them: without a lead.

        Args:
            params: The whole tree.
            video: (B, F, H, W, 3) in [-1, 1].

        Returns:
            (B, T, h, w, z) fp32 each, the log-variance clipped to [-30, 20].

        Raises:
            UserError: on another shape, see `latent_shape`, or integers.
        """
        check_video(self.name, video)
        self.latent_shape(*video.shape[1:4])
        moments = self._run(self.encoder, params, video, self._pixels, self._latents)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30, 20)

    @property
    def _pixels(self) -> Side:
        raise NotImplementedError

    @property
    def _latents(self) -> Side:
        raise NotImplementedError

    def _run(
        self, network: Callable[..., jax.Array], params: Params, x: jax.Array, source: Side, target: Side
    ) -> jax.Array:
        """The network on x, piece by piece, tiled or not. Returns fp32."""
        raise NotImplementedError
