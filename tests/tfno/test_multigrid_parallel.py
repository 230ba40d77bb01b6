"""Patches over ranks against one process, in one world of four gloo processes.

This file is also the program that the world runs: each rank compares with a single process of its own and writes, per
case, the largest error it saw; the tests read these.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from torchlayers.testing import serve_ranks, spawn_ranks
from torchlayers.tfno import TFNO
from torchlayers.tfno.parallel import MultiGridParallel, MultigridPatching2D
from torchlayers.tfno.patching import MultiGridPatching

WORLD = 4
MESHES = {"1x2": (1, 2), "2x2": (2, 2), "1x4": (1, 4), "4x1": (4, 1), "1x3": (1, 3), "3x1": (3, 1)}


class ConvNet(nn.Module):
    """One module used twice, a complex and a float32 parameter among float64 ones, one parameter that nobody uses."""

    def __init__(self, channels, checkpointing=False):
        super().__init__()
        self.lift = nn.Conv2d(channels, 4, 1)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.block_again = self.block
        self.project = nn.Conv2d(4, 1, 1)
        self.double()
        self.gain = nn.Parameter(torch.tensor([1.0, 0.5]))
        self.phase = nn.Parameter(torch.randn(4, 1, 1, dtype=torch.complex128))
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("shift", torch.full((1,), 0.1, dtype=torch.float64))
        self.checkpointing = checkpointing
        self.seen = []

    def hidden(self, x):
        x = nn.functional.gelu(self.block(x) * self.gain[0])
        return (self.block_again(x) * self.phase).real * self.gain[1] + self.shift

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        x = self.lift(x)
        x = checkpoint(self.hidden, x, use_reentrant=False) if self.checkpointing else self.hidden(x)
        return self.project(x)


class Experts(nn.Module):
    """Patches choose an expert by the sign of their mean; the third expert is never chosen."""

    def __init__(self, channels):
        super().__init__()
        self.experts = nn.ModuleList(nn.Conv2d(channels, 1, 3, padding=1) for _ in range(3)).double()

    def forward(self, x):
        return torch.cat([self.experts[int(patch.mean() > 0)](patch[None]) for patch in x])


def relative_l2(u, y):
    return ((u - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).mean()


def gradient_error(model, reference):
    """The largest difference of the gradients; infinite where one has a gradient and the other has none."""
    worst = 0.0
    for (name, p), (other, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert name == other
        if (p.grad is None) != (q.grad is None):
            return float("inf")
        if p.grad is not None:
            assert p.grad.dtype == p.dtype
            # The float32 parameter's gradient is rounded to float32 on each rank.
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            error = (grad - q.grad).abs().max().item()
            worst = max(worst, error * (1e-6 if p.dtype == torch.float32 else 1))
    return worst


class Rank:
    """One rank's view of a mesh, and the cases it runs."""

    def __init__(self, name, mesh, batch):
        self.mesh, self.name, self.errors = mesh, name, {}
        dp, self.mp = MESHES[name]
        self.ranks = dp * self.mp
        self.patching = MultiGridPatching(1, padding=(2, 1), patches=(6, 2) if self.mp == 3 else None)
        generator = torch.Generator().manual_seed(7)
        shape = (dp * batch, 2, 24, 16)
        self.x = torch.randn(shape, dtype=torch.float64, generator=generator)
        self.y = torch.randn(dp * batch, 1, 24, 16, dtype=torch.float64, generator=generator)
        self.mine = slice(mesh.get_local_rank("dp") * batch, (mesh.get_local_rank("dp") + 1) * batch)

    def models(self, make=ConvNet, stitching=True, reduces_gradients=True, **kwargs):
        torch.manual_seed(3)
        reference = make(self.patching.channels(2), **kwargs)
        model = copy.deepcopy(reference)
        if dist.get_rank():  # the first rank's parameters count
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.add_(dist.get_rank())
        parallel = MultiGridParallel(
            model, self.patching, self.mesh, stitching=stitching, reduces_gradients=reduces_gradients
        )
        return parallel, reference

    def single_loss(self, reference, x=None, y=None, stitching=True):
        x, y = self.x if x is None else x, self.y if y is None else y
        out = reference(self.patching.patch(x))
        if stitching:
            return relative_l2(self.patching.unpatch(out), y)
        return relative_l2(self.patching.crop(out), self.patching.patch_target(y))

    def loss(self, parallel, x=None, y=None):
        x, y = (self.x if x is None else x)[self.mine], (self.y if y is None else y)[self.mine]
        out = parallel(x)
        model = parallel.module if isinstance(parallel, DistributedDataParallel) else parallel
        return relative_l2(out, y if model.stitching else model.patch_target(y))

    def mean(self, value):
        """Over the ranks of the mesh."""
        value = value.detach().clone()
        for name in ("dp", "mp"):
            dist.all_reduce(value, group=self.mesh.get_group(name))
        return value / self.ranks

    def compare(self, case, parallel, reference, loss, expected):
        error = (self.mean(loss) - expected.detach()).abs().item()
        self.errors[case] = max(error, gradient_error(parallel, reference))

    def run(self, case, make=ConvNet, stitching=True, wrap=lambda model: model, **kwargs):
        parallel, reference = self.models(make, stitching, **kwargs)
        expected = self.single_loss(reference, stitching=stitching)
        expected.backward()
        wrapped = wrap(parallel)  # DDP has to outlive the backward
        loss = self.loss(wrapped)
        loss.backward()
        self.compare(case, parallel, reference, loss, expected)
        return parallel, reference

    def forward_cases(self):
        parallel, reference = self.run("stitched")
        share = self.patching.num_patches // self.mp
        batch = self.x[self.mine].shape[0]
        shapes = [(batch * share, *s[1:]) for s in reference.seen]
        self.errors["only this rank's patches"] = float(parallel.model.seen != shapes)
        self.run("patches", stitching=False)

    def other_ways(self):
        x, y = self.x[self.mine], self.y[self.mine]
        frozen, _ = self.models()
        assert not frozen.requires_grad_(False)(x).requires_grad
        parallel, reference = self.models()
        with torch.no_grad():
            whole = self.patching.unpatch(reference(self.patching.patch(x)))
            patches = self.patching.patch(x, parallel.indices)
            unstitched = MultiGridParallel(parallel.model, self.patching, self.mesh, stitching=False)
            errors = [
                (parallel.eval()(x) - whole).abs().max(),
                (parallel(patches, patched=True) - whole).abs().max(),
                (unstitched.stitch(unstitched(x)) - whole).abs().max(),
                (unstitched(x) - unstitched.patch_target(whole)).abs().max(),
            ]
        self.errors["no_grad, patched input, late stitching"] = max(map(float, errors))

        # Accumulation: two micro-batches, the loss of their sum.
        parallel, reference = self.models()
        for scale in (1.0, 0.3):
            expected = self.single_loss(reference, x=self.x * scale)
            expected.backward()
            loss = self.loss(parallel, x=self.x * scale)
            loss.backward()
        self.compare("accumulation", parallel, reference, loss, expected)

        # The reduction survives a copy, a load and a device or dtype move.
        twin = copy.deepcopy(parallel)
        twin.load_state_dict(reference.state_dict(), assign=True)
        reference.zero_grad(), twin.zero_grad()
        expected = self.single_loss(reference)
        expected.backward()
        loss = self.loss(twin)
        loss.backward()
        self.compare("copy", twin, reference, loss, expected)

        self.run("checkpoint", checkpointing=True)
        self.run("TFNO", lambda channels: TFNO((8, 6), channels, 1, 4, n_layers=2, rank=0.5).double())
        self.x = self.x + torch.where(torch.arange(24)[:, None] < 12, 1.0, -1.0)
        parallel, _ = self.run("experts", Experts)
        self.errors["experts without patches"] = float(parallel.model.experts[2].weight.grad is not None)
        self.run("experts, patches", Experts, stitching=False)

        # The input's gradient, and a penalty on the parameters' (double backward).
        parallel, reference = self.models()
        whole_x = self.x[self.mine].clone().requires_grad_()
        self.single_loss(reference, x=whole_x, y=y).backward()
        mine = self.x[self.mine].clone().requires_grad_()
        relative_l2(parallel(mine), y).backward()
        self.errors["gradient of x"] = (mine.grad - whole_x.grad).abs().max().item()
        parallel, reference = self.models()
        penalties = []
        for model, loss in ((reference, self.single_loss(reference)), (parallel, self.loss(parallel))):
            used = [p for p in model.parameters() if p.numel() != 3]
            grads = torch.autograd.grad(loss, used, create_graph=True)
            penalties.append(sum(g.abs().square().sum() for g in grads))
            penalties[-1].backward()
        self.compare("double backward", parallel, reference, penalties[1], penalties[0])

        # An empty batch, on all ranks.
        out = parallel(self.x[:0])
        parallel.zero_grad()
        out.sum().backward()
        worst = max(p.grad.abs().max().item() for p in parallel.parameters() if p.grad is not None)
        self.errors["empty batch"] = worst + float(out.shape != (0, 1, 24, 16))

    def trainer(self):
        """DDP over dp around the module, three steps of Adam, against one process."""
        group = self.mesh.get_group("dp")
        parallel, reference = self.models()
        for model in (parallel, reference):
            model.unused.requires_grad_(False)
        wrapped = DistributedDataParallel(parallel, process_group=group)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (reference, parallel)]
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            expected = self.single_loss(reference)
            expected.backward()
            loss = self.loss(wrapped)
            loss.backward()
            self.compare("DDP", parallel, reference, loss, expected)
            for optimizer in optimizers:
                optimizer.step()
        ours, theirs = parallel.state_dict(), reference.state_dict()
        assert list(ours) == list(theirs) == list(get_model_state_dict(parallel))
        names = [
            list(get_optimizer_state_dict(model, optimizer)["state"])
            for model, optimizer in zip((reference, parallel), optimizers, strict=True)
        ]
        assert names[0] == names[1], names
        # AdamW divides by the gradient's size: float32 rounding of one parameter's gradient spreads to 1e-7.
        self.errors["three steps"] = 1e-6 * max((ours[k] - theirs[k]).abs().max().item() for k in ours)

    def neuralop_wrapper(self):
        for stitching in (True, False):
            torch.manual_seed(3)
            model = ConvNet(4)
            reference = copy.deepcopy(model)
            group = self.mesh.get_group("mp")
            patcher = MultigridPatching2D(model, 1, [0.125, 0.0625], True, stitching, group=group)
            ddp = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
            x, y = patcher.patch(self.x, self.y)
            out, target = patcher.unpatch(ddp(x), y)
            loss = relative_l2(out, target)
            loss.backward()
            whole = MultigridPatching2D(reference, 1, [0.125, 0.0625], stitching=stitching)
            x, y = whole.patch(self.x, self.y)
            expected = relative_l2(*whole.unpatch(reference(x), y))
            expected.backward()
            self.compare(f"neuralop's wrapper, stitching={stitching}", model, reference, loss, expected)
            x, y = patcher.patch(self.x, self.y)
            out, y = patcher.unpatch(x, y, evaluation=True)
            self.errors[f"neuralop's wrapper, evaluation, stitching={stitching}"] = float(
                not (torch.equal(out[:, :2], self.x) and torch.equal(y, self.y))
            )

    def sharded(self):
        """FSDP2 around the module over dp, and over all ranks of the mesh in place of the module's own reduction."""

        def make(channels):
            return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 1, 1)).double()

        def shard(parallel, mesh, blocks):
            for module in (*(parallel.model[i] for i in blocks), parallel):
                fully_shard(module, mesh=mesh)
            return parallel

        everyone = self.mesh._flatten("everyone")
        self.run("FSDP2 over dp", make, wrap=lambda m: shard(m, self.mesh["dp"], ()))
        self.run("FSDP2 over all ranks", make, wrap=lambda m: shard(m, everyone, (0, 2)), reduces_gradients=False)
        self.run("DDP over all ranks", make, wrap=DistributedDataParallel, reduces_gradients=False)
        parallel, _ = self.models(make)
        try:
            self.loss(shard(parallel, self.mesh["dp"], (0, 2)))
        except ValueError as error:
            self.errors["FSDP2 inside"] = float("reduces_gradients must be False" not in str(error))

    def compiled(self):
        with warnings.catch_warnings():
            # Dynamo itself instantiates the autograd.Function that it traces.
            warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
            net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 1, 1)).double()
            self.run(
                "compiled",
                make=lambda channels: copy.deepcopy(net),
                wrap=lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
            )


