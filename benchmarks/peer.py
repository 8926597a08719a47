"""The same work in PyTorch and in JAX, in turns, on the same cores or on one GPU.

    python -m benchmarks.peer [--shapes=tiny,base] [--work=forward,train] [--cores=1] [--json=FILE]
    python -m benchmarks.peer --work=sample --cores=2
    python -m benchmarks.peer --device=cuda --shapes=wan49 --work=forward,train

Works:
    forward  one forward pass of the backbone
    train    loss and gradients of the physical branch next to the frozen backbone
    sample   a guided sampling loop of the backbone, 8 Euler steps, prompts already encoded

PyTorch runs diffusers' `WanTransformer3DModel`, or `benchmarks/torch_wan.py` where diffusers is missing, with
`benchmarks/prophy_branch.py` next to it: eager, with --compile also compiled, and on a GPU also with cuDNN's
attention forced. Sampling, it takes the faster of one call for both prompts and two calls. With --remat, JAX
keeps what its policy of that name says, and PyTorch nothing but the input of each block.

Each contender is a process of its own, pinned to the same cores; with several, JAX has one simulated device
per core. Both read the same random weights, none of them zero, and must agree on the result before anything
is timed. First calls have a time of their own: they compile. Then the contenders take turns, forwards and
backwards. A ratio above 1 says that JAX is faster: of the medians, of the smallest times, and of the smallest
processor times, the steadiest when other programs run.

B batch, T h w latent grid, N tokens.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import measure
from benchmarks.measure import SHAPES, Shape

ROOT = pathlib.Path(__file__).resolve().parent.parent


WORKS = ("forward", "train", "sample")
GUIDANCE, SHIFT, STEPS = 5.0, 3.0, 8
ROW = (
    "{shape:5} {work:7} {contender:19} first {first_s:6.2f} s   "
    "median {median_s:7.4f} s   min {min_s:7.4f} s   "
    "torch/this {ratio_of_medians:5.2f} median {ratio_of_minima:5.2f} min {ratio_of_cpu_minima:5.2f} cpu   "
    "differs by {differs_by:.0e}"
)


def inputs(shape: Shape) -> dict[str, np.ndarray]:
    """One clip: latents and noise (1, T, h, w, 16), two prompts of 60 % and 10 % valid rows, times."""
    rng = np.random.default_rng(1)
    text = rng.standard_normal((2, shape.text, shape.text_dim), np.float32)
    mask = np.arange(shape.text)[None] < np.array([[shape.text * 6 // 10], [shape.text // 10]])
    clip = (1, *shape.latents, 16)
    return {
        "latents": rng.standard_normal(clip, np.float32),
        "target": rng.standard_normal(clip, np.float32),
        "text": np.where(mask[..., None], text, 0),
        "mask": mask,
        "time": np.array([500.0], np.float32),
    }


def schedule() -> tuple[np.ndarray, np.ndarray]:
    """(noise levels (STEPS + 1,), model times (STEPS,)) of the sampling loop."""
    from prophy_jax.diffusion import flow

    solver = flow.build().solver("euler", STEPS, SHIFT)
    return solver.sigmas, solver.timesteps


def write_weights(shape: Shape, folder: pathlib.Path) -> None:
    """Random weights of backbone and branch, as the PyTorch side reads them."""
    from safetensors.numpy import save_file

    from convert import export, leaves
    from convert import wan as convert_wan
    from prophy_jax.models import wan as wan_model
    from prophy_jax.models.beside import prophy

    model = wan_model.build(**shape.sizes())
    spec = {
        "layers": shape.branch,
        "semantic": {"basis_grid": shape.latents, "hidden": 64},
        "refinement": {},
    }
    branch = prophy.build(**spec)
    rng = np.random.default_rng(0)

    def draw(name: str, size: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(size, np.float32)
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.3 * noise
        return noise / np.sqrt(max(np.prod(size[1:]), 4)).astype(np.float32)

    dtype = np.float32
    if shape.half:
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    tables = {
        "transformer": convert_wan.dit_leaves(model.config, "diffusers"),
        "branch": export.branch_leaves(model, branch, export.FORMS["wan"], "diffusers"),
    }
    for part, table in tables.items():
        names = leaves.tensor_shapes(table)
        tensors = {name: draw(name, size) for name, size in names.items()}
        if part == "transformer":
            tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        about = {"names": "diffusers", "branch": json.dumps(dataclasses.asdict(branch))}
        save_file(tensors, folder / f"{part}.safetensors", about)


# --- The contenders: {work: function that does it once and returns what must agree} -------------------


def jax_works(shape: Shape, folder: pathlib.Path, remat: str) -> dict:
    from types import SimpleNamespace

    import jax
    import jax.numpy as jnp
    from safetensors import safe_open
    from safetensors.numpy import load_file

    from convert import export
    from convert import wan as convert_wan
    from prophy_jax.diffusion import generate
    from prophy_jax.models.beside import prophy
    from prophy_jax.models.beside.part import Model
    from prophy_jax.testing import state_dicts

    mesh = measure.all_devices()
    alone, objective = measure.build(shape, remat, parts=False)
    backbone = alone.backbone
    with safe_open(folder / "branch.safetensors", "numpy") as file:
        branch = prophy.build(**json.loads(file.metadata()["branch"]))
    params = {
        "backbone": state_dicts.read(
            load_file(folder / "transformer.safetensors"),
            convert_wan.dit_leaves(backbone.config, "diffusers"),
        ),
        "branch": state_dicts.read(
            load_file(folder / "branch.safetensors"),
            export.branch_leaves(backbone, branch, export.FORMS["wan"], "diffusers"),
        ),
    }
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    model = Model(backbone, {"branch": branch})
    clip = {name: jnp.asarray(value) for name, value in inputs(shape).items()}
    settings = dict(solver="euler", steps=STEPS, shift=SHIFT, guidance=GUIDANCE)
    settings |= dict(guidance_schedule="constant", skip=())
    sample = generate.make_generator(alone, objective, SimpleNamespace(**settings))
    forward = jax.jit(backbone)

    @jax.jit
    def train(branch, frozen, clip):
        def loss(branch):
            both = {"branch": branch, "backbone": frozen}
            prompt = {"text": clip["text"][:1], "text_mask": clip["mask"][:1]}
            out = model(both, clip["latents"], clip["time"], prompt)
            return ((out.prediction - clip["target"]) ** 2).mean()

        return jax.value_and_grad(loss)(branch)

    def run_forward():
        out = forward(params["backbone"], clip["latents"], clip["time"], clip["text"][:1])
        return np.asarray(out)

    def run_train():
        loss, gradient = jax.block_until_ready(train(params["branch"], params["backbone"], clip))
        blocks = gradient["blocks"]["ffn"]["up"]["kernel"]
        return np.array([loss, jnp.linalg.norm(blocks), jnp.linalg.norm(gradient["exits"]["kernel"])])

    def run_sample():
        negative = {"text": clip["text"][1], "text_mask": clip["mask"][1]}
        prompt = {"text": clip["text"][:1], "text_mask": clip["mask"][:1]}
        with jax.set_mesh(mesh):
            return np.asarray(sample(params, clip["latents"], prompt, negative))

    return {"forward": run_forward, "train": run_train, "sample": run_sample}


def torch_works(shape: Shape, folder: pathlib.Path, remat: str, device: str, how: set[str]) -> dict:
    """`how`: "compile" uses torch.compile, "cudnn" forces cuDNN's attention."""
    import torch
    from safetensors.torch import load_file
    from torch.utils.checkpoint import checkpoint

    if "cudnn" in how:
        for name in ("flash", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(False)

    dtype = torch.bfloat16 if shape.half else torch.float32
    arguments = dict(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.dim // shape.heads,
        num_layers=shape.layers,
        ffn_dim=shape.ffn,
        text_dim=shape.text_dim,
    )
    try:
        from diffusers import WanTransformer3DModel
    except ImportError:
        from benchmarks.torch_wan import WanTransformer3DModel
    from benchmarks.prophy_branch import ProPhy

    def transformer():
        model = WanTransformer3DModel(**arguments)
        model.load_state_dict(load_file(folder / "transformer.safetensors"))
        return model.to(device, dtype).requires_grad_(False).eval()

    backbone = transformer()
    prophy = ProPhy(transformer(), folder / "branch.safetensors")
    trained = dict(prophy.blocks.named_parameters()) | prophy.weights
    for tensor in trained.values():
        tensor.requires_grad_(True)
    if remat != "none":
        for block in [*prophy.blocks, *prophy.transformer.blocks]:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    clip = {name: torch.from_numpy(value).to(device) for name, value in inputs(shape).items()}
    clip["text"] = clip["text"].to(dtype)
    for name in ("latents", "target"):
        clip[name] = clip[name].permute(0, 4, 1, 2, 3).contiguous()  # (B, 16, T, h, w)
    forward, train = (torch.compile(x) if "compile" in how else x for x in (backbone, prophy))

    def run_forward():
        with torch.no_grad():
            out = forward(clip["latents"].to(dtype), clip["time"], clip["text"][:1], return_dict=False)[0]
        return out.permute(0, 2, 3, 4, 1).float().cpu().numpy()

    def run_train():
        velocity, _ = train(clip["latents"].to(dtype), clip["time"], clip["text"][:1])
        loss = ((velocity.float() - clip["target"]) ** 2).mean()
        loss.backward()
        blocks = [g for name, g in trained.items() if name.endswith("ffn.net.0.proj.weight")]
        exits = [trained[f"exits.{i}.weight"] for i in range(len(shape.branch))]
        norms = [torch.sqrt(sum((t.grad.float() ** 2).sum() for t in group)) for group in (blocks, exits)]
        result = np.array([float(loss.detach()), *map(float, norms)])
        for tensor in trained.values():
            tensor.grad = None
        return result

    def predict_together(x, time):
        out = forward(x.expand(2, -1, -1, -1, -1), time.expand(2), clip["text"], return_dict=False)[0]
        return out.float()

    def predict_apart(x, time):
        parts = (forward(x, time, clip["text"][i : i + 1], return_dict=False)[0] for i in (0, 1))
        return torch.cat([part.float() for part in parts])

    sigmas, times = schedule()
    seconds: dict = {}

    def run_sample():
        if not seconds:
            for predict in (predict_together, predict_apart, predict_together, predict_apart):
                start = time.perf_counter()
                loop(predict, steps=1)
                seconds[predict] = min(seconds.get(predict, np.inf), time.perf_counter() - start)
        return loop(min(seconds, key=seconds.get))

    def loop(predict, steps=STEPS):
        x = clip["latents"].float()
        with torch.no_grad():
            for i in range(steps):
                conditional, unconditional = predict(x.to(dtype), torch.tensor([times[i]], device=device))
                velocity = unconditional + GUIDANCE * (conditional - unconditional)
                x = x + float(sigmas[i + 1] - sigmas[i]) * velocity
        return x.permute(0, 2, 3, 4, 1).cpu().numpy()

    return {"forward": run_forward, "train": run_train, "sample": run_sample}


def work_on_request(options, shape: Shape, folder: pathlib.Path) -> None:
    """A contender's process: reads a work's name a line, answers with times in a line of JSON."""
    kind, *how = options.contender.split("-")
    if kind == "jax":
        works = jax_works(shape, folder, options.remat)
    else:
        works = torch_works(shape, folder, options.remat, options.device, set(how))
    for line in sys.stdin:
        work, save = line.split()
        wall, cpu = time.perf_counter(), time.process_time()  # of all threads
        result = works[work]()
        answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        if kind == "torch" and options.device == "cuda":
            import torch

            torch.cuda.empty_cache()  # the others' turn
        if save != "-":
            np.save(save, result)
        print(json.dumps(answer), flush=True)


# --- The comparison -----------------------------------------------------------------------------------


def environment(contender: str, cores: int, device: str) -> dict[str, str]:
    own = dict(os.environ, OMP_NUM_THREADS=str(cores), MKL_NUM_THREADS=str(cores))
    if device == "cpu":
        own["JAX_PLATFORMS"] = "cpu"
        flags = f"--xla_force_host_platform_device_count={cores}"
        if cores == 1:
            flags += " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        own["XLA_FLAGS"] = flags
    else:
        own["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the contenders share the memory
    return own


@contextlib.contextmanager
def contender_process(contender: str, options, shape: str, folder: str):
    command = [sys.executable, "-m", "benchmarks.peer", f"--contender={contender}", f"--shapes={shape}"]
    command += [f"--folder={folder}", f"--device={options.device}", f"--remat={options.remat}"]

    def pin():
        if options.device == "cpu":
            os.sched_setaffinity(0, range(options.cores))

    own = environment(contender, options.cores, options.device)
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own, preexec_fn=pin, cwd=ROOT
    )

    def run(work: str, save: str = "-") -> dict[str, float]:
        process.stdin.write(f"{work} {save}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            sys.exit(f"error: {contender} could not do {work}; its message is above")
        return json.loads(line)

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait()


def compare(options, name: str) -> list[dict]:
    shape, rows = SHAPES[name], []
    ways = [""] + ["-compile"] * options.compile
    ways += [f"{way}-cudnn" for way in ways] if options.device == "cuda" else []
    contenders = ["jax", *(f"torch{way}" for way in ways)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        weights = [sys.executable, "-m", "benchmarks.peer", "--contender=weights", f"--shapes={name}"]
        weights.append(f"--folder={folder}")
        subprocess.run(weights, check=True, env=environment("jax", 1, "cpu"), cwd=ROOT)
        run = {c: stack.enter_context(contender_process(c, options, name, folder)) for c in contenders}
        for work in options.work:
            files = {c: os.path.join(folder, f"{c}.npy") for c in contenders}
            first = {c: run[c](work, files[c])["wall"] for c in contenders}
            results = {c: np.load(path).astype(np.float64) for c, path in files.items()}
            scale = np.abs(results["torch"]).max()
            apart = max(np.abs(results[c] - results["torch"]).max() / scale for c in contenders)
            # fp32 sums in another order; bf16 carries 8 bits through all blocks
            if not apart <= (5e-2 if shape.half else 1e-4):
                sys.exit(f"error: {name} {work}: the contenders differ by {apart:.1e} of the largest value")
            times: dict[str, list[dict]] = {c: [] for c in contenders}
            for _ in range(options.rounds):
                for contender in [*contenders, *reversed(contenders)]:
                    times[contender].append(run[contender](work))
            for contender in contenders:
                wall = [t["wall"] for t in times[contender]]
                cpu = [t["cpu"] for t in times[contender]]
                theirs, theirs_cpu = ([t[kind] for t in times["torch"]] for kind in ("wall", "cpu"))
                rows.append(
                    {
                        "shape": name,
                        "work": work,
                        "contender": contender,
                        "first_s": first[contender],
                        "median_s": float(np.median(wall)),
                        "min_s": min(wall),
                        "min_cpu_s": min(cpu),
                        "ratio_of_medians": float(np.median(theirs) / np.median(wall)),
                        "ratio_of_minima": min(theirs) / min(wall),
                        "ratio_of_cpu_minima": min(theirs_cpu) / min(cpu),
                        "differs_by": float(np.abs(results[contender] - results["torch"]).max() / scale),
                    }
                )
                print(ROW.format(**rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="tiny,base", help=f"of {', '.join(SHAPES)}, with commas between")
    parser.add_argument("--work", default="forward,train", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes")
    parser.add_argument(
        "--remat", default="none", choices=("none", "products", "qkv", "attention", "self_attention", "full")
    )
    parser.add_argument("--json", help="write the table there too")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        shape, folder = SHAPES[options.shapes], pathlib.Path(options.folder)
        if options.contender == "weights":
            return write_weights(shape, folder)
        return work_on_request(options, shape, folder)
    options.work = options.work.split(",")
    rows = [row for name in options.shapes.split(",") for row in compare(options, name)]
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
