"""torchlayers.convert on a toy rule: a linear layer becomes two thin ones, by its singular value decomposition."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torchlayers
from torchlayers._surgery import Skip, register_conversion


class LowRankLinear(nn.Module):
    """``y = up(down(x))``: in_features -> rank -> out_features."""

    def __init__(self, in_features, out_features, rank, bias, device=None, dtype=None):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=False, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x):
        y = self.up(self.down(x))
        return y if self.bias is None else y + self.bias


@dataclass
class ThinConfig:
    rank: int = 2
    types: tuple = (nn.Linear,)
    match: str = "exact"


@register_conversion(ThinConfig)
def _thin(name, module, config):
    if not (isinstance(module, config.types) if config.match == "isinstance" else type(module) in config.types):
        return None
    if config.rank < 1:
        raise ValueError(f"rank must be at least 1, got {config.rank}")
    if config.rank >= min(module.weight.shape):
        return Skip(f"rank {config.rank} saves nothing on {tuple(module.weight.shape)}")
    # float32 on the default device, whatever the original is: dtype and device are convert's business.
    new = LowRankLinear(module.in_features, module.out_features, config.rank, module.bias is not None)
    if not module.weight.is_meta:
        with torch.no_grad():
            u, s, vh = torch.linalg.svd(module.weight.double(), full_matrices=False)
            new.up.weight.copy_((u * s)[:, : config.rank])
            new.down.weight.copy_(vh[: config.rank])
            if module.bias is not None:
                new.bias.copy_(module.bias)
    return new


def _low_rank_linear(in_features, out_features, rank, **options):
    """An nn.Linear whose weight has the given rank, so that conversion at that rank changes nothing."""
    layer = nn.Linear(in_features, out_features, **options)
    with torch.no_grad():
        a, b = torch.randn(out_features, rank), torch.randn(rank, in_features)
        layer.weight.copy_((a @ b).to(layer.weight.dtype))
    return layer


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(_low_rank_linear(6, 8, 2), nn.ReLU(), nn.Sequential(_low_rank_linear(8, 8, 2)))
        self.blocks = nn.ModuleList([_low_rank_linear(8, 8, 2), nn.Identity()])
        self.heads = nn.ModuleDict({"a": _low_rank_linear(8, 5, 2, bias=False), "b": nn.Linear(8, 2)})

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.heads["a"](x), self.heads["b"](x)


def test_nested_containers_are_searched_and_the_function_is_kept():
    model = Nested()
    x = torch.randn(3, 6)
    expected = model(x)
    before = sum(p.numel() for p in model.parameters())
    report = torchlayers.convert(model, ThinConfig(rank=2))
    assert report.model is model
    assert [r.name for r in report.converted] == ["stem.0", "stem.2.0", "blocks.0", "heads.a"]
    assert [(r.name, r.reason) for r in report.skipped] == [("heads.b", "rank 2 saves nothing on (2, 8)")]
    assert isinstance(model.stem[2][0], LowRankLinear) and isinstance(model.heads["a"], LowRankLinear)
    for got, want in zip(model(x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    after = sum(p.numel() for p in model.parameters())
    assert (report.parameters_before, report.parameters_after) == (before, after)
    row = report.rows[0]
    assert (row.old_type, row.new_type) == ("Linear", "LowRankLinear")
    assert (row.parameters_before, row.parameters_after) == (6 * 8 + 8, 6 * 2 + 2 * 8 + 8)


def test_the_report_reads_as_a_table():
    report = torchlayers.convert(Nested(), ThinConfig(rank=2))
    report.rows[0].extra["GMACs"] = 0.5
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "from", "to", "parameters", "GMACs"]
    assert lines[1].split() == ["stem.0", "Linear", "LowRankLinear", "56", "->", "36", "0.5"]
    assert lines[5].endswith("skipped: rank 2 saves nothing on (2, 8)")
    before, after = report.parameters_before, report.parameters_after
    assert lines[-1] == (
        f"ThinConfig: 4 converted, 1 skipped; parameters {before:,} -> {after:,} ({after / before:.1%})"
    )


def test_nothing_matched_says_so():
    model = nn.Sequential(nn.ReLU())
    report = torchlayers.convert(model, ThinConfig())
    assert report.rows == [] and report.model is model
    assert str(report) == "ThinConfig: nothing converted, no module matched; 0 parameters"


def test_the_model_itself_can_be_replaced():
    model = _low_rank_linear(6, 5, 2).eval()
    x = torch.randn(3, 6)
    report = torchlayers.convert(model, ThinConfig())
    assert isinstance(report.model, LowRankLinear) and not report.model.up.training
    assert isinstance(model, nn.Linear) and report.rows[0].name == "" and "(the model)" in str(report)
    torch.testing.assert_close(report.model(x), model(x), rtol=1e-4, atol=1e-4)


def test_filter_fn_sees_module_and_name():
    model, seen = Nested(), []

    def not_the_heads(module, name):
        seen.append((type(module).__name__, name))
        return not name.startswith("heads")

    report = torchlayers.convert(model, ThinConfig(), filter_fn=not_the_heads)
    assert [r.name for r in report.rows] == ["stem.0", "stem.2.0", "blocks.0"]
    assert ("ModuleDict", "heads") in seen and ("Linear", "heads.a") in seen
    assert type(model.heads["a"]) is nn.Linear


def test_a_module_used_in_several_places_stays_shared():
    shared = _low_rank_linear(6, 6, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU(), shared), "b": shared})
    report = torchlayers.convert(model, ThinConfig())
    assert len(report.rows) == 1 and report.rows[0].also == ("a.2", "b")
    assert model["a"][0] is model["a"][2] is model["b"] and isinstance(model["b"], LowRankLinear)
    assert report.parameters_after == 6 * 2 + 2 * 6 + 6

    model = nn.Sequential(shared, shared)
    report = torchlayers.convert(model, ThinConfig(), filter_fn=lambda module, name: name != "1")
    assert model[0] is model[1] is shared
    assert report.rows[0].reason == "shared with 1, which filter_fn rejects"


def test_tied_parameters_are_reported_and_stay_tied():
    embedding, head, free = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False), nn.Linear(6, 6)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, free, head)
    report = torchlayers.convert(model, ThinConfig())
    assert [r.name for r in report.converted] == ["1"]
    assert report.skipped[0].reason == "its parameter weight is tied to another module's"
    assert model[2].weight is model[0].weight

    # Tied inside what is replaced as a whole is the rule's business; used twice as a module is not a tie either.
    one, two = nn.Linear(6, 6), nn.Linear(6, 6)
    one.weight = two.weight
    assert len(torchlayers.convert(nn.Sequential(one, two), ThinConfig()).skipped) == 2


@dataclass
class BlockConfig:
    pass


@register_conversion(BlockConfig)
def _block(name, module, config):
    if not isinstance(module, nn.Sequential) or len(module) != 2:
        return None
    return nn.ModuleDict({"new": nn.Linear(1, 1), "kept": module[1]})


def test_what_a_replacement_keeps_of_the_original_is_untouched():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4).eval()
    one.weight = two.weight
    two.bias.requires_grad_(False)
    two.register_forward_hook(lambda *_: None)
    block = nn.Sequential(one, two)
    model = nn.ModuleList([nn.ModuleList([block, block])])
    report = torchlayers.convert(model, BlockConfig())
    new = model[0][0]
    assert len(report.converted) == 1 and new is model[0][1]
    assert new["kept"] is two and not two.training and new["new"].training
    assert not two.bias.requires_grad and two.weight.requires_grad and len(two._forward_hooks) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mode_and_dtype_are_kept(training, dtype):
    model = nn.Sequential(_low_rank_linear(6, 5, 2, dtype=dtype)).train(training)
    torchlayers.convert(model, ThinConfig())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(m.training is training for m in model.modules())


def test_a_meta_model_stays_on_meta_and_converts_to_the_same_structure():
    with torch.device("meta"):
        meta = Nested()
    plain = Nested()
    torchlayers.convert(meta, ThinConfig())
    torchlayers.convert(plain, ThinConfig())
    assert all(p.is_meta for p in meta.parameters())
    meta.load_state_dict(plain.state_dict(), assign=True)
    x = torch.randn(2, 6)
    torch.testing.assert_close(meta(x)[0], plain(x)[0])


@pytest.mark.parametrize("weight, bias", [(True, True), (False, True), (True, False), (False, False)])
def test_gradient_flags_are_kept(weight, bias):
    layer = _low_rank_linear(6, 5, 2)
    layer.weight.requires_grad_(weight)
    layer.bias.requires_grad_(bias)
    new = torchlayers.convert(layer, ThinConfig()).model
    assert new.up.weight.requires_grad is new.down.weight.requires_grad is weight
    assert new.bias.requires_grad is bias


def test_hooks_and_parametrizations_are_not_lost():
    def noop(*_):
        return None

    hooked, pre, backward = (nn.Linear(6, 6) for _ in range(3))
    hooked.register_forward_hook(noop)
    pre.register_forward_pre_hook(noop)
    backward.register_full_backward_hook(noop)
    normed = parametrizations.weight_norm(nn.Linear(6, 6))
    model = nn.Sequential(hooked, pre, backward, normed)
    report = torchlayers.convert(model, ThinConfig(match="isinstance"))
    assert [r.reason for r in report.rows] == ["has hooks"] * 3 + ["has a parametrization"]
    assert list(model) == [hooked, pre, backward, normed]


def test_attention_is_left_alone_by_exact_type_and_found_when_asked():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention, "mlp": nn.Linear(8, 8)})
    x = torch.randn(2, 3, 8)
    expected = attention(x, x, x)[0]
    report = torchlayers.convert(model, ThinConfig())
    assert [r.name for r in report.rows] == ["mlp"]
    torch.testing.assert_close(attention(x, x, x)[0], expected)
    report = torchlayers.convert(model, ThinConfig(match="isinstance"))
    converted = [(r.name, r.old_type) for r in report.converted]
    assert converted == [("attention.out_proj", "NonDynamicallyQuantizableLinear")]


def test_a_converted_model_trains_and_copies():
    model = nn.Sequential(_low_rank_linear(6, 5, 2), nn.ReLU(), nn.Linear(5, 1))
    torchlayers.convert(model, ThinConfig())
    copy.deepcopy(model)(torch.randn(4, 6)).sum().backward()
    model(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_subclass_of_a_config_has_its_rule():
    class Narrower(ThinConfig):
        pass

    assert torchlayers.convert(nn.Linear(6, 6), Narrower()).converted


def test_an_error_in_a_rule_names_the_module_and_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    before = list(model)
    calls = iter([1, 0])

    @dataclass
    class SecondFails:
        pass

    @register_conversion(SecondFails)
    def _(name, module, config):
        return _thin(name, module, ThinConfig(rank=next(calls))) if isinstance(module, nn.Linear) else None

    with pytest.raises(ValueError, match=r"converting 1 \(Linear\): rank must be at least 1, got 0"):
        torchlayers.convert(model, SecondFails())
    assert list(model) == before


def test_bad_arguments():
    model = nn.Linear(6, 6)

    class Unknown:
        pass

    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        torchlayers.convert([model], ThinConfig())
    with pytest.raises(TypeError, match=r"filter_fn must be callable as filter_fn\(module, name\), got str"):
        torchlayers.convert(model, ThinConfig(), filter_fn="head")
    with pytest.raises(TypeError, match=r"config must be an instance .*ThinConfig.*, got Unknown"):
        torchlayers.convert(model, Unknown())
    with pytest.raises(TypeError, match="got the class ThinConfig, not an instance"):
        torchlayers.convert(model, ThinConfig)
    with pytest.raises(ValueError, match="config_class must have no rule yet, got ThinConfig"):
        register_conversion(ThinConfig)(_thin)
    with pytest.raises(ValueError, match="model must not be wrapped yet, got DataParallel"):
        torchlayers.convert(nn.DataParallel(model), ThinConfig())

    @register_conversion(Unknown)
    def _(name, module, config):
        return module

    with pytest.raises(TypeError, match="the rule of Unknown must return a new module, Skip or None, got the module"):
        torchlayers.convert(model, Unknown())
