"""Atomic configurations with energies and forces: molecular dynamics generated here, 3BPA, and OC20.

Every frame is a PyG ``Data`` in ASE's units (Å, eV, eV/Å), its real numbers in float64:

- ``z`` (N,) int64, atomic numbers; ``pos`` (N, 3);
- ``cell`` (1, 3, 3), rows are the lattice vectors, and ``pbc`` (1, 3) bool, which of them repeat;
- ``energy`` (1,) and ``forces`` (N, 3), where the source has them;
- ``trajectory`` (1,) int64, which trajectory the frame is of, where frames come from some.

A data set here collates frames to a PyG ``Batch``, which is what :class:`torchlayers.gaunt.GauntPotential` takes.
"""

from __future__ import annotations

import bisect
import io
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, check_int, require
from ._common import cached

__all__ = ["Frames", "LMDBFrames", "from_ase", "generate", "isolated_energies", "load_3bpa", "load_oc20", "read_extxyz"]


class Frames(torch.utils.data.Dataset):
    """A map-style data set of frames in memory.

    Args:
        frames: PyG ``Data`` objects.
    """

    def __init__(self, frames: Iterable[Any]):
        self.frames = list(frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.frames)

    def __getitem__(self, index: int) -> Any:
        return self.frames[index]

    @staticmethod
    def collate(frames: Sequence[Any]) -> Any:
        """The frames as one PyG ``Batch``."""
        return _pyg().Batch.from_data_list(list(frames))

    def split_in_time(self, test_fraction: float) -> tuple[Frames, Frames]:
        """Training and test frames: of each trajectory the last ``test_fraction`` (rounded up) are for the test.

        Neighbours in time are nearly equal: a random split would test on frames that were all but trained on. Frames
        of one trajectory are taken to be in the order of time; those without ``trajectory`` are of one.
        """
        if not 0.0 < test_fraction < 1.0:
            raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction!r}")
        parts: dict[int, list[Any]] = {}
        for frame in self.frames:
            parts.setdefault(int(getattr(frame, "trajectory", 0)), []).append(frame)
        train, test = [], []
        for part in parts.values():
            n_test = math.ceil(test_fraction * len(part))
            if n_test == len(part):
                raise ValueError(
                    f"test_fraction must leave a frame of each trajectory to train on, got {test_fraction} of {n_test}"
                )
            train += part[:-n_test]
            test += part[-n_test:]
        return Frames(train), Frames(test)


def _pyg() -> ModuleType:
    return require("torch_geometric.data", extra="graphs", quiet=True)


def _frame(
    z: Any,
    pos: Any,
    *,
    cell: Any = None,
    pbc: Any = None,
    energy: Any = None,
    forces: Any = None,
    trajectory: int | None = None,
) -> Any:
    def real(value: Any, *shape: int) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device="cpu").reshape(shape).clone()

    data = _pyg().Data(z=torch.as_tensor(z).long().reshape(-1).clone(), pos=real(pos, -1, 3))
    n = len(data.z)
    if len(data.pos) != n:
        raise ValueError(f"pos must have a row for each of {n} atoms, got {len(data.pos)}")
    data.cell = real(torch.zeros(3, 3) if cell is None else cell, 1, 3, 3)
    data.pbc = torch.as_tensor((False,) * 3 if pbc is None else pbc, dtype=torch.bool).expand(3).reshape(1, 3).clone()
    if energy is not None:
        data.energy = real(energy, 1)
    if forces is not None:
        data.forces = real(forces, n, 3)
    if trajectory is not None:
        data.trajectory = torch.tensor([trajectory])
    return data


def from_ase(atoms: Any, *, energy: float | None = None, forces: Any = None) -> Any:
    """An ``ase.Atoms`` as a frame.

    Args:
        atoms: positions, numbers, cell and pbc are taken.
        energy: in eV; by default the result that the atoms' calculator already holds, none where it holds none.
        forces: in eV/Å, (N, 3); likewise.
    """
    results = getattr(atoms.calc, "results", {})
    return _frame(
        atoms.get_atomic_numbers(),
        atoms.get_positions(),
        cell=atoms.cell.array,
        pbc=atoms.pbc,
        energy=results.get("energy") if energy is None else energy,
        forces=results.get("forces") if forces is None else forces,
    )


