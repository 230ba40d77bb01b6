"""The modules under contract: one entry a public module, or one a variant where variants differ in their parameters.

Run as a script, it puts the state dicts of all entries on record. Do so for a new entry; a change to an old one breaks
the checkpoints that users have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from contract_checks import NAMES_FILE, Entry

from torchlayers.factorized import ComplexParameters
from torchlayers.gaunt import (
    ExactTensorProduct,
    GauntConv,
    GauntPotential,
    GauntSelfInteraction,
    GauntSymmetricContraction,
    GauntTensorProduct,
    SelfMix,
)
from torchlayers.maestro import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankEmbedding,
    LowRankLinear,
    LowRankMultiheadAttention,
)
from torchlayers.polynomial import PPGN, PolynomialConv, PPGNBlock
from torchlayers.ring_attention import RingMultiheadAttention
from torchlayers.separable_conv import (
    LazySeparableConv1d,
    LazySeparableConv2d,
    LazySeparableConv3d,
    SeparableConv1d,
    SeparableConv2d,
    SeparableConv3d,
    SeparableConvTranspose2d,
)
from torchlayers.tensor_attention import RingTensorAttention, TensorAttention, TensorTransformerBlock
from torchlayers.tfno import (
    TFNO,
    FactorizedTensor,
    FNOBlocks,
    H1Loss,
    JointSpectralWeights,
    LpLoss,
    MultiGridParallel,
    MultiGridPatching,
    MultigridPatching2D,
    SpectralConv,
)


def because(reason: str, *items: str) -> dict[str, str]:
    return dict.fromkeys(items, reason)


NO_LEADING = because("the peer takes one batch dimension", "leading_dimensions")

# What takes most of the time; a second variant of a module goes through it in the slow run.
COMPILERS = ("compiled", "exported")

# A module that is called without arguments.
NO_INPUT: Mapping[str, str] = {
    **because("no input", "noncontiguous", "leading_dimensions", "empty_batch", "exported", "bad_input"),
    **because("no batch to share out; the layers that hold it are under contract themselves", "ddp", "fsdp2"),
}

NO_PARAMETERS: Mapping[str, str] = because(
    "no parameters", "device_and_dtype", "meta", "state_dict", "safetensors", "weights_only", "ddp", "fsdp2"
)
LOSS: Mapping[str, str] = {
    **NO_PARAMETERS,
    **because("reduces the batch", "leading_dimensions", "empty_batch"),
}


# Public module classes without an entry, and why.
NO_ENTRY: Mapping[type, str] = {
    ComplexParameters: "a base class, under contract through what derives from it",
    MultigridPatching2D: "holds a model without calling it: it has no forward and no parameters of its own",
    **dict.fromkeys(
        (LazySeparableConv1d, LazySeparableConv2d, LazySeparableConv3d),
        "becomes the plain layer at its first call: tested in tests/separable_conv",
    ),
    GauntPotential: "takes graphs and differentiates inside forward: tested in tests/gaunt",
    MultiGridParallel: "runs a user's model over a device mesh: tested in processes of its own, in tests/tfno",
}


def _grid(channels: int, *grid: int):
    return lambda batch, dtype: (torch.randn(batch, channels, *grid, dtype=dtype),)


def _bad_fields(channels: int):
    return {
        "x#no tensor": lambda m: m([[1.0]]),
        "x#dimensions": lambda m: m(torch.randn(2, channels, 8)),
        "x#channels": lambda m: m(torch.randn(2, channels + 1, 8, 8)),
        "x#dtype": lambda m: m(torch.ones(2, channels, 8, 8, dtype=torch.int64)),
    }


def _spectral_conv(name: str, channels=(3, 4), n_modes=(4, 4), grid=(8, 7), slow=(), **options) -> Entry:
    return Entry(
        name=f"SpectralConv[{name}]",
        module=SpectralConv,
        factory=lambda **keywords: SpectralConv(*channels, n_modes, **options, **keywords),
        make_input=_grid(channels[0], *grid),
        shows=(f"{channels[0]}, {channels[1]}",),
        bad_calls={**_bad_fields(channels[0]), "output_shape": lambda m: m(torch.randn(2, channels[0], 8, 8), (8,))},
        bad_constructions={
            "in_channels": lambda: SpectralConv(0, 4, (4, 4)),
            "out_channels": lambda: SpectralConv(3, 2.5, (4, 4)),
            "n_modes": lambda: SpectralConv(3, 4, (4, 0)),
            "max_n_modes": lambda: SpectralConv(3, 4, (4, 4), max_n_modes=(4,)),
            "rank": lambda: SpectralConv(3, 4, (4, 4), factorization="tucker", rank=-1.0),
            "factorization": lambda: SpectralConv(3, 4, (4, 4), factorization="tuckr"),
            "fno_block_precision": lambda: SpectralConv(3, 4, (4, 4), fno_block_precision="low"),
            "method": lambda: SpectralConv(3, 4, (4, 4), method="dct"),
            "backend": lambda: SpectralConv(3, 4, (4, 4), backend="cuda"),
        },
        not_applicable=NO_LEADING,
        second_order=True,
        slow=slow,
    )


def _tfno(name: str, slow=(), **options) -> Entry:
    return Entry(
        name=f"TFNO[{name}]",
        module=TFNO,
        factory=lambda **keywords: TFNO((4, 4), 2, 1, 4, n_layers=2, **options, **keywords),
        make_input=_grid(2, 6, 7),
        bad_calls=_bad_fields(2),
        bad_constructions={
            "n_modes": lambda: TFNO((), 2, 1, 4),
            "in_channels": lambda: TFNO((4, 4), 0, 1, 4),
            "hidden_channels": lambda: TFNO((4, 4), 1, 1, 0),
            "n_layers": lambda: TFNO((4, 4), 1, 1, 4, n_layers=0),
            "norm": lambda: TFNO((4, 4), 1, 1, 4, norm="layer"),
            "positional_embedding": lambda: TFNO((4, 4), 1, 1, 4, positional_embedding="gird"),
        },
        not_applicable=NO_LEADING,
        slow=slow,
    )


def _factorized(name: str, factorization: str, **options) -> Entry:
    return Entry(
        name=f"FactorizedTensor[{name}]",
        module=FactorizedTensor,
        factory=lambda **keywords: FactorizedTensor((5, 4, 6), factorization, 0.5, **options, **keywords),
        make_input=lambda batch, dtype: (),
        shows=("shape=(5, 4, 6)", factorization),
        bad_constructions={
            "shape": lambda: FactorizedTensor((5, 0), "cp"),
            "factorization": lambda: FactorizedTensor((5, 4), "cpd"),
            "rank": lambda: FactorizedTensor((5, 4), "cp", rank=0),
            "init_std": lambda: FactorizedTensor((5, 4), init_std=-1.0),
        },
        not_applicable=NO_INPUT,
        second_order=True,
    )


def _loss(cls: type, bad_constructions: Mapping, **options) -> Entry:
    return Entry(
        name=cls.__name__,
        module=cls,
        factory=lambda **_: cls(d=2, **options),
        make_input=lambda batch, dtype: (
            torch.randn(batch, 2, 6, 5, dtype=dtype),
            torch.randn(batch, 2, 6, 5, dtype=dtype),
        ),
        shows=("d=2", "reduction='mean'"),
        bad_calls={
            "pred": lambda m: m(1.0, torch.randn(2, 1, 4, 4)),
            "target": lambda m: m(torch.randn(2, 1, 4, 4), torch.randn(2, 4, 4)),
        },
        bad_constructions={
            "d": lambda: cls(d=0),
            "reduction": lambda: cls(reduction="meen"),
            **bad_constructions,
        },
        not_applicable={**LOSS, **({"source": "the textbook L^p norm"} if cls is LpLoss else {})},
    )


def _bad_sequences(width: int):
    return {
        "query#no tensor": lambda m: m([[1.0]]),
        "query#dimensions": lambda m: m(torch.randn(2, 3, 4, width)),
        "query#channels": lambda m: m(torch.randn(2, 3, width + 1)),
        "key_padding_mask": lambda m: m(torch.randn(2, 3, width), key_padding_mask=torch.zeros(2, 4).bool()),
        "attn_mask": lambda m: m(torch.randn(2, 3, width), attn_mask=torch.zeros(3, 3).bool()),
        "need_weights": lambda m: m(torch.randn(2, 3, width), need_weights=True),
    }


def _tensor_attention(name: str, slow=(), **options) -> Entry:
    return Entry(
        name=f"TensorAttention[{name}]",
        module=TensorAttention,
        factory=lambda **keywords: TensorAttention(12, 2, batch_first=True, **options, **keywords),
        make_input=lambda batch, dtype: (torch.randn(batch, 7, 12, dtype=dtype),),
        shows=("12, 2", "form="),
        bad_calls=_bad_sequences(12),
        bad_constructions={
            "embed_dim": lambda: TensorAttention(0, 1),
            "num_heads": lambda: TensorAttention(12, 5),
            "num_kv_heads": lambda: TensorAttention(12, 4, num_kv_heads=3),
            "head_dim": lambda: TensorAttention(12, 3, form="determinant"),
            "dropout": lambda: TensorAttention(12, 2, dropout=1.0),
            "window1": lambda: TensorAttention(12, 2, window1=0),
            "window2": lambda: TensorAttention(12, 2, window2=(1, -2)),
            "form": lambda: TensorAttention(12, 2, form="trilinea"),
            "approx": lambda: TensorAttention(12, 2, approx="taylor"),
            "degree": lambda: TensorAttention(12, 2, degree=3),
            "backend": lambda: TensorAttention(12, 2, backend="cuda"),
        },
        not_applicable=NO_LEADING,
        slow=slow,
    )


def _ring_attention(name: str, slow=(), **options) -> Entry:
    return Entry(
        name=f"RingMultiheadAttention[{name}]",
        module=RingMultiheadAttention,
        factory=lambda **keywords: RingMultiheadAttention(12, 2, batch_first=True, **options, **keywords),
        make_input=lambda batch, dtype: tuple(
            torch.randn(batch, n, options.get(size, 12), dtype=dtype)
            for n, size in ((7, ""), *(((5, "kdim"), (5, "vdim")) if "kdim" in options else ()))
        ),
        shows=("12, 2", "batch_first=True"),
        bad_calls=_bad_sequences(12)
        if "kdim" not in options
        else {
            "key#channels": lambda m: m(torch.randn(2, 3, 12), torch.randn(2, 3, 12), torch.randn(2, 3, 6)),
            "value#channels": lambda m: m(torch.randn(2, 3, 12), torch.randn(2, 3, 5), torch.randn(2, 3, 5)),
            "value#length": lambda m: m(torch.randn(2, 3, 12), torch.randn(2, 3, 5), torch.randn(2, 4, 6)),
        },
        bad_constructions={
            "embed_dim": lambda: RingMultiheadAttention(0, 1),
            "num_heads": lambda: RingMultiheadAttention(12, 5),
            "add_bias_kv": lambda: RingMultiheadAttention(12, 2, add_bias_kv=True),
            "add_zero_attn": lambda: RingMultiheadAttention(12, 2, add_zero_attn=True),
            "kdim": lambda: RingMultiheadAttention(12, 2, kdim=0),
            "dropout": lambda: RingMultiheadAttention(12, 2, dropout=1.0),
            "layout": lambda: RingMultiheadAttention(12, 2, layout=7),
            "window_size": lambda: RingMultiheadAttention(12, 2, window_size=0),
            "schedule": lambda: RingMultiheadAttention(12, 2, schedule="rings"),
            "backend": lambda: RingMultiheadAttention(12, 2, backend="cuda"),
        },
        not_applicable=NO_LEADING,
        slow=slow,
    )


def _low_rank_conv(cls, grid, **options) -> Entry:
    return Entry(
        name=cls.__name__,
        module=cls,
        factory=lambda **keywords: cls(4, 6, 3, padding=1, max_rank=2, **options, **keywords),
        make_input=lambda batch, dtype: (torch.randn(batch, 4, *grid, dtype=dtype),),
        shows=("4, 6", "rank=2"),
        bad_calls={
            "x#no tensor": lambda m: m([[1.0]]),
            "x#dimensions": lambda m: m(torch.randn(4, *grid, *(3,) * 3)),
            "x#channels": lambda m: m(torch.randn(2, 5, *grid)),
            "x#dtype": lambda m: m(torch.ones(2, 4, *grid, dtype=torch.int64)),
            "rank": lambda m: m(torch.randn(2, 4, *grid), rank=3),
        },
        bad_constructions={
            "in_channels": lambda: cls(0, 4, 3),
            "out_channels": lambda: cls(4, 2.5, 3),
            "kernel_size": lambda: cls(4, 4, 0),
            "padding": lambda: cls(4, 4, 3, padding="sane"),
            "padding_mode": lambda: cls(4, 4, 3, padding_mode="mirror"),
            "groups": lambda: cls(4, 4, 3, groups=3),
            "max_rank": lambda: cls(4, 4, 3, max_rank=5),
            "dtype": lambda: cls(4, 4, 3, dtype=torch.complex64),
        },
        not_applicable=NO_LEADING,
        second_order=True,
    )


def _separable_conv(cls, grid, name=None, slow=(), **options) -> Entry:
    return Entry(
        name=cls.__name__ if name is None else f"{cls.__name__}[{name}]",
        module=cls,
        factory=lambda **keywords: cls(4, 6, 3, padding=1, rank=1, **options, **keywords),
        make_input=lambda batch, dtype: (torch.randn(batch, 4, *grid, dtype=dtype),),
        shows=("4, 6", "rank=(1, 1)" if cls is SeparableConv3d else "rank=1"),
        bad_calls={
            "input#no tensor": lambda m: m([[1.0]]),
            "input#dimensions": lambda m: m(torch.randn(4, *grid, *(3,) * 3)),
            "input#channels": lambda m: m(torch.randn(2, 5, *grid)),
            "input#dtype": lambda m: m(torch.ones(2, 4, *grid, dtype=torch.int64)),
        },
        bad_constructions={
            "groups": lambda: cls(4, 4, 3, groups=3),
            "rank#zero": lambda: cls(4, 4, 3, rank=0),
            "rank#high": lambda: cls(4, 4, 3, rank=10_000),
            "format": lambda: cls(4, 4, 3, format="svd"),
            "order": lambda: cls(4, 4, 3, order="x"),
            "backend": lambda: cls(4, 4, 3, backend="cudnn"),
            "dtype": lambda: cls(4, 4, 3, dtype=torch.complex64),
        },
        not_applicable=NO_LEADING,
        slow=slow,
        second_order=True,
    )


def _gaunt_product(name: str, irreps: tuple[str, str, str], slow=(), **options) -> Entry:
    per_sample = not options.get("shared_weights", True)

    def make_input(batch, dtype):
        module = GauntTensorProduct(*irreps, **options)
        sizes = [module.irreps_in1.dim, module.irreps_in2.dim, *([module.weight_numel] if per_sample else [])]
        return tuple(torch.randn(batch, size, dtype=dtype) for size in sizes)

    def call(**changes):
        def with_bad(module):
            x, y, *weight = make_input(2, torch.float32)
            arguments = {"x": x, "y": y, **({"weight": weight[0]} if weight else {})}
            return module(**(arguments | {k: v(arguments[k]) if callable(v) else v for k, v in changes.items()}))

        return with_bad

    return Entry(
        name=f"GauntTensorProduct[{name}]",
        module=GauntTensorProduct,
        factory=lambda **keywords: GauntTensorProduct(*irreps, **options, **keywords),
        make_input=make_input,
        shows=(irreps[0], f"connection={options.get('connection', 'uuu')!r}", "weight_numel="),
        bad_calls={
            "x#no tensor": call(x=[[1.0]]),
            "x#size": call(x=lambda x: x[:, 1:]),
            "x#integers": call(x=lambda x: x.long()),
            "y#complex": call(y=lambda y: y.cfloat()),
            "y#size": call(y=lambda y: y[:, 1:]),
            "y#batch": call(y=lambda y: y.repeat(2, 1)[:3]),
            "weight": call(weight=torch.randn(2, 3)),
        },
        bad_constructions={
            "irreps_in1#unsorted": lambda: GauntTensorProduct("2x1o+2x0e", "2x0e"),
            "irreps_in1#twice": lambda: GauntTensorProduct("2x0e+2x0e", "2x0e"),
            "irreps_in1#uneven": lambda: GauntTensorProduct("2x0e+3x1o", "2x0e"),
            "irreps_in1#words": lambda: GauntTensorProduct("scalars", "2x0e"),
            "irreps_in2": lambda: GauntTensorProduct("2x0e+2x1o", "3x0e"),
            "irreps_out#parity": lambda: GauntTensorProduct("2x1o", "2x1o", "2x2o"),
            "irreps_out#odd": lambda: GauntTensorProduct("2x1o", "2x1o", "2x1e"),
            "irreps_out#degree": lambda: GauntTensorProduct("2x1o", "2x1o", "2x4e", antisymmetric=True),
            "connection": lambda: GauntTensorProduct("2x0e", "2x0e", connection="uvv"),
            "rank": lambda: GauntTensorProduct("2x0e", "2x0e", rank=0),
            "shared_weights": lambda: GauntTensorProduct("2x0e", "2x0e", shared_weights=False),
            "layout": lambda: GauntTensorProduct("2x0e", "2x0e", layout="ir"),
            "method": lambda: GauntTensorProduct("2x0e", "2x0e", method="gird"),
            "backend": lambda: GauntTensorProduct("2x0e", "2x0e", backend="cuda"),
            "dtype": lambda: GauntTensorProduct("2x0e", "2x0e", dtype=torch.complex64),
        },
        not_applicable=because(
            "the weights come with the call, one set a sample",
            "meta",
            "state_dict",
            "safetensors",
            "weights_only",
            "device_and_dtype",
            "ddp",
            "fsdp2",
        )
        if per_sample
        else {},
        second_order=True,
        slow=slow,
    )


def _gaunt_conv_input(batch, dtype):
    # Edge k leads from node k to the one before it; the first has no length.
    nodes = torch.arange(batch)
    edge_vec = torch.randn(batch, 3, dtype=dtype)
    edge_index = torch.stack((nodes, (nodes - 1) % max(batch, 1)))
    return torch.randn(batch, 14, dtype=dtype), edge_vec, edge_index, torch.randn(batch, 14, dtype=dtype)


def _low_rank_attention(name: str, slow=(), **options) -> Entry:
    widths = (12, options.get("kdim", 12), options.get("vdim", 12))
    return Entry(
        name=f"LowRankMultiheadAttention[{name}]",
        module=LowRankMultiheadAttention,
        factory=lambda **keywords: LowRankMultiheadAttention(12, 2, batch_first=True, **options, **keywords),
        make_input=lambda batch, dtype: tuple(torch.randn(batch, 7, n, dtype=dtype) for n in widths),
        bad_calls={
            "query#no tensor": lambda m: m([[1.0]]),
            "query#dimensions": lambda m: m(torch.randn(2, 3, 4, 12)),
            "query#channels": lambda m: m(torch.randn(2, 3, 11)),
        },
        bad_constructions={
            "embed_dim": lambda: LowRankMultiheadAttention(0, 1),
            "num_heads": lambda: LowRankMultiheadAttention(12, 5),
            "dropout": lambda: LowRankMultiheadAttention(12, 2, dropout=1.0),
            "kdim": lambda: LowRankMultiheadAttention(12, 2, kdim=-1),
            "max_rank": lambda: LowRankMultiheadAttention(12, 2, max_rank=0),
            "backend": lambda: LowRankMultiheadAttention(12, 2, backend="cuda"),
        },
        not_applicable=NO_LEADING,
        slow=slow,
    )


def _dense_pairs(channels: int):
    def make(batch, dtype):
        nodes = torch.arange(5) < torch.tensor([5, 3, 4, 2, 1, 5])[torch.arange(batch) % 6][:, None]
        return torch.randn(batch, 5, 5, channels, dtype=dtype), nodes

    return make


def _bad_pairs(channels: int):
    return {
        "x#no tensor": lambda m: m([[1.0]]),
        "x#dimensions": lambda m: m(torch.randn(4, channels)),
        "x#square": lambda m: m(torch.randn(2, 4, 5, channels)),
        "x#channels": lambda m: m(torch.randn(2, 4, 4, channels + 1)),
        "x#dtype": lambda m: m(torch.ones(2, 4, 4, channels, dtype=torch.int64)),
        "mask#shape": lambda m: m(torch.randn(2, 4, 4, channels), torch.ones(2, 5, dtype=torch.bool)),
        "mask#dtype": lambda m: m(torch.randn(2, 4, 4, channels), torch.ones(2, 4)),
    }


# As wide as it takes for no pair to have all hidden units at zero, where zero biases are a kink.
def _ppgn_block(name: str, slow=(), not_applicable=(), **options) -> Entry:
    return Entry(
        name=f"PPGNBlock[{name}]",
        module=PPGNBlock,
        factory=lambda **keywords: PPGNBlock(3, 16, **options, **keywords),
        make_input=_dense_pairs(3),
        shows=("3, 16", f"plus={options.get('plus', True)}"),
        bad_calls=_bad_pairs(3),
        bad_constructions={
            "in_channels": lambda: PPGNBlock(0, 4),
            "out_channels": lambda: PPGNBlock(3, 2.5),
            "mlp_depth": lambda: PPGNBlock(3, 4, 0),
            "norm": lambda: PPGNBlock(3, 4, norm="batch"),
            "scale": lambda: PPGNBlock(3, 4, scale="sqrt"),
            "backend": lambda: PPGNBlock(3, 4, backend="cuda"),
        },
        not_applicable=dict(not_applicable),
        second_order=True,
        slow=slow,
    )


def _ppgn(name: str, slow=(), **options) -> Entry:
    return Entry(
        name=f"PPGN[{name}]",
        module=PPGN,
        factory=lambda **keywords: PPGN(3, 16, 2, 2, **options, **keywords),
        make_input=_dense_pairs(3),
        shows=("3, 16, 2", "num_layers=2", f"readout={options.get('readout', 'last')!r}"),
        bad_calls=_bad_pairs(3),
        bad_constructions={
            "in_channels": lambda: PPGN(0, 4, 2, 2),
            "hidden_channels": lambda: PPGN(3, 0, 2, 2),
            "out_channels": lambda: PPGN(3, 4, 0, 2),
            "num_layers": lambda: PPGN(3, 4, 2, 0),
            "pool": lambda: PPGN(3, 4, 2, 2, pool="sum"),
            "readout": lambda: PPGN(3, 4, 2, 2, readout="jk"),
            "head_channels": lambda: PPGN(3, 4, 2, 2, head_channels=0),
            "backend": lambda: PPGN(3, 4, 2, 2, backend="cuda"),
        },
        second_order=True,
        slow=slow,
    )


def _graph_input(batch: int, dtype: torch.dtype) -> tuple:
    """Nodes in a ring, each joined to the next and the one after, both ways: triangles from three nodes on."""
    node = torch.arange(batch)
    source = torch.cat([node, node, node])
    target = torch.cat([(node + step) % batch for step in (1, 2, 0)])
    keys = torch.unique(torch.cat([source * batch + target, target * batch + source]))
    return torch.randn(batch, 3, dtype=dtype), torch.stack([keys // batch, keys % batch])


ENTRIES: list[Entry] = [
    _spectral_conv("dense"),
    _spectral_conv("cp", factorization="cp", rank=0.5, slow=COMPILERS),
    _spectral_conv("tucker", factorization="tucker", rank=0.5),
    _spectral_conv("tt", factorization="tt", rank=0.5, slow=COMPILERS),
    _spectral_conv("separable", channels=(3, 3), factorization="tucker", separable=True, slow=COMPILERS),
    _tfno("tucker", rank=0.5),
    _tfno("joint", rank=0.5, joint_factorization=True, norm="group_norm", slow=COMPILERS),
    Entry(
        name="FNOBlocks",
        module=FNOBlocks,
        factory=lambda **keywords: FNOBlocks(3, 3, (4, 4), factorization="cp", rank=0.5, **keywords),
        make_input=_grid(3, 6, 7),
        bad_calls=_bad_fields(3),
        bad_constructions={
            "in_channels": lambda: FNOBlocks(0, 4, (4, 4)),
            "out_channels": lambda: FNOBlocks(3, 4, (4, 4), n_layers=2),
            "n_layers": lambda: FNOBlocks(3, 3, (4, 4), n_layers=0),
            "fno_skip": lambda: FNOBlocks(3, 3, (4, 4), fno_skip="line"),
            "stabilizer": lambda: FNOBlocks(3, 3, (4, 4), stabilizer="tan"),
        },
        not_applicable=NO_LEADING,
    ),
    Entry(
        name="JointSpectralWeights",
        module=JointSpectralWeights,
        factory=lambda **keywords: JointSpectralWeights(2, 3, 3, (4, 4), factorization="tucker", **keywords),
        make_input=lambda batch, dtype: (),
        bad_constructions={
            "n_layers": lambda: JointSpectralWeights(0, 3, 3, (4, 4)),
            "n_modes": lambda: JointSpectralWeights(2, 3, 3, ()),
            "rank": lambda: JointSpectralWeights(2, 3, 3, (4, 4), factorization="tucker", rank=(1, 2)),
        },
        not_applicable=NO_INPUT,
    ),
    _factorized("dense", "dense"),
    _factorized("cp", "cp", complex=True),
    _factorized("tucker", "tucker"),
    _factorized("tt", "tt", complex=True),
    Entry(
        name="MultiGridPatching",
        module=MultiGridPatching,
        factory=lambda **_: MultiGridPatching(levels=1, padding=1),
        make_input=_grid(2, 8, 12),
        shows=("levels=1", "padding=(1, 1)"),
        bad_calls={
            "x#no tensor": lambda m: m([[1.0]]),
            "x#dimensions": lambda m: m(torch.randn(2, 8, 8)),
            "x#size": lambda m: m(torch.randn(2, 1, 8, 9)),
        },
        bad_constructions={
            "levels": lambda: MultiGridPatching(levels=-1),
            "n_dim": lambda: MultiGridPatching(levels=1, n_dim=4),
            "padding": lambda: MultiGridPatching(levels=1, padding=-1),
            "padding_mode": lambda: MultiGridPatching(levels=1, padding_mode="circle"),
            "patches": lambda: MultiGridPatching(levels=1, patches=0),
        },
        not_applicable={**NO_PARAMETERS, **because("patches go into the batch dimension", "leading_dimensions")},
        second_order=True,
    ),
    _tensor_attention("trilinear", is_causal=True, window1=4, window2=3, num_kv_heads=1),
    _tensor_attention("determinant", form="determinant", rotary=True, kv2_bias=True, slow=COMPILERS),
    _tensor_attention("polynomial", approx="polynomial", degree=2),
    Entry(
        name="LowRankLinear",
        module=LowRankLinear,
        factory=lambda **keywords: LowRankLinear(7, 5, max_rank=4, **keywords),
        make_input=lambda batch, dtype: (torch.randn(batch, 7, dtype=dtype),),
        shows=("in_features=7, out_features=5", "rank=4"),
        bad_calls={
            "x#no tensor": lambda m: m([[1.0]]),
            "x#channels": lambda m: m(torch.randn(2, 6)),
            "x#dtype": lambda m: m(torch.ones(2, 7, dtype=torch.int64)),
            "rank#range": lambda m: m(torch.randn(2, 7), rank=5),
            "rank#type": lambda m: m(torch.randn(2, 7), rank=2.0),
        },
        bad_constructions={
            "in_features": lambda: LowRankLinear(0, 4),
            "out_features": lambda: LowRankLinear(4, 2.5),
            "max_rank": lambda: LowRankLinear(4, 6, max_rank=5),
            "dtype": lambda: LowRankLinear(4, 4, dtype=torch.complex64),
            "backend": lambda: LowRankLinear(4, 4, backend="cuda"),
        },
        second_order=True,
    ),
    _low_rank_conv(LowRankConv1d, (6,)),
    _low_rank_conv(LowRankConv2d, (5, 4), groups=2),
    _low_rank_conv(LowRankConv3d, (4, 3, 3)),
    Entry(
        name="LowRankEmbedding",
        module=LowRankEmbedding,
        factory=lambda **keywords: LowRankEmbedding(9, 6, max_rank=4, **keywords),
        make_input=lambda batch, dtype: (torch.randint(9, (batch, 3)),),
        shows=("9, 6", "rank=4"),
        bad_calls={
            "index#no tensor": lambda m: m([1]),
            "index#dtype": lambda m: m(torch.ones(2)),
            "rank": lambda m: m(torch.ones(2, dtype=torch.int64), rank=5),
        },
        bad_constructions={
            "num_embeddings": lambda: LowRankEmbedding(0, 4),
            "embedding_dim": lambda: LowRankEmbedding(4, 2.5),
            "padding_idx": lambda: LowRankEmbedding(4, 4, padding_idx=4),
            "max_norm": lambda: LowRankEmbedding(4, 4, max_norm=1.0),
            "sparse": lambda: LowRankEmbedding(4, 4, sparse=True),
            "max_rank": lambda: LowRankEmbedding(4, 6, max_rank=5),
        },
        second_order=True,
    ),
    _low_rank_attention("whole", add_zero_attn=True, bias=False, slow=COMPILERS),
    _low_rank_attention("cross", kdim=5, vdim=6, add_bias_kv=True, max_rank=4),
    _separable_conv(SeparableConv1d, (6,)),
    _separable_conv(SeparableConv2d, (5, 4)),
    _separable_conv(SeparableConv2d, (5, 4), name="cp", format="cp", groups=2, slow=COMPILERS),
    _separable_conv(SeparableConv3d, (4, 3, 3)),
    _separable_conv(SeparableConvTranspose2d, (5, 4)),
    _gaunt_product("parities", ("2x0e+2x1o+2x1e", "2x0e+2x1o", "2x0e+2x1o+2x1e+2x2e"), antisymmetric=True),
    _gaunt_product(
        "edges",
        ("2x0e+2x1o", "0e+1o+2e", "2x0e+2x1o+2x2e"),
        connection="uvu",
        rank=2,
        internal_weights=False,
        shared_weights=False,
        layout="ir_mul",
        slow=COMPILERS,
    ),
    _gaunt_product(
        "mixing", ("2x0e+3x1o", "2x0e+1x1o", "3x0e+2x1o+2x1e"), connection="uvw", antisymmetric=True, slow=COMPILERS
    ),
    Entry(
        name="GauntSelfInteraction",
        module=GauntSelfInteraction,
        factory=lambda **keywords: GauntSelfInteraction("2x0e+2x1o+2x2e", rank=2, **keywords),
        make_input=lambda batch, dtype: (torch.randn(batch, 18, dtype=dtype),),
        shows=("2x0e+2x1o+2x2e", "rank=2"),
        bad_calls={
            "x#no tensor": lambda m: m([[1.0]]),
            "x#size": lambda m: m(torch.randn(2, 17)),
            "x#dtype": lambda m: m(torch.ones(2, 18, dtype=torch.int64)),
            "weight": lambda m: m(torch.randn(2, 18), torch.randn(3)),
        },
        bad_constructions={
            "irreps_in": lambda: GauntSelfInteraction("2x0e+3x1o"),
            "irreps_out": lambda: GauntSelfInteraction("2x1o"),
            "rank": lambda: GauntSelfInteraction("2x0e", rank=0),
        },
        second_order=True,
    ),
    Entry(
        name="GauntConv",
        module=GauntConv,
        factory=lambda **_: GauntConv("2x0e+2x1o+2x1e", 2, "2x0e+2x1o+2x1e", antisymmetric=True),
        make_input=_gaunt_conv_input,
        shows=("2x0e+2x1o+2x1e", "lmax_filter=2", "antisymmetric=True"),
        bad_calls={
            "x#size": lambda m: m(torch.randn(2, 13), *_gaunt_conv_input(2, torch.float32)[1:]),
            "x#dimensions": lambda m: m(torch.randn(14), *_gaunt_conv_input(2, torch.float32)[1:]),
            "edge_vec": lambda m: m(torch.randn(2, 14), torch.randn(2, 2), *_gaunt_conv_input(2, torch.float32)[2:]),
            "edge_index#range": lambda m: m(
                torch.randn(2, 14), torch.randn(1, 3), torch.tensor([[0], [2]]), torch.randn(1, m.weight_numel)
            ),
            "edge_index#dtype": lambda m: m(
                torch.randn(2, 14), torch.randn(1, 3), torch.zeros(2, 1), torch.randn(1, m.weight_numel)
            ),
            "weight": lambda m: m(*_gaunt_conv_input(2, torch.float32)[:3], torch.randn(2, 5)),
        },
        bad_constructions={
            "irreps_in": lambda: GauntConv("2x0e+3x1o", 2, "2x0e"),
            "irreps_out#multiplicity": lambda: GauntConv("2x0e", 2, "3x0e"),
            "irreps_out#parity": lambda: GauntConv("2x0e", 2, "2x1e"),
            "lmax_filter": lambda: GauntConv("2x0e", -1, "2x0e"),
            "backend": lambda: GauntConv("2x0e", 1, "2x0e", backend="cuda"),
        },
        not_applicable={
            **NO_PARAMETERS,
            **because("nodes and edges have one dimension each", "leading_dimensions"),
            **because("edge_index has its edges along dimension 1: exported in tests/gaunt", "exported"),
        },
        second_order=True,
    ),
    Entry(
        name="GauntSymmetricContraction",
        module=GauntSymmetricContraction,
        factory=lambda **keywords: GauntSymmetricContraction("2x0e+2x1o+2x1e", "2x0e+2x1o", 3, 3, **keywords),
        make_input=lambda batch, dtype: (torch.randn(batch, 2, 7, dtype=dtype), torch.randn(batch, 3, dtype=dtype)),
        shows=("2x0e+2x1o+2x1e -> 2x0e+2x1o", "correlation=3", "num_elements=3"),
        bad_calls={
            "x#no tensor": lambda m: m([[1.0]], torch.ones(1, 3)),
            "x#channels": lambda m: m(torch.randn(2, 3, 7), torch.ones(2, 3)),
            "x#components": lambda m: m(torch.randn(2, 2, 6), torch.ones(2, 3)),
            "x#dtype": lambda m: m(torch.ones(2, 2, 7, dtype=torch.int64), torch.ones(2, 3)),
            "y#elements": lambda m: m(torch.randn(2, 2, 7), torch.ones(2, 4)),
            "y#range": lambda m: m(torch.randn(2, 2, 7), torch.tensor([0, 3])),
            "y#no tensor": lambda m: m(torch.randn(2, 2, 7), [0, 1]),
        },
        bad_constructions={
            "irreps_in": lambda: GauntSymmetricContraction("2x0e+3x1o", "2x0e", 3, 3),
            "irreps_out": lambda: GauntSymmetricContraction("2x0e+2x1o", "2x1e", 3, 3),
            "correlation": lambda: GauntSymmetricContraction("2x0e", "2x0e", 0, 3),
            "num_elements": lambda: GauntSymmetricContraction("2x0e", "2x0e", 3, 0),
        },
        second_order=True,
    ),
    Entry(
        name="ExactTensorProduct",
        module=ExactTensorProduct,
        factory=lambda **keywords: ExactTensorProduct(
            "2x0e+2x1o",
            "2x0e+2x1o",
            "2x0e+2x1e",
            [(0, 0, 0, "uuu", True, 1.0), (1, 1, 1, "uuu", True, 0.5)],
            **keywords,
        ),
        make_input=lambda batch, dtype: (torch.randn(batch, 8, dtype=dtype), torch.randn(batch, 8, dtype=dtype)),
        shows=("2x0e+2x1o",),
        bad_calls={
            "x#size": lambda m: m(torch.randn(2, 7), torch.randn(2, 8)),
            "y#size": lambda m: m(torch.randn(2, 8), torch.randn(2, 7)),
            "weight": lambda m: m(torch.randn(2, 8), torch.randn(2, 8), torch.randn(3)),
        },
        bad_constructions={
            "internal_weights": lambda: ExactTensorProduct("0e", "0e", "0e", [], shared_weights=False),
            "instructions#mode": lambda: ExactTensorProduct("0e", "0e", "0e", [(0, 0, 0, "uvw", True, 1.0)]),
            "instructions#fields": lambda: ExactTensorProduct("0e", "0e", "0e", [(0, 0, 0, "uuu", True)]),
        },
        second_order=True,
    ),
    Entry(
        name="SelfMix",
        module=SelfMix,
        factory=lambda **keywords: SelfMix(2, 3, antisymmetric=True, **keywords),
        make_input=lambda batch, dtype: (torch.randn(batch, 9, 3, dtype=dtype),),
        bad_calls={
            "x#no tensor": lambda m: m([[1.0]]),
            "x#size": lambda m: m(torch.randn(2, 8, 3)),
        },
        bad_constructions={
            "lmax": lambda: SelfMix(-1, 3),
            "channels": lambda: SelfMix(2, 0),
        },
        second_order=True,
    ),
    Entry(
        name="RingTensorAttention",
        module=RingTensorAttention,
        factory=lambda **keywords: RingTensorAttention(12, 2, batch_first=True, is_causal=True, window2=3, **keywords),
        make_input=lambda batch, dtype: (torch.randn(batch, 7, 12, dtype=dtype),),
        shows=("12, 2", "form="),
        bad_calls=_bad_sequences(12),
        bad_constructions={
            "embed_dim": lambda: RingTensorAttention(0, 1),
            "dropout": lambda: RingTensorAttention(12, 2, dropout=0.1),
            "approx": lambda: RingTensorAttention(12, 2, approx="polynomial"),
            "backend": lambda: RingTensorAttention(12, 2, backend="dense"),
            "layout": lambda: RingTensorAttention(12, 2, layout=7),
        },
        not_applicable=NO_LEADING,
    ),
    Entry(
        name="TensorTransformerBlock",
        module=TensorTransformerBlock,
        factory=lambda **keywords: TensorTransformerBlock(
            12, 2, 16, 0.0, batch_first=True, is_causal=True, window2=3, **keywords
        ),
        make_input=lambda batch, dtype: (torch.randn(batch, 7, 12, dtype=dtype),),
        bad_calls={
            "src#no tensor": lambda m: m([[1.0]]),
            "src#dimensions": lambda m: m(torch.randn(2, 3, 4, 12)),
            "src#channels": lambda m: m(torch.randn(2, 3, 11)),
            "attn_mask": lambda m: m(torch.randn(2, 3, 12), src_mask=torch.zeros(3, 3).bool()),
        },
        bad_constructions={
            "d_model": lambda: TensorTransformerBlock(0, 2),
            "nhead": lambda: TensorTransformerBlock(12, 0),
            "dim_feedforward": lambda: TensorTransformerBlock(12, 2, 0),
            "dropout": lambda: TensorTransformerBlock(12, 2, dropout=-0.1),
            "activation": lambda: TensorTransformerBlock(12, 2, activation="rely"),
            "layer_norm_eps": lambda: TensorTransformerBlock(12, 2, layer_norm_eps=0.0),
            "window1": lambda: TensorTransformerBlock(12, 2, window1=0),
        },
        not_applicable=NO_LEADING,
    ),
    _ring_attention("causal", is_causal=True),
    _ring_attention("window", window_size=(2, 1), bias=False, slow=COMPILERS),
    _ring_attention("cross", kdim=5, vdim=6, slow=COMPILERS),
    _ppgn_block("plus"),
    _ppgn_block(
        "plain",
        plus=False,
        mlp_depth=1,
        norm="layer",
        scale="sqrt_n",
        slow=COMPILERS,
        not_applicable=because("the loss of the check is nearly constant over what a LayerNorm gives", "autocast"),
    ),
    _ppgn("plus"),
    _ppgn("plain", plus=False, scale="n", pool="add", readout="jk_sum", slow=COMPILERS),
    Entry(
        name="PolynomialConv",
        module=PolynomialConv,
        factory=lambda **keywords: PolynomialConv(3, 4, **keywords),
        make_input=_graph_input,
        shows=("3, 4", "patterns=4", "normalize='log1p'"),
        bad_calls={
            "x#no tensor": lambda m: m([1.0, 2.0], torch.zeros(2, 0, dtype=torch.int64)),
            "x#channels": lambda m: m(torch.randn(2, 4), torch.zeros(2, 0, dtype=torch.int64)),
            "edge_index#dtype": lambda m: m(torch.randn(2, 3), torch.zeros(2, 1)),
            "edge_index#range": lambda m: m(torch.randn(2, 3), torch.full((2, 1), 2)),
            "edge_attr": lambda m: m(torch.randn(2, 3), torch.zeros(2, 1, dtype=torch.int64), torch.ones(1, 1)),
            "poly": lambda m: m(torch.randn(2, 3), torch.zeros(2, 1, dtype=torch.int64), None, torch.ones(1, 3)),
        },
        bad_constructions={
            "in_channels": lambda: PolynomialConv(0, 4),
            "out_channels": lambda: PolynomialConv(3, 0),
            "patterns": lambda: PolynomialConv(3, 4, []),
            "edge_dim": lambda: PolynomialConv(3, 4, edge_dim=0),
            "normalize": lambda: PolynomialConv(3, 4, normalize="log"),
        },
        not_applicable={
            **because("nodes and edges have one dimension each", "leading_dimensions"),
            **because("edge_index has its edges along dimension 1: exported in tests/polynomial", "exported"),
            **because("a graph is no batch to share out: each rank has graphs of its own", "ddp", "fsdp2"),
        },
        second_order=True,
    ),
    _loss(LpLoss, {"p": lambda: LpLoss(p=0.5)}),
    _loss(H1Loss, {"periodic": lambda: H1Loss(periodic=(True,))}),
]


def record() -> None:
    shapes = {
        e.name: {n: list(t.shape) for n, t in e.build().state_dict().items()}
        for e in ENTRIES
        if "state_dict" not in e.not_applicable
    }
    NAMES_FILE.write_text(json.dumps(shapes, indent=1) + "\n")


if __name__ == "__main__":
    record()
