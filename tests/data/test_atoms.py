"""Frames: the generated ones against ASE, the files of 3BPA and OC20 written here, and pickles that would run code."""

import io
import lzma
import os
import pickle
import warnings

import pytest
import torch

from torchlayers.data import atoms
from torchlayers.data.atoms import Frames, LMDBFrames

ase = pytest.importorskip("ase")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pyg = pytest.importorskip("torch_geometric.data")

SMALL = {"equilibration": 3, "interval": 2, "progress": False}


def to_ase(frame):
    return ase.Atoms(frame.z.numpy(), frame.pos.numpy(), cell=frame.cell[0].numpy(), pbc=frame.pbc[0].numpy())


@pytest.fixture(scope="module")
def frames():
    return atoms.generate(2, 3, **SMALL)


def test_generated_energies_and_forces_are_those_of_emt(frames):
    from ase.calculators.emt import EMT

    assert len(frames) == 6 and [int(f.trajectory) for f in frames] == [0, 0, 0, 1, 1, 1]
    for frame in frames:
        alloy = to_ase(frame)
        alloy.calc = EMT()
        assert sorted(set(alloy.get_chemical_symbols())) == ["Au", "Cu"] and len(alloy) == 32
        assert frame.energy.item() == pytest.approx(alloy.get_potential_energy(), abs=1e-9)
        assert torch.allclose(frame.forces, torch.from_numpy(alloy.get_forces()), rtol=0, atol=1e-9)
        assert frame.pos.dtype == frame.forces.dtype == torch.float64
    assert not torch.equal(frames[0].z, frames[3].z)


def test_dynamics_hold_the_temperature():
    """Over one long trajectory the kinetic energy per degree of freedom is kT / 2, within its scatter."""
    from ase.units import kB

    alloy, step = atoms._dynamics(0, 0, [29, 79], 1, 3.845, 500.0, 4.0)
    before, kinetic = alloy.get_positions(), []
    for number in range(1600):
        previous = alloy.get_positions()
        step()
        if number > 200:
            velocity = (alloy.get_positions() - previous) / (4.0 * ase.units.fs)
            kinetic.append((alloy.get_masses()[:, None] * velocity**2).mean())
    assert abs(alloy.get_positions() - before).max() > 0.1
    assert sum(kinetic) / len(kinetic) == pytest.approx(kB * 500.0, rel=0.2)


def test_more_trajectories_extend_a_set(frames):
    one = atoms.generate(1, 3, **SMALL)
    assert all(torch.equal(a.pos, b.pos) and torch.equal(a.forces, b.forces) for a, b in zip(one, frames, strict=False))
    other = atoms.generate(1, 3, seed=1, **SMALL)
    assert not torch.equal(one[0].pos, other[0].pos)


def test_the_cache_is_read_and_made_again_when_damaged(tmp_path, frames, monkeypatch):
    first = atoms.generate(2, 3, cache=tmp_path, **SMALL)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(atoms, "_dynamics", lambda *_: pytest.fail("it was computed again"))
        second = atoms.generate(2, 3, cache=tmp_path, **SMALL)
    for a, b, c in zip(first, second, frames, strict=True):
        for name in ("z", "pos", "cell", "pbc", "energy", "forces", "trajectory"):
            assert torch.equal(a[name], b[name]) and torch.equal(a[name], c[name])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="made again"):
        third = atoms.generate(2, 3, cache=tmp_path, **SMALL)
    assert torch.equal(third[5].pos, first[5].pos)
    atoms.generate(2, 3, cache=tmp_path, temperature=700.0, **SMALL)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_split_is_by_time_in_each_trajectory(frames):
    train, test = frames.split_in_time(0.3)
    assert [f is g for f, g in zip(train, (frames[i] for i in (0, 1, 3, 4)), strict=True)] == [True] * 4
    assert [f is g for f, g in zip(test, (frames[i] for i in (2, 5)), strict=True)] == [True] * 2
    with pytest.raises(ValueError, match="leave a frame"):
        frames.split_in_time(0.9)
    with pytest.raises(ValueError, match="between 0 and 1"):
        frames.split_in_time(1.0)


def test_frames_collate_to_a_batch(frames):
    batch = Frames.collate([frames[0], frames[4]])
    assert batch.num_graphs == 2 and batch.cell.shape == (2, 3, 3) and batch.pbc.shape == (2, 3)
    assert torch.equal(batch.energy, torch.cat([frames[0].energy, frames[4].energy]))
    assert torch.equal(batch.pos[batch.batch == 1], frames[4].pos)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"n_frames": 0}, ValueError, "n_frames must be at least 1"),
        ({"symbols": ("Cu", "Fe")}, ValueError, "symbols must be one of"),
        ({"symbols": "Cu"}, ValueError, "sequence of elements"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"interval": 1.5}, TypeError, "interval must be an int"),
    ],
)
def test_generate_names_mistakes(arguments, error, words):
    with pytest.raises(error, match=words):
        atoms.generate(**({"n_trajectories": 1, "n_frames": 1, "progress": False} | arguments))