# -- molecular dynamics with a known potential

_EMT = ("Ag", "Al", "Au", "Cu", "Ni", "Pd", "Pt")


def generate(
    n_trajectories: int,
    n_frames: int,
    *,
    symbols: Sequence[str] = ("Cu", "Au"),
    repeat: int = 2,
    stretch: float = 1.0,
    temperature: float = 800.0,
    timestep: float = 2.0,
    interval: int = 10,
    equilibration: int = 100,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Frames:
    """Hot random alloys: Langevin dynamics under ASE's effective medium theory (EMT), a many-body potential of metals.

    A trajectory starts from a perfect fcc crystal of ``4 repeat³`` sites, on which the elements lie at random in equal
    numbers; the lattice constant is the mean of the elements'. Trajectory k depends on (seed, k) alone, apart from the
    number of its frames: more trajectories extend a set.

    Args:
        n_trajectories: trajectories, each of another random alloy.
        n_frames: frames of each.
        symbols: elements, of Ag, Al, Au, Cu, Ni, Pd, Pt.
        repeat: cubic cells a side; 2 for 32 atoms.
        stretch: factor of the lattice constant.
        temperature: of the thermostat, in K.
        timestep: in fs.
        interval: steps between frames.
        equilibration: steps before the first.
        seed: a non-negative int.
        cache: a folder to keep the result in, under a name made of all arguments; a second call reads it from there.
        progress: a progress bar (none where standard error is no terminal). A step takes some 10 ms for 32 atoms.

    Returns:
        ``n_trajectories * n_frames`` frames, one trajectory after the other, each in the order of time.

    Raises:
        ValueError, TypeError: an argument is out of range.
        ImportError: ase, torch-geometric, numpy or tqdm is missing; the message names the extra that brings it.
    """
    for name, count in (("n_trajectories", n_trajectories), ("n_frames", n_frames), ("repeat", repeat)):
        check_int(name, count)
    check_int("interval", interval)
    check_int("equilibration", equilibration, minimum=0)
    check_int("seed", seed, minimum=0)
    if isinstance(symbols, str) or not symbols:
        raise ValueError(f"symbols must be a sequence of elements such as ('Cu', 'Au'), got {symbols!r}")
    for symbol in symbols:
        check_choice("symbols", symbol, _EMT)
    for name, value in (("stretch", stretch), ("temperature", temperature), ("timestep", timestep)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    numbers = [require("ase.data", extra="atoms").atomic_numbers[s] for s in symbols]
    constants = [require("ase.data", extra="atoms").reference_states[z]["a"] for z in numbers]
    side = stretch * repeat * sum(constants) / len(constants)
    n_atoms = 4 * repeat**3
    shape = (n_trajectories * n_frames, n_atoms, 4)

    def make() -> tuple[Tensor, Tensor]:
        x, y = torch.empty(shape, dtype=torch.float64), torch.empty(shape, dtype=torch.float64)
        tqdm = require("tqdm", extra="data")
        total = n_trajectories * (equilibration + n_frames * interval)
        with tqdm.tqdm(total=total, desc="EMT", unit="step", disable=None if progress else True) as bar:
            for k in range(n_trajectories):
                atoms, step = _dynamics(seed, k, numbers, repeat, side, temperature, timestep)
                for _ in range(equilibration):
                    step()
                bar.update(equilibration)
                for row in range(k * n_frames, (k + 1) * n_frames):
                    for _ in range(interval):
                        step()
                    bar.update(interval)
                    x[row, :, 0] = torch.from_numpy(atoms.get_atomic_numbers())
                    x[row, :, 1:] = torch.from_numpy(atoms.get_positions())
                    y[row, :, 0] = torch.from_numpy(atoms.get_potential_energies())
                    y[row, :, 1:] = torch.from_numpy(atoms.get_forces())
        return x, y

    key = {
        "shape": shape,
        "n_frames": n_frames,
        "numbers": numbers,
        "side": side,
        "temperature": temperature,
        "timestep": timestep,
        "interval": interval,
        "equilibration": equilibration,
        "seed": seed,
    }
    # Atomic number and position, energy and force of each atom: two tensors of one shape, as the cache wants them.
    x, y = cached(cache, f"emt_{'_'.join(symbols)}_{n_trajectories}x{n_frames}", key, shape, make)
    return Frames(
        _frame(
            x[i, :, 0],
            x[i, :, 1:],
            cell=side * torch.eye(3, dtype=torch.float64),
            pbc=True,
            energy=y[i, :, 0].sum(),
            forces=y[i, :, 1:],
            trajectory=i // n_frames,
        )
        for i in range(len(x))
    )


def _dynamics(
    seed: int, k: int, numbers: Sequence[int], repeat: int, side: float, temperature: float, timestep: float
) -> tuple[Any, Callable[[], None]]:
    """The crystal of trajectory k, and what takes it a step on: Langevin dynamics by the BAOAB splitting."""
    units = require("ase.units", extra="atoms")
    random = require("numpy", extra="data").random.default_rng((seed, k))
    atoms = require("ase.build", extra="atoms").bulk("Cu", "fcc", a=side / repeat, cubic=True)
    atoms *= (repeat, repeat, repeat)
    atoms.numbers = random.permutation([numbers[i % len(numbers)] for i in range(len(atoms))])
    atoms.set_masses("defaults")
    atoms.calc = require("ase.calculators.emt", extra="atoms").EMT()
    mass = atoms.get_masses()[:, None]
    dt = timestep * units.fs
    kept = math.exp(-0.01 * timestep)  # of the momenta, by a friction of 0.01 / fs
    thermal = (temperature * units.kB * mass) ** 0.5
    # Twice the temperature: a crystal at rest gives half of its kinetic energy away to the potential one.
    state = {"p": 2**0.5 * thermal * random.standard_normal((*mass.shape[:1], 3)), "f": atoms.get_forces()}

    def step() -> None:
        p = state["p"] + 0.5 * dt * state["f"]
        halfway = atoms.positions + 0.5 * dt * p / mass
        p = kept * p + (1 - kept**2) ** 0.5 * thermal * random.standard_normal(p.shape)
        atoms.positions = halfway + 0.5 * dt * p / mass
        state["f"] = atoms.get_forces()
        state["p"] = p + 0.5 * dt * state["f"]

    return atoms, step


# -- files

_KEYS = {"energy": ("energy", "REF_energy", "TotEnergy"), "forces": ("forces", "REF_forces", "force")}


def read_extxyz(path: str | os.PathLike[str]) -> Frames:
    """The frames of an extended XYZ file (also compressed, .xz or .gz), with energies and forces where it has them.

    Energies are looked for as ``energy``, ``REF_energy`` or ``TotEnergy``, forces as ``forces``, ``REF_forces`` or
    ``force``; in eV and eV/Å.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be an extended XYZ file, got none at {path}")
    ase_io = require("ase.io", extra="atoms")
    try:
        found = ase_io.read(path, index=":", format="extxyz")
    except Exception as error:  # ASE's parser fails in many ways
        raise ValueError(f"{path} must be an extended XYZ file, got one that cannot be read: {error}") from error
    frames = []
    for atoms in found:
        energy = next((atoms.info[k] for k in _KEYS["energy"] if k in atoms.info), None)
        forces = next((atoms.arrays[k] for k in _KEYS["forces"] if k in atoms.arrays), None)
        frames.append(from_ase(atoms, energy=energy, forces=forces))
    return Frames(frames)


def load_3bpa(root: str | os.PathLike[str], split: str) -> Frames:
    """A file of the 3BPA set: the molecule C₁₂H₁₂N₂O at several temperatures, with energies and forces by DFT.

    Kovács et al., "Linear Atomic Cluster Expansion Force Fields for Organic Molecules: Beyond RMSE", JCTC 2021
    (https://doi.org/10.1021/acs.jctc.1c00647, supporting information; also as ``dataset_3BPA`` in the repository
    davkovacs/BOTNet-datasets on GitHub). Total energies of all electrons: subtract those of :func:`isolated_energies`.

    Args:
        root: folder with the files.
        split: name of the file without ``.xyz``: "train_300K", "train_mixedT", "test_300K", "test_600K",
            "test_1200K", "test_dih_beta120", "test_dih_beta150" or "test_dih_beta180".

    Raises:
        FileNotFoundError: ``root`` has no such file.
        ValueError: the file is damaged, or a frame of it has no energy or no forces.
    """
    path = Path(root) / f"{split}.xyz"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in Path(root).glob("*.xyz"))) or "none"
        raise FileNotFoundError(f"root must hold {split}.xyz of the 3BPA set, got {root} with {there}")
    frames = read_extxyz(path)
    _check_labelled(frames, path)
    return frames


def isolated_energies(root: str | os.PathLike[str]) -> dict[int, float]:
    """Energy in eV of each isolated atom by atomic number: ``iso_atoms.xyz`` of the 3BPA set, or such a file."""
    path = Path(root) / "iso_atoms.xyz"
    found: dict[int, float] = {}
    for frame in read_extxyz(path):
        if len(frame.z) != 1 or "energy" not in frame:
            raise ValueError(f"{path} must hold single atoms with an energy, got {len(frame.z)} atoms")
        found[int(frame.z)] = float(frame.energy)
    return found


def _check_labelled(frames: Iterable[Any], path: Path) -> None:
    for number, frame in enumerate(frames):
        for name in ("energy", "forces"):
            if name not in frame:
                raise ValueError(f"{path} must give energy and forces for each frame, got no {name} in frame {number}")


def load_oc20(root: str | os.PathLike[str]) -> torch.utils.data.Dataset:
    """A split of OC20's S2EF task (adsorbates on catalysts' surfaces, relaxed by DFT), from a local folder.

    Chanussot et al., "The Open Catalyst 2020 (OC20) Dataset and Community Challenges", ACS Catalysis 2021
    (https://fair-chem.github.io: S2EF, "200K", "val_id", ...). Two layouts are read:

    - as downloaded: ``*.extxyz`` or ``*.extxyz.xz``, each with its ``*.txt`` (or ``.txt.xz``) of lines
      ``system,frame,reference energy``. All are read into memory; the reference energy (of the bare slab and the
      molecule) is subtracted, which gives the adsorption energies that OC20 is scored by, and frames of one system are
      one ``trajectory``;
    - as preprocessed: ``*.lmdb``, read frame by frame by :class:`LMDBFrames`.

    Raises:
        FileNotFoundError: the folder has neither.
        ValueError: a file is damaged, or an extxyz file and its txt file have not as many frames.
    """
    root = Path(root)
    databases = sorted(root.glob("*.lmdb"))
    if databases:
        return LMDBFrames(databases)
    tables = sorted([*root.glob("*.extxyz"), *root.glob("*.extxyz.xz")])
    if not tables:
        raise FileNotFoundError(f"root must hold *.lmdb, or *.extxyz[.xz] with *.txt, of OC20's S2EF task, got {root}")
    frames: list[Any] = []
    systems: dict[str, int] = {}
    for table in tables:
        part, about = read_extxyz(table), _read_references(table)
        if len(part) != len(about):
            raise ValueError(f"{table} and its txt file must have as many frames, got {len(part)} and {len(about)}")
        _check_labelled(part, table)
        for frame, (system, reference) in zip(part, about, strict=True):
            frame.energy -= reference
            frame.trajectory = torch.tensor([systems.setdefault(system, len(systems))])
            frames.append(frame)
    return Frames(frames)


def _read_references(table: Path) -> list[tuple[str, float]]:
    import lzma

    stem = table.with_name(table.name.removesuffix(".xz").removesuffix(".extxyz"))
    for path, opener in ((Path(f"{stem}.txt"), open), (Path(f"{stem}.txt.xz"), lzma.open)):
        if path.is_file():
            with opener(path, "rt") as file:
                lines = [line.strip().split(",") for line in file if line.strip()]
            try:
                return [(system, float(energy)) for system, _, energy in lines]
            except ValueError as error:
                raise ValueError(f"{path} must have lines of system,frame,reference energy: {error}") from None
    raise FileNotFoundError(f"{table} must have its reference energies beside it, got no {stem.name}.txt")


class LMDBFrames(torch.utils.data.Dataset):
    """Frames of OC20's preprocessed LMDB files, each read when it is asked for.

    A record of such a file is a pickled PyG ``Data``, and unpickling runs whatever code a file asks for. Here it is
    read by an unpickler that knows tensors and plain containers and makes inert records of PyG's classes; a file that
    asks for anything else is refused. Atoms that OC20 keeps fixed are marked by ``fixed`` (N,) bool.

    Args:
        paths: files, one after the other.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or not made of such records (also on reading one).
        ImportError: lmdb is missing.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]):
        self.paths = [Path(p) for p in paths]
        self._open: dict[tuple[int, int], Any] = {}
        self._ends: list[int] = []
        end = 0
        for number, path in enumerate(self.paths):
            if not path.is_file():
                raise FileNotFoundError(f"paths must be LMDB files, got none at {path}")
            with self._environment(number).begin() as transaction:
                end += transaction.stat()["entries"] - (transaction.get(b"length") is not None)
            self._ends.append(end)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        number = bisect.bisect_right(self._ends, index)
        key = str(index - (self._ends[number - 1] if number else 0))
        with self._environment(number).begin() as transaction:
            record = transaction.get(key.encode())
        where = f"record {key} of {self.paths[number]}"
        if record is None:
            raise ValueError(f"{where} must be there, got none: records are numbered from 0")
        return _read_record(record, where)

    collate = staticmethod(Frames.collate)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _environment(self, number: int) -> Any:
        # An environment must not be used across a fork: each process opens its own.
        key = (os.getpid(), number)
        if key not in self._open:
            lmdb = require("lmdb", extra="atoms")
            try:
                self._open[key] = lmdb.open(
                    str(self.paths[number]), subdir=False, readonly=True, lock=False, readahead=False, meminit=False
                )
            except lmdb.Error as error:
                path = self.paths[number]
                raise ValueError(f"{path} must be an LMDB file, got one that cannot be opened: {error}") from error
        return self._open[key]


