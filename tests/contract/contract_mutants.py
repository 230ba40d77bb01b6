"""A module that keeps the whole contract, and modules that each break one item of it on purpose."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from contract_checks import Entry
from torch import nn


class Toy(nn.Module):
    """A linear map, then a scale for each feature: ``y = s * (W x)``.

    The map is that of any textbook, section 1.

    Args:
        features: entries of the last dimension of the input and of the output.

    Raises:
        ValueError: ``features`` is below 1, or ``x`` has another number of features.

    Shape:
        (..., features) -> (..., features)

    Example::

        import torch
        from contract_mutants import Toy

        assert Toy(4)(torch.randn(2, 4)).shape == (2, 4)
    """

    def __init__(self, features, *, device=None, dtype=None):
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.features = features
        self.weight = nn.Parameter(torch.empty(features, features, device=device, dtype=dtype))
        self.inner = nn.Linear(features, features, device=device, dtype=dtype)
        self.register_buffer("scale", torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        nn.init.constant_(self.scale, 2.0)
        self.inner.reset_parameters()

    def extra_repr(self):
        return f"features={self.features}"

    def check(self, x):
        if x.shape[-1] != self.features:
            raise ValueError(f"x must have features = {self.features} entries, got {x.shape[-1]}")

    def forward(self, x):
        self.check(x)
        return self.inner(nn.functional.linear(x, self.weight)) * self.scale


class Wrong:
    """One class a fault, named after the item that must notice it; ``expect`` is how the check says so."""

    class device_and_dtype_ignored(Toy):
        expect = r"weight is torch\.float32"

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            self.weight = nn.Parameter(torch.randn(features, features))

        def forward(self, x):
            return self.inner((x.to(self.weight.dtype) @ self.weight.T).to(x.dtype)) * self.scale

    class gradcheck_computes_in_float32(Toy):
        expect = "Jacobian mismatch"

        def forward(self, x):
            return super().forward(x) + (x.float().sin() - x.sin())

    class device_and_dtype_positional_only_dtype(Toy):
        expect = "no keyword device"

        def __init__(self, features, **options):
            super().__init__(features, **options)

    class meta_buffer_not_reset(Toy):
        expect = "does not reach all of scale"

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            nn.init.constant_(self.scale, 2.0)

        def reset_parameters(self):
            nn.init.normal_(self.weight)
            self.inner.reset_parameters()

    class meta_child_not_reset(Toy):
        expect = r"does not reach all of inner\.weight"

        def reset_parameters(self):
            nn.init.normal_(self.weight)
            nn.init.constant_(self.scale, 2.0)

    class meta_other_scale(Toy):
        expect = "scales weight by 0"

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            with torch.no_grad():
                self.weight.mul_(10)

    class meta_other_constant(Toy):
        expect = "leaves scale other"

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            nn.init.constant_(self.scale, 3.0)

    class meta_no_meta(Toy):
        expect = "scale is on cpu"

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            self.scale = torch.full((features,), 2.0, dtype=dtype, device="cpu")

    class extra_repr_empty(Toy):
        expect = "is empty"

        def extra_repr(self):
            return ""

    class extra_repr_silent(Toy):
        expect = "lacks 'features=5'"

        def extra_repr(self):
            return "toy"

    class state_dict_renamed(Toy):
        expect = r"gain\.weight.*on record is"

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            self.gain = self.inner
            del self.inner

        def forward(self, x):
            self.check(x)
            return self.gain(nn.functional.linear(x, self.weight)) * self.scale

        def reset_parameters(self):
            if hasattr(self, "gain"):
                self.inner = self.gain
            super().reset_parameters()

    class state_dict_unsaved(Toy):
        expect = "loaded, 0: relative error"

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            self.hidden = torch.randn(features)

        def forward(self, x):
            return super().forward(x) * self.hidden

    class state_dict_scalar_parameter(Toy):
        expect = "gain is 0-d"
        adds = {"gain": []}  # noqa: RUF012

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            self.gain = nn.Parameter(torch.ones((), device=device, dtype=dtype))

    class deepcopy_shares(Toy):
        expect = "shares the memory of"

        def __deepcopy__(self, memo):
            return copy.copy(self)

    class pickled_lambda(Toy):
        expect = "lambda"

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            self.activation = lambda x: x

    class safetensors_shared_memory(Toy):
        expect = "share memory"

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            self.register_buffer("tied", self.scale)

    class weights_only_extra_state(Toy):
        expect = "Weights only load failed"

        def get_extra_state(self):
            return Entry

        def set_extra_state(self, state):
            pass

    class noncontiguous_reads_memory(Toy):
        expect = "strided input, 0"

        def forward(self, x):
            return super().forward(torch.as_strided(x, x.shape, (x.shape[-1], 1)))

    class noncontiguous_writes(Toy):
        expect = "was written to"

        def forward(self, x):
            y = super().forward(x)
            x.data.mul_(2)
            return y

    class leading_dimensions_mixed(Toy):
        expect = "two batch dimensions, 0"

        def forward(self, x):
            return super().forward(x) + x.mean(0)

    class empty_batch_detached(Toy):
        expect = "not attached"

        def forward(self, x):
            return x.new_empty(x.shape) if x.shape[0] == 0 else super().forward(x)

    class empty_batch_unused(Toy):
        expect = "no gradient for"

        def forward(self, x):
            return super().forward(x) if x.shape[0] else x * self.scale + self.inner.bias

    class empty_batch_refused(Toy):
        expect = "amax"

        def forward(self, x):
            return super().forward(x) + x.amax()

    class gradcheck_wrong(Toy):
        expect = "Jacobian mismatch"

        def forward(self, x):
            return super().forward(x + (x * x).detach())

    class autocast_cancels(Toy):
        expect = "autocast, 0: relative error"

        def forward(self, x):
            return (super().forward(x).to(nn.functional.linear(x, self.weight).dtype) + 1000) - 1000

    class autocast_refuses(Toy):
        expect = "same dtype"

        def forward(self, x):
            return torch.addcmul(x, torch.mm(x, self.weight), x) @ torch.mm(x.T.bfloat16(), super().forward(x)).T

    class checkpointed_counts_calls(Toy):
        expect = "checkpoint, 0: relative error"
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    class compiled_breaks(Toy):
        expect = "graph_break"

        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    class compiled_recompiles(Toy):
        expect = "4 compilations over"

        def forward(self, x):
            return super().forward(torch.stack([x[i] * int(x.shape[0]) for i in range(x.shape[0])]))

    class exported_fixed_batch(Toy):
        expect = "specialized it to be a constant"

        def forward(self, x):
            return super().forward(x) * (2 if x.shape[0] == 3 else 1)

    class bad_input_accepted(Toy):
        expect = "a bad x was accepted"

        def forward(self, x):
            return super().forward(x[..., : self.features])

    class bad_input_other_error(Toy):
        expect = "IndexError instead of ValueError"

        def check(self, x):
            x[..., self.features - 1].sum()
            if x.shape[-1] != self.features:
                raise IndexError("x")

    class bad_input_unnamed(Toy):
        expect = "does not name 'x'"

        def check(self, x):
            if x.shape[-1] != self.features:
                raise ValueError("wrong shape")

    class bad_construction_accepted(Toy):
        expect = "a bad features was accepted"

        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(max(features, 1), device=device, dtype=dtype)

    class docstring_missing(Toy):
        expect = "no docstring"
        __doc__ = None

    class docstring_no_shapes(Toy):
        expect = "no shapes"
        __doc__ = Toy.__doc__.replace("(..., features)", "vectors")

    class source_missing(Toy):
        expect = "no source"
        __doc__ = Toy.__doc__.replace("section 1", "page one")

    class docstring_no_errors(Toy):
        expect = "no Raises"
        __doc__ = Toy.__doc__.replace("Raises", "Says")

    class docstring_no_example(Toy):
        expect = "no runnable example"
        __doc__ = Toy.__doc__.replace("Example::", "Example:")

    class docstring_example_fails(Toy):
        expect = "the example fails"
        __doc__ = Toy.__doc__.replace("== (2, 4)", "== (4, 2)")

    class docstring_doctest_fails(Toy):
        expect = "the example fails"
        __doc__ = Toy.__doc__ + "\n    >>> 1 + 1\n    3\n"

    class ddp_empty_share(Toy):
        def forward(self, x):
            return x * 2 if x.shape[0] == 0 else super().forward(x)

    class fsdp2_scalar_parameter(Toy):
        def __init__(self, features, *, device=None, dtype=None):
            super().__init__(features, device=device, dtype=dtype)
            self.gain = nn.Parameter(torch.ones((), device=device, dtype=dtype))

        def forward(self, x):
            return super().forward(x) * self.gain


def _bad(module):
    return module(torch.randn(2, 6))


def toy_entry(cls: type[nn.Module], **changes) -> Entry:
    entry = Entry(
        name=cls.__name__,
        module=cls,
        factory=lambda **options: cls(5, **options),
        make_input=lambda batch, dtype: (torch.randn(batch, 5, dtype=dtype),),
        shows=("features=5",),
        bad_calls={"x": _bad},
        bad_constructions={"features": lambda: cls(0)},
        second_order=True,
        state={n: list(t.shape) for n, t in Toy(5).state_dict().items()} | getattr(cls, "adds", {}),
    )
    return replace(entry, **changes)


MUTANTS = {name: cls for name, cls in vars(Wrong).items() if isinstance(cls, type)}
for _name, _cls in MUTANTS.items():
    _cls.__module__, _cls.__qualname__ = __name__, f"Wrong.{_name}"

# For contract_world: the toy, which passes, and the two that break under data parallelism.
DATA_PARALLEL = ("ddp_empty_share", "fsdp2_scalar_parameter")
ENTRIES = [
    toy_entry(Toy),
    toy_entry(Wrong.ddp_empty_share, not_applicable={"fsdp2": "the fault is DDP's"}),
    toy_entry(Wrong.fsdp2_scalar_parameter, not_applicable={"ddp": "the fault is FSDP2's"}),
]
