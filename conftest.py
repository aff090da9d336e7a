"Make each notebook of `nbs/` one pytest item, run by nbdev under nbdev's own rules; `pytest --flags slow` runs the cells marked so."
import os

os.environ |= dict(IN_TEST="1", MPLBACKEND=os.environ.get("MPLBACKEND", "agg"), OMP_NUM_THREADS="1", WANDB_MODE="disabled")

import pytest
from nbdev.config import get_config
from nbdev.test import nb_test_cells, test_nb as run_notebook


def pytest_addoption(parser):
    parser.addoption("--flags", default="", help="run cells with these nbdev flags too, for example slow")


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and not any(p[0] in "_." for p in file_path.relative_to(parent.config.rootpath).parts):
        return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self): yield Notebook.from_parent(self, name=self.path.stem)


class Notebook(pytest.Item):
    def runtest(self):
        config = get_config(self.path)
        flags = dict(skip_flags=config.tst_flags.split(), force_flags=self.config.getoption("--flags").split())
        if not nb_test_cells(self.path, **flags): pytest.skip("no cells to run")
        passed, _ = run_notebook(self.path, basepath=config.config_path, cell_timeout=config.cell_timeout, **flags)
        if not passed: pytest.fail("a cell failed: see the traceback in the captured output", pytrace=False)

    def reportinfo(self): return self.path, None, self.path.name
