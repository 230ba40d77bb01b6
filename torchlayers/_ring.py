"""Ranks that exchange tensors: over a process group, or as threads of one process.

All that sequence parallelism sends goes through one primitive, :meth:`Channel.post`: a batch of sends and receives,
posted before compute and awaited after it. Rings, all-gathers, reduce-scatters and all-to-alls are patterns of it.
Custom operators can't take a group as an argument; they take :attr:`Channel.name` and find it by :func:`resolve`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ._checks import check_int, check_ints

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = "ProcessGroup | Channel | str"

__all__ = [
    "Channel",
    "LoopbackWorld",
    "Work",
    "agree",
    "dim_names",
    "group_name",
    "leave_group",
    "place",
    "refuse",
    "resolve",
]

T = TypeVar("T")
Message = tuple[int, Tensor]  # (the peer's rank in the group, a contiguous tensor)
Letter = tuple[int, int, Hashable]

_CONTROL = 1024  # bytes of what ranks tell each other before their first call
_CONTROL_TAG = 99
_SETTLE = 0.1  # seconds; gloo's threads need microseconds, once they are scheduled


class Work:
    """What was posted; :meth:`wait` returns when all has arrived and the sent tensors may be written again."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait: Callable[[], None] | None = wait

    def wait(self) -> None:
        if self._wait is not None:
            self._wait()
            self._wait = None


class Channel(ABC):
    """One rank's end of a group.

    Attributes:
        name: finds this channel again by :func:`resolve`.
        rank, size: in the group, not in the world.
        bytes_sent: payload that this rank has sent to other ranks.
        hops: how many batches it has posted.
    """

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name, self.rank, self.size = name, rank, size
        self.bytes_sent = 0
        self.hops = 0
        self.agreed = False

    @property
    def control_device(self) -> torch.device:
        """Where messages without a payload lie."""
        return torch.device("cpu")

    @abstractmethod
    def _post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Work: ...

    def post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0) -> Work:
        """Start sending and receiving. Every rank of the group posts the same pattern, in the same order.

        Messages between two ranks match by order within a ``tag``; tensors in flight are neither written nor freed
        before :meth:`Work.wait`.
        """
        self.bytes_sent += sum(x.nbytes for _, x in sends)
        self.hops += 1
        return self._post(sends, receives, tag)

    def hop(self, send: Sequence[Tensor], receive: Sequence[Tensor], distance: int = 1, tag: int = 0) -> Work:
        """Send to the rank ``distance`` further round the ring, receive from the one as far behind."""
        to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
        return self.post([(to, x) for x in send], [(source, x) for x in receive], tag)

    def all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> None:
        """``receive[r]`` is filled with rank r's ``send[self.rank]``. Sizes may differ from pair to pair."""
        others = [r for r in range(self.size) if r != self.rank]
        work = self.post([(r, send[r]) for r in others], [(r, receive[r]) for r in others])
        receive[self.rank].copy_(send[self.rank])
        work.wait()

    def all_gather(self, x: Tensor, receive: Sequence[Tensor]) -> None:
        """``receive[r]`` is filled with rank r's ``x``. Sizes may differ from rank to rank."""
        self.all_to_all([x] * self.size, receive)

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum over ranks of ``parts[self.rank]``, in order of rank: the same bits however fast the ranks are."""
        own = parts[self.rank]
        received = [torch.empty_like(own) for _ in range(self.size)]
        self.all_to_all(parts, received)
        total = received[0]
        for part in received[1:]:
            total += part
        return total

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks of ``x``: a reduce-scatter and an all-gather, 2 (size - 1) / size of ``x`` sent."""
        parts = [part.clone() for part in x.reshape(-1).tensor_split(self.size)]
        total = self.reduce_scatter(parts)
        self.all_gather(total, parts)
        return torch.cat(parts).reshape(x.shape)

    def __deepcopy__(self, memo: dict) -> Channel:
        return self


