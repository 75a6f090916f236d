# SPDX-License-Identifier: Apache-2.0
"""The bases of one weight as they are kept: written at a refresh, read at every step, orthonormal again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_galore import linalg, storage
from lightning_galore.subspace import draw

#: What takes the place of a storage whose codes cannot hold a basis: see :meth:`StoredBases.write`.
_NEXT = {"int4": "int8", "int8": "fp32"}
#: Bytes of :class:`DrawnBases`: one number.
DRAWN_BYTES = 8
#: The number that stands for unit vectors, which no generator is seeded with.
UNIT = -1


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

    def is_same(self, other: StoredBases) -> bool:
        """Whether both are of one refresh, by what is kept: no entry is looked at.

        Args:
            other: Bases of the same weight, of this refresh or of another one.
        """
        pairs = zip(self.parts, other.parts, strict=False)
        return type(self) is type(other) and all(mine.codes is theirs.codes for mine, theirs in pairs)

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


@dataclass(frozen=True, kw_only=True)
class DrawnBases(StoredBases):
    """Random bases of which only the number is kept that they are drawn from, anew whenever they are read.

    So APOLLO's claim of next to no memory holds (arXiv 2412.05270, section 4). They are drawn on the device of the
    gradient, and another kind of device draws others: see :func:`source_of`.

    Args:
        number: Seed of the generator, or ``UNIT``.
        shapes: Of the bases.
        device: Where they are drawn. None where they are not read.
    """

    parts: tuple[storage.Stored, ...] = ()
    number: int
    shapes: tuple[tuple[int, int], ...]
    device: torch.device | None = None

    @property
    @override
    def is_coded(self) -> bool:
        return True

    @property
    @override
    def nbytes(self) -> int:
        return DRAWN_BYTES

    @property
    @override
    def rank(self) -> int:
        return self.shapes[0][1]

    @override
    def is_same(self, other: StoredBases) -> bool:
        return isinstance(other, DrawnBases) and (self.number, self.shapes) == (other.number, other.shapes)

    @override
    def read(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        assert self.device is not None
        if self.number == UNIT:
            like = torch.empty((), dtype=dtype, device=self.device)
            return tuple(linalg.identity_basis(*shape, like=like) for shape in self.shapes)
        generator = torch.Generator(self.device).manual_seed(self.number)
        drawn = draw(self.shapes, generator=generator, dtype=dtype, orthonormal=self.orthonormal)
        if self.orthonormal:  # signs are arbitrary: those of ``fix_signs``, whatever it is
            drawn = tuple(map(linalg.fix_signs, drawn))
        return tuple(basis.to(dtype).contiguous() for basis in drawn)  # as those are that are kept


@cache
def source_of(device: torch.device, *, orthonormal: bool) -> int:
    """A number for what makes bases of numbers on a device: where another one stands, a seed means other bases.

    CPUs and GPUs have different generators, and how a GPU divides a large draw among its threads, and hence which
    numbers come where, depends on how many it has.

    Args:
        device: Where bases are drawn.
        orthonormal: Whether their columns are made so.
    """
    kind = f"{device.type}/{orthonormal}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kind += f"/{properties.multi_processor_count}/{properties.max_threads_per_multi_processor}"
    return int.from_bytes(hashlib.blake2b(kind.encode(), digest_size=4).digest(), "big")
