# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_galore import __version__
from lightning_galore.cli import GaLoreCLI, main
from lightning_galore.optimizer import GaLoreOptimizer
from tests.tasks.tiny import SENTENCES, build_tiny_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_model(tmp_path_factory.mktemp("tiny_roberta"))


@pytest.fixture
def recipe(tiny_model: str, tmp_path: Path) -> str:
    """A whole configuration on a tiny model and the slice, with short class names."""
    content = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "strategy": {"class_path": "lightning_galore.GaLoreStrategy", "init_args": {"rank": 8, "scale": 2.0}},
            "max_steps": 2,
            "default_root_dir": str(tmp_path),
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"class_path": "GlueModule", "init_args": {"task": "demo", "model": tiny_model}},
        "data": {
            "class_path": "GlueDataModule",
            "init_args": {"train_file": str(SENTENCES), "train_limit": 16, "validation_size": 8, "batch_size": 8},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_fit_then_validate_test_and_predict_from_the_checkpoint(recipe: str, tmp_path: Path) -> None:
    assert main(["fit", "-c", recipe]) == 0
    checkpoint = next((tmp_path / "checkpoints").glob("*.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    for command in ("validate", "test", "predict"):
        assert main([command, "-c", recipe, "--ckpt_path", str(checkpoint)]) == 0
    assert main(["fit", "-c", recipe, "--ckpt_path", str(checkpoint), "--trainer.max_steps", "4"]) == 0


def test_data_follow_the_model_and_the_strategy_is_galore(recipe: str) -> None:
    cli = GaLoreCLI(args=["-c", recipe, "--trainer.strategy.rank", "4"], run=False)
    assert cli.datamodule.task.name == cli.model.task.name == "demo"  # type: ignore[union-attr]
    assert cli.datamodule.tokenizer_name == cli.model.model  # type: ignore[union-attr]
    cli.trainer.fit(cli.model, cli.datamodule)
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, GaLoreOptimizer)
    assert {target.projection.rank for target in optimizer.targets.values()} == {4}


def test_strategy_by_its_registered_name(recipe: str) -> None:
    cli = GaLoreCLI(args=["-c", recipe, "--trainer.strategy=galore"], run=False)
    assert type(cli.trainer.strategy).__name__ == "GaLoreSingleDeviceStrategy"


def test_optimizer_option_of_lightning_cli_works_with_a_lazily_made_network(recipe: str) -> None:
    with pytest.warns(UserWarning, match=r"configure_optimizers` will be overridden"):
        cli = GaLoreCLI(args=["-c", recipe, "--optimizer=torch.optim.SGD", "--optimizer.lr=0.1"], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert isinstance(cli.trainer.optimizers[0], torch.optim.SGD)


def test_optimizer_of_the_module_from_yaml(recipe: str, tmp_path: Path) -> None:
    """What 8-bit GaLore needs: another optimizer by its class path, and a checkpoint that loads all the same."""
    options = ["--model.optimizer=torch.optim.NAdam", "--model.optimizer.lr=0.01"]
    cli = GaLoreCLI(args=["-c", recipe, *options], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert isinstance(cli.trainer.optimizers[0], torch.optim.NAdam)
    cli.trainer.save_checkpoint(tmp_path / "nadam.ckpt")
    assert main(["validate", "-c", recipe, *options, "--ckpt_path", str(tmp_path / "nadam.ckpt")]) == 0


def test_module_without_task_and_tokenizer(tmp_path: Path) -> None:
    boring = "lightning.pytorch.demos.boring_classes.BoringModel"
    cli = GaLoreCLI(args=[f"--model={boring}", "--trainer.accelerator=cpu", "--trainer.logger=false"], run=False)
    assert type(cli.model).__name__ == "BoringModel"


def test_targets_lists_the_weights(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "-c", recipe]) == 0
    out, err = capsys.readouterr()
    assert "Loading weights" not in err  # Transformers' bar
    assert "net.roberta.encoder.layer.0.attention.self.query.weight" in out
    assert "12 of " in out


def test_targets_without_galore(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "-c", recipe, "--trainer.strategy=auto"]) == 2
    err = capsys.readouterr().err
    assert "trainer.strategy is SingleDeviceStrategy, which projects nothing" in err
    assert "--trainer.strategy=galore" in err


def test_convert_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    galore_torch = pytest.importorskip("galore_torch")
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(12, 8))
    optimizer = galore_torch.GaLoreAdamW(
        [{"params": [weight], "rank": 2, "update_proj_gap": 10, "scale": 1.0, "proj_type": "std"}],
        lr=0.01,
        no_deprecation_warning=True,
    )
    weight.grad = torch.randn(12, 8)
    optimizer.step()
    source, target = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save(optimizer.state_dict(), source)
    assert main(["convert", str(source), str(target)]) == 0
    assert "1 projected weights" in capsys.readouterr().out
    assert target.is_file()
    assert main(["convert", str(source), str(target)]) == 2
    assert "lightning-galore: error: " in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (("--version", __version__), ("--help", "targets    list which weights")):
        with pytest.raises(SystemExit, match="0"):
            main([option])
        assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    assert "--trainer.strategy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "commands:"),
        (["train"], "there is no command 'train'."),
        (["fti"], "Did you mean 'fit'?"),
        (["-c", "recipes/demo.yaml"], "give a command first: lightning-galore fit -c recipes/demo.yaml\n"),
        (["-c", "a.yaml", "validate"], "give a command first: lightning-galore validate -c a.yaml\n"),
        (["recipes/demo.yaml"], "give a command first: lightning-galore fit -c recipes/demo.yaml\n"),
        (["--vresion"], "there is no option '--vresion'. Did you mean '--version'?"),
        (["fit", "--trainer.strategi=x"], "strategi"),
        (["fit"], "a model is needed: give a recipe"),
        (["fit", "-c", "none.yaml"], "none.yaml"),
        (["plan"], "source"),
        (["plan", "llama-60m", "--rnk", "3"], "Did you mean '--rank'?"),
        (["convert"], "source"),
    ],
)
def test_wrong_options_exit_with_2(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert message in capsys.readouterr().err


def test_errors_are_one_line_unless_asked(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ["fit", "-c", recipe, "--model.warmup_ratio", "2"]
    assert main(wrong) == 2
    err = capsys.readouterr().err
    assert "lightning-galore: error: warmup_ratio=2.0 must be at least 0 and less than 1." in err
    assert "Traceback" not in err
    assert main([*wrong, "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("LIGHTNING_GALORE_TRACEBACK", "1")
    assert main(wrong) == 2
    assert "Traceback" in capsys.readouterr().err


def test_error_in_the_strategy_is_one_line(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", recipe, "--trainer.strategy.rank", "0"]) != 0
    assert "rank=0" in capsys.readouterr().err


def test_interrupt(recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_galore.cli.GaLoreCLI", interrupt)
    assert main(["fit", "-c", recipe]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_bad_setting_of_the_strategy_is_said_in_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "demo.yaml"
    assert main(["fit", "-c", str(recipe), "--trainer.strategy.rank", "0"]) == 2
    error = capsys.readouterr().err
    assert "error: rank=0 must be at least 1; the paper uses" in error
    assert "Namespace" not in error
