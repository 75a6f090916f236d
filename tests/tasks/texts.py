# SPDX-License-Identifier: Apache-2.0
"""Texts, a tokenizer and a tiny language model for tests of the language-model tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.tasks.tiny import read_sentences

VOCABULARY = 400
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def sentences() -> list[str]:
    """Real sentences, each once."""
    return list(dict.fromkeys(text for text, _ in read_sentences()))


def write_jsonl(path: Path, texts: Iterable[str], column: str = "text") -> str:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def write_shards(folder: Path, shards: int, documents: int) -> str:
    """Files of unique documents, ``doc 0``, ``doc 1``, ...: a pattern for them."""
    for shard in range(shards):
        write_jsonl(folder / f"shard{shard}.jsonl", (f"doc {i}" for i in range(shard, documents, shards)))
    return str(folder / "shard*.jsonl")


def stand_in_trainer(rank: int = 0, world_size: int = 1) -> Any:
    """What a data module asks a Trainer for, as if it was one of several processes."""
    progress = SimpleNamespace(current=SimpleNamespace(processed=0), total=SimpleNamespace(processed=-1))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        max_steps=100,
        num_training_batches=float("inf"),
        strategy=SimpleNamespace(broadcast=lambda value: value),
        fit_loop=loop,
    )
