"""tour.ipynb runs from top to bottom, and is stored without outputs."""

import json
import re

import pytest
from test_checkpoint import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

TOUR = ROOT / "tour.ipynb"


def test_it_is_stored_without_outputs():
    for cell in json.loads(TOUR.read_text(encoding="utf-8"))["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_it_runs_from_top_to_bottom(monkeypatch):
    """With a short training: pictures are shown, the loss falls, three cells are left to fill."""
    monkeypatch.setenv("TOUR_EPOCHS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(TOUR, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    printed = ""
    pictures = 0
    empty = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if cell.source == "# your code":
            empty += 1
        for output in cell.outputs:
            if output.output_type == "stream":
                printed += output.text
            elif "image/png" in output.data:
                pictures += 1
    assert pictures == 5
    assert empty == 3
    losses = [float(loss) for loss in re.findall(r"epoch +\d/2  loss ([\d.]+)", printed)]
    assert losses[1] < losses[0]
    assert "loss_ssl" in printed
    # the task's loss is the same alone and next to detection; without training it is a guess
    alone, together = re.findall(r"loss_ssl +\[([\d.]+)\]", printed)
    assert alone == together
    assert float(alone) == pytest.approx(2.77, abs=0.15)
