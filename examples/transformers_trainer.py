# SPDX-License-Identifier: Apache-2.0
"""GaLore under the Trainer of Transformers: accumulation, clipping, a schedule, and a resumed run.

    pip install accelerate
    python examples/transformers_trainer.py

The optimizer is handed to the Trainer instead of ``optim="galore_adamw"``; the Trainer then resumes from its
checkpoints, which hold tensors and numbers only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from lightning_galore import GaLoreOptimizer

STEPS, ACCUMULATE, BATCH = 12, 2, 4


class Sentences(Dataset[dict[str, Tensor]]):
    """Sequences of tokens that count upwards, from a random one on."""

    def __init__(self) -> None:
        starts = torch.randint(64, (STEPS * ACCUMULATE * BATCH, 1), generator=torch.Generator().manual_seed(1))
        self.tokens = (starts + torch.arange(16)) % 64

    def __len__(self) -> int:
        """How many there are."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One, which is its own label."""
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def make_model() -> LlamaForCausalLM:
    """A tiny LLaMA, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def train(
    folder: Path,
    *,
    resume: bool = False,
    mode: str = "step",
    max_grad_norm: float = 1.0,
    accumulate: int = ACCUMULATE,
    **settings: Any,
) -> LlamaForCausalLM:
    """Train for ``STEPS`` steps, from the beginning or from the checkpoint in the middle; the trained model."""
    model = make_model()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    optimizer = GaLoreOptimizer(base, model, rank=8, update_proj_gap=5, scale=1.0, mode=mode)  # GaLore
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=max_grad_norm,
        save_steps=STEPS // 2,
        logging_steps=4,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(), optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if resume else None)
    return model


def main() -> None:
    """Train without a stop, then again from the checkpoint in the middle."""
    with tempfile.TemporaryDirectory() as folder:
        whole = train(Path(folder))
        resumed = train(Path(folder), resume=True)
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    print(f"the resumed run has the same weights, bit by bit: {same}")


if __name__ == "__main__":
    main()
