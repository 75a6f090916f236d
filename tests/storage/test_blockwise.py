# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import storage
from lightning_galore.storage import INT4, INT8, Blockwise
from tests.helpers import same_bits
from tests.reference import codes_reference as reference

CODECS = [pytest.param(INT8, id="int8"), pytest.param(INT4, id="int4")]
SIZES: list[tuple[int, ...]] = [(1,), (2,), (63,), (64,), (65,), (255,), (256,), (257,), (1, 33), (33, 1), (5, 77)]
FP32_MAX = torch.finfo(torch.float32).max
BF16_MAX = torch.finfo(torch.bfloat16).max
DRAWS = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def round_trip(codec: Blockwise, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return codec.decode(*codec.encode(value), value.shape, dtype or value.dtype)


def steps_of(value: Tensor, absmax: Tensor) -> Tensor:
    """Size of one int8 step at each entry, in fp64."""
    return (absmax.double() / 127).repeat_interleave(INT8.block_size)[: value.numel()].view(value.shape)


# -- any size, and the bytes that are promised -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SIZES, (), (0,), (0, 7)])
@pytest.mark.parametrize("codec", CODECS)
def test_any_shape_takes_just_the_bytes_that_are_promised(codec: Blockwise, shape: tuple[int, ...]) -> None:
    value = gaussian(*shape)
    codes, absmax = codec.encode(value)
    numel, blocks = value.numel(), -(-value.numel() // codec.block_size)
    assert storage.nbytes((codes, absmax)) == codec.nbytes(numel) == -(-numel * codec.bits // 8) + 2 * blocks
    for part in (codes, absmax):  # no view keeps anything larger alive
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    decoded = codec.decode(codes, absmax, shape, torch.float32)
    assert decoded.shape == value.shape
    assert float((decoded - value).abs().max() if numel else 0) <= float(value.abs().max() if numel else 0) / 3


def test_int4_takes_half_a_byte_an_entry() -> None:
    assert INT4.nbytes(2**20) == 2**19 + 2 * 2**14
    assert INT4.encode(gaussian(1024, 1024))[0].shape == (2**19,)
    assert INT4.encode(gaussian(7))[0].shape == (4,)


@pytest.mark.parametrize("codec", CODECS)
def test_a_short_last_block_is_as_if_it_stood_alone(codec: Blockwise) -> None:
    value = gaussian(2 * codec.block_size + 3)
    decoded = round_trip(codec, value)
    alone = torch.cat([round_trip(codec, part) for part in value.split(codec.block_size)])
    assert torch.equal(decoded, alone)


@pytest.mark.parametrize("codec", CODECS)
def test_memory_order_does_not_matter(codec: Blockwise) -> None:
    value = gaussian(24, 40)
    assert same_bits(codec.encode(value.mT.contiguous().mT), codec.encode(value))
    assert same_bits(codec.encode(gaussian(48, 80)[::2, ::2]), codec.encode(gaussian(48, 80)[::2, ::2].contiguous()))


# -- the nearest code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (255,), (257,), (9, 100)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_nearest_of_all_codes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = gaussian(*shape, dtype=dtype)
    codes, absmax = INT8.encode(value)
    decoded = INT8.decode(codes, absmax, shape, torch.float64).flatten()
    pairs = zip(reference.groups(value, 256), absmax.tolist(), strict=True)
    expected = torch.cat([reference.nearest(group, reference.symmetric_grid(end)) for group, end in pairs])
    errors = (decoded - value.double().flatten()).abs(), (expected - value.double().flatten()).abs()
    torch.testing.assert_close(errors[0], errors[1], rtol=0, atol=1e-7)
    for group, end in zip(reference.groups(value, 256), absmax.tolist(), strict=True):
        largest = float(group.abs().max())
        assert largest <= end <= largest * (1 + 2**-7)


@pytest.mark.parametrize("shape", [(1,), (63,), (65,), (9, 30)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_int4_is_the_nearest_of_all_codes_under_the_best_scale(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = gaussian(*shape, dtype=dtype)
    codes, absmax = INT4.encode(value)
    decoded = INT4.decode(codes, absmax, shape, torch.float64)
    rows = zip(reference.groups(value, 64), reference.groups(decoded, 64), absmax.tolist(), strict=True)
    for group, found, end in rows:
        oracle = reference.nearest(group, reference.signed_grid(end))
        torch.testing.assert_close((found - group).abs(), (oracle - group).abs(), rtol=0, atol=1e-7)
        tried = reference.candidates(group)
        assert end in tried
        least = min(float((reference.nearest(group, reference.signed_grid(c)) - group).norm()) for c in tried)
        assert float((found - group).norm()) <= least * (1 + 1e-5)


@pytest.mark.parametrize("magnitude", [1e-36, 1e-25, 1e-12, 1e12, 1e25, 1e36])
@pytest.mark.parametrize("codec", CODECS)
def test_magnitude_does_not_matter(codec: Blockwise, magnitude: float) -> None:
    """Squares of these leave fp32's range, and so does 127 over the smallest."""
    value = gaussian(500, dtype=torch.float64)
    errors = [
        float((round_trip(codec, (value * size).float()).double() / size - value).norm() / value.norm())
        for size in (1.0, magnitude)
    ]
    assert errors[1] <= 1.03 * errors[0]


@pytest.mark.parametrize("codec", CODECS)
def test_subnormal_numbers_survive(codec: Blockwise) -> None:
    value = torch.tensor([1e-38, 0.0, -5e-39, 2.5e-39])
    torch.testing.assert_close(round_trip(codec, value), value, rtol=0, atol=1e-38 / 14)
    assert bool(torch.isfinite(round_trip(codec, torch.tensor([1e-45, 0.0]))).all())
    assert bool(torch.isfinite(round_trip(codec, torch.tensor([1e-40, -3e-41]))).all())


@pytest.mark.parametrize("codec", CODECS)
def test_what_fp32_and_not_bf16_holds_stays_finite(codec: Blockwise) -> None:
    value = torch.tensor([FP32_MAX, -FP32_MAX, 1e38, 0.0])
    decoded = round_trip(codec, value)
    half = FP32_MAX / (2 * 127 if codec.bits == 8 else 2 * 8 / 1.15)
    torch.testing.assert_close(decoded.double(), value.double(), rtol=0, atol=half * 4)
    assert bool(torch.isfinite(decoded).all())
    assert bool(torch.isfinite(round_trip(codec, torch.full((70,), BF16_MAX, dtype=torch.bfloat16))).all())


def test_int8_at_the_end_of_fp32_is_off_by_half_a_step() -> None:
    value = torch.tensor([FP32_MAX, -FP32_MAX, 1e38, 0.0])
    assert float((round_trip(INT8, value).double() - value.double()).abs().max()) <= FP32_MAX / 254
    codes, absmax = INT8.encode_stochastically(value, seeded(), absmax=torch.ones(1, dtype=torch.bfloat16))
    assert float(absmax) == BF16_MAX
    assert codes[:2].tolist() == [127, -127]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_not_finite_is_not_hidden_and_stays_in_its_block(codec: Blockwise, bad: float) -> None:
    value = gaussian(3 * codec.block_size)
    value[codec.block_size + 5] = bad
    outcomes = [codec.encode(value)]
    if codec.bits == 8:
        outcomes += [codec.encode_stochastically(value, seeded())]
        outcomes += [codec.encode_stochastically(value, seeded(), absmax=codec.encode(gaussian(len(value)))[1])]
    for codes, absmax in outcomes:
        first, middle, last = codec.decode(codes, absmax, value.shape, torch.float32).view(3, -1)
        assert not bool(torch.isfinite(middle[5]))
        for block, part in ((first, value[: codec.block_size]), (last, value[-codec.block_size :])):
            assert float((block - part).norm() / part.norm()) < 0.15


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1.1, -3e-5])
@pytest.mark.parametrize("codec", CODECS)
def test_constant_blocks_are_kept_as_exactly_as_their_scale(codec: Blockwise, value: float) -> None:
    full = torch.full((300,), value)
    torch.testing.assert_close(round_trip(codec, full), full, rtol=2**-7, atol=0)
    if value in (0.0, 1.0, -1.0):
        assert torch.equal(round_trip(codec, full), full)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_group_that_does_not_straddle_zero_survives(codec: Blockwise, sign: float) -> None:
    value = sign * torch.linspace(1.0, 1.1, 256)
    step = 1.1 / (127 if codec.bits == 8 else 8)
    assert float((round_trip(codec, value) - value).abs().max()) <= step / 2 * (1 + 2**-7)


def test_int4_of_a_gaussian_beats_the_plain_quantiser() -> None:
    value = gaussian(512, 128)
    error, plain = (
        float((decoded.double() - value.double()).norm() / value.norm())
        for decoded in (round_trip(INT4, value), reference.min_max(value))
    )
    assert error <= 0.095
    assert plain == pytest.approx(0.109, abs=0.003)


@pytest.mark.parametrize("codec", CODECS)
def test_encoding_what_was_decoded_gives_the_same(codec: Blockwise) -> None:
    decoded = round_trip(codec, gaussian(40, 70))
    codes, absmax = codec.encode(decoded)
    again = codec.decode(codes, absmax, decoded.shape, torch.float32)
    if codec.bits == 8:  # a scale of 4 bits may be cut off a little more
        step = float(absmax.float().max()) / 127
        assert float((again - decoded).abs().max()) <= 0.51 * step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", CODECS)
def test_decoding_rounds_once(codec: Blockwise, dtype: torch.dtype) -> None:
    codes, absmax = codec.encode(gaussian(500))
    decoded = codec.decode(codes, absmax, (500,), dtype)
    assert decoded.dtype == dtype
    wide = codec.decode(codes, absmax, (500,), torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(decoded, wide.to(dtype))
    exact = codec.decode(codes, absmax, (500,), torch.float64)
    torch.testing.assert_close(decoded.double(), exact, rtol=max(2**-23, torch.finfo(dtype).eps), atol=0)


# -- at random ---------------------------------------------------------------------------------------------------------


def test_4_bits_are_not_rounded_at_random() -> None:
    with pytest.raises(ValueError, match=r"bits=4 cannot be rounded stochastically; use bits=8"):
        INT4.encode_stochastically(torch.ones(3), seeded())


def test_random_rounding_is_right_in_the_mean_and_gives_neighbours_only() -> None:
    """Each entry within 4.5 standard errors of its value, all of them together within 4; 2 values are on the grid."""
    shares = torch.tensor([0.0, 0.001, 0.02, 0.25, 0.5, 0.75, 0.98, 0.999])
    steps = torch.cat([shares + 40, -(shares + 40), shares + 126, -(shares + 126), shares, -shares]).clamp(-127, 127)
    value = torch.cat([steps, torch.tensor([127.0])]) / 127  # absmax is 1
    many = value.repeat(DRAWS, 1)
    padded = torch.zeros(DRAWS, INT8.block_size)  # one block a draw
    padded[:, : len(value)] = many
    codes, absmax = INT8.encode_stochastically(padded, seeded())
    assert bool((absmax == 1).all())
    assert not bool(codes[:, len(value) :].any())
    drawn = codes[:, : len(value)].double()
    exact = value.double() * 127
    assert bool(((drawn >= (exact - 1e-4).floor()) & (drawn <= (exact + 1e-4).ceil())).all())
    share = exact - exact.floor()
    deviation = (share * (1 - share)).sqrt().clamp(min=1e-3) / DRAWS**0.5
    scores = (drawn.mean(0) - exact) / deviation
    assert float(scores.abs().max()) < 4.5
    assert abs(float(scores.sum())) < 4 * len(scores) ** 0.5
    # The spread is that of a coin, not a smaller one: nothing is rounded to the nearest.
    torch.testing.assert_close(drawn.var(0), share * (1 - share), rtol=0.15, atol=2e-3)


def test_what_is_on_the_grid_never_changes() -> None:
    """A million entries, many times: an error of one in 100,000, as a rounded sum makes it, would show."""
    value = gaussian(1000, 1000)
    codes, absmax = INT8.encode(value.sign() * (0.5 + 0.5 * value.abs().clamp(max=1)))  # 64 to 127: the coarsest sums
    decoded = INT8.decode(codes, absmax, codes.shape, torch.float32)
    generator = seeded()
    for _ in range(3):
        assert same_bits(INT8.encode_stochastically(decoded, generator, absmax=absmax), (codes, absmax))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_code_of_every_scale_stays(dtype: torch.dtype) -> None:
    """All codes under all mantissas of bf16: the rounding of no scale makes one of them move."""
    absmax = (torch.arange(128, 256).repeat(3, 1) * torch.tensor([[2.0**-140], [2.0**-7], [2.0**119]])).flatten()
    absmax = absmax.bfloat16()[absmax.bfloat16() >= 1e-36]
    codes = torch.zeros(len(absmax), 256, dtype=torch.int8)
    codes[:, :255] = torch.arange(-127, 128)
    decoded = INT8.decode(codes, absmax, codes.shape, dtype)
    for seed in range(5):
        assert same_bits(INT8.encode_stochastically(decoded, seeded(seed), absmax=absmax), (codes, absmax))


def test_a_seed_repeats_and_another_does_not() -> None:
    value = gaussian(300)
    absmax = INT8.encode(value)[1]
    draws = [INT8.encode_stochastically(value, seeded(seed), absmax=absmax)[0] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_random_rounding_knows_no_sign() -> None:
    """As often away from zero as towards it, for either sign."""
    value = torch.full((256 * 400,), 0.3 / 127)
    value[::256] = 1.0
    means = [
        float(sign * INT8.encode_stochastically(sign * value, seeded(s), absmax=torch.ones(400).bfloat16())[0].sum())
        for s, sign in ((0, 1), (1, -1))
    ]
    expected, deviation = 400 * (127 + 255 * 0.3), (400 * 255 * 0.3 * 0.7) ** 0.5
    assert all(abs(mean - expected) < 4 * deviation for mean in means)


def test_nothing_is_cut_off_or_off_by_more_than_a_step() -> None:
    generator, value = seeded(), gaussian(7, 300)
    codes, absmax = INT8.encode(value)
    for step in range(60):
        value = INT8.decode(codes, absmax, value.shape, torch.float32)
        value = value * (0.9 if step % 3 else 1.3) + 0.02 * gaussian(7, 300, seed=step)
        codes, absmax = INT8.encode_stochastically(value, generator, absmax=absmax)
        off = (INT8.decode(codes, absmax, value.shape, torch.float64) - value.double()).abs()
        assert bool((off <= steps_of(value, absmax) * (1 + 1e-5)).all())
        for group, end in zip(reference.groups(value, 256), absmax.tolist(), strict=True):
            assert float(group.abs().max()) <= end


@pytest.mark.parametrize(("largest", "keeps"), [(1.0, True), (0.9, True), (0.75, True), (0.74, False), (1.01, False)])
def test_a_block_keeps_its_scale_while_its_entries_fit(largest: float, keeps: bool) -> None:
    value = torch.linspace(-0.3, 0.3, 256)
    value[7] = -largest
    before = torch.ones(1, dtype=torch.bfloat16)
    after = INT8.encode_stochastically(value, seeded(), absmax=before)[1]
    if keeps:
        assert same_bits([after], [before])
    else:  # a little more than is needed, so that the next step does not move it again
        assert largest * 1.0625 <= float(after) <= largest * 1.0625 * (1 + 2**-7)


def test_scales_of_blocks_move_one_by_one_and_to_zero_and_back() -> None:
    value = gaussian(4 * 256).clamp(-2, 2)
    value[::256] = 2.0
    before = INT8.encode(value)[1]
    value[256:512] = 0.0
    value[512:768] *= 3
    after = INT8.encode_stochastically(value, seeded(), absmax=before)[1]
    assert [bool(one) for one in after == before] == [True, False, False, True]
    assert float(after[1]) == 0.0
    assert float(after[2]) > float(before[2])
    value[256:512] = 0.5
    codes, after = INT8.encode_stochastically(value, seeded(), absmax=after)
    again = INT8.decode(codes, after, value.shape, torch.float32)[256:512]
    assert float((again - 0.5).abs().max()) <= float(after[1]) / 127


def test_small_updates_arrive_that_the_nearest_code_loses() -> None:
    """300 updates of 1 % of a step."""
    start = torch.zeros(256 * 40)
    start[::256] = 1.0
    kept, lost = INT8.encode(start), INT8.encode(start)
    generator = seeded()
    update = torch.full_like(start, 0.01 / 127)
    update[::256] = 0.0
    for _ in range(300):
        decoded = [INT8.decode(*codes, start.shape, torch.float32) for codes in (kept, lost)]
        kept = INT8.encode_stochastically(decoded[0] + update, generator, absmax=kept[1])
        lost = INT8.encode(decoded[1] + update)
    arrived = (INT8.decode(*kept, start.shape, torch.float64) - start).view(40, 256)[:, 1:] * 127
    deviation = (300 * 0.01 * 0.99 / arrived.numel()) ** 0.5
    assert abs(float(arrived.mean()) - 3.0) < 4 * deviation
    assert torch.equal(INT8.decode(*lost, start.shape, torch.float32), start)


def test_codes_are_plain_tensors_on_their_device() -> None:
    for codec, make in itertools.product((INT4, INT8), (torch.ones, torch.zeros)):
        parts: tuple[Any, ...] = codec.encode(make(3, 5))
        assert [type(part) for part in parts] == [Tensor, Tensor]
        assert [part.dtype for part in parts] == [torch.int8 if codec.bits == 8 else torch.uint8, torch.bfloat16]
    assert INT8.encode(torch.ones(3, 5, device="meta"))[0].device.type == "meta"
