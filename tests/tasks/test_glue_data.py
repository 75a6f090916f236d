# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import seed_everything

from lightning_galore.tasks import GlueDataModule
from lightning_galore.tasks.glue_tasks import TASKS, get_task
from tests.tasks.tiny import SENTENCES, write_pairs

ROWS = [("A fine film.", 1), ('The "worst" of all', 0), ("NA", 1), ("null and void", 0)]


def setup(tokenizer: str, **options: Any) -> GlueDataModule:
    data = GlueDataModule(tokenizer=tokenizer, **options)
    data.setup("fit")
    return data


def labels(data: GlueDataModule, split: str = "train") -> list[Any]:
    return list(data._splits[split]["label"])


def texts(data: GlueDataModule, split: str = "train") -> list[str]:
    return list(data._splits[split][data.task.text[0]])


def tsv(path: Path, *rows: tuple[object, ...], end: str = "\n", encoding: str = "utf-8") -> str:
    path.write_bytes("".join("\t".join(map(str, row)) + end for row in rows).encode(encoding))
    return str(path)


# -- files --------------------------------------------------


def test_headerless_sst2_keeps_quotes_and_the_word_na(tiny_model: str, tmp_path: Path) -> None:
    data = setup(tiny_model, task="sst2", train_file=tsv(tmp_path / "x.tsv", *ROWS), validation_file=str(SENTENCES))
    assert texts(data) == [text for text, _ in ROWS]
    assert labels(data) == [label for _, label in ROWS]


def test_original_cola_layout_from_a_folder(tiny_model: str, tmp_path: Path) -> None:
    for name, count in (("in_domain_train", 6), ("in_domain_dev", 2), ("out_of_domain_dev", 3)):
        tsv(tmp_path / f"{name}.tsv", *(("gj04", row % 2, "*" * (row % 2), f"Sentence {row}.") for row in range(count)))
    data = setup(tiny_model, task="cola", data_dir=str(tmp_path))
    assert labels(data) == [0, 1] * 3
    assert texts(data, "validation") == [f"Sentence {row}." for row in (0, 1, 0, 1, 2)]


def test_original_mrpc_layout_with_byte_order_mark_and_crlf(tiny_model: str, tmp_path: Path) -> None:
    header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    rows = [(1, 10, 11, 'He said "yes', "He agreed"), (0, 12, 13, "Up", "Down")]
    tsv(tmp_path / "msr-para-train.tsv", header, *rows, end="\r\n", encoding="utf-8-sig")
    tsv(tmp_path / "msr-para-val.tsv", header, *rows, end="\r\n")
    data = setup(tiny_model, task="mrpc", data_dir=str(tmp_path))
    assert texts(data) == ['He said "yes', "Up"]
    assert labels(data) == labels(data, "validation") == [1, 0]


def test_rte_labels_as_text_and_one_file_without_a_header(tiny_model: str, tmp_path: Path) -> None:
    rows = [(0, "A b", "A", "entailment"), (1, "C d", "E", "not_entailment")]
    first = tsv(tmp_path / "train.tsv", ("index", "sentence1", "sentence2", "label"), *rows)
    second = tsv(tmp_path / "val.tsv", *rows)
    data = setup(tiny_model, task="rte", train_file=[first, second], validation_file=first)
    assert labels(data) == [0, 1, 0, 1]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_other_formats(tiny_model: str, tmp_path: Path, suffix: str) -> None:
    import pandas

    table = pandas.DataFrame(ROWS, columns=["sentence", "label"])
    path = tmp_path / f"train.{suffix}"
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "parquet":
        table.to_parquet(path)
    else:
        records = [json.dumps(record) for record in table.to_dict("records")]
        path.write_text("\n".join(records) if suffix == "jsonl" else f"[{','.join(records)}]")
    data = setup(tiny_model, task="sst2", data_dir=str(tmp_path), validation_size=1)
    assert sorted(texts(data) + texts(data, "validation")) == sorted(text for text, _ in ROWS)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_gives_padded_batches(tiny_model: str, tmp_path: Path, task: str) -> None:
    data = setup(tiny_model, task=task, data_dir=write_pairs(tmp_path, task), batch_size=4, max_length=24)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() <= 24
    assert batch["labels"].is_floating_point() == (task == "stsb")
    assert len(data.val_dataloader()) == (2 if task == "mnli" else 1)


