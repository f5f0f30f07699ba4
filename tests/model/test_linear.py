"""Products with weights in every format: right, and the same bits for a row whatever stands beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.compiled.library import LANES, library
from weft.formats.packed import Codes
from weft.model.kernels import choice, trial
from weft.model.kernels.choice import KERNELS, SHARED, Kernels, recall
from weft.model.kernels.compiled import Compiled8, CompiledPlain
from weft.model.kernels.few_bits import INT8, LEVELS, levels_of
from weft.model.kernels.floats import PlainProduct
from weft.model.kernels.formats import gathering
from weft.model.kernels.linear import Gained, InBlocks, Linear, MadeUp, NoKernel, Stored
from weft.model.kernels.rotation import TURN, matrix, turned
from weft.model.kernels.trial import KernelChoice, choose

ROWS = 160
SHAPES = [(96, 64), (37, 100), (704, 256), (200, 999), (9, 50), (11, 19), (1, 10), (64, 1600)]
ERRORS = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.02, "int4": 0.15}  # of products, at most


@pytest.fixture
def measured(threads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Anew, with so many threads."""
    monkeypatch.setattr(choice, "user_cache_path", lambda name: tmp_path)


def stored(format_: str, weight: torch.Tensor) -> Stored:
    gathered = gathering(format_, tuple(weight.shape))
    for start in range(0, len(weight), 50):
        gathered.put(start, weight[start : start + 50])
    return gathered.stored


def rows_with_outliers(inputs: int, count: int = ROWS) -> torch.Tensor:
    rows = torch.randn(count, inputs)
    rows[::5] *= 100  # beside one a hundred times as large
    rows[::7, :: max(1, inputs // 4)] *= 1000
    rows[3], rows[11] = 0, 1e-20
    return rows


@pytest.mark.parametrize(("width", "inputs"), SHAPES)
@pytest.mark.parametrize("format_", KERNELS)
def test_a_row_has_its_bits_in_any_batch(measured, format_: str, width: int, inputs: int) -> None:
    """Every count of rows from 1 to 70, at several places, with outliers beside."""
    weight, bias, rows = torch.randn(width, inputs), torch.randn(width), rows_with_outliers(inputs)
    linear = Kernels(exact_rows=True).linear(stored(format_, weight), bias)
    whole = linear(rows)
    expected = rows @ weight.T + bias
    usual = rows.norm(dim=1) * weight.norm() / inputs**0.5 + bias.norm()
    error = (whole - expected).norm(dim=1) / usual
    assert float(error.quantile(0.9)) < ERRORS[format_], error
    for count in range(1, 71):
        for start in (0, 2, ROWS - count):
            assert torch.equal(linear(rows[start : start + count].contiguous()), whole[start : start + count]), count


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_neighbours_change_nothing(data: st.DataObject) -> None:
    format_ = data.draw(st.sampled_from(list(KERNELS)))
    seed, count = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 70))
    place = data.draw(st.integers(0, count - 1))
    torch.manual_seed(seed)
    linear = Kernels(exact_rows=True).linear(stored(format_, torch.randn(40, 72)))
    rows = torch.randn(count, 72) * 10 ** data.draw(st.floats(-3, 6))
    rows[place] = torch.randn(72)
    assert torch.equal(linear(rows)[place], linear(rows[place : place + 1].clone())[0])


@pytest.mark.parametrize("format_", KERNELS)
def test_all_kernels_that_are_here_agree(measured, format_: str) -> None:
    """A choice is one of speed: in int8 torch's kernels even agree to the bit. (Ours turns rows itself.)"""
    weight, rows = stored(format_, torch.randn(64, 128)), rows_with_outliers(128)
    here = {}
    for name, maker in KERNELS[format_].items():
        try:
            here[name] = maker(weight, None, 1)(turned(rows) if maker is Compiled8 else rows)
        except NoKernel:
            continue
    assert here
    first = next(iter(here.values()))
    for name, other in here.items():
        assert (first - other).norm() < 0.01 * first.norm(), name
    assert format_ != "int8" or torch.equal(here["fbgemm"], here["onednn"])


@pytest.mark.parametrize("format_", KERNELS)
def test_products_without_rows_or_numbers(format_: str) -> None:
    kernels = Kernels()
    assert kernels.linear(stored(format_, torch.randn(5, 4)))(torch.randn(0, 4)).shape == (0, 5)
    assert torch.equal(kernels.linear(stored(format_, torch.randn(5, 0)))(torch.randn(3, 0)), torch.zeros(3, 5))
    assert kernels.linear(stored(format_, torch.randn(0, 4)))(torch.randn(3, 4)).shape == (3, 0)


