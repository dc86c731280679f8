"""Device, dtype, BLAS and memory: the only file that asks what machine this is.

Import it before MLX, as every folder of this package does. MLX's Linux CPU wheel
contains the reference BLAS, which multiplies float32 matrices at about 2 GFLOP/s. An
optimised BLAS that MLX finds first takes its place at 50 to 170; torch and numpy keep theirs.
"""

import ctypes
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from interviewmate_mlx import __version__
from interviewmate_mlx.elf import load_group
from interviewmate_mlx.errors import BackendError

BLAS_VARIABLE = "INTERVIEWMATE_BLAS"
DEVICE_VARIABLE = "INTERVIEWMATE_DEVICE"
# For tests and bug reports: `gpu` computes on a CPU as on a GPU, in bfloat16.
PATH_VARIABLE = "INTERVIEWMATE_PATH"
KERNEL_VARIABLE = "OPENBLAS_CORETYPE"  # OpenBLAS's own: it forces the kernels of a processor

# Metal: a wired limit of the whole recommended working set is unstable.
_WIRED_SHARE = 0.85
# What the results of products may take that are timed at once.
_TIMED_BYTES = 256 << 20
# Microbatches side by side on a CPU: at most as many as a usual step has rows.
_MAX_STREAMS = 4
# Share of the memory that training may plan with; the rest is the system's and the user's.
_MEMORY_SHARE = 0.75
_num_sharing = 1  # processes of one run on this machine

