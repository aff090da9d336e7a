"Row A69 of the sources: its notebooks."
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_A69_the_notebooks_of_source_A():
    "its `CL`, `coupling` and `main` are experiments here: continual learning, coupling of near-duplicates, and the cloning curves; each runs from top to bottom in the tests, with no cell left out"
    for name in ("03_continual", "16_coupling", "17_cloning"):
        cells = [c for c in json.loads((ROOT/"nbs"/"experiments"/f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
        assert cells and not any("#| eval: false" in "".join(c["source"]) for c in cells) and any(c["outputs"] for c in cells), name
    assert "def pytest_collect_file" in (ROOT/"conftest.py").read_text()
