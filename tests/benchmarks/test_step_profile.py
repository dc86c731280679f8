"""`benchmarks/step_profile.py`: its table; the profile itself needs an NVIDIA GPU."""

import pytest
import step_profile

from interviewmate_mlx import backend

FUSED = "void mlx::core::cu::{}_VVCC_contiguous<unsigned int, 4>(bool const*)"
KINDS = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>(float)": "products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_kernel0_0": "attention",
    "void mlx::core::cu::copy_gg<__nv_bfloat16, __nv_bfloat16, int, 4>()": "copies",
    "void mlx::core::cu::layer_norm_vjp<__nv_bfloat16, true, 256, 8>()": "norms",
    "void mlx::core::cu::col_reduce_looped<__nv_bfloat16, __nv_bfloat16>()": "sums over tokens",
    "void mlx::core::cu::cross_entropy_vjp<__nv_bfloat16, 1024, 8>()": "cross-entropy",
    "void mlx::core::cu::binary_vv<mlx::core::cu::Add, __nv_bfloat16>()": "sums of two",
    FUSED.format("Ef4IAsTypeAFf4IBroadcastBGf4IMultiplyEFJf4IErfIKf4IBroadcastD"): "GELU",
    FUSED.format(
        "Iu4IBroadcastAJu4IBroadcastBKu4IMultiplyIJLu4IBroadcastCMu4IRightShift"
    ): "dropout",
    FUSED.format("Db1IBroadcastAEf4OSelectDBC"): "all else",
}


def test_kernels_are_told_apart_and_added_up():
    assert {name: step_profile.kind_of(name) for name in KINDS} == KINDS
    kernels = [(name, 1000.0 * (number + 1)) for number, name in enumerate(KINDS)] * 2
    head, *lines = step_profile.table(kernels, steps=2)
    assert head.split() == ["ms", "a", "step", "kernels"]
    found = {" ".join(words): (float(ms), float(n)) for ms, n, *words in map(str.split, lines)}
    assert found["products"] == (3.0, 2.0)
    assert found["all else"] == (11.0, 1.0)
    assert len(found) == 10
    by_name = step_profile.table(kernels, steps=2, by_name=1)[-1]
    assert by_name.split(maxsplit=2) == ["11.00", "1.0", list(KINDS)[-1]]


def test_it_says_that_it_needs_an_nvidia_gpu(capsys):
    if backend.machine().device == "cuda":
        pytest.skip("there is one")
    assert step_profile.main([]) == 2
    assert "no such GPU" in capsys.readouterr().err
