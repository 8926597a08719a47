"""What all commands share: quick help, flags, the compile cache, and what they need in a wheel."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import jax
import pytest
from absl import flags

from prophy_jax import build, evaluate
from prophy_jax.run import cli, config_check, config_help, encoders, loop, storage, workdir
from prophy_jax.run.errors import UserError
from tests.commands import run_here
from tests.config_help_test import shipped
from tests.conftest import ROOT, get_config

COMMANDS = [
    *(f"prophy_jax.{name}" for name in ("train", "sample", "prepare", "label", "evaluate", "study", "plan")),
    "convert.wan",
    "convert.cogvideox",
    "convert.export",
    "convert.merge",
]
# Every command shows its help in less than two seconds; one of these alone may take as long.
HEAVY = {"torch", "transformers", "tensorboardX", "grain", "av"}
EQUALS, SPACE = ("--config=configs/wan.py:tiny",), ("--config", "configs/wan.py:tiny")
OWN = 'from configs import wan\ndef get_config(arg=""):\n    config = wan.get_config("tiny")\n'
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


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", -1, "choose 0 to 4294967295"),
        ("seed", 2**64 - 1, "choose 0 to 4294967295"),
        ("data.fps", 0, "choose 0.01 to"),
        ("steps", -5, "choose 1 to"),
        ("steps", 10**30, "choose 1 to"),
        ("batch_size", 0, "choose 1 to"),
        ("accumulation", 0, "choose 1 to"),
        ("log.every", -1, "choose 0 to"),
        ("label.every", 0, "choose 1 to"),
        ("optimizer.clip", float("nan"), "nan is not a number"),
        ("optimizer.ema", 1.5, "choose 0 to 0.9999999"),
        ("optimizer.b1", 1.0, "choose 0 to 0.9999999"),
        ("losses.relative", -1.0, "choose 0 to"),
        ("caption_dropout", -0.1, "choose 0 to 1"),
        ("losses.balance", float("inf"), "choose"),
        ("backbone.num_layers", -2, "choose 0 to"),
        ("optimizer.groups", (("branch/", -1.0),), "choose 0 to"),
        ("optimizer.learning_rates.branch", -1.0, "choose 0 to"),
        ("validation.times", (0.2, float("nan")), "not a number"),
        ("data.buckets", (81, 32, 32), "each in brackets of its own"),
        ("data.buckets", ((81, 32),), "each in brackets of its own"),
        ("data.buckets", ((81, 0, 32),), "choose 1 to"),
        ("samples.skip", ((((((((((1,),),),),),),),),),), "brackets in brackets"),
    ],
)
def test_values_that_no_run_can_have_are_refused_by_their_key(key, value, words):
    config = get_config("tiny")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"^config.{key}=?.*{words}") as error:
        config_check.check(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("flag", [("--config=mine.py",), ("--config", "{folder}/mine.py")])
def test_the_configuration_of_the_docs_works_in_an_empty_folder(tmp_path, flag):
    """docs/configuration.md: its file, from outside the clone."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    (tmp_path / "mine.py").write_text(page.split("```python\n")[1].split("```")[0])
    shown = subprocess.run(
        [
            *(sys.executable, "-m", "prophy_jax.train", "--print_config"),
            *(word.format(folder=tmp_path) for word in flag),
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "batch_size = 2 " in shown and "data.dir = 'data/first'" in shown and "samples.every = 0 " in shown


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("--dry-run", "--dry_run"),
        ("--nodry-run", "--nodry_run"),
        ("--print-config=true", "--print_config=true"),
        ("--config.data.dir=my-clips", "--config.data.dir=my-clips"),
        ("--prompt=a-b", "--prompt=a-b"),
        ("--none-such", "--none-such"),
        ("my-file", "my-file"),
    ],
)
def test_both_spellings_of_a_flag_are_one(given, wanted):
    known = ["--dry_run", "--nodry_run", "--print_config", "--prompt"]
    assert cli.respell([given], known) == [wanted]
    parser = cli.ArgumentParser("x", "")
    parser.add_argument("--dry_run", action="store_true")
    assert parser.parse_args(["--dry-run"]).dry_run and parser.parse_args(["--dry_run"]).dry_run


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("--config.a=(1,) --config.b=2 --config.a=(3,)", "--config.b=2 --config.a=(3,)"),
        ("--config.a (1,) --config.b 2 --config.a=(3,)", "--config.b 2 --config.a=(3,)"),
        ("--config.a=(1,) --config.a (3,) --out=x", "--config.a (3,) --out=x"),
        ("--config.a --config.a=False --source=x --source=y", "--config.a=False --source=x --source=y"),
    ],
)
def test_an_override_given_twice_is_the_last_one(given, wanted):
    assert cli.last_of_each(given.split()) == wanted.split()


