# SPDX-License-Identifier: Apache-2.0
"""What a whole training step costs, forward and backward included: against other packages and full-rank AdamW.

Run it with ``python -m benchmarks.training``; README.md beside it says how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from benchmarks import limits, optimizers, pictures
from benchmarks.optimizers import FULL_RANK, OURS
from benchmarks.options import Options, progress, run
from benchmarks.results import Report, Table, Target, megabytes, milliseconds, ratio, rounded
from benchmarks.timing import Spread, in_turn, quiet, times_faster
from benchmarks.weights import SEED

NEVER = 10**9  # so that only the first step refreshes
#: A fine-tuning step may take this many of fused AdamW's, on a CPU at one thread.
MOST = 1.02
FINE_TUNING = "RoBERTa-base, r=8, 16 x 128"
PRE_TRAINING = "LLaMA-60M, r=128, 8 x 256"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and its batch.

    Args:
        name: As it stands in the tables.
        make: Builds the model with random weights, without dropout.
        rank: Of the subspaces.
        batch: Sequences, and tokens of each.
        rounds: How many steps are timed.
    """

    name: str
    make: Callable[[], nn.Module]
    rank: int
    batch: tuple[int, int]
    rounds: int = 5


def _roberta(**sizes: int) -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    return RobertaForSequenceClassification(RobertaConfig(**{**base, **dropout, **sizes}))


def _llama(**sizes: int) -> nn.Module:
    base = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8}
    return LlamaForCausalLM(LlamaConfig(**{**base, "num_attention_heads": 8, **sizes}))


CASES = (
    Case(name=FINE_TUNING, make=_roberta, rank=8, batch=(16, 128)),
    Case(name=PRE_TRAINING, make=_llama, rank=128, batch=(8, 256)),
)
QUICK_CASES = (
    Case(
        name="a small LLaMA, r=4, 2 x 8",
        make=lambda: _llama(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
        ),
        rank=4,
        batch=(2, 8),
        rounds=3,
    ),
)


def measure(options: Options) -> tuple[Report, Figure]:
    """Time the training steps of every case."""
    machine, measured = options.machine(), []
    names, notes = optimizers.runnable(options.torch_device)
    for case in QUICK_CASES if options.quick else CASES:
        progress(f"training steps of {case.name}")
        measured.append(_measure_case(case, names, options))
    report = Report(
        name="training-quick" if options.quick else "training",
        machine=machine,
        settings={
            "clock": options.clock.name,
            "model": "random weights, random tokens, no dropout",
            "order": "each round one forward and backward, then each optimizer's step on its gradients, in turns",
            "seed": SEED,
        },
        measurements=measured,
        tables=[_table(held) for held in measured],
        targets=_targets(measured, options),
        notes=notes,
    )
    return report, _picture(report)


def loss_of(model: nn.Module, case: Case, device: torch.device) -> Callable[[], Tensor]:
    """Its forward pass on one random batch."""
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    tokens = torch.randint(3, size, case.batch, device=device)
    labels = tokens[:, 0] % 2 if isinstance(model, RobertaForSequenceClassification) else tokens

    def forward() -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=labels).loss
        return loss

    return forward


def by_kind(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that are projected, and the others."""
    named = list(model.named_parameters())
    targets = [param for name, param in named if is_projected(name, param)]
    return targets, [param for name, param in named if not is_projected(name, param)]


def is_projected(name: str, param: Tensor) -> bool:
    """Whether a parameter of a transformer of the two families is one of its layers' matrices."""
    return param.ndim == 2 and ".layer" in name


def _measure_case(case: Case, names: list[str], options: Options) -> dict[str, Any]:
    torch.manual_seed(SEED)
    model = case.make().to(options.torch_device)
    forward = loss_of(model, case, options.torch_device)
    targets, others = by_kind(model)
    # On one and the same model: what a step costs does not depend on the values, and forward and backward are shared.
    made = {name: optimizers.make(name, targets, rank=case.rank, gap=NEVER, others=others) for name in names}

    def backward() -> None:
        model.zero_grad()
        forward().backward()

    backward()
    for optimizer in made.values():
        optimizer.step()  # makes the state, and the only refresh
    passes: list[float] = []
    steps: dict[str, list[float]] = {name: [] for name in names}
    with quiet():
        for turn in range(case.rounds):
            passes.append(options.clock.seconds(backward))
            for name in in_turn(names, turn):
                steps[name].append(options.clock.seconds(made[name].step))
    whole = {name: [a + b for a, b in zip(passes, own, strict=True)] for name, own in steps.items()}
    return {
        "name": case.name,
        "rank": case.rank,
        "projected": len(targets),
        "rounds": case.rounds,
        "forward_and_backward": rounded(passes),
        "optimizers": {
            name: {
                "median_s": {"step": Spread.of(steps[name]).median, "whole": Spread.of(own).median},
                "steps_of_full_rank": asdict(times_faster(whole[FULL_RANK], than=own)),
                "state_bytes": limits.state_bytes(made[name]),
                "step_peak_bytes": limits.peak_bytes(made[name].step, options.torch_device),
                "seconds": rounded(steps[name]),
            }
            for name, own in whole.items()
        },
    }


def _targets(measured: list[dict[str, Any]], options: Options) -> list[Target]:
    if options.device != "cpu" or options.threads != 1:
        return []
    return [
        Target(
            text=f"a whole training step of {held['name']}, in those of {FULL_RANK}",
            value=held["optimizers"][OURS]["steps_of_full_rank"]["median"],
            bound=MOST,
            at_least=False,
        )
        for held in measured
        if held["name"] == FINE_TUNING
    ]


def _table(held: dict[str, Any]) -> Table:
    rows = [
        (
            name,
            milliseconds(row["median_s"]["step"]),
            milliseconds(row["median_s"]["whole"]),
            ratio(Spread(**row["steps_of_full_rank"]), digits=3),
            megabytes(row["state_bytes"]),
            megabytes(row["step_peak_bytes"]),
        )
        for name, row in held["optimizers"].items()
    ]
    return Table(
        title=f"training step: {held['name']} ({held['projected']} projected weights, {held['rounds']} rounds)",
        header=("optimizer", "its step, ms", "whole, ms", f"in steps of {FULL_RANK}", "state, MB", "step's peak, MB"),
        rows=rows,
    )


def _picture(report: Report) -> Figure:
    return pictures.whole_steps(
        report,
        ways="optimizers",
        is_ours=lambda name: name == OURS,
        title=f"Whole training step without a refresh, in steps of {FULL_RANK}",
        xlabel="AdamW's steps (log), p10-p90: shorter is faster",
    )


if __name__ == "__main__":
    sys.exit(run([measure], prog="python -m benchmarks.training"))
