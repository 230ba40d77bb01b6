"""What every benchmark shares: a case, its correctness check, interleaved timing, peak memory, growth exponents.

A :class:`Case` is one problem (its labels say the shape), a way to make its inputs, a float64 reference, and
implementations: ours and the peers, each a factory that builds a :class:`Built` from the inputs. All run in one
process. Each is checked against the reference before it is timed, and what is wrong is not timed. Times are taken in
turn (A B A B ..., in alternating order), so that a slow spell of the machine hits all of them; the ratio to a peer is
the median over the paired samples.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
import pathlib
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

OURS = "torchlayers"
FORWARD, BOTH = "forward", "forward+backward"
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOT_FAMILIES = ("gpu", "plot", "table")

# A graph replay shows the device's own time where launching from the host takes longer; above this nothing is hidden.
SMALL_KERNEL_MS = 0.3
# Rounds per row; the time budget decides between them.
MIN_ROUNDS, MAX_ROUNDS = 5, 101

# What a device can do at best, from its maker's data sheet, dense: bytes/s of memory and flop/s by arithmetic.
# "tf32x3" is float32 by three TF32 products. CPUs have no entry: their peaks depend on the host's configuration.
PEAKS: dict[str, dict[str, float]] = {
    "H200": {"bytes": 4.8e12, "fp32": 67e12, "tf32x3": 165e12, "tf32": 495e12, "bf16": 989e12, "int8": 1979e12},
    "H100 80GB HBM3": {
        "bytes": 3.35e12, "fp32": 67e12, "tf32x3": 165e12, "tf32": 495e12, "bf16": 989e12, "int8": 1979e12,
    },
    "H100 PCIe": {
        "bytes": 2.0e12, "fp32": 51e12, "tf32x3": 126e12, "tf32": 378e12, "bf16": 756e12, "int8": 1513e12,
    },
    "A100-SXM4-80GB": {
        "bytes": 2.039e12, "fp32": 19.5e12, "tf32x3": 52e12, "tf32": 156e12, "bf16": 312e12, "int8": 624e12,
    },
    "A100-SXM4-40GB": {
        "bytes": 1.555e12, "fp32": 19.5e12, "tf32x3": 52e12, "tf32": 156e12, "bf16": 312e12, "int8": 624e12,
    },
    "A100 80GB PCIe": {
        "bytes": 1.935e12, "fp32": 19.5e12, "tf32x3": 52e12, "tf32": 156e12, "bf16": 312e12, "int8": 624e12,
    },
}  # fmt: skip


@dataclass
class Built:
    """One implementation, ready to run: ``forward()``, what to differentiate by, and the output's cotangent.

    ``leaves`` are in the order of the reference's gradients. A real leaf with a trailing 2 counts as complex where the
    reference's gradient is complex.
    """

    forward: Callable[[], torch.Tensor]
    leaves: Sequence[torch.Tensor] = ()
    cotangent: torch.Tensor | None = None

    def call(self, mode: str) -> tuple[torch.Tensor, ...]:
        """The output, and after it the gradients in mode ``"forward+backward"``."""
        if mode == FORWARD:
            with torch.no_grad():
                return (self.forward(),)
        out = self.forward()
        return (out, *torch.autograd.grad(out, self.leaves, self.cotangent))


@dataclass
class Case:
    """One problem and everybody who solves it.

    Args:
        labels: what tells this case from the family's others, such as ``{"B": 4, "N": 128}``.
        inputs: device -> whatever the factories and the reference take.
        reference: inputs -> float64 (output, gradient of each leaf, ...).
        ours: inputs -> :class:`Built`.
        peers: name -> the same. A factory that raises ModuleNotFoundError is a peer that is not installed.
        tolerance: relative error (of each output and gradient) above which a result is wrong and is not timed.
        modes: which of ``"forward"`` and ``"forward+backward"``.
        work: mode -> ``{"bytes": ..., "flops": ..., "math": "tf32x3"}``, the least that the operation needs, for the
            achieved rates and the roofline; ``flops`` and ``math`` may be absent.
        scale: the label over which growth is fitted, or None.
        headline: whether the README's table shows it.
        quick: whether ``--quick`` runs it.
    """

    labels: Mapping[str, Any]
    inputs: Callable[[torch.device], Any]
    reference: Callable[[Any], tuple[torch.Tensor, ...]]
    ours: Callable[[Any], Built]
    peers: Mapping[str, Callable[[Any], Built]]
    tolerance: float
    modes: Sequence[str] = (FORWARD, BOTH)
    work: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scale: str | None = None
    headline: bool = False
    quick: bool = False

    @property
    def title(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.labels.items())


@dataclass(frozen=True)
class Settings:
    """How to run: on which device, what to measure, and how many seconds of timing a row may take."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    speed: bool = True
    memory: bool = True
    quick: bool = False
    budget_s: float = 3.0