def test_mnli_takes_the_two_validation_files_in_order(tiny_model: str, tmp_path: Path) -> None:
    header = ("sentence1", "sentence2", "gold_label")
    first, second = ("A", "B", "neutral"), ("C", "D", "contradiction")
    files = [tsv(tmp_path / "a.tsv", header, first), tsv(tmp_path / "b.tsv", header, second)]
    data = setup(tiny_model, task="mnli", train_file=files, validation_file=files)
    assert labels(data) == [1, 2]
    assert labels(data, "validation_matched") == [1]
    assert labels(data, "validation_mismatched") == [2]


# -- splits and order --------------------------------------------------


def test_held_out_rows_do_not_depend_on_the_global_seed(tiny_model: str) -> None:
    held_out = []
    for seed in (1, 2):
        seed_everything(seed)
        data = setup(tiny_model, task="demo", train_file=str(SENTENCES), validation_size=100, train_limit=50)
        held_out.append((texts(data, "validation"), texts(data)))
    assert held_out[0] == held_out[1]
    assert [len(rows) for rows in held_out[0]] == [100, 50]
    assert not set(held_out[0][0]) & set(held_out[0][1])


def test_split_seed_changes_the_held_out_rows(tiny_model: str) -> None:
    one, other = (
        setup(tiny_model, task="demo", train_file=str(SENTENCES), validation_size=0.05, split_seed=seed)
        for seed in (0, 1)
    )
    assert len(texts(one, "validation")) == 100
    assert texts(one, "validation") != texts(other, "validation")


def test_validation_limit(tiny_model: str) -> None:
    data = setup(tiny_model, task="demo", train_file=str(SENTENCES), validation_size=100, validation_limit=7)
    assert len(texts(data, "validation")) == 7


def test_order_is_that_of_the_seed_and_the_epoch(tiny_model: str) -> None:
    def order(seed: int, epoch: int, draws: int) -> list[int]:
        seed_everything(seed)
        data = setup(tiny_model, task="demo", train_file=str(SENTENCES), train_limit=64)
        torch.rand(draws)  # what a model draws in between must not matter
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return list(loader.sampler)

    assert order(1, 0, draws=0) == order(1, 0, draws=9)
    assert order(1, 0, draws=0) != order(1, 1, draws=0)
    assert order(1, 0, draws=0) != order(2, 0, draws=0)
    assert sorted(order(1, 3, draws=0)) == list(range(64))


def test_unlabelled_test_rows_are_predicted_but_not_scored(tiny_model: str, tmp_path: Path) -> None:
    test_file = tsv(tmp_path / "test.tsv", ("index", "sentence"), (0, "One"), (1, "Two"))
    data = setup(tiny_model, task="demo", train_file=str(SENTENCES), validation_size=8, test_file=test_file)
    assert len(data.predict_dataloader()[0].dataset) == 2
    assert len(data.test_dataloader()[0].dataset) == 8


def test_labelled_test_rows_are_scored(tiny_model: str, tmp_path: Path) -> None:
    test_file = tsv(tmp_path / "test.tsv", *ROWS)
    data = setup(tiny_model, task="demo", train_file=str(SENTENCES), validation_size=8, test_file=test_file)
    assert len(data.test_dataloader()[0].dataset) == len(ROWS)


def test_majority_share(tiny_model: str, tmp_path: Path) -> None:
    rows = tsv(tmp_path / "v.tsv", ("a", 1), ("b", 1), ("c", 0), ("d", 1))
    assert setup(tiny_model, task="demo", train_file=rows, validation_file=rows).majority_share() == 0.75


def test_hub_rows_are_used_as_they_come(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1], "idx": [0, 1]})
    hidden = datasets.Dataset.from_dict({"sentence": ["c"], "label": [-1], "idx": [0]})
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str) -> dict[str, Any]:
        asked.append(names)
        return {"train": rows, "validation": rows, "test": hidden}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = GlueDataModule(task="cola", tokenizer=tiny_model)
    data.prepare_data()
    data.setup("fit")
    assert set(asked) == {("nyu-mll/glue", "cola")}
    assert len(data.predict_dataloader()[0].dataset) == 1
    assert len(data.test_dataloader()[0].dataset) == 2


# -- mistakes --------------------------------------------------


