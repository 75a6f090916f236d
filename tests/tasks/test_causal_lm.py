# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

pytest.importorskip("datasets")

from lightning_galore import GaLoreStrategy
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.tasks import CausalLMDataModule, CausalLMModule
from lightning_galore.tasks.causal_models import PUBLISHED
from lightning_galore.tasks.tokenizing import train_bpe
from tests.helpers import same_bits
from tests.tasks.texts import TINY, VOCABULARY, sentences, write_jsonl, write_shards

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_bpe(sentences(), VOCABULARY, tmp_path_factory.mktemp("bpe")))


def module(**options: Any) -> CausalLMModule:
    return CausalLMModule(**{"model": "60m", "config": TINY, "lr": 0.01, **options})


def trained(
    data: CausalLMDataModule, folder: Path, lm: CausalLMModule, *, resume: str | None = None, **options: Any
) -> Trainer:
    seed_everything(5, verbose=False)
    trainer = Trainer(**QUIET, strategy=GaLoreStrategy(rank=4, update_proj_gap=3), default_root_dir=folder, **options)
    trainer.fit(lm, data, ckpt_path=resume)
    return trainer


def weights(trainer: Trainer) -> list[torch.Tensor]:
    assert trainer.model is not None
    return [param.detach() for param in trainer.model.parameters()]


# -- the network -------------------------------------------------------------------------------------------------------


def test_published_sizes_are_those_of_the_paper() -> None:
    assert {name: PUBLISHED[name] for name in ("60m", "130m", "350m", "1b", "7b")} == {
        name: f"llama-{name}" for name in PUBLISHED
    }
    lm = CausalLMModule(model="60m")
    with torch.device("meta"):
        lm.configure_model()
    net: Any = lm.net
    assert sum(p.numel() for p in lm.parameters()) == 58_073_600
    assert (net.config.hidden_size, net.config.intermediate_size, net.config.num_hidden_layers) == (512, 1376, 8)
    assert net.config.use_cache is False


def test_weights_follow_the_seed_alone_and_the_precision() -> None:
    def drawn() -> list[torch.Tensor]:
        seed_everything(7, verbose=False)
        torch.randn(5)
        lm = module()
        lm.configure_model()
        lm.configure_model()
        return list(lm.parameters())

    state = torch.get_rng_state()
    assert same_bits(drawn(), drawn())
    torch.set_rng_state(state)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert {param.dtype for param in drawn()} == {torch.bfloat16}
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_folder_gives_its_weights_or_its_shape_alone(tmp_path: Path) -> None:
    lm = module()
    lm.configure_model()
    lm.net.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    loaded, drawn = CausalLMModule(model=str(tmp_path)), CausalLMModule(model=str(tmp_path), from_scratch=True)
    loaded.configure_model()
    seed_everything(11, verbose=False)
    drawn.configure_model()
    assert loaded.net is not None
    assert loaded.net.training
    assert same_bits(lm.parameters(), loaded.parameters())
    assert [p.shape for p in drawn.parameters()] == [p.shape for p in lm.parameters()]
    assert not same_bits(lm.parameters(), drawn.parameters())


def test_recomputed_activations_change_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        seed_everything(0, verbose=False)
        lm = module(checkpointing=checkpointing)
        lm.configure_model()
        ids = torch.arange(24).view(2, 12)
        lm(input_ids=ids, labels=ids).loss.backward()
        grads.append([param.grad for param in lm.parameters()])
        assert any(getattr(part, "gradient_checkpointing", False) for part in lm.modules()) is checkpointing
    assert same_bits(*grads)  # type: ignore[arg-type]


