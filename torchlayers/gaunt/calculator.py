"""A potential as an ASE calculator. Importing this module imports ASE."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .._checks import require

__all__ = ["GauntCalculator"]

_calculator: Any = require("ase.calculators.calculator", extra="atoms")


class GauntCalculator(_calculator.Calculator):
    """Energies, forces and stresses of a :class:`GauntPotential` for ASE: structure relaxation, dynamics, phonons.

    Positions go to the model in float64, so that energy differences of a large system keep their digits whatever the
    parameters' dtype is. The model is put in eval mode.

    Args:
        model: called as ``model(data)`` and ``model(data, stress=True)``, as :class:`GauntPotential` is.

    Properties: ``energy`` and ``free_energy`` (eV), ``forces`` (N, 3) (eV/Å), ``stress`` (6,) (eV/Å³, ASE's Voigt order
    xx yy zz yz xz xy; the derivative of the energy by strain over the volume), which needs three lattice vectors.

    Raises:
        PropertyNotImplementedError: a stress of atoms in no cell.
        ValueError: as the model does.

    Example:

        >>> import ase
        >>> from torchlayers.gaunt import GauntCalculator, GauntPotential
        >>> atoms = ase.Atoms("H2O", [(0.96, 0, 0), (-0.24, 0.93, 0), (0, 0, 0)])
        >>> atoms.calc = GauntCalculator(GauntPotential([1, 8], cutoff=4.0, lmax=2, channels=8))
        >>> atoms.get_forces().shape
        (3, 3)
    """

    implemented_properties = ("energy", "free_energy", "forces", "stress")

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval()

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = _calculator.all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        device = next(self.model.parameters()).device
        data = SimpleNamespace(
            z=torch.tensor(self.atoms.numbers, dtype=torch.int64, device=device),
            pos=torch.tensor(self.atoms.positions, dtype=torch.float64, device=device),
            cell=torch.tensor(self.atoms.cell.array, dtype=torch.float64, device=device)[None],
            pbc=torch.tensor(self.atoms.pbc, device=device)[None],
        )
        stress = "stress" in properties
        if stress and self.atoms.cell.rank < 3:
            raise _calculator.PropertyNotImplementedError("a stress needs a cell of three lattice vectors")
        with torch.no_grad():
            found = self.model(data, stress=True) if stress else self.model(data)
        energy = float(found["energy"])
        self.results = {"energy": energy, "free_energy": energy, "forces": found["forces"].double().cpu().numpy()}
        if stress:
            s = found["stress"][0].double().cpu().numpy()
            self.results["stress"] = s[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
