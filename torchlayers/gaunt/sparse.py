"""One contraction for every equivariant product: Gaunt, bracket and Clebsch–Gordan are its tables.

    z[b,c,k] = Σ_p w[b,c,p] Σ_ij T_p[i,j,k] x[b,c,i] y[b,c,j]

Path p takes the block of degree l1 at ``offset1`` of x and that of degree l2 at ``offset2`` of y to the block of degree
l3 at ``offset3`` of z; T_p is a block of coefficients, nearly all zeros. Which paths there are is a
:class:`SparseSpec`, of constants only: its string names the tables wherever a tensor cannot travel (a registered
operation, an exported graph).

Plain torch turns the sum into matrix products, components first and rows last, so that every elementwise step runs
along contiguous memory. What is multiplied out depends on what repeats: weights common to all samples are folded into
the table, a y common to all channels (an edge's harmonics) is contracted with the table first. The kernel
(``torchlayers.kernels.sparse_product``) unrolls the non-zero terms instead.

Source: Luo et al., arXiv 2401.10216 (the Gaunt product); paths and weights as in ``e3nn.o3.TensorProduct``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._attention import no_autocast
from .._backend import import_kernels, use_triton
from .._checks import check_choice, check_dtype, check_int, check_ndim, check_same_device, check_size
from .._tables import as_bits, from_bits, register_table, table
from .coefficients import bracket_coefficients, clebsch_gordan, gaunt_coefficients, paths

__all__ = ["SparsePath", "SparseSpec", "gaunt_spec", "sparse_product"]

KINDS = {"gaunt": gaunt_coefficients, "bracket": bracket_coefficients, "cg": clebsch_gordan}
_NAMES = tuple(KINDS)
_FIELDS = 8  # of a path

# The most terms that are unrolled. All paths up to degree 4 are 4458, whose gradients take 20 s to compile.
_MOST_TERMS = 6000
# The largest table of weighted paths, in numbers, that is multiplied out densely.
_LARGEST_FOLD = 1 << 21
# How many numbers of an intermediate are formed at once: 1 MB in float32 was the fastest of 2^15 to 2^20 on an EPYC.
_CHUNK = 1 << 18


class SparsePath(NamedTuple):
    """One path of a :class:`SparseSpec`: where its blocks begin, their degrees, the kind of T and a factor.

    ``kind`` is ``"gaunt"`` (:func:`~torchlayers.gaunt.gaunt_coefficients`), ``"bracket"``
    (:func:`~torchlayers.gaunt.bracket_coefficients`) or ``"cg"`` (Frobenius norm 1, ``e3nn.o3.wigner_3j``).
    """

    offset1: int
    l1: int
    offset2: int
    l2: int
    offset3: int
    l3: int
    kind: str = "cg"
    scale: float = 1.0


class SparseSpec:
    """Sizes and paths of a sparse product; immutable, equal and hashed by its string.

    Args:
        n1, n2, n3: components of x, y and z.
        paths: a :class:`SparsePath` (or its fields) each; blocks may be used by any number of paths.

    Attributes:
        key: the specification as a string; ``SparseSpec.parse(key)`` gives it back, factors to the last bit.

    Raises:
        TypeError, ValueError: no int where one belongs, a block that does not fit, degrees that do not couple, an
            unknown kind, a factor that is not finite.
    """

    def __init__(self, n1: int, n2: int, n3: int, paths: Iterable[tuple]):
        sizes = tuple(check_int(name, n) for name, n in (("n1", n1), ("n2", n2), ("n3", n3)))
        self.n1, self.n2, self.n3 = sizes
        self.paths = tuple(SparsePath(*path) for path in paths)
        for index, path in enumerate(self.paths):
            _check_path(f"paths[{index}]", path, sizes)
        fields = (",".join(map(str, path[:-1])) + "," + float(path.scale).hex() for path in self.paths)
        self.key = ";".join([",".join(map(str, sizes)), *fields])
        self.code = sizes + tuple(n for path in self.paths for n in _encoded(path))
        # What shares a block of x: (offset1, its size, the paths), in the order of first use.
        blocks: dict[tuple[int, int], list[int]] = {}
        for index, path in enumerate(self.paths):
            blocks.setdefault((path.offset1, 2 * path.l1 + 1), []).append(index)
        self.blocks = tuple((offset, size, tuple(members)) for (offset, size), members in blocks.items())
        # The paths between the same blocks of x and y, and the number that T is where that is all it is.
        pairs: dict[tuple[int, ...], list[int]] = {}
        for index, path in enumerate(self.paths):
            pairs.setdefault(path[:4], []).append(index)
        self.pairs = tuple((blocks_of, tuple(members)) for blocks_of, members in pairs.items())
        simple = {p for members in pairs.values() if self._simple(members) for p in members}
        self.scalars = tuple(_scalar(path) if p in simple else None for p, path in enumerate(self.paths))
        order = [p for _, _, members in self.blocks for p in members]
        self.order = None if order == sorted(order) else tuple(order)

    def _simple(self, members: Sequence[int]) -> bool:
        """Whether T is a number times an identity for these paths between two blocks: a scalar is among the three."""
        return all(0 in (self.paths[p].l1, self.paths[p].l2) for p in members) or all(
            self.paths[p].l3 == 0 for p in members
        )

    @classmethod
    def parse(cls, key: str) -> SparseSpec:
        """The specification whose ``key`` this is."""
        head, *rest = key.split(";")
        n1, n2, n3 = map(int, head.split(","))
        split = [path.split(",") for path in rest]
        return cls(n1, n2, n3, [(*map(int, f[:6]), f[6], float.fromhex(f[7])) for f in split])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SparseSpec) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"SparseSpec({self.n1}, {self.n2}, {self.n3}, {len(self.paths)} paths)"


def _check_path(name: str, path: SparsePath, sizes: tuple[int, ...]) -> None:
    check_choice(f"{name}.kind", path.kind, KINDS)
    if not math.isfinite(path.scale):
        raise ValueError(f"{name}.scale must be finite, got {path.scale}")
    degrees = path.l1, path.l2, path.l3
    blocks = zip((path.offset1, path.offset2, path.offset3), degrees, sizes, strict=True)
    for side, (offset, degree, size) in enumerate(blocks, 1):
        check_int(f"{name}.l{side}", degree, minimum=0)
        check_int(f"{name}.offset{side}", offset, minimum=0)
        if offset + 2 * degree + 1 > size:
            raise ValueError(
                f"{name} must lie within n{side} = {size} components, "
                f"got degree {degree} ({2 * degree + 1} components) at {offset}"
            )
    if not abs(path.l1 - path.l2) <= path.l3 <= path.l1 + path.l2:
        raise ValueError(f"{name} must couple, |l1 - l2| <= l3 <= l1 + l2, got {degrees}")


def _scalar(path: SparsePath) -> float:
    """The number c with T = c · identity where a degree is 0."""
    return float(_coefficients(path)[0, 0, 0])


def _encoded(path: SparsePath) -> tuple[int, ...]:
    """The path as ints, which is what names a table: the factor by its bits."""
    return (*path[:6], _NAMES.index(path.kind), *as_bits([path.scale]))


def _decoded(code: tuple[int, ...]) -> list[SparsePath]:
    paths = []
    for start in range(3, len(code), _FIELDS):
        offset1, l1, offset2, l2, offset3, l3, kind, bits = code[start : start + _FIELDS]
        paths.append(SparsePath(offset1, l1, offset2, l2, offset3, l3, _NAMES[kind], *from_bits([bits])))
    return paths


def gaunt_spec(lmax1: int, lmax2: int, lmax3: int, *, antisymmetric: bool = False) -> SparseSpec:
    """All paths of the pointwise product, or of the bracket, of two signals of degrees up to ``lmax1``, ``lmax2``."""
    kind = "bracket" if antisymmetric else "gaunt"
    triples = paths(lmax1, lmax2, lmax3, antisymmetric=antisymmetric)
    blocks = [(l1 * l1, l1, l2 * l2, l2, l3 * l3, l3, kind) for l1, l2, l3 in triples]
    return SparseSpec((lmax1 + 1) ** 2, (lmax2 + 1) ** 2, (lmax3 + 1) ** 2, blocks)


# Tables, named by a specification's code


def _coefficients(path: SparsePath) -> Tensor:
    return path.scale * KINDS[path.kind](path.l1, path.l2, path.l3)


def _span(offset: int, degree: int) -> slice:
    return slice(offset, offset + 2 * degree + 1)


def _num_paths(code: tuple[int, ...]) -> int:
    return (len(code) - 3) // _FIELDS


def _first_rows(code: tuple[int, ...]) -> int:
    """Σ_p (2 l1 + 1)."""
    return sum(2 * path.l1 + 1 for path in _decoded(code))


@register_table("sparse_product_paths", shape=lambda *code: (_num_paths(code), code[2], code[0] * code[1]))
def _paths_table(*code: int) -> Tensor:
    """T[p, k, (i, j)]."""
    n1, n2, n3 = code[:3]
    dense = torch.zeros(_num_paths(code), n3, n1, n2, dtype=torch.float64)
    for p, path in enumerate(_decoded(code)):
        block = _coefficients(path).permute(2, 0, 1)
        dense[p, _span(path.offset3, path.l3), _span(path.offset1, path.l1), _span(path.offset2, path.l2)] = block
    return dense.flatten(2)


@register_table("sparse_product_sum", shape=lambda *code: (code[2], code[0] * code[1]))
def _sum_table(*code: int) -> Tensor:
    """Σ_p T[p, k, (i, j)]."""
    n1, n2, n3 = code[:3]
    dense = torch.zeros(n3, n1, n2, dtype=torch.float64)
    for path in _decoded(code):
        block = _coefficients(path).permute(2, 0, 1)
        dense[_span(path.offset3, path.l3), _span(path.offset1, path.l1), _span(path.offset2, path.l2)] += block
    return dense.flatten(1)


@register_table("sparse_product_second", shape=lambda *code: (code[1], code[0] * code[2]))
def _second_table(*code: int) -> Tensor:
    """Σ_p T[j, (i, k)]: what turns y into a matrix from x to z."""
    n1, n2, n3 = code[:3]
    return _sum_table(*code).view(n3, n1, n2).permute(2, 1, 0).reshape(n2, n1 * n3)


@register_table("sparse_product_second_paths", shape=lambda *code: (code[1], _first_rows(code) * code[2]))
def _second_paths_table(*code: int) -> Tensor:
    """T[j, ((p, i), k)], the paths that share a block of x as neighbours."""
    n1, n2, n3 = code[:3]
    known = _decoded(code)
    spec = SparseSpec(n1, n2, n3, known)
    rows = []
    for _, size, members in spec.blocks:
        for p in members:
            block = torch.zeros(n2, size, n3, dtype=torch.float64)
            part = _coefficients(known[p]).permute(1, 0, 2)
            block[_span(known[p].offset2, known[p].l2), :, _span(known[p].offset3, known[p].l3)] = part
            rows.append(block)
    return torch.cat(rows, 1).flatten(1)


@register_table("sparse_product_scalars", shape=lambda *code: (_num_paths(code),))
def _scalars_table(*code: int) -> Tensor:
    """The number that T[p] is, ones where it is more than that."""
    n1, n2, n3 = code[:3]
    spec = SparseSpec(n1, n2, n3, _decoded(code))
    return torch.tensor([1.0 if s is None else s for s in spec.scalars], dtype=torch.float64)


@register_table("sparse_product_block", shape=lambda l1, l2, *rest: (sum(2 * r + 1 for r in rest[::3]), _pair(l1, l2)))
def _block_table(l1: int, l2: int, *rest: int) -> Tensor:
    """T[(p, k), (i, j)] of the paths between two blocks: ``rest`` has degree, kind and factor of each."""
    rows = []
    for degree, kind, bits in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        (path,) = _decoded((0, 0, 0, 0, l1, 0, l2, 0, degree, kind, bits))
        rows.append(_coefficients(path).permute(2, 0, 1).flatten(1))
    return torch.cat(rows)


def _pair(l1: int, l2: int) -> int:
    return (2 * l1 + 1) * (2 * l2 + 1)


# Plain torch


def _table(x: Tensor, name: str, code: tuple[int, ...]) -> Tensor:
    return table(name, *code, dtype=x.dtype, device=x.device)


class _Form:
    """A product linear in each of three tensors, by what autograd needs to go as far as it likes.

    ``whole(a, b, c)`` is the product in operations that autograd knows. ``product(a, b, c)`` is the same piece by
    piece, so that what is larger than the arguments is never there as a whole, and so are ``gradients(g, a, b, c,
    wants)``, those by a, b and c, and ``second(g, a, b, c, ha, hb, hc, wants)``, the derivatives by g, a, b and c of
    ⟨h, gradients⟩, where a missing h counts as zero; both give None for what is not wanted.
    """

    whole: Callable[..., Tensor]
    product: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor | None, ...]]
    second: Callable[..., tuple[Tensor | None, ...]]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(form: _Form, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return form.product(a, b, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.form = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        wants = tuple(ctx.needs_input_grad[1:])
        return None, *_Gradients.apply(ctx.form, wants, g, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, form: _Form, *tensors: Tensor) -> tuple[Tensor, int]:
        return torch.vmap(form.whole, in_dims[1:])(*tensors), 0


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(form: _Form, wants: tuple[bool, ...], g: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple:
        return form.gradients(g, a, b, c, wants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.form, ctx.wants = inputs[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple:
        """Without a graph of its own, in one pass; else the product rule, in functions that have derivatives again."""
        g, *arguments = ctx.saved_tensors
        wants = tuple(ctx.needs_input_grad[2:])
        if not torch.is_grad_enabled():
            return None, None, *ctx.form.second(g, *arguments, *directions, wants)
        sums: list[Tensor | None] = [None] * 4
        for slot, direction in enumerate(directions):
            if direction is None:
                continue
            moved = [direction if n == slot else tensor for n, tensor in enumerate(arguments)]
            others = tuple(want and n != slot for n, want in enumerate(wants[1:]))
            first = _Product.apply(ctx.form, *moved) if wants[0] else None
            rest = _Gradients.apply(ctx.form, others, g, *moved) if any(others) else (None,) * 3
            for n, part in enumerate((first, *rest)):
                sums[n] = _plus(sums[n], part)
        return None, None, *sums

    @staticmethod
    def vmap(info: Any, in_dims: tuple, form: _Form, wants: tuple[bool, ...], *tensors: Tensor) -> tuple:
        def gradients(g: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(form.whole, *arguments)[1](g)

        found = torch.vmap(gradients, in_dims[2:])(*tensors)
        kept = tuple(part if want else None for part, want in zip(found, wants, strict=True))
        return kept, tuple(0 if want else None for want in wants)


class _Contiguous(torch.autograd.Function):
    """``x.contiguous()`` with contiguous derivatives of every order: strided ones cost several times as much."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _Contiguous.apply(g)