_MLX_PACKAGES = ("mlx", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")  # one of them has libmlx.so
_MLX_CAME_FIRST = "mlx.core" in sys.modules

# For a process of its own: load a library, multiply ones by ones, and compare.
_TRY_BLAS = """
import ctypes, sys
for path in sys.argv[1:]:
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
n = 200
ones, product = ((ctypes.c_float * (n * n))(*[x] * (n * n)) for x in (1.0, 0.0))
one, zero = ctypes.c_float(1), ctypes.c_float(0)
library.cblas_sgemm(101, 111, 111, n, n, n, one, ones, n, ones, n, zero, product, n)
sys.exit(0 if set(product) == {float(n)} else "its product is wrong")
"""


@dataclass(frozen=True)
class Blas:
    """A library of matrix products.

    Attributes:
        path: of the library, or its name for the system's loader.
        reason: why it was chosen.
        needs: libraries that must be loaded before it.
    """

    path: str
    reason: str
    needs: tuple[str, ...] = ()


def _load_blas() -> Blas | None:
    """Load the first BLAS that works, and MLX behind it; None if there is none to load.

    Raises:
        BackendError: the variable names a library that cannot be used.
    """
    if sys.platform != "linux" or _MLX_CAME_FIRST:
        return None  # macOS has Accelerate; a loaded MLX has its BLAS already
    libmlx = [path for name in _MLX_PACKAGES for path in _installed(name, "libmlx.so")]
    if not libmlx:
        return None
    for blas in _candidates():
        is_named = blas.path == os.environ.get(BLAS_VARIABLE)
        # A library can end the process by an illegal instruction. Those of the extra choose their
        # kernels by the processor; others, and forced kernels, are tried elsewhere first.
        fault = _try_blas(blas) if is_named or KERNEL_VARIABLE in os.environ else ""
        if not fault:
            try:
                load_group([*blas.needs, blas.path, *libmlx])
                return blas
            except OSError as error:
                fault = str(error)
        if is_named:
            raise BackendError(
                f"{BLAS_VARIABLE}={blas.path} cannot be used: {fault}\n"
                "Unset it, or name the path of a shared library with the cblas interface."
            )
    return None


def _candidates() -> list[Blas]:
    """The libraries to look for, the fastest on this processor first."""
    if named := os.environ.get(BLAS_VARIABLE):
        beside = sorted(map(str, Path(named).absolute().parent.glob("libgfortran.so*")))
        return [Blas(named, f"{BLAS_VARIABLE} names it", tuple(beside))]
    is_amd = _is_amd()
    mkl_reason = "MKL of the cpu extra" + ("" if is_amd else ", the faster one on Intel processors")
    mkl = [Blas(path, mkl_reason) for path in _installed("mkl", "libmkl_rt.so")]
    fortran = tuple(_installed("ngsolve-openblas", "libgfortran"))
    reason = "OpenBLAS of the cpu extra" + (", the faster one on AMD processors" if is_amd else "")
    openblas = [
        Blas(path, reason, fortran) for path in _installed("ngsolve-openblas", "libopenblas")
    ]
    system = [Blas("libopenblas.so.0", "the system's OpenBLAS")]
    return [*openblas, *system, *mkl] if is_amd else [*mkl, *openblas, *system]


def _try_blas(blas: Blas) -> str:
    """Compute a product with a library in a process of its own; why it fails, or nothing."""
    command = [sys.executable, "-I", "-S", "-c", _TRY_BLAS, *blas.needs, blas.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        kernels = os.environ.get(KERNEL_VARIABLE)
        forced = f", with {KERNEL_VARIABLE}={kernels}" if kernels else ""
        return f"it ends the process with {signal.Signals(-done.returncode).name}{forced}"
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def _installed(distribution: str, start: str) -> list[str]:
    """The shared libraries of a PyPI package whose names start so; none if it is not installed."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return []
    return [os.path.realpath(file.locate()) for file in files if file.name.startswith(start)]


def _is_amd() -> bool:
    """Whether the processor is AMD's, or of its design."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "AuthenticAMD" in text or "HygonGenuine" in text


BLAS = _load_blas()

try:
    import mlx.core as mx  # after the BLAS, see above
except ModuleNotFoundError as error:
    if error.name not in ("mlx", "mlx.core"):
        raise
    raise BackendError(
        "MLX is not installed: on Linux the backend is an extra of its own.\n"
        'Install one: pip install "interviewmate-mlx[cpu]", or [cuda12] or [cuda13] for an '
        "NVIDIA GPU."
    ) from error


def _choose_device() -> None:
    """Obey the environment."""
    wanted = os.environ.get(DEVICE_VARIABLE, "")
    if wanted not in ("", "cpu", "gpu"):
        raise BackendError(
            f"{DEVICE_VARIABLE}: got {wanted!r}, expected cpu or gpu.\nCorrect it, or unset it."
        )
    if wanted == "gpu" and not mx.is_available(mx.gpu):
        raise BackendError(
            f"{DEVICE_VARIABLE}=gpu, but MLX sees no GPU here.\n"
            "Install the extra for it (cuda12 or cuda13 on Linux), or unset the variable."
        )
    if wanted:
        mx.set_default_device(mx.cpu if wanted == "cpu" else mx.gpu)


_choose_device()  # before mlx-lm is loaded, which makes a stream of the default device


@contextmanager
def _unchanged_file_limit() -> Iterator[None]:
    """Keep the limit of open files, which mlx-lm sets to 4,096 when it is imported.

    Where the system allows fewer, that is an error; where it allows more, a loss.
    """
    original = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = original


with _unchanged_file_limit():
    import mlx_lm  # noqa: F401  here, so that nothing else imports it first


@dataclass(frozen=True)
class Machine:
    """What this process runs on."""

    device: str  # cpu, metal or cuda
    path: str  # cpu or gpu: the way of computing that suits it
    device_bytes: int  # of memory that the device may have
    device_name: str
    dtype: str  # the default for weights and activations
    blas: str | None  # where the CPU's matrix products come from
    cpu_streams: int  # microbatches side by side; 0 on the path of a GPU
    memory_bytes: int  # what training may plan with
    mlx_version: str


def machine() -> Machine:
    """What this process runs on. The first call warns if that is slower than it needs to be."""
    _warn_of_slow_blas()
    device = _device()
    path = "cpu" if device == "cpu" and os.environ.get(PATH_VARIABLE) != "gpu" else "gpu"
    info = mx.device_info()
    # Metal's, and on CUDA what other processes leave: what is free, and what MLX has.
    total = int(info.get("max_recommended_working_set_size", 0))
    if not total and (free := info.get("free_memory", 0)):
        total = int(free) + mx.get_active_memory() + mx.get_cache_memory()
    total = total or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        device=device,
        path=path,
        device_bytes=total,
        device_name=str(info.get("device_name", platform.machine())),
        dtype="float32" if path == "cpu" else "bfloat16",
        blas="Accelerate" if sys.platform == "darwin" else BLAS.path if BLAS else None,
        cpu_streams=_num_streams() if path == "cpu" else 0,
        memory_bytes=int(total * _MEMORY_SHARE / _num_sharing),
        mlx_version=metadata.version("mlx"),
    )


@cache
def _warn_of_slow_blas() -> None:
    """Once, where MLX is left with its own BLAS."""
    if _device() == "cpu" and sys.platform == "linux" and BLAS is None:
        warnings.warn(
            "MLX uses its reference BLAS: matrix products run 20 to 80 times slower than this "
            f"CPU can, because {_why_no_blas()}.",
            stacklevel=3,
        )


def _why_no_blas() -> str:
    if sys.platform == "darwin":
        return "macOS brings its own"
    if _MLX_CAME_FIRST:
        return "MLX was imported before interviewmate_mlx.backend; import that first"
    return "no other was found; install the cpu extra, or your system's OpenBLAS (libopenblas0)"


def _device() -> str:
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def has_causal_kernel(head_dim: int, dtype: mx.Dtype) -> bool:
    """Whether MLX's causal attention trains without keeping its scores, as it does on Metal.

    Args:
        head_dim: of queries, keys and values.
        dtype: of theirs.
    """
    if _device() == "cpu":
        return machine().path == "gpu"  # computed by parts, to the same result
    return _device() == "metal" and not _keeps_scores(head_dim, dtype, 4095, "causal")


def has_masked_kernel(head_dim: int, dtype: mx.Dtype) -> bool:
    """Whether MLX's attention with a mask trains without keeping its scores, as it does on CUDA.

    The number of queries must be a multiple of what the kernel takes at a time.

    Args:
        head_dim: of queries, keys and values.
        dtype: of theirs.
    """
    return _device() == "cuda" and not _keeps_scores(head_dim, dtype, 4096, "scores")


@cache
def _keeps_scores(head_dim: int, dtype: mx.Dtype, length: int, kind: str) -> bool:
    """Ask the device: with its scores kept, a small example takes more memory than they have.

    Args:
        head_dim, dtype, length: of queries, keys and values.
        kind: of the mask: `causal`, or `scores` for one that is added to them.
    """
    heads = 4
    inputs = [mx.random.normal((1, heads, length, head_dim)).astype(dtype) for _ in range(3)]
    mask: Any = kind if kind == "causal" else mx.zeros((1, heads, length, length), dtype)

    def sum_of_attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=1.0, mask=mask
        ).sum()

    slopes = mx.grad(sum_of_attention, argnums=(0, 1, 2))
    mx.eval(inputs, mask)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(slopes(*inputs))
    taken = mx.get_peak_memory() - before
    mx.reset_peak_memory()
    return taken >= heads * length * length * dtype.size


