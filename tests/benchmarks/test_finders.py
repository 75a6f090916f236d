# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import finders, refresh, weights
from benchmarks.finders import FULL_SVD
from benchmarks.weights import WeightSet
from lightning_galore.subspace import SUBSPACES
from tests.helpers import assert_orthonormal, assert_same_subspace

CPU = torch.device("cpu")
SMALL = WeightSet(name="small", shapes=((24, 40), (40, 24), (24, 24)), rank=4)


def test_weight_sets_are_those_of_the_models() -> None:
    roberta, llama = weights.roberta_encoder(layers=4, rank=8), weights.llama_60m(rank=128)
    assert (len(roberta.shapes), sum(m * n for m, n in roberta.shapes)) == (24, 28_311_552)
    assert (len(llama.shapes), sum(m * n for m, n in llama.shapes)) == (56, 25_296_896)


def test_gradients_have_the_stated_spectrum_and_repeat() -> None:
    (grad,) = weights.gradients(weights.single(48, 80, rank=4), device=CPU)
    (again,) = weights.gradients(weights.single(48, 80, rank=4), device=CPU)
    assert torch.equal(grad, again)
    sigma = torch.linalg.svdvals(grad)
    stated = torch.arange(1, 49).float() ** -weights.DECAY
    torch.testing.assert_close(sigma[:8], stated[:8], rtol=0.05, atol=0.0)
    assert float(sigma.square().sum()) == pytest.approx(float(stated.square().sum()) * (1 + weights.NOISE), rel=0.005)


def test_the_other_batch_shares_some_of_the_subspace() -> None:
    grads = weights.gradients(replace(SMALL, shapes=((96, 160),) * 3), device=CPU)
    batch = finders.matrices(grads, rank=8)
    exact = [finders.theirs()[FULL_SVD](matrix) for matrix in batch]
    assert 0.2 < finders.mean_overlap(batch, exact) < 0.8


def test_only_finders_that_look_at_the_gradient_are_compared() -> None:
    assert {"randomized", "svd"} <= set(finders.ours()) <= set(SUBSPACES) - {"gaussian", "random_orthonormal"}


@pytest.mark.parametrize("name", [*finders.ours(), *finders.theirs()])
def test_every_finder_gives_a_basis_of_its_side(name: str) -> None:
    find = {**finders.ours(), **finders.theirs()}[name]
    for matrix in finders.matrices(weights.gradients(SMALL, device=CPU), rank=SMALL.rank):
        basis = find(matrix)
        assert basis.shape == matrix.projection.basis_shapes[0]
        assert_orthonormal(basis, atol=1e-5)


def test_the_exact_finders_agree() -> None:
    for matrix in finders.matrices(weights.gradients(SMALL, device=CPU), rank=SMALL.rank):
        exact = finders.theirs()[FULL_SVD](matrix)
        assert_same_subspace(finders.ours()["svd"](matrix), exact)
        for find in finders.theirs().values():
            assert_same_subspace(find(matrix), exact)


def test_energy_is_that_of_the_singular_values() -> None:
    for matrix in finders.matrices(weights.gradients(SMALL, device=CPU), rank=SMALL.rank):
        best = torch.linalg.svdvals(matrix.grad)[: SMALL.rank].square().sum()
        assert finders.energy(matrix, finders.theirs()[FULL_SVD](matrix)) == pytest.approx(float(best), rel=1e-5)
        other = torch.linalg.qr(torch.randn(matrix.projection.basis_shapes[0])).Q
        assert finders.energy(matrix, other) < 0.9 * best


def test_real_gradients_are_read_and_judged(tmp_path: Path) -> None:
    path = tmp_path / "gradients.pt"
    held = {"wide": torch.randn(8, 20).bfloat16(), "tall": torch.randn(40, 12), "bias": torch.randn(8)}
    torch.save(held, path)
    grads = weights.load_gradients(path, device=CPU)
    assert {name: grad.dtype for name, grad in grads.items()} == {"wide": torch.float32, "tall": torch.float32}
    energies = refresh.real_energies(grads)
    assert list(energies) == ["4", "8"]  # at rank 8 only the tall one has a subspace to choose
    for shares in energies.values():
        assert shares["svd"]["worst"] == pytest.approx(1.0, abs=1e-5)
        assert 0.5 < shares["randomized"]["worst"] <= shares["randomized"]["mean"] <= 1.0001


@pytest.mark.parametrize("held", [[torch.ones(2, 2)], {"a": 1.0}, {"bias": torch.ones(3)}])
def test_a_file_of_something_else_is_refused(held: object, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "gradients.pt")
    with pytest.raises(ValueError, match="gradients="):
        weights.load_gradients(tmp_path / "gradients.pt", device=CPU)
