"""An interatomic potential of Gaunt blocks: energies and forces of molecules and crystals.

The architecture is MACE's (Batatia et al., arXiv 2206.07697) at a small size: messages from neighbours within a
cutoff, their powers as many-body features, an energy for each atom. ``product="oracle"`` builds the same architecture
of e3nn's Clebsch–Gordan products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._attention import no_autocast
from .._checks import check_choice, check_int, check_ndim, check_same_device, check_size
from .arguments import Device
from .convolution import EdgeOrder, edge_order
from .irreps import FlatIrreps, Part
from .modules import GauntConv, GauntSymmetricContraction
from .neighbors import AtomicGraph, neighbor_list
from .oracle import OracleContraction, OracleConv
from .radial import ChannelMix, RadialNetwork, bessel_basis, polynomial_cutoff

__all__ = [
    "AtomicGraph",
    "ChannelMix",
    "GauntPotential",
    "RadialNetwork",
    "bessel_basis",
    "neighbor_list",
    "polynomial_cutoff",
    "reference_energies",
]


class _Layer(nn.Module):
    """Messages, their powers, and what an atom keeps of its own features.

    Features are lists of parts (N, C, 2l + 1), in the order of irreps.
    """

    def __init__(
        self,
        irreps_in: FlatIrreps,
        irreps_message: FlatIrreps,
        irreps_out: FlatIrreps,
        radial: RadialNetwork,
        conv: nn.Module,
        contraction: nn.Module,
        *,
        residual: bool,
        num_elements: int,
        device: Device,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._in, self._message, self._out = irreps_in, irreps_message, irreps_out
        channels = irreps_in.channels()
        self.mix_in = ChannelMix(len(irreps_in.muls), channels, **factory)
        self.radial, self.conv = radial, conv
        self.mix_message = ChannelMix(len(irreps_message.muls), channels, **factory)
        self.contraction = contraction
        self.mix_out = ChannelMix(len(irreps_out.muls), channels, **factory)
        self._kept = [part for part in irreps_out.muls if part in irreps_in.muls] if residual else []
        if self._kept:
            self.mix_kept = ChannelMix(len(self._kept), channels, **factory)
            self.kept = nn.Parameter(torch.empty(num_elements, len(self._kept), channels, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters that are this module's own."""
        if self._kept:
            self.kept.normal_()

    def forward(
        self, features: list[Tensor], element: Tensor, edge_vec: Tensor, r: Tensor, edges: EdgeOrder, scale: Tensor
    ) -> list[Tensor]:
        sent = self._in.join(dict(zip(self._in.muls, self.mix_in(features), strict=True)))
        message = self._message.split(self.conv(sent, edge_vec, edges, self.radial(r)) * scale)
        mixed = self.mix_message([message[part] for part in self._message.muls])
        power = self._out.split(self.contraction(torch.cat(mixed, dim=-1), element))
        out = dict(zip(self._out.muls, self.mix_out([power[part] for part in self._out.muls]), strict=True))
        if self._kept:
            own = dict(zip(self._in.muls, features, strict=True))
            factor = self.kept[element].unbind(1)
            for part, value, f in zip(self._kept, self.mix_kept([own[p] for p in self._kept]), factor, strict=True):
                out[part] = out[part] + value * f[..., None]
        return list(out.values())


