"""What commands print in place of a traceback, and what keeps its traceback."""

import errno
import os
import subprocess
import sys

import pytest
from tqdm import tqdm

from prophy_jax.run.errors import UserError, one_line, one_line_errors

# As libraries say it: TensorStore, array_record, XLA.
TENSORSTORE = (
    'NOT_FOUND: Error opening "zarr" driver: Error writing local file "/data/x/.zarray": Failed to write: '
    "No space left on device [OS error 28: ENOSPC No space left on device]"
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a file\nis wrong"), "error: a file is wrong"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "error: /x/y: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", b"/x/y"), "error: /x/y: Permission denied: "),
        (OSError(errno.EMFILE, "Too many open files"), "error: a file or the output: Too many"),
        (ValueError(TENSORSTORE), "error: /data/x/.zarray: No space left on device: free"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), "error: there is not enough"),
        (MemoryError(), "error: there is not enough memory"),
        (KeyboardInterrupt(), "interrupted"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), ""),  # may be an error of ours
        (KeyError("No space left on device"), ""),
        (ValueError("shapes do not match"), ""),
        (SystemExit(3), ""),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_one_line_and_an_error_of_ours_is_none(error, line):
    assert one_line(error).startswith(line) and bool(one_line(error)) == bool(line)


def test_an_error_begins_a_line_below_a_progress_bar(capfd):
    bar = tqdm(total=3, file=sys.stderr)
    bar.update()
    with pytest.raises(SystemExit, match="1"), one_line_errors():
        raise UserError("wrong")
    assert capfd.readouterr().err.endswith("\nerror: wrong\n")


PROGRAM = """
from prophy_jax.run.errors import one_line_errors
with one_line_errors():
    import os
    print("x" * 10)
    assert os.open("/dev/null", os.O_RDONLY) > 2
"""


def test_output_that_cannot_be_written_is_said_once():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def test_files_do_not_take_the_place_of_closed_output():
    shell = f'{sys.executable} -c "$0" >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", shell, PROGRAM], env=dict(os.environ)).returncode == 0
