# SPDX-License-Identifier: Apache-2.0
"""One process of the runs in plain torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_galore.distributed import OrderedAverage, Team

from .cases import CASES, together
from .processes import begin, end

NUMBERS = 7
ORDERS = ("same", "other", "reversed")


def averages(rank: int, arrival: str, bucket_bytes: int) -> dict[str, Any]:
    """Average tensors of mixed dtypes that come in an order of their own on each process, some on one, some nowhere.

    The tensor of index i is filled with 10 i + rank. Nobody has the third, and only the first process the fifth.
    """
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    keys = [torch.zeros(i + 1) for i in range(NUMBERS)]
    tensors = [torch.full((i + 1, 2), 10.0 * i + rank, dtype=kinds[i % 3]) for i in range(NUMBERS)]
    done: list[int] = []
    index = {key: i for i, key in enumerate(keys)}
    average = OrderedAverage(Team(), keys, done=lambda key: done.append(index[key]), bucket_bytes=bucket_bytes)
    order = list(range(NUMBERS))
    if arrival == "reversed" or (arrival == "other" and rank):
        order.reverse()
    for i in order:
        if i != 2 and not (i == 4 and rank):
            average.put(keys[i], tensors[i])
    early = list(done)
    filled: list[int] = []

    def fill(key: Tensor) -> Tensor:
        filled.append(index[key])
        tensors[index[key]] = torch.zeros_like(tensors[index[key]])
        return tensors[index[key]]

    absent = [index[key] for key in average.finish(fill)]
    return {"values": tensors, "done": done, "early": early, "filled": filled, "absent": absent}


def dropped(rank: int) -> Tensor:
    """A window that both drop after their buckets have gone, and one that follows it."""
    team, key = Team(), torch.zeros(1)
    first = OrderedAverage(team, [key], done=lambda _: None, bucket_bytes=1)
    first.put(key, torch.full((3,), float(rank)))
    first.drop()
    value = torch.full((3,), 10.0 + rank)
    second = OrderedAverage(team, [key], done=lambda _: None)
    second.put(key, value)
    second.finish(torch.zeros_like)
    return value


def differing(rank: int) -> dict[str, list[str]]:
    """Which of three tensors differ: none, one in its lowest bit, one with two entries swapped."""
    generator = torch.Generator().manual_seed(0)
    names = {"weight": torch.float32, "basis": torch.bfloat16, "codes": torch.int8, "flags": torch.bool}
    tensors = {name: (torch.randn(5, 7, generator=generator) * 9).to(dtype) for name, dtype in names.items()}
    tensors["number"] = torch.tensor(3.0)
    tensors["empty"] = torch.zeros(0)
    found = {"none": Team().differing(tensors)}
    if rank:
        tensors["basis"].view(torch.int16)[4, 6] ^= 1
    found["bit"] = Team().differing(tensors)
    if rank:
        tensors["basis"].view(torch.int16)[4, 6] ^= 1
        tensors["codes"][0] = tensors["codes"][0].flip(0)
    found["swap"] = Team().differing(tensors)
    return found


def main(folder: Path) -> None:
    rank = begin()
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            results[name] = together(case, rank)
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
    for arrival in ORDERS:
        for bucket_bytes in (1, 40, 2**20):
            results[f"average-{arrival}-{bucket_bytes}"] = averages(rank, arrival, bucket_bytes)
    results["dropped"], results["differing"] = dropped(rank), differing(rank)
    results["divided"] = [Team().divide(costs) for costs in ([5.0, 1.0, 4.0, 2.0, 2.0], [1.0] * 4, [], [3.0])]
    end(folder, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
