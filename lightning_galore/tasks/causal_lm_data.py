# SPDX-License-Identifier: Apache-2.0
"""Text for language models as a LightningDataModule: C4 from the hub, or local files; packed into blocks."""

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_galore.tasks.extras import require
from lightning_galore.tasks.packing import PackedBlocks, PackedStream
from lightning_galore.tasks.resumable import ResumableData, ResumableLoader, ResumableStream
from lightning_galore.tasks.text_files import Documents, Files, TextColumn, file_rows, first_row, hub_rows
from lightning_galore.tasks.tokenizing import Encoder, bpe_folder, load_tokenizer, train_bpe


class TextDataModule(ResumableData):
    """What data of language models share: a tokenizer, and loaders whose place in an epoch is kept in checkpoints.

    Args:
        model: The module's ``model``, whose tokenizer is taken unless another is named. From the command line it
            follows by itself.
        tokenizer_name: Hub name or folder of a tokenizer.
        batch_size: Rows a batch, on each device.
        eval_batch_size: Rows a batch in validation; ``batch_size`` by default.
        num_workers: Worker processes of each loader.
    """

    def __init__(
        self,
        model: str | None,
        tokenizer_name: str | None,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.tokenizer_name = tokenizer_name or model
        self.batch_size, self.num_workers = batch_size, num_workers
        self.eval_batch_size = eval_batch_size or batch_size
        self.tokenizer: Any = None

    def _shuffled(self, rows: Any, **options: Any) -> ResumableLoader:
        options |= self._workers(self.num_workers)
        return ResumableLoader(rows, batch_size=self.batch_size, seed=self._seed(), **self._process(), **options)

    def _in_order(self, rows: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(rows, batch_size=self.eval_batch_size, num_workers=self.num_workers, **options)


class CausalLMDataModule(TextDataModule):
    """Text in blocks of equal length for a :class:`CausalLMModule`.

    Documents follow one another with an end-of-text token between; nothing is padded, and no token is left out or comes
    twice but for the last few, which do not fill a block.

    C4 is read from the hub while it is trained on. Local files (``files``) are tokenized once and held in memory, or
    read like C4 with ``streaming``. Without ``validation_files`` a share of their documents is held out, chosen by a
    hash of the text: the same ones in every run, wherever they stand.

    A resumed run goes on with the next batch, in the middle of an epoch too, with any number of workers and processes,
    as long as their numbers stay (and, for local files in memory, ``batch_size``). Processes and workers read different
    documents. A stream has no end: set ``max_steps`` of the Trainer, and ``val_check_interval`` in batches with
    ``check_val_every_n_epoch=null``.

    Args:
        files: Local files to train on: paths, folders or patterns such as ``"c4/*.jsonl.gz"``; JSON lines, Parquet, or
            plain text. None reads ``dataset`` from the hub.
        validation_files: Local files to validate on.
        model: The module's ``model``, whose tokenizer is taken unless another is named. From the command line it
            follows by itself. A published size takes T5's, as the paper does.
        tokenizer_name: Hub name or folder of a tokenizer.
        vocab_size: Train a byte-level BPE of this many tokens on the training text instead.
        tokenizer_dir: Tokenizers that were trained are kept below this folder and found again.
        tokenizer_documents: Train it on this many documents at most.
        block_size: Tokens a block.
        batch_size: Blocks a batch, on each device.
        eval_batch_size: Blocks a batch in validation; ``batch_size`` by default.
        num_workers: Worker processes of each loader. A stream uses no more than each process has files.
        streaming: Read local files while training instead of holding their tokens in memory.
        text_column: Holds the text, in JSON lines and Parquet.
        sample_by: What is a document in a plain text file.
        validation_size: Share of the local documents held out where there are no ``validation_files``.
        validation_tokens: Validate on this many tokens at most; the paper takes 10 million.
        split_seed: Of what is held out. It is apart from the global seed, so that runs under different seeds are
            measured on the same documents.
        dataset: On the hub.
        dataset_config: Its configuration there.

    Example:
        >>> data = CausalLMDataModule(files="c4/*.jsonl", vocab_size=8192, block_size=256)
        >>> data.block_size
        256
    """

    def __init__(
        self,
        files: Files = None,
        validation_files: Files = None,
        model: str | None = None,
        tokenizer_name: str | None = None,
        vocab_size: int | None = None,
        tokenizer_dir: str = "data/tokenizers",
        tokenizer_documents: int = 50_000,
        block_size: int = 256,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        streaming: bool = False,
        text_column: str = "text",
        sample_by: Documents = "document",
        validation_size: float = 0.05,
        validation_tokens: int = 10_000_000,
        split_seed: int = 0,
        dataset: str = "allenai/c4",
        dataset_config: str | None = "en",
    ) -> None:
        super().__init__(model, tokenizer_name, batch_size, eval_batch_size, num_workers)
        if block_size < 2:
            raise ValueError(f"block_size={block_size} must be at least 2: a block's first token is not predicted.")
        if not 0 < validation_size < 1:
            raise ValueError(f"validation_size={validation_size} must be a share of the documents, between 0 and 1.")
        if validation_tokens < block_size:
            raise ValueError(f"validation_tokens={validation_tokens} is less than one block of {block_size}.")
        if vocab_size is not None and tokenizer_name is not None:
            raise ValueError(
                f"vocab_size={vocab_size} trains a tokenizer, tokenizer_name={tokenizer_name!r} names one: give one of "
                "them."
            )
        if files is None and (validation_files is not None or streaming):
            raise ValueError(
                "validation_files and streaming are for local files: give files=... too. The hub is streamed anyway."
            )
        self.files, self.validation_files = files, validation_files
        self.vocab_size, self.tokenizer_dir = vocab_size, Path(tokenizer_dir)
        self.tokenizer_documents, self.block_size = tokenizer_documents, block_size
        self.is_stream = streaming or files is None
        self.text_column, self.sample_by = text_column, sample_by
        self.validation_size, self.validation_tokens, self.split_seed = validation_size, validation_tokens, split_seed
        self.dataset, self.dataset_config = dataset, dataset_config
        self.train_blocks: PackedBlocks | None = None
        self.validation_blocks: PackedBlocks | None = None

    def _rows(self, *, held_out: bool) -> tuple[Any, TextColumn]:
        """A stream of rows, and what makes documents of them."""
        if self.files is None:
            split = "validation" if held_out else "train"
            return hub_rows(self.dataset, self.dataset_config, split), TextColumn(self.text_column)
        if self.validation_files is not None:
            argument = "validation_files" if held_out else "files"
            rows = file_rows(getattr(self, argument), argument=argument, sample_by=self.sample_by)
            return rows, TextColumn(self.text_column)
        rows = file_rows(self.files, argument="files", sample_by=self.sample_by)
        return rows, TextColumn(self.text_column, share=self.validation_size, seed=self.split_seed, held_out=held_out)

    def _source(self) -> str:
        return f"files={self.files!r}" if self.files is not None else f"dataset={self.dataset!r}"

    @override
    def prepare_data(self) -> None:
        """Train the tokenizer once a machine, before every process loads it."""
        if self.vocab_size is not None:
            train_bpe(self._tokenizer_texts(), self.vocab_size, self.tokenizer_dir)

    def _tokenizer_texts(self) -> list[str]:
        rows, text_of = self._rows(held_out=False)
        first_row(rows, [self.text_column], source=self._source())
        return list(text_of.documents(rows, self.tokenizer_documents))

    def _load_tokenizer(self) -> Any:
        if self.vocab_size is not None:
            texts = self._tokenizer_texts()
            folder = bpe_folder(texts, self.vocab_size, self.tokenizer_dir)
            if not folder.is_dir():  # without a Trainer nobody has called prepare_data
                train_bpe(texts, self.vocab_size, self.tokenizer_dir)
            return load_tokenizer(str(folder))
        if self.tokenizer_name is None:
            raise ValueError(
                "No tokenizer is named: give tokenizer_name=... or model=..., or vocab_size=... to train one."
            )
        return load_tokenizer(self.tokenizer_name)

    @override
    def setup(self, stage: str) -> None:
        """Load the tokenizer and pack what is held in memory; a second call does nothing."""
        if self.validation_blocks is not None:
            return
        self.tokenizer = self._load_tokenizer()
        encode = Encoder(self.tokenizer)
        rows, text_of = self._rows(held_out=False)
        first_row(rows, [self.text_column], source=self._source())
        if not self.is_stream:
            self.train_blocks = PackedBlocks(text_of.documents(rows), encode, self.block_size)
            if not len(self.train_blocks):
                raise ValueError(
                    f"block_size={self.block_size} is longer than the text: {self._source()} has "
                    f"{self.train_blocks.tokens} tokens in {self.train_blocks.documents} documents to train on. Lower "
                    "it, or give more text."
                )
        rows, text_of = self._rows(held_out=True)
        most = self.validation_tokens // self.block_size
        self.validation_blocks = PackedBlocks(text_of.documents(rows), encode, self.block_size, most)
        if not len(self.validation_blocks):
            raise ValueError(
                f"There is less than one block of {self.block_size} tokens to validate on "
                f"({self.validation_blocks.tokens} tokens in {self.validation_blocks.documents} documents): raise "
                f"validation_size={self.validation_size}, lower block_size, or name validation_files=..."
            )

    @override
    def train_dataloader(self) -> ResumableLoader | ResumableStream:
        """Blocks in an order that depends on the global seed and the epoch alone."""
        if self.train_blocks is not None:
            return self._resumed(self._shuffled(self.train_blocks))
        return self._resumed(self._stream())

    def _stream(self) -> ResumableStream:
        if self.trainer is not None and self.trainer.max_steps < 1:
            raise ValueError(
                f"A stream of text has no end: set max_steps of the Trainer (now {self.trainer.max_steps}), and "
                "val_check_interval in batches with check_val_every_n_epoch=null."
            )
        rows, text_of = self._rows(held_out=False)
        process = self._process()
        rank, world = process["rank"], process["world_size"]
        files = rows.n_shards
        rows = require("datasets.distributed").split_dataset_by_node(rows, rank, world)
        stream = PackedStream(
            rows,
            text_of,
            Encoder(self.tokenizer),
            block_size=self.block_size,
            batch_size=self.batch_size,
            seed=self._seed(),
        )
        # A worker without a file of its own would have nothing to read.
        workers = min(self.num_workers, files // world if files % world == 0 else files)
        return ResumableStream(stream, num_workers=workers, **process)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """The blocks held out, in order."""
        return self._in_order(self.validation_blocks)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """The same: there is no other text."""
        return self.val_dataloader()
