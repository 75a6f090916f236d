# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder of Transformers' Trainer becomes one Lightning checkpoint, from which a run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_galore import GaLoreStrategy
from lightning_galore.convert import ConversionError, convert_checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("galore_torch")
pytest.importorskip("accelerate", reason="Transformers' Trainer needs accelerate")

GALORE = {"rank": 4, "update_proj_gap": 4, "scale": 1.0, "proj_type": "std"}
STEPS, SAVED, LR = 8, 5, 5e-3


def tokens() -> Tensor:
    """One sequence for each step."""
    starts = torch.randint(64, (STEPS, 1), generator=torch.Generator().manual_seed(1))
    return (starts + torch.arange(16)) % 64


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def train_theirs(folder: Path, optim: str = "galore_adamw") -> Any:
    """A whole run of their Trainer with their GaLore, which leaves a checkpoint behind."""
    model = make_model()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        optim=optim,
        optim_target_modules=["self_attn", "mlp"],
        optim_args=", ".join(f"{name}={value}" for name, value in GALORE.items()),
        learning_rate=LR,
        lr_scheduler_type="linear",
        warmup_steps=2,
        max_steps=STEPS,
        save_steps=SAVED,
        per_device_train_batch_size=1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    rows = [{"input_ids": one, "labels": one} for one in tokens()]
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    return model


class Ours(LightningModule):
    """The same network, groups and schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        # As Transformers makes them: first what is not projected, then what is.
        named = list(self.model.named_parameters())
        linear = {
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and ("self_attn" in name or "mlp" in name)
        }
        groups = [
            {"params": [param for name, param in named if name not in linear]},
            {"params": [param for name, param in named if name in linear], **GALORE},
        ]
        optimizer = torch.optim.AdamW(groups, lr=LR, eps=1e-6, weight_decay=0.0)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_ours(rows: Tensor, checkpoint: Path | None, folder: Path) -> tuple[Ours, Trainer]:
    module = Ours()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        strategy=GaLoreStrategy(method="galore", fix_signs=False),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(rows, batch_size=1), ckpt_path=checkpoint)  # type: ignore[arg-type]
    return module, trainer


def distance(one: Any, other: Any) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    import warnings

    folder = tmp_path_factory.mktemp("theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return folder / f"checkpoint-{SAVED}", train_theirs(folder)


@pytest.fixture
def copied(theirs: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(theirs[0], tmp_path / "copied"))


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on_as_theirs_would(theirs: tuple[Path, Any], tmp_path: Path) -> None:
    folder, finished = theirs
    report = convert_checkpoint(folder, tmp_path / "ours.ckpt", prefix="model.")
    assert report.projected == 7
    module, trainer = train_ours(tokens()[SAVED:], tmp_path / "ours.ckpt", tmp_path)
    assert trainer.global_step == STEPS
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0  # the schedule went on where it was, and has ended
    # They add eps before they correct the bias: close, not equal.
    assert distance(module.model, finished) < 2e-3
    fresh, _ = train_ours(tokens(), None, tmp_path)
    moved = distance(make_model(), finished)
    assert moved > 0.01
    assert distance(fresh.model, finished) < moved  # a whole run of ours is near, too


@pytest.mark.filterwarnings("ignore")
def test_the_folder_becomes_a_safe_lightning_checkpoint(theirs: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = theirs
    convert_checkpoint(folder, tmp_path / "ours.ckpt", prefix="model.")
    checkpoint = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    assert (checkpoint["global_step"], checkpoint["epoch"]) == (SAVED, 0)
    assert all(name.startswith("model.") for name in checkpoint["state_dict"])
    assert checkpoint["lr_schedulers"][0]["last_epoch"] == SAVED


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), r"without optimizer\.pt"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), r"model\.safetensors cannot be read"),
        (lambda folder: (folder / "trainer_state.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"global_step": -1}'), "global_step=-1"),
        (lambda folder: (folder / "scheduler.pt").write_bytes(b"x"), r"scheduler\.pt holds what"),
    ],
    ids=["no optimizer", "no weights", "broken weights", "broken json", "steps", "broken scheduler"],
)
def test_damage_is_named(copied: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(copied)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(copied, tmp_path / "ours.ckpt")
    assert not (tmp_path / "ours.ckpt").exists()


def test_weights_in_several_files(copied: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    names = sorted(weights)
    parts = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, some in parts.items():
        save_file({name: weights[name] for name in some}, copied / file)
    (copied / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    convert_checkpoint(copied, tmp_path / "ours.ckpt")
    found = torch.load(tmp_path / "ours.ckpt", weights_only=True)["state_dict"]
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ConversionError, match="does not list files of its folder"):
        convert_checkpoint(copied, tmp_path / "ours2.ckpt")


def test_the_folder_of_a_run_names_its_checkpoints(theirs: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="give one of its checkpoints, as .*checkpoint-"):
        convert_checkpoint(theirs[0].parent, tmp_path / "ours.ckpt")


def test_a_prefix_is_for_folders(theirs: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="prefix='model.' is for a folder"):
        convert_checkpoint(theirs[0] / "optimizer.pt", tmp_path / "ours.ckpt", prefix="model.")


@pytest.mark.filterwarnings("ignore")
def test_their_layerwise_run_has_saved_no_state(tmp_path: Path) -> None:
    train_theirs(tmp_path, "galore_adamw_layerwise")
    with pytest.raises(ConversionError, match=r"(?s)saves none.*layerwise"):
        convert_checkpoint(tmp_path / f"checkpoint-{SAVED}", tmp_path / "ours.ckpt")
