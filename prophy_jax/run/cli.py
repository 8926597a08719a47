"""How every command reads its arguments and answers bad input: one line on stderr, exit status 1."""

import argparse
import contextlib
import fnmatch
import importlib.util
import itertools
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Container, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from typing import Any

from absl import flags, logging

from prophy_jax.run import checksums, config_check, storage
from prophy_jax.run.errors import UserError, one_line_errors
from prophy_jax.run.workdir import RENAMED

INSTALLED = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # holds configs/
HELP = ("--help", "-h", "-help", "--helpfull")
_typed: dict[str, str] = {}  # words of the command line that were replaced -> as they were typed
# What may look like a path or an address and is none: flags, and patterns of keys of a configuration.
TEXTS = ("prompt", "engine", "*_remedy", "*.negative_prompt")
# What may be in which buckets: flags, and patterns of keys of a configuration. Orbax and array_record,
# for weights, checkpoints and records, have no driver for s3://.
BUCKETS = {
    **dict.fromkeys(("out", "source", "val"), ("gs", "s3")),
    **dict.fromkeys(("workdir", "data", "checkpoint", "branch", "init"), ("gs",)),
    **dict.fromkeys(("config.data.dir", "config.data.side.*", "config.*_params"), ("gs",)),
}
DISTRIBUTED = (
    "Join a job of several processes. auto: as Slurm, Cloud TPU, GKE or Open MPI say. HOST:PORT,I/P: process "
    "I of P, with process 0 at HOST:PORT, such as 10.0.0.1:8476,1/4."
)


class ArgumentParser(argparse.ArgumentParser):
    """Of a command that has no configuration: `description` is shown as it is written."""

    def __init__(self, prog: str, description: str, buckets: Container[str] = ()):
        self.buckets = buckets  # names of the flags that may be an address of gs://
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=raw, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = respell(sys.argv[1:] if args is None else args, self._option_string_actions)
        named = itertools.pairwise(["", *words])
        words = [
            name + equals + expand_path(value, word, ("gs",) * ((name or before)[2:] in self.buckets))
            for before, word in named
            for name, equals, value in [_cut(word)]
        ]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def run_plain(main: Callable[[], Any], interrupted: str) -> None:
    """The process of a command without a configuration: one line for every error, `interrupted` on Ctrl-C."""
    logging.set_verbosity(logging.FATAL)  # as in `run`
    with one_line_errors(), storage.one_line_errors():
        try:
            main()
        except KeyboardInterrupt:
            raise UserError(interrupted) from None


def expand_path(text: str, where: str, schemes: Sequence[str] = ()) -> str:
    """`text`, given as `where`, with ~ expanded. Raises UserError on addresses, but those of `schemes`."""
    if not re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]+:/|(gs|s3):)", text):
        return os.path.expanduser(text)
    return storage.check_address(text, where, schemes)


def _cut(word: str) -> tuple[str, str, str]:
    """A word of a command line as (flag, "=", value); ("", "", word) of a value alone."""
    return word.partition("=") if word.startswith("-") else ("", "", word)


def respell(words: Sequence[str], known: Container[str]) -> list[str]:
    """Words of a command line with --dry-run and --dry_run both as the one that is `known`."""

    def one(word: str) -> str:
        name, equals, value = word.partition("=")
        other = name[:2] + (name[2:].replace("-", "_") if "-" in name[2:] else name[2:].replace("_", "-"))
        return other + equals + value if name[:2] == "--" and name not in known and other in known else word

    return [one(word) for word in words]


def run(
    main: Callable[[Any], int | None],
    description: str,
    default: str | None = None,
    distributed: bool = False,
    saves: bool = False,
) -> None:
    """Parses `--config=FILE.py[:variant]` and `--config.KEY=VALUE` overrides, then calls main(config).

    What `main` returns is the exit status; None is 0.

    A command defines its own further absl flags before it calls this. `default` is the configuration of a
    command line without --config. `distributed` gives the command the flag --distributed, see
    `prophy_jax.run.distributed`; `saves` says that it asks there when to save and stop.
    """
    from ml_collections import config_flags  # convert has no configuration, and need not have the package

    if default and not any(re.match("--?config(=|$)", word) for word in sys.argv[1:]):
        sys.argv.insert(1, f"--config={default}")  # as a flag's default, it would not take overrides
    config_flags.DEFINE_config_file("config", None, "The run: file.py[:variant].", lock_config=True)
    flags.DEFINE_bool("print_config", False, "Print the whole configuration and what its keys mean.")
    flags.DEFINE_bool("verify", True, "Compare the checksums of weights and checkpoints that are loaded.")
    if distributed:
        flags.DEFINE_string("distributed", None, DISTRIBUTED)
    if set(HELP) & set(sys.argv[1:]):
        print(_help(description))
        return
    logging.set_verbosity(logging.FATAL)  # Orbax and TFDS warn of what is no fault, and raise what is one
    with one_line_errors(), _missing_keys(), storage.one_line_errors():
        config = _parse()
        checksums.enabled = flags.FLAGS.verify
        config_check.check(config)
        if flags.FLAGS.print_config:
            from prophy_jax.run import config_help

            print(config_help.describe(config))
            return
        where = flags.FLAGS.distributed if distributed else None
        _keep_compiled(alone=where is None)
        if where is None:
            status = main(config)
        else:
            from prophy_jax.run.distributed import job

            with job(where, saves):
                status = main(config)
        if status:
            sys.exit(status)


