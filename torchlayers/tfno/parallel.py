"""Patches over ranks: a model that sees each rank's share of a field's patches and trains as one process would.

Everywhere the objective is the mean of the ranks' losses. Two operations with the right backward are then enough:
the gathered field's gradient is the sum over the ranks that use it, and the gradient of what all ranks hold alike
(parameters, the input) is the mean over them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from .._checks import check_int
from .patching import MultiGridPatching

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["MultiGridParallel", "MultigridPatching2D"]


class MultiGridParallel(nn.Module):
    """Run ``model`` on this rank's share of the patches of a field, and reduce the gradients.

    The mesh has two dimensions: over ``"dp"`` the batch is split (by the caller), over ``"mp"`` the patches of every
    sample are (here: rank r of m takes the r-th of m equal runs of the row-major patches, so that one sample is
    enough for any number of ranks). Only these patches are built and go through the model. Halos are cut from the
    input, not exchanged; the only communication is one all-gather of the cropped outputs, when stitching, and the
    reduction of the gradients.

    The mean of the ranks' losses is the loss of one process that holds the whole batch and all patches, and after
    ``backward()`` every rank holds that process's gradients, over both dimensions of the mesh. Loss functions that
    are means over the batch give this as they are, stitched or not. A trainer leaves the reduction to this module
    (its attribute ``reduces_gradients`` says so); averaging over dp once more, as DDP or FSDP2 over that dimension do,
    changes nothing, since the dp ranks hold equal gradients already.

    The reduction belongs to the graph, not to hooks: parameters enter the model through an identity whose backward
    averages over the ranks, all of them in one collective per dtype and mesh dimension once the model's backward is
    through. So each ``backward()`` contributes exactly once under accumulation, ``torch.autograd.grad`` and higher
    derivatives work, and nothing is lost when the module is copied, moved or loaded. Parameters that no rank used
    keep ``grad`` None; those that some ranks used get the mean, with zero for the others. Every rank must run
    backward through the output equally often. Activation checkpointing inside the model must be the non-reentrant kind
    (``use_reentrant=False``): the other one recomputes outside the graph, where nothing averages. ``x.grad``, if asked
    for, is that of this dp rank's loss, on every mp rank.

    The module has the model's own parameters, buffers and children, not copies under a prefix: state dicts and
    optimizer states are the same with and without it. Parameters and buffers that lie on the mesh's type of device
    are broadcast from the first rank at construction, as DDP does; move the model there first. Buffers that change
    in training, such as batch norm's statistics (a patch's, not the field's), stay each rank's own.

    Args:
        model: maps patches (B, ``patching.channels(C)``, P + 2p per axis) to (B, C', P + 2p per axis).
        patching: how a field is cut.
        mesh: a :class:`~torch.distributed.device_mesh.DeviceMesh` with dimensions ``"dp"`` and ``"mp"``; others must
            have size 1. gloo and NCCL.
        stitching: whether the output is the whole field on every rank, or this rank's cropped patches, to be compared
            with :meth:`patch_target`.
        reduces_gradients: whether this module averages the gradients. If not, whoever averages them over all ranks of
            the mesh (DDP, FSDP2) makes them the single process's; a sharded model needs this.

    In formula, over the ranks r of the mesh: L = mean_r L_r and p.grad = mean_r ∂L_r/∂p, on every rank.

    Shapes:
        - x: (B, C, N_1, …, N_d), this dp rank's batch, the same on all its mp ranks; or, ``patched=True``, this
          rank's patches (B · K, ``patching.channels(C)``, P + 2p per axis), K = ``len(indices)``, such as a data
          loader makes by ``patching.patch(x, indices)`` where no rank can hold a field
        - output: (B, C', N_1, …, N_d) when stitching, else (B · K, C', P_1, …, P_d)

    Raises:
        ValueError: patches that do not divide over mp, or a mesh without the two dimensions: at construction, on
            every rank, before any communication. A model that changes the patches' batch or grid: at the call.
        TypeError: arguments of another kind.

    Source: "Multi-Grid Tensorized Fourier Neural Operator for High-Resolution PDEs" (arXiv 2310.00120):
    its multi-grid domain decomposition.

    Example, alone or under ``torchrun`` (here all ranks share the patches)::

        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torchlayers.tfno import TFNO, LpLoss, MultiGridParallel, MultiGridPatching

        if not dist.is_initialized():
            if dist.is_torchelastic_launched():
                dist.init_process_group()
            else:
                dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "mp"))
        patching = MultiGridPatching(levels=1, padding=4)
        model = TFNO(n_modes=(8, 8), in_channels=patching.channels(1), out_channels=1, hidden_channels=8)
        parallel = MultiGridParallel(model, patching, mesh)
        x, y = torch.randn(2, 1, 32, 32), torch.randn(2, 1, 32, 32)  # the same on all mp ranks
        loss = LpLoss(d=2)(parallel(x), y)
        loss.backward()
    """

    reduces_gradients = True
    model: nn.Module
    patching: MultiGridPatching
    indices: range
    """Which of a sample's patches are this rank's, by row-major number."""

    def __init__(
        self,
        model: nn.Module,
        patching: MultiGridPatching,
        mesh: DeviceMesh,
        *,
        stitching: bool = True,
        reduces_gradients: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a Module, got {type(model).__name__}")
        if not isinstance(patching, MultiGridPatching):
            raise TypeError(f"patching must be a MultiGridPatching, got {type(patching).__name__}")
        names = getattr(mesh, "mesh_dim_names", None)
        if not hasattr(mesh, "get_group"):
            raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
        if names is None or "dp" not in names or "mp" not in names:
            raise ValueError(f"mesh must have dimensions named 'dp' and 'mp', got {names}")
        for name, size in zip(names, mesh.shape, strict=True):
            if name not in ("dp", "mp") and size > 1:
                raise ValueError(f"mesh must be of size 1 in dimensions other than 'dp' and 'mp', got {name}={size}")
        ranks = mesh["mp"].size()
        # The model's own dictionaries: whatever is registered in the one is in the other, under the same name.
        for kind in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            object.__setattr__(self, kind, getattr(model, kind))
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "patching", patching)
        self.training = model.training
        self.mesh = mesh
        self.stitching = stitching
        self.reduces_gradients = reduces_gradients
        self.indices = _share(patching.num_patches, ranks, mesh.get_local_rank("mp"))
        groups = [mesh.get_group(name) for name in ("mp", "dp") if mesh[name].size() > 1]
        for group in groups:
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.device.type == mesh.device_type:
                    dist.broadcast(_real(tensor.detach()), group=group, group_src=0)
        self._patch_group = _named(mesh.get_group("mp"))
        self._groups = [_named(group) for group in groups] if reduces_gradients else []

    def forward(self, x: Tensor, *, patched: bool = False) -> Tensor:
        if not patched:
            if self._patch_group[1] > 1 and x.requires_grad:
                (x,) = _Shared.apply([self._patch_group], x)
            x = self.patching.patch(x, self.indices)
        y = self._run(x)
        if y.shape[0] != x.shape[0] or y.shape[2:] != x.shape[2:]:  # of which the inner pixels are not known
            raise ValueError(
                f"model must keep the batch and the grid of the patches, {tuple(x.shape)}, got {tuple(y.shape)}"
            )
        y = self.patching.crop(y)
        return self.stitch(y) if self.stitching else y

    def patch_target(self, y: Tensor) -> Tensor:
        """What the unstitched output should equal: this rank's patches (B · K, C', P_1, …, P_d) of the field y."""
        return self.patching.patch_target(y, self.indices)

    def stitch(self, y: Tensor) -> Tensor:
        """The whole field, on every rank, from each rank's cropped patches (as the unstitched output has them)."""
        y = _gather_patches(y, len(self.indices), self._patch_group)
        return self.patching.stitch(y)

    def _run(self, x: Tensor) -> Tensor:
        if not (self._groups and torch.is_grad_enabled()):
            return self.model(x)
        # Every place that holds a parameter once: a parameter may have several places, a module several names (which
        # functional_call's own treatment of ties would restore in the wrong order).
        places = {
            f"{path}.{name}" if path else name: p
            for path, module in self.model.named_modules()
            for name, p in module._parameters.items()
            if p is not None and p.requires_grad
        }
        if not places:
            return self.model(x)
        if any(hasattr(p, "device_mesh") for p in places.values()):
            raise ValueError(
                "reduces_gradients must be False for a model with sharded parameters (let FSDP2 average over all "
                "ranks of the mesh), or only MultiGridParallel as a whole may be sharded, over dp; got a DTensor"
            )
        unique = list(dict.fromkeys(places.values()))
        shared = dict(zip(unique, _Shared.apply(self._groups, *unique), strict=True))
        return functional_call(self.model, {name: shared[p] for name, p in places.items()}, (x,), tie_weights=False)

    def reset_parameters(self) -> None:
        """Initialise the model anew, by its own ``reset_parameters``."""
        self.model.reset_parameters()  # type: ignore[operator]

    def train(self, mode: bool = True) -> MultiGridParallel:
        self.model.train(mode)
        self.training = mode
        return self

    # The model's own hooks and extra state take part as they do without this module.
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.model._load_from_state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MultiGridParallel:
        """A copy of the model on the same mesh (process groups cannot be copied)."""
        memo[id(self.mesh)] = self.mesh
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{name}={self.mesh[name].size()}" for name in ("dp", "mp"))
        return f"{self.patching}, {sizes}, stitching={self.stitching}"


