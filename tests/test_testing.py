"""The helpers that other tests lean on can fail, and say why."""

import math

import pytest
import torch
from torch.testing._internal.optests import OpCheckError

from torchlayers import testing
from torchlayers.testing import (
    assert_close_rel,
    assert_equivariant,
    equivariance_error,
    nan_empty,
    opcheck_all,
    relative_error,
    spawn_ranks,
)

NAN, INF = float("nan"), float("inf")


def test_relative_error_is_the_ratio_of_norms():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.0]), reference) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1, rel=1e-12)
    # In float32 the difference of these two would be lost.
    assert relative_error(torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.ones(1)) == pytest.approx(1e-12, 1e-3)
    assert relative_error(torch.tensor([1 + 1j]), torch.tensor([1 + 0j])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "actual, reference",
    [
        ([NAN, 1.0], [1.0, 1.0]),
        ([1.0, 1.0], [NAN, 1.0]),
        ([INF, 1.0], [INF, 1.0]),
        ([NAN], [0.0]),
        ([INF, 1.0], [1.0, 1.0]),
    ],
)
def test_nothing_that_is_not_finite_passes(actual, reference):
    actual, reference = torch.tensor(actual), torch.tensor(reference)
    assert not relative_error(actual, reference) <= 1e30
    for options in ({}, {"rtol": 1e30}, {"rtol": INF}, {"baseline": actual}, {"baseline": reference, "floor": INF}):
        with pytest.raises(AssertionError):
            assert_close_rel(actual, reference, **options)


