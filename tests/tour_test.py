"""docs/tour.ipynb, executed as a reader does: it has no outputs stored, and shows what it says."""

import os

import pytest

from tests.conftest import ROOT, xla_flags

pytestmark = pytest.mark.jobs

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def shown(cell, kind: str) -> str:
    """All that a cell shows of a kind: "text" that is printed, or a MIME type."""
    if kind == "text":
        return "".join(output["text"] for output in cell.outputs if output.output_type == "stream")
    return "".join(output["data"].get(kind, "") for output in cell.outputs if "data" in output)


def test_the_tour(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)

    monkeypatch.setenv("XLA_FLAGS", xla_flags(devices=1))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

    weights, loaded, sampled, routed, scaled, wide = cells
    assert "150/150" in shown(weights, "text") or "step 150" in shown(weights, "text")
    assert shown(loaded, "text/plain").startswith("Pipeline(wan, runs/tiny/backbone, branch x 1)")
    assert "frames (2, 9, 32, 32, 3) uint8" in shown(sampled, "text")
    assert "latents (2, 3, 8, 8, 16) float32" in shown(sampled, "text") and "20/20" in shown(sampled, "text")
    assert shown(sampled, "text/html").count("<video") == shown(routed, "text/html").count("<video") == 2
    assert "routing (2, 3, 4, 4, 17) float32" in shown(routed, "text")
    assert shown(routed, "text/html") != shown(sampled, "text/html")
    half, without = (
        float(line.split("latents ")[1].split()[0]) for line in shown(scaled, "text").splitlines()
    )
    assert 0 < half < without
    assert "(1, 13, 32, 64, 3) ['ink.mp4', 'ink_routing.mp4']" in shown(wide, "text")
    assert "30 x 64 pixels" in shown(wide, "text") and "change size" in shown(wide, "text")