@pytest.mark.parametrize("format_", ["int8", "int4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(format_: str, bad: float) -> None:
    """So that whoever looks at the answer sees it; and it stays in its row."""
    linear, rows = Kernels().linear(stored(format_, torch.randn(16, 64))), torch.randn(4, 64)
    clean = linear(rows)
    rows[2, 5] = bad
    spoilt = linear(rows)
    assert not spoilt[2].isfinite().any()
    assert torch.equal(spoilt[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("name", INT8)
def test_the_largest_sums_are_right(name: str) -> None:
    """Where sums of two products end at 16 bits, rows have fewer levels."""
    try:
        levels = levels_of(name)
    except NoKernel:
        pytest.skip(f"this torch has no {name}")
    assert levels in LEVELS
    weight = Codes(torch.full((32, 512), 127, dtype=torch.int8), torch.ones(32, 1))
    rows = torch.full((3, 512), float(levels))
    rows[1] = -rows[1]
    assert torch.equal(INT8[name](weight).whole(rows.clone())[:, 0], rows.sum(1) * 127)


def test_the_rotation_is_its_own_inverse() -> None:
    assert torch.allclose(matrix() @ matrix(), torch.eye(TURN), atol=1e-6)


def test_an_outlier_costs_a_row_little() -> None:
    """One number of 576 that is a hundred times as large as others, as in real residual streams."""
    weight, rows = torch.randn(64, 576), torch.randn(20, 576)
    rows[:, 100] *= 100
    weight[:, 100] /= 100
    expected = rows @ weight.T
    error = (Kernels().linear(stored("int8", weight))(rows) - expected).norm() / expected.norm()
    assert float(error) < 0.06  # without the rotation 0.25


def test_gained() -> None:
    weight, scale, bias, rows = torch.randn(5, 8), torch.rand(8), torch.randn(8), torch.randn(3, 8)
    assert torch.allclose(Gained(PlainProduct(weight), scale, bias)(rows), (rows * scale + bias) @ weight.T, atol=1e-5)
    assert torch.allclose(Gained(PlainProduct(weight), scale, None)(rows), (rows * scale) @ weight.T, atol=1e-5)


class Changing(MadeUp):
    """A kernel whose bits change with the number of rows below `until`."""

    def __init__(self, weight: Stored, until: int, least: int) -> None:
        assert isinstance(weight, torch.Tensor)
        super().__init__(len(weight), least)
        self.weight, self.until = weight, until

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        exact = (rows.double() @ self.weight.T.double()).float()
        return exact + (0.001 if len(rows) < self.until else 0.0)


@pytest.mark.parametrize(("least", "exact"), [(1, True), (2, True), (7, True), (16, True), (30, False)])
def test_few_rows_are_made_up(least: int, exact: bool) -> None:
    def maker(weight: Stored, bias: torch.Tensor | None, made: int) -> Linear:
        return Changing(weight, least, made)

    found = choose({"only": maker}, "float32", (4, 8))
    assert (found.exact, found.least) == (exact, least if exact else 1)


def test_a_kernel_that_keeps_row_bits_goes_before_a_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SMALL", 1)
    monkeypatch.setattr(trial, "timed", lambda linear, *_: (1.0, 1.0) if isinstance(linear, Changing) else (9.0, 9.0))
    makers: dict[str, Callable[..., Linear]] = {
        "fast": lambda weight, *_: Changing(weight, 40, 1),
        "slow": PlainProduct,
    }
    monkeypatch.setattr(trial, "_least_of_all", lambda *_: True)
    monkeypatch.setattr(trial, "_least", lambda linear, *_: 0 if isinstance(linear, Changing) else 1)
    found = choose(makers, "float32", (4, 8))
    assert found.kernel == "slow" and found.seconds["fast"] == (1.0, 1.0)


def test_where_no_kernel_keeps_row_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest runs; what is to be reproducible goes in blocks of plain products."""
    monkeypatch.setattr(choice, "choose", lambda *_: KernelChoice("plain", 1, False))
    monkeypatch.setattr(choice, "recall", lambda threads: {})
    monkeypatch.setattr(choice, "keep", lambda *_: None)
    weight, rows = torch.randn(100, 64), torch.randn(ROWS, 64)
    assert isinstance(fast := Kernels().linear(weight), PlainProduct) and not fast.block
    exact = Kernels(exact_rows=True).linear(weight)
    assert isinstance(exact, PlainProduct) and exact.block
    whole = exact(rows)
    assert torch.allclose(whole, rows @ weight.T, atol=1e-4)
    for start, stop in ((0, 64), (64, 128), (128, 160)):
        assert torch.equal(exact(rows[start:stop]), whole[start:stop])


@pytest.mark.parametrize("format_", ["int8", "int4"])
def test_codes_without_an_exact_kernel_go_in_blocks_too(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "recall", lambda threads: {})
    real = choice.choose
    monkeypatch.setattr(choice, "choose", lambda *given: msgspec.structs.replace(real(*given), exact=False))
    monkeypatch.setattr(choice, "keep", lambda *_: None)
    linear, rows = Kernels(exact_rows=True).linear(stored(format_, torch.randn(50, 64))), torch.randn(ROWS, 64)
    assert isinstance(getattr(linear, "inner", linear), InBlocks) or isinstance(linear, InBlocks)
    whole = linear(rows)
    for start, stop in ((0, 64), (64, 65), (128, 160)):
        assert torch.equal(linear(rows[start:stop]), whole[start:stop])
    assert linear(rows[:0]).shape == (0, 50)


def test_choices_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choice, "user_cache_path", lambda name: tmp_path)
    kernels, weight = Kernels(), torch.randn(96, 64)
    kernels.linear(weight)
    kernels.linear(weight[:50], shared=True)
    kept = recall(torch.get_num_threads())
    assert set(kept) == {"float32 96x64", "float32 shared 50x64"}
    monkeypatch.setattr(choice, "choose", lambda *_: pytest.fail("measured again"))
    Kernels().linear(weight)
    [file] = (tmp_path / "kernels").glob("*.json")
    for text in ("{", json.dumps({"machine": {}, "choices": {}}), "null", file.read_text()[:-30]):
        file.write_text(text)
        assert recall(torch.get_num_threads()) == {}


def test_a_kernel_that_is_gone_is_chosen_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choice, "user_cache_path", lambda name: tmp_path)
    choice.keep(torch.get_num_threads(), {"float32 96x64": KernelChoice("of another torch")})
    weight, rows = torch.randn(96, 64), torch.randn(3, 64)
    assert torch.allclose(Kernels().linear(weight)(rows), rows @ weight.T, atol=1e-4)


def test_a_kernel_that_is_wrong_is_not_taken() -> None:
    class Doubled(PlainProduct):
        def product(self, rows_TK: torch.Tensor) -> torch.Tensor:
            return super().product(rows_TK) * 2

    chosen = choose({"doubled": Doubled, "plain": PlainProduct}, "float32", (300, 256))
    assert chosen.kernel == "plain" and set(chosen.seconds) == {"plain"}


@pytest.mark.parametrize("exact", [True, False])
def test_rows_are_turned_once(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever kernel was chosen, and however."""
    weight, rows = torch.randn(64, 128), torch.randn(5, 128)
    for name in KERNELS["int8"]:
        monkeypatch.setattr(Kernels, "choice", lambda *_, name=name: KernelChoice(name, 1, exact))
        monkeypatch.setattr(choice, "matrix", lambda: torch.zeros(0, 64))
        kernels = Kernels(exact_rows=True)
        kernels._turn = PlainProduct(matrix())
        try:
            found = kernels.linear(stored("int8", weight))(rows)
        except NoKernel:
            continue
        assert (found - rows @ weight.T).norm() < 0.02 * (rows @ weight.T).norm(), name


def test_a_torch_without_private_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise NoKernel(name)

    for module in ("floats", "few_bits"):
        monkeypatch.setattr(f"weft.model.kernels.{module}.operator", missing)
    monkeypatch.setattr("weft.model.kernels.compiled.library", lambda: None)
    monkeypatch.setattr(choice, "recall", lambda threads: {})
    monkeypatch.setattr(choice, "keep", lambda *_: None)
    linear = Kernels().linear(torch.eye(4))
    assert isinstance(linear, PlainProduct) and torch.equal(linear(torch.ones(2, 4)), torch.ones(2, 4))
    with pytest.raises(NoKernel, match="no kernel for weights in int4"):
        Kernels().linear(stored("int4", torch.randn(16, 64)))


def test_shared_weights_stay_where_they_are() -> None:
    weight = torch.randn(300, 64)
    assert set(SHARED) == {"float32", "bfloat16"}
    assert Kernels().linear(weight, shared=True).weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize(("width", "inputs"), [(1, 16), (37, 48), (300, 576), (64, 10)])
def test_a_row_has_its_bits_in_any_batch_with_a_shared_weight(threads: int, width: int, inputs: int) -> None:
    weight, bias, rows = torch.randn(width, inputs), torch.randn(width), rows_with_outliers(inputs)
    each = [Kernels(exact_rows=True).linear(weight, bias, shared=True)]
    if library() is not None and inputs % LANES == 0:
        each.append(CompiledPlain(weight, bias))
    for linear in each:
        whole, expected = linear(rows), rows @ weight.T + bias
        assert (whole - expected).norm() < 1e-5 * expected.norm()
        for count in range(1, 71):
            for start in (0, 2, ROWS - count):
                assert torch.equal(linear(rows[start : start + count].contiguous()), whole[start : start + count])


@pytest.mark.parametrize("low", [0, -8])
@pytest.mark.parametrize("size", [32, 64])
def test_codes_of_four_bits_are_taken_as_they_are(low: int, size: int) -> None:
    codes = torch.randint(low, low + 16, (10, 128)).to(torch.int16)
    some = Codes(codes, torch.rand(10, 128 // size), torch.randn(10, 128 // size))
    gathered = gathering("int4", (10, 128))
    assert gathered.put_codes(0, some)
    assert isinstance(gathered.stored, Codes)
    assert torch.allclose(gathered.stored.numbers(), some.numbers(), atol=1e-6)
    assert not gathering("int4", (10, 128)).put_codes(0, Codes(codes * 2, some.scales))  # 5 bits
    assert not gathering("int4", (10, 96)).put_codes(0, Codes(codes[:, :96], torch.rand(10, 6)))  # groups of 16
