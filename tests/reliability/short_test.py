"""The short form of `make reliability`: each kind of trial a few times, on the commands that are quick."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.jobs


def test_nothing_is_lost(tmp_path):
    words = ["--quick", "--scale=0.04", "--processes=1", f"--folder={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {line.split(":")[0]: line.split() for line in done.stdout.splitlines() if "ALL" in line}
    assert all(int(counts[kind][2]) >= 5 for kind in ("kills", "mutations", "faults")), done.stdout
