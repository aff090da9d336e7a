"""Render README.md and its figures from nbs/index.ipynb: python .ci/readme.py

Text and code as they stand, hidden cells left out, results below their code.
"""
import base64
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def results(cell, figures):
    "The results of a code cell; pictures are added to `figures` and named"
    for out in cell["outputs"]:
        data = out.get("data", {})
        if "image/png" in data:
            figures[name := f"README_files/figure-{len(figures) + 1}.png"] = base64.b64decode(data["image/png"])
            yield f"![]({name})"
        elif text := "".join(out.get("text", data.get("text/plain", []))).rstrip(): yield f"```\n{text}\n```"


def render(notebook):
    "The notebook as files: {name: bytes}"
    parts, figures = ["<!-- Made from nbs/index.ipynb by .ci/readme.py: edit that. -->"], {}
    for cell in json.loads(Path(notebook).read_text())["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown": parts.append(source)
        elif cell["cell_type"] == "code" and "#| hide" not in source: parts += [f"```python\n{source}\n```", *results(cell, figures)]
    return {"README.md": ("\n\n".join(parts) + "\n").encode()} | figures


if __name__ == "__main__":
    for name, content in render(ROOT/"nbs"/"index.ipynb").items():
        (ROOT/name).parent.mkdir(exist_ok=True); (ROOT/name).write_bytes(content)
