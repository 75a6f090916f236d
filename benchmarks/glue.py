# SPDX-License-Identifier: Apache-2.0
"""The GLUE recipes on the tasks' own files, with a small encoder and a short schedule: do they run to a result?

    python -m benchmarks.glue --data FOLDER             # a folder with cola/, mrpc/, rte/ and sst2-sentence/

Through the command line, as a user runs them: MiniLM weights in RoBERTa's classes instead of RoBERTa-base, one epoch
instead of 30. So these are no figures of GLUE's leaderboard, and none to hold beside published ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import machine, pictures, results
from benchmarks.results import Report, Table, Target
from lightning_galore.cli import GaLoreCLI

HEADER = ("task", "method", "metric", "steps", "mean", "seeds", "more frequent label")
#: The tasks on which a short run must beat the more frequent label.
MUST_LEARN = ("sst2", "mrpc")
RECIPES = Path(__file__).parent.parent / "recipes" / "glue"


@dataclass(frozen=True, kw_only=True)
class Short:
    """What is shorter than in a task's recipe, and where its files are.

    Args:
        data: Options of the data, with ``{}`` for the folder.
        max_length: Tokens a row.
    """

    data: dict[str, str]
    max_length: int


SHORT: dict[str, Short] = {
    # GLUE's 67,349 phrases are another training set than these 6,920 sentences.
    "sst2": Short(data={"data_dir": "{}/sst2-sentence", "train_limit": "2400"}, max_length=64),
    # The pairs of MSR's own release: GLUE's development set is another part of them.
    "mrpc": Short(data={"data_dir": "{}/mrpc"}, max_length=64),
    "rte": Short(
        data={"train_file": "[{0}/rte/train.tsv, {0}/rte/val.tsv]", "validation_file": "{}/rte/dev.tsv"}, max_length=64
    ),
    "cola": Short(data={"data_dir": "{}/cola", "train_limit": "3200"}, max_length=48),
}


def command(task: str, seed: int, *, data: Path, rank: int = 8, full: bool = False) -> list[str]:
    """Arguments of ``lightning-galore`` that train one task.

    Args:
        task: One of :data:`SHORT`.
        seed: Of the head, the order of the rows and the dropout.
        data: The folder with the tasks' files.
        rank: 4 or 8, as the recipes are.
        full: Without GaLore, all else alike.
    """
    short = SHORT[task]
    options = {
        "seed_everything": seed,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.callbacks": "null",  # the recipe keeps the best epoch of 30; this is the last one
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "model.model": "minilm",
        "model.lr": 3e-4,  # of a short run, as in recipes/demo.yaml
        "data.batch_size": 32,
        "data.max_length": short.max_length,
        **{f"data.{name}": value.format(data) for name, value in short.data.items()},
    }
    # A basis that is never renewed would hide what renewing does.
    galore = {"trainer.strategy.init_args.scale": 4, "trainer.strategy.init_args.update_proj_gap": 50}
    options |= {"trainer.strategy": "auto"} if full else galore
    said = [f"--{name}={value}" for name, value in options.items()]
    return ["fit", f"--config={RECIPES / f'{task}_r{rank}.yaml'}", *said]


def train(task: str, seed: int, *, data: Path, rank: int = 8, full: bool = False) -> dict[str, Any]:
    """Scores of one run on the validation data, with those of always answering the more frequent label."""
    cli = GaLoreCLI(args=command(task, seed, data=data, rank=rank, full=full))
    scores = {name: float(value) for name, value in cli.trainer.callback_metrics.items() if name.startswith("val/")}
    return {
        "task": task,
        "method": "AdamW, full rank" if full else f"GaLore, rank {rank}",
        "seed": seed,
        "steps": cli.trainer.global_step,
        "scores": scores,
        "majority": _majority(cli),
    }


def _majority(cli: GaLoreCLI) -> dict[str, float]:
    batches = [batch["labels"] for loader in cli.datamodule.val_dataloader() for batch in loader]
    labels = torch.cat(batches)
    metrics: Any = cli.model.metrics["val"][0]  # type: ignore[index,union-attr]
    metrics.reset()
    return {f"val/{name}": float(v) for name, v in metrics(labels.mode().values.expand_as(labels), labels).items()}


def _rows(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for task, method, same in _alike(runs):
        for name in (name for name in same[0]["scores"] if name != "val/loss"):
            scores = [run["scores"][name] for run in same]
            seeds, constant = ", ".join(f"{score:.3f}" for score in scores), same[0]["majority"][name]
            metric, steps = name.removeprefix("val/"), str(same[0]["steps"])
            yield task, method, metric, steps, f"{mean(scores):.3f}", seeds, f"{constant:.3f}"


def _alike(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Task, method and their runs, which differ by the seed."""
    for task, method in dict.fromkeys((run["task"], run["method"]) for run in runs):
        yield task, method, [run for run in runs if (run["task"], run["method"]) == (task, method)]


