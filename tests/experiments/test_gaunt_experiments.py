"""The experiments gaunt_tetris and gaunt_potential: shapes, symmetries, runs, resumes, data from files."""

import json
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("ase")
pytest.importorskip("e3nn")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torch_geometric.data")

from torchlayers.data.atoms import Frames, generate
from torchlayers.experiments import gaunt_potential, gaunt_tetris
from torchlayers.training import ConfigError, execute, load_run
from torchlayers.training.compose import compose, parse

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("data.trajectories=2", "data.frames=4", "data.equilibration=2", "data.cache=null", "data.batch_size=2"),
    *("model.channels=4", "model.num_layers=1", "model.cutoff=3.5", "dynamics.steps=4", "trainer.max_steps=4"),
]


def configured(experiment, folder, *overrides):
    keys = ["trainer.device=cpu", "trainer.tensorboard=false", "trainer.log_every=1", "trainer.progress=false"]
    return compose(parse([f"experiment={experiment}", f"run_dir={folder}", *keys, *overrides]), ROOT / "configs")


def last_line(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


# ---- Tetris


def distances(pos):
    return torch.cdist(pos, pos).flatten().sort().values


def test_only_the_mirror_pair_has_equal_distances():
    shapes = {name: torch.tensor(points, dtype=torch.float64) for name, points in gaunt_tetris.SHAPES.items()}
    assert len(shapes) == 8
    same = [
        {a, b}
        for i, a in enumerate(shapes)
        for b in list(shapes)[:i]
        if torch.equal(distances(shapes[a]), distances(shapes[b]))
    ]
    assert same == [{"chiral", "mirrored"}]
    # The pair are mirror images, and no rotation takes one to the other: the signed volume along the path of blocks.
    ends = [shapes[n][[1, 0, 2, 3]].diff(dim=0) for n in ("chiral", "mirrored")]
    assert torch.linalg.det(ends[0]) == -torch.linalg.det(ends[1]) != 0


def tetris(tmp_path, *overrides):
    task = gaunt_tetris.TetrisTask(configured("gaunt_tetris", tmp_path, *overrides))
    model = task.build_model().double()
    for readout in (model.types, model.chirality):
        if readout is not None:
            torch.nn.init.normal_(readout.weight)
    return task, model


@pytest.mark.parametrize("antisymmetric", [True, False])
def test_the_pseudoscalar_turns_with_a_mirror_and_with_nothing_else(tmp_path, antisymmetric):
    task, model = tetris(tmp_path, f"model.antisymmetric={antisymmetric}")
    shapes = [task.build_data().test["tetris"][i] for i in range(16)]  # twice, in other orientations
    found = model(Frames.collate(shapes))
    assert torch.allclose(found[:8], found[8:], rtol=0, atol=1e-9)
    for shape in shapes:
        shape.pos = -shape.pos
    sign = torch.tensor([-1.0] + [1.0] * 6)
    assert torch.allclose(model(Frames.collate(shapes)), found * sign, rtol=0, atol=1e-9)
    assert torch.allclose(found[0], found[1] * sign, rtol=0, atol=1e-9)
    if antisymmetric:
        assert found[:2, 0].abs().min() > 1e-3 and found[2:8, 0].abs().max() < 1e-9  # others are their own images
    else:
        assert torch.equal(found[:, 0], torch.zeros(16, dtype=torch.float64))


@pytest.mark.parametrize(("antisymmetric", "accuracy"), [(True, 1.0), (False, 0.75)])
def test_tetris_is_learnt_with_the_antisymmetric_paths_only(tmp_path, antisymmetric, accuracy):
    overrides = [f"model.antisymmetric={antisymmetric}", "optimizer.lr=3e-2", "trainer.max_steps=80"]
    folder, metrics = execute(configured("gaunt_tetris", tmp_path / "run", *overrides, "data.rotations=2"))
    assert metrics["test/accuracy"] == accuracy
    assert (folder / "plots" / "tetris.png").stat().st_size > 10_000


# ---- the potential


@pytest.mark.parametrize("product", ["gaunt", "oracle"])
def test_the_potential_trains_and_reports(tmp_path, product):
    folder, metrics = execute(configured("gaunt_potential", tmp_path / "run", *TINY, f"model.product={product}"))
    frames = generate(2, 4, equilibration=2, progress=False)
    train, test = frames.split_in_time(0.25)
    assert len(test) == 2
    model = load_run(folder)
    assert model.product == product
    batch = Frames.collate(test.frames)
    with torch.no_grad():
        found = model(batch)
    force = 1000 * (found["forces"] - batch.forces).abs().mean().item()
    energy = 1000 * (found["energy"] - batch.energy).abs().mean().item() / 32
    assert metrics["test/force_mae_mev"] == pytest.approx(force, rel=1e-6)
    assert metrics["test/energy_mae_mev"] == pytest.approx(energy, rel=1e-6)
    assert metrics["test/ms_per_step"] > 0 and 0 <= metrics["test/nve_drift_mev"] < 1000
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    forces = torch.cat([f.forces for f in train])
    assert model.energy_scale.item() == pytest.approx(forces.square().mean().sqrt().item(), rel=1e-6)
    mean = sum(float(f.energy) for f in train) / len(train)
    assert (16 * model.reference_energies.sum()).item() == pytest.approx(mean, rel=1e-6)  # 16 atoms of each
    for name in ("parity.png", "energy_conservation.png", "loss.png"):
        assert (folder / "plots" / name).stat().st_size > 10_000


def test_the_loss_is_of_energies_and_forces(tmp_path):
    task = gaunt_potential.PotentialTask(configured("gaunt_potential", tmp_path, *TINY, "energy_weight=7"))
    data, model = task.build_data(), task.build_model()
    task.prepare(model, data)
    batch = Frames.collate([data.train[0], data.train[3]])
    found = model(batch)
    loss, weight = task.loss(model, batch)
    expected = 0.0
    for k in range(2):
        error = (found["energy"] - batch.energy)[k] / 32 / task.scale
        forces = (found["forces"] - batch.forces)[batch.batch == k] / task.scale
        expected += 7 * error**2 + forces.square().mean()
    assert weight == 2 and loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_dynamics_with_exact_forces_do_not_drift():
    """A model that is a spring, whose trajectory is known: the energy stays, and goes to and fro between its parts."""

    class Springs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.k = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, data):
            return {"energy": (self.k * data.pos.square().sum() / 2)[None], "forces": -self.k * data.pos}

    frame = generate(1, 1, equilibration=0, interval=1, progress=False)[0]
    frame.pos = torch.zeros_like(frame.pos)
    batch = Frames.collate([frame])
    config = gaunt_potential.Dynamics(steps=200, timestep=1.0, temperature=300.0)
    with torch.no_grad():
        trace = gaunt_potential.dynamics(Springs(), batch, config, seed=0)
    total = torch.tensor(trace["total"])
    assert trace["time"][-1] == pytest.approx(0.2) and len(total) == 201
    assert (total - total[0]).abs().max() < 0.01 * max(trace["potential"])
    # kT/2 for each of 96 momenta, three of which are taken out.
    assert trace["kinetic"][0] == pytest.approx(1000 * 1.5 * 8.617333e-5 * 300 * 31 / 32, rel=0.4)
    assert trace["potential"][0] == 0 and max(trace["potential"]) > 0.5 * trace["kinetic"][0]
    assert gaunt_potential._slope([0.0, 1.0, 2.0], [5.0, 7.0, 9.0]) == pytest.approx(2.0)


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    cache = f"data.cache={tmp_path / 'cache'}"
    whole, _ = execute(configured("gaunt_potential", tmp_path / "whole", *TINY, cache, "ema.decay=0.5"))
    part = configured("gaunt_potential", tmp_path / "part", *TINY, cache, "ema.decay=0.5", "checkpoint.every=2")

    class Stop(Exception):
        pass

    original = gaunt_potential.PotentialTask.loss
    calls = iter(range(100))

    def loss(self, model, batch):
        if next(calls) == 3:
            raise Stop
        return original(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaunt_potential.PotentialTask, "loss", loss)
        with pytest.raises(Stop):
            execute(part)
    part.resume = str(tmp_path / "part")
    resumed, _ = execute(part)
    first, second = last_line(whole), last_line(resumed)
    for key in ("loss", "test/force_mae_mev", "test/energy_mae_mev", "test/nve_drift_mev"):
        assert first[key] == second[key], key