class _Record:
    """What a pickled object of PyG becomes: its state, and no behaviour."""

    __slots__ = ("state",)

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.state = {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


_PYG = {"Data", "GlobalStorage", "DataEdgeAttr", "DataTensorAttr", "EdgeAttr", "TensorAttr"}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Functions are made anew on each call, since a pickle may set attributes of what it is given.
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, size, stride, *rest: _tensor(storage, offset, size, stride)
        if module == "torch.storage" and name == "_load_from_bytes":
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module.startswith("torch_geometric.data.") and name in _PYG:
            return _Record
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a frame has no use for")


def _tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or (0 not in size and last >= storage._size()):
        raise ValueError(f"a tensor of size {size} leaves its storage of {storage._size()} numbers")
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, tuple(size), tuple(stride))


def _read_record(record: bytes, where: str) -> Any:
    try:
        found = _Unpickler(io.BytesIO(record)).load()
        if not isinstance(found, _Record):
            raise ValueError(f"it is of {type(found).__name__}, not a graph")
        fields = found.state
        store = fields.get("_store")
        if isinstance(store, _Record):
            fields = store.state.get("_mapping", {})
        fields = {k: v for k, v in fields.items() if v is not None}
        z = next(fields[k] for k in ("atomic_numbers", "z") if k in fields)
        frame = _frame(
            z,
            fields["pos"],
            cell=fields["cell"],
            pbc=fields.get("pbc", True),
            energy=next((fields[k] for k in ("y", "energy") if k in fields), None),
            forces=next((fields[k] for k in ("force", "forces") if k in fields), None),
        )
        if "fixed" in fields:
            frame.fixed = torch.as_tensor(fields["fixed"]).bool().reshape(len(frame.z))
        return frame
    except (StopIteration, KeyError) as error:
        name = error.args[0] if isinstance(error, KeyError) else "atomic_numbers"
        raise ValueError(f"{where} must be a frame of OC20, got one without {name}") from None
    except Exception as error:  # a damaged or hostile pickle fails in any way
        raise ValueError(f"{where} must be a frame of OC20, got one that cannot be read: {error}") from error
