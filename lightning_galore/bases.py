# SPDX-License-Identifier: Apache-2.0
"""The bases of one weight as they are kept: written at a refresh, read at every step, orthonormal again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_galore import linalg, storage

#: What takes the place of a storage whose codes cannot hold a basis: see :meth:`StoredBases.write`.
_NEXT = {"int4": "int8", "int8": "fp32"}


@dataclass(frozen=True, kw_only=True)
class StoredBases:
    """Left and right bases, or the one, in the order of ``Projection.basis_shapes``.

    Codes of a few bits are off by some percent, and so are the angles between the columns that they stand for: taken as
    they are, projecting and lifting would stretch some directions and shrink others. So what is read is the orthonormal
    basis nearest to them. It spans the same, and costs one Gram matrix and one product of the basis's size.

    Args:
        parts: The tensors that stand for each basis.
        orthonormal: Whether the columns were so before they were rounded; those of ``subspace="gaussian"`` are not.
    """

    parts: tuple[storage.Stored, ...]
    orthonormal: bool = True

    @classmethod
    def write(cls, bases: Sequence[Tensor], *, kept: str, param_dtype: torch.dtype, orthonormal: bool) -> Self:
        """Fresh tensors that stand for ``bases``.

        Where a block holds both large and tiny entries the tiny ones are rounded to zero, and with them perhaps a whole
        column. A basis that cannot be told from its codes any more is kept in more bits.

        Args:
            bases: In the dtype in which they were found.
            kept: ``basis_storage``.
            param_dtype: That of the weight.
            orthonormal: Whether their columns are.
        """
        parts = []
        for basis in bases:
            part = storage.write(basis, storage=kept, param_dtype=param_dtype)
            wider = kept
            while orthonormal and part.is_coded and not linalg.is_nearly_orthonormal(part.read(torch.float32)):
                wider = _NEXT[wider]
                part = storage.write(basis, storage=wider, param_dtype=param_dtype)
            parts.append(part)
        return cls(parts=tuple(parts), orthonormal=orthonormal)

    @property
    def is_coded(self) -> bool:
        """Whether reading costs something: if not, it gives the very tensors that are kept."""
        return any(part.is_coded for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes as kept."""
        return storage.nbytes([(part.codes, part.absmax) for part in self.parts])

    @property
    def rank(self) -> int:
        """Width of the bases."""
        return self.parts[0].shape[1]

    def read(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The bases, of their shapes.

        Args:
            dtype: What codes are decoded into; bases that are kept as they are have a dtype of their own.
        """
        return tuple(self._read(part, dtype) for part in self.parts)

    def _read(self, part: storage.Stored, dtype: torch.dtype) -> Tensor:
        if not part.is_coded:
            return part.read(dtype)
        basis = part.read(torch.promote_types(dtype, torch.float32))
        return (linalg.nearest_orthonormal(basis) if self.orthonormal else basis).to(dtype)
