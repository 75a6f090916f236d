# SPDX-License-Identifier: Apache-2.0
"""What the page on several devices shows works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from lightning_galore.strategies import GaLoreDDPStrategy, GaLoreModelParallelStrategy

from .docs_blocks import PAGE, loops, snippets
from .processes import ROOT, launch


def test_there_is_something_to_check() -> None:
    assert (len(loops()), len(snippets())) == (2, 3)


@pytest.mark.multiprocess
def test_the_loops_run_as_they_stand_and_learn(tmp_path: Path) -> None:
    for rank, one in enumerate(launch("tests.distributed.docs_worker", tmp_path)):
        assert one.code == 0, one.output
        assert one.output.splitlines()[-1] == "done"
        losses = [float(line.split()[1]) for line in one.output.splitlines() if re.match(r"\d+ \d", line)]
        assert len(losses) == (0 if rank else 10)
        if not rank:
            assert losses[4] < losses[0]
            assert losses[9] < losses[5]


@pytest.mark.parametrize("block", snippets())
@pytest.mark.filterwarnings("ignore")
def test_the_other_blocks_run(block: str) -> None:
    # On CPU, wherever it is run; the processes are started by fit only.
    scope: dict[str, Any] = {}
    exec(
        block.replace("Trainer(", "Trainer(accelerator='cpu', ").replace(
            "(accelerator='cpu', \n", "(accelerator='cpu',"
        ),
        scope,
    )
    if "trainer" in scope:
        assert isinstance(scope["trainer"], Trainer)
        assert isinstance(scope["trainer"].strategy, (GaLoreDDPStrategy, GaLoreModelParallelStrategy))
    else:
        model = scope["Model"]()
        assert isinstance(model, LightningModule)
        assert model.configure_optimizers().param_groups


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http|#)([^)#]+)\)", PAGE))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / "docs" / link).exists()
