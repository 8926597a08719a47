"""Eight simulated CPU devices for every test, and what several test files need."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import tempfile

# Tests compile much and compute little, so code is generated without LLVM's optimizations and in one thread;
# where XLA still has its earlier generator of code for CPUs, by that: it takes a third of the time.
_GENERATOR = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _GENERATOR += " --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int = 1) -> str:
    """XLA_FLAGS of a test process with so many simulated CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {_GENERATOR}"


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=8)}"
# Test processes share what they compiled.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"prophy_jax_tests_{os.getuid()}")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# Tracing makes many objects that live on; looking through them all again takes a fifth of its time.
gc.set_threshold(200_000, 50, 100)

import types  # noqa: E402

import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
pytest_plugins = ["tests.bucket"]


# Files that take longest, which begin: test processes that begin with short ones would end minutes apart.
LONG = (
    "pipeline",
    "distributed",
    "study",
    "train_step",
    "signals",
    "plan",
    "train",
    "sample",
    "evaluate",
    "prophy",
)


def pytest_collection_modifyitems(items: list) -> None:
    place = {f"{name}_test.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    """Every process of the suite collects all tests: what takes seconds to import waits (tests/late.py)."""
    if early := sorted({"torch", "diffusers", "transformers"} & sys.modules.keys()):
        raise pytest.UsageError(f"a test file imports {', '.join(early)} at its top: see tests/late.py")


def get_config(arg: str):
    """configs/wan.py:ARG, as the commands read it."""
    spec = importlib.util.spec_from_file_location("wan_config", ROOT / "configs" / "wan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def build_run(config, devices=None, more_parts=None) -> types.SimpleNamespace:
    """What `config` describes, built on all devices or on those given; with parts that have no file, too."""
    from prophy_jax import build
    from prophy_jax.models.beside.part import Model
    from prophy_jax.run import optim

    mesh = build.build_mesh(config.mesh, build.microbatch(config), devices)
    model, objective = build.build_model(config, mesh), build.build_objective(config)
    model = Model(model.backbone, {**model.parts, **(more_parts or {})})
    return types.SimpleNamespace(
        config=config,
        mesh=mesh,
        model=model,
        objective=objective,
        chosen=build.build_losses(config, model),
        layout=build.place(model, mesh, config.frozen_dtype, optim.groups_of(config.optimizer)),
    )


@pytest.fixture(scope="session")
def wisa_sample(tmp_path_factory) -> pathlib.Path:
    """Six video files of the sandbox in WISA-80K's layout, with quirks of its annotation."""
    from prophy_jax.testing import clips

    return clips.write_wisa(tmp_path_factory.mktemp("clips") / "wisa")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> str:
    """The sandbox of configs/wan.py:tiny, prepared."""
    from prophy_jax.prepare import prepare

    folder = str(tmp_path_factory.mktemp("data") / "tiny")
    prepare(get_config("tiny"), out=folder)
    return folder


@pytest.fixture
def tiny_config(tiny_data):
    """configs/wan.py:tiny, a few steps, on prepared data."""
    config = get_config("tiny")
    config.data.dir = tiny_data
    config.steps = 6
    config.log.every = 2
    config.checkpoint.every = 3
    config.samples.every = config.validation.every = 1000  # also at the last step
    return config


@pytest.fixture(scope="module")
def one_torch_thread():
    """For models so small that a second thread only waits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