@contextmanager
def memory_limits(memory_bytes: int, weight_bytes: int, peak_bytes: int) -> Iterator[None]:
    """Keep MLX within a plan while training on a GPU, and restore its limits after.

    Allocations wait when they would exceed the plan, with freed buffers counted. Freed buffers
    are kept for the next step, as many as the plan has beside the weights. On a Mac what is
    expected stays in memory, weights included.

    Args:
        memory_bytes: that may be taken.
        weight_bytes: of them, those that are never freed.
        peak_bytes: that are expected at the most.
    """
    if _device() == "cpu":
        yield
        return
    with ExitStack() as stack:
        stack.callback(mx.set_memory_limit, mx.set_memory_limit(memory_bytes))
        cache = max(0, memory_bytes - weight_bytes)
        stack.callback(mx.set_cache_limit, mx.set_cache_limit(cache))
        if _device() == "metal":
            most = int(mx.device_info()["max_recommended_working_set_size"])
            wired = min(peak_bytes, int(most * _WIRED_SHARE))
            stack.callback(mx.set_wired_limit, mx.set_wired_limit(wired))
        yield


def new_cpu_stream() -> mx.Stream:
    """Another stream of the CPU, for the thread that makes it."""
    return mx.new_stream(mx.cpu)


def share_cores(num_streams: int) -> None:
    """Give a matrix product its share of a CPU's cores, while this many streams compute."""
    if set_threads := _blas_threads_setter():
        set_threads(max(1, _num_cores() // num_streams))


def take_share(number: int, count: int) -> None:
    """Plan with this process's share of the machine, where several processes train one run.

    On Linux it keeps to cores of its own; with fewer cores than processes, to one.

    Args:
        number: of this process among them, from 0.
        count: of them.
    """
    global _num_sharing
    _num_sharing = count
    if sys.platform == "linux" and count > 1:
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[number::count] or [cores[number % len(cores)]]
        for thread in os.listdir("/proc/self/task"):  # a new thread inherits its maker's cores
            os.sched_setaffinity(int(thread), mine)
        share_cores(1)


def _num_streams() -> int:
    """0 for a single core, or if the BLAS cannot be told how many threads to use."""
    cores = _num_cores()
    return min(cores, _MAX_STREAMS) if cores > 1 and _blas_threads_setter() else 0


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let glibc reuse freed memory instead of returning it to the system, within the block.

    MLX's CPU backend allocates each array separately. Large ones would be mapped, cleared
    and unmapped every time, by one thread at once: a third of a step's time. A thread's own
    heap is returned as soon as it is empty, so all threads share the first one.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_arena_max, m_mmap_max, m_trim_threshold = -8, -4, -1  # malloc.h
        libc.mallopt(m_arena_max, 1)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never
    try:
        yield
    finally:
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # return what was kept


def _blas_threads_setter() -> Callable[[int], None] | None:
    """The function of the loaded BLAS that says how many threads a matrix product may use."""
    library = ctypes.CDLL(BLAS.path) if BLAS else None
    names = ("MKL_Set_Num_Threads", "openblas_set_num_threads")
    return next((getattr(library, name) for name in names if hasattr(library, name)), None)


def resolve_dtype(name: str) -> mx.Dtype:
    """`auto`, `float32`, `bfloat16` or `float16` -> the MLX dtype."""
    default = machine().dtype
    dtype: mx.Dtype = getattr(mx, default if name == "auto" else name)
    return dtype


def matmul_gflops(
    rows: int = 1024,
    inner: int = 1024,
    columns: int = 1024,
    seconds: float = 0.1,
    dtype: mx.Dtype | None = None,
) -> float:
    """The best speed of (rows, inner) x (inner, columns) products within `seconds`.

    At least four times are taken, after one that is not. On a shared machine, more tries find a
    quieter moment. `dtype` is by default the device's.
    """
    dtype = dtype or resolve_dtype("auto")
    a = mx.random.uniform(-1, 1, (rows, inner)).astype(dtype)
    b = mx.random.uniform(-1, 1, (columns, inner)).astype(dtype).T  # as a layer's weight lies
    # On a GPU several, or the time would be that of the launch; as many as fit beside a model.
    count = max(1, min(10, _TIMED_BYTES // (rows * columns * dtype.size)))
    count = 1 if _device() == "cpu" else count
    mx.eval(a, b)
    mx.eval(a @ b)
    times: list[float] = []
    while len(times) < 4 or sum(times) < seconds:
        start = time.perf_counter()
        mx.eval([a @ b for _ in range(count)])
        times.append(time.perf_counter() - start)
    return 2 * count * rows * inner * columns / min(times) / 1e9


def slowdowns() -> list[str]:
    """What makes this machine slower now than it could be, as far as can be seen."""
    found = []
    if _device() == "cpu":
        if mx.is_available(mx.gpu):
            found.append(f"on the CPU, although MLX sees a GPU: unset {DEVICE_VARIABLE}")
        elif Path("/proc/driver/nvidia/version").exists():
            found.append("on the CPU, although there is an NVIDIA GPU: install the extra cuda13")
    load = psutil.getloadavg()[0]
    if load > _num_cores() / 2:
        found.append(f"other work: a load of {load:.1f} on {_num_cores()} cores in the last minute")
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery and battery.power_plugged is False:
        found.append("on battery: many machines run slower then")
    if _saves_power():
        found.append("a mode that saves power is on: turn it off in the system's settings")
    return found


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, if there is one."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"  (\d+\.[\d.]+)  ", path.read_text()) if path.exists() else None
    return found and found[1]


def _saves_power() -> bool:
    """macOS's low power mode, or the profile of that kind on Linux."""
    if sys.platform == "darwin":
        settings = subprocess.run(["pmset", "-g"], capture_output=True, text=True).stdout
        return ["lowpowermode", "1"] in [line.split() for line in settings.splitlines()]
    profile = Path("/sys/firmware/acpi/platform_profile")
    return profile.exists() and profile.read_text().strip() == "low-power"


def swapped_bytes() -> int:
    """How much the system has swapped in and out since it started."""
    if sys.platform == "darwin":  # psutil's numbers count the pages of files there, too
        return _mac_swapped_bytes(
            subprocess.run(["vm_stat"], capture_output=True, text=True).stdout
        )
    swap = psutil.swap_memory()
    return swap.sin + swap.sout


def _mac_swapped_bytes(vm_stat: str) -> int:
    """What macOS's `vm_stat` says was swapped in and out; 0 where it says nothing."""
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = re.findall(r"^Swap(?:ins|outs): +(\d+)\.", vm_stat, re.MULTILINE)
    return int(page[1]) * sum(map(int, pages)) if page else 0


def stolen_seconds() -> float:
    """Seconds that a virtual machine's core has waited for others on its host, since its start."""
    return getattr(psutil.cpu_times(), "steal", 0.0) / (os.cpu_count() or 1)  # Linux alone tells


def describe() -> dict[str, str | float | int | None]:
    """Facts about the machine for people and bug reports."""
    here = machine()
    return {
        "interviewmate-mlx": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "mlx": here.mlx_version,
        "device": here.device,
        "device_name": here.device_name,
        "dtype": here.dtype,
        "blas": here.blas,
        "blas_reason": BLAS.reason if BLAS else _why_no_blas(),
        "matmul_gflops": round(matmul_gflops(), 1),
        "device_memory_gb": round(here.device_bytes / 1e9, 1),
        "planned_memory_gb": round(here.memory_bytes / 1e9, 1),
    }