def test_hub_out_of_reach_names_the_remedy(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*names: str) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"task='rte', from the Hugging Face hub: .* data_dir=\.\.\."):
        GlueDataModule(task="rte", tokenizer=tiny_model).prepare_data()


def test_missing_column_names_file_columns_and_remedy(tiny_model: str, tmp_path: Path) -> None:
    path = tsv(tmp_path / "x.tsv", ("text", "label"), ("a", 1))
    with pytest.raises(
        ValueError, match=r"x\.tsv has no column 'sentence', .*task='cola'.* it has 'text', 'label'\. Rename"
    ):
        setup(tiny_model, task="cola", train_file=path)


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ("sst2", "2", r"x\.tsv: unknown label '2' in data row 2.* 0 \(negative\), 1 \(positive\)"),
        ("sst2", "", "unknown label '' in data row 2"),
        ("sst2", "-1", "unknown label '-1' in data row 2"),
        ("stsb", "high", r"unknown label 'high' in data row 2.*numbers as labels"),
        ("stsb", "", "unknown label '' in data row 2"),
    ],
)
def test_unknown_label(tiny_model: str, tmp_path: Path, task: str, label: str, message: str) -> None:
    names = get_task(task).text
    path = tsv(tmp_path / "x.tsv", (*names, "label"), (*names, "1"), (*names, label))
    with pytest.raises(ValueError, match=message):
        setup(tiny_model, task=task, train_file=path)


def test_headerless_file_of_an_unknown_layout(tiny_model: str, tmp_path: Path) -> None:
    path = tsv(tmp_path / "x.tsv", ("a", "b", "c"))
    with pytest.raises(
        ValueError, match=r"Cannot read .*x\.tsv: its first line \['a', 'b', 'c'\] .* add a header line"
    ):
        setup(tiny_model, task="sst2", train_file=path)


