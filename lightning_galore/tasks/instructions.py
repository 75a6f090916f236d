# SPDX-License-Identifier: Apache-2.0
"""Prompts and responses, or conversations, for fine-tuning a language model on its answers alone."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_galore.tasks.causal_lm import IGNORED
from lightning_galore.tasks.causal_lm_data import TextDataModule
from lightning_galore.tasks.resumable import ResumableLoader
from lightning_galore.tasks.text_files import Files, file_rows, first_row, is_held_out
from lightning_galore.tasks.tokenizing import load_tokenizer

Row = dict[str, Any]
Messages = list[dict[str, str]]


class InstructionEncoder:
    """Token ids of a row, and its labels: the responses alone are predicted.

    Args:
        tokenizer: Of Transformers.
        template: How a prompt is written, with ``{prompt}`` in it; empty for the tokenizer's chat template.
        max_length: Longer rows are cut to this many tokens.
    """

    def __init__(self, tokenizer: Any, *, template: str, max_length: int) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length

    def __call__(self, row: Messages | tuple[str, str]) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, both ``(tokens,)``."""
        if isinstance(row, tuple):
            ids, labels = self._pair(*row)
        else:
            ids, labels = self._conversation(row)
        return {
            "input_ids": torch.tensor(ids[: self.max_length]),
            "labels": torch.tensor(labels[: self.max_length]),
        }

    def _pair(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        if not self.template:
            return self._conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])
        # The tokenizer's own beginning (BOS) for the prompt; the response goes on from there.
        before = self.tokenizer(self.template.replace("{prompt}", prompt))["input_ids"]
        if before and before[-1] == self.tokenizer.eos_token_id:
            before = before[:-1]
        after = self.tokenizer(response, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        return before + after, [IGNORED] * len(before) + after

    def _conversation(self, messages: Messages) -> tuple[list[int], list[int]]:
        ids = self._rendered(messages)
        labels = [IGNORED] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:turn], add_generation_prompt=True)
            upto = self._rendered(messages[: turn + 1])
            if ids[: len(before)] != before or ids[: len(upto)] != upto:
                raise ValueError(
                    f"The chat template writes a conversation of {len(messages)} messages otherwise than its beginning"
                    f" up to message {turn + 1}, so that its answers cannot be told from the rest. Split it into rows "
                    "that end with one answer each, or give prompts and responses with a data.template."
                )
            labels[len(before) : len(upto)] = ids[len(before) : len(upto)]
        return ids, labels

    def _rendered(self, messages: Messages, *, add_generation_prompt: bool = False) -> list[int]:
        if not messages and not add_generation_prompt:
            return []
        return list(
            self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False, add_generation_prompt=add_generation_prompt
            )
        )


class _Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, rows: Iterable[dict[str, Tensor]]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class PadRight:
    """Makes a batch of rows of different lengths, padded to the longest. An object, as it is pickled for workers.

    Args:
        padding: The token that fills rows up.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, longest)``."""
        ids = [row["input_ids"] for row in rows]
        labels = [row["labels"] for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.padding),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


