"""The BLAS under MLX: the faster one for the processor, tried where it could end the process."""

import json
import os
import re
import subprocess
import sys
import textwrap

import mlx.core as mx
import pytest

from interviewmate_mlx import backend
from interviewmate_mlx.backend import BLAS_VARIABLE, Blas
from interviewmate_mlx.errors import BackendError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="macOS brings Accelerate")
LIBRARIES = {
    "mkl": backend._installed("mkl", "libmkl_rt.so"),
    "openblas": backend._installed("ngsolve-openblas", "libopenblas"),
}


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@LINUX
@pytest.mark.parametrize("is_amd", [True, False])
def test_faster_library_for_the_processor_comes_first(monkeypatch, is_amd):
    monkeypatch.delenv(BLAS_VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_is_amd", lambda: is_amd)
    paths = {"mkl": ["mkl.so"], "ngsolve-openblas": ["openblas.so"]}
    monkeypatch.setattr(
        backend,
        "_installed",
        lambda name, start: ["gfortran.so"] if "gfortran" in start else paths[name],
    )
    found = backend._candidates()
    expected = ["openblas.so", "libopenblas.so.0", "mkl.so"]
    assert [b.path for b in found] == (expected if is_amd else ["mkl.so", *expected[:2]])
    assert found[0].reason.endswith(f"faster one on {'AMD' if is_amd else 'Intel'} processors")
    (openblas,) = [blas for blas in found if blas.path == "openblas.so"]
    assert openblas.needs == ("gfortran.so",)


@LINUX
@pytest.mark.parametrize("name", LIBRARIES)
def test_products_streams_and_threads_work_with_each_library(name):
    if not LIBRARIES[name]:
        pytest.skip("not in the cpu extra of this machine")
    script = """
        import ctypes, json
        from interviewmate_mlx import backend
        import mlx.core as mx, numpy as np
        from interviewmate_mlx.data.batches import collate
        from interviewmate_mlx.data.prompts import Example
        from interviewmate_mlx.data.records import Record
        from interviewmate_mlx.base.base import Base
        from interviewmate_mlx.model.lora import add_lora
        from interviewmate_mlx.training.cpu_streams import CpuStreams
        from interviewmate_mlx.training.optimizer import adamw
        from interviewmate_mlx.training.step import OneStream, Step

        a = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
        b = np.random.default_rng(1).normal(size=(200, 250)).astype(np.float32)
        error = np.abs(np.array(mx.array(a) @ mx.array(b)) - a.astype(np.float64) @ b).max()

        backend._num_cores = lambda: 4
        library, threads = ctypes.CDLL(backend.BLAS.path), []
        names = ("MKL_Get_Max_Threads", "openblas_get_num_threads")
        count = next(getattr(library, name) for name in names if hasattr(library, name))
        for num_streams in (1, 2, 4):
            backend.share_cores(num_streams)
            threads.append(count())

        rng = np.random.default_rng(2)
        rows = [
            Example(Record("row"), rng.integers(0, 6000, n).astype(np.int32), np.arange(n) > 3)
            for n in (60, 40, 70, 20)
        ]
        losses = []
        for executor in (OneStream(), CpuStreams(2)):
            mx.random.seed(0)
            model = Base.open("mini").load(mx.float32).train()
            add_lora(model, ["query_key_value"], 4, 8)
            step = Step(model, adamw(), 1.0, executor)
            with executor.opened():
                for number in range(3):
                    step.accumulate([collate([row]) for row in rows], [0, number])
                    losses.append(step.update(1e-2)["loss"].item())
        print(json.dumps([backend.BLAS.path, float(error), threads, losses]))
        """
    # Else MKL takes no more threads than there are cores.
    done = run(script, INTERVIEWMATE_BLAS=LIBRARIES[name][0], MKL_DYNAMIC="FALSE")
    assert done.returncode == 0, done.stderr
    path, error, threads, losses = json.loads(done.stdout)
    assert path == LIBRARIES[name][0]
    assert error < 200 * 2**-24 * 16  # 200 products, each rounded; numbers of at most 16
    assert threads == [4, 2, 1]
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)


@LINUX
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.usefixtures("with_torch")
def test_library_serves_mlx_and_nobody_else(name):
    """The system's loader says who found what where. OpenBLAS crashed torch's small products."""
    if not LIBRARIES[name]:
        pytest.skip("not in the cpu extra of this machine")
    script = """
        from interviewmate_mlx import backend
        import mlx.core as mx, torch
        mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
        for dtype in (torch.float32, torch.float64):
            ones = torch.ones(2, 2, 8, 64, dtype=dtype)
            assert (ones @ ones.transpose(-1, -2) == 64).all()
        """
    done = run(script, INTERVIEWMATE_BLAS=LIBRARIES[name][0], LD_DEBUG="bindings")
    assert done.returncode == 0, done.stderr[-2000:]
    library = os.path.basename(LIBRARIES[name][0])
    found = re.findall(r"binding file (\S+) \[\d+\] to (\S+) .*symbol `(\w*gemm\w*)'", done.stderr)
    served = {os.path.basename(user) for user, where, _ in found if where.endswith(library)}
    assert "libmlx.so" in served
    assert not any("torch" in user or "numpy" in user for user in served)
    assert all(where.endswith(library) for user, where, _ in found if user.endswith("libmlx.so"))