def _plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total + part


class _Outer(_Form):
    """z[r] = M vec(x[r] ⊗ y[r]) for x (G, n1, R), y (G, n2, R) and M (G, n3, n1 n2), by pieces that stay in a cache."""

    @staticmethod
    def _pieces(x: Tensor, y: Tensor) -> list[tuple[slice, slice]]:
        groups, n1, rows = x.shape
        step = max(1, min(rows, _CHUNK // (n1 * y.shape[1])))
        size = max(1, _CHUNK // (n1 * y.shape[1] * step))
        return [
            (slice(group, group + size), slice(row, row + step))
            for group in range(0, groups, size)
            for row in range(0, rows, step)
        ]

    @staticmethod
    def _outer(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, :, None] * y[:, None]).flatten(1, 2)

    def whole(self, x: Tensor, y: Tensor, matrix: Tensor) -> Tensor:
        return torch.bmm(matrix, self._outer(x, y))

    def product(self, x: Tensor, y: Tensor, matrix: Tensor) -> Tensor:
        z = x.new_empty(x.shape[0], matrix.shape[1], x.shape[2])
        for group, row in self._pieces(x, y):
            z[group, :, row] = matrix[group] @ self._outer(x[group, :, row], y[group, :, row])
        return z

    def gradients(self, g: Tensor, x: Tensor, y: Tensor, matrix: Tensor, wants: Sequence[bool]):
        gx, gy, gm = (torch.zeros_like(t) if want else None for t, want in zip((x, y, matrix), wants, strict=True))
        for group, row in self._pieces(x, y):
            xp, yp, gp = x[group, :, row], y[group, :, row], g[group, :, row]
            if gx is not None or gy is not None:
                spread = (matrix[group].mT @ gp).view(-1, x.shape[1], y.shape[1], gp.shape[2])
                if gx is not None:
                    gx[group, :, row] = (spread * yp[:, None]).sum(2)
                if gy is not None:
                    gy[group, :, row] = spread.mul_(xp[:, :, None]).sum(1)
            if gm is not None:
                gm[group] += gp @ self._outer(xp, yp).mT
        return gx, gy, gm

    def second(self, g, x, y, matrix, hx, hy, hm, wants: Sequence[bool]):
        sums = [torch.zeros_like(t) if want else None for t, want in zip((g, x, y, matrix), wants, strict=True)]
        dg, dx, dy, dm = sums
        for group, row in self._pieces(x, y):
            xp, yp, gp = x[group, :, row], y[group, :, row], g[group, :, row]
            hxp, hyp = (None if h is None else h[group, :, row] for h in (hx, hy))
            moved = None if hxp is None else self._outer(hxp, yp)
            if hyp is not None:
                other = self._outer(xp, hyp)
                moved = other if moved is None else moved.add_(other)
            if moved is not None:
                if dg is not None:
                    dg[group, :, row] += matrix[group] @ moved
                if dm is not None:
                    dm[group] += gp @ moved.mT
            if hm is not None and dg is not None:
                dg[group, :, row] += hm[group] @ self._outer(xp, yp)
            if dx is None and dy is None:
                continue
            pairs = [(matrix, hxp, hyp), (hm, xp, yp)]
            for factor, left, right in pairs:
                if factor is None or (left is None and right is None):
                    continue
                spread = (factor[group].mT @ gp).view(-1, x.shape[1], y.shape[1], gp.shape[2])
                if dx is not None and right is not None:
                    dx[group, :, row] += (spread * right[:, None]).sum(2)
                if dy is not None and left is not None:
                    dy[group, :, row] += spread.mul_(left[:, :, None]).sum(1)
        return tuple(sums)


class _Edges(_Form):
    """x (B, n1, C), y (B, n2), w (B, P, C) or (P, C), paths in the order of ``spec.blocks`` -> z (B, n3, C).

    With the table, y is a matrix ((p, i), k) for each sample, from w x to z.
    """

    def __init__(self, spec: SparseSpec):
        self.n3, self.code = spec.n3, spec.code
        self.blocks = []  # of x: its components, its paths, their rows (p, i) of the matrix, how many paths
        row = path = 0
        for offset, size, members in spec.blocks:
            rows, count = size * len(members), len(members)
            self.blocks.append((slice(offset, offset + size), slice(path, path + count), slice(row, row + rows), count))
            row, path = row + rows, path + count
        self.rows = row

    def _pieces(self, x: Tensor) -> list[slice]:
        step = max(1, _CHUNK // max(1, self.rows * max(x.shape[2], self.n3)))
        return [slice(start, start + step) for start in range(0, max(1, x.shape[0]), step)]

    def _matrix(self, y: Tensor) -> Tensor:
        table = _table(y, "sparse_product_second_paths", self.code)
        return (y @ table).unflatten(1, (self.rows, self.n3))

    @staticmethod
    def _weighted(x: Tensor, w: Tensor) -> Tensor:
        """((p, i), C) of one block."""
        return (w[..., None, :] * x[:, None]).flatten(1, 2)

    @staticmethod
    def _at(w: Tensor, piece: slice) -> Tensor:
        return w if w.ndim == 2 else w[piece]

    def whole(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        matrix, z = self._matrix(y), None
        for block, own, rows, _ in self.blocks:
            weighted = self._weighted(x[:, block], w[..., own, :])
            left = matrix[:, rows].mT
            z = torch.bmm(left, weighted) if z is None else torch.baddbmm(z, left, weighted)
        return z  # type: ignore[return-value]

    def product(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        pieces = [self.whole(x[piece], y[piece], self._at(w, piece)) for piece in self._pieces(x)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def gradients(self, g: Tensor, x: Tensor, y: Tensor, w: Tensor, wants: Sequence[bool]):
        gx, gy, gw = (torch.zeros_like(t) if want else None for t, want in zip((x, y, w), wants, strict=True))
        for piece in self._pieces(x):
            xp, wp, gp, turned = x[piece], self._at(w, piece), g[piece], []
            matrix = None if gx is None and gw is None else self._matrix(y[piece])
            for block, own, rows, count in self.blocks:
                if gy is not None:
                    turned.append(torch.bmm(self._weighted(xp[:, block], wp[..., own, :]), gp.mT))
                if matrix is None:
                    continue
                spread = torch.bmm(matrix[:, rows], gp).unflatten(1, (count, -1))
                self._add(gw, piece, own, spread, xp[:, None, block])
                if gx is not None:
                    gx[piece, block] += spread.mul_(wp[..., own, None, :]).sum(1)
            self._add_second(gy, piece, turned)
        return gx, gy, gw

    def second(self, g, x, y, w, hx, hy, hw, wants: Sequence[bool]):
        sums = [torch.zeros_like(t) if want else None for t, want in zip((g, x, y, w), wants, strict=True)]
        dg, dx, dy, dw = sums
        for piece in self._pieces(x):
            xp, wp, gp, turned = x[piece], self._at(w, piece), g[piece], []
            hxp, hwp = None if hx is None else hx[piece], None if hw is None else self._at(hw, piece)
            matrix, bent = self._matrix(y[piece]), None if hy is None else self._matrix(hy[piece])
            for block, own, rows, count in self.blocks:
                moved = None if hxp is None else self._weighted(hxp[:, block], wp[..., own, :])
                if hwp is not None:
                    moved = _plus(moved, self._weighted(xp[:, block], hwp[..., own, :]))
                if moved is not None and dg is not None:
                    dg[piece] += torch.bmm(matrix[:, rows].mT, moved)
                if moved is not None and dy is not None:
                    turned.append(torch.bmm(moved, gp.mT))
                if bent is not None and dg is not None:
                    dg[piece] += torch.bmm(bent[:, rows].mT, self._weighted(xp[:, block], wp[..., own, :]))
                for source, left, right in ((bent, xp, wp), (matrix, hxp, hwp)):
                    if source is None or (dx is None and dw is None) or (left is None and right is None):
                        continue
                    spread = torch.bmm(source[:, rows], gp).unflatten(1, (count, -1))
                    if left is not None:
                        self._add(dw, piece, own, spread, left[:, None, block])
                    if dx is not None and right is not None:
                        dx[piece, block] += spread.mul_(right[..., own, None, :]).sum(1)
            self._add_second(dy, piece, turned)
        return tuple(sums)

    @staticmethod
    def _add(gw: Tensor | None, piece: slice, paths: slice, spread: Tensor, first: Tensor) -> None:
        if gw is None:
            return
        part = (spread * first).sum(2)
        if gw.ndim == 2:
            gw[paths] += part.sum(0)
        else:
            gw[piece, paths] += part

    def _add_second(self, gy: Tensor | None, piece: slice, turned: list[Tensor]) -> None:
        if gy is not None and turned:
            gy[piece] += torch.cat(turned, 1).flatten(1) @ _table(gy, "sparse_product_second_paths", self.code).mT


def _common_second(x: Tensor, y: Tensor, weight: Tensor | None, spec: SparseSpec) -> Tensor:
    """One y (B, 1, n2) for all channels."""
    first, second = x.transpose(1, 2), y[:, 0]  # (B, n1, C), (B, n2)
    if weight is None:
        matrix = (second @ _table(x, "sparse_product_second", spec.code)).unflatten(1, (spec.n1, spec.n3))
        return torch.bmm(matrix.mT, first).transpose(1, 2)
    weight = weight.transpose(-1, -2).contiguous()  # (B, P, C) or (P, C)
    if spec.order is not None:
        weight = weight[..., list(spec.order), :]
    form = _Edges(spec)
    return _apply(form, first, second, weight, form.rows / (spec.n1 + spec.n3 + len(spec.paths))).transpose(1, 2)


def _folded(x: Tensor, y: Tensor, weight: Tensor | None, spec: SparseSpec) -> Tensor:
    """Weights common to all samples: one matrix, or one a channel, from the products x_i y_j to z."""
    batch, channels = x.shape[:2]
    if weight is None:
        x, y = x.reshape(1, batch * channels, spec.n1), y.reshape(1, batch * channels, spec.n2)
        matrix = _table(x, "sparse_product_sum", spec.code)[None]
    else:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        dense = _table(x, "sparse_product_paths", spec.code)
        matrix = (weight @ dense.flatten(1)).unflatten(1, dense.shape[1:])
    first, second = x.transpose(1, 2), y.transpose(1, 2)  # (1 or C, n, rows)
    z = _apply(_Outer(), first, second, matrix, spec.n1 * spec.n2 / (spec.n1 + spec.n2 + spec.n3))
    return z[0].T.view(batch, channels, spec.n3) if weight is None else z.permute(2, 0, 1)


def _apply(form: _Form, a: Tensor, b: Tensor, c: Tensor, growth: float) -> Tensor:
    """The product, in pieces where its intermediates are ``growth`` > 1.1 times as large as its arguments.

    A graph that is traced must not depend on how many pieces there are.
    """
    if torch.compiler.is_compiling():
        return form.whole(a.contiguous(), b.contiguous(), c)
    a, b = _Contiguous.apply(a), _Contiguous.apply(b)
    return _Contiguous.apply(form.whole(a, b, c) if growth <= 1.1 else _Product.apply(form, a, b, c))


def _by_pairs(x: Tensor, y: Tensor, weight: Tensor | None, spec: SparseSpec) -> Tensor:
    """Block by block: the outer product of two blocks, all paths between them by one matrix product, weights."""
    first = _cut(x.transpose(1, 2).contiguous(), [path[0:2] for path in spec.paths])
    second = _cut(y.transpose(1, 2).contiguous(), [path[2:4] for path in spec.paths])
    weights = None
    if weight is not None:
        scaled = weight * _table(x, "sparse_product_scalars", spec.code)
        weights = scaled.transpose(-1, -2).contiguous().unsqueeze(-2).unbind(-3)  # (B, 1, C) or (1, C)
    sums: dict[tuple[int, int], Tensor] = {}  # (offset3, size) -> (B, size, C)
    for (offset1, l1, offset2, l2), members in spec.pairs:
        left, right = first[offset1, l1], second[offset2, l2]
        simple = spec.scalars[members[0]] is not None
        if simple:
            results = left * right
            if l1 == l2 and l1 > 0:
                results = results.sum(1, keepdim=True)
        else:
            outer = (left[:, :, None] * right[:, None]).flatten(1, 2)
            code = [n for p in members for n in spec.code[3 + _FIELDS * p : 3 + _FIELDS * (p + 1)][5:]]
            results = _table(x, "sparse_product_block", (l1, l2, *code)) @ outer
        row = 0
        for p in members:
            path = spec.paths[p]
            part = results if simple else results[:, _span(row, path.l3)]
            row += 2 * path.l3 + 1
            if weights is not None:
                part = part * weights[p]
            elif (scalar := spec.scalars[p]) is not None:
                part = part * scalar
            block = (path.offset3, 2 * path.l3 + 1)
            sums[block] = _plus(sums.get(block), part)  # type: ignore[assignment]
    return _assembled(sums, spec.n3).transpose(1, 2)


def _cut(x: Tensor, blocks: list[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
    """(offset, degree) -> that block (B, 2 degree + 1, C) of x (B, n, C)."""
    sizes: list[int] = []
    names: list[tuple[int, ...] | None] = []
    end = 0
    for offset, degree in sorted(set(blocks)):
        if offset < end:  # blocks that overlap
            return {block: x[:, _span(*block)] for block in blocks}
        if offset > end:
            sizes.append(offset - end)
            names.append(None)
        sizes.append(2 * degree + 1)
        names.append((offset, degree))
        end = offset + sizes[-1]
    if end < x.shape[1]:
        sizes.append(x.shape[1] - end)
        names.append(None)
    # One split rather than many slices: its gradient is one concatenation.
    return {name: part for name, part in zip(names, x.split(sizes, 1), strict=True) if name is not None}


def _assembled(sums: dict[tuple[int, int], Tensor], n3: int) -> Tensor:
    """(B, n3, C) of blocks at their places, zeros elsewhere."""
    pieces, end = [], 0
    for (offset, size), block in sorted(sums.items(), key=lambda item: item[0]):
        if offset < end:  # blocks that overlap in part
            return sum(F.pad(t, (0, 0, at, n3 - at - t.shape[1])) for (at, _), t in sums.items())  # type: ignore
        if offset > end:
            pieces.append(block.new_zeros(block.shape[0], offset - end, block.shape[2]))
        pieces.append(block)
        end = offset + size
    if end < n3:
        pieces.append(block.new_zeros(block.shape[0], n3 - end, block.shape[2]))
    return torch.cat(pieces, 1)


def _plain(x: Tensor, y: Tensor, weight: Tensor | None, spec: SparseSpec) -> Tensor:
    if not spec.paths:
        return (x.sum(-1, keepdim=True) * y.sum(-1, keepdim=True) * 0).expand(*x.shape[:2], spec.n3)
    if max(max(path.l1, path.l2) for path in spec.paths) <= 1:
        return _by_pairs(x, y, weight, spec)
    if y.shape[1] == 1 != x.shape[1]:
        return _common_second(x, y, weight, spec)
    size = spec.n1 * spec.n2 * spec.n3 * len(spec.paths)
    if weight is None or (weight.ndim == 2 and size <= _LARGEST_FOLD):
        return _folded(x, y, weight, spec)
    return _by_pairs(x, y, weight, spec)


def sparse_product(
    x: Tensor, y: Tensor, weight: Tensor | None, spec: SparseSpec, *, backend: str | None = None
) -> Tensor:
    """z[b,c,k] = Σ_p w[b,c,p] Σ_ij T_p[i,j,k] x[b,c,i] y[b,c,j], with the paths p of ``spec``.

    Differentiable to any order. Half-precision tensors are multiplied and summed in float32; under autocast the
    product keeps to its arguments' dtypes, the widest of them where they differ.

    Args:
        x: (B, C, n1), real, any strides.
        y: (B, C, n2), one for each channel (e3nn's ``uuu``), or (B, 1, n2), one for all (``uvu``).
        weight: (C, P), one for each path, common to all samples; (B, C, P), of each sample; or None for ones.
        spec: the paths.
        backend: see :func:`torchlayers.backend`.

    Returns:
        (B, C, n3) in the dtype of the arguments.

    Raises:
        TypeError: complex or integer tensors, or dtypes that differ outside autocast.
        ValueError: shapes or devices that do not fit.
        BackendError: ``backend="triton"`` with what the kernel does not support.

    Example:

        >>> import torch
        >>> from torchlayers.gaunt.sparse import gaunt_spec, sparse_product
        >>> spec = gaunt_spec(2, 2, 2)
        >>> sparse_product(torch.randn(5, 8, 9), torch.randn(5, 1, 9), None, spec).shape
        torch.Size([5, 8, 9])
    """
    named = {"x": x, "y": y} | ({} if weight is None else {"weight": weight})
    for name, tensor in named.items():
        check_ndim(name, tensor, (2, 3) if name == "weight" else 3, _LAYOUTS[name])
        check_dtype(name, tensor, kind="real")
        check_same_device(name, tensor, "x", x)
    batch, channels = x.shape[:2]
    check_size("x", x, 2, spec.n1, "n1")
    check_size("y", y, 0, batch, "B")
    check_size("y", y, 2, spec.n2, "n2")
    if y.shape[1] != 1:
        check_size("y", y, 1, channels, "C (or 1)")
    if weight is not None:
        check_size("weight", weight, -1, len(spec.paths), "P")
        check_size("weight", weight, -2, channels, "C")
        if weight.ndim == 3:
            check_size("weight", weight, 0, batch, "B")
    tensors = _one_dtype(named)
    x, y, weight = tensors["x"], tensors["y"], tensors.get("weight")
    with no_autocast(x):
        if use_triton("sparse_product", x, backend, _unsupported(spec)):
            _teach_kernels()
            kernels = import_kernels("sparse_product")
            return kernels.sparse_product(x, y, weight, spec.key)  # type: ignore[union-attr]
        if x.dtype in (torch.float16, torch.bfloat16):
            wide = None if weight is None else weight.float()
            return _plain(x.float(), y.float(), wide, spec).to(x.dtype)
        return _plain(x, y, weight, spec)


@torch.compiler.assume_constant_result
def _teach_kernels() -> bool:
    """Give the kernels the coefficients: at once also where a graph is being traced, which runs later."""
    kernels = import_kernels("sparse_product")
    for kind, coefficients in KINDS.items():
        kernels.register_coefficients(kind, coefficients)  # type: ignore[union-attr]
    return True


_LAYOUTS = {"x": "(B, C, n1)", "y": "(B, C or 1, n2)", "weight": "(C, P) or (B, C, P)"}


def _one_dtype(named: dict[str, Tensor]) -> dict[str, Tensor]:
    x = named["x"]
    dtypes = {t.dtype for t in named.values()}
    if len(dtypes) == 1:
        return named
    if not (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)):
        for name, tensor in named.items():
            if tensor.dtype != x.dtype:
                raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    widest = x.dtype
    for tensor in named.values():
        widest = torch.promote_types(widest, tensor.dtype)
    return {name: tensor.to(widest) for name, tensor in named.items()}


def _unsupported(spec: SparseSpec) -> str | None:
    """What of this product the kernel does not take, in words: its code has a line for each term."""
    # Real harmonics couple m1 and m2 to at most two m3.
    terms = sum(2 * _pair(path.l1, path.l2) for path in spec.paths)
    return f"{terms} terms, {_MOST_TERMS} at most" if terms > _MOST_TERMS else None
