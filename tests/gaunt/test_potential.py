"""The potential: neighbours against ASE, symmetries, forces and stress against finite differences, dynamics."""

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ase = pytest.importorskip("ase")
pytest.importorskip("e3nn")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pyg = pytest.importorskip("torch_geometric.data")

from torchlayers.gaunt import GauntPotential  # noqa: E402
from torchlayers.gaunt.calculator import GauntCalculator  # noqa: E402
from torchlayers.gaunt.irreps import e3nn_o3  # noqa: E402
from torchlayers.gaunt.potential import (  # noqa: E402
    RadialNetwork,
    bessel_basis,
    neighbor_list,
    polynomial_cutoff,
    reference_energies,
)

KINDS = [("gaunt", False), ("gaunt", True), ("oracle", False), ("oracle", True)]
CELL = torch.tensor([[3.9, 0.2, 0.0], [-0.5, 4.1, 0.3], [0.1, 0.6, 4.4]], dtype=torch.float64)


def small_model(product="gaunt", antisymmetric=False, **options):
    defaults = {"lmax": 2, "channels": 3, "num_layers": 2, "radial_hidden": [8], "reference_energies": [-1.5, 2.0]}
    defaults |= {"cutoff": 3.0, "average_neighbors": 4.0, "dtype": torch.float64}
    return GauntPotential([6, 8], product=product, antisymmetric=antisymmetric, **(defaults | options))


def cluster(n=5, seed=0, spread=1.0):
    random = torch.Generator().manual_seed(seed)
    pos = spread * torch.randn(n, 3, generator=random, dtype=torch.float64)
    return pyg.Data(z=torch.tensor([6, 8])[torch.randint(2, (n,), generator=random)], pos=pos)


def crystal(n=4, seed=0, pbc=(True, True, True)):
    random = torch.Generator().manual_seed(seed)
    pos = torch.rand(n, 3, generator=random, dtype=torch.float64) @ CELL
    z = torch.tensor([6, 8])[torch.randint(2, (n,), generator=random)]
    return pyg.Data(z=z, pos=pos, cell=CELL[None].clone(), pbc=torch.tensor([pbc]))


def moved(data, **changes):
    data = data.clone()
    for name, value in changes.items():
        data[name] = value
    return data


def energy(model, data):
    with torch.no_grad():
        return model(data)["energy"]


# ------------------------------------------------------------------------------------------------------ neighbours


def ase_edges(pos, cutoff, cell=None, pbc=(False,) * 3):
    from ase.neighborlist import neighbor_list as by_ase

    atoms = ase.Atoms("H" * len(pos), pos.numpy(), cell=None if cell is None else cell.numpy(), pbc=pbc)
    target, source, shift = by_ase("ijS", atoms, cutoff)
    return sorted((int(s), int(t), *map(int, v)) for s, t, v in zip(source, target, shift, strict=True))


