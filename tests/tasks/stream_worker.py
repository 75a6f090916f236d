# SPDX-License-Identifier: Apache-2.0
"""One of two processes that read a stream, keep their place together, and go on: run by test_causal_lm_data.py."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_galore.tasks import CausalLMDataModule
from tests.tasks.texts import stand_in_trainer


def loader(files: str, bpe: str) -> Any:
    data = CausalLMDataModule(
        files=files, validation_files=files, tokenizer_name=bpe, streaming=True, block_size=16, batch_size=4
    )
    data.setup("fit")
    data.trainer = stand_in_trainer(dist.get_rank(), dist.get_world_size())
    found = data.train_dataloader()
    found.progress = None  # what was handed out counts
    return found


def main(folder: Path) -> None:
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    files, bpe = str(folder / "shard*.jsonl"), str(next(folder.glob("bpe-*")))
    first = loader(files, bpe)
    batches = iter(first)
    for _ in range(3):
        next(batches)
    state = first.state_dict()
    rest = [batch["input_ids"] for batch in islice(batches, 4)]
    second = loader(files, bpe)
    second.load_state_dict(state)
    again = [batch["input_ids"] for batch in islice(second, 4)]
    torch.save({"rest": rest, "again": again, "state": state}, folder / f"results_{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
