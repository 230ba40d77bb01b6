import pytest
import torch


@pytest.fixture
def derivatives():
    """``derivatives(function, tensors, cotangents=None)``, of an operation and of its definition along the same."""

    def derivatives(function, tensors, cotangents=None):
        """Value, first and second derivatives, along given or random cotangents, which come back too."""
        cotangents = [] if cotangents is None else list(cotangents)
        given = iter(cotangents)

        def like(t):
            if (found := next(given, None)) is None:
                cotangents.append(found := torch.randn_like(t))
            return found.to(t.dtype)

        value = function(*tensors)
        first = torch.autograd.grad(value, tensors, like(value), create_graph=True)
        second = torch.autograd.grad(first, tensors, [like(t) for t in first])
        return (value, *first, *second), cotangents

    return derivatives