class MultigridPatching2D(nn.Module):
    """neuraloperator's ``MultigridPatching2D``: patches of inputs and targets for a training loop written for it.

    Equal to neuraloperator 2.0.0 bit for bit where that is right (both sizes divisible by 2 · 4^levels), and right
    where that isn't: smaller sizes, no levels, a halo along one axis, resolutions that take turns. Patches per axis
    are 2^levels, the halo is circular. The model is held, not called. New code does better with
    :class:`MultiGridPatching`, or :class:`MultiGridParallel` over ranks.

    Args:
        model: kept as ``self.model``.
        levels: number of coarse levels; with 0 fields pass through as they are, without a halo.
        padding_fraction: halo as a fraction of the whole axis, a number or one per axis.
        use_distributed: share each sample's patches over the ranks of ``group``. Gradients are right when averaged
            over these ranks, as DDP does, whether stitching or not.
        stitching: whether outputs are compared as whole fields in training; in evaluation they always are.
        group: the process group for ``use_distributed``, the default group if None.

    Raises:
        ValueError: ``use_distributed`` without a process group or with one whose size doesn't divide the patches;
            otherwise as :class:`MultiGridPatching`.

    Example:

        >>> model = nn.Conv2d(6, 1, 3, padding=1)  # 3 channels at two resolutions
        >>> patcher = MultigridPatching2D(model, levels=1, padding_fraction=0.125)
        >>> x, y = patcher.patch(torch.randn(2, 3, 32, 32), torch.randn(2, 1, 32, 32))
        >>> out, y = patcher.unpatch(model(x), y)
        >>> out.shape, y.shape
        (torch.Size([2, 1, 32, 32]), torch.Size([2, 1, 32, 32]))
    """

    def __init__(
        self,
        model: nn.Module,
        levels: int = 0,
        padding_fraction: float | Sequence[float] = 0,
        use_distributed: bool = False,
        stitching: bool = True,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_int("levels", levels, minimum=0)
        self.model = model
        self.patching = MultiGridPatching(levels, padding_fraction=padding_fraction if levels else 0)
        self.levels = levels
        self.n_patches = list(self.patching.patches)
        self.use_distributed = use_distributed
        self.stitching = stitching
        self._group: _Group = ("", 1)
        self._indices: range | None = None
        if use_distributed:
            if not (dist.is_available() and dist.is_initialized()):
                raise ValueError("use_distributed must be False without a process group (init_process_group), got True")
            self._indices = _share(self.patching.num_patches, dist.get_world_size(group), dist.get_rank(group))
            self._group = _named(dist.distributed_c10d._get_default_group() if group is None else group)

    def patch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The patches of x, and y: in patches (no halo) too unless stitching; this rank's where distributed.

        x: (B, C, H, W) gives (B · K, C · (levels + 1), H / n + 2 p_H, W / n + 2 p_W); y gives (B · K, C, H / n, W / n)
        or stays.
        """
        if not self.stitching:
            y = self.patching.patch_target(y, self._indices)
        return self.patching.patch(x, self._indices), y

    def unpatch(self, x: Tensor, y: Tensor, evaluation: bool = False) -> tuple[Tensor, Tensor]:
        """Outputs x without their halo, and targets y as :meth:`patch` gave them.

        Both are whole fields if stitching or ``evaluation``, else patches.
        """
        x = self.patching.crop(x)
        if self.stitching or evaluation:
            x = self._stitch(x)
            if not self.stitching:
                y = self._stitch(y)
        return x, y

    def _stitch(self, x: Tensor) -> Tensor:
        if self._indices is not None:
            x = _gather_patches(x, len(self._indices), self._group)
        return self.patching.stitch(x)


def _share(patches: int, ranks: int, rank: int) -> range:
    if patches % ranks:
        raise ValueError(f"patches must divide over the ranks that share them, got {patches} patches on {ranks} ranks")
    each = patches // ranks
    return range(rank * each, (rank + 1) * each)


_Group = tuple[str, int]  # a process group by name and size: plain values, which copy and compile


def _named(group: ProcessGroup) -> _Group:
    return group.group_name, group.size()


def _gather_patches(y: Tensor, each: int, group: _Group) -> Tensor:
    """(B · K · ranks, …) in the order of one process from every rank's (B · K, …), K = ``each``."""
    if group[1] == 1:
        return y
    y = _Gather.apply(y, group)
    return y.unflatten(1, (-1, each)).transpose(0, 1).flatten(0, 2)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


# The operations behind torch's functional collectives: gloo and NCCL alike, and traceable. The public spellings
# differ between the versions of torch that we support.
_ops = torch.ops._c10d_functional


class _Gather(torch.autograd.Function):
    """Every rank's x, stacked in front: (ranks, …). Backward sums over the ranks what they ask of this one's x."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = name, ranks = group
        if not x.numel():
            return x.new_empty(ranks, *x.shape)
        out = _ops.wait_tensor(_ops.all_gather_into_tensor(_real(x).contiguous()[None], ranks, name))
        return torch.view_as_complex(out) if x.is_complex() else out

    @staticmethod
    def backward(ctx, grad):
        return _Scatter.apply(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    """The sum over the ranks of x[this rank], for x (ranks, …). Backward gathers."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = name, ranks = group
        if not x.numel():
            return x.new_empty(x.shape[1:])
        out = _ops.wait_tensor(_ops.reduce_scatter_tensor(_real(x).contiguous(), "sum", ranks, name))[0]
        return torch.view_as_complex(out) if x.is_complex() else out

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.group), None


