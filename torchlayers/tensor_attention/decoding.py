"""Polynomial attention in a state of constant size: what a KV cache is to decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._attention import no_autocast
from .._checks import check_dtype, check_int, check_ndim, check_same_device, check_size
from .bounds import Peaks, check_polynomial, logit_bounds, rounding_drift, row_error_bound
from .moments import key_moments, read_moments
from .monomials import monomials_of, product_of
from .operands import (
    check_features,
    check_keys,
    feature_weights,
    head_groups,
    masked,
    output_dtype,
    with_count,
    working_dtype,
)


class PolynomialState:
    """The keys and values of polynomial attention so far, in constant size: what a KV cache is to decoding.

    For each set of keys it holds the (dv + 1) × C(d + degree, degree) sums that the formula needs, in float64, however
    many keys were appended; a set with a window also its last keys and values, which leave again::

        state = PolynomialState(degree=4, scale=1 / 8)
        for token in tokens:
            q, k1, k2, v1, v2 = project(token)                        # (B, H, 1, d)
            out = state.append(k1, v1, k2, v2).attend(q)              # = the causal output's last row

    Args:
        degree, scale, basis: as for :func:`polynomial_tensor_attention`.
        windows: for each set the number of its last keys that are seen (the query's own included), or None for all.

    Keys' channels are divided by a power of 2 of the size of the largest so far; when a larger comes, the sums are
    multiplied by the monomials of the two powers' ratio, which is exact.
    """

    def __init__(
        self,
        *,
        degree: int = 4,
        scale: float | None = None,
        windows: Sequence[int | None] | None = None,
        basis: str = "taylor",
    ):
        check_polynomial(degree, basis)
        for t, window in enumerate(windows or ()):
            if window is not None:
                check_int(f"windows[{t}]", window)
        self.degree, self.scale, self.basis = degree, scale, basis
        self.windows = None if windows is None else list(windows)
        self._sums: list[Tensor] = []
        self._peaks: list[Peaks] = []
        self._recent: list[tuple[Tensor, Tensor]] = []  # of windowed sets: (B, Hk, n, d) and (B, Hk, n, dv + 1)
        self._appended: list[int] = []  # keys of each set
        self._dtype: torch.dtype | None = None

    @property
    def elements(self) -> int:
        """How many numbers the state holds."""
        tensors = [*self._sums, *(x for pair in self._recent for x in pair)]
        return sum(x.numel() for x in tensors)

    def append(self, *keys_and_values: Tensor, key_padding_masks: Sequence[Tensor | None] | None = None):
        """Add keys and values: ``append(key1, value1, key2, value2)``, and so on for a higher order.

        Args:
            keys_and_values: key (B, Hk, n_t, d) and value (B, Hk, n_t, dv) of each set in turn; n_t may differ.
            key_padding_masks: (B, n_t) bool each, True = keep, or None.

        Returns:
            This state, changed.

        Raises:
            ValueError, TypeError: as :func:`polynomial_tensor_attention`, and where shapes, the dtype or the number of
                sets differ from what was appended before.
        """
        if len(keys_and_values) % 2 or not keys_and_values:
            raise ValueError(f"append must get a key and a value of each set, got {len(keys_and_values)} tensors")
        keys, values = keys_and_values[::2], keys_and_values[1::2]
        masks = [None] * len(keys) if key_padding_masks is None else list(key_padding_masks)
        check_keys(None, keys, values, masks, ("key{}", "value{}", "key_padding_masks[{}]"))
        if self.windows is not None and len(self.windows) != len(keys):
            raise ValueError(f"append must get {len(self.windows)} sets, one a window, got {len(keys)}")
        check_features(keys[0].shape[-1], self.degree)
        dtype = working_dtype(keys[0])
        if self._sums:
            if len(keys) != len(self._sums):
                raise ValueError(f"append must get {len(self._sums)} sets of keys as before, got {len(keys)}")
            if dtype != self._dtype:
                raise TypeError(f"key1 must be computed in {self._dtype} as before, got {keys[0].dtype}")
            columns, heads = self._peaks[0].columns, self._sums[0].shape[:2]
            for t, (key, value) in enumerate(zip(keys, values, strict=True), 1):
                check_size(f"key{t}", key, 0, heads[0], "batch")
                check_size(f"key{t}", key, 1, heads[1], "kv heads")
                check_size(f"key{t}", key, 3, columns.shape[-1], "head_dim")
                check_size(f"value{t}", value, 3, self._peaks[0].values.shape[-1], "value dim")
                check_same_device(f"key{t}", key, "the state", columns)
        else:
            self._start(keys, values, dtype)
        with no_autocast(keys[0]):
            for t, (key, value, mask) in enumerate(zip(keys, values, masks, strict=True)):
                if key.shape[2]:
                    self._append(t, masked(key, mask, dtype), masked(value, mask, dtype), mask)
        return self

    def _start(self, keys: Sequence[Tensor], values: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._dtype = dtype
        batch, heads, _, d = keys[0].shape
        dv = values[0].shape[-1]
        for key in keys:
            nothing = key.new_zeros(batch, heads, 1, 1, dtype=dtype)
            features = math.comb(d + self.degree, self.degree)
            self._appended.append(0)
            self._sums.append(key.new_zeros(batch, heads, dv + 1, features, dtype=torch.float64))
            self._peaks.append(Peaks(nothing.expand(-1, -1, 1, d), nothing, nothing.expand(-1, -1, 1, dv)))
            self._recent.append((nothing.new_empty(batch, heads, 0, d), nothing.new_empty(batch, heads, 0, dv + 1)))

    def _append(self, t: int, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        peaks = self._peaks[t].joined(Peaks.of(key, value))
        before = self._peaks[t]
        # Where a channel was 0 so far, the sums of its monomials are 0, and 1 does as well as any ratio.
        ratio = torch.where(before.columns > 0, before.scales / peaks.scales, 1.0).mT.double()
        sums = self._sums[t] * monomials_of(ratio, self.degree).mT
        columns = with_count(value, mask)
        sums = sums + self._moments(key, columns, peaks)
        self._appended[t] += key.shape[2]
        window = None if self.windows is None else self.windows[t]
        if window is not None:
            recent = [torch.cat(pair, 2) for pair in zip(self._recent[t], (key, columns.mT), strict=True)]
            leaving = max(0, recent[0].shape[2] - window)
            if leaving:
                sums = sums - self._moments(recent[0][:, :, :leaving], recent[1][:, :, :leaving].mT, peaks)
            # A copy: a view would keep what left.
            self._recent[t] = (recent[0][:, :, leaving:].clone(), recent[1][:, :, leaving:].clone())
        self._sums[t], self._peaks[t] = sums, peaks

    def _moments(self, key: Tensor, columns: Tensor, peaks: Peaks) -> Tensor:
        return key_moments((key / peaks.scales).mT, columns, self.degree, wide=True)

    def attend(self, query: Tensor, *, return_error_bound: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of ``query`` (B, Hq, n, d), Hq a multiple of Hk, to all that was appended (its windows' last).

        Returns:
            (B, Hq, n, dv) in the query's dtype, zeros where nothing is there to see; with ``return_error_bound`` also
            the bound of :func:`polynomial_tensor_attention`, (B, Hq, n).

        Raises:
            RuntimeError: nothing was appended yet.
            ValueError, TypeError: a query that does not fit what was appended.
        """
        if not self._sums:
            raise RuntimeError("attend needs keys: nothing was appended to this state yet")
        check_ndim("query", query, 4, "(batch, heads, n, head_dim)")
        check_dtype("query", query, kind="real")
        batch, kv_heads, dv = *self._sums[0].shape[:2], self._sums[0].shape[2] - 1
        check_size("query", query, 0, batch, "batch")
        check_size("query", query, 3, self._peaks[0].columns.shape[-1], "head_dim")
        check_same_device("query", query, "the state", self._sums[0])
        if working_dtype(query) != self._dtype:
            raise TypeError(f"query must be computed in {self._dtype} as the keys are, got {query.dtype}")
        groups = head_groups(query, kv_heads, True)
        _, heads, n, d = query.shape
        scale = d**-0.5 if self.scale is None else self.scale
        with no_autocast(query):
            q = query.to(self._dtype).reshape(batch, kv_heads, groups * n, d)
            with torch.no_grad():
                bound = logit_bounds(q, self._peaks, scale)[0] if self.basis == "chebyshev" else None
            scaled = q * (scale * product_of([p.scales for p in self._peaks]))
            scaled, weights = feature_weights(scaled, self.degree, self.basis, bound)
            sums = [x.to(q.dtype) for x in self._sums]
            out = read_moments(scaled.mT, weights, product_of(sums), self.degree)
            out = out.mT.reshape(batch, heads, n, dv).to(output_dtype(query))
            if not return_error_bound:
                return out
            windows = self.windows or [None] * len(sums)
            drift = sum(map(rounding_drift, self._appended, windows))
            with torch.no_grad():
                error = row_error_bound(q, self._peaks, scale, self.degree, self.basis, drift)
        return out, error.reshape(batch, heads, n)
