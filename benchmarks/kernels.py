"""What the device does at best: matrix products, attention, copies and single blocks, at the model's shapes.

    python -m benchmarks.kernels [--part=ceilings,attention,block,experts] [--shapes=wan49] [--json=FILE]
    python -m benchmarks.kernels --part=attention --framework=torch --shapes=wan49

ceilings   a large square product, the products of one block (forward, gradient of the input, of the weight),
           copy bandwidth
attention  self-attention forward and backward; in half precision also how far it is from fp32, for some
           of the queries
block      one block forward, and with its backward pass when frozen and when trained
experts    the refinement experts, all for every token and only the chosen ones

A time is the smallest of three rounds of calls that follow each other without waiting. TFLOP/s count 2 per
multiply-add, and attention's own backward pass as 2.5 forward passes, which is what its kernels do.

N tokens, L text rows, C model width, F feed-forward width, H heads, D head width.
"""

import argparse
import collections
import functools
import math
from collections.abc import Callable
from typing import Any

from benchmarks import measure
from prophy_jax.plan import flops, jaxprs
from prophy_jax.run.errors import one_line_errors

# Reads or writes of (N, C) that a block's norms, modulations, gates and activations take: assumed.
PASSES = 22
OPTIMIZER_BYTES = 34  # read and written a trained parameter by AdamW and the average of parameters, fp32

# What sheets and published charts say of an H100 in bfloat16; a measured value replaces each.
EXPECTED = {
    "square 8192": "798 TFLOP/s measured elsewhere",
    "copy": "3,000 GB/s measured elsewhere",
    "forward": "650 TFLOP/s assumed",
    "attention forward": "595 TFLOP/s published for cuDNN, 16k tokens",
    "attention backward": "516 TFLOP/s published for cuDNN, 16k tokens",
}

# One of ("product", shape, shape, dimension numbers, dtype), ("attention", kind, N, M), ("pointwise",) and
# ("optimizer",).
Op = tuple
ATTENTION = {"attention_forward": "forward", "attention_backward": "backward"}  # of blockwise attention
LEAST_SHARE = 1 / 2000  # of all FLOPs; operations with less are left out


# --- What a program is made of ------------------------------------------------------------------------


def product(kind: str, m: int, k: int, n: int, dtype: str) -> Op:
    """(m, k) @ (k, n) as a program has it, or its gradient with respect to its "input" or its "weight"."""
    shapes = {
        "forward": ((1, m, k), (k, n), ((2,), (0,))),
        "input": ((1, m, n), (k, n), ((2,), (1,))),
        "weight": ((1, m, n), (1, m, k), ((0, 1), (0, 1))),
    }
    x, y, contracted = shapes[kind]
    return ("product", x, y, (contracted, ((), ())), dtype)


def operations(jaxpr: Any, tokens: int, ffn_dim: int) -> collections.Counter:
    """Operation -> how often a program runs it, what it recomputes included.

    Passes over (N, C) for what a block computes between its products are an assumption: PASSES for each GELU
    of a feed-forward network, twice as many for each backward pass of self-attention.

    Args:
        jaxpr: Of a program whose attention is "blockwise".
        tokens: N.
        ffn_dim: F.
    """
    found: collections.Counter = collections.Counter()

    def walk(jaxpr: Any, times: int) -> None:
        for op in jaxprs.flatten(jaxpr, whole=ATTENTION)[0]:
            params, shapes = op.eqn.params, [v.aval.shape for v in op.eqn.invars]
            if params.get("name") in ATTENTION:
                if flops.count(params["jaxpr"]):  # the other part of a split call makes constants
                    (_, n, *_), (_, m, *_) = shapes[:2]
                    found["attention", ATTENTION[params["name"]], n, m] += times
            elif op.name == "dot_general":
                dtype = op.eqn.invars[0].aval.dtype.name
                found["product", *shapes, params["dimension_numbers"], dtype] += times
            elif op.name == "tanh" and shapes[0][1:] == (tokens, ffn_dim):
                found["pointwise",] += PASSES * times
            else:
                for body in jaxprs.bodies(op):
                    walk(body, times * params.get("length", 1))

    walk(jaxpr.jaxpr, 1)
    found["pointwise",] += 2 * PASSES * found["attention", "backward", tokens, tokens]
    least = LEAST_SHARE * flops.count(jaxpr)
    return collections.Counter(
        {op: count for op, count in found.items() if op[0] != "product" or count * op_flops(op) > least}
    )