class _Readout(nn.Module):
    """An atom's energy from its C scalars: linear, or a perceptron with one hidden layer; without biases."""

    def __init__(self, channels: int, hidden: int | None, *, device: Device, dtype: torch.dtype | None):
        super().__init__()
        sizes = [channels, 1] if hidden is None else [channels, hidden, 1]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=False, device=device, dtype=dtype) for a, b in itertools.pairwise(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(nn.functional.silu(x) if number else x)
        return x[:, 0]


class GauntPotential(nn.Module):
    r"""Energies and forces of atoms, by message passing with products of functions on the sphere::

        E = Σ_i ( E0_{z_i} + σ Σ_t readout_t(h_i^t) )          F = -∂E/∂pos

        A_i = Σ_{j: |r_ij| < cutoff} X(h_j^t) · F(r_ij) / √n        (GauntConv, filters from a radial network)
        h_i^{t+1} = Σ_ν w_{z_i,ν} (A_i)^ν  +  what i keeps of h_i^t      (GauntSymmetricContraction)

    The energy is smooth (twice continuously differentiable in the positions, also where an atom crosses the cutoff),
    invariant under rotation, reflection, translation and permutation, and a sum over structures that do not see each
    other; an atom without neighbours has its reference energy E0. Neighbours are found in every call.

    Args:
        species: atomic numbers that the model knows.
        cutoff: in Å.
        lmax: highest degree of features and filters.
        channels: C, of each irrep of the features.
        num_layers: rounds of messages; an atom feels others at up to ``num_layers * cutoff``.
        correlation: the highest power ν: a message's features are of body order ν + 1.
        antisymmetric: also the paths of odd l1 + l2 + l3, and with them features of both parities.
        product: "gaunt", or "oracle" for the same architecture of e3nn's products, with a free weight for each path.
        num_basis: Bessel functions of a distance.
        radial_hidden: widths of the radial networks.
        readout_hidden: width of the last readout; those of earlier layers are linear.
        reference_energies: E0 of each of ``species`` in eV, 0 by default.
        energy_scale: σ, in eV; the root mean square of the forces (in eV/Å) is a good choice.
        average_neighbors: n, the mean number of neighbours in the training set.
        device, dtype: of parameters and buffers.
        backend: see :func:`torchlayers.backend`.

    Shape:
        One argument, PyG ``Data`` or ``Batch`` with ``z`` (N,), ``pos`` (N, 3) in Å, and for crystals ``cell`` and
        ``pbc``: see :class:`AtomicGraph`. The result is ``{"energy": (B,), "forces": (N, 3)}`` in eV and eV/Å, with
        ``stress=True`` also ``"stress"`` (B, 3, 3), the derivative of the energy by a strain over the volume of the
        cell, in eV/Å³. Results have the dtype of ``pos``: with float64 positions distances and sums of energies are in
        float64, whatever the parameters are.

        In training mode forces (and stress) keep their graph, so that a loss on them can be differentiated by the
        parameters, and by ``pos`` where that requires gradients; in eval mode they are detached and cost less. Both
        work under ``torch.no_grad()``, where the results are detached.

    Attributes:
        reference_energies, energy_scale, average_neighbors: buffers, (species,), (1,) and (1,), part of ``state_dict``;
            see :meth:`set_statistics`.

    Raises:
        ValueError: arguments out of range; an element that is not among ``species``; shapes that do not fit; positions
            that are not finite; a cell without volume.
        TypeError: ``z`` that is not of integers, ``pos`` that is not of real floats.
        ImportError: e3nn is not installed.

    Source: Luo et al., arXiv 2401.10216 (the blocks); Batatia et al., arXiv 2206.07697 (the architecture).

    Example:

        >>> import torch
        >>> from torch_geometric.data import Batch, Data
        >>> from torchlayers.gaunt import GauntPotential
        >>> potential = GauntPotential([1, 8], cutoff=4.0, lmax=2, channels=8, num_layers=2)
        >>> water = Data(z=torch.tensor([8, 1, 1]), pos=torch.tensor([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]))
        >>> result = potential(Batch.from_data_list([water, water]))
        >>> result["energy"].shape, result["forces"].shape
        (torch.Size([2]), torch.Size([6, 3]))
        >>> result["forces"].square().sum().backward()
    """

    elements: Tensor
    reference_energies: Tensor
    energy_scale: Tensor
    average_neighbors: Tensor

    def __init__(
        self,
        species: Sequence[int],
        cutoff: float,
        lmax: int = 2,
        channels: int = 32,
        num_layers: int = 2,
        *,
        correlation: int = 3,
        antisymmetric: bool = False,
        product: str = "gaunt",
        num_basis: int = 8,
        radial_hidden: Sequence[int] = (32, 32),
        readout_hidden: int = 16,
        reference_energies: Sequence[float] | None = None,
        energy_scale: float = 1.0,
        average_neighbors: float = 12.0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self.species = tuple(int(check_int(f"species[{i}]", int(z))) for i, z in enumerate(species))
        if not self.species or len(set(self.species)) < len(self.species) or max(self.species) > 118:
            raise ValueError(f"species must be different atomic numbers from 1 to 118, got {list(species)}")
        if not 0 < cutoff < math.inf:
            raise ValueError(f"cutoff must be positive and finite, got {cutoff!r}")
        check_choice("product", product, ("gaunt", "oracle"))
        self.cutoff = float(cutoff)
        self.lmax = check_int("lmax", lmax, minimum=0)
        self.channels, self.num_layers = check_int("channels", channels), check_int("num_layers", num_layers)
        self.correlation, self.antisymmetric, self.product = (
            check_int("correlation", correlation),
            antisymmetric,
            product,
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        n_species = len(self.species)
        number = torch.full((119,), -1, dtype=torch.int64)
        number[list(self.species)] = torch.arange(n_species)
        self.register_buffer("elements", number.to(device), persistent=False)
        self.register_buffer("reference_energies", torch.zeros(n_species, **factory))
        self.register_buffer("energy_scale", torch.ones(1, **factory))
        self.register_buffer("average_neighbors", torch.ones(1, **factory))
        self.embedding = nn.Parameter(torch.empty(n_species, channels, **factory))
        self.layers = nn.ModuleList()
        self.readouts = nn.ModuleList()
        scalars = FlatIrreps("irreps_in", f"{channels}x0e")
        features = scalars
        for t in range(num_layers):
            last = t == num_layers - 1
            message = self._reached(features)
            out = scalars if last else message
            names = (str(message), str(out), correlation, n_species)
            if product == "gaunt":
                conv: nn.Module = GauntConv(
                    str(features), lmax, str(message), antisymmetric=antisymmetric, backend=backend
                )
                contraction: nn.Module = GauntSymmetricContraction(*names, backend=backend, **factory)
            else:
                conv, contraction = (
                    OracleConv(str(features), lmax, str(message), **factory),
                    OracleContraction(*names, **factory),
                )
            radial = RadialNetwork(
                self.cutoff,
                conv.weight_numel,  # type: ignore[arg-type]
                num_basis=check_int("num_basis", num_basis),
                hidden=radial_hidden,
                **factory,
            )
            self.layers.append(
                _Layer(
                    features, message, out, radial, conv, contraction, residual=t > 0, num_elements=n_species, **factory
                )
            )
            self.readouts.append(
                _Readout(channels, check_int("readout_hidden", readout_hidden) if last else None, **factory)
            )
            features = out
        with torch.no_grad():
            self.embedding.normal_()
        self.set_statistics(reference_energies, energy_scale, average_neighbors)

    def _reached(self, features: FlatIrreps) -> FlatIrreps:
        """The irreps up to lmax that messages from ``features`` hold."""
        parts: set[Part] = set()
        for sign, first in features.muls:
            for second in range(self.lmax + 1):
                for third in range(abs(first - second), min(first + second, self.lmax) + 1):
                    odd = (first + second + third) % 2
                    if not odd or self.antisymmetric:
                        parts.add((-sign if odd else sign, third))
        irreps = sorted((degree, sign * (-1) ** degree) for sign, degree in parts)
        return FlatIrreps("irreps", "+".join(f"{self.channels}x{degree}{'eo'[p < 0]}" for degree, p in irreps))

    def reset_parameters(self) -> None:
        """Draw all parameters; the statistics stay."""
        with torch.no_grad():
            self.embedding.normal_()
        for module in list(self.modules())[1:]:
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    @torch.no_grad()
    def set_statistics(
        self,
        reference_energies: Sequence[float] | Tensor | None = None,
        energy_scale: float | Tensor | None = None,
        average_neighbors: float | Tensor | None = None,
    ) -> None:
        """Set the constants that a training set gives; those that are None stay.

        Raises:
            ValueError: not a number for each of ``species``, or a scale that is not positive.
        """
        if reference_energies is not None:
            energies = torch.as_tensor(reference_energies, dtype=torch.float64).flatten()
            if len(energies) != len(self.species):
                raise ValueError(
                    f"reference_energies must have one for each of {len(self.species)} species, got {len(energies)}"
                )
            self.reference_energies.copy_(energies)
        for name, value in (("energy_scale", energy_scale), ("average_neighbors", average_neighbors)):
            if value is not None:
                if not 0 < float(value) < math.inf:
                    raise ValueError(f"{name} must be positive and finite, got {value}")
                getattr(self, name).fill_(float(value))

    def forward(self, data: AtomicGraph, *, stress: bool = False) -> dict[str, Tensor]:
        wants_grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad(), no_autocast(self.embedding):
            z, pos, batch, graphs, cell, pbc = self._read(data)
            keeps_graph = self.training and wants_grad
            if not (keeps_graph and pos.requires_grad):
                pos = pos.detach().requires_grad_()
            by = [pos]
            moved, lattice = pos, cell
            if stress:
                strain = pos.new_zeros(graphs, 3, 3).requires_grad_()
                by.append(strain)
                symmetric = (strain + strain.mT) / 2
                moved = pos + torch.einsum("nc,ncd->nd", pos, symmetric[batch])
                lattice = None if cell is None else cell + cell @ symmetric
            element = self.elements[z]
            reference = torch.zeros(graphs, dtype=pos.dtype, device=pos.device).index_add(
                0, batch, self.reference_energies.to(pos.dtype)[element]
            )
            edge_index, shifts = neighbor_list(
                pos, self.cutoff, batch=batch, num_graphs=graphs, cell=cell, pbc=pbc if cell is not None else None
            )
            source, target = edge_index
            edge_vec = moved[source] - moved[target]
            if lattice is not None:
                edge_vec = edge_vec + torch.einsum("ek,ekc->ec", shifts.to(pos.dtype), lattice[batch[target]])
            atoms = self._atomic_energies(element, edge_vec, edge_order(edge_index, len(z)))
            energy = reference.index_add(0, batch, atoms.to(pos.dtype) * self.energy_scale.to(pos.dtype))
            found: Sequence[Tensor | None] = [None] * len(by)
            if energy.requires_grad and len(z):
                found = torch.autograd.grad(
                    energy.sum(), by, create_graph=keeps_graph, retain_graph=wants_grad, allow_unused=True
                )
            gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(found, by, strict=True)]
            if not wants_grad:
                energy = energy.detach()
        result = {"energy": energy, "forces": -gradients[0]}
        if stress:
            if cell is None or pbc is None:
                raise ValueError("data must have a cell for a stress, got none")
            volume = torch.linalg.det(cell).abs()
            if not bool((volume > 0).all()):
                raise ValueError("data must have cells of some volume for a stress, got one without")
            result["stress"] = gradients[1] / volume[:, None, None]
        return result

    def _atomic_energies(self, element: Tensor, edge_vec: Tensor, edges: EdgeOrder) -> Tensor:
        """(N,) in units of ``energy_scale``, in the dtype of the parameters."""
        # The length in the dtype of the positions. An edge of length zero, where its derivative is infinite, gets none.
        square = edge_vec.square().sum(1)
        apart = square > 0
        r = torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)
        unit = edge_vec / torch.where(apart, r, 1)[:, None]
        dtype = self.embedding.dtype
        unit, r = unit.to(dtype), r.to(dtype)
        scale = self.average_neighbors.to(dtype).rsqrt()
        features = [self.embedding[element][..., None]]
        energy = torch.zeros(len(element), dtype=dtype, device=edge_vec.device)
        for layer, readout in zip(self.layers, self.readouts, strict=True):
            features = layer(features, element, unit, r, edges, scale)
            energy = energy + readout(features[0][..., 0])
        return energy

    def _read(self, data: Any) -> tuple[Tensor, Tensor, Tensor, int, Tensor | None, Tensor | None]:
        """z, pos, batch, number of structures, cell (B, 3, 3) and pbc (B, 3) of the input, checked."""

        def get(name: str) -> Any:
            value = getattr(data, name, None)
            # Tensors of inference mode cannot take part in a graph.
            return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

        z, pos, batch, cell, pbc = (get(name) for name in ("z", "pos", "batch", "cell", "pbc"))
        for name, value in (("z", z), ("pos", pos)):
            if not isinstance(value, Tensor):
                raise TypeError(f"data.{name} must be a tensor, got {type(value).__name__}")
        check_ndim("data.pos", pos, 2, "(atoms, 3)")
        check_size("data.pos", pos, 1, 3, "coordinates")
        if not pos.dtype.is_floating_point:
            raise TypeError(f"data.pos must have a real floating-point dtype, got {pos.dtype}")
        if z.dtype.is_floating_point or z.dtype.is_complex or z.dtype == torch.bool:
            raise TypeError(f"data.z must be integers, got {z.dtype}")
        if z.shape != pos.shape[:1]:
            raise ValueError(f"data.z must have shape {tuple(pos.shape[:1])}, as data.pos, got {tuple(z.shape)}")
        check_same_device("data.pos", pos, "the model", self.embedding)
        z = z.long()
        known = (z >= 0) & (z < len(self.elements))
        known = known & (self.elements[torch.where(known, z, 0)] >= 0)
        if not bool(known.all()):
            raise ValueError(f"data.z must be of species {list(self.species)}, got {sorted(set(z[~known].tolist()))}")
        if batch is None:
            graphs = 1
            batch = torch.zeros_like(z)
        else:
            if batch.shape != z.shape:
                raise ValueError(f"data.batch must have shape {tuple(z.shape)}, as data.z, got {tuple(batch.shape)}")
            found = getattr(data, "num_graphs", None)
            graphs = int(found) if found is not None else int(batch.max()) + 1 if len(batch) else 0
        if cell is not None:
            if cell.numel() != 9 * graphs:
                raise ValueError(
                    f"data.cell must have shape (B, 3, 3) or (3 B, 3) with B = {graphs}, got {tuple(cell.shape)}"
                )
            cell = cell.reshape(graphs, 3, 3).to(pos.dtype)
        if pbc is not None:
            pbc = torch.as_tensor(pbc, device=pos.device).bool()
            if pbc.numel() not in (graphs, 3 * graphs):
                raise ValueError(
                    f"data.pbc must have shape (B, 3), (3 B,) or (B,) with B = {graphs}, got {tuple(pbc.shape)}"
                )
            pbc = pbc.reshape(graphs, -1).expand(graphs, 3)
            if cell is None and bool(pbc.any()):
                raise ValueError("data.cell must be given where data.pbc has a direction that repeats, got none")
        elif cell is not None:
            pbc = torch.ones(graphs, 3, dtype=torch.bool, device=pos.device)
        return z, pos, batch.long(), graphs, cell, pbc

    def extra_repr(self) -> str:
        return (
            f"species={list(self.species)}, cutoff={self.cutoff}, lmax={self.lmax}, channels={self.channels}, "
            f"num_layers={self.num_layers}, correlation={self.correlation}, antisymmetric={self.antisymmetric}, "
            f"product={self.product!r}"
        )


def reference_energies(frames: Iterable[Any], species: Sequence[int]) -> list[float]:
    """Energies E0 of each species that fit ``energy ≈ Σ_i E0_{z_i}`` best over ``frames``, in eV.

    Where frames do not tell species apart, since all are of one composition, the smallest such energies.

    Args:
        frames: objects with ``z`` (N,) and ``energy`` (1,).
        species: atomic numbers; all that occur.
    """
    frames = list(frames)
    counts = torch.stack([torch.stack([(f.z == z).sum() for z in species]) for f in frames]).double()
    if int(counts.sum()) != sum(len(f.z) for f in frames):
        raise ValueError(f"species must hold every element of frames, got {list(species)}")
    energies = torch.cat([f.energy.reshape(1) for f in frames]).double()
    return (torch.linalg.pinv(counts, rtol=1e-9) @ energies).tolist()
