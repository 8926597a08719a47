"""What the device does at best: matrix products, attention, copies and single blocks, at the model's shapes.

    python -m benchmarks.kernels [--part=ceilings,attention,block,experts] [--shapes=wan49] [--json=FILE]
    python -m benchmarks.kernels --part=attention --framework=torch --shapes=wan49

ceilings   a large square product, the products of one block (forward, gradient of the input, of the weight),
           copy bandwidth
attention  self-attention forward and backward apart; in half precision also how far it is from fp32, on a
           slice of the queries
block      one block forward, and with its backward pass when frozen and when trained
experts    the refinement experts, all for every token and only the chosen ones

Times are of calls that follow each other without waiting, the smallest of three rounds; TFLOP/s count 2 per
multiply-add and attention's backward pass as 2.5 forward passes, which is what its kernels do.

N tokens, L text rows, C model width, F feed-forward width, H heads, D head width.
"""

import argparse
import collections
import functools
from collections.abc import Callable
from typing import Any

from benchmarks import measure
from prophy_jax.run.errors import one_line_errors

PASSES = (
    22  # reads or writes of (N, C) that a block's norms, modulations, gates and activations take: assumed
)
OPTIMIZER_BYTES = 34  # read and written a trained parameter by AdamW and the average of parameters, fp32

# What sheets and published charts say of an H100 in bfloat16; a measured value replaces each.
EXPECTED = {
    "square 8192": "798 TFLOP/s measured elsewhere",
    "copy": "3,000 GB/s measured elsewhere",
    "forward": "650 TFLOP/s assumed",
    "attention forward": "595 TFLOP/s published for cuDNN, 16k tokens",
    "attention backward": "516 TFLOP/s published for cuDNN, 16k tokens",
}

Op = tuple  # ("gemm", kind, m, k, n), ("attention", kind, N, M), ("pointwise",) or ("optimizer",)


# --- What a training step is made of ------------------------------------------------------------------


def block_ops(config: Any, tokens: int) -> dict[str, collections.Counter]:
    """Operations of a block: "forward", "input" (backward pass if frozen), "weight" (the rest if trained).

    A product ("gemm", kind, m, k, n) is (m, k) @ (k, n) for kind "forward"; "input" and "weight" are its two
    gradients. "pointwise" counts passes over (N, C).
    """
    n, s, d, f = tokens, config.text_len, config.dim, config.ffn_dim

    def products(kind: str, text: int) -> dict[Op, int]:
        # q k v o and the q o of cross-attention; its k v, which read the text; the MLP
        sizes = {(n, d, d): 6, (s, d, d): text, (n, d, f): 1, (n, f, d): 1}
        return {("gemm", kind, *size): count for size, count in sizes.items() if count}

    def attention(kind: str) -> dict[Op, int]:
        return {("attention", kind, n, n): 1, ("attention", kind, n, s): 1}

    return {
        "forward": collections.Counter(
            {**products("forward", text=2), **attention("forward"), ("pointwise",): PASSES}
        ),
        "input": collections.Counter(
            {**products("input", text=0), **attention("backward"), ("pointwise",): 2 * PASSES}
        ),
        "weight": collections.Counter(products("weight", text=2)),
    }


def times(count: int, ops: collections.Counter) -> collections.Counter:
    return collections.Counter({op: count * number for op, number in ops.items()})


def step_ops(model: Any, tokens: int, remat: str) -> collections.Counter:
    """Operation -> how often a training step of one clip runs it, what it recomputes included.

    The embeddings and the head, under 1 % together, are left out.
    """
    config, branch = model.backbone.config, model.branch
    n, s, d, f = tokens, config.text_len, config.dim, config.ffn_dim
    depth, copies = config.num_layers, len(branch.layers)
    block = block_ops(config, tokens)
    # What each policy keeps, and all those after it.
    kept = {
        "full": {},
        "self_attention": {("attention", "forward", n, n): 1},
        "attention": {("attention", "forward", n, s): 1},
        "qkv": {("gemm", "forward", n, d, d): 4, ("gemm", "forward", s, d, d): 2},
        "products": {("gemm", "forward", n, d, d): 2, ("gemm", "forward", n, d, f): 1},
        "none": {("pointwise",): PASSES},
    }
    # The output of a block's last product is read again by the gradient of its gate alone, which is trained.
    last = collections.Counter({("gemm", "forward", n, f, d): int(remat not in ("products", "none"))})
    again = block["forward"] - collections.Counter({("gemm", "forward", n, f, d): 1})
    for policy in list(kept)[: list(kept).index(remat) + 1]:
        again -= collections.Counter(kept[policy])

    after_first_hint = depth - branch.layers[0] - 1
    ops = times(depth + copies, block["forward"]) + times(after_first_hint, block["input"] + again)
    ops += times(copies, block["input"] + block["weight"] + again + last)
    exits_and_experts = copies + (branch.refinement.experts if branch.refinement else 0)
    for kind in ("forward", "input", "weight"):
        ops[("gemm", kind, n, d, d)] += exits_and_experts
    return ops + collections.Counter({("optimizer",): 1})


