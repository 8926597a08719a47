"""A command run in this process: one of its own would spend two seconds on importing what is here already."""

import contextlib
import io
import runpy
import subprocess
import sys
import warnings

from absl import flags

from prophy_jax.run import cli  # defines the flags that all commands have


def run_here(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """What `python -m module arguments` answers, on the devices of this process.

    For bad input and for quick answers. What escapes the command, such as a bug's exception, is raised here.
    """
    own, argv, path, shown = set(flags.FLAGS), sys.argv, list(sys.path), sys.unraisablehook
    out, err = io.StringIO(), io.StringIO()
    code = 0
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
            runpy.run_module(module, run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.path[:], sys.unraisablehook = argv, path, shown
        for name in set(flags.FLAGS) - own:
            place = flags.FLAGS.find_module_defining_flag(name)
            if place in (module, cli.__name__) or name.split(".")[0] == "config":  # not of a library
                delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return subprocess.CompletedProcess([module, *arguments], code, out.getvalue(), err.getvalue())
