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
    code = "import jax; from prophy_jax.run import cli; cli._keep_compiled()"
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


def refused(tmp_path, *words: str) -> str:
    """What the planner answers to a configuration that has no such variant, run in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-m", "prophy_jax.plan", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("folder", [f"{ROOT}/", ""], ids=["by path", "as installed"])
@pytest.mark.parametrize("flag", [("--config={}",), ("--config", "{}")], ids=["=", "space"])
def test_a_configuration_is_found_with_its_neighbours_from_any_folder(tmp_path, folder, flag):
    words = [word.format(f"{folder}configs/cogvideox.py:none") for word in flag]
    assert "configs/cogvideox.py has no variant 'none'" in refused(tmp_path, *words)


def test_a_configuration_of_the_user_comes_first_and_imports_the_installed_ones(tmp_path):
    (tmp_path / "configs").mkdir()
    text = (
        "from configs import wan\n\ndef get_config(arg=''):\n    return wan.choose('configs/{}', {{}}, arg)\n"
    )
    for name in ("mine.py", "cogvideox.py"):
        (tmp_path / "configs" / name).write_text(text.format(name))
        assert f"configs/{name} has no variant 'none'; it has []" in refused(
            tmp_path, f"--config=configs/{name}:none"
        )