class _GroupChannel(Channel):
    """Point to point over a process group: gloo matches by tag, NCCL by order."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group.group_name, dist.get_rank(group), dist.get_world_size(group))
        self.group = group

    @property
    def control_device(self) -> torch.device:
        kinds = self.group._device_types
        return kinds[0] if torch.device("cpu") not in kinds else torch.device("cpu")

    def _post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Work:
        ops = [dist.P2POp(dist.isend, x, group=self.group, group_peer=peer, tag=tag) for peer, x in sends]
        ops += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer, tag=tag) for peer, x in receives]
        if not ops:
            return Work(lambda: None)
        posted = dist.batch_isend_irecv(ops)

        def wait() -> None:
            for work in posted:  # gloo returns one a message, NCCL one for all
                work.wait()
            ops.clear()  # which have held the tensors under way

        return Work(wait)


class _Alone(Channel):
    """A group of one: nobody to send to."""

    def _post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Work:
        assert not sends and not receives
        return Work(lambda: None)


# Loopback


class LoopbackWorld:
    """``world`` virtual ranks in this process, a thread each, on any device: for tests, traces and timing.

    Args:
        world: number of ranks.
        delay: seconds that every message is under way.
        timeout: seconds after which a rank that waits for a message gives up.

    Attributes:
        bytes_sent: payload that each rank has sent.
        hops: how many batches of messages each rank has posted.

    Example:

        >>> import torch
        >>> from torchlayers import LoopbackWorld, SequenceLayout
        >>> from torchlayers.functional import ring_attention
        >>> world, layout = LoopbackWorld(4), SequenceLayout(32, world=4)
        >>> q = torch.randn(1, 2, 32, 8)
        >>> def attend(rank, group):
        ...     x = layout.shard(q, 2, rank)
        ...     return ring_attention(x, x, x, layout=layout, group=group)
        >>> layout.unshard(world.run(attend), 2).shape
        torch.Size([1, 2, 32, 8])
        >>> world.hops
        [3, 3, 3, 3]
    """

    def __init__(self, world: int, delay: float = 0.0, *, timeout: float = 180.0) -> None:
        self.world = check_int("world", world)
        for name, seconds in (("delay", delay), ("timeout", timeout)):
            if not isinstance(seconds, (int, float)) or not seconds >= 0:
                raise ValueError(f"{name} must be a number of seconds, at least 0, got {seconds!r}")
        self.delay, self.timeout = delay, timeout
        self._changed = threading.Condition()
        # A letter is (sender, recipient, stream), and what number it is there: as with processes, messages match in the
        # order in which they were posted, not in that in which they are awaited.
        self._mail: dict[tuple[Letter, int], tuple[float, Tensor]] = {}
        self._posted: dict[tuple[str, Letter], Iterator[int]] = defaultdict(itertools.count)
        self._failed: int | None = None
        self._running = False
        self._channels: dict[tuple[int, tuple[int, ...]], Channel] = {}
        everyone = tuple(range(self.world))
        self.groups: list[Channel] = [self._channel(rank, everyone) for rank in everyone]

    @property
    def bytes_sent(self) -> list[int]:
        return [sum(channel.bytes_sent for channel in self._channels_of(rank)) for rank in range(self.world)]

    @property
    def hops(self) -> list[int]:
        return [sum(channel.hops for channel in self._channels_of(rank)) for rank in range(self.world)]

    def mesh(self, rank: int, shape: Sequence[int], names: Sequence[str]) -> LoopbackMesh:
        """The ranks row by row in a mesh, as ``rank`` sees it: what ``init_device_mesh(shape, names)`` is to processes.

        Raises:
            ValueError: a shape of another number of ranks, another number of names, no such rank.
        """
        if check_int("rank", rank, minimum=0) >= self.world:
            raise ValueError(f"rank must be below the world's {self.world}, got {rank}")
        shape, names = check_ints("shape", shape), tuple(names)
        if math.prod(shape) != self.world:
            raise ValueError(f"shape must have the {self.world} ranks of the world, got {shape}")
        if len(names) != len(shape):
            raise ValueError(f"names must be one for each of {len(shape)} dimensions, got {names}")
        return LoopbackMesh(self, rank, shape, names)

    def _channel(self, rank: int, members: tuple[int, ...]) -> Channel:
        """The end of ``rank`` of the group of ``members``."""
        with self._changed:
            if (rank, members) not in self._channels:
                self._channels[rank, members] = _LoopbackChannel(self, members.index(rank), members)
            return self._channels[rank, members]

    def _channels_of(self, rank: int) -> list[Channel]:
        return [channel for (owner, _), channel in list(self._channels.items()) if owner == rank]

    def run(self, fn: Callable[[int, Channel], T]) -> list[T]:
        """Call ``fn(rank, group)`` for every rank at the same time.

        Backward passes belong inside ``fn``, since ranks wait for each other there too. Ranks must not accumulate
        into the ``.grad`` of one and the same tensor: give each a model of its own, or take ``torch.autograd.grad``.

        Returns:
            the results, in order of rank.

        Raises:
            Exception: the first that a rank raised; the others, which wait for it in vain, are ended.
        """
        self._mail.clear()
        self._posted.clear()
        self._failed, self._running = None, True
        with_grad = torch.is_grad_enabled()  # like other such modes it belongs to a thread
        results: list[Any] = [None] * self.world
        errors: list[BaseException | None] = [None] * self.world

        def work(rank: int) -> None:
            try:
                # On a GPU one thread runs all of a device's backward nodes, and a rank that waits there would keep
                # the rank that it waits for from running.
                with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(with_grad):
                    results[rank] = fn(rank, self.groups[rank])
            except BaseException as error:
                errors[rank] = error
                with self._changed:
                    if self._failed is None:
                        self._failed = rank
                    self._changed.notify_all()

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._running = False
        if self._failed is not None:
            error = errors[self._failed]
            assert error is not None
            raise error
        return results

    def _send(self, letter: Letter, x: Tensor) -> None:
        with self._changed:
            number = next(self._posted["sent", letter])
            self._mail[letter, number] = time.monotonic() + self.delay, x.detach().clone()
            self._changed.notify_all()

    def _expect(self, letter: Letter) -> int:
        with self._changed:
            return next(self._posted["expected", letter])

    def _receive(self, letter: Letter, number: int, x: Tensor) -> None:
        source, to, _ = letter
        with self._changed:
            if not self._running:
                raise RuntimeError(
                    f"rank {to} waits for rank {source} outside of LoopbackWorld.run: call backward there"
                )
            arrived = self._changed.wait_for(
                lambda: (letter, number) in self._mail or self._failed is not None, self.timeout
            )
            if (letter, number) not in self._mail:
                why = f"rank {self._failed} has failed" if arrived else f"nothing came within {self.timeout} s"
                raise RuntimeError(f"rank {to} waits for rank {source}: {why}")
            ready, sent = self._mail.pop((letter, number))
        if sent.shape != x.shape or sent.dtype != x.dtype:
            raise RuntimeError(
                f"rank {to} expects {tuple(x.shape)} {x.dtype} of rank {source}, got {tuple(sent.shape)} {sent.dtype}"
            )
        time.sleep(max(0.0, ready - time.monotonic()))
        x.detach().copy_(sent)


class _LoopbackChannel(Channel):
    def __init__(self, world: LoopbackWorld, rank: int, members: tuple[int, ...]) -> None:
        super().__init__(f"loopback-{next(_names)}", rank, len(members))
        self.world, self.members = world, members
        _loopbacks[self.name] = self

    def _post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Work:
        own, stream = self.members[self.rank], (self.members, tag)
        for to, x in sends:
            self.world._send((own, self.members[to], stream), x)
        letters = [(self.members[source], own, stream) for source, _ in receives]
        numbers = [self.world._expect(letter) for letter in letters]

        def wait() -> None:
            for letter, number, (_, x) in zip(letters, numbers, receives, strict=True):
                self.world._receive(letter, number, x)

        return Work(wait)


class LoopbackMesh:
    """The part of ``DeviceMesh`` that sequence parallelism uses, over a :class:`LoopbackWorld`; see its ``mesh``."""

    def __init__(self, world: LoopbackWorld, rank: int, shape: tuple[int, ...], names: tuple[str, ...]) -> None:
        self.world, self.shape, self.mesh_dim_names, self.ndim = world, shape, names, len(shape)
        self.strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        self.rank = rank

    def _dim(self, dim: int | str | None) -> int:
        return self.mesh_dim_names.index(dim) if isinstance(dim, str) else dim or 0

    def size(self, mesh_dim: int | None = None) -> int:
        return math.prod(self.shape) if mesh_dim is None else self.shape[mesh_dim]

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        dim = self._dim(mesh_dim)
        return self.rank // self.strides[dim] % self.shape[dim]

    def get_group(self, mesh_dim: int | str | None = None) -> Channel:
        dim = self._dim(mesh_dim)
        first = self.rank - self.get_local_rank(dim) * self.strides[dim]
        return self.world._channel(self.rank, tuple(first + i * self.strides[dim] for i in range(self.shape[dim])))


# Finding channels

_names = itertools.count()  # never the same again: what is known of a group is known by its name
_loopbacks: weakref.WeakValueDictionary[str, Channel] = weakref.WeakValueDictionary()
_groups: dict[str, _GroupChannel] = {}
_alone = _Alone("", 0, 1)


def resolve(name: str) -> Channel:
    """The channel of that name in this process, see :attr:`Channel.name`; "" is a group of this rank alone."""
    if not name:
        return _alone
    loopback = _loopbacks.get(name)
    if loopback is not None:
        return loopback
    try:
        group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise ValueError(f"group must be the name of a group of this process, got {name!r}") from error
    found = _groups.get(name)
    if found is None or found.group is not group:  # names come again after destroy_process_group
        found = _groups[name] = _GroupChannel(group)
    return found


def leave_group() -> None:
    """Destroy this process's groups, once gloo's threads are through with them.

    They take the GIL to free a collective's tensors, some time after its caller has gone on. A group that a thread with
    the GIL frees meanwhile waits for them, and they for the GIL, for ever; and where they come for it while the
    interpreter ends, the process aborts.
    """
    if dist.get_world_size() > 1:
        time.sleep(_SETTLE)
    dist.destroy_process_group()


@torch.compiler.assume_constant_result
def place(name: str | None) -> tuple[int, int]:
    """(rank, size) of this process in the group of that name; (0, 1) for None. A constant to ``torch.compile``."""
    if name is None:
        return 0, 1
    channel = resolve(name)
    return channel.rank, channel.size


def dim_names(mesh: DeviceMesh | LoopbackMesh) -> tuple[str, ...]:
    """What the dimensions of ``mesh`` are called.

    Raises:
        TypeError: it is no mesh.
    """
    if not hasattr(mesh, "mesh_dim_names"):
        raise TypeError(f"mesh must be a DeviceMesh or a mesh of a LoopbackWorld, got {type(mesh).__name__}")
    return mesh.mesh_dim_names or ()


def group_name(
    group: Group | None, mesh: DeviceMesh | LoopbackMesh | None, world: int | None, dim: str | None = None
) -> str | None:
    """The name of the group over which ``world`` ranks exchange; None where there is one rank.

    Args:
        group: a process group, a group of a :class:`LoopbackWorld`, or a name.
        mesh: a mesh of one dimension, or one that has dimension ``dim``.
        world: how many ranks the caller's layout has; None: whatever the group has.
        dim: the dimension of ``mesh`` to take.

    Raises:
        ValueError: both or, for more than one rank, neither given; a mesh without the dimension; another size.
        TypeError: a group or a mesh of another kind.
    """
    if group is not None and mesh is not None:
        raise ValueError("group or mesh must be given, not both")
    if mesh is not None:
        names = dim_names(mesh)
        if dim is not None and dim in names:
            group = mesh.get_group(dim)
        elif mesh.ndim == 1:
            group = mesh.get_group()
        else:
            raise ValueError(f"mesh must have one dimension or one called {dim!r}, got dimensions {names}")
    if group is None:
        if world is not None and world > 1:
            raise ValueError(f"group or mesh must be given for a layout over {world} ranks, got neither")
        return None
    if isinstance(group, str):
        name, size = group, place(group)[1]
    elif isinstance(group, Channel):
        name, size = group.name, group.size
    elif isinstance(group, dist.ProcessGroup):
        name, size = group.group_name, group.size()
    else:
        raise TypeError(f"group must be a process group or a group of a LoopbackWorld, got {type(group).__name__}")
    if world is not None and size != world:
        raise ValueError(f"group must have the layout's {world} ranks, got {size}")
    return name if size > 1 else None


# Agreement


CHECKS = ("first", "always", "never")


def agree(
    channel: Channel,
    call: str | Callable[[], str],
    device: torch.device | None = None,
    refused: Exception | None = None,
    check: str = "first",
) -> None:
    """Before the first call over a group: do all ranks call the same? If not, an error on every one of them.

    Later calls cost nothing: ranks that have agreed once are taken to run the same program. Control messages are not
    counted as payload.

    Args:
        channel: this rank's end.
        call: what this rank is about to do: all that must be the same on all ranks; or what makes that text.
        device: where the payload will lie; NCCL sends from there. None: wherever the group can send from.
        refused: this rank's own error, if its arguments are bad; raised here, once the other ranks know of it.
        check: whether the "first" call is checked, every one ("always"), or none ("never"); the same on all ranks.

    Raises:
        ValueError: ranks differ, or another rank has refused. The group stays usable, and agrees at the next call.
    """
    if check == "always":
        channel.agreed = False
    if check != "never" and not channel.agreed:
        device = channel.control_device if device is None else device
        if refused is not None:
            own = f"no {refused}"
        else:
            own = f"ok {call if isinstance(call, str) else call()}"
        said = _exchange_texts(channel, own, device)
        if refused is None:
            for rank, text in enumerate(said):
                if text.startswith("no "):
                    raise ValueError(f"rank {rank} refused the call: {text[3:]}")
            if len(set(said)) > 1:
                who = "; ".join(f"rank {rank}: {text[3:]}" for rank, text in enumerate(said))
                raise ValueError(f"all ranks of the group must make the same call, got {who}")
            channel.agreed = True
    if refused is not None:
        raise refused


def refuse(
    error: Exception,
    group: Group | None,
    mesh: DeviceMesh | LoopbackMesh | None,
    dim: str | None = None,
    check: str = "first",
) -> NoReturn:
    """Raise ``error``, found in this rank's arguments, once the other ranks know of it; see :func:`agree`."""
    try:
        name = group_name(group, mesh if group is None else None, None, dim)
    except (TypeError, ValueError):
        name = None  # the group itself is what is wrong
    if name is not None and check in CHECKS:
        _tell(name, "see its own error" if torch.compiler.is_compiling() else str(error), check)
    raise error


@torch.compiler.assume_constant_result  # a call that is refused is refused while it is compiled
def _tell(name: str, refused: str, check: str) -> None:
    with unset_fake_temporarily(), contextlib.suppress(ValueError):
        agree(resolve(name), "", refused=ValueError(refused), check=check)


def _exchange_texts(channel: Channel, text: str, device: torch.device) -> list[str]:
    raw = text.encode()
    if len(raw) > _CONTROL:  # the end as a digest, so that a difference there shows
        raw = raw[: _CONTROL - 66] + b"\xe2\x80\xa6" + hashlib.sha256(raw).hexdigest()[:63].encode()
    own = torch.zeros(_CONTROL, dtype=torch.uint8)
    own[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    own = own.to(device)
    texts = [torch.empty_like(own) for _ in range(channel.size)]
    others = [r for r in range(channel.size) if r != channel.rank]
    channel._post([(r, own) for r in others], [(r, texts[r]) for r in others], _CONTROL_TAG).wait()
    texts[channel.rank].copy_(own)
    return [bytes(t.tolist()).rstrip(b"\0").decode(errors="replace") for t in texts]