def test_help_names_the_shared_flags_and_every_key_that_the_commands_read():
    shown = subprocess.run(
        [sys.executable, "-m", "prophy_jax.train", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for flag in ("--workdir", "--config", "--print_config", "--distributed"):
        assert f"\n  {flag}: " in shown
    for key, meaning in config_help.MEANINGS.items():
        assert f"\n  --config.{key}=: {meaning}" in shown


def test_the_remedy_for_missing_weights_names_the_folder_of_the_user():
    config = get_config("")
    assert "--dst=/my/weights" in build.remedy(config, "backbone", "/my/weights/transformer").split()
    assert "--dst=/my/weights" in build.remedy(config, "backbone", "/my/weights/").split()
    assert build.remedy(config, "backbone", config.backbone_params) == config.backbone_remedy
    assert build.remedy(config, "backbone", None) == config.backbone_remedy
    demo = get_config("demo")
    assert build.remedy(demo, "backbone", "mine/run/backbone").endswith("--workdir=mine/run")


def test_the_remedy_for_a_missing_encoder_names_its_folder_too(tmp_path):
    config = get_config("")
    config.codec = dict(module="wan_vae", dtype="float32", base_dim=8)
    config.text_encoder.update(variant="umt5-xxl")
    mesh = build.build_mesh(dict(data=1, fsdp=1, context=1), 1, jax.devices()[:1])
    for name, load in (
        ("vae", lambda: encoders.load_codec(config, mesh)),
        ("text_encoder", lambda: encoders.load_text_encoder(config, None)),
    ):
        config.codec_params = config.text_encoder_params = f"{tmp_path}/mine/{name}"
        with pytest.raises(UserError, match=f"--dst={tmp_path}/mine$"):
            load()
    config.backbone_params = f"{tmp_path}/mine/transformer"
    (tmp_path / "config.json").write_text(
        json.dumps({"config": workdir.config_as_json(config), "references": {}})
    )
    with pytest.raises(UserError, match=f"--dst={tmp_path}/mine$"):
        evaluate.check_run(config, str(tmp_path))


def list_flags(monkeypatch, command) -> dict[str, tuple[str, str]]:
    """Flag -> what kind of value it takes, and its help text."""
    found, shown = {}, cli._help

    def of_absl(description):
        text = shown(description)
        for name in flags.FLAGS:
            if name == "config" or flags.FLAGS.find_module_defining_flag(name) in (command, cli.__name__):
                flag = flags.FLAGS[name]
                found[name] = flag.flag_type(), flag.help
        return text

    def of_argparse(parser):
        for action in parser._actions:
            kind = "bool" if action.nargs == 0 else "string"
            kind = f"multi {kind}" if type(action).__name__ == "_AppendAction" else kind
            if "--help" not in action.option_strings:
                found.update(
                    {option.removeprefix("--"): (kind, action.help) for option in action.option_strings}
                )

    monkeypatch.setattr(cli, "_help", of_absl)
    monkeypatch.setattr(cli.ArgumentParser, "print_help", of_argparse)
    assert run_here(command, "--help").returncode == 0
    return found


def test_flags_have_one_style_and_one_meaning(monkeypatch):
    """Where several commands have a flag of one name, its help begins with the same three words."""
    files = [file for folder in ("prophy_jax", "convert") for file in (ROOT / folder).rglob("*.py")]
    runnable = [file.relative_to(ROOT) for file in files if 'if __name__ == "__main__":' in file.read_text()]
    names = {".".join(file.with_suffix("").parts).removesuffix(".__main__") for file in runnable}
    assert names - {"prophy_jax.testing.clips"} == set(COMMANDS)
    kinds, meanings = {}, {}
    for command in COMMANDS:
        own = list_flags(monkeypatch, command)
        assert len(own) > 2
        for name, (kind, about) in own.items():
            where = f"{command} --{name}: {about}"
            assert re.fullmatch("[a-z]+(_[a-z]+)*", name), where
            assert about[0].isupper() and about[-1] == "." and "\n" not in about, where
            assert not kind.startswith("multi") or re.search("may be repeated|one for each", about), where
            assert kinds.setdefault(name, kind) == kind, where
            words = re.findall(r"\w+", about)[:3]
            assert meanings.setdefault(name, words) == words, where
    assert {"out", "source", "workdir", "checkpoint", "dry_run", "dst"} <= kinds.keys()


def test_every_data_file_is_in_the_wheel():
    """`package-data` of pyproject.toml names all that is not Python."""
    folders = ("prophy_jax", "convert", "configs")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    data = {ROOT / name for name in names if not name.endswith(".py")}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {
        file
        for package, patterns in listed.items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert len(data) > 3 and not {str(file.relative_to(ROOT)) for file in data - packed}


def test_tiny_models_has_help():
    for words, status in ((["--help"], 0), ([], 1)):
        done = subprocess.run(
            [sys.executable, "-m", "tests.tiny_models", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status and "python -m tests.tiny_models DIR" in done.stdout
        assert not done.stderr


def test_every_shipped_configuration_and_every_switch_passes():
    for _, config in shipped():
        config_check.check(config)
        for name in ("log", "checkpoint", "validation", "samples"):
            config[name].every = 0
        config.optimizer.clip = config.data.max_upscale = float("inf")
        config_check.check(config)


@pytest.mark.parametrize(
    ("flag", "override", "words"),
    [
        (EQUALS, "--config.optimiser.clip=2", "; did you mean --config.optimizer.clip?"),
        (
            EQUALS,
            "--config.optimizer.learning_rates.brnch=1",
            "did you mean --config.optimizer.learning_rates.branch?",
        ),
        (SPACE, "--config.samples.fps=2", "; did you mean --config.data.fps?"),
        (SPACE, "--config.zzz=2", "no such key: --config.zzz=2\n"),
        (EQUALS, "--config.data.side=" + 3000 * '{"a":' + "1" + 3000 * "}", "..."),
    ],
)
def test_wrong_overrides_get_one_line(tmp_path, flag, override, words):
    line = refused(tmp_path, *flag, override)
    assert words in line and len(line) < 400


def compile_cache(**environment) -> str:
    code = "import jax; from prophy_jax.run import cli; cli._keep_compiled(alone=True)"
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
    assert compile_cache(JAX_COMPILATION_CACHE_DIR="~/mine", HOME=str(tmp_path)) == mine


@pytest.mark.parametrize("alone", [True, False])
def test_folders_that_the_environment_names_are_looked_at_too(monkeypatch, alone):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs:/b/x")
    with pytest.raises(UserError, match="JAX_COMPILATION_CACHE_DIR=gs:/b/x is no address"):
        cli._keep_compiled(alone)
    monkeypatch.setenv("XDG_CACHE_HOME", "gs://b/x")
    with pytest.raises(UserError, match="XDG_CACHE_HOME=gs://b/x must be on a disk"):
        storage.cache_folder("xla")


@pytest.mark.parametrize(
    ("command", "words", "named"),
    [
        ("prophy_jax.train", ["--workdir=az://b/run"], "--workdir=az://b/run"),
        ("prophy_jax.prepare", ["--out=file:///x"], "--out=file:///x"),
        ("prophy_jax.prepare", ["--source", "http://b/x"], "--source=http://b/x"),
        ("prophy_jax.label", ["--out=hdfs:/b/x", "--vlm=none"], "--out=hdfs:/b/x"),
        ("prophy_jax.label", ["--vlm=gs://b/x", "--out=x"], "--vlm=gs://b/x"),
        ("prophy_jax.sample", ["--prompts=s3://b/x", "--prompt=gs://is/text"], "--prompts=s3://b/x"),
        ("prophy_jax.train", ["--config.data.dir=ftp://b/x"], "config.data.dir=ftp://b/x"),
        (
            "prophy_jax.train",
            ["--config.data.side.alignment=GS://b/x"],
            "config.data.side.alignment=GS://b/x",
        ),
        ("prophy_jax.train", ["--config.backbone_params=hf://b/x"], "config.backbone_params=hf://b/x"),
        ("prophy_jax.train", ["--config=gs://b/mine.py"], "--config=gs://b/mine.py"),
        ("convert.wan", ["--src=gs://b/w", "--dst=a"], "--src=gs://b/w"),
        ("convert.export", ["--checkpoint=a", "--format=diffusers", "--dst", "gs://b/w"], "gs://b/w"),
    ],
)
def test_addresses_are_refused_and_nothing_is_written(tmp_path, monkeypatch, command, words, named):
    monkeypatch.chdir(tmp_path)
    tiny = ["--config=configs/wan.py:tiny"] * (command[:7] != "convert" and words[0][:9] != "--config=")
    done = run_here(command, *tiny, *words)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {named} is an address")
    assert done.stderr.count("\n") == 1 and not os.listdir(tmp_path)


def test_the_home_folder_is_expanded_in_flags_and_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", f"{tmp_path}/home")
    os.makedirs("home/w")
    (tmp_path / "home" / "mine.py").write_text("from configs import wan\nget_config = wan.get_config\n")
    keys = ("data.dir", "data.side.alignment", "data.taxonomy", "codec_params")
    words = ["--config=~/mine.py:tiny", *(f"--config.{key}=~/{key}" for key in keys), "--print_config"]
    shown = run_here("prophy_jax.train", *words, "--config.samples.negative_prompt=~/text").stdout
    assert all(f"{key} = '{tmp_path}/home/{key}' " in shown for key in keys)
    assert "samples.negative_prompt = '~/text' " in shown
    out = ["--config=configs/wan.py:tiny", "--config.data.sandbox.train=1", "--out=~/s"]
    sizes = [f"--config.data.sandbox.{split}=1" for split in ("val", "test")]
    assert run_here("prophy_jax.prepare", *out, *sizes).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["home"] and os.path.exists("home/s/manifest.json")
    for words in (["--src=~/w"], ["--src", "~/w"]):
        assert f"{tmp_path}/home/w" in run_here("convert.wan", *words, "--dst=x").stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('def get_config(arg=""):\n    return {"a": 1}\n', "get_config returned dict, not"),
        ('def get_config(arg=""):\n    pass\n', "get_config returned NoneType, not"),
        ("import nosuchmodule\n", ", line 1: ModuleNotFoundError: No module named 'nosuchmodule': fix"),
        ("x = 1\n", "has no function get_config(arg)"),
        ("x = 1\ndef get_config(:\n", ", line 2: SyntaxError: "),
        ('def get_config(arg=""):\n    raise ValueError("boo")\n', ", line 2: ValueError: boo: fix"),
        ("import json\n\njson.loads('{')\n", ", line 3: JSONDecodeError: Expecting property name"),
        ("def get_config(arg=''):\n    return 1 / 0\n", ", line 2: ZeroDivisionError: division by zero: fix"),
        ("def get_config(arg=''):\n    return open('none')\n", ", line 2: FileNotFoundError: "),
        (OWN + '    config.batch_size = "4"\n', ", line 4: TypeError: Could not override field"),
        (OWN + "    config.steps = config.stepz\n", ", line 4: AttributeError: "),
        (OWN + "    del config.data\n    return config\n", "lacks the key 'data'"),
        (OWN + "    del config.data.dir\n    return config\n", "lacks the key 'dir'"),
    ],
)
@pytest.mark.parametrize("form", [("--config=mine.py",), ("--config", "mine.py")], ids=["=", "space"])
def test_a_fault_in_ones_own_configuration_is_named_with_its_line(tmp_path, monkeypatch, text, words, form):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    done = run_here("prophy_jax.prepare", *form)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
    assert ("mine.py" in done.stderr) != ("lacks the key" in words)
    assert set(os.listdir(tmp_path)) <= {"mine.py", "__pycache__"}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_of_flags_are_finite(tmp_path, value):
    words = ("--config=configs/wan.py:tiny", "--prompt=a", f"--out={tmp_path}/out")
    done = run_here("prophy_jax.sample", *words, f"--scale={value}")
    assert done.returncode == 1 and done.stderr == f"error: --scale={value} is not a finite number: fix it\n"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("optimizer.learnin_rates = 1", "config.optimizer.learnin_rates: "),
        ("optimizer.lr = 1", "an unknown key, config.optimizer.lr: remove it"),
        ("optimizer.warm_up = 1", "config.optimizer.warm_up: did you mean config.optimizer.warmup?"),
        ("optimiser = dict(clip=1)", "config.optimiser.clip: did you mean config.optimizer.clip?"),
        ("batchsize = 1", "config.batchsize: did you mean config.batch_size?"),
        ("data.frame = 1", "config.data.frame: did you mean config.data.frames?"),
        ("data.labels = 'x'", "config.data.labels is now config.data.side.alignment: rename it"),
        ("branch = dict(layers=(0,))", "config.branch is now config.parts.branch: rename it"),
        ("mine = ConfigDict()", "an unknown key, config.mine: remove it"),
    ],
)
def test_an_unknown_key_of_ones_own_configuration_is_refused_by_every_command(tmp_path, line, words):
    imports = "from ml_collections import ConfigDict\n"
    (tmp_path / "mine.py").write_text(f"{imports}{OWN}    config.{line}\n    return config\n")
    for command in ("prepare", "train"):
        done = run_here(f"prophy_jax.{command}", f"--config={tmp_path}/mine.py", "--print_config")
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1


def test_keys_of_parts_losses_and_data_sets_of_ones_own_pass():
    config = get_config("tiny")
    config.parts.nudge = dict(module="nudge", layers=(0, 1), own=dict(deep=1))
    config.data.side.motion = "x"
    config.losses.moving = 0.5
    config_check.check(config)
    config.data.side = {}
    config_check.check(config)


def test_the_commands_to_type_next_can_be_pasted(tmp_path, monkeypatch):
    """Paths with spaces are quoted, the configuration is as typed, and no command gets keys in vain."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my runs" / "a" / "tensorboard").mkdir(parents=True)
    keys = (
        "--config.steps 20 --config.optimizer.warmup=1 --config.data.height=48 --config.batch_size=2 --init=x"
    )
    data = ["--config.data.dir", "my data", "--config.parts.branch.layers=(0,)", "--config.log.every=1"]
    words = ["train", "--config=configs/wan.py:tiny", *keys.split(), *data, "--workdir=my runs/a"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", [*sys.path])
    cli._find_configuration()
    assert str(ROOT) in sys.argv[1]  # the installed file
    shown = loop.describe_folder("my runs/a", ["backbone", "branch"])
    assert str(ROOT) not in shown and "tensorboard --logdir='my runs/a/tensorboard'\n" in shown
    sample, measure = (shlex.split(line)[3:] for line in shown.splitlines()[-2:])
    chosen = ["--config=configs/wan.py:tiny", "--config.data.height=48", *data[:3]]
    folders = ["--checkpoint=my runs/a/backbone", "--branch=my runs/a/branch"]
    assert sample == [*chosen, *folders, "--prompt=...", "--out=samples"]
    rates = ["--config.optimizer.warmup=1", "--config.data.height=48", "--config.batch_size=2", *data[:3]]
    assert measure == [chosen[0], *rates, "--workdir=my runs/a"]


def test_a_backbone_that_is_random_and_frozen_is_refused(tmp_path):
    words = (
        "--config=configs/wan.py:tiny",
        "--config.optimizer.learning_rates.backbone=0",
        "--config.batch_size=8",
    )
    done = run_here("prophy_jax.train", *words, f"--workdir={tmp_path}/run")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not os.listdir(tmp_path)
    assert "the backbone is random and frozen: config.backbone_params is empty and its l" in done.stderr
    done = run_here("prophy_jax.sample", words[0], "--prompt=a", f"--out={tmp_path}/out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not os.listdir(tmp_path)
    assert "error: config.backbone_params is empty: name WORKDIR/backbone of a run" in done.stderr


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
