"""Every module turns its output with its input, under rotations and under inversion, in float64."""

import pytest
import torch

from torchlayers.gaunt.irreps import e3nn_o3
from torchlayers.gaunt.modules import (
    GauntConv,
    GauntSelfInteraction,
    GauntSymmetricContraction,
    GauntTensorProduct,
)
from torchlayers.testing import assert_equivariant

MIXED = "2x0e+2x0o+2x1e+2x1o+2x2e+2x3e"


@pytest.fixture(autouse=True)
def _float64():
    # e3nn makes the matrices of representations in the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def group_elements():
    """Rotations without and with the inversion, and the inversion alone."""
    o3 = e3nn_o3()
    return [o3.rand_matrix(), o3.rand_matrix(), -o3.rand_matrix(), -torch.eye(3)]


def check(module, args, irreps):
    """``irreps`` has one entry an argument: its irreps, or None for what does not turn."""
    o3 = e3nn_o3()
    for element in group_elements():
        matrices = [None if i is None else o3.Irreps(i).D_from_matrix(element) for i in (*irreps, module.irreps_out)]
        *turned, out = [None if m is None else (lambda v, m=m: v @ m.T) for m in matrices]
        assert_equivariant(module, args, turned, out, tol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"antisymmetric": True},
        {"antisymmetric": True, "rank": 3},
        {"antisymmetric": True, "connection": "uvu"},
        {"antisymmetric": True, "connection": "uvw"},
    ],
    ids=str,
)
def test_tensor_product(options):
    second = MIXED if options.get("connection") is None else "3x0e+1x1e+2x1o"
    module = GauntTensorProduct(MIXED, second, **options)
    args = (module.irreps_in1.randn(3, -1), module.irreps_in2.randn(3, -1))
    check(module, args, (module.irreps_in1, module.irreps_in2))


@pytest.mark.parametrize("irreps", ["2x1o", "2x0o+2x2o", "2x1e+2x1o"])
def test_irreps_without_some_degrees(irreps):
    module = GauntTensorProduct(irreps, irreps, antisymmetric=True)
    args = (module.irreps_in1.randn(3, -1), module.irreps_in2.randn(3, -1))
    check(module, args, (irreps, irreps))


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_self_interaction(antisymmetric):
    module = GauntSelfInteraction(MIXED, rank=2, antisymmetric=antisymmetric)
    check(module, (module.irreps_in.randn(3, -1),), (MIXED,))


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_conv(antisymmetric):
    module = GauntConv(MIXED, 2, MIXED, antisymmetric=antisymmetric)
    edge_index = torch.randint(4, (2, 9))
    args = (module.irreps_in.randn(4, -1), torch.randn(9, 3), edge_index, torch.randn(9, module.weight_numel))
    check(module, args, (MIXED, "1o", None, None))


@pytest.mark.parametrize("irreps", ["2x0e+2x1o+2x2e", "2x0o+2x1e", "2x0e+2x0o+2x1e+2x1o"])
def test_symmetric_contraction(irreps):
    components = e3nn_o3().Irreps([(1, ir) for _, ir in e3nn_o3().Irreps(irreps)])
    module = GauntSymmetricContraction(irreps, irreps, 3, 2)
    x = torch.randn(3, 2, components.dim)
    check(module, (x, torch.tensor([0, 1, 1])), (components, None))


def test_a_product_with_parities_mixed_up_is_caught():
    """The check itself: a pseudo-vector declared as a vector turns rightly under rotations alone."""
    module = GauntTensorProduct("2x1o", "2x1o", "2x1e", antisymmetric=True)
    args = (module.irreps_in1.randn(3, -1), module.irreps_in2.randn(3, -1))
    check(module, args, ("2x1o", "2x1o"))
    module.irreps_out = e3nn_o3().Irreps("2x1o")
    with pytest.raises(AssertionError, match="not equivariant"):
        check(module, args, ("2x1o", "2x1o"))
