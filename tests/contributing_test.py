"""The three diffs of CONTRIBUTING.md, applied to a copy of the package: a part, a field and a loss."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ONE_RUN = """
import json, sys
import jax, numpy as np
from configs import nudge
from prophy_jax import build, motion, train
from prophy_jax.data import loader
from prophy_jax.run import config_help, optim, parallel

data, out = sys.argv[1:]
motion.write(data, out)
config = nudge.get_config()
config.data.dir, config.data.side.motion = data, out
mesh = build.build_mesh(dict(data=1, fsdp=1, context=1), 4, jax.devices()[:1])
model, objective = build.build_model(config, mesh), build.build_objective(config)
chosen = build.build_losses(config, model)
fields = ("latents", *model.fields, *chosen.fields)
batch = next(loader.make_loader(data, "train", 4, 0, side=config.data.side, fields=fields))
change = np.abs(np.diff(batch["latents"].astype(np.float32), axis=1)).mean((2, 3, 4))
with jax.set_mesh(mesh):
    layout = build.place(model, mesh, config.frozen_dtype, optim.groups_of(config.optimizer))
    params = build.init_params(config, model, layout)
    trainable, frozen = optim.split(params, optim.groups_of(config.optimizer))
    optimizer = optim.make_optimizer(trainable, config.steps, config.optimizer)
    state = train.place_state(trainable, optimizer, mesh)
    step = jax.jit(train.make_train_step(model, objective, chosen, optimizer, config))
    placed = parallel.put_batch({name: batch[name] for name in fields}, mesh)
    start = np.abs(state.params["nudge"]["vectors"]).max()
    for _ in range(2):  # the backbone's head is zero in the first, and gives no gradient to what is before it
        state, metrics = step(state, frozen, loader.load_empty_text(data), placed)
meanings = [config_help.find_meaning(config, key) for key in ("parts.nudge.layers", "losses.moving")]
print(json.dumps(dict(
    motion=batch["motion"].tolist(), change=change.tolist(), meanings=meanings,
    metrics={name: float(value) for name, value in metrics.items()},
    start=float(start), moved=float(np.abs(state.params["nudge"]["vectors"]).max()),
)))
"""


@pytest.fixture(scope="module")
def diffs() -> list[str]:
    return re.findall(
        r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )


def test_existing_files_get_a_row_and_its_import_at_most(diffs):
    changed = {}
    for part in re.split(r"^(?=--- )", "".join(diffs), flags=re.MULTILINE)[1:]:
        old, new, *lines = part.splitlines()
        if old != "--- /dev/null":
            changed[new.removeprefix("+++ b/")] = sum(line[0] == "+" for line in lines)
    assert changed == {"prophy_jax/data/batch.py": 1, "prophy_jax/losses/__init__.py": 2}


def test_the_part_trains_the_field_is_read_and_the_loss_is_logged(diffs, tiny_data, tmp_path):
    for folder in ("prophy_jax", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert len(diffs) == 3
    for diff in diffs:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", ONE_RUN, tiny_data, str(tmp_path / "motion")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for motion, change in zip(found["motion"], found["change"], strict=True):
        assert motion == pytest.approx([0, *change], rel=1e-3)
    assert found["start"] == 0 and found["moved"] > 0 and found["metrics"]["gradient/nudge/vectors"] > 0
    means = [sum(clip) / len(clip) for clip in found["motion"]]
    losses = {name: found["metrics"][f"loss/{name}"] for name in ("moving", "diffusion", "total")}
    assert min(means) <= losses["moving"] / losses["diffusion"] <= max(means)
    assert losses["total"] >= losses["diffusion"] + 0.5 * losses["moving"]
    assert found["meanings"] == [
        "After which blocks a vector is added",
        "Weight of: The diffusion loss, weighted by how much each clip moves",
    ]
