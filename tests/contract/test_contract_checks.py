"""The contract's checks pass a module that keeps it, and each of them catches a module that doesn't."""

import pytest
from contract_checks import CHECKS, DISTRIBUTED, ITEMS
from contract_mutants import MUTANTS, Toy, toy_entry


def _item_of(mutant: str) -> str:
    return max((i for i in ITEMS if mutant.startswith(i)), key=len)


@pytest.mark.parametrize("item", CHECKS)
def test_a_module_that_keeps_the_contract_passes(item):
    CHECKS[item](toy_entry(Toy))


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if _item_of(m) not in DISTRIBUTED])
def test_a_broken_module_is_caught(mutant):
    with pytest.raises(Exception, match=f"(?s){MUTANTS[mutant].expect}"):
        CHECKS[_item_of(mutant)](toy_entry(MUTANTS[mutant]))


def test_every_check_has_a_broken_module():
    assert {_item_of(m) for m in MUTANTS} == set(ITEMS)


def test_no_check_passes_for_want_of_cases():
    for item, field in (("bad_input", "bad_calls"), ("bad_construction", "bad_constructions")):
        with pytest.raises(AssertionError, match=f"the entry has no {field}"):
            CHECKS[item](toy_entry(Toy, **{field: {}}))
    with pytest.raises(AssertionError, match="on record is None"):
        CHECKS["state_dict"](toy_entry(Toy, name="in no file", state=None))