@contextlib.contextmanager
def _missing_keys() -> Iterator[None]:
    """Where the body reads a key that the configuration does not have, raises UserError."""
    from ml_collections import config_dict

    try:
        yield
    except (AttributeError, KeyError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if last.filename != config_dict.config_dict.__file__:
            raise
        key = re.search(r"\w+", str(error)).group()
        raise UserError(
            f"the configuration lacks the key {key!r}: begin with a shipped one, such as `from configs "
            "import wan`, and change what differs (docs/configuration.md)"
        ) from error


def _help(description: str) -> str:
    """The description of a command, its flags, and the keys of its configuration with what they mean."""
    from prophy_jax.run.config_help import MEANINGS

    for name in flags.FLAGS:  # absl adds to those that can be repeated, after the full stop, that they can
        flags.FLAGS[name].help = flags.FLAGS[name].help.partition(";\n")[0]
    shared = ("config", "print_config", "verify", "distributed")  # defined here, for all commands
    common = [f"  --{name}: {flags.FLAGS[name].help}" for name in shared if name in flags.FLAGS]
    own = flags.FLAGS.main_module_help()
    keys = [f"  --config.{key}=: {meaning}" for key, meaning in MEANINGS.items()]
    return "\n".join(
        [
            f"{description.strip()}\n\nFlags:\n{own}\n\nof every command:",
            *common,
            "\nKeys of the configuration (--print_config: all of yours, also of the backbone and the parts):",
            *keys,
        ]
    )


def _keep_compiled(alone: bool) -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another.

    Not for jobs of several processes: one that finds a program on its own host would not join the others,
    who tune it together. They need a folder that all share, which only the user can name.
    """
    name = "JAX_COMPILATION_CACHE_DIR"
    folder = os.environ.get(name)
    if folder is None and alone:
        folder = storage.cache_folder("xla")
    if not folder:
        return
    os.environ[name] = folder = expand_path(folder, f"{name}={folder}", ("gs", "s3"))
    if "jax" in sys.modules:  # which has read its environment; label never imports it
        sys.modules["jax"].config.update("jax_compilation_cache_dir", folder)


def _find_configuration() -> None:
    """Lets --config=configs/NAME.py name an installed file where the current folder has none.

    Configurations import each other as configs.NAME, from whatever folder a command is run in.
    """
    for i, word in enumerate(sys.argv[1:], start=1):
        name, equals, path = _cut(word)
        if not re.fullmatch("--?config", name if equals else sys.argv[i - 1]) or not path:
            continue
        word = sys.argv[i] = name + equals + expand_path(path, word)
        flag = re.match(r"(--?config=|)([^:]+)", word)
        if not flag:
            continue
        file = os.path.abspath(flag[2])
        installed = os.path.join(INSTALLED, flag[2])
        if not os.path.exists(file) and os.path.exists(installed):
            sys.argv[i] = flag[1] + installed + word[flag.end() :]
            _typed[sys.argv[i]] = word
            file = installed
        sys.path.append(os.path.dirname(os.path.dirname(file)))


def typed_configuration() -> tuple[list[str], dict[str, list[str]]]:
    """Of the command line: the words of --config, as they were typed, and those of each --config.KEY."""
    file, keys, words = [], {}, [*sys.argv[1:], "--"]
    for word, value in itertools.pairwise(words):
        if found := re.match(r"--?config(?:[.]([^=]+))?(=|$)", word):
            own = [word] if found[2] or value.startswith("--") else [word, value]
            if found[1]:
                keys[found[1]] = own
            else:
                file = [_typed.get(one, one) for one in own]
    return file, keys


def _nearest(name: str) -> str:
    """What an unknown config.KEY was probably meant to be, as the end of a sentence; "" without a guess."""
    from prophy_jax.run import config_help

    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, flags.Error):
        keys = [key for key, _ in config_help.list_keys(_load_alone())]
        if found := config_check.nearest(name.removeprefix("config."), keys):
            return f"; did you mean --config.{found}?"
    return ""


def read_configuration(words: Sequence[str]) -> Any:
    """The configuration that words such as --config=FILE:ARG --config.KEY=VALUE give. Raises UserError."""
    try:
        config = _load(words, lock_config=True)
        _expand_paths(config)
        return config
    except (AttributeError, KeyError, flags.Error, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{words[0]} does not take these settings ({reason}): leave one out") from error


def _load_alone() -> Any:
    """The configuration that --config names, without overrides."""
    words = sys.argv[1:]
    place = next(i for i, word in enumerate(words) if re.match("--?config(=|$)", word))
    return _load(words[place : place + (1 if "=" in words[place] else 2)], lock_config=False)


def _load(words: Sequence[str], lock_config: bool) -> Any:
    """What words give as a command line; the library reads overrides from sys.argv itself."""
    from ml_collections import config_flags

    values, whole = flags.FlagValues(), sys.argv
    config_flags.DEFINE_config_file("config", None, flag_values=values, lock_config=lock_config)
    try:
        sys.argv = [whole[0], *words]
        _find_configuration()
        values(sys.argv)
        return values.config
    finally:
        sys.argv = whole


def _check_file() -> None:
    """Raises UserError, with the line, where the file that --config names does not give a configuration."""
    from ml_collections import ConfigDict

    words = zip(sys.argv, [*sys.argv[1:], ""], strict=True)
    given = (word.partition("=")[2] or value for word, value in words if re.match("--?config(=|$)", word))
    path, *arg = next(given, "").split(":", 1)
    if not os.path.isfile(path):
        return
    remedy = "docs/configuration.md shows one"
    try:
        spec = importlib.util.spec_from_file_location(
            "own_config", path, loader=SourceFileLoader("own_config", path)
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"{path} has no function get_config(arg): {remedy}")
        config = module.get_config(*arg)
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
        line = f", line {lines[-1]}" if lines else ""
        if isinstance(error, SyntaxError) and error.filename:
            path, line = error.filename, f", line {error.lineno}"
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        reason = " ".join(f"{type(error).__name__}: {reason}".split())
        reason = reason if len(reason) < 300 else f"{reason[:300]}..."
        raise UserError(f"{path}{line}: {reason}: fix the configuration") from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"{path}: get_config returned {kind}, not an ml_collections.ConfigDict: {remedy}")


def last_of_each(words: Sequence[str]) -> list[str]:
    """Words of a command line with each --config.KEY once, as it was given last.

    A sequence that is given twice would hold the items of both, and other values only the last.
    """
    kept: list[str] = []
    seen = set()
    for i in reversed(range(len(words))):
        name, equals, _ = words[i].partition("=")
        if re.match("--?config[.]", name):
            if name.lstrip("-") in seen:
                if not equals and i + 1 < len(words) and kept and not words[i + 1].startswith("--"):
                    kept.pop()  # its value
                continue
            seen.add(name.lstrip("-"))
        kept.append(words[i])
    return kept[::-1]


def _parse() -> Any:
    from ml_collections import ConfigDict

    _find_configuration()
    names = [f"--{off}{name}" for name in flags.FLAGS for off in ("", "no")]
    sys.argv[1:] = last_of_each(respell(sys.argv[1:], names))
    try:
        try:
            arguments = flags.FLAGS(sys.argv)[1:]
            config = flags.FLAGS.config
            if config is not None:
                config.keys()  # a file that could not be read raises at its first use
            if not isinstance(config, ConfigDict):
                _check_file()
        except UserError:
            raise
        except Exception:
            _check_file()
            raise
    except OSError as error:
        path = next((word.split("=")[-1] for word in sys.argv if word.startswith("--config=")), "")
        raise UserError(f"cannot read the configuration {path}: name a file.py[:variant]") from error
    except (AttributeError, KeyError) as error:
        key = re.search(r"\w+", str(error)).group()
        override = next((word for word in sys.argv if f".{key}" in word.split("=")[0]), key)
        now = {old.rpartition(".")[2]: new for old, new in RENAMED.items()}.get(key)
        hint = f"; it is --config.{now} now" if now else _nearest(override.split("=")[0].lstrip("-"))
        raise UserError(f"the configuration has no such key: {override}{hint}") from error
    except (flags.Error, TypeError, ValueError) as error:
        text = str(error)
        raise UserError(f"{text if len(text) < 300 else text[:300] + '...'}; see --help") from error
    except (RecursionError, MemoryError, SyntaxError) as error:
        raise UserError("an argument cannot be read, it has too many brackets: fix it; see --help") from error
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}: flags start with --")
    if config is None:
        raise UserError("no configuration: name one with --config=configs/wan.py[:variant]")
    _check_flags()
    _expand_paths(config)
    return config


def _check_flags() -> None:
    """Expands ~ in the flags of the command. Raises UserError on addresses, and on numbers not finite."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if not flag.present or name in ("config", *TEXTS) or name.startswith("config."):
            continue
        values = flag.value if isinstance(flag.value, list) else [flag.value]
        for value in values:
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name}={value} is not a finite number: fix it")
        values = [
            expand_path(value, f"--{name}={value}", BUCKETS.get(name, ()))
            if isinstance(value, str)
            else value
            for value in values
        ]
        flag.value = values if isinstance(flag.value, list) else values[0]


def _expand_paths(config: Any, prefix: str = "config.") -> None:
    """Expands ~ in all keys of a configuration that may be paths. Raises UserError on addresses."""
    for key, value in config.items():
        name = prefix + key
        if hasattr(value, "items"):
            _expand_paths(value, f"{name}.")
        elif isinstance(value, str) and not any(fnmatch.fnmatchcase(name, text) for text in TEXTS):
            schemes = (BUCKETS[pattern] for pattern in BUCKETS if fnmatch.fnmatchcase(name, pattern))
            path = expand_path(value, f"{name}={value}", next(schemes, ()))
            if path != value:
                config[key] = path