def write_3bpa(root):
    isolated = {"H": -13.5, "C": -1029.25}
    for name, n in (("train_300K", 4), ("test_300K", 2), ("test_600K", 3)):
        text = ""
        for i in range(n):
            pos = torch.tensor([[0.0, 0, 0], [1.09 + 0.02 * i, 0, 0]])
            energy = sum(isolated.values()) - 3.0 + 0.1 * i
            rows = [
                f"{s} {p[0]} {p[1]} {p[2]} {f} 0 0" for s, p, f in zip("CH", pos.tolist(), (0.5, -0.5), strict=True)
            ]
            head = f'Properties=species:S:1:pos:R:3:forces:R:3 energy={energy} pbc="F F F"'
            text += "\n".join(["2", head, *rows]) + "\n"
        (root / f"{name}.xyz").write_text(text)
    lines = [f"1\nProperties=species:S:1:pos:R:3 energy={e}\n{s} 0 0 0\n" for s, e in isolated.items()]
    (root / "iso_atoms.xyz").write_text("".join(lines))


def test_3bpa_from_a_folder(tmp_path):
    write_3bpa(tmp_path)
    overrides = [
        *("data.source=3bpa", f"data.root={tmp_path}", "data.test_splits=[test_300K,test_600K]", "model.species=[H,C]"),
        *("model.channels=4", "model.num_layers=1", "dynamics.steps=0", "trainer.max_steps=2", "data.batch_size=2"),
    ]
    config = configured("gaunt_potential", tmp_path / "run", *overrides)
    data = gaunt_potential.PotentialTask(config).build_data()
    assert len(data.train) == 4 and list(data.test) == ["test_300K", "test_600K"]
    assert data.train[2].energy.item() == pytest.approx(-2.8, abs=1e-9)
    _, metrics = execute(config)
    parts = [metrics[f"test/force_mae_mev_{name}"] for name in ("test_300K", "test_600K")]
    assert metrics["test/force_mae_mev"] == pytest.approx((2 * parts[0] + 3 * parts[1]) / 5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.product=e3nn"], "model.product must be one of 'gaunt', 'oracle'"),
        (["data.source=3bpa"], "data.root must name a folder"),
        (["data.source=rmd17"], "data.source must be one of"),
        (["model.species=[Cu,Xx]"], "model.species must be chemical symbols"),
        (["model.species=[Cu,Fe]", *TINY], "symbols must be one of"),
        (["dynamics.steps=-1"], "dynamics.steps must be at least 0"),
    ],
)
def test_mistakes_are_named(tmp_path, overrides, words):
    with pytest.raises((ConfigError, ValueError), match=words):
        execute(configured("gaunt_potential", tmp_path / "run", *overrides))