def test_wrong_arguments_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="warmup_ratio=1 must be a share"):
        CausalLMModule(model="60m", warmup_ratio=1)
    with pytest.raises(ValueError, match="min_lr_ratio=2 must be a share"):
        CausalLMModule(model="60m", min_lr_ratio=2)
    with pytest.raises(RuntimeError, match="no network yet"):
        module()(input_ids=torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(OSError, match="model='nobody/nothing' cannot be loaded: .* Give a folder, or one of 60m, 130m"):
        CausalLMModule(model="nobody/nothing").configure_model()


# -- training ----------------------------------------------------------------------------------------------------------


def test_loss_perplexity_tokens_and_learning_rate(tmp_path: Path, bpe: str) -> None:
    files = write_jsonl(tmp_path / "a.jsonl", sentences()[:300])
    data = CausalLMDataModule(files=files, tokenizer_name=bpe, block_size=16, batch_size=8, eval_batch_size=5)
    rates: list[float] = []

    class Watched(CausalLMModule):
        @override
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    seed_everything(0, verbose=False)
    lm = Watched(model="60m", config=TINY, lr=0.01, warmup_ratio=0.25, weight_decay=0.1)
    trainer = Trainer(**QUIET, strategy=GaLoreStrategy(rank=4), max_steps=20, default_root_dir=tmp_path)
    trainer.fit(lm, data)
    metrics = trainer.callback_metrics
    assert metrics["train/tokens"] == 20 * 8 * 16
    assert rates[0] == 0
    assert max(rates) == rates[5] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.001, rel=0.1)
    assert metrics["train/loss"] < 5.5 < math.log(VOCABULARY)
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, GaLoreOptimizer)
    assert len(optimizer.targets) == 7
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]

    (found,) = trainer.validate(lm, data, verbose=False)
    assert data.validation_blocks is not None
    ids = data.validation_blocks.ids.long()
    with torch.no_grad():
        logits = lm.eval()(input_ids=ids).logits[:, :-1]
    # Over all blocks at once: the last batch is smaller than the others and counts for less.
    expected = F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
    assert found["val/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_equals_one_that_was_not_stopped(streaming: bool, tmp_path: Path, bpe: str) -> None:
    files = write_shards(tmp_path, 2, 400)

    def data() -> CausalLMDataModule:
        return CausalLMDataModule(
            files=files, validation_files=files, tokenizer_name=bpe, block_size=8, batch_size=4, streaming=streaming
        )

    # About 60 batches an epoch in memory: the checkpoint is of the middle of the second one.
    options = {"max_steps": 70, "max_epochs": -1, "limit_val_batches": 0}
    checkpoint = tmp_path / "part.ckpt"

    class Saving(CausalLMModule):
        @override
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 65:
                self.trainer.save_checkpoint(checkpoint)

    whole = trained(data(), tmp_path, Saving(model="60m", config=TINY, lr=0.01), **options)
    resumed = trained(data(), tmp_path, module(), resume=str(checkpoint), **options)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 65
    assert resumed.global_step == whole.global_step == 70
    assert same_bits(weights(whole), weights(resumed))
    assert resumed.lightning_module.tokens_seen == 70 * 32  # type: ignore[union-attr]


def test_tokens_beyond_the_embeddings_are_refused(tmp_path: Path, bpe: str) -> None:
    files = write_jsonl(tmp_path / "a.jsonl", sentences()[:100])
    data = CausalLMDataModule(files=files, tokenizer_name=bpe, block_size=8)
    lm = module(config={**TINY, "vocab_size": 50})
    trainer = Trainer(**QUIET, max_steps=1, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=rf"embeddings for 50: set model.config={{vocab_size: {VOCABULARY}}}"):
        trainer.fit(lm, data)
    with pytest.raises(ValueError, match="embeddings for 50"):
        trainer.validate(lm, data)


def test_a_run_without_end_is_refused(tmp_path: Path, bpe: str) -> None:
    files = write_jsonl(tmp_path / "a.jsonl", sentences()[:100])
    data = CausalLMDataModule(files=files, tokenizer_name=bpe, block_size=8)
    with pytest.raises(ValueError, match="CausalLMModule with lr_scheduler=.cosine. .* needs the length of the run"):
        Trainer(**QUIET, max_epochs=-1, default_root_dir=tmp_path).fit(module(), data)
