"""What kind of device this machine has, in one word: the name of its dispatch table."""

from __future__ import annotations

import functools
import platform

import torch


@functools.cache
def kind(device: str) -> str:
    """ "cpu-amx", "cpu-avx512_bf16", "cpu-avx512", "cpu-avx2", "cpu-arm_bf16", "cpu"; "cuda-sm90", "hip-gfx942"."""
    if device == "cuda" and torch.cuda.is_available():
        if torch.version.hip:
            return "hip-" + torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
        major, minor = torch.cuda.get_device_capability()
        return f"cuda-sm{major}{minor}"
    if device != "cpu":
        return device
    if platform.machine() not in ("x86_64", "AMD64"):
        return "cpu-arm_bf16" if multiplies_natively(torch.bfloat16) else "cpu"
    if _allows_avx512():
        if torch.cpu._is_amx_tile_supported():
            return "cpu-amx"
        if torch.cpu._is_avx512_bf16_supported():
            return "cpu-avx512_bf16"
        if torch.cpu._is_avx512_supported():
            return "cpu-avx512"
    return "cpu-avx2" if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else "cpu"


def has_avx512_bf16() -> bool:
    """Machines with AMX too."""
    return _allows_avx512() and torch.cpu._is_avx512_bf16_supported()


def has_avx2() -> bool:
    """Machines with AVX-512 too."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def _allows_avx512() -> bool:
    """On x86: ATEN_CPU_CAPABILITY holds torch's own kernels, and so ours, to AVX2 or to no vectors at all."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


@functools.cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in `dtype`; without them torch's run 6 to 10 times slower than fp32."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    if dtype == torch.bfloat16:
        if x86:  # mkldnn's own answer is yes on AVX-512 without BF16 too, where it emulates
            return kind("cpu") in ("cpu-amx", "cpu-avx512_bf16")
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        if x86:
            return _allows_avx512() and torch.cpu._is_amx_fp16_supported()
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
