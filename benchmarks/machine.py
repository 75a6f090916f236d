# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on: processor, threads, versions, commit, date. No names of hosts, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("torch", "lightning", "lightning-galore", "galore-torch", "apollo-torch", "q-galore-torch", "transformers")


def describe(device: torch.device, *, threads: int) -> dict[str, Any]:
    """The header of a report.

    Args:
        device: On which is measured.
        threads: That torch may use.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "load_average_1_min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "lapack": "mkl" if torch.backends.mkl.is_available() else "not mkl",
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def headline(machine: dict[str, Any]) -> str:
    """The header in one line, for tables and pictures."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    where = machine["cpu"] if machine["device"] == "cpu" else f"{machine['device']}, {machine['cpu']}"
    return f"{where}, {machine['cores']} cores, {versions}, commit {machine['commit']}, {machine['date'][:10]}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's model; the platform module knows it on some systems only."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The short commit, with ``+changes`` when the tree differs from it in more than results."""
    commit = _git("rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}+changes" if _git("status", "--porcelain", "--", ".", ":!benchmarks/results") else commit


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