def say(text: str, end: str = "\n") -> None:
    """Progress, on stderr: stdout belongs to the table."""
    print(text, end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- small statistics


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q``-quantile of ``values``, interpolated linearly."""
    if not values:
        raise ValueError("values must not be empty")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarise(samples: Mapping[str, Sequence[float]], unit: str = "ms") -> dict[str, dict[str, float]]:
    """Median and 20 %-80 % spread of each name's samples, and of the ratios to ours (sample by sample).

    A ratio above 1 means that ours is faster. Without samples of ours there are no ratios.
    """
    result: dict[str, dict[str, float]] = {}
    for name, values in samples.items():
        entry = {
            unit: quantile(values, 0.5),
            f"{unit}_p20": quantile(values, 0.2),
            f"{unit}_p80": quantile(values, 0.8),
        }
        if name != OURS and OURS in samples:
            ratios = [theirs / ours for theirs, ours in zip(values, samples[OURS], strict=True)]
            entry |= {"ratio": quantile(ratios, 0.5), "ratio_p20": quantile(ratios, 0.2)}
            entry["ratio_p80"] = quantile(ratios, 0.8)
        result[name] = entry
    return result


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of ``values ~ sizes^p``, by least squares on the logarithms."""
    if len(sizes) != len(values) or len(set(sizes)) < 2:
        raise ValueError(f"sizes and values must pair up and hold two distinct sizes, got {sizes} and {values}")
    if min(*sizes, *values) <= 0:
        raise ValueError("sizes and values must be positive")
    xs, ys = [math.log(v) for v in sizes], [math.log(v) for v in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def rounded(value: Any, digits: int = 4) -> Any:
    """``value`` with its floats (also inside lists and dicts) cut to ``digits`` significant ones."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    return value


# ---------------------------------------------------------------- correctness


def relative_errors(results: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> list[float]:
    """‖result − reference‖ / ‖reference‖ of each pair, in float64; a wrong shape is an infinite error."""
    errors = []
    for result, ref in zip(results, reference, strict=False):
        result, ref = result.detach(), ref.detach()
        if ref.is_complex() and not result.is_complex() and result.shape == (*ref.shape, 2):
            result = torch.view_as_complex(result.double().contiguous())
        if result.shape != ref.shape:
            errors.append(math.inf)
            continue
        difference = torch.linalg.vector_norm(result.to(ref.dtype) - ref)
        norm = torch.linalg.vector_norm(ref)
        errors.append(float(difference / norm) if norm > 0 else float(difference))
    return errors


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _guarded(entry: dict[str, Any], action: Callable[[], Any]) -> Any:
    """Run ``action``; what it raises is noted in ``entry``, never raised: a peer that fails is a result."""
    try:
        return action()
    except ModuleNotFoundError as error:
        entry.update(status="not installed", detail=str(error.name))
    except Exception as error:
        entry.update(status="failed", detail=_first_line(error))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return None


def check(built: Built, mode: str, reference: Sequence[torch.Tensor], tolerance: float) -> dict[str, Any]:
    """Run once and compare: ``{"status": "ok" | "wrong", "error": largest relative error}``."""
    results = built.call(mode)
    expected = reference[: len(results)] if mode == FORWARD else reference
    if len(results) != len(expected):
        return {"status": "wrong", "detail": f"{len(results)} results, {len(expected)} expected"}
    errors = relative_errors(results, expected)
    worst = math.nan if any(math.isnan(e) for e in errors) else max(errors)
    if worst <= tolerance:
        return {"status": "ok", "error": worst}
    return {"status": "wrong", "error": worst, "detail": f"relative error {worst:.1e}, at most {tolerance:.0e} allowed"}


# ---------------------------------------------------------------- time


class _CpuTimer:
    def sampler(self, run: Callable[[], Any]) -> Callable[[], float]:
        """A function that takes one sample, in ms; short calls are repeated within it."""
        run()
        start = time.perf_counter()
        run()
        repeats = max(1, math.ceil(2e-3 / max(time.perf_counter() - start, 1e-7)))

        def sample() -> float:
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start) / repeats * 1e3

        return sample


class _CudaTimer:
    def __init__(self, device: torch.device):
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def sampler(self, run: Callable[[], Any]) -> Callable[[], float]:
        """A function that takes one sample, in ms, by events, with a cold L2 cache."""
        run()

        def sample() -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

        return sample


def interleave(
    samplers: Mapping[str, Callable[[], float]], budget_s: float, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Take samples in turn, in alternating order, until the budget is spent: equally many of each."""
    start = clock()
    for sampler in samplers.values():  # not kept: the first samples warm up
        sampler()
    one_round = max(clock() - start, 1e-9)
    rounds = min(max(int(budget_s / one_round), MIN_ROUNDS), MAX_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in names if i % 2 == 0 else reversed(names):
                samples[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return samples


def host_us(run: Callable[[], Any], calls: int = 10) -> float:
    """The host's µs per call on a GPU: how long Python and the launches take, the device running behind."""
    best = math.inf
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return best


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept=kept) -> None:  # the outputs live in the graph's memory as long as the replay does
        graph.replay()

    return replay


# ---------------------------------------------------------------- memory


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Silence file descriptor 2: the profiler's C++ side announces each start and stop there."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak of the memory that a call allocates beyond what was there, outputs and gradients included.

    On a GPU the caching allocator's own statistic; on the CPU the running sum of torch's allocations as the profiler
    records them (scratch space that MKL or pocketfft takes past torch's allocator is not seen).
    """
    run()  # tables, plans and autotuning are not the call's
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _muted_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# ---------------------------------------------------------------- a row


def device_peaks(name: str) -> dict[str, float] | None:
    """The entry of :data:`PEAKS` for a device's name, or None."""
    return next((peaks for key, peaks in PEAKS.items() if key in name), None)


def rates(work: Mapping[str, Any], ms: float, peaks: Mapping[str, float] | None) -> dict[str, float]:
    """What was achieved, and the fraction of the roofline: the least possible time over the measured one."""
    seconds, result, bounds = ms * 1e-3, {}, []
    if "bytes" in work:
        result["gbps"] = work["bytes"] / seconds / 1e9
        bounds.append(work["bytes"] / peaks["bytes"] if peaks else 0.0)
    if "flops" in work:
        result["tflops"] = work["flops"] / seconds / 1e12
        bounds.append(work["flops"] / peaks[work.get("math", "fp32")] if peaks else 0.0)
    if "atoms" in work:
        result["atoms_per_s"] = work["atoms"] / seconds
    if peaks and bounds:
        result["roofline"] = max(bounds) / seconds
    return result


def _last_dispatch() -> str | None:
    package = sys.modules.get("torchlayers")
    return package.last_dispatch() if package is not None else None


def measure_case(case: Case, settings: Settings) -> list[dict[str, Any]]:
    """One row for each of the case's modes."""
    device = settings.device
    inputs = case.inputs(device)
    reference = case.reference(inputs)
    factories = {OURS: case.ours, **case.peers}
    entries: dict[str, dict[str, Any]] = {name: {"status": "ok"} for name in factories}
    built = {name: _guarded(entries[name], lambda f=factory: f(inputs)) for name, factory in factories.items()}
    return [_measure_row(case, mode, built, entries, reference, settings) for mode in case.modes]


def _measure_row(
    case: Case,
    mode: str,
    built: Mapping[str, Built | None],
    build_entries: Mapping[str, Mapping[str, Any]],
    reference: Sequence[torch.Tensor],
    settings: Settings,
) -> dict[str, Any]:
    device = settings.device
    entries = {name: dict(entry) for name, entry in build_entries.items()}
    for name, implementation in built.items():
        entry = entries[name]
        if entry["status"] == "ok":
            verdict = _guarded(entry, lambda b=implementation: check(b, mode, reference, case.tolerance))
            entry.update(verdict or {})
        if name == OURS and entry["status"] == "ok" and (dispatch := _last_dispatch()):
            entry["dispatch"] = dispatch

    runs = {n: lambda b=built[n]: b.call(mode) for n, e in entries.items() if e["status"] == "ok"}
    if settings.speed:
        _time_row(runs, entries, case.work.get(mode, {}), settings)
    if settings.memory:
        for name, run in runs.items():
            peak = _guarded(entries[name], lambda r=run: peak_bytes(r, device))
            if peak is not None:
                entries[name]["peak_bytes"] = peak
    return _row(case, mode, entries)


def _row(case: Case, mode: str, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "case": dict(case.labels),
        "mode": mode,
        "headline": case.headline,
        "scale": case.scale,
        "work": dict(case.work.get(mode, {})),
        "implementations": entries,
    }


def _time_row(
    runs: dict[str, Callable[[], Any]],
    entries: dict[str, dict[str, Any]],
    work: Mapping[str, Any],
    settings: Settings,
) -> None:
    on_gpu = settings.device.type == "cuda"
    timer = _CudaTimer(settings.device) if on_gpu else _CpuTimer()
    peaks = device_peaks(torch.cuda.get_device_name(settings.device)) if on_gpu else None

    def timed(calls: Mapping[str, Callable[[], Any]], unit: str) -> dict[str, dict[str, float]]:
        samplers = {n: _guarded(entries[n], lambda r=run: timer.sampler(r)) for n, run in calls.items()}
        samplers = {n: s for n, s in samplers.items() if s is not None}
        return summarise(interleave(samplers, settings.budget_s), unit) if samplers else {}

    times = timed(runs, "ms")
    for name, result in times.items():
        entries[name].update(result)
        entries[name].update(rates(work, result["ms"], peaks))
    if not on_gpu:
        return
    for name in times:
        entries[name]["host_us"] = host_us(runs[name])
    graphs = {}
    for name, result in times.items():
        if result["ms"] > SMALL_KERNEL_MS:
            continue
        note: dict[str, Any] = {}
        graphs[name] = _guarded(note, lambda r=runs[name]: captured(r))
        if note:
            entries[name]["graph"] = f"not captured: {note['detail']}"
    for name, result in timed({n: g for n, g in graphs.items() if g is not None}, "graph_ms").items():
        entries[name].update({k.replace("ratio", "graph_ratio"): v for k, v in result.items()})
        # The graph's time is the device's own.
        entries[name].update(rates(work, result["graph_ms"], peaks))


# ---------------------------------------------------------------- a family


def families() -> list[str]:
    """The names of all families: the modules beside this one that are not tools."""
    found = pkgutil.iter_modules([str(pathlib.Path(__file__).parent)])
    return sorted(m.name for m in found if not m.name.startswith("_") and m.name not in NOT_FAMILIES)


def family_cases(family: str, device_type: str) -> list[Case]:
    """The cases of a family on a kind of device; empty for one that has none."""
    module = importlib.import_module(f"benchmarks.{family}")
    return list(module.cases(device_type)) if hasattr(module, "cases") else []


def run_family(family: str, settings: Settings, *, scaling_only: bool = False) -> dict[str, Any]:
    """Measure a family: ``{"rows": [...], "scaling": [...]}``."""
    module = importlib.import_module(f"benchmarks.{family}")
    if hasattr(module, "measure"):
        return rounded({"rows": module.measure(settings), "scaling": []})
    cases = [c for c in family_cases(family, settings.device.type) if c.quick or not settings.quick]
    if scaling_only:
        cases = [c for c in cases if c.scale is not None]
    rows: list[dict[str, Any]] = []
    for i, case in enumerate(cases, 1):
        say(f"[{i}/{len(cases)}] {family} {case.title}", end=" ")
        start = time.perf_counter()
        try:
            measured = measure_case(case, settings)
        except Exception as error:  # inputs or the reference failed, or a run that had passed its check
            failure = {OURS: {"status": "failed", "detail": _first_line(error)}}
            measured = [_row(case, mode, failure) for mode in case.modes]
        rows += measured
        say(f"({time.perf_counter() - start:.0f} s)")
        for row in measured:
            say(f"    {row['mode']}: {one_line(row)}")
    return rounded({"rows": rows, "scaling": scaling(rows)})


def one_line(row: Mapping[str, Any]) -> str:
    """A row in words, for progress."""
    words = []
    for name, entry in row["implementations"].items():
        if entry["status"] != "ok":
            words.append(f"{name} {entry['status']} ({entry.get('detail', '')})")
        elif "ms" in entry:
            ratio = f" ({entry['ratio']:.2f}x)" if "ratio" in entry else ""
            words.append(f"{name} {entry['ms']:.3g} ms{ratio}")
        elif "peak_bytes" in entry:
            words.append(f"{name} {entry['peak_bytes'] / 1e6:.1f} MB")
    return "; ".join(words)


def scaling(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of time and peak memory against each row's ``scale`` label, over rows that are otherwise alike."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("scale"):
            fixed = tuple((k, v) for k, v in row["case"].items() if k != row["scale"])
            groups.setdefault((row["scale"], row["mode"], fixed), []).append(row)
    fits = []
    for (scale, mode, fixed), members in groups.items():
        implementations = {}
        for name in members[0]["implementations"]:
            exponents: dict[str, Any] = {}
            for key, quantity in (("time", "ms"), ("memory", "peak_bytes")):
                points = [
                    (row["case"][scale], row["implementations"][name][quantity])
                    for row in members
                    if row["implementations"].get(name, {}).get(quantity)
                ]
                if len({n for n, _ in points}) >= 3:
                    exponents[key] = fit_exponent(*zip(*points, strict=True))
                    exponents["points"] = [n for n, _ in points]
            if exponents:
                implementations[name] = exponents
        if implementations:
            fits.append({"case": dict(fixed), "mode": mode, "against": scale, "implementations": implementations})
    return fits


def ours_failed(family_result: Mapping[str, Any]) -> list[str]:
    """Which rows have no valid result of ours, in words."""
    failed = []
    for row in family_result["rows"]:
        entry = row["implementations"][OURS]
        if entry["status"] != "ok":
            labels = " ".join(f"{k}={v}" for k, v in row["case"].items())
            failed.append(f"{labels} {row['mode']}: {entry['status']} ({entry.get('detail', '')})")
    return failed
