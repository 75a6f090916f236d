# SPDX-License-Identifier: Apache-2.0
"""Start worker modules as a group of processes, once for all tests that look at their results."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

WORLD = 2
ROOT = Path(__file__).parents[2]
#: Each process leaves the results of its cases here.
RESULTS = "results_{rank}.pt"


@dataclass
class Ended:
    """How one process came to its end.

    Args:
        code: Its exit status; None if it had to be killed.
        seconds: From its start.
        output: What it wrote.
    """

    code: int | None
    seconds: float
    output: str


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def launch(module: str, folder: Path, *, timeout: float = 120.0, patient: bool = False) -> list[Ended]:
    """Run a worker module in several processes, as ``torchrun`` would; kill all of them after ``timeout`` seconds.

    Soon after one has failed, the others are killed too, but where ``patient`` shall see how they end.
    """
    world = WORLD
    common = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    begin, started, outputs = time.monotonic(), [], []
    for rank in range(world):
        outputs.append((folder / f"output_{rank}.txt").open("w+"))
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", module, str(folder)],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=folder,
                stdout=outputs[-1],
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
    ended: dict[int, tuple[int | None, float]] = {}
    try:
        while len(ended) < world and time.monotonic() - begin < timeout:
            for rank, process in enumerate(started):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = process.returncode, time.monotonic() - begin
                    if process.returncode and not patient:
                        timeout = min(timeout, ended[rank][1] + 3)
            time.sleep(0.05)
    finally:
        for rank, process in enumerate(started):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            ended.setdefault(rank, (None, time.monotonic() - begin))
    texts = []
    for output in outputs:
        output.seek(0)
        texts.append(output.read())
        output.close()
    return [Ended(*ended[rank], texts[rank]) for rank in range(world)]


def results_of(
    module: str, factory: pytest.TempPathFactory, *, prepare: Callable[[Path], None] = lambda folder: None
) -> list[dict[str, Any]]:
    """What the processes of a worker module have left, one mapping each; started by the first who asks.

    Several pytest workers share one spawn: whoever makes the folder runs it, and the others wait.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / module.rsplit(".", 1)[1]
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + 150
        while not done.exists() and time.monotonic() < end:
            time.sleep(0.2)
    else:
        failed = ["the runs before it did not end"]
        try:
            prepare(folder)
            ended = launch(module, folder)
            failed = [
                f"process {i} ended with {one.code}:\n{one.output}" for i, one in enumerate(ended) if one.code != 0
            ]
        finally:
            (folder / "failed").write_text("\n".join(failed))
            done.touch()
    if not done.exists() or (folder / "failed").read_text():
        pytest.fail((folder / "failed").read_text() if done.exists() else f"{module} did not end in time")
    return [torch.load(folder / RESULTS.format(rank=rank), weights_only=False) for rank in range(WORLD)]


def begin(timeout: float = 60.0) -> int:
    """Join the group, in a worker; returns this process's rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    return dist.get_rank()


def end(folder: Path, results: dict[str, Any]) -> None:
    """Leave the results and the group, in a worker."""
    torch.save(results, folder / RESULTS.format(rank=dist.get_rank()))
    dist.barrier()
    dist.destroy_process_group()
