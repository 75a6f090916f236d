# SPDX-License-Identifier: Apache-2.0
"""Runs a notebook in its folder and writes its outputs into it: ``python docs/tools/run_notebook.py NOTEBOOK``.

Without a network, so that it is the run that everybody can repeat. What libraries say on stderr (progress bars, paths
of the machine) and what the kernel says of itself is left out.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> None:
    """Execute the notebook at ``path`` and replace its outputs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=3600, resources=folder, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve())