def test_unreadable_files(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot read .*x\.xls: the suffix '\.xls' is not one of \.tsv"):
        setup(tiny_model, task="sst2", train_file=tsv(tmp_path / "x.xls", *ROWS))
    with pytest.raises(ValueError, match=r"Cannot read .*x\.tsv: .*Expected 2 fields in line 3, saw 3"):
        setup(tiny_model, task="sst2", train_file=tsv(tmp_path / "x.tsv", *ROWS[:2], ("a", 1, "more")))
    with pytest.raises(ValueError, match=r"Cannot read .*x\.tsv: No columns to parse"):
        setup(tiny_model, task="sst2", train_file=tsv(tmp_path / "x.tsv"))
    with pytest.raises(ValueError, match=r"Cannot read .*x\.json: "):
        setup(tiny_model, task="sst2", train_file=tsv(tmp_path / "x.json", ("{",)))
    with pytest.raises(ValueError, match=r"Cannot read .*l\.tsv: .*utf-8"):
        setup(tiny_model, task="sst2", train_file=tsv(tmp_path / "l.tsv", ("caf\xe9", 1), encoding="latin-1"))
    with pytest.raises(ValueError, match=r"x\.tar\.gz is an archive, which only task='demo' reads"):
        setup(tiny_model, task="sst2", train_file=tsv(tmp_path / "x.tar.gz", *ROWS))


def test_files_that_do_not_exist(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"The data file '.*none\.tsv' does not exist \(task='sst2'\)"):
        setup(tiny_model, task="sst2", train_file=str(tmp_path / "none.tsv"))
    with pytest.raises(
        FileNotFoundError, match=r"does not exist \(task='demo'\)\. Download it with: pip download .*==3\.3\.2"
    ):
        setup(tiny_model, task="demo", train_file=str(tmp_path / "vaderSentiment-3.3.2.tar.gz"))
    with pytest.raises(FileNotFoundError, match=r"data_dir='.*none' is not a folder \(task='sst2'\)"):
        setup(tiny_model, task="sst2", data_dir=str(tmp_path / "none"))
    with pytest.raises(
        FileNotFoundError, match=r"holds no training file for task='rte': looked for .*train_file=\.\.\."
    ):
        setup(tiny_model, task="rte", data_dir=str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"no training file for task='demo'.* pip download .*vaderSentiment==3\.3\.2"
    ):
        setup(tiny_model, task="demo", data_dir=str(tmp_path))


def test_ambiguous_validation_file(tiny_model: str, tmp_path: Path) -> None:
    for name in ("train", "dev", "val"):
        tsv(tmp_path / f"{name}.tsv", *ROWS)
    with pytest.raises(
        ValueError, match=r"several files that could be the validation split: dev\.tsv, val\.tsv\. .*validation_file="
    ):
        setup(tiny_model, task="sst2", data_dir=str(tmp_path))
    for name in ("dev.tsv", "val.tsv"):
        (tmp_path / name).unlink()
    tsv(tmp_path / "train.csv", *ROWS)
    with pytest.raises(ValueError, match=r"could be the train split: train\.tsv, train\.csv\. .*train_file="):
        setup(tiny_model, task="sst2", data_dir=str(tmp_path))


def test_mnli_needs_both_validation_files(tiny_model: str, tmp_path: Path) -> None:
    path = tsv(tmp_path / "x.tsv", ("premise", "hypothesis", "label"), ("A", "B", "0"))
    with pytest.raises(
        FileNotFoundError, match=r"validation_matched, validation_mismatched is missing\. .*\[matched, mismatched\]"
    ):
        setup(tiny_model, task="mnli", train_file=path)
    with pytest.raises(ValueError, match=r"names 1 file\(s\), but task='mnli' needs 2: validation_matched, "):
        setup(tiny_model, task="mnli", train_file=path, validation_file=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "cloa"}, r"task='cloa' is not known\. Choose one of: cola, "),
        ({"task": "demo"}, r"task='demo' is read from local files here: .*train_file=\.\.\. or data_dir"),
        ({"task": "rte", "validation_file": "x"}, "task='rte' is read from local files here"),
        ({"task": "rte", "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"task": "rte", "train_limit": 0}, "train_limit=0 must be at least 1"),
        ({"task": "rte", "validation_size": 1.5}, r"validation_size=1\.5 must be a number of rows"),
        ({"task": "rte", "validation_size": 0}, "validation_size=0 must be a number of rows"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlueDataModule(tokenizer="roberta-base", **options)


def test_nothing_left_to_train_on(tiny_model: str, tmp_path: Path) -> None:
    path = tsv(tmp_path / "x.tsv", *ROWS)
    with pytest.raises(
        ValueError, match=r"validation_size=4 leaves nothing to train on: the file has 4 rows\. .*validation_file"
    ):
        setup(tiny_model, task="sst2", train_file=path, validation_size=4)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_galore.tasks.extras import require

    with pytest.raises(ModuleNotFoundError, match=r"'no_such_package', .* pip install \"lightning-galore\[recipes\]\""):
        require("no_such_package")


# -- the real files --------------------------------------------------

GLUE_DIR = os.environ.get("LIGHTNING_GALORE_GLUE_DIR", "")
REAL: dict[str, tuple[dict[str, Any], dict[str, Counter[int]]]] = {
    "cola": ({"data_dir": "cola"}, {"train": Counter({1: 6023, 0: 2528}), "validation": Counter({1: 719, 0: 324})}),
    "mrpc": (
        {"data_dir": "mrpc"},
        {
            "train": Counter({1: 2407, 0: 1169}),
            "validation": Counter({1: 346, 0: 154}),
            "test": Counter({1: 1147, 0: 578}),
        },
    ),
    "rte": (
        {"train_file": ["rte/train.tsv", "rte/val.tsv"], "validation_file": "rte/dev.tsv"},
        {"train": Counter({0: 1249, 1: 1241}), "validation": Counter({0: 146, 1: 131})},
    ),
    "sst2": (
        {"data_dir": "sst2-sentence"},
        {"train": Counter({1: 3610, 0: 3310}), "validation": Counter({1: 444, 0: 428})},
    ),
}


@pytest.mark.skipif(
    not GLUE_DIR, reason="LIGHTNING_GALORE_GLUE_DIR names no folder with cola/, mrpc/, rte/, sst2-sentence/"
)
@pytest.mark.parametrize("task", sorted(REAL))
def test_real_files_have_the_published_counts(tiny_model: str, task: str) -> None:
    options, counts = REAL[task]
    root = Path(GLUE_DIR)
    options = {
        key: [str(root / v) for v in value] if isinstance(value, list) else str(root / value)
        for key, value in options.items()
    }
    data = setup(tiny_model, task=task, **options)
    assert {split: Counter(labels(data, split)) for split in counts} == counts