class InstructionDataModule(TextDataModule):
    r"""Prompts with responses, or whole conversations, from local files; only the responses are predicted.

    A row has either ``prompt`` and ``response``, or ``messages``: a list of ``{"role", "content"}`` in which every
    message of the assistant is predicted. Prompts are written by the tokenizer's chat template, or by ``template``. A
    resumed run goes on with the next batch, in the middle of an epoch too.

    Args:
        files: Local files to train on: paths, folders or patterns; JSON lines or Parquet.
        validation_files: Local files to validate on.
        model: The module's ``model``, whose tokenizer is taken unless another is named. From the command line it
            follows by itself.
        tokenizer_name: Hub name or folder of a tokenizer.
        template: How a prompt is written, as ``"### Question:\n{prompt}\n### Answer:\n"``, for models without a chat
            template. Empty takes the tokenizer's chat template. A command line reads it as YAML: quote it twice.
        prompt_column: Holds the prompt.
        response_column: Holds the response.
        messages_column: Holds the conversation.
        max_length: Longer rows are cut to this many tokens.
        batch_size: Rows a batch, on each device.
        eval_batch_size: Rows a batch in validation; ``batch_size`` by default.
        num_workers: Worker processes of each loader.
        validation_size: Share of the rows held out, chosen by a hash of them, where there are no ``validation_files``.
        split_seed: Of what is held out.

    Example:
        >>> data = InstructionDataModule(files="answers.jsonl", model="gpt2", template="{prompt}\n")
        >>> data.max_length
        512
    """

    def __init__(
        self,
        files: Files = None,
        validation_files: Files = None,
        model: str | None = None,
        tokenizer_name: str | None = None,
        template: str = "",
        prompt_column: str = "prompt",
        response_column: str = "response",
        messages_column: str = "messages",
        max_length: int = 512,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        validation_size: float = 0.05,
        split_seed: int = 0,
    ) -> None:
        super().__init__(model, tokenizer_name, batch_size, eval_batch_size, num_workers)
        if template and "{prompt}" not in template:
            raise ValueError(f"template={template!r} must have {{prompt}} where the prompt goes.")
        if not 0 < validation_size < 1:
            raise ValueError(f"validation_size={validation_size} must be a share of the rows, between 0 and 1.")
        if max_length < 2:
            raise ValueError(f"max_length={max_length} must be at least 2: a row's first token is not predicted.")
        self.files, self.validation_files, self.template = files, validation_files, template
        self.columns = (prompt_column, response_column)
        self.messages_column, self.max_length = messages_column, max_length
        self.validation_size, self.split_seed = validation_size, split_seed
        self.rows: dict[str, _Rows] = {}

    @override
    def setup(self, stage: str) -> None:
        """Load the tokenizer and the rows; a second call does nothing."""
        if self.rows:
            return
        if self.files is None:
            raise ValueError("files=None: name local files with prompts and responses, data.files=answers.jsonl.")
        if self.tokenizer_name is None:
            raise ValueError("No tokenizer is named: give tokenizer_name=..., or the module's model=...")
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        if not self.template and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"The tokenizer {self.tokenizer_name!r} has no chat template: say how a prompt is written, for example "
                "data.template='\"{prompt}\\n\"'."
            )
        if self.validation_files is not None:
            self.rows = {"train": self._read("files", None), "validation": self._read("validation_files", None)}
        else:
            self.rows = {"train": self._read("files", False), "validation": self._read("files", True)}

    def _read(self, argument: str, held_out: bool | None) -> _Rows:
        files = getattr(self, argument)
        source = f"{argument}={files!r}"
        stream = file_rows(files, argument=argument)
        first = first_row(stream, [], source=source)
        if self.messages_column not in first:
            first_row(stream, self.columns, source=source)
        encode = InstructionEncoder(self.tokenizer, template=self.template, max_length=self.max_length)
        encoded = [encode(self._row_of(row)) for row in stream if held_out is None or self._held_out(row) is held_out]
        kept = [row for row in encoded if (row["labels"][1:] != IGNORED).any()]
        if not kept:
            raise ValueError(
                f"{source} leaves no row to {'validate' if held_out else 'train'} on: of {len(encoded)} rows none has a"
                f" response within max_length={self.max_length} tokens. Raise it, validation_size="
                f"{self.validation_size} or the number of rows."
            )
        if len(kept) < len(encoded):
            rank_zero_warn(
                f"{len(encoded) - len(kept)} of {len(encoded)} rows of {source} are left out: their prompts alone have "
                f"max_length={self.max_length} tokens, or their responses are empty."
            )
        return _Rows(kept)

    def _row_of(self, row: Row) -> Messages | tuple[str, str]:
        if self.messages_column in row:
            return [{"role": m["role"], "content": m["content"]} for m in row[self.messages_column]]
        prompt, response = self.columns
        return row[prompt], row[response]

    def _held_out(self, row: Row) -> bool:
        return is_held_out(repr(self._row_of(row)), share=self.validation_size, seed=self.split_seed)

    def _pad(self) -> PadRight:
        padding = self.tokenizer.pad_token_id
        return PadRight(self.tokenizer.eos_token_id if padding is None else padding)

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Rows in an order that depends on the global seed and the epoch alone."""
        return self._resumed(self._shuffled(self.rows["train"], collate_fn=self._pad()))

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """The rows held out, in order."""
        return self._in_order(self.rows["validation"], collate_fn=self._pad())

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """The same: there are no other rows."""
        return self.val_dataloader()