def op_flops(op: Op, width: int = 0) -> int:
    """Of one operation; of attention at a model's width, its backward pass as four products."""
    match op:
        case ("product", x, y, ((contracted, _), (batch, _)), _):
            return 2 * math.prod(x) * math.prod(y) // math.prod(x[axis] for axis in (*contracted, *batch))
        case ("attention", kind, n, m):
            return {"forward": 4, "backward": 8}[kind] * n * m * width
    return 0


# --- How fast the device does each --------------------------------------------------------------------


class Rates:
    """Seconds of the operations of one model at one shape. Each is measured once, at its first use."""

    def __init__(self, model: Any, shape: measure.Shape, trained: int = 0):
        """`trained` is the number of parameters that the optimizer changes."""
        import jax

        small = jax.default_backend() == "cpu"
        self._bandwidth = copy_bandwidth(2**26 if small else 2**31)
        self._model, self._shape, self._trained = model, shape, trained
        self._known: dict[Op, float] = {}

    def seconds(self, op: Op) -> float:
        if op not in self._known:
            self._known |= self._measure(op)
        return self._known[op]

    def _measure(self, op: Op) -> dict[Op, float]:
        """Of this operation, and of those that are measured with it."""
        backbone = self._model.backbone
        match op:
            case ("product", *arguments):
                return {op: product_seconds(*arguments)}
            case ("attention", _, n, m):
                both = attention_seconds(backbone.attention, backbone.config, n, m, self._shape.dtype)
                return {("attention", kind, n, m): seconds for kind, seconds in both.items()}
            case ("pointwise",):
                width = backbone.dtype.itemsize * self._shape.tokens * backbone.config.dim
                return {op: width / self._bandwidth}
            case ("optimizer",):
                return {op: self._trained * OPTIMIZER_BYTES / self._bandwidth}
        raise ValueError(op)

    def roof(self, ops: collections.Counter) -> dict[str, float]:
        """{kind: seconds} of operations that each run as fast as they do alone."""
        total: collections.Counter = collections.Counter()
        for op, count in ops.items():
            kind = f"attention {op[1]}" if op[0] == "attention" else op[0]
            total[kind] += count * self.seconds(op)
        return dict(total)


def product_seconds(x: tuple, y: tuple, dimension_numbers: tuple, dtype: str) -> float:
    import jax
    import jax.numpy as jnp

    arrays = [jax.random.normal(jax.random.key(i), size, jnp.dtype(dtype)) for i, size in enumerate((x, y))]
    function = jax.jit(lambda x, y: jax.lax.dot_general(x, y, dimension_numbers))
    return measure.kernel_seconds(function, *arrays)


def attention_inputs(config: Any, n: int, m: int, dtype: str) -> tuple[Any, Any, Any]:
    import jax
    import jax.numpy as jnp

    shapes = [(1, rows, config.num_heads, config.head_dim) for rows in (n, m, m)]
    return tuple(
        jax.random.normal(jax.random.key(i), size, jnp.dtype(dtype)) for i, size in enumerate(shapes)
    )


def attention_seconds(attention: Callable, config: Any, n: int, m: int, dtype: str) -> dict[str, float]:
    """{"forward", "backward"}, the latter from what the forward pass kept."""
    import jax

    q, k, v = attention_inputs(config, n, m, dtype)
    forward = jax.jit(attention)
    out, back = jax.jit(functools.partial(jax.vjp, attention))(q, k, v)
    return {
        "forward": measure.kernel_seconds(forward, q, k, v),
        "backward": measure.kernel_seconds(jax.jit(lambda back, out: back(out)), back, out),
    }


