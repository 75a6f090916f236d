# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

pytest.importorskip("datasets")

from lightning_galore.tasks import CausalLMDataModule
from lightning_galore.tasks.text_files import find_files, is_held_out
from lightning_galore.tasks.tokenizing import Encoder, load_tokenizer, train_bpe
from tests.distributed.processes import launch
from tests.tasks.texts import VOCABULARY, sentences, stand_in_trainer, write_jsonl, write_shards


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_bpe(sentences(), VOCABULARY, tmp_path_factory.mktemp("bpe")))


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "text.jsonl", sentences()[:200])


def made(files: str, bpe: str, **options: Any) -> CausalLMDataModule:
    data = CausalLMDataModule(files=files, tokenizer_name=bpe, **{"block_size": 16, "batch_size": 4, **options})
    data.setup("fit")
    return data


def process(files: str, bpe: str, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    """The training loader of one process of several."""
    data = made(files, bpe, **options)
    data.trainer = stand_in_trainer(rank, world_size)
    return data.train_dataloader()


def tokens_of(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist()


def whole_documents(data: CausalLMDataModule, ids: list[int]) -> list[str]:
    """The documents that lie wholly within ``ids``, but for the first one, which may have begun before."""
    end = data.tokenizer.eos_token_id
    cuts = [i for i, token in enumerate(ids) if token == end]
    return [data.tokenizer.decode(ids[a + 1 : b]) for a, b in zip(cuts, cuts[1:], strict=False)]


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [2, 7, 16])
def test_packing_loses_and_repeats_no_token(jsonl: str, bpe: str, block_size: int) -> None:
    data = made(jsonl, bpe, block_size=block_size)
    encode = Encoder(data.tokenizer)
    for blocks, held_out in ((data.train_blocks, False), (data.validation_blocks, True)):
        assert blocks is not None
        texts = [text for text in sentences()[:200] if is_held_out(text, share=0.05, seed=0) is held_out]
        expected = list(chain.from_iterable(encode(texts)))
        packed = blocks.ids.flatten().tolist()
        assert packed == expected[: len(packed)]
        assert len(expected) - len(packed) < block_size
        assert (blocks.documents, blocks.tokens) == (len(texts), len(expected))
        assert packed.count(data.tokenizer.eos_token_id) in (len(texts), len(texts) - 1)  # one ends each document


def test_labels_are_the_tokens_and_an_epoch_has_each_block_once(jsonl: str, bpe: str) -> None:
    data = made(jsonl, bpe)
    batches = list(data.train_dataloader())
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)
    assert data.train_blocks is not None
    rows = torch.cat([batch["input_ids"] for batch in batches]).tolist()
    assert Counter(map(tuple, rows)) == Counter(map(tuple, data.train_blocks.ids.tolist()))
    assert rows != data.train_blocks.ids.tolist()  # but in another order


def test_a_stream_packs_every_pass_whole(tmp_path: Path, bpe: str) -> None:
    files = write_shards(tmp_path, shards=1, documents=60)
    loader = process(files, bpe, streaming=True, validation_files=files)
    ids = tokens_of(list(islice(loader, 30)))
    data = made(files, bpe)
    one_pass = list(chain.from_iterable(Encoder(data.tokenizer)([f"doc {i}" for i in range(60)])))
    assert len(ids) > 2 * len(one_pass)
    assert ids == (one_pass * 9)[: len(ids)]  # the second pass begins where the first one ends, within a block


def test_order_follows_the_seed_and_the_epoch(jsonl: str, bpe: str) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        seed_everything(seed, verbose=False)
        loader = made(jsonl, bpe).train_dataloader()
        loader.sampler.set_epoch(epoch)
        torch.randn(3)  # whatever random numbers are drawn in between
        return tokens_of(list(loader))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


# -- the split ---------------------------------------------------------------------------------------------------------


def test_the_split_is_of_the_text_alone(tmp_path: Path, bpe: str) -> None:
    texts = sentences()[:200]
    one = made(write_jsonl(tmp_path / "a.jsonl", texts), bpe, validation_size=0.2)
    back = made(write_jsonl(tmp_path / "b.jsonl", reversed(texts)), bpe, validation_size=0.2)
    streamed = made(write_jsonl(tmp_path / "c.jsonl", texts), bpe, validation_size=0.2, streaming=True)
    counts = [data.validation_blocks.documents for data in (one, back, streamed)]  # type: ignore[union-attr]
    assert counts[0] == counts[1] == counts[2]
    assert 20 < counts[0] < 60
    assert one.validation_blocks is not None
    assert streamed.validation_blocks is not None
    assert torch.equal(one.validation_blocks.ids, streamed.validation_blocks.ids)
    other = made(str(tmp_path / "a.jsonl"), bpe, validation_size=0.2, split_seed=1)
    assert other.validation_blocks is not None
    assert not torch.equal(one.validation_blocks.ids[:4], other.validation_blocks.ids[:4])