def our_edges(pos, cutoff, **options):
    edge_index, shifts = neighbor_list(pos, cutoff, **options)
    return [(*edge, *shift) for edge, shift in zip(edge_index.T.tolist(), shifts.tolist(), strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    cutoff=st.floats(0.5, 4.0),
    size=st.floats(1.0, 8.0),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_neighbours_are_those_of_ase(n, seed, cutoff, size, pbc):
    """Skewed cells, also much smaller than the cutoff; atoms inside and outside of them; any directions that repeat."""
    random = torch.Generator().manual_seed(seed)
    cell = size * (torch.eye(3, dtype=torch.float64) + 0.25 * torch.randn(3, 3, generator=random, dtype=torch.float64))
    while abs(torch.linalg.det(cell)) < 0.2 * size**3:
        cell = cell + 0.3 * size * torch.eye(3, dtype=torch.float64)
    pos = size * torch.randn(n, 3, generator=random, dtype=torch.float64)
    found = our_edges(pos, cutoff, cell=cell[None], pbc=torch.tensor([pbc]))
    assert sorted(found) == ase_edges(pos, cutoff, cell, pbc)
    assert [(t, s) for s, t, *_ in found] == sorted((t, s) for s, t, *_ in found)


def test_neighbours_of_a_batch_stay_in_their_structure():
    parts = [crystal(3), cluster(6), crystal(2, 1, (True, False, False)), cluster(1)]
    cells = [CELL, torch.zeros(3, 3, dtype=torch.float64), CELL, CELL]
    pbc = [(True,) * 3, (False,) * 3, (True, False, False), (False,) * 3]
    pos = torch.cat([p.pos for p in parts])
    batch = torch.repeat_interleave(torch.tensor([len(p.pos) for p in parts]))
    found = our_edges(pos, 4.5, batch=batch, cell=torch.stack(cells), pbc=torch.tensor(pbc))
    expected, first = [], 0
    for part, cell, repeats in zip(parts, cells, pbc, strict=True):
        edges = ase_edges(part.pos, 4.5, cell if any(repeats) else None, repeats)
        expected += [(s + first, t + first, *shift) for s, t, *shift in edges]
        first += len(part.pos)
    assert sorted(found) == sorted(expected) and len(found) > 50


def test_neighbours_where_atoms_are_few_far_or_in_one_place():
    def at(*points):
        return torch.tensor(points, dtype=torch.float64).reshape(-1, 3)

    assert our_edges(at(), 1.0) == [] and our_edges(at((0, 0, 0)), 1.0) == []
    assert our_edges(at((0, 0, 0), (1e6, -1e6, 1e6), (1e6, -1e6, 1e6 + 0.5)), 1.0) == [(2, 1, 0, 0, 0), (1, 2, 0, 0, 0)]
    assert our_edges(at((0, 0, 0), (0, 0, 0)), 1.0) == [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0)]
    assert our_edges(at((0, 0, 0), (1, 0, 0)), 1.0) == []  # exactly at the cutoff


def test_neighbours_refuse_what_has_none():
    pos = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="finite"):
        neighbor_list(torch.full((2, 3), math.nan), 1.0)
    with pytest.raises(ValueError, match="cutoff must be positive"):
        neighbor_list(pos, 0.0)
    flat = torch.tensor([[[1.0, 0, 0], [2.0, 0, 0], [0, 0, 1.0]]])
    with pytest.raises(ValueError, match=r"linearly independent.*in structure 0"):
        neighbor_list(pos, 1.0, cell=flat, pbc=torch.tensor([[True, True, True]]))
    neighbor_list(pos, 1.0, cell=flat, pbc=torch.tensor([[True, False, True]]))
    with pytest.raises(ValueError, match="cell must be given"):
        neighbor_list(pos, 1.0, pbc=torch.tensor([[True, True, True]]))


# ---------------------------------------------------------------------------------------------------- radial parts


