# SPDX-License-Identifier: Apache-2.0
"""Logs as a run would leave them: a loss that falls, subspaces that settle, gaps that grow."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

KINDS = (
    ("mlp.down_proj", "688x256"),
    ("mlp.gate_proj", "256x688"),
    ("mlp.up_proj", "256x688"),
    ("self_attn.k_proj", "256x256"),
    ("self_attn.o_proj", "256x256"),
    ("self_attn.q_proj", "256x256"),
    ("self_attn.v_proj", "256x256"),
)
REFRESH_COLUMNS = [
    *("step", "optimizer", "weight", "shape", "side", "rank", "gap", "overlap", "captured_energy", "found", "spectrum")
]


def weights(layers: int, kinds: int = len(KINDS)) -> list[tuple[str, str]]:
    """Names and shapes of a LLaMA's linear layers."""
    return [(f"model.layers.{i}.{kind}.weight", shape) for i in range(layers) for kind, shape in KINDS[:kinds]]


def refresh_rows(layers: int, steps: int, gap: int, *, kinds: int = len(KINDS), rank: int = 64) -> list[dict[str, str]]:
    """One row a refresh. Deeper layers settle sooner, and what has settled is refreshed half as often."""
    noise = random.Random(0)
    rows = []
    for index, (weight, shape) in enumerate(weights(layers, kinds)):
        depth = index / (layers * kinds)
        kind = index % kinds
        step, own_gap, refreshes = 0, gap, 0
        while step < steps:
            time = step / steps
            drift = min(max(0.85 * math.exp(-(1.5 + 3 * depth) * time) + 0.06 * noise.gauss(0, 1) - 0.02 * kind, 0), 1)
            energy = min(max(0.9 - 0.25 * depth - 0.2 * time + 0.02 * kind + 0.02 * noise.gauss(0, 1), 0), 1)
            decay = 0.12 + 0.3 * (1 - time) + 0.05 * kind
            spectrum = [3.0 * math.exp(-decay * i) * (1 + 0.03 * noise.random()) for i in range(16)]
            if refreshes and drift < 0.3 and own_gap < 4 * gap:
                own_gap *= 2
            rows.append(
                {
                    "step": str(step),
                    "optimizer": "0",
                    "weight": weight,
                    "shape": shape,
                    "side": "left" if shape.startswith("256x6") else "right",
                    "rank": str(rank if time < 0.5 else rank // 2),
                    "gap": str(own_gap),
                    "overlap": f"{1 - drift:.6f}" if refreshes else "",
                    "captured_energy": f"{energy:.6f}",
                    "found": "0" if index == 3 and refreshes == 2 else "1",
                    "spectrum": " ".join(f"{value:.5g}" for value in sorted(spectrum, reverse=True)),
                }
            )
            step += own_gap
            refreshes += 1
    return sorted(rows, key=lambda row: int(row["step"]))


def metric_rows(refreshes: list[dict[str, str]], steps: int, every: int, *, cuda: bool = True) -> list[dict[str, str]]:
    """What the module, LearningRateMonitor and the callback log, each into rows of its own as CSVLogger has them."""
    noise = random.Random(1)
    rows: list[dict[str, str]] = []
    done = 0
    for step in range(every - 1, steps, every):
        warm = min(step / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))
        while done < len(refreshes) and int(refreshes[done]["step"]) <= step:
            done += 1
        recent = [row for row in refreshes[:done] if row["overlap"]][-64:]
        drifts = [1 - float(row["overlap"]) for row in recent]
        energy = [float(row["captured_energy"]) for row in refreshes[:done][-64:]]
        loss = 2.9 + 7 * math.exp(-5 * step / steps) + 0.12 * noise.gauss(0, 1)
        rows.append({"step": str(step), "epoch": "0", "train_loss": repr(loss)})
        rows.append(
            {"step": str(step), "epoch": "0", "lr-AdamW/pg1": repr(1e-3 * warm), "lr-AdamW/pg2": repr(1e-3 * warm)}
        )
        ours = {
            "galore/captured_energy": sum(energy) / len(energy),
            "galore/gap_mean": 200.0,
            "galore/rank_mean": 64.0,
            "galore/refreshes": done,
            "galore/refresh_time_share": 0.02 + 0.16 * math.exp(-4 * step / steps) + 0.01 * noise.random(),
            "galore/state_bytes": 2.1e8 if step < steps / 2 else 1.1e8,
            "galore/bytes_saved": 6.3e8 if step < steps / 2 else 7.3e8,
        }
        if drifts:  # not before the second refresh
            ours |= {"galore/drift_mean": sum(drifts) / len(drifts), "galore/drift_max": max(drifts)}
        if cuda:
            ours["galore/peak_memory_bytes"] = 5.6e9 + 3e7 * noise.random()
        rows.append({"step": str(step), **{name: repr(value) for name, value in ours.items()}})
        if (step + 1) % (every * 20) == 0:
            rows.append({"step": str(step), "epoch": "0", "val_loss": repr(2.95 + 7 * math.exp(-5 * step / steps))})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]], columns: list[str] | None = None) -> Path:
    """As CSVLogger writes: sorted columns, CRLF, an empty cell where nothing was logged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns or sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_run(
    folder: Path, *, layers: int = 2, steps: int = 2000, gap: int = 100, every: int = 10, kinds: int = 4
) -> Path:
    """A whole run: ``metrics.csv`` and ``galore_refreshes.csv``."""
    refreshes = refresh_rows(layers, steps, gap, kinds=kinds)
    write_csv(folder / "metrics.csv", metric_rows(refreshes, steps, every))
    write_csv(folder / "galore_refreshes.csv", refreshes, REFRESH_COLUMNS)
    return folder
