# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

pytest.importorskip("datasets")

from lightning_galore.tasks import CausalLMModule, InstructionDataModule
from lightning_galore.tasks.causal_lm import IGNORED
from lightning_galore.tasks.instructions import InstructionEncoder, PadRight
from lightning_galore.tasks.tokenizing import load_tokenizer, train_bpe
from tests.tasks.texts import TINY, VOCABULARY, sentences

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_bpe(sentences(), VOCABULARY, tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def chat(bpe: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = load_tokenizer(bpe)
    tokenizer.chat_template = CHAT
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def predicted(tokenizer: Any, row: dict[str, torch.Tensor]) -> str:
    return tokenizer.decode(row["labels"][row["labels"] != IGNORED])  # type: ignore[no-any-return]


def test_only_the_response_is_predicted(bpe: str) -> None:
    tokenizer = load_tokenizer(bpe)
    row = InstructionEncoder(tokenizer, template="Q: {prompt}\nA: ", max_length=99)(("Is {it} good?", "Yes, it is."))
    assert tokenizer.decode(row["input_ids"]) == "Q: Is {it} good?\nA: Yes, it is.</s>"
    assert predicted(tokenizer, row) == "Yes, it is.</s>"
    shown = row["labels"] != IGNORED
    assert torch.equal(row["labels"][shown], row["input_ids"][shown])
    cut = InstructionEncoder(tokenizer, template="Q: {prompt}\nA: ", max_length=8)(("Is {it} good?", "Yes, it is."))
    assert cut["input_ids"].tolist() == row["input_ids"][:8].tolist()


def test_every_answer_of_a_conversation_is_predicted(chat: str) -> None:
    tokenizer = load_tokenizer(chat)
    encode = InstructionEncoder(tokenizer, template="", max_length=999)
    turns = [("system", "Be brief."), ("user", "Up?"), ("assistant", "Down."), ("user", "So?"), ("assistant", "No.")]
    row = encode([{"role": role, "content": text} for role, text in turns])
    assert tokenizer.decode(row["input_ids"]) == "".join(f"<{role}>{text}</s>" for role, text in turns)
    assert predicted(tokenizer, row) == "Down.</s>No.</s>"
    assert predicted(tokenizer, encode(("Up?", "Down."))) == "Down.</s>"


def test_a_template_that_rewrites_its_beginning_is_refused(chat: str) -> None:
    tokenizer = load_tokenizer(chat)
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content if loop.revindex < 3 else '...' }}")
    encode = InstructionEncoder(tokenizer, template="", max_length=999)
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    assert predicted(tokenizer, encode(messages[:2])) == "assistant</s>"
    with pytest.raises(ValueError, match="4 messages otherwise than its beginning up to message 2"):
        encode(messages)


def test_padding_changes_no_loss(chat: str) -> None:
    tokenizer = load_tokenizer(chat)
    encode = InstructionEncoder(tokenizer, template="", max_length=99)
    rows = [encode(("Why?", "Because.")), encode(("Is this a longer question?", "It has a longer answer, too."))]
    batch = PadRight(tokenizer.eos_token_id)(rows)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    lm = CausalLMModule(model="60m", config=TINY)
    lm.configure_model()
    alone, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = lm(input_ids=row["input_ids"][None]).logits[0, :-1]
            alone += float(F.cross_entropy(logits, row["labels"][1:], ignore_index=IGNORED, reduction="sum"))
            count += int((row["labels"][1:] != IGNORED).sum())
        assert float(lm(**batch).loss) == pytest.approx(alone / count, rel=1e-5)


def test_rows_from_files(bpe: str, chat: str, tmp_path: Path) -> None:
    pairs = [{"prompt": text, "response": "Well."} for text in sentences()[:60]]
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]}
        for row in pairs
    ]
    found = []
    for name, rows in (("pairs", pairs), ("talks", talks)):
        files = write(tmp_path / f"{name}.jsonl", rows)
        data = InstructionDataModule(files=files, model=chat, validation_size=0.2, max_length=200, batch_size=4)
        data.setup("fit")
        data.setup("fit")
        found.append({split: len(rows) for split, rows in data.rows.items()})
        assert sum(found[-1].values()) == 60
        batch = next(iter(data.train_dataloader()))
        assert {value.shape for value in batch.values()} == {(4, batch["input_ids"].shape[1])}
    assert 3 < found[0]["validation"] < 25

    other = [{"q": row["prompt"], "a": row["response"]} for row in pairs]
    data = InstructionDataModule(
        files=write(tmp_path / "a.jsonl", other),
        validation_files=write(tmp_path / "b.jsonl", other[:5]),
        tokenizer_name=bpe,
        template="{prompt}\n",
        prompt_column="q",
        response_column="a",
        max_length=200,
    )
    data.setup("fit")
    assert {split: len(rows) for split, rows in data.rows.items()} == {"train": 60, "validation": 5}
    assert len(next(iter(data.val_dataloader()))["input_ids"]) == 5


def test_mistakes_name_the_remedy(bpe: str, tmp_path: Path) -> None:
    files = write(
        tmp_path / "a.jsonl", [{"prompt": "long " * 30, "response": "x"}, {"prompt": "a", "response": "b"}] * 9
    )

    def setup(**options: Any) -> InstructionDataModule:
        data = InstructionDataModule(**{"files": files, "tokenizer_name": bpe, "template": "{prompt}\n", **options})
        data.setup("fit")
        return data

    with pytest.warns(
        UserWarning, match="9 of 18 rows of files=.* are left out: their prompts alone have max_length=20"
    ):
        setup(max_length=20, validation_files=write(tmp_path / "b.jsonl", [{"prompt": "a", "response": "b"}]))
    with pytest.raises(ValueError, match="none has a response within max_length=2 tokens. Raise it"):
        setup(max_length=2, validation_files=files)
    with pytest.raises(ValueError, match="no row to validate on"):
        setup(validation_size=1e-9)
    with pytest.raises(ValueError, match="has no column 'response'; it has 'prompt', 'answer'"):
        setup(files=write(tmp_path / "c.jsonl", [{"prompt": "a", "answer": "b"}]))
    with pytest.raises(ValueError, match="has no chat template: say how a prompt is written"):
        setup(template="")
    with pytest.raises(ValueError, match=r"must have \{prompt\} where the prompt goes"):
        setup(template="Q:")
    with pytest.raises(ValueError, match="files=None: name local files"):
        setup(files=None)
    with pytest.raises(ValueError, match="No tokenizer is named"):
        setup(tokenizer_name=None)
    assert len(load_tokenizer(bpe)) == VOCABULARY
