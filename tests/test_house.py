"What holds the house together: floors, facts that stand once, notebooks and README in step."
import ast
import configparser
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MODULES = {p.stem: p for p in (ROOT/"lop_nb").glob("[a-z]*.py")}
NOTEBOOKS = [p for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
CELLS = {p: json.loads(p.read_text())["cells"] for p in NOTEBOOKS}
SIDEWAYS = {("units", "models"), ("streams", "tasks"), ("bitflips", "tasks"), ("bitflips", "streams"), *((m, "learner") for m in ("checkpoints", "monitor", "interventions", "tracking")), ("experiments", "plots"), ("compose", "config"), ("compose", "runtime"), ("records", "runtime")}
SIDEWAYS |= {("chains", "layers"), ("resnet", "layers"), ("resnet", "chains"), ("vit", "layers"), *(("models", m) for m in ("layers", "chains", "resnet", "vit"))}
SIDEWAYS |= {*((m, o) for m in ("copies", "ranks", "normality", "gradients", "curvature") for o in ("activity", "copies") if m != o), *(("metrics", m) for m in ("activity", "copies", "ranks", "normality", "gradients", "curvature")), ("curvature", "gradients"), ("ranking", "probe"), ("manifold", "cloning"), ("escape", "cloning"), ("escape", "manifold"), ("growth", "cloning"), ("growth", "manifold"), ("figures", "plots"), ("experiments", "figures")}
SIDEWAYS |= {("learner", "engines"), ("remedies", "interventions"), ("remedies", "learner"), ("active", "kernels"), ("minibatch", "kernels"), ("kernels", "optimizers"), ("active", "optimizers"), ("minibatch", "optimizers")}
SIDEWAYS |= {*((m, o) for m in ("imp", "pruners", "overlap", "connectivity") for o in ("masks", "imp") if m != o), ("ntk", "masks"), *(("pipeline", m) for m in ("experiments", "figures", "plots")), ("cli", "cluster")}
DISTRIBUTION = dict(sklearn="scikit-learn", hydra="hydra-core", omegaconf="hydra-core", yaml="pyyaml", pynvml="nvidia-ml-py")


def floors():
    "{module: floor}, from the table in CONTRIBUTING.md"
    rows = re.findall(r"^\| (\d) \| ([a-z, ]+) \|", (ROOT/"CONTRIBUTING.md").read_text(), re.M)
    return {m: int(floor) for floor, names in rows for m in names.split(", ")}


def imports(path):
    "(package or module of this package, is it ours?) for every import, those inside functions too"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from ((a.name.split(".")[0], False) for a in node.names if a.name != "lop_nb")
        elif isinstance(node, ast.ImportFrom) and node.level: yield from [(node.module.split(".")[0], True)] if node.module else ((a.name, True) for a in node.names)
        elif isinstance(node, ast.ImportFrom): yield node.module.split(".")[0], False


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_never_point_up(name):
    floor = floors()
    assert name in floor, f"add {name} to the table of floors in CONTRIBUTING.md"
    for other in {m for m, ours in imports(MODULES[name]) if ours}:
        assert floor[other] < floor[name] or (name, other) in SIDEWAYS, f"{name} (floor {floor[name]}) imports {other} (floor {floor[other]})"


def test_each_module_comes_from_one_notebook():
    made = [line.split()[-1] for cells in CELLS.values() for c in cells if c["cell_type"] == "code" for line in c["source"] if line.startswith("#| default_exp")]
    assert sorted(made) == sorted(MODULES)


def test_reading_order_is_import_order():
    "a notebook's module imports only modules of notebooks before it"
    order = {re.sub(r"^\d+[a-z]?_", "", p.stem): i for i, p in enumerate(sorted((ROOT/"nbs"/"api").glob("*.ipynb")))}
    for name, path in MODULES.items():
        for other in {m for m, ours in imports(path) if ours}: assert order[other] < order[name], f"{name} is read before {other}"


def test_requirements_have_floors_and_are_complete():
    config = configparser.ConfigParser(); config.read(ROOT/"settings.ini")
    needs, dev = (config["DEFAULT"][k].split() for k in ("requirements", "dev_requirements"))
    assert all(">=" in n for n in needs + dev)
    known = {n.split(">=")[0] for n in needs} | set(sys.stdlib_module_names)
    used = {DISTRIBUTION.get(m, m) for p in MODULES.values() for m, ours in imports(p) if not ours}
    assert used - known == set(), "imported but not in settings.ini"
    assert "settings.ini" in (ROOT/"MANIFEST.in").read_text(), "without it the source distribution can't be built"


def test_readme_is_the_index():
    spec = importlib.util.spec_from_file_location("readme", ROOT/".ci"/"readme.py"); readme = importlib.util.module_from_spec(spec); spec.loader.exec_module(readme)
    for name, content in readme.render(ROOT/"nbs"/"index.ipynb").items():
        assert (ROOT/name).read_bytes() == content, f"{name} is not what the index renders to: python .ci/readme.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    first, *rest = CELLS[path]
    assert re.match(r"# .+\n\n> .+", "".join(first["source"])), "begin with a title and a one-line subtitle"
    for c in rest:
        if c["cell_type"] != "code": continue
        assert c["execution_count"] is None
        for o in c["outputs"]:
            assert o.get("name") != "stderr" and o["output_type"] != "error", "".join(o.get("text", []))[:200]
            text = json.dumps(o.get("data", o.get("text", "")))
            assert not re.search(r"\d+%\|| object at 0x", text), "a progress bar or an address is stored"


def test_no_machine_is_named():
    "no path of a machine, no package registry"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    bad = re.compile(r"(?<![\w.-])/(?:tmp|work|root|home|farm)/|pypi\.org|files\.pythonhosted|registry\.npm|deb\.debian")
    for f in filter(None, files):
        if f != "tests/test_house.py" and not f.endswith((".png", ".parquet")): assert not bad.search((ROOT/f).read_text()), f


def test_project_files_parse():
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    assert set(project["scripts"]) == {"lop-run", "lop-show", "lop-data", "lop-slurm"}
    for f in [*(ROOT/".github"/"workflows").glob("*.yaml"), ROOT/"_quarto.yml", ROOT/"CITATION.cff"]: assert yaml.safe_load(f.read_text()), f
    from lop_nb import __version__
    assert yaml.safe_load((ROOT/"CITATION.cff").read_text())["version"] == __version__