@LINUX
@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("/nowhere.so", "/nowhere.so: cannot open shared object file"),
        ("libm.so.6", "undefined symbol: cblas_sgemm"),
    ],
)
def test_named_library_that_is_none_is_refused(monkeypatch, named, said):
    monkeypatch.setenv(BLAS_VARIABLE, named)
    monkeypatch.setattr(backend, "_MLX_CAME_FIRST", False)
    with pytest.raises(BackendError, match=rf"(?s)^{BLAS_VARIABLE}={named} cannot .*{said}.*Unset"):
        backend._load_blas()


@LINUX
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ends the process with SIGILL"),
        ("import sys; sys.exit('its product is wrong')", "its product is wrong"),
    ],
)
def test_library_that_fails_when_it_computes_is_never_loaded_here(monkeypatch, code, said):
    monkeypatch.setenv(BLAS_VARIABLE, "libm.so.6")
    monkeypatch.setattr(backend, "_MLX_CAME_FIRST", False)
    monkeypatch.setattr(backend, "_TRY_BLAS", code)
    with pytest.raises(BackendError, match=said):
        backend._load_blas()


@LINUX
def test_forced_kernels_are_tried_first_and_another_library_is_taken(monkeypatch):
    monkeypatch.delenv(BLAS_VARIABLE, raising=False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "SapphireRapids")
    monkeypatch.setattr(backend, "_MLX_CAME_FIRST", False)
    monkeypatch.setattr(
        backend, "_candidates", lambda: [Blas("libdies.so", ""), Blas("libm.so.6", "the second")]
    )
    tried = {"libdies.so": "it ends the process with SIGILL", "libm.so.6": ""}
    monkeypatch.setattr(backend, "_try_blas", lambda blas: tried[blas.path])
    assert backend._load_blas() == Blas("libm.so.6", "the second")


@LINUX
def test_mlx_that_was_imported_first_has_its_own_blas_and_it_is_said():
    done = run(
        """
        import mlx.core, warnings
        warnings.simplefilter("always")
        from interviewmate_mlx import backend
        assert backend.BLAS is None and backend.machine().blas is None
        print(backend.describe()["blas_reason"])
        """
    )
    assert done.returncode == 0, done.stderr
    assert "MLX was imported before interviewmate_mlx.backend; import that first" in done.stdout
    assert done.stderr.count("UserWarning: MLX uses its reference BLAS") == 1


@pytest.mark.parametrize("how", ["resolve_dtype('float32')", "machine()", "matmul_gflops()"])
def test_device_of_the_environment_is_obeyed_from_python(how):
    done = run(f"from interviewmate_mlx import backend; backend.{how}", INTERVIEWMATE_DEVICE="tpu")
    assert "INTERVIEWMATE_DEVICE: got 'tpu', expected cpu or gpu" in done.stderr


def test_swap_on_macos_is_what_vm_stat_counts_as_swapped():
    """Pages of files that were read in ("Pageins") are not swapped."""
    said = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                8123.
Pageins:                                 991234.
Pageouts:                                   512.
Swapins:                                    100.
Swapouts:                                   250.
"""
    assert backend._mac_swapped_bytes(said) == 350 * 16384
    assert backend._mac_swapped_bytes("") == 0


def test_limits_of_a_gpu_s_memory_are_set_from_the_plan_and_restored(monkeypatch):
    monkeypatch.setattr(backend, "_device", lambda: "cuda")
    limits = {"memory": mx.set_memory_limit, "cache": mx.set_cache_limit}
    before = {name: limit(1) for name, limit in limits.items()}
    for name, limit in limits.items():
        limit(before[name])

    def now() -> dict[str, int]:
        found = {name: limit(1) for name, limit in limits.items()}
        for name, limit in limits.items():
            limit(found[name])
        return found

    with backend.memory_limits(8_000_000_000, 3_000_000_000, 7_900_000_000):
        assert now() == {"memory": 8_000_000_000, "cache": 5_000_000_000}
    assert now() == before


@pytest.mark.parametrize(("columns", "count"), [(100, 10), (1 << 26, 1), (1 << 23, 8)])
def test_no_more_products_are_timed_at_once_than_fit(monkeypatch, columns, count):
    """The logits of a long row are hundreds of megabytes."""
    timed = []
    monkeypatch.setattr(backend, "_device", lambda: "metal")
    monkeypatch.setattr(mx.random, "uniform", lambda *_: mx.zeros((1, 1)))
    monkeypatch.setattr(mx, "eval", lambda *arrays: timed.append(arrays[0]))
    backend.matmul_gflops(1, 1, columns, dtype=mx.float32)
    assert {len(batch) for batch in timed if isinstance(batch, list)} == {count}
