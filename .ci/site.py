"""Render the documentation without Quarto, and check its links: python .ci/site.py

nbdev processes the notebooks into `_proc`. Quarto, which publishes the site, takes page names from each notebook's front matter; smalldocs
takes file names, and lists every file that the sidebar names. So the notebooks are staged under their page names, and the sidebar names notebooks alone.
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

# what only Quarto reads: the second output format, and the page's name (a line of the front matter, inside a notebook's JSON)
QUARTO_ONLY = re.compile(r"^    keep-md: true\n|^  commonmark: default\n|^format-links:\n(?:[ -].*\n)+|(?<=\\n)output-file: \S+\.html\\n|^ *\"output-file: \S+\.html\\n\",?\n", re.M)
proc, stage = Path("_proc"), Path("_docs/stage")


def page(path):
    "api/04_records.ipynb → api/records.ipynb"
    return re.sub(r"(^|/)\d+[a-z]?_", r"\1", path)


def pages(contents):
    "The sidebar's entries that are pages, under their page names"
    for c in contents:
        if isinstance(c, dict): yield c | dict(contents=list(pages(c["contents"])))
        elif c.endswith((".ipynb", ".qmd", ".md")): yield page(c)


def main():
    shutil.rmtree(stage, ignore_errors=True); shutil.rmtree(proc, ignore_errors=True)
    subprocess.run(["nbdev-proc-nbs"], check=True)
    for f in filter(Path.is_file, sorted(proc.rglob("*"))):
        to = stage/page(f.relative_to(proc).as_posix()); to.parent.mkdir(parents=True, exist_ok=True)
        if f.suffix in (".ipynb", ".yml"): to.write_text(QUARTO_ONLY.sub("", f.read_text()))
        else: shutil.copy(f, to)
    sidebar = yaml.safe_load((stage/"sidebar.yml").read_text())
    sidebar["website"]["sidebar"]["contents"] = list(pages(sidebar["website"]["sidebar"]["contents"]))
    (stage/"sidebar.yml").write_text(yaml.safe_dump(sidebar))
    subprocess.run(["smalldocs", "render", "--quiet", str(stage)], check=True)
    return subprocess.run(["smalldocs", "check", str(stage)]).returncode


if __name__ == "__main__":
    sys.exit(main())