def bad_arguments(mesh):
    """What each of these says on this rank; none but "grid" communicates, so a rank alone gets there too."""
    four = MultiGridPatching(1)
    model = nn.Conv2d(2, 1, 1)
    unnamed = DeviceMesh("cpu", torch.arange(WORLD).view(2, 2))
    other = DeviceMesh("cpu", torch.arange(WORLD).view(2, 2, 1), mesh_dim_names=("sp", "dp", "mp"))
    messages = {}
    for case, arguments in {
        "patches": (model, MultiGridPatching(1, patches=3), mesh),
        "unnamed": (model, four, unnamed),
        "third dimension": (model, four, other),
        "mesh": (model, four, None),
        "model": (len, four, mesh),
        "patching": (model, 1, mesh),
    }.items():
        try:
            MultiGridParallel(*arguments)
        except (ValueError, TypeError) as error:
            messages[case] = f"{type(error).__name__}: {error}"
    try:
        MultigridPatching2D(model, 0, use_distributed=True, group=mesh.get_group("mp"))
    except ValueError as error:
        messages["wrapper"] = f"{type(error).__name__}: {error}"
    try:
        MultiGridParallel(nn.Conv2d(2, 1, 3), four, mesh)(torch.zeros(1, 1, 8, 8))
    except ValueError as error:
        messages["grid"] = f"{type(error).__name__}: {error}"
    return messages