def model_flops(op: Op, config: Any) -> float:
    """Of one operation, by `physics.FLOP_RULE`, but that frozen cross-attention counts like trained."""
    match op:
        case ("gemm", _, m, k, n):
            return 2 * m * k * n
        case ("attention", kind, n, m):
            return {"forward": 4, "backward": 8}[kind] * n * m * config.dim
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
        backbone, dtype = self._model.backbone, self._shape.dtype
        match op:
            case ("gemm", kind, m, k, n):
                return {op: gemm_seconds(kind, m, k, n, dtype)}
            case ("attention", _, n, m):
                both = attention_seconds(backbone.attention, backbone.config, n, m, dtype)
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


def gemm_seconds(kind: str, m: int, k: int, n: int, dtype: str) -> float:
    """Of (m, k) @ (k, n), or of one of its gradients."""
    import jax
    import jax.numpy as jnp

    x, w, y = (
        jax.random.normal(jax.random.key(i), size, jnp.dtype(dtype))
        for i, size in enumerate([(m, k), (k, n), (m, n)])
    )
    function, arguments = {
        "forward": (lambda x, w: x @ w, (x, w)),
        "input": (lambda y, w: y @ w.T, (y, w)),
        "weight": (lambda x, y: x.T @ y, (x, y)),
    }[kind]
    return measure.kernel_seconds(jax.jit(function), *arguments)


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
    name: str, seconds: float, flops: float = 0, size: float = 0, expected: str = "", **more: Any
) -> dict[str, Any]:
    """Prints a row and returns it. What is expected is of an H100: it is shown on GPUs."""
    import jax

    if expected and jax.default_backend() == "gpu":
        more["expected"] = expected
    row = {"name": name, "seconds": seconds, **more}
    text = f"{name:44} {seconds * 1e3:9.3f} ms"
    if flops:
        row["tflops_per_s"] = flops / seconds / 1e12
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
    seconds = gemm_seconds("forward", side, side, side, shape.dtype)
    rows = [show(f"square {side}", seconds, 2 * side**3, expected=EXPECTED["square 8192"])]
    size = 2**28 if small else 2**31
    rows.append(show("copy", 2 * size / copy_bandwidth(size), size=2 * size, expected=EXPECTED["copy"]))
    n, d, f = shape.tokens, config.dim, config.ffn_dim
    for size in ((n, d, d), (n, d, 3 * d), (n, d, f), (n, f, d)):
        for kind in ("forward", "input", "weight"):
            seconds = gemm_seconds(kind, *size, shape.dtype)
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
        flops = share * 4 * n * n * config.dim
        rows.append(
            show(f"attention {kind} {n}", seconds[kind], flops, expected=EXPECTED[f"attention {kind}"])
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
    rows, flops = [], 4 * shape.tokens**2 * shape.dim
    print(f"torch {torch.__version__} on {device}")
    for name, backends in choices.items():
        with sdpa_kernel(backends) if name != "default" else torch.enable_grad():
            out = scaled_dot_product_attention(q, k, v)
            with torch.no_grad():
                forward = seconds(lambda: scaled_dot_product_attention(q, k, v))
            backward = seconds(lambda out=out: torch.autograd.grad(out, (q, k, v), weight, retain_graph=True))
        rows.append(show(f"torch {name} forward {shape.tokens}", forward, flops))
        rows.append(show(f"torch {name} backward {shape.tokens}", backward, 2.5 * flops))
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

    def run(video, layer):
        return backbone.blocks(layer, stream.replace(video=video), cond).video

    def both(arguments):
        def function(video, layer):
            out, back = jax.vjp(run, video, layer)
            return [g for i, g in enumerate(back(out)) if i in arguments]

        return jax.jit(function)

    block, rates, rows = block_ops(config, n), Rates(model, shape), []
    works = {
        "forward": (jax.jit(run), block["forward"]),
        "forward and backward, frozen": (both((0,)), block["forward"] + block["input"]),
        "forward and backward, trained": (
            both((0, 1)),
            block["forward"] + block["input"] + block["weight"],
        ),
    }
    for name, (function, ops) in works.items():
        seconds = measure.kernel_seconds(function, stream.video, layer, at_least=0.2)
        roof = sum(rates.roof(ops).values())
        flops = sum(count * model_flops(op, config) for op, count in ops.items())
        rows.append(show(f"block {name}", seconds, flops, roof_ms=roof * 1e3, share_of_roof=roof / seconds))
    return rows


def expert_rows(model: Any, shape: measure.Shape) -> list[dict[str, Any]]:
    """The refinement experts: all for every token, and only the chosen ones, tokens sorted by expert."""
    import jax
    import jax.numpy as jnp

    from prophy_jax.models.beside import prophy as physics

    settings, width, n = model.branch.refinement, model.backbone.config.dim, shape.tokens
    dtype, sizes = jnp.dtype(shape.dtype), [(1, n, width), (1, n, settings.experts)]
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, scores = (jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=False))
    rho, tokens = jax.nn.softmax(scores), tokens.astype(dtype)
    kernel = jax.random.normal(keys[2], (settings.experts, width, width), dtype) * width**-0.5
    bias = jnp.zeros((settings.experts, width), dtype)

    def dense(tokens, kernel):
        weights = rho * physics.top_k_mask(rho, settings.top_k)
        return physics.mix_experts(tokens, weights.astype(dtype), kernel, bias)

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