def copy_bandwidth(size: int) -> float:
    """Bytes/s, read and written counted both, of x + 1 over `size` bytes of fp32."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(size // 4)
    return 2 * size / measure.kernel_seconds(jax.jit(lambda x: x + 1), x)


# --- The parts ----------------------------------------------------------------------------------------


def show(
    name: str, seconds: float, counted: float = 0, size: float = 0, expected: str = "", **more: Any
) -> dict[str, Any]:
    """Prints a row and returns it. What is expected is of an H100: it is shown on GPUs."""
    import jax

    if expected and jax.default_backend() == "gpu":
        more["expected"] = expected
    row = {"name": name, "seconds": seconds, **more}
    text = f"{name:44} {seconds * 1e3:9.3f} ms"
    if counted:
        row["tflops_per_s"] = counted / seconds / 1e12
        text += f" {row['tflops_per_s']:8.2f} TFLOP/s"
    if size:
        row["gb_per_s"] = size / seconds / 1e9
        text += f" {row['gb_per_s']:8.1f} GB/s"
    for key, value in more.items():
        text += f"   {key}: {value:.2g}" if isinstance(value, float) else f"   {key}: {value}"
    print(text, flush=True)
    return row


def ceilings(model: Any, shape: measure.Shape) -> list[dict[str, Any]]:
    import jax

    config, small = model.backbone.config, jax.default_backend() == "cpu"
    side = 1024 if small else 8192
    seconds = product_seconds(*product("forward", side, side, side, shape.dtype)[1:])
    rows = [show(f"square {side}", seconds, 2 * side**3, expected=EXPECTED["square 8192"])]
    size = 2**28 if small else 2**31
    rows.append(show("copy", 2 * size / copy_bandwidth(size), size=2 * size, expected=EXPECTED["copy"]))
    n, d, f = shape.tokens, config.dim, config.ffn_dim
    for size in ((n, d, d), (n, d, 3 * d), (n, d, f), (n, f, d)):
        for kind in ("forward", "input", "weight"):
            seconds = product_seconds(*product(kind, *size, shape.dtype)[1:])
            name = f"{kind} {' x '.join(map(str, size))}"
            rows.append(show(name, seconds, 2 * size[0] * size[1] * size[2], expected=EXPECTED["forward"]))
    return rows


def attention_rows(model: Any, shape: measure.Shape) -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    config, n = model.backbone.config, shape.tokens
    attention = model.backbone.attention
    seconds, rows = attention_seconds(attention, config, n, n, shape.dtype), []
    for kind, share in (("forward", 1), ("backward", 2.5)):
        counted = share * 4 * n * n * config.dim
        rows.append(
            show(f"attention {kind} {n}", seconds[kind], counted, expected=EXPECTED[f"attention {kind}"])
        )
    q, k, v = attention_inputs(config, n, n, shape.dtype)
    exact = [x.astype(jnp.float32) for x in (q[:, :64], k, v)]
    reference = jax.nn.dot_product_attention(*exact, implementation="xla")
    apart = jnp.abs(jax.jit(attention)(q, k, v)[:, :64].astype(jnp.float32) - reference).max()
    rows[0]["differs_from_fp32_by"] = float(apart)
    print(
        f"  differs from fp32 by {apart:.1e} at most, on 64 queries of {jnp.abs(reference).max():.1e} at most"
    )
    return rows


def torch_attention_rows(shape: measure.Shape) -> list[dict[str, Any]]:
    """scaled_dot_product_attention, default and with each fused backend forced."""
    import time

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if shape.half else torch.float32
    size = (1, shape.heads, shape.tokens, shape.dim // shape.heads)
    q, k, v, weight = (torch.randn(size, device=device, dtype=dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_(True)

    def seconds(function: Callable[[], Any]) -> float:
        def run(calls: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if device == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / calls

        run(1)
        calls = max(1, round(0.05 / run(1)))
        return min(run(calls) for _ in range(3))

    choices = {"default": list(SDPBackend.__members__.values())}
    if device == "cuda":
        choices |= {"cuDNN": [SDPBackend.CUDNN_ATTENTION], "FlashAttention": [SDPBackend.FLASH_ATTENTION]}
    rows, counted = [], 4 * shape.tokens**2 * shape.dim
    print(f"torch {torch.__version__} on {device}")
    for name, backends in choices.items():
        with sdpa_kernel(backends) if name != "default" else torch.enable_grad():
            out = scaled_dot_product_attention(q, k, v)
            with torch.no_grad():
                forward = seconds(lambda: scaled_dot_product_attention(q, k, v))
            backward = seconds(lambda out=out: torch.autograd.grad(out, (q, k, v), weight, retain_graph=True))
        rows.append(show(f"torch {name} forward {shape.tokens}", forward, counted))
        rows.append(show(f"torch {name} backward {shape.tokens}", backward, 2.5 * counted))
    return rows


def block_rows(model: Any, shape: measure.Shape) -> list[dict[str, Any]]:
    """One block, and how much of it is neither products nor attention at their own rates."""
    import jax
    import jax.numpy as jnp

    backbone, n = model.backbone, shape.tokens
    config = backbone.config
    params = measure.random_params(model, shape)["backbone"]
    text = jax.random.normal(jax.random.key(2), (1, shape.text, config.dim), backbone.dtype)
    latents = jax.random.normal(jax.random.key(3), (1, *shape.latents, 16))
    stream, cond = jax.jit(lambda p: backbone.embed(p, latents, jnp.full(1, 500.0), text))(params)
    layer = jax.tree.map(lambda leaf: leaf[:1], params["blocks"])
    del params

    def forward(backbone):
        return lambda video, layer: backbone.blocks(layer, stream.replace(video=video), cond).video

    def both(backbone, arguments):
        def function(video, layer):
            out, back = jax.vjp(forward(backbone), video, layer)
            return [g for i, g in enumerate(back(out)) if i in arguments]

        return function

    works = {
        "forward": forward,
        "forward and backward, frozen": functools.partial(both, arguments=(0,)),
        "forward and backward, trained": functools.partial(both, arguments=(0, 1)),
    }
    traced, _ = measure.build(shape, backend="blockwise")
    plain, rates, rows = flops.plain(model).backbone, Rates(model, shape), []
    for name, work in works.items():
        seconds = measure.kernel_seconds(jax.jit(work(backbone)), stream.video, layer, at_least=0.2)
        jaxpr = jax.make_jaxpr(work(traced.backbone))(stream.video, layer)
        roof = sum(rates.roof(operations(jaxpr, n, config.ffn_dim)).values())
        counted = flops.model_flops(work(plain), stream.video, layer)
        rows.append(show(f"block {name}", seconds, counted, roof_ms=roof * 1e3, share_of_roof=roof / seconds))
    return rows


def expert_rows(model: Any, shape: measure.Shape) -> list[dict[str, Any]]:
    """The refinement experts: all for every token, and only the chosen ones, tokens sorted by expert."""
    import jax
    import jax.numpy as jnp

    from prophy_jax.models.beside import prophy

    settings, width, n = model.parts["branch"].refinement, model.backbone.config.dim, shape.tokens
    dtype, sizes = jnp.dtype(shape.dtype), [(1, n, width), (1, n, settings.experts)]
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, scores = (jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=False))
    rho, tokens = jax.nn.softmax(scores), tokens.astype(dtype)
    kernel = jax.random.normal(keys[2], (settings.experts, width, width), dtype) * width**-0.5
    bias = jnp.zeros((settings.experts, width), dtype)

    def dense(tokens, kernel):
        weights = rho * prophy.top_k_mask(rho, settings.top_k)
        return prophy.mix_experts(tokens, weights.astype(dtype), kernel, bias)

    def grouped(tokens, kernel):
        weights, chosen = jax.lax.top_k(rho[0], settings.top_k)  # (N, k)
        order = chosen.reshape(-1).argsort()  # (N k,), pairs of token and expert by expert
        groups = jnp.bincount(chosen.reshape(-1), length=settings.experts)
        rows = order // settings.top_k
        weighted = tokens[0, rows] * weights.reshape(-1)[order, None].astype(dtype)
        out = jax.lax.ragged_dot(weighted, kernel, groups, preferred_element_type=jnp.float32)
        return jnp.zeros((n, width)).at[rows].add(out)[None].astype(dtype)

    def gradient(function):
        return jax.grad(lambda *x: (function(*x).astype(jnp.float32) ** 2).sum(), (0, 1))

    apart = jnp.abs(jax.jit(dense)(tokens, kernel) - jax.jit(grouped)(tokens, kernel)).max()
    print(f"  dense and grouped experts differ by {apart:.1e} at most")
    rows = []
    for name, function in {"dense": dense, "grouped": grouped}.items():
        for kind, run in {"forward": function, "forward and backward": gradient(function)}.items():
            rows.append(show(f"experts {name} {kind}", measure.kernel_seconds(jax.jit(run), tokens, kernel)))
    return rows


PARTS = {"ceilings": ceilings, "attention": attention_rows, "block": block_rows, "experts": expert_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, **measure.ARGUMENTS)
    parser.add_argument("--part", default=",".join(PARTS), help="with commas between")
    parser.add_argument("--framework", default="jax", choices=("jax", "torch"), help="torch: attention alone")
    measure.shapes_argument(parser)
    options = parser.parse_args()
    if unknown := set(options.part.split(",")) - set(PARTS):
        raise SystemExit(f"error: no part {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    about = measure.head("kernels")
    rows = []
    for name in measure.chosen_shapes(options.shapes):
        shape = measure.SHAPES[name]
        print(f"{name}: {shape.tokens} tokens, {shape.dtype}", flush=True)
        if options.framework == "torch":
            made = torch_attention_rows(shape)
        else:
            model, _ = measure.build(shape)
            made = [row for part in options.part.split(",") for row in PARTS[part](model, shape)]
        rows += [{"shape": name, **row} for row in made]
        measure.write(options.json, about, rows)


if __name__ == "__main__":
    with one_line_errors():
        main()