def work(rank):
    results = {}
    meshes = {
        name: DeviceMesh("cpu", torch.arange(dp * mp).view(dp, mp), mesh_dim_names=("dp", "mp"))
        for name, (dp, mp) in MESHES.items()
    }
    for name, mesh in meshes.items():
        if mesh.get_coordinate() is None:
            continue
        cases = Rank(name, mesh, batch=1 if name == "1x2" else 2)
        cases.forward_cases()
        if name in ("1x2", "2x2"):
            cases.other_ways()
        if name == "2x2":
            cases.trainer()
            cases.sharded()
        if name == "1x2":
            cases.neuralop_wrapper()
            cases.compiled()
        results[name] = cases.errors
    results["bad arguments"] = bad_arguments(meshes["1x4"])
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of the four ranks found."""
    return spawn_ranks(__file__, WORLD, tmp_path_factory.mktemp("world"))


COMMON = ("stitched", "only this rank's patches", "patches")
MORE = (
    "no_grad, patched input, late stitching",
    "accumulation",
    "copy",
    "checkpoint",
    "TFNO",
    "experts",
    "experts without patches",
    "experts, patches",
    "gradient of x",
    "double backward",
    "empty batch",
)
ONCE = {
    "1x2": (
        "compiled",
        *(f"neuralop's wrapper, {what}stitching={s}" for what in ("", "evaluation, ") for s in (True, False)),
    ),
    "2x2": (
        "DDP",
        "three steps",
        "FSDP2 over dp",
        "FSDP2 over all ranks",
        "DDP over all ranks",
        "FSDP2 inside",
    ),
}
CASES = [(mesh, case) for mesh in MESHES for case in COMMON]
CASES += [(mesh, case) for mesh in ONCE for case in (*MORE, *ONCE[mesh])]


@pytest.mark.distributed
@pytest.mark.parametrize(("mesh", "case"), CASES)
def test_equals_one_process(results, mesh, case):
    ranks = MESHES[mesh][0] * MESHES[mesh][1]
    errors = [result[mesh][case] for result in results[:ranks]]
    assert max(errors) <= 1e-12, errors  # NaN and inf fail
    assert all(error == error for error in errors)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("patches", "ValueError: patches must divide over the ranks that share them, got 9 patches on 4 ranks"),
        ("unnamed", "ValueError: mesh must have dimensions named 'dp' and 'mp', got None"),
        ("third dimension", "ValueError: mesh must be of size 1 in dimensions other than 'dp' and 'mp', got sp=2"),
        ("mesh", "TypeError: mesh must be a DeviceMesh, got NoneType"),
        ("model", "TypeError: model must be a Module, got builtin_function_or_method"),
        ("patching", "TypeError: patching must be a MultiGridPatching, got int"),
        (
            "grid",
            "ValueError: model must keep the batch and the grid of the patches, (1, 2, 4, 4), got (1, 1, 2, 2)",
        ),
        ("wrapper", "ValueError: patches must divide over the ranks that share them, got 1 patches on 4 ranks"),
    ],
)
def test_bad_arguments_on_every_rank(results, case, message):
    assert [result["bad arguments"][case] for result in results] == [message] * WORLD


if __name__ == "__main__":
    serve_ranks(work)
