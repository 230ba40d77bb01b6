"""The near-linear path against torch's SDPA over materialised pairs, and its bound against exhaustive search."""

import functools
import itertools
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlayers.tensor_attention import (
    PolynomialState,
    certified,
    polynomial_nth_order_attention,
    polynomial_tensor_attention,
    tensor_attention_error_bound,
    tensor_attention_logit_limit,
)
from torchlayers.tensor_attention.monomials import _exponents, monomials_of
from torchlayers.testing import assert_close_rel, assert_equivariant, relative_error


def uniform(*shape, bound=1.0, dtype=torch.float64):
    return (torch.rand(*shape, dtype=dtype) * 2 - 1) * bound


def operands(n=40, d=3, dv=5, *, n1=None, n2=None, batch=2, heads=2, kv_heads=None, bound=1.0, dtype=torch.float64):
    kv_heads, n1, n2 = kv_heads or heads, n if n1 is None else n1, n if n2 is None else n2
    make = functools.partial(uniform, dtype=dtype)
    return (
        make(batch, heads, n, d, bound=bound),
        make(batch, kv_heads, n1, d, bound=bound),
        make(batch, kv_heads, n2, d, bound=bound),
        make(batch, kv_heads, n1, dv),
        make(batch, kv_heads, n2, dv),
    )


def sees(n_queries, n_keys, *, window=(-1, -1), is_causal=False, offset=0, padding=None):
    """(batch or 1, 1, nq, nk): which keys each query sees, from the definition."""
    ahead = torch.arange(n_keys)[None] - torch.arange(n_queries)[:, None] - offset
    ok = torch.ones(n_queries, n_keys, dtype=torch.bool)
    if is_causal:
        ok &= ahead <= 0
    left, right = window
    if left >= 0:
        ok &= ahead >= -left
    if right >= 0:
        ok &= ahead <= right
    return ok[None, None] if padding is None else ok[None, None] & padding[:, None, None]