def test_validation_files_and_a_limit(tmp_path: Path, jsonl: str, bpe: str) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", sentences()[300:400])
    data = made(jsonl, bpe, validation_files=other, validation_tokens=100)
    assert data.train_blocks is not None
    assert data.validation_blocks is not None
    assert (data.train_blocks.documents, len(data.validation_blocks)) == (200, 100 // 16)


# -- several workers and processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "world", "workers"), [(4, 2, 2), (4, 1, 2), (3, 2, 0), (1, 2, 2)])
def test_workers_and_processes_read_different_documents(
    shards: int, world: int, workers: int, tmp_path: Path, bpe: str
) -> None:
    files = write_shards(tmp_path, shards, 240)
    data = made(files, bpe)
    length = sum(map(len, Encoder(data.tokenizer)([f"doc {i}" for i in range(240)])))
    seen: list[str] = []
    for rank in range(world):
        options = {"streaming": True, "num_workers": workers, "validation_files": files, "batch_size": 1}
        loader = process(files, bpe, rank, world, **options)
        count = int(0.9 * length / 16 / world)  # less than a pass, whoever is ahead
        readers = max(1, loader.num_workers)
        batches = list(islice(loader, count))
        for reader in range(readers):
            seen += whole_documents(data, tokens_of(batches[reader::readers]))
    assert len(seen) == len(set(seen))
    assert len(seen) > 0.8 * 240


def test_a_worker_without_a_file_is_not_started(tmp_path: Path, bpe: str) -> None:
    loader = process(write_shards(tmp_path, 2, 90), bpe, 0, 2, streaming=True, num_workers=4, validation_size=0.5)
    assert loader.num_workers == 1


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_blocks_in_memory(world: int, jsonl: str, bpe: str) -> None:
    seed_everything(0, verbose=False)
    parts = [torch.cat([b["input_ids"] for b in process(jsonl, bpe, rank, world)]).tolist() for rank in range(world)]
    rows = Counter(map(tuple, chain.from_iterable(parts)))
    blocks = made(jsonl, bpe).train_blocks
    assert blocks is not None
    assert set(rows) == set(map(tuple, blocks.ids.tolist()))
    assert rows.total() - len(blocks) < world  # as many rows for each: some come twice


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_a_loader_goes_on_where_it_was(streaming: bool, workers: int, world: int, tmp_path: Path, bpe: str) -> None:
    files = write_shards(tmp_path, 4, 300)
    options = {"streaming": streaming, "num_workers": workers, "validation_files": files}

    def loader() -> Any:
        seed_everything(3, verbose=False)
        found = process(files, bpe, world - 1, world, **options)
        found.progress = None  # what was handed out counts
        found.world_size = 1  # there is no other process to ask
        found.rank = 0
        return found

    first = loader()
    batches = iter(first)
    done = [next(batches) for _ in range(5)]
    state = json.loads(json.dumps(first.state_dict()))  # numbers and names only
    rest = list(islice(batches, 6))
    second = loader()
    second.load_state_dict(state)
    assert tokens_of(list(islice(second, 6))) == tokens_of(rest)
    assert tokens_of(rest) != tokens_of(done)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_keep_their_places_together(tmp_path: Path) -> None:
    write_shards(tmp_path, 4, 300)
    train_bpe(sentences(), VOCABULARY, tmp_path)
    ended = launch("tests.tasks.stream_worker", tmp_path)
    assert [process.code for process in ended] == [0, 0], "\n".join(process.output for process in ended)
    one, other = (torch.load(tmp_path / f"results_{rank}.pt") for rank in range(2))
    for process in (one, other):
        assert torch.equal(torch.stack(process["rest"]), torch.stack(process["again"]))
    assert one["state"] == other["state"]  # of both, whoever saves
    assert len(one["state"]["ranks"]) == 2
    assert not torch.equal(one["rest"][0], other["rest"][0])


def test_a_finished_epoch_is_not_repeated(jsonl: str, bpe: str) -> None:
    def loader() -> Any:
        return made(jsonl, bpe).train_dataloader()

    first, second = loader(), loader()
    assert len(list(first)) == len(first)
    second.load_state_dict(first.state_dict())
    first.sampler.set_epoch(1)
    assert tokens_of(list(second)) == tokens_of(list(first))


class Seen(LightningModule):
    """Trains nothing to speak of, and notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.batches: list[list[int]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batches.append(batch["input_ids"].flatten().tolist())
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def seen(
    data: CausalLMDataModule, folder: Path, steps: int, *, resume: Path | None = None, **options: Any
) -> list[list[int]]:
    """The batches of a run, which writes a checkpoint after each."""
    seed_everything(3, verbose=False)
    each = ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[each],
        max_steps=steps, limit_val_batches=0, **options,
    )  # fmt: skip
    model = Seen()
    trainer.fit(model, data, ckpt_path=resume)
    return model.batches


def test_a_run_that_is_resumed_at_every_end_of_an_epoch(tmp_path: Path, bpe: str) -> None:
    """Lightning's own count of epochs falls behind from the second time on."""
    files = write_shards(tmp_path, 1, 40)

    def data() -> CausalLMDataModule:
        return made(files, bpe)

    seed_everything(3, verbose=False)
    length = len(data().train_dataloader())
    batches = seen(data(), tmp_path, length)
    for epoch in range(1, 4):
        batches += seen(data(), tmp_path, (epoch + 1) * length, resume=tmp_path / f"step={epoch * length}.ckpt")
    assert batches == seen(data(), tmp_path, 4 * length)


@pytest.mark.parametrize("streaming", [False, True])
def test_where_a_run_went_on_is_no_matter_of_the_next_run(streaming: bool, tmp_path: Path, bpe: str) -> None:
    files = write_shards(tmp_path, 1, 40)
    whole = seen(made(files, bpe, streaming=streaming), tmp_path, 6)
    data = made(files, bpe, streaming=streaming)
    assert seen(data, tmp_path, 6, resume=tmp_path / "step=2.ckpt") == whole[2:]
    assert seen(data, tmp_path, 6) == whole
    assert seen(data, tmp_path, 6, resume=tmp_path / "step=3.ckpt") == whole[3:]


def test_loaders_that_are_made_anew_each_epoch_begin_at_its_start(tmp_path: Path, bpe: str) -> None:
    files, options = write_shards(tmp_path, 1, 40), {"reload_dataloaders_every_n_epochs": 1}
    whole = seen(made(files, bpe), tmp_path, 16, **options)
    assert seen(made(files, bpe), tmp_path, 16, resume=tmp_path / "step=2.ckpt", **options) == whole[2:]


def test_another_division_is_refused(tmp_path: Path, jsonl: str, bpe: str) -> None:
    loader = process(jsonl, bpe)
    loader.progress = None
    next(iter(loader))
    with pytest.raises(ValueError, match="batch_size=4, now it is 2.*Go on with batch_size=4"):
        process(jsonl, bpe, batch_size=2).load_state_dict(loader.state_dict())
    files = write_shards(tmp_path, 4, 300)
    stream = process(files, bpe, streaming=True, num_workers=2)
    with pytest.raises(ValueError, match="num_workers=2, now it is 1.*Resume with num_workers=2"):
        process(files, bpe, streaming=True).load_state_dict(stream.state_dict())


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_once_on_the_training_text(jsonl: str, tmp_path: Path) -> None:
    def data(folder: str, **options: Any) -> CausalLMDataModule:
        module = CausalLMDataModule(files=jsonl, vocab_size=VOCABULARY, tokenizer_dir=str(tmp_path / folder), **options)
        module.prepare_data()
        module.setup("fit")
        return module

    first = data("one")
    (folder,) = (tmp_path / "one").iterdir()
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    again, anew = data("one"), data("two")
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab() == anew.tokenizer.get_vocab()
    assert len(first.tokenizer) == VOCABULARY
    text = "Zürich — 東京 \u0000 tabs\tand\nlines"
    assert first.tokenizer.decode(first.tokenizer(text)["input_ids"]) == text  # nothing is unknown
    data("one", split_seed=1)  # other documents are held out: another tokenizer
    assert len(list((tmp_path / "one").iterdir())) == 2
    assert [path for path in (tmp_path / "one").iterdir() if path.name.startswith(".")] == []


# -- files -------------------------------------------------------------------------------------------------------------


def test_kinds_of_files(tmp_path: Path, bpe: str) -> None:
    import pandas

    texts = sentences()[:60]
    plain = write_jsonl(tmp_path / "a.jsonl", texts, column="body")
    with open(plain, "rb") as source, gzip.open(tmp_path / "b.jsonl.gz", "wb") as packed:
        shutil.copyfileobj(source, packed)
    pandas.DataFrame({"body": texts}).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    blocks = [
        made(str(tmp_path / name), bpe, text_column=column, validation_size=0.3, sample_by="line").train_blocks
        for name, column in (("a.jsonl", "body"), ("b.jsonl.gz", "body"), ("c.parquet", "body"), ("d.txt", "text"))
    ]
    assert blocks[0] is not None
    assert len(blocks[0]) > 10
    assert all(torch.equal(blocks[0].ids, other.ids) for other in blocks[1:] if other is not None)
    assert find_files(str(tmp_path / "*.jsonl*"), argument="files") == [plain, str(tmp_path / "b.jsonl.gz")]
    twice = [str(tmp_path / "*.jsonl"), plain, str(tmp_path / ".." / tmp_path.name / "a.jsonl")]
    assert find_files(twice, argument="files") == [plain]
    with pytest.raises(ValueError, match="files of the kinds json, parquet, text: all must be of one"):
        find_files(str(tmp_path), argument="files")


def test_missing_and_wrong_files_name_the_remedy(tmp_path: Path, jsonl: str, bpe: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"files='nowhere.jsonl' leads to no file.* a pattern in quotation"):
        made("nowhere.jsonl", bpe)
    with pytest.raises(ValueError, match=r"no column 'story'; it has 'text'. Name the right one with data.text"):
        made(jsonl, bpe, text_column="story")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl' cannot be read, or has no rows: .* one JSON object a line"):
        made(str(tmp_path / "empty.jsonl"), bpe)
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match="bad.jsonl' cannot be read"):
        made(str(tmp_path / "bad.jsonl"), bpe)
    (tmp_path / "x.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match=r"end in one of .jsonl, .json, .parquet"):
        made(str(tmp_path / "x.csv"), bpe)


def test_too_little_text_names_the_remedy(jsonl: str, bpe: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"block_size=100000 is longer than the text: .* tokens in \d+ documents"):
        made(jsonl, bpe, block_size=100_000)
    with pytest.raises(ValueError, match="less than one block of 16 tokens to validate on .* raise validation_size"):
        made(write_jsonl(tmp_path / "few.jsonl", sentences()[:5]), bpe, validation_size=1e-9)
    with pytest.raises(ValueError, match="vocab_size=9000 is more than the text gives: .* Lower it to at most that"):
        CausalLMDataModule(files=jsonl, vocab_size=9000, tokenizer_dir=str(tmp_path)).prepare_data()


def test_tokenizers_that_cannot_be_had_name_the_remedy(jsonl: str, tmp_path: Path) -> None:
    for name in ("nobody/nothing", "60m"):
        with pytest.raises(FileNotFoundError, match=r"cannot be loaded: .* trained on your text with data.vocab_size"):
            made(jsonl, name)
    with pytest.raises(ValueError, match="No tokenizer is named: give tokenizer_name="):
        CausalLMDataModule(files=jsonl).setup("fit")
    tokenizer = load_tokenizer(str(train_bpe(sentences(), VOCABULARY, tmp_path)))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="no end-of-text token"):
        made(jsonl, str(tmp_path / "endless"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"validation_size": 1.0}, "validation_size=1.0 must be a share"),
        ({"validation_tokens": 7}, "validation_tokens=7 is less than one block"),
        ({"vocab_size": 300, "tokenizer_name": "gpt2"}, "give one of them"),
        ({"files": None, "streaming": True}, "are for local files"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLMDataModule(**{"files": "x.jsonl", **options})


def test_the_hub_out_of_reach_names_the_remedy(bpe: str) -> None:
    data = CausalLMDataModule(tokenizer_name=bpe)
    with pytest.raises(ConnectionError, match=r"'allenai/c4', 'en'.*[^. ]\. Give local files with data.files="):
        data.setup("fit")


def test_a_stream_needs_max_steps(jsonl: str, bpe: str) -> None:
    data = made(jsonl, bpe, streaming=True)
    data.trainer = stand_in_trainer()
    data.trainer.max_steps = -1
    with pytest.raises(ValueError, match="A stream of text has no end: set max_steps of the Trainer"):
        data.train_dataloader()