def molecule(seed: int, n: int = 4):
    random = torch.Generator().manual_seed(seed)
    pos, forces = torch.randn(2, n, 3, generator=random, dtype=torch.float64)
    return torch.tensor([6, 1, 8, 7])[:n], pos, forces, float(torch.randn((), generator=random))


def extxyz(seeds, extra="", energy="energy", forces="forces") -> str:
    lines = []
    for seed in seeds:
        z, pos, force, e = molecule(seed)
        lines += [str(len(z)), f"Properties=species:S:1:pos:R:3:{forces}:R:3 {energy}={e!r} {extra}"]
        for symbol, p, f in zip("CHON", pos.tolist(), force.tolist(), strict=True):
            lines.append(" ".join([symbol, *map(repr, p + f)]))
    return "\n".join(lines) + "\n"


def check(frame, seed, shift=0.0):
    z, pos, forces, energy = molecule(seed)
    assert torch.equal(frame.z, z)
    assert torch.allclose(frame.pos, pos, rtol=0, atol=1e-12) and torch.allclose(
        frame.forces, forces, rtol=0, atol=1e-12
    )
    assert frame.energy.item() == pytest.approx(energy - shift, abs=1e-12)


@pytest.mark.parametrize("names", [("energy", "forces"), ("REF_energy", "REF_forces"), ("TotEnergy", "force")])
def test_3bpa_is_read(tmp_path, names):
    (tmp_path / "train_300K.xyz").write_text(extxyz([0, 1], 'pbc="F F F"', *names))
    found = atoms.load_3bpa(tmp_path, "train_300K")
    assert len(found) == 2 and not found[0].pbc.any()
    for seed, frame in enumerate(found):
        check(frame, seed)
    with pytest.raises(FileNotFoundError, match=r"test_300K.xyz of the 3BPA set.*with train_300K"):
        atoms.load_3bpa(tmp_path, "test_300K")
    (tmp_path / "bare.xyz").write_text("1\nProperties=species:S:1:pos:R:3\nH 0 0 0\n")
    with pytest.raises(ValueError, match="no energy in frame 0"):
        atoms.load_3bpa(tmp_path, "bare")
    (tmp_path / "broken.xyz").write_text(extxyz([0])[:150])
    with pytest.raises(ValueError, match="cannot be read"):
        atoms.load_3bpa(tmp_path, "broken")


def test_isolated_energies_are_read(tmp_path):
    lines = [f"1\nProperties=species:S:1:pos:R:3 energy={e}\n{s} 0 0 0\n" for s, e in (("H", -13.5), ("C", -1029.25))]
    (tmp_path / "iso_atoms.xyz").write_text("".join(lines))
    assert atoms.isolated_energies(tmp_path) == {1: -13.5, 6: -1029.25}


@pytest.mark.parametrize("compressed", [False, True])
def test_oc20_as_downloaded(tmp_path, compressed):
    end, opener = (".xz", lzma.open) if compressed else ("", open)
    lattice = 'Lattice="5 0 0 0 6 0 0 0 20" pbc="T T T"'
    for part, seeds in (("0", [0, 1]), ("1", [2])):
        with opener(tmp_path / f"{part}.extxyz{end}", "wt") as file:
            file.write(extxyz(seeds, lattice))
        with opener(tmp_path / f"{part}.txt{end}", "wt") as file:
            file.write("".join(f"random{seed // 2},frame{seed},{0.5 + seed}\n" for seed in seeds))
    found = atoms.load_oc20(tmp_path)
    assert len(found) == 3 and [int(found[i].trajectory) for i in range(3)] == [0, 0, 1]
    for seed in range(3):
        check(found[seed], seed, shift=0.5 + seed)
        assert found[seed].pbc.all() and found[seed].cell[0].diagonal().tolist() == [5, 6, 20]
    (tmp_path / f"1.txt{end}").unlink()
    with pytest.raises(FileNotFoundError, match="reference energies"):
        atoms.load_oc20(tmp_path)


def write_lmdb(path, records):
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(path), subdir=False, map_size=2**24, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for number, record in enumerate(records):
            transaction.put(str(number).encode(), record)
        transaction.put(b"length", pickle.dumps(len(records)))