def test_relative_error_at_zero_and_empty():
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == INF
    assert relative_error(torch.zeros(0, 2), torch.zeros(0, 2)) == 0
    with pytest.raises(AssertionError, match=r"shape of reference, \(3,\), got \(1, 3\)"):
        relative_error(torch.zeros(1, 3), torch.zeros(3))
    with pytest.raises(TypeError, match="reference must be a tensor, got list"):
        relative_error(torch.zeros(1), [0.0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_tolerance_of_a_dtype_covers_rounding_and_little_more(dtype):
    exact = torch.randn(1000, dtype=torch.float64)
    assert_close_rel(exact.to(dtype), exact)
    off = exact * (1 + 200 * torch.finfo(dtype).eps)
    with pytest.raises(AssertionError, match="tolerance of"):
        assert_close_rel(off.to(dtype), exact)
    with pytest.raises(AssertionError):  # a dtype's tolerance is not another's
        assert_close_rel(exact * (1 + 1e-4), exact, dtype=torch.float32)


def test_tf32_complex_and_integer_tolerances():
    exact = torch.randn(100, dtype=torch.float64)
    assert_close_rel((exact * (1 + 1e-3)).float(), exact, dtype="tf32")
    assert testing.tolerance(torch.complex64) == testing.tolerance(torch.float32)
    assert testing.tolerance(torch.int64) == testing.tolerance(torch.bool) == 0
    with pytest.raises(AssertionError):
        assert_close_rel(torch.tensor([1, 2]), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="dtype must be one of"):
        testing.tolerance(torch.float8_e4m3fn)


def test_a_baseline_sets_the_bound():
    exact = torch.randn(100, dtype=torch.float64)
    baseline = exact * (1 + 1e-3)
    assert assert_close_rel((exact * (1 + 1.9e-3)).float(), exact, baseline=baseline.float()) == pytest.approx(
        1.9e-3, 1e-3
    )
    with pytest.raises(AssertionError, match=r"2 × the baseline's error 1\.000e-03"):
        assert_close_rel((exact * (1 + 2.1e-3)).float(), exact, baseline=baseline.float())
    assert_close_rel((exact * (1 + 2.1e-3)).float(), exact, baseline=baseline.float(), factor=3)
    # A baseline that is right by luck does not demand the same luck of a rounded result.
    ints = torch.arange(1.0, 100.0, dtype=torch.float64) / 3
    assert_close_rel(ints.float(), ints, baseline=ints)
    with pytest.raises(ValueError, match="rtol and baseline"):
        assert_close_rel(exact, exact, rtol=0.1, baseline=exact)


def test_the_message_names_the_worst_entry():
    reference = torch.zeros(3, 4)
    reference[0, 0] = 1
    actual = reference.clone()
    actual[2, 1] = 0.5
    with pytest.raises(AssertionError, match=r"5\.000e-01 exceeds 2\.000e-06.*\n.*\(2, 1\): got 0\.5, expected 0"):
        assert_close_rel(actual, reference)
    actual[1, 3] = NAN
    with pytest.raises(AssertionError, match=r"1 of 12 entries are NaN or infinite, the first at \(1, 3\)"):
        assert_close_rel(actual, reference)


def test_equivariance_of_a_circular_convolution_and_not_of_a_padded_one():
    x = torch.randn(2, 1, 8, dtype=torch.float64)
    circular = torch.nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", dtype=torch.float64)
    padded = torch.nn.Conv1d(1, 1, 3, padding=1, dtype=torch.float64)

    def shift(v):
        return v.roll(3, dims=-1)

    assert_equivariant(circular, x, shift)
    with pytest.raises(AssertionError, match="not equivariant"):
        assert_equivariant(padded, x, shift)
    with pytest.raises(AssertionError, match=r"nan, expected at most"):
        assert_equivariant(lambda v: v * NAN, x, shift)
    assert_equivariant(padded, x, shift, tol=10)


def test_equivariance_under_random_rotations_with_several_inputs_and_outputs():
    points, mask = torch.randn(5, 3, dtype=torch.float64), torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool)

    def centre_and_size(p, m):
        centre = p[m].mean(0, keepdim=True)
        return centre, (p - centre).norm()

    for _ in range(3):
        rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q

        def turn(v, rotation=rotation):
            return v @ rotation.T

        assert_equivariant(centre_and_size, (points, mask), (turn, None), (turn, lambda s: s))
        assert equivariance_error(centre_and_size, (points, mask), (turn, None), (None, None)) > 1e-2
    with pytest.raises(ValueError, match="transform_out must be given"):
        assert_equivariant(centre_and_size, (points, mask), (turn, None))
    with pytest.raises(ValueError, match="transform_in must have 2 entries"):
        assert_equivariant(centre_and_size, (points, mask), (turn,), (turn, None))


# Operations of a namespace of their own; the second one's fake implementation is wrong.
@torch.library.custom_op("torchlayers_testing::right", mutates_args=())
def _right(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@torch.library.custom_op("torchlayers_testing::wrong", mutates_args=())
def _wrong(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


_right.register_fake(torch.empty_like)
_wrong.register_fake(lambda x: x.new_empty(x.shape[0] + 1))


def test_opcheck_all_leaves_no_operation_out():
    def samples():
        return [(torch.randn(3),)]

    def check(mapping):
        return opcheck_all(mapping, namespace="torchlayers_testing")

    with pytest.raises(LookupError, match="without a sample: wrong; not registered: none"):
        check({"right": samples})
    with pytest.raises(LookupError, match="without a sample: none; not registered: other"):
        check({"right": samples, "wrong": samples, "other": samples})
    with pytest.raises(LookupError, match=r"samples\['right'\] must give at least one"):
        check({"right": list, "wrong": samples})
    with pytest.raises(OpCheckError):
        check({"torchlayers_testing::right": samples, "wrong": samples})
    results = opcheck_all({"right": samples, "wrong": samples}, namespace="torchlayers_testing", tests=["test_schema"])
    assert results == {"right": [{"test_schema": "SUCCESS"}], "wrong": [{"test_schema": "SUCCESS"}]}


def test_nan_empty_poisons_every_dtype_and_constructor():
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn)
    with nan_empty():
        for dtype in floats:
            assert torch.empty(2, 3, dtype=dtype).to(torch.complex128).isnan().all(), dtype
        for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64):
            assert (torch.empty(4, dtype=dtype) == torch.iinfo(dtype).max).all(), dtype
        assert torch.empty(4, dtype=torch.bool).all()
        like = torch.zeros(2, 3)
        made = {
            "empty_like": torch.empty_like(like),
            "empty_strided": torch.empty_strided((2, 3), (1, 2)),
            "empty_permuted": torch.empty_permuted((2, 3), (1, 0)),
            "new_empty": like.new_empty(3),
            "new_empty_strided": like.new_empty_strided((2,), (1,)),
            "leaf": torch.empty(3, requires_grad=True),
        }
        assert all(t.isnan().all() for t in made.values()), made
        assert made["leaf"].is_leaf and made["empty_strided"].stride() == (1, 2)
        assert torch.empty(2, device="meta").is_meta
        assert torch.zeros(3).eq(0).all()


def test_nan_empty_restores_also_when_nested_or_left_by_an_exception():
    before = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty)
    with pytest.raises(KeyError), nan_empty(), nan_empty():
        raise KeyError
    assert (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty) == before


def test_tolerances_grow_as_precision_falls():
    table = [testing.TOLERANCES[d] for d in (torch.float64, torch.float32, "tf32", torch.bfloat16)]
    assert table == sorted(table) and all(math.isfinite(t) for t in table)


RANKS = """
import torch
import torch.distributed as dist
from torchlayers.testing import serve_ranks

def body(rank):
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    if FAILS and rank == 1:
        raise ValueError("rank 1 gives up")
    return [rank, total.item(), torch.get_num_threads()]

if __name__ == "__main__":
    serve_ranks(body)
"""


@pytest.mark.distributed
def test_ranks_of_a_script(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(f"FAILS = False\n{RANKS}")
    assert spawn_ranks(script, 2, tmp_path) == [[0, 3.0, 1], [1, 3.0, 1]]
    script.write_text(f"FAILS = True\n{RANKS}")
    (tmp_path / "again").mkdir()
    with pytest.raises(RuntimeError, match=r"a rank of .*ranks.py failed:[\s\S]*rank 1 gives up"):
        spawn_ranks(script, 2, tmp_path / "again")
