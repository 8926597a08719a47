"""What a video transformer offers to whatever is trained next to it, and the loop that runs both.

A backbone is three pure functions of a parameter tree, embed -> blocks -> head, on a `Stream` of tokens.
A part (`prophy_jax.models.beside.part`) uses these and nothing else of it. While the blocks run, a part may
look at the stream and change it after any of them: it says where in a `Visit`, and `run` calls it.

Legend: B batch, T h w latent grid, c latent channels, T' H' W' token grid, N = T' H' W' tokens
(frame-major), C width, L text length, D text feature width.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from prophy_jax.models import attention, layers

Params = Mapping[str, Any]


class Stream(flax.struct.PyTreeNode):
    """The tokens that blocks transform. Wan leaves text as it is; joint models change both."""

    video: jax.Array  # (B, N, C)
    text: jax.Array  # (B, L, C)


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Sizes that every video transformer has, and that parts read.

    Attributes:
        dim: C, the width of the token stream.
        num_heads: Heads of the attention over the video.
        num_layers: How many blocks.
        ffn_dim: Width between the two layers of a block's MLP.
        text_dim: D, the width of text features.
        text_len: L, the rows of text that the public weights were trained on.
        in_channels: c, of the latents that come in.
        out_channels: c, of the prediction.
        patch_size: Latent times, rows and columns of one token.
        eps: Of the blocks' norms.
    """

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    text_dim: int = 4096
    text_len: int = 512
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_volume(self) -> int:
        frames, rows, columns = self.patch_size
        return frames * rows * columns


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Pure functions of a parameter tree {"embed", "blocks", "head"}.

    The leaves of "blocks" have a leading layer axis. `blocks` runs any such stack, the backbone's own or
    copies of some of its blocks. A model file gives the four Linen modules and the methods that are abstract
    here.

    Attributes:
        config: Sizes.
        dtype: Of the token stream and the large matrix products. Norms, modulation, softmax, the
            time embedding and the output are fp32 whatever it is.
        remat: What the backward pass recomputes, see `attention.remat`.
        attention: (q, k, v, bias) -> out, see `attention.attention`.
    """

    config: Any
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: Callable[..., jax.Array] = attention.attention

    # Linen modules: Embed and TextEmbed (config, dtype), Block (config, dtype, attention), Head (config).
    modules: ClassVar[tuple[Any, Any, Any, Any]]

    def init(self, key: jax.Array, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """Draws parameters as the reference code of the model does."""
        config = self.config
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        latents = jnp.zeros((1, *config.patch_size, config.in_channels))
        one_text = jnp.zeros((1, 1, config.text_dim))
        params = {
            "embed": {
                **self._embed.init(embed_key, latents, jnp.zeros((1,)))["params"],
                **self._text_embed.init(embed_key, one_text)["params"],
            },
            "blocks": jax.vmap(self._init_block)(jax.random.split(blocks_key, config.num_layers)),
            "head": self._init_head(head_key),
        }
        return jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)

    def embed(self, params: Params, latents: jax.Array, t: jax.Array, text: jax.Array) -> tuple[Stream, Any]:
        """Turns latents and times into tokens, which join the text tokens that `embed_text` made.

        Args:
            params: The whole tree.
            latents: (B, T, h, w, c), normalised.
            t: (B,), the time in the units of the model: Wan 0..1000, CogVideoX 0..999.
            text: Text tokens (B, L, C).

        Returns:
            The stream, and what every block and the head need besides it: its `time` and `grid` are those
            that the head reads, its `rope` has a row for every token that attention rotates.

        Raises:
            ValueError: on shapes that do not fit the model.
        """
        grid = self.grid(latents.shape)
        layers.check_inputs(latents, t, text, self.config.in_channels)
        video, cond = self._condition(params["embed"], latents, t, text.shape[1], grid)
        return Stream(video, text), cond

    def embed_text(self, params: Params, text: jax.Array) -> jax.Array:
        """Turns text features (B, L, D) into text tokens (B, L, C).

        The model attends to every row it is given, those of padding included. It was trained on
        L = `config.text_len` rows, padded as its text encoder pads: fewer rows are a different input.

        Raises:
            ValueError: on another width D.
        """
        layers.check_text(text, self.config.text_dim)
        return self._text_embed.apply({"params": params["embed"]}, text)

    def text_ahead(
        self, stacked_params: Params, text: jax.Array, mask: jax.Array, rows: int | None = None
    ) -> Any:
        """What a stack of blocks computes of the text alone, once for all steps of a sampler.

        Args:
            stacked_params: The stack, with a leading layer axis.
            text: (B, L, C).
            mask: (B, L) bool, the valid rows.
            rows: Keep this many rows, where the model allows it.

        Returns:
            What `blocks` takes as `ahead`; None where nothing can be computed ahead.
        """
        return None

    def blocks(
        self,
        stacked_params: Params,
        stream: Stream,
        cond: Any,
        start: int | jax.Array = 0,
        count: int | None = None,
        ahead: Any = None,
    ) -> Stream:
        """Runs blocks of a stack, whose leaves have a leading layer axis.

        Args:
            stacked_params: The stack.
            stream: Tokens.
            cond: Of `embed`.
            start: The first block, possibly traced.
            count: How many; None for all of the stack.
            ahead: What `text_ahead` made of the text for the same stack, read in place of `stream.text`.

        Raises:
            ValueError: when the stack has no such range.
        """
        raise NotImplementedError

    def head(self, params: Params, stream: Stream, cond: Any) -> jax.Array:
        """Tokens -> the prediction (B, T, h, w, c) fp32. params is the whole tree."""
        return self._head.apply({"params": params["head"]}, stream.video, cond.time, cond.grid)

    def __call__(self, params: Params, latents: jax.Array, t: jax.Array, text: jax.Array) -> jax.Array:
        """embed, all blocks, head: the prediction, (B, T, h, w, c) fp32, from text features (B, L, D)."""
        stream, cond = self.embed(params, latents, t, self.embed_text(params, text))
        stream = self.blocks(params["blocks"], stream, cond)
        return self.head(params, stream, cond)

    def grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """The token grid (T', H', W') of latents (..., T, h, w, c).

        Raises:
            ValueError: when a side is not a multiple of the patch.
        """
        return layers.token_grid(latent_shape, self.config.patch_size)

    def _condition(
        self, params: Params, latents: jax.Array, t: jax.Array, text_len: int, grid: tuple[int, int, int]
    ) -> tuple[jax.Array, Any]:
        """Video tokens (B, N, C) and the conditioning, from the parameters of the embedding."""
        raise NotImplementedError

    def _init_block(self, key: jax.Array) -> Params:
        raise NotImplementedError

    def _init_head(self, key: jax.Array) -> Params:
        raise NotImplementedError

    @property
    def _embed(self) -> Any:
        return self.modules[0](self.config, self.dtype)

    @property
    def _text_embed(self) -> Any:
        return self.modules[1](self.config, self.dtype)

    @property
    def _block(self) -> Any:
        return self.modules[2](self.config, self.dtype, self.attention)

    @property
    def _head(self) -> Any:
        return self.modules[3](self.config)


class Visit(NamedTuple):
    """What a part does after some of the backbone's blocks.

    Attributes:
        after: The blocks, ascending.
        do: (carry, stream, x) -> (carry, stream, out). The carry goes from one visit to the next.
        xs: A tree whose leaves have a leading axis len(after): x is one slice of it a visit.
    """

    after: tuple[int, ...]
    do: Callable[[Any, Stream, Any], tuple[Any, Stream, Any]]
    xs: Any = ()


def run(
    backbone: Backbone,
    stack: Params,
    stream: Stream,
    cond: Any,
    visits: Sequence[Visit],
    carry: Any,
    ahead: Any = None,
) -> tuple[Stream, Any, tuple[Any, ...]]:
    """Runs all blocks of a stack, with visits in between; those after the same block in their order.

    Neighbouring visits of one kind with as many blocks before each share a compiled body, a scan. The first
    is apart: where nothing before it is trained, the blocks before it have no backward pass.

    Args:
        backbone: Runs the blocks.
        stack: Their parameters, with a leading layer axis.
        stream: Tokens.
        cond: Of `embed`.
        visits: Any number.
        carry: Goes through all visits.
        ahead: Of `text_ahead`, for this stack.

    Returns:
        The stream, the carry, and for every visit what its `do` gave out, with a leading axis len(after);
        None for a visit after no block.

    Raises:
        ValueError: on a visit after a block that the stack does not have, or that is not in order.
    """
    depth = jax.tree.leaves(stack)[0].shape[0]
    for visit in visits:
        if list(visit.after) != sorted(set(visit.after) & set(range(depth))):
            raise ValueError(f"a visit after blocks {visit.after} of {depth}: name them once, ascending")
    # (visit, blocks before it, whether it is the first of all, first of these, slice)
    stops: list[tuple[int, int, bool, int, int]] = []
    done = 0
    for block, v, i in sorted((b, v, i) for v, visit in enumerate(visits) for i, b in enumerate(visit.after)):
        stops.append((v, block + 1 - done, not stops, done, i))
        done = block + 1
    outs: list[list[Any]] = [[] for _ in visits]
    for (v, count, _), equal in itertools.groupby(stops, lambda stop: stop[:3]):
        group = list(equal)
        starts = jnp.array([stop[3] for stop in group])
        xs = jax.tree.map(lambda leaf: leaf[group[0][4] : group[-1][4] + 1], visits[v].xs)  # noqa: B023

        def step(state: Any, x: Any, visit: Visit = visits[v], count: int = count) -> tuple[Any, Any]:
            (stream, carry), (start, x) = state, x
            if count:
                stream = backbone.blocks(stack, stream, cond, start, count, ahead)
            carry, stream, out = visit.do(carry, stream, x)
            return (stream, carry), out

        if len(group) > 1:
            (stream, carry), out = jax.lax.scan(step, (stream, carry), (starts, xs))
        else:
            (stream, carry), out = step((stream, carry), jax.tree.map(lambda leaf: leaf[0], (starts, xs)))
            out = jax.tree.map(lambda leaf: leaf[None], out)
        outs[v].append(out)
    if done < depth or not stops:
        rest = {"start": done, "count": depth - done} if stops else {}
        stream = backbone.blocks(stack, stream, cond, ahead=ahead, **rest)
    join = functools.partial(jax.tree.map, lambda *parts: jnp.concatenate(parts))
    return stream, carry, tuple(join(*out) if out else None for out in outs)