def oc20_record(seed, names=("y", "force", "atomic_numbers")):
    z, pos, forces, energy = molecule(seed)
    about = {names[0]: energy, names[1]: forces.float(), names[2]: z.float(), "sid": seed, "fid": 7}
    cell, fixed = torch.eye(3)[None] * 9, torch.tensor([1.0, 0, 0, 1])
    data = pyg.Data(pos=pos.float(), cell=cell, natoms=4, fixed=fixed, tags=torch.zeros(4), **about)
    with warnings.catch_warnings():  # of storages, which PyTorch's own pickling of a tensor uses
        warnings.simplefilter("ignore")
        return pickle.dumps(data, protocol=-1)


@pytest.mark.parametrize("names", [("y", "force", "atomic_numbers"), ("energy", "forces", "z")])
def test_oc20_as_preprocessed(tmp_path, names):
    write_lmdb(tmp_path / "data.0000.lmdb", [oc20_record(0, names), oc20_record(1, names)])
    write_lmdb(tmp_path / "data.0001.lmdb", [oc20_record(2, names)])
    found = pickle.loads(pickle.dumps(atoms.load_oc20(tmp_path)))
    assert isinstance(found, LMDBFrames) and len(found) == 3
    for seed in range(3):
        z, pos, forces, energy = molecule(seed)
        frame = found[seed]
        assert torch.equal(frame.z, z) and torch.equal(frame.pos, pos.float().double())
        assert torch.equal(frame.forces, forces.float().double()) and frame.energy.item() == energy
        assert frame.pbc.all() and frame.fixed.tolist() == [True, False, False, True]
    assert found.collate([found[0], found[2]]).num_graphs == 2
    with pytest.raises(IndexError):
        found[3]


def test_a_record_of_an_old_pyg_is_read(tmp_path):
    """Before PyG 2, the pickled state was the graph's attributes themselves."""
    z, pos, forces, energy = molecule(3)
    state = {"pos": pos, "atomic_numbers": z, "cell": torch.eye(3)[None], "force": forces, "y": energy, "x": None}

    class Old:
        def __getstate__(self):
            return state

    Old.__module__, Old.__qualname__, Old.__name__ = "torch_geometric.data.data", "Data", "Data"
    record = io.BytesIO()

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if obj is Old:
                self.write(b"ctorch_geometric.data.data\nData\n")
            else:
                super().save_global(obj, name)

        dispatch = {**pickle._Pickler.dispatch, type: save_global}  # noqa: RUF012

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Pickler(record, protocol=4).dump(Old())
    write_lmdb(tmp_path / "old.lmdb", [record.getvalue()])
    assert torch.equal(LMDBFrames([tmp_path / "old.lmdb"])[0].pos, pos)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_record_cannot_run_code(tmp_path):
    evil = tmp_path / "evil"
    hidden = pyg.Data(pos=torch.zeros(1, 3), note=Hostile(evil))
    storage = b"cos\nmkdir\n(V" + str(evil).encode() + b"\ntR."
    nested = b"ctorch.storage\n_load_from_bytes\n(C" + bytes([len(storage)]) + storage + b"tR."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = [pickle.dumps(Hostile(evil)), pickle.dumps(hidden), nested, oc20_record(0)[:-40], pickle.dumps([1])]
    write_lmdb(tmp_path / "hostile.lmdb", records)
    found = LMDBFrames([tmp_path / "hostile.lmdb"])
    for number, words in enumerate(["posix.mkdir", "posix.mkdir", "", "", "of list"]):
        with pytest.raises(ValueError, match=f"record {number} of .*hostile.lmdb must be a frame of OC20.*{words}"):
            found[number]
    assert not evil.exists()
    pickle.loads(records[0])
    assert evil.exists()  # the record does run code where it may


def test_tensors_of_a_record_stay_in_their_storage(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = pickle.dumps(torch.arange(4.0))
    assert torch.equal(atoms._Unpickler(io.BytesIO(record)).load(), torch.arange(4.0))
    with pytest.raises(ValueError, match="leaves its storage"):
        atoms._Unpickler(io.BytesIO(record.replace(b"K\x04\x85", b"M\x00\x10\x85"))).load()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold"):
        atoms.load_oc20(tmp_path)
    with pytest.raises(FileNotFoundError, match="LMDB files"):
        LMDBFrames([tmp_path / "none.lmdb"])
    (tmp_path / "bad.lmdb").write_bytes(b"no database" * 1000)
    pytest.importorskip("lmdb")
    with pytest.raises(ValueError, match="must be an LMDB file"):
        LMDBFrames([tmp_path / "bad.lmdb"])
