# SPDX-License-Identifier: Apache-2.0
"""The lower bounds in pyproject.toml are true: the oldest versions import the package and train with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.test_project import PROJECT, ROOT

OLDEST_TORCH = os.environ.get("OLDEST_TORCH", "")

# What a user of an old environment does: train, save, resume, and start the command line.
SCRIPT = """
import tempfile
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_galore import GaLoreOptimizer, GaLoreStrategy

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - batch).pow(2).mean()

    def train_dataloader(self):
        data = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(data, batch_size=8)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

def fit(folder, epochs, ckpt_path=None):
    torch.manual_seed(0)
    module = Module()
    strategy = GaLoreStrategy(rank=4, update_proj_gap=3)
    trainer = Trainer(strategy=strategy, accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=False,
                      enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, ckpt_path=ckpt_path)
    assert any(isinstance(one, GaLoreOptimizer) for one in trainer.strategy.optimizers)
    return module, trainer

with tempfile.TemporaryDirectory() as folder:
    module, trainer = fit(folder, 2)
    half, half_trainer = fit(folder, 1)
    half_trainer.save_checkpoint(folder + "/half.ckpt")
    resumed, _ = fit(folder, 2, ckpt_path=folder + "/half.ckpt")
for a, b in zip(module.parameters(), resumed.parameters()):
    assert torch.equal(a, b)
assert trainer.global_step == 8

from lightning_galore.cli import main
try:
    main(["fit", "--help"])
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def oldest_requirements() -> list[str]:
    """Each core dependency at exactly its lower bound; torch at what the caller can get."""
    pins = []
    for requirement in map(Requirement, PROJECT["dependencies"]):
        bound = next(str(one.version) for one in requirement.specifier if one.operator == ">=")
        if requirement.name == "torch":
            assert Version(OLDEST_TORCH) >= Version(bound)
            bound = OLDEST_TORCH
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        pins.append(f"{requirement.name}{extras}=={bound}")
    return pins


@pytest.mark.oldest
@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(not OLDEST_TORCH, reason="builds an environment of its own: run `make test-oldest`")
def test_oldest_versions_train_and_resume(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *oldest_requirements()], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
    (tmp_path / "script.py").write_text(SCRIPT)
    result = subprocess.run([python, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