def exact(query, keys, values, scale, masks=None):
    """SDPA over all tuples, materialised; rows that see nothing are 0."""
    groups = query.shape[1] // keys[0].shape[1]
    keys, values = ([x.repeat_interleave(groups, 1) for x in xs] for xs in (keys, values))
    if masks is None:
        masks = [torch.ones(1, 1, query.shape[2], k.shape[2], dtype=torch.bool) for k in keys]
    pairs = lambda x, y: (x[..., :, None, :] * y[..., None, :, :]).flatten(-3, -2)  # noqa: E731
    key, value = functools.reduce(pairs, keys), functools.reduce(pairs, values)
    mask = functools.reduce(lambda x, y: (x[..., :, None] & y[..., None, :]).flatten(-2), masks)
    mask = mask.expand(query.shape[0], query.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return torch.where(mask.any(-1, keepdim=True), out, 0.0)


def test_monomials_are_all_products_once():
    x = uniform(2, 3, 4)
    monomials, exponents = monomials_of(x, 4), _exponents(3, 4)
    assert len(set(exponents)) == len(exponents) == math.comb(7, 4) == monomials.shape[1]
    for place, variables in enumerate(exponents):
        expected = functools.reduce(operator.mul, [x[:, c] for c in variables], torch.ones(2, 4, dtype=x.dtype))
        torch.testing.assert_close(monomials[:, place], expected)


# Relative errors (Frobenius norm) of 16 queries, entries of queries and keys uniform in [-B, B], scale 1/d, as an
# independent prototype measured them on one draw. Degree 0 is plain averaging.
ERRORS = {
    # (d, B): {degree: error}
    (4, 0.5): {0: 6e-3, 2: 6e-7, 4: 6e-11},
    (4, 1.0): {0: 4e-2, 2: 3e-4, 4: 2e-6, 6: 8e-9, 8: 2e-11},
    (4, 1.5): {0: 0.2, 2: 1e-2, 4: 9e-4, 6: 4e-5, 8: 1e-6, 12: 4e-10},
    (4, 2.0): {0: 0.4, 2: 0.2, 4: 5e-2, 6: 1e-2, 8: 2e-3, 12: 2e-5},
    (4, 2.5): {0: 0.8, 2: 0.7, 4: 0.5, 6: 0.3, 8: 0.2, 12: 2e-2},
    (8, 1.0): {0: 0.3, 2: 1e-3, 4: 3e-6, 6: 4e-9},
    (8, 2.0): {0: 0.9, 2: 0.2, 4: 3e-2, 6: 3e-3},
    (16, 1.0): {0: 3e-2, 2: 5e-5, 4: 5e-8},
    (16, 2.0): {0: 0.3, 2: 2e-2, 4: 2e-3},
}


@pytest.mark.parametrize("d, bound", ERRORS)
def test_error_table(d, bound):
    """Medians over draws. Outputs are averages of values around 0, of which little is left. How little moves all errors
    of a draw together, so that they are held to a power of ten, and to a factor of 2.5 relative to plain averaging.
    """
    query, k1, k2, v1, v2 = operands(256, d, d, batch=9, heads=1, bound=bound)
    query = query[:, :, :16]
    reference = exact(query, [k1, k2], [v1, v2], 1 / d)
    found, plain = {}, None
    for degree in ERRORS[d, bound]:
        out = polynomial_tensor_attention(query, k1, k2, v1, v2, degree=degree, scale=1 / d)
        error = (out - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
        plain = error if plain is None else plain
        found[degree] = (float(error.median()), float((error / plain).median()))
    averaging = ERRORS[d, bound][0]
    for degree, expected in ERRORS[d, bound].items():
        absolute, relative = found[degree]
        assert expected / 10 < absolute < 10 * expected
        assert expected / averaging / 2.5 < relative < 2.5 * expected / averaging


CASES = {
    "full": {},
    "causal": {"is_causal": True},
    "causal windows": {"is_causal": True, "window1": 7, "window2": 50},
    "two-sided windows": {"window1": (3, 5), "window2": 60},
    "one window": {"window2": (-1, 4)},
    "causal, unlimited on one side": {"is_causal": True, "window1": (40, -1)},
    "offsets": {"is_causal": True, "q_offset": 30, "k2_offset": -5, "window1": 45},
    "keys of the future": {"is_causal": True, "k1_offset": 60},
}


def visible(case, n_queries, n1, n2, padding):
    causal, masks = case.get("is_causal", False), []
    for t, n_keys in ((1, n1), (2, n2)):
        window = case.get(f"window{t}", (-1, -1))
        if isinstance(window, int):
            window = (window - 1, window - 1)
        offset = case.get("q_offset", 0) - case.get(f"k{t}_offset", 0)
        masks.append(sees(n_queries, n_keys, window=window, is_causal=causal, offset=offset, padding=padding[t - 1]))
    return masks


@pytest.mark.parametrize("basis", ["taylor", "chebyshev"])
@pytest.mark.parametrize("name", CASES)
def test_equals_exact_attention_within_its_bound(name, basis):
    case = CASES[name]
    args = operands(90, 3, 4, n1=110, n2=75, heads=4, kv_heads=2)
    padding = torch.rand(2, 110) > 0.3, torch.rand(2, 75) > 0.3
    padding[0][1] = False  # a sample without any key in set 1
    args[1].masked_fill_(~padding[0][:, None, :, None], float("nan"))  # what padding holds must not matter
    args[4].masked_fill_(~padding[1][:, None, :, None], float("inf"))
    clean = [x.nan_to_num(0.0, posinf=0.0) for x in args]
    out, bound = polynomial_tensor_attention(
        *args,
        degree=8,
        scale=0.5,
        basis=basis,
        enable_gqa=True,
        key_padding_mask1=padding[0],
        key_padding_mask2=padding[1],
        return_error_bound=True,
        **case,
    )
    reference = exact(clean[0], clean[1:3], clean[3:], 0.5, visible(case, 90, 110, 75, padding))
    assert (out[1] == 0).all() and (out[0] != 0).any()
    assert_close_rel(out, reference, rtol=1e-5)
    assert bound.shape == (2, 4, 90) and bound.dtype == torch.float64
    assert ((out - reference).abs().amax(-1) <= bound).all()
    assert bound.max() < 1e-3


@pytest.mark.parametrize("basis", ["taylor", "chebyshev"])
@pytest.mark.parametrize("case", [{}, {"is_causal": True, "window1": 6}])
def test_converges_with_the_degree(basis, case):
    args = operands(24, 2, 3)
    reference = exact(args[0], args[1:3], args[3:], 1.0, visible(case, 24, 24, 24, (None, None)))
    errors = [
        relative_error(polynomial_tensor_attention(*args, degree=g, scale=1.0, basis=basis, **case), reference)
        for g in (2, 6, 10, 16)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert fine < coarse / 20
    assert errors[-1] < 1e-11


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_order(order, is_causal):
    query, k1, k2, v1, v2 = operands(11, 3, 2, batch=1)
    keys = [k1, k2, uniform(1, 2, 11, 3)][: order - 1]
    values = [v1, v2, uniform(1, 2, 11, 2)][: order - 1]
    windows = [None, 4, None][: order - 1]
    out, bound = polynomial_nth_order_attention(
        query, keys, values, degree=10, is_causal=is_causal, windows=windows, return_error_bound=True
    )
    masks = [sees(11, 11, window=(-1, -1) if w is None else (w - 1, w - 1), is_causal=is_causal) for w in windows]
    reference = exact(query, keys, values, 3**-0.5, masks)
    assert ((out - reference).abs().amax(-1) <= bound).all() and bound.max() < 1e-4


# The bound


def worst_total_variation(logit_bound, polynomial):
    """The largest Σ|P̃ - P| over distributions P of logits in [-M, M], by search over two logits and their shares."""
    x = torch.linspace(-logit_bound, logit_bound, 81, dtype=torch.float64)
    ratio = polynomial(x) / x.exp()
    share = torch.linspace(0, 1, 201, dtype=torch.float64)[1:-1, None, None]
    mean = share * ratio[:, None] + (1 - share) * ratio
    return float((share * (ratio[:, None] / mean - 1).abs() + (1 - share) * (ratio / mean - 1).abs()).max())


@pytest.mark.parametrize("degree", [0, 2, 4, 8])
@pytest.mark.parametrize("logit_bound", [0.05, 0.4, 1.0, 3.0, 12.0])
def test_error_bound_holds_and_is_sharp(degree, logit_bound):
    def taylor(x):
        return sum(x**t / math.factorial(t) for t in range(degree + 1))

    worst = worst_total_variation(logit_bound, taylor)
    bound = tensor_attention_error_bound(logit_bound, degree)
    # Below 1e-13 the search sees its own rounding.
    assert worst <= bound + 1e-13
    assert bound <= 1.3 * worst + 1e-13
    assert bound <= 2.0


@pytest.mark.parametrize("degree, logit_bound", [(2, 0.4), (4, 1.0), (8, 2.0)])
def test_chebyshev_error_bound_holds(degree, logit_bound):
    import numpy as np

    # Of so high a degree that the interpolant's leading coefficients are those of the series.
    series = np.polynomial.chebyshev.Chebyshev.interpolate(np.exp, 30, domain=[-logit_bound, logit_bound])
    series = series.truncate(degree + 1)
    worst = worst_total_variation(logit_bound, lambda x: torch.from_numpy(series(x.numpy())))
    bound = tensor_attention_error_bound(logit_bound, degree, basis="chebyshev")
    assert worst <= bound < 100 * worst
    assert tensor_attention_error_bound(30.0, degree, basis="chebyshev") == math.inf


def test_error_bound_grows_and_has_its_inverse():
    bounds = tensor_attention_error_bound(torch.linspace(0, 900, 5000), 6)
    assert (
        bounds[0] == 0 and (bounds.diff() >= 0).all() and (bounds <= 2 + 1e-9).all() and bounds.dtype == torch.float64
    )
    for tolerance in (1e-6, 1e-3, 0.3):
        limit = tensor_attention_logit_limit(tolerance, 6)
        assert tensor_attention_error_bound(limit, 6) <= tolerance < tensor_attention_error_bound(limit * 1.0001, 6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    degree=st.sampled_from([0, 2, 4, 6]),
    basis=st.sampled_from(["taylor", "chebyshev"]),
    magnitude=st.sampled_from([1e-3, 0.3, 1.0, 3.0]),
    kind=st.sampled_from(["uniform", "signs", "spikes", "one query"]),
    scale=st.sampled_from([-1.0, 0.5, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_bound_is_rigorous(seed, d, sizes, degree, basis, magnitude, kind, scale, dtype):
    torch.manual_seed(seed)
    nq, n1, n2 = sizes
    args = list(operands(nq, d, 2, n1=n1, n2=n2, batch=1, heads=1, bound=magnitude))
    if kind == "signs":  # every entry at the bound: logits reach s d B³
        args = [x.sign() * magnitude for x in args]
    elif kind == "spikes":  # one large entry among small ones
        args[:3] = [x * torch.where(torch.rand_like(x) < 0.2, 1.0, 1e-3) for x in args[:3]]
    elif kind == "one query":  # values that follow the error's sign
        args[3], args[4] = (args[1] @ args[0][..., :1, :].mT).sign().expand(-1, -1, -1, 2), torch.ones_like(args[4])
    args = [x.to(dtype) for x in args]
    out, bound = polynomial_tensor_attention(*args, degree=degree, scale=scale, basis=basis, return_error_bound=True)
    wide = [x.double() for x in args]
    error = (out.double() - exact(wide[0], wide[1:3], wide[3:], scale)).abs().amax(-1)
    # An infinite bound is no statement, and the Chebyshev polynomial may vanish there.
    assert ((error <= bound) | (bound == math.inf)).all()
    if basis == "taylor" and dtype == torch.float64 and magnitude <= 1:
        largest = args[3].abs().amax(-2) * args[4].abs().amax(-2)
        assert (bound <= 2.001 * largest.amax()).all()


def test_bound_is_finer_than_that_of_the_entries():
    query, k1, k2, v1, v2 = operands(64, 16, 4, batch=1, heads=1, bound=2.0)
    _, bound = polynomial_tensor_attention(query, k1, k2, v1, v2, degree=2, scale=1 / 16, return_error_bound=True)
    assert bound.max() < tensor_attention_error_bound(4.6, 2) < tensor_attention_error_bound(8.0, 2)


def test_rounding_is_part_of_the_bound():
    args = operands(300, 4, 4, bound=0.3, dtype=torch.float32)
    out, bound = polynomial_tensor_attention(*args, degree=8, scale=0.25, return_error_bound=True)
    wide = [x.double() for x in args]
    error = (out.double() - exact(wide[0], wide[1:3], wide[3:], 0.25)).abs().amax(-1)
    assert error.max() > 1e-10, "the polynomial's own error is below 1e-20 here"
    assert (error <= bound).all() and bound.max() < 1e-3


def test_certified():
    args = operands(20, 4, 4, bound=0.7)
    assert certified(*args, degree=4, scale=0.25, tolerance=1e-3)
    assert not certified(*args, degree=4, scale=0.25, tolerance=1e-8)
    assert not certified(args[0] * 10, *args[1:], degree=4, scale=0.25, tolerance=1e-3)
    assert not certified(*args[:3], args[3] * 1e4, args[4], degree=4, scale=0.25, tolerance=1e-3)
    assert not certified(*operands(4, 128, 4), degree=4, tolerance=10.0), "too many features"
    outlier = args[1].clone()
    outlier[:, :, 3] = 1e3
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[:, 3] = False
    moved = (args[0], outlier, *args[2:])
    assert not certified(*moved, degree=4, scale=0.25)
    assert certified(*moved, degree=4, scale=0.25, key_padding_mask1=keep)


def test_certified_is_refused_under_compile():
    args = operands(5, 2, 2)
    with pytest.raises(Exception, match="approx='auto' decides from the data and cannot be compiled"):
        torch.compile(lambda *a: certified(*a), backend="eager", fullgraph=True)(*args)


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [{}, {"is_causal": True, "window2": 20}])
def test_precisions(dtype, case):
    args = [x.to(dtype) for x in operands(70, 4, 4)]
    wide = polynomial_tensor_attention(*[x.double() for x in args], scale=0.25, **case)
    out = polynomial_tensor_attention(*args, scale=0.25, **case)
    assert out.dtype == dtype
    assert_close_rel(out, wide, dtype=dtype)


def test_column_scales_do_not_change_the_result():
    """A channel times 1e20 in one set and 1e-20 in the query: the logits are the same, powers of entries overflow."""
    query, k1, k2, v1, v2 = operands(30, 3, 3, dtype=torch.float32)
    factor = torch.tensor([2.0**66, 1.0, 2.0**-66])
    expected = polynomial_tensor_attention(query, k1, k2, v1, v2, degree=6, is_causal=True)
    out = polynomial_tensor_attention(query / factor, k1 * factor, k2, v1, v2, degree=6, is_causal=True)
    assert_close_rel(out, expected, dtype=torch.float32)


def test_windows_do_not_accumulate_rounding():
    """Huge values far behind the window: subtracting prefix sums in float32 would leave only their rounding."""
    args = list(operands(600, 2, 2, batch=1, heads=1, dtype=torch.float32))
    args[3][:, :, :200] *= 1e6
    out = polynomial_tensor_attention(*args, scale=0.5, is_causal=True, window1=50, window2=50)
    wide = polynomial_tensor_attention(*[x.double() for x in args], scale=0.5, is_causal=True, window1=50, window2=50)
    assert_close_rel(out[:, :, 300:], wide[:, :, 300:], dtype=torch.float32)


def test_permuting_the_tokens():
    args = operands(20, 3, 3)
    order = torch.randperm(20)
    assert_equivariant(
        functools.partial(polynomial_tensor_attention, degree=6),
        args,
        [lambda x: x[:, :, order]] * 5,
        lambda x: x[:, :, order],
        tol=1e-12,
    )


def test_swapping_the_sets():
    query, k1, k2, v1, v2 = operands(20, 3, 3)
    out = polynomial_tensor_attention(query, k1, k2, v1, v2, is_causal=True, window1=3)
    swapped = polynomial_tensor_attention(query, k2, k1, v2, v1, is_causal=True, window2=3)
    assert_close_rel(swapped, out, rtol=1e-12)


def test_later_keys_do_not_matter():
    args = list(operands(70, 3, 3))
    before = polynomial_tensor_attention(*args, is_causal=True)
    changed = [torch.cat([x[:, :, :50], 9 * x[:, :, 50:]], 2) for x in args]
    after = polynomial_tensor_attention(*changed, is_causal=True)
    assert_close_rel(after[:, :, :50], before[:, :, :50], rtol=1e-12)
    assert relative_error(after[:, :, 50:], before[:, :, 50:]) > 0.1


# Gradients


GRADIENT_CASES = [
    {},
    {"is_causal": True, "window2": 4},
    {"basis": "chebyshev", "window1": (2, 1)},
    {"key_padding_mask1": torch.tensor([[False] * 6, [True, True, False, True, True, True]])},
]


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients(case):
    args = [x.requires_grad_() for x in operands(6, 2, 1, heads=2, kv_heads=1)]

    def function(*tensors):
        return polynomial_tensor_attention(*tensors, degree=4, enable_gqa=True, **case)

    assert torch.autograd.gradcheck(function, args)


@pytest.mark.parametrize("case", GRADIENT_CASES[:2])
def test_second_derivatives(case):
    args = [x.requires_grad_() for x in operands(4, 2, 1, batch=1, heads=1)]
    assert torch.autograd.gradgradcheck(functools.partial(polynomial_tensor_attention, degree=2, **case), args)


def test_gradients_of_several_blocks_are_those_of_exact_attention():
    case = {"is_causal": True, "window1": 40, "window2": (-1, -1)}
    args = [x.requires_grad_() for x in operands(300, 2, 2, batch=1, heads=1, bound=0.7)]
    out = polynomial_tensor_attention(*args, degree=12, scale=0.5, **case)
    reference = exact(args[0], args[1:3], args[3:], 0.5, visible(case, 300, 300, 300, (None, None)))
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), args)
    expected = torch.autograd.grad((reference * weight).sum(), args)
    for got, want in zip(found, expected, strict=True):
        assert_close_rel(got, want, rtol=1e-9)


def saved_bytes(n, case):
    """What the forward pass keeps for the backward pass, each storage once."""
    args = [x.requires_grad_() for x in operands(n, 4, 4, batch=1, heads=1, dtype=torch.float32)]
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = polynomial_tensor_attention(*args, degree=4, scale=0.25, **case)
    out.sum().backward()
    assert all(x.grad is not None for x in args)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("case", [{}, {"is_causal": True}, {"is_causal": True, "window1": 64, "window2": 16}])
def test_memory_for_the_backward_pass_is_linear(case):
    small, large = saved_bytes(1024, case), saved_bytes(2048, case)
    assert large <= 2.2 * small
    # Features alone would be 70 floats a token for each of query and keys, and moments 70 × 5 a token and set.
    assert large < 2048 * 4 * 200


# Decoding


@pytest.mark.parametrize("windows", [None, [5, None], [3, 40]])
def test_state_decodes_as_the_causal_batch(windows):
    query, k1, k2, v1, v2 = operands(60, 3, 4, heads=4, kv_heads=2)
    growth = torch.linspace(0.05, 1.5, 60, dtype=torch.float64)[:, None]
    k1 = k1 * growth  # keys outgrow the scale that the first ones set
    keep = torch.rand(2, 60) > 0.3
    spans = {} if windows is None else {"window1": windows[0], "window2": windows[1]}
    expected, bound = polynomial_tensor_attention(
        query, k1, k2, v1, v2, is_causal=True, enable_gqa=True, key_padding_mask2=keep, return_error_bound=True, **spans
    )
    state = PolynomialState(windows=windows)
    state.append(*(x[:, :, :20] for x in (k1, v1, k2, v2)), key_padding_masks=[None, keep[:, :20]])
    found, sizes = [], []
    for i in range(20, 60):
        step = slice(i, i + 1)
        state.append(*(x[:, :, step] for x in (k1, v1, k2, v2)), key_padding_masks=[None, keep[:, step]])
        found.append(state.attend(query[:, :, step]))
        sizes.append(state.elements)
    assert_close_rel(torch.cat(found, 2), expected[:, :, 20:], rtol=1e-11)
    assert sizes[20] == sizes[-1]
    last, last_bound = state.attend(query[:, :, -1:], return_error_bound=True)
    torch.testing.assert_close(last, expected[:, :, -1:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(last_bound, bound[:, :, -1:], rtol=1e-6, atol=1e-9)


def test_state_of_another_order_and_basis():
    query, key, _, value, _ = operands(12, 3, 4, batch=1)
    state = PolynomialState(degree=6, scale=0.5, basis="chebyshev").append(key, value)
    expected = polynomial_nth_order_attention(query, [key], [value], degree=6, scale=0.5, basis="chebyshev")
    assert_close_rel(state.attend(query), expected, rtol=1e-12)


def test_state_refuses_what_does_not_fit():
    query, k1, k2, v1, v2 = operands(5, 3, 4)
    with pytest.raises(RuntimeError, match="nothing was appended"):
        PolynomialState().attend(query)
    with pytest.raises(ValueError, match="a key and a value of each set"):
        PolynomialState().append(k1, v1, k2)
    state = PolynomialState().append(k1, v1, k2, v2)
    for wrong, error, message in (
        ((k1, v1), ValueError, "2 sets of keys as before, got 1"),
        ((k1[:1], v1[:1], k2[:1], v2[:1]), ValueError, "batch = 2"),
        ((k1, v1[..., :2], k2, v2[..., :2]), ValueError, "value dim = 4"),
        ((k1.float(), v1.float(), k2.float(), v2.float()), TypeError, "computed in torch.float64"),
    ):
        with pytest.raises(error, match=message):
            state.append(*wrong)
    with pytest.raises(ValueError, match="head_dim = 3"):
        state.attend(query[..., :2])
    with pytest.raises(ValueError, match=r"windows\[0\] must be at least 1"):
        PolynomialState(windows=[0, None])


# Use


@pytest.mark.parametrize("case", [{}, {"basis": "chebyshev", "is_causal": True, "window2": 9}])
def test_compiles_in_full(case):
    args = [x.requires_grad_() for x in operands(40, 2, 2, heads=2, kv_heads=1)]

    def function(*tensors):
        out, bound = polynomial_tensor_attention(
            *tensors, degree=2, scale=0.3, enable_gqa=True, return_error_bound=True, **case
        )
        return out, bound

    out, bound = torch.compile(function, backend="aot_eager", fullgraph=True)(*args)
    expected, expected_bound = function(*args)
    assert_close_rel(out, expected, rtol=1e-13)
    assert_close_rel(bound, expected_bound, rtol=1e-13)
    found = torch.autograd.grad(out.sin().sum(), args)
    for got, want in zip(found, torch.autograd.grad(expected.sin().sum(), args), strict=True):
        assert_close_rel(got, want, rtol=1e-12)


def test_empty_inputs():
    for n, n1, batch in ((0, 4, 2), (4, 0, 2), (4, 4, 0)):
        args = [x.requires_grad_() for x in operands(n, 3, 2, n1=n1, n2=4, batch=batch)]
        out, bound = polynomial_tensor_attention(*args, is_causal=True, return_error_bound=True)
        assert out.shape == (batch, 2, n, 2) and bound.shape == (batch, 2, n) and not out.any()
        out.sum().backward()
        assert args[0].grad is not None and not args[0].grad.any()


def test_autocast_computes_in_float32():
    args = operands(30, 3, 3, dtype=torch.float32)
    expected = polynomial_tensor_attention(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = polynomial_tensor_attention(*args)
        mixed = polynomial_tensor_attention(*args[:3], args[3].bfloat16(), args[4])
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert_close_rel(out, expected, dtype=torch.bfloat16)


def test_non_contiguous_inputs():
    args = operands(33, 3, 2)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args]
    assert not views[0].is_contiguous()
    out = polynomial_tensor_attention(*views, is_causal=True)
    assert_close_rel(out, polynomial_tensor_attention(*args, is_causal=True), rtol=1e-12)


GOOD = operands(6, 3, 2)


@pytest.mark.parametrize(
    "change, options, error, message",
    [
        ({}, {"degree": 3}, ValueError, "degree must be even, got 3"),
        ({}, {"degree": -2}, ValueError, "degree must be at least 0"),
        ({}, {"degree": 2.0}, TypeError, "degree must be an int"),
        ({}, {"degree": 200}, ValueError, "degree must give at most"),
        ({}, {"basis": "tailor"}, ValueError, "did you mean 'taylor'"),
        ({}, {"window1": 0}, ValueError, "window1 must be at least 1"),
        ({}, {"key_padding_mask1": torch.ones(2, 6)}, TypeError, "key_padding_mask1 must be bool"),
        ({}, {"key_padding_mask2": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "key_padding_mask2 must have keys"),
        ({0: GOOD[0][0]}, {}, ValueError, "query must have 4 dimensions"),
        ({0: GOOD[0].long()}, {}, TypeError, "query must have a real floating-point dtype"),
        ({1: GOOD[1].float()}, {}, TypeError, "key1 must have the dtype of query"),
        ({2: GOOD[2][..., :2]}, {}, ValueError, "key2 must have head_dim = 3"),
        ({2: GOOD[2][:1]}, {}, ValueError, "key2 must have batch = 2"),
        ({3: GOOD[3][:, :, :5]}, {}, ValueError, "value1 must have keys = 6"),
        ({4: GOOD[4][..., :1]}, {}, ValueError, "value2 must have value dim = 2"),
        ({0: GOOD[0].repeat(1, 2, 1, 1)}, {}, ValueError, "enable_gqa"),
        ({0: GOOD[0].repeat(1, 2, 1, 1)[:, :3]}, {"enable_gqa": True}, ValueError, "multiple of the keys' 2 heads"),
    ],
)
def test_bad_input(change, options, error, message):
    args = [change.get(i, x) for i, x in enumerate(GOOD)]
    with pytest.raises(error, match=message):
        polynomial_tensor_attention(*args, **options)


def test_bad_input_of_any_order():
    query, k1, k2, v1, v2 = GOOD
    with pytest.raises(ValueError, match="of the same number"):
        polynomial_nth_order_attention(query, [k1, k2], [v1])
    with pytest.raises(ValueError, match="windows must have 2 entries"):
        polynomial_nth_order_attention(query, [k1, k2], [v1, v2], windows=[3])
    with pytest.raises(ValueError, match="logit_bound must be at least 0"):
        tensor_attention_error_bound(-1.0, 4)
    with pytest.raises(ValueError, match="tolerance must be over 0"):
        tensor_attention_logit_limit(0.0, 4)
