# SPDX-License-Identifier: Apache-2.0
"""A tiny random RoBERTa with a tokenizer of its own, and the files that tests of the tasks read."""

from __future__ import annotations

import csv
from pathlib import Path

SENTENCES = Path(__file__).parent.parent / "data" / "movie_sentences.tsv"
HIDDEN = 32


def read_sentences() -> list[tuple[str, int]]:
    """The slice of the demo data that is shipped with the tests."""
    with SENTENCES.open(encoding="utf-8", newline="") as file:
        return [
            (row["sentence"], int(row["label"])) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]


def build_tiny_model(folder: Path) -> str:
    """Save a random RoBERTa encoder of width 32 and a byte-level tokenizer, trained on the slice, into ``folder``."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (text for text, _ in read_sentences()), vocab_size=600, special_tokens=special, show_progress=False
    )
    tokenizer._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=600,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=130,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RobertaModel(config).save_pretrained(folder)
    return str(folder)


def write_pairs(folder: Path, task: str, rows: int = 24) -> str:
    """Write a training and a validation file for any task, with the columns that the hub's GLUE has."""
    from lightning_galore.tasks.glue_tasks import get_task

    spec = get_task(task)
    texts = [text for text, _ in read_sentences()]
    for split in ("train", *spec.validation):
        lines = ["\t".join((*spec.text, "label"))]
        for row in range(rows):
            label = str(row % 5 + row / 10) if spec.is_regression else str(row % spec.num_labels)
            lines.append("\t".join((*texts[row : row + len(spec.text)], label)))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)