def _targets(runs: Sequence[dict[str, Any]]) -> Iterator[Target]:
    for task, method, same in _alike(runs):
        if task in MUST_LEARN:
            worst = min(run["scores"]["val/accuracy"] for run in same)
            text = f"{task}, {method}: accuracy above that of the more frequent label, every seed"
            yield Target(text=text, value=worst, bound=same[0]["majority"]["val/accuracy"] + 0.001)


def _picture(report: Report) -> Figure:
    groups = [(task, method, same) for task, method, same in _alike(report.measurements)]
    figure, (ax,) = pictures.grid(1, 1, width=9.0, height=0.8 + 0.45 * len(groups))
    for place, (_, method, same) in enumerate(groups):
        name = next(iter(same[0]["majority"]))
        colour = pictures.THEIRS if "full" in method else pictures.OURS
        ax.plot([run["scores"][name] for run in same], [place] * len(same), "o", color=colour, alpha=0.7)
        ax.plot(same[0]["majority"][name], place, "|", color="black", markersize=16)
    names = [
        f"{task}, {next(iter(same[0]['majority'])).removeprefix('val/')}: {method}" for task, method, same in groups
    ]
    ax.set_yticks(range(len(groups)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("score of each seed; the bar is that of always answering the more frequent label", fontsize=8)
    pictures.finish(figure, title="GLUE recipes, short runs, MiniLM weights in RoBERTa's classes", report=report)
    return figure


def main(args: Sequence[str] | None = None) -> int:
    """Train, show and write."""
    parser = ArgumentParser(prog="python -m benchmarks.glue", description="Short runs of the GLUE recipes.")
    parser.add_argument("--data", type=Path, required=True, help="folder with cola/, mrpc/, rte/ and sst2-sentence/")
    parser.add_argument("--tasks", type=list[str], default=list(SHORT), help=f"of {', '.join(SHORT)}")
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=8, help="4 or 8")
    parser.add_argument("--baseline", type=bool, default=True, help="also AdamW at full rank, at the first seed")
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    chosen = parser.parse_args(args)
    unknown = [task for task in chosen.tasks if task not in SHORT]
    if unknown:
        parser.error(f"tasks={unknown} are not known; choose of {', '.join(SHORT)}")
    torch.set_num_threads(1)
    header, runs = machine.describe(torch.device("cpu"), threads=1), []
    for task in chosen.tasks:
        for seed in chosen.seeds:
            runs.append(train(task, seed, data=chosen.data, rank=chosen.rank))
        if chosen.baseline:
            runs.append(train(task, chosen.seeds[0], data=chosen.data, rank=chosen.rank, full=True))
    report = Report(
        name="-".join(["glue", *chosen.tasks]),
        machine=header,
        settings={"clock": "one thread", **{task: asdict(SHORT[task]) for task in chosen.tasks}},
        measurements=runs,
        tables=[Table(title="MiniLM weights in RoBERTa's classes", header=HEADER, rows=list(_rows(runs)))],
        targets=list(_targets(runs)),
    )
    results.show(report, Console(width=120))
    results.write(report, _picture(report), chosen.out)
    return int(not all(target.passed for target in report.targets))


if __name__ == "__main__":
    sys.exit(main())
