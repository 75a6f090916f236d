# SPDX-License-Identifier: Apache-2.0
"""Documents as blocks of equal length: one after the other with an end-of-text token between, nothing padded."""

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_galore.tasks.resumable import StatedStream

#: The token ids of documents, each with its end-of-text token.
Encode: TypeAlias = Callable[[list[str]], list[list[int]]]

_DOCUMENTS_AT_ONCE = 256


class PackedBlocks(Dataset[dict[str, Tensor]]):
    r"""All blocks of a text, in memory (4 bytes a token).

    The last tokens, fewer than a block, are left out. Row ``i`` is ``{"input_ids", "labels"}``, each ``(block_size,)``;
    a causal model shifts the labels itself.

    Args:
        documents: The texts.
        encode: Makes token ids of several texts.
        block_size: Tokens a block.
        most: Blocks at most; reading stops there.

    Example:
        >>> blocks = PackedBlocks(["ab", "cde"], lambda texts: [[*map(ord, t), 0] for t in texts], 3)
        >>> [bytes(blocks[i]["input_ids"].tolist()) for i in range(len(blocks))]
        [b'ab\x00', b'cde']
    """

    def __init__(self, documents: Iterable[str], encode: Encode, block_size: int, most: int | None = None) -> None:
        pieces, tokens, self.documents = [], 0, 0
        for texts in _groups(documents):
            ids = torch.tensor(list(chain.from_iterable(encode(texts))), dtype=torch.int32)
            pieces.append(ids)
            tokens, self.documents = tokens + len(ids), self.documents + len(texts)
            if most is not None and tokens >= most * block_size:
                break
        blocks = tokens // block_size if most is None else min(most, tokens // block_size)
        self.tokens = tokens
        self.ids = torch.cat([*pieces, torch.empty(0, dtype=torch.int32)])[: blocks * block_size].view(-1, block_size)

    def __len__(self) -> int:
        """How many blocks."""
        return len(self.ids)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index].long()
        return {"input_ids": ids, "labels": ids}


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for text in documents:
        group.append(text)
        if len(group) == _DOCUMENTS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


class PackedStream(StatedStream):
    """Batches of blocks from a text that is read while it is trained on, over and over.

    Each worker reads its own documents and packs them by itself. No token is lost: what does not fill a batch at the
    end of the text begins the next pass. The state of a worker is its place in the text and the tokens that wait.

    Args:
        rows: A ``datasets.IterableDataset``, the part of this process.
        text_of: The document in a row; None leaves the row out.
        encode: Makes token ids of several texts.
        block_size: Tokens a block.
        batch_size: Blocks a batch.
        seed: Of the order of the files. Within a file the order is that of the file.
    """

    def __init__(
        self,
        rows: Any,
        text_of: Callable[[dict[str, Any]], str | None],
        encode: Encode,
        *,
        block_size: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rows, self.text_of, self.encode = rows, text_of, encode
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed

    @override
    def batches(self, state: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Batches of ``(batch_size, block_size)`` tokens, each with the state after it."""
        # The number of a pass lies in memory that all workers share: a copy is this worker's own.
        rows = copy.deepcopy(self.rows)
        need = self.block_size * self.batch_size
        waiting: list[int] = list(state["waiting"]) if state else []
        for pass_ in count(state["pass"] if state else 0):
            rows.set_epoch(1 + pass_ + self.seed)  # an order of the files for each
            if state and pass_ == state["pass"] and state["rows"]:
                rows.load_state_dict(state["rows"])
            found = bool(state)
            for text in filter(None, map(self.text_of, rows)):
                found = True
                waiting += self.encode([text])[0]
                while len(waiting) >= need:
                    ids = torch.tensor(waiting[:need]).view(self.batch_size, self.block_size)
                    waiting = waiting[need:]
                    # A copy: a worker pickles it later, when the list has grown.
                    where = {"pass": pass_, "rows": rows.state_dict(), "waiting": list(waiting)}
                    yield {"input_ids": ids, "labels": ids}, where
            state = None
            if not found:
                raise ValueError("One of the workers has no document to read: use fewer num_workers, or more files.")
