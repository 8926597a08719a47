"""What all commands share: quick help, the compile cache."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

COMMANDS = [f"prophy_jax.{name}" for name in ("train", "sample", "prepare", "label", "evaluate", "plan")] + [
    "convert.wan",
    "convert.cogvideox",
    "convert.export",
]
# Every command shows its help in less than two seconds; one of these alone may take as long.
HEAVY = {"torch", "transformers", "tensorboardX", "grain", "av"}
SHOW_HELP = """
import runpy, sys
try:
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
except SystemExit:
    pass
print("imported:", *sorted({module.split(".")[0] for module in sys.modules}))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    shown = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    text, imported = shown.stdout.rsplit("imported:", 1)
    assert f"python -m {command}" in text and not shown.stderr
    assert not HEAVY & set(imported.split())


def compile_cache(**environment) -> str:
    code = "import jax; from prophy_jax import cli; cli._keep_compiled()"
    code += "; print(jax.config.jax_compilation_cache_dir)"
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_compiled_programs_are_kept_in_the_cache_folder_unless_the_user_names_another(tmp_path):
    assert compile_cache(XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "prophy_jax" / "xla")
    mine = str(tmp_path / "mine")
    assert compile_cache(JAX_COMPILATION_CACHE_DIR=mine) == mine


def test_a_configuration_finds_its_neighbours_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "prophy_jax.plan", f"--config={ROOT}/configs/cogvideox.py:none"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "configs/cogvideox.py has no variant 'none'" in done.stderr
    assert done.stderr.count("\n") == 1