def test_the_cutoff_has_two_continuous_derivatives():
    r = torch.tensor([1e-9, 2.5, 3.0 - 1e-7, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    value = polynomial_cutoff(r, 3.0)
    slope = torch.autograd.grad(value.sum(), r, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), r)[0]
    assert value[0] == 1 and 0.01 < value[1] < 0.5
    for derivative, bound in ((value, 1e-13), (slope, 1e-12), (curvature, 1e-5)):
        assert derivative[2:].abs().max() < bound
    assert torch.autograd.gradcheck(lambda x: polynomial_cutoff(x, 3.0), r)


def test_bessel_functions_are_orthonormal_in_the_ball():
    r = torch.linspace(0, 2.0, 4001, dtype=torch.float64)
    basis = bessel_basis(r, 2.0, 4) * r[:, None]
    products = torch.trapezoid(basis[:, :, None] * basis[:, None], r, dim=0)
    assert torch.allclose(products, torch.eye(4, dtype=torch.float64), atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda x: bessel_basis(x, 2.0, 3), torch.tensor([0.0, 0.7], requires_grad=True).double()
    )


def test_radial_networks_vanish_at_the_cutoff():
    network = RadialNetwork(3.0, 5, dtype=torch.float64)
    assert network(torch.tensor([3.0, 5.0], dtype=torch.float64)).abs().max() == 0
    assert network(torch.linspace(0.5, 2.5, 50, dtype=torch.float64)).std() > 0.01


# ------------------------------------------------------------------------------------------------------ symmetries


@pytest.mark.parametrize(("product", "antisymmetric"), KINDS)
@pytest.mark.parametrize("make", [cluster, crystal])
def test_energy_is_invariant_and_forces_turn_along(product, antisymmetric, make):
    model, data = small_model(product, antisymmetric).eval(), make(5)
    before = model(data)
    rotation = -e3nn_o3().rand_matrix(dtype=torch.float64)  # with an inversion
    changes = {"pos": data.pos @ rotation.T + 0.7}
    if make is crystal:
        changes["cell"] = data.cell @ rotation.T
    turned = model(moved(data, **changes))
    assert before["forces"].norm() > 0.01
    assert torch.allclose(turned["energy"], before["energy"], rtol=0, atol=1e-10)
    assert torch.allclose(turned["forces"], before["forces"] @ rotation.T, rtol=0, atol=1e-10)
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = model(moved(data, pos=data.pos[order], z=data.z[order]))
    assert torch.allclose(permuted["energy"], before["energy"], rtol=0, atol=1e-10)
    assert torch.allclose(permuted["forces"], before["forces"][order], rtol=0, atol=1e-10)
    assert before["forces"].sum(0).abs().max() < 1e-10


def test_the_energy_depends_on_elements_and_on_the_antisymmetric_paths():
    data = cluster(5)
    model = small_model()
    assert abs(energy(model, data) - energy(model, moved(data, z=14 - data.z))).item() > 1e-3
    torch.manual_seed(0)
    full = small_model(antisymmetric=True)
    before = energy(full, data)
    with torch.no_grad():  # the filters of brackets come last in each row of the radial networks
        conv = full.layers[1].conv
        bracket = sum(full.channels * len(c.degrees2) for c in conv.couplings if c.antisymmetric)
        start = 0
        for c in conv.couplings:
            size = full.channels * len(c.degrees2)
            if c.antisymmetric:
                full.layers[1].radial.layers[-1].weight[start : start + size] *= 2
            start += size
    assert bracket > 0 and abs(energy(full, data) - before).item() > 1e-6


@pytest.mark.parametrize("product", ["gaunt", "oracle"])
def test_a_batch_is_its_structures_one_by_one(product):
    model = small_model(product).eval()
    parts = [crystal(3), crystal(4, 1, (True, False, True)), crystal(2, 2, (False, False, False))]
    whole = model(pyg.Batch.from_data_list(parts))
    single = [model(part) for part in parts]
    assert whole["energy"].shape == (3,) and whole["forces"].shape == (9, 3)
    assert torch.allclose(whole["energy"], torch.cat([s["energy"] for s in single]), rtol=0, atol=1e-10)
    assert torch.allclose(whole["forces"], torch.cat([s["forces"] for s in single]), rtol=0, atol=1e-10)


def test_forms_of_cell_and_pbc_that_batches_have():
    model = small_model().eval()
    data = crystal(3)
    expected = energy(model, data)
    flat = [pyg.Data(z=data.z, pos=data.pos, cell=CELL, pbc=torch.tensor([True] * 3)) for _ in range(2)]
    batch = pyg.Batch.from_data_list(flat)
    assert batch.cell.shape == (6, 3) and batch.pbc.shape == (6,)
    assert torch.allclose(energy(model, batch), expected.expand(2), rtol=0, atol=1e-12)
    one = pyg.Batch.from_data_list([pyg.Data(z=data.z, pos=data.pos, cell=CELL[None], pbc=True) for _ in range(3)])
    assert torch.allclose(energy(model, one), expected.expand(3), rtol=0, atol=1e-12)
    assert torch.equal(energy(model, pyg.Data(z=data.z, pos=data.pos, cell=CELL)), expected)  # a cell repeats


def test_a_supercell_has_as_many_times_the_energy():
    model, data = small_model().eval(), crystal(2)
    unit = ase.Atoms(data.z.numpy(), data.pos.numpy(), cell=CELL.numpy(), pbc=True)
    large = unit * (2, 1, 2)
    both = [
        pyg.Data(
            z=torch.tensor(a.numbers).long(),
            pos=torch.tensor(a.positions),
            cell=torch.tensor(a.cell.array)[None],
            pbc=True,
        )
        for a in (unit, large)
    ]
    assert torch.allclose(4 * energy(model, both[0]), energy(model, both[1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("product", ["gaunt", "oracle"])
@pytest.mark.parametrize("training", [True, False])
def test_isolated_atoms_have_their_reference_energies(product, training):
    model = small_model(product).train(training)
    data = pyg.Batch.from_data_list(
        [pyg.Data(z=torch.tensor([z]), pos=torch.zeros(1, 3, dtype=torch.float64)) for z in (6, 8)]
        + [pyg.Data(z=torch.tensor([8, 8]), pos=torch.tensor([[0.0, 0, 0], [9.0, 0, 0]], dtype=torch.float64))]
    )
    found = model(data)
    assert torch.allclose(found["energy"], torch.tensor([-1.5, 2.0, 4.0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(found["forces"], torch.zeros(4, 3, dtype=torch.float64))
    if training:
        (found["energy"].sum() + found["forces"].square().sum()).backward()
    none = model(SimpleNamespace(z=torch.zeros(0, dtype=torch.int64), pos=torch.zeros(0, 3)))
    assert none["energy"].tolist() == [0] and none["forces"].shape == (0, 3)


@pytest.mark.parametrize("product", ["gaunt", "oracle"])
def test_energy_is_smooth_where_an_atom_crosses_the_cutoff(product):
    model = small_model(product).eval()
    base = cluster(4, spread=0.8)
    away = torch.tensor([[2.0, 1.0, -0.5]], dtype=torch.float64)
    away = base.pos[:1] + away / away.norm() * 3.0

    def at(distance):
        step = (away - base.pos[:1]) / 3.0 * (distance - 3.0)
        data = pyg.Data(z=torch.cat((base.z, torch.tensor([6]))), pos=torch.cat((base.pos, away + step)))
        return model(data)

    # Others may be nearer than the first: what counts is that nothing jumps, whichever pair crosses.
    for h, bound in ((1e-3, 1e-5), (1e-4, 1e-8)):
        below, middle, above = (at(3.0 + k * h) for k in (-1, 0, 1))
        second = below["energy"] - 2 * middle["energy"] + above["energy"]
        assert abs(second.item()) < bound + 10 * h**2
        assert (below["forces"] - 2 * middle["forces"] + above["forces"]).abs().max() < 100 * h**2 + 10 * h**2
    pair = [
        model(pyg.Data(z=torch.tensor([6, 8]), pos=torch.tensor([[0.0, 0, 0], [0, d, 0]], dtype=torch.float64)))
        for d in (3.0 - 1e-3, 3.0 - 1e-4)
    ]
    near, nearer = (abs(p["energy"].item() - 0.5) for p in pair)
    assert near < 1e-7 and nearer < max(near / 100, 1e-12) and pair[1]["forces"].abs().max() < 1e-6


# ----------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize(("product", "antisymmetric"), KINDS)
def test_forces_are_the_slope_of_the_energy(product, antisymmetric):
    model, data, h = small_model(product, antisymmetric).eval(), crystal(3), 1e-5
    forces = model(data)["forces"]
    for atom in range(3):
        for axis in range(3):
            step = torch.zeros_like(data.pos)
            step[atom, axis] = h
            slope = (
                energy(model, moved(data, pos=data.pos + step)) - energy(model, moved(data, pos=data.pos - step))
            ) / (2 * h)
            assert slope.item() == pytest.approx(-forces[atom, axis].item(), rel=1e-6, abs=1e-7)


def test_stress_is_the_slope_by_strain():
    model, h = small_model().eval(), 1e-5
    data = pyg.Batch.from_data_list([crystal(3), crystal(2, 1)])
    found = model(data, stress=True)["stress"]
    volume = torch.linalg.det(CELL)
    assert found.shape == (2, 3, 3) and torch.allclose(found, found.mT, atol=1e-12)
    for i in range(3):
        for j in range(3):
            strain = torch.zeros(3, 3, dtype=torch.float64)
            strain[i, j] = h
            energies = [
                energy(
                    model, moved(data, pos=data.pos + s * data.pos @ strain, cell=data.cell + s * data.cell @ strain)
                )
                for s in (1, -1)
            ]
            slope = (energies[0] - energies[1]) / (2 * h * volume)
            assert torch.allclose(slope, found[:, i, j], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="cell for a stress"):
        model(cluster(), stress=True)


@pytest.mark.parametrize("product", ["gaunt", "oracle"])
def test_a_loss_on_forces_has_its_gradient(product):
    model, data = small_model(product), crystal(3)

    def loss():
        found = model(data)
        return (found["forces"] - 0.3).square().sum() + found["energy"].square().sum()

    loss().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        direction = torch.randn_like(parameter)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * 1e-5 * direction
                with torch.enable_grad():
                    values.append(loss().item())
                parameter -= sign * 1e-5 * direction
        slope = (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-5, abs=1e-6), name


def test_training_mode_keeps_the_graph_and_eval_mode_does_not():
    model, data = small_model(), cluster()
    train = model(data)
    assert train["forces"].requires_grad and train["energy"].requires_grad
    evaluated = model.eval()(data)
    assert not evaluated["forces"].requires_grad
    evaluated["energy"].sum().backward()  # the energy can still be differentiated
    assert torch.allclose(evaluated["forces"], train["forces"])
    for mode in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            with mode():
                found = model.train(training)(data.clone())
            assert not found["forces"].requires_grad and not found["energy"].requires_grad
            assert torch.allclose(found["forces"], train["forces"])
    assert not data.pos.requires_grad and data.pos.grad is None


def test_positions_that_require_gradients_have_second_derivatives():
    model, data = small_model(), cluster(3, spread=1.0)
    data.pos.requires_grad_()
    forces = model(data)["forces"]
    row = torch.autograd.grad(forces[0, 0], data.pos)[0]
    h = 1e-5
    step = torch.zeros_like(row)
    step[2, 1] = h
    with torch.no_grad():
        after, before = (model(moved(data, pos=data.pos + s * step))["forces"][0, 0] for s in (1, -1))
    assert row[2, 1].item() == pytest.approx((after - before).item() / (2 * h), rel=1e-5, abs=1e-8)


def test_coincident_atoms_have_finite_forces():
    model = small_model().eval()
    found = model(pyg.Data(z=torch.tensor([6, 6]), pos=torch.zeros(2, 3, dtype=torch.float64)))
    assert found["energy"].isfinite() and found["forces"].isfinite().all()


def test_coefficients_stay_exact_where_the_model_is_cast():
    model, data = small_model("oracle", dtype=torch.float32).half().double().eval(), cluster()
    rotation = e3nn_o3().rand_matrix(dtype=torch.float64)
    turned = energy(model, moved(data, pos=data.pos @ rotation.T))
    assert torch.allclose(turned, energy(model, data), rtol=0, atol=1e-12)


def test_results_have_the_dtype_of_positions():
    model, data = small_model(dtype=torch.float32).eval(), cluster()
    double = model(data)
    single = model(moved(data, pos=data.pos.float()))
    assert double["energy"].dtype == double["forces"].dtype == torch.float64
    assert single["energy"].dtype == single["forces"].dtype == torch.float32
    assert torch.allclose(single["forces"].double(), double["forces"], rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(data)["forces"], double["forces"])


# ------------------------------------------------------------------------------------------------------------ ASE


def atoms_and_data():
    data = crystal(4)
    return ase.Atoms(data.z.numpy(), data.pos.numpy(), cell=CELL.numpy(), pbc=True), data


def test_the_calculator_gives_what_the_model_does():
    model = small_model(dtype=torch.float32)
    atoms, data = atoms_and_data()
    atoms.calc = GauntCalculator(model)
    assert not model.training
    found = model(data, stress=True)
    assert atoms.get_potential_energy() == pytest.approx(found["energy"].item(), abs=1e-12)
    assert torch.allclose(torch.tensor(atoms.get_forces()), found["forces"])
    stress = found["stress"][0]
    assert torch.allclose(torch.tensor(atoms.get_stress(voigt=False)), stress, atol=1e-12)
    assert atoms.get_stress()[3] == pytest.approx(stress[1, 2].item()) and atoms.get_stress()[5] == pytest.approx(
        stress[0, 1].item()
    )
    atoms.positions += 0.1  # a translation: a new calculation with the same energy
    assert atoms.get_potential_energy() == pytest.approx(found["energy"].item(), abs=1e-4)
    molecule = ase.Atoms("CO", [(0, 0, 0), (1.1, 0, 0)], calculator=GauntCalculator(model))
    assert molecule.get_forces().shape == (2, 3)
    with pytest.raises(NotImplementedError, match="cell of three lattice vectors"):
        molecule.get_stress()


def test_dynamics_keep_the_energy_to_second_order():
    from ase.md.verlet import VelocityVerlet

    worst, exchanged = [], []
    for timestep, steps in ((0.5, 60), (0.25, 120)):
        atoms, _ = atoms_and_data()
        atoms.calc = GauntCalculator(small_model_seeded())
        atoms.set_momenta(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double().numpy())
        dynamics = VelocityVerlet(atoms, timestep * ase.units.fs)
        total, kinetic = [atoms.get_total_energy()], [atoms.get_kinetic_energy()]
        for _ in range(steps):
            dynamics.run(1)
            total.append(atoms.get_total_energy())
            kinetic.append(atoms.get_kinetic_energy())
        worst.append(max(abs(e - total[0]) for e in total))
        exchanged.append(max(kinetic) - min(kinetic))
    assert exchanged[0] > 0.01 and worst[0] < 0.01 * exchanged[0]
    assert worst[1] < 0.35 * worst[0]  # a quarter, to leading order


def small_model_seeded():
    torch.manual_seed(3)
    return small_model()


# ------------------------------------------------------------------------------------------------ as a module


def test_it_is_saved_copied_and_drawn_anew():
    model, data = small_model(energy_scale=2.0), cluster()
    expected = model(data)["energy"]
    other = small_model(reference_energies=None)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(data)["energy"], expected)
    names = set(model.state_dict())
    assert {"reference_energies", "energy_scale", "average_neighbors", "embedding"} <= names and "elements" not in names
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.reset_parameters()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert model.energy_scale.item() == 2.0
    meta = small_model(device="meta")
    assert all(p.is_meta for p in [*meta.parameters(), *meta.buffers()])
    assert "species=[6, 8]" in repr(model)


def test_energy_scale_and_references_are_units():
    model, data = small_model(), cluster()
    first = model(data)
    model.set_statistics([0.0, 0.0], energy_scale=3.0)
    second = model(data)
    shift = (data.z == 6).sum() * -1.5 + (data.z == 8).sum() * 2.0
    assert torch.allclose(second["energy"], 3 * (first["energy"] - shift))
    assert torch.allclose(second["forces"], 3 * first["forces"])
    with pytest.raises(ValueError, match="one for each of 2 species"):
        model.set_statistics([1.0])
    with pytest.raises(ValueError, match="energy_scale must be positive"):
        model.set_statistics(energy_scale=0.0)


def test_reference_energies_fit_compositions():
    frames = []
    for counts in ((1, 2), (3, 1), (2, 2), (0, 4)):
        z = torch.tensor([6] * counts[0] + [8] * counts[1])
        frames.append(SimpleNamespace(z=z, energy=torch.tensor([counts[0] * -3.0 + counts[1] * 5.0])))
    assert reference_energies(frames, [6, 8]) == pytest.approx([-3.0, 5.0])
    assert reference_energies(frames[2:3], [6, 8]) == pytest.approx([1.0, 1.0])  # of one composition
    with pytest.raises(ValueError, match="every element"):
        reference_energies(frames, [6])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"z": torch.tensor([6, 7, 8, 6, 6])}, ValueError, r"species \[6, 8\], got \[7\]"),
        ({"z": torch.tensor([6, 200, 8, 6, 6])}, ValueError, r"got \[200\]"),
        ({"z": torch.tensor([6, 8])}, ValueError, "data.z must have shape"),
        ({"z": torch.ones(5)}, TypeError, "data.z must be integers"),
        ({"z": [6] * 5}, TypeError, "data.z must be a tensor"),
        ({"pos": torch.zeros(5, 2)}, ValueError, "coordinates = 3"),
        ({"pos": torch.zeros(5, 3, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"pos": torch.full((5, 3), math.inf)}, ValueError, "finite"),
        ({"cell": torch.eye(2)}, ValueError, "data.cell must have shape"),
        ({"pbc": torch.tensor([True, True, True])}, ValueError, "data.cell must be given"),
        ({"cell": torch.eye(3), "pbc": torch.tensor([True, True])}, ValueError, "data.pbc must have shape"),
    ],
)
def test_inputs_that_do_not_fit_are_named(changes, error, words):
    data = SimpleNamespace(**({"z": torch.tensor([6, 8, 8, 6, 6]), "pos": torch.randn(5, 3)} | changes))
    with pytest.raises(error, match=words):
        small_model()(data)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"species": []}, ValueError, "species must be different atomic numbers"),
        ({"species": [6, 6]}, ValueError, "species must be different atomic numbers"),
        ({"species": [0]}, ValueError, "at least 1"),
        ({"species": [300]}, ValueError, "from 1 to 118"),
        ({"cutoff": -1.0}, ValueError, "cutoff must be positive"),
        ({"product": "cg"}, ValueError, "product must be one of"),
        ({"channels": 0}, ValueError, "channels must be at least 1"),
        ({"lmax": 1.5}, TypeError, "lmax must be an int"),
        ({"reference_energies": [1.0]}, ValueError, "one for each of 2 species"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, error, words):
    with pytest.raises(error, match=words):
        GauntPotential(**({"species": [6, 8], "cutoff": 3.0, "lmax": 1, "channels": 2} | options))