class _Shared(torch.autograd.Function):
    """The tensors themselves, which all ranks of the groups hold alike. Backward averages over the ranks."""

    @staticmethod
    def forward(ctx, groups, *tensors):
        ctx.set_materialize_grads(False)
        ctx.groups = groups
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors]
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, *_Mean.apply(ctx.groups, ctx.like, *grads)


class _Mean(torch.autograd.Function):
    """The means over the ranks of the groups' product; None counts as zero and stays None if it is so on every rank.

    Its own adjoint, where the objective is a mean over the ranks.
    """

    @staticmethod
    def forward(ctx, groups, like, *tensors):
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.like = groups, like
        out: list[Tensor | None] = [None] * len(like)
        for dtype in dict.fromkeys(dtype for _, dtype, _ in like):
            members = [i for i, (_, other, _) in enumerate(like) if other == dtype]
            present = [tensors[i] is not None for i in members]
            parts = []
            for i in members:
                shape, _, device = like[i]
                parts.append(torch.zeros(shape, dtype=dtype, device=device) if tensors[i] is None else tensors[i])
            # One more entry per tensor says whether this rank has it: no second collective, and no look at it (which
            # would wait for the device) where nothing is missing.
            flat = _real(torch.cat([p.reshape(-1) for p in parts] + [parts[0].new_tensor(present)]))
            for name, ranks in groups:
                flat = _ops.wait_tensor(_ops.all_reduce(flat, "sum", name)) / ranks
            flat = torch.view_as_complex(flat) if dtype.is_complex else flat
            *means, anywhere = flat.split([p.numel() for p in parts] + [len(members)])
            used = present if all(present) else (anywhere != 0).tolist()
            for i, mean, use in zip(members, means, used, strict=True):
                out[i] = mean.view(like[i][0]) if use else None
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *_Mean.apply(ctx.groups, ctx.like, *grads)
