"""Every public module keeps the layer contract: contract_checks.py says what it is, contract_entries.py for whom."""

import importlib
import inspect
import json

import contract_mutants
import contract_world
import pytest
from contract_checks import CHECKS, ITEMS, NAMES_FILE
from contract_entries import ENTRIES, NO_ENTRY
from torch import nn

import torchlayers

CELLS = [
    pytest.param(entry, name, id=f"{entry.name}-{name}", marks=[pytest.mark.slow] if name in entry.slow else [])
    for entry in ENTRIES
    for name in CHECKS
    if name not in entry.not_applicable
]


@pytest.mark.parametrize(("entry", "item"), CELLS)
def test_contract(entry, item):
    CHECKS[item](entry)


@pytest.mark.distributed
def test_data_parallel(tmp_path):
    """DDP and FSDP2 train as one process does; the two modules that cannot are caught, in the same world."""
    found = contract_world.failures({"contract_entries": 60, "contract_mutants": 5}, tmp_path)
    expected = {f"{name} {name.split('_')[0]}" for name in contract_mutants.DATA_PARALLEL}
    unexpected = {name: error for name, error in found.items() if name not in expected}
    assert not unexpected, "\n".join(f"{name}:\n{error}" for name, error in unexpected.items())
    assert expected <= set(found), f"not caught: {expected - set(found)}"


def _public_modules():
    """Module classes among the public names of torchlayers and of its families."""
    found = {}
    places = [torchlayers] + [importlib.import_module(f"torchlayers.{name}") for name in torchlayers._SUBMODULES]
    for place in places:
        for name in getattr(place, "__all__", ()):
            value = getattr(place, name)
            if inspect.isclass(value) and issubclass(value, nn.Module):
                found[value] = f"{place.__name__}.{name}"
    return found


def test_every_public_module_is_under_contract():
    public = _public_modules()
    known = {e.module for e in ENTRIES} | NO_ENTRY.keys()
    missing = [name for cls, name in public.items() if cls not in known]
    assert not missing, f"without an entry in contract_entries.py: {missing}"
    assert NO_ENTRY.keys() <= public.keys() and all(NO_ENTRY.values())


def test_entries_are_in_order():
    names = [e.name for e in ENTRIES]
    assert len(set(names)) == len(names)
    for entry in ENTRIES:
        assert entry.name.split("[")[0] == entry.module.__name__
        assert {*entry.not_applicable, *entry.slow} <= set(ITEMS), f"{entry.name}: no such items"
        for item, reason in entry.not_applicable.items():
            assert isinstance(reason, str) and reason.strip(), f"{entry.name}: no reason why {item} is not applicable"
    # What is slow for one variant runs for another one by default.
    for cls in {e.module for e in ENTRIES}:
        always = [set(e.slow) for e in ENTRIES if e.module is cls]
        assert not set.intersection(*always), f"{cls.__name__}: left to the slow run for all its entries"
    assert set(json.loads(NAMES_FILE.read_text())) == {e.name for e in ENTRIES if "state_dict" not in e.not_applicable}
