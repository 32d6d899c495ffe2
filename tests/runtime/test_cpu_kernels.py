"""The generated C++ codec: every path against the torch reference, bit for bit; bad arguments; sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile import nf4
from qlora_compile.errors import ConfigError, KernelError
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpp_build, cpu, cpu_paged_step

DTYPES = tuple(cpu.DTYPES)
needs_compiler = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> str:
    if cpp_build.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    if request.param not in cpu.supported_isas():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def make_weight(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Values of one magnitude, or from denormal to 10 (every other seed), with exact zeros and a zero block."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(numel, generator=gen)
    if seed % 2:
        w = w * torch.logspace(-44, 1, numel)
    w[torch.rand(numel, generator=gen) < 0.1] = 0.0
    w[64:192] = 0.0
    return w.to(dtype)


sizes = st.one_of(st.integers(1, 300), st.integers(1, 40_000))
seeds = st.integers(0, 10_000)
case = {
    "numel": sizes,
    "block_size": st.sampled_from(nf4.BLOCK_SIZES),
    "quant_type": st.sampled_from(["nf4", "fp4"]),
    "dtype": st.sampled_from(DTYPES),
    "double_quant": st.booleans(),
    "seed": seeds,
}


@needs_compiler
@settings(max_examples=80, deadline=None)
@given(**case)
def test_every_path_equals_the_reference(
    numel: int, block_size: int, quant_type: str, dtype: torch.dtype, double_quant: bool, seed: int
) -> None:
    weight = make_weight(numel, dtype, seed)
    expected = nf4.quantize_reference(weight, quant_type, block_size, double_quant)
    quantize, dequantize = kernels.find("quantize_4bit", "cpu"), kernels.find("dequantize_4bit", "cpu")
    assert quantize is not None and dequantize is not None
    out_dtype = DTYPES[seed % 3]
    dense = nf4.dequantize_reference(*expected, (numel,), quant_type, block_size, out_dtype)
    for isa in cpu.supported_isas():
        data = quantize(weight, quant_type, block_size, double_quant, isa=isa)
        assert all(same_bits(a, b) for a, b in zip(data, expected, strict=True)), isa
        out = torch.full((numel + 3,), 7.0, dtype=out_dtype)
        dequantize(*expected, numel, quant_type, block_size, out, isa=isa)
        assert same_bits(out[:numel], dense), isa
        assert (out[numel:] == 7.0).all(), "wrote past the end"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """Scales that put book values on ties, at the smallest normal, among denormals, and past the largest number."""
    scales = torch.tensor([1.00390625, 1.01171875, 2.0**-14, 2.0**-24, 3e-8, 1e-39, 1e-45, 65519.0, 65520.0, 3.4e38])
    codes = torch.arange(16, dtype=torch.uint8).repeat(scales.numel() * 2)
    codes = codes * 16 + (codes + 5) % 16
    out = torch.empty(codes.numel() * 2, dtype=dtype)
    dequantize = kernels.find("dequantize_4bit", "cpu")
    assert dequantize is not None and codes.numel() * 2 == scales.numel() * 64
    dequantize(codes, scales, None, None, out.numel(), "nf4", 64, out, isa=isa)
    expected = nf4.dequantize_reference(codes, scales, None, None, out.shape, "nf4", 64, dtype)
    assert same_bits(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize_reads_every_finite_half_value(isa: str, dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = patterns[patterns.isfinite()].contiguous()
    assert weight.numel() > 60_000
    quantize = kernels.find("quantize_4bit", "cpu")
    assert quantize is not None
    for block_size in (32, 1024):
        data = quantize(weight, "nf4", block_size, False, isa=isa)
        assert all(
            same_bits(a, b) for a, b in zip(data, nf4.quantize_reference(weight, "nf4", block_size, False), strict=True)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_writing_past_the_caches_changes_nothing(
    isa: str, dtype: torch.dtype, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an aligned output (offset 0), where streaming stores may be used, and one where they may not."""
    data = nf4.quantize_reference(make_weight(40_003, torch.float32, 2), "nf4", 32, True)
    buffer = torch.full((40_100,), 7.0, dtype=dtype)
    out = buffer[offset : offset + 40_003]
    assert (out.data_ptr() % 64 == 0) == (offset == 0)
    dequantize = kernels.find("dequantize_4bit", "cpu")
    assert dequantize is not None
    monkeypatch.setattr(cpu, "STREAM_BYTES", 0)
    dequantize(*data, 40_003, "nf4", 32, out, isa=isa)
    assert same_bits(out, nf4.dequantize_reference(*data, (40_003,), "nf4", 32, dtype))
    assert (buffer[offset + 40_003 :] == 7.0).all()


def test_values_on_the_bounds_take_the_lower_code(isa: str) -> None:
    """x = bound exactly, and its neighbours on both sides, in a block whose absmax is 1."""
    quantize = kernels.find("quantize_4bit", "cpu")
    assert quantize is not None
    for quant_type in nf4.CODE_BOOKS:
        bounds, order = nf4.code_bounds(quant_type)
        up, down = bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))
        weight = torch.cat([torch.ones(19), bounds, up, down])
        codes = quantize(weight, quant_type, 64, False, isa=isa).codes
        values = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)
        rank = torch.arange(15)
        expected = torch.cat([order[rank], order[rank + 1], order[rank]])
        assert torch.equal(values[19:].long(), expected)


def test_more_threads_than_blocks_and_one_thread_agree(isa: str) -> None:
    weight = make_weight(64 * 3 + 17, torch.float32, 4)
    quantize, dequantize = kernels.find("quantize_4bit", "cpu"), kernels.find("dequantize_4bit", "cpu")
    assert quantize is not None and dequantize is not None
    big = make_weight(70_001, torch.bfloat16, 4)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            small_data, data = quantize(weight, "fp4", 64, False, isa=isa), quantize(big, "fp4", 64, False, isa=isa)
            out = torch.empty(big.numel())
            dequantize(*data, big.numel(), "fp4", 64, out, isa=isa)
            results.append((small_data.codes, data.codes, data.absmax, out))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("numel", [0, 1])
def test_empty_and_one_element(numel: int) -> None:
    weight = torch.full((numel,), -3.25)
    quantize, dequantize = kernels.find("quantize_4bit", "cpu"), kernels.find("dequantize_4bit", "cpu")
    assert quantize is not None and dequantize is not None
    data, out = quantize(weight, "nf4", 64, True), torch.empty(numel)
    dequantize(*data, numel, "nf4", 64, out)
    assert torch.equal(out, weight)
    assert all(same_bits(a, b) for a, b in zip(data, nf4.quantize_reference(weight, "nf4", 64, True), strict=True))


@needs_compiler
def test_bad_arguments_never_reach_c() -> None:
    quantize, dequantize = kernels.find("quantize_4bit", "cpu"), kernels.find("dequantize_4bit", "cpu")
    assert quantize is not None and dequantize is not None
    weight = torch.randn(5, 77)
    data = quantize(weight, "nf4", 64, True)
    out = torch.empty(5, 77)
    with pytest.raises(KernelError, match="codes holds 192 elements, the weight needs 193"):
        dequantize(data.codes[:-1], *data[1:], 385, "nf4", 64, out)
    with pytest.raises(KernelError, match="absmax holds 7 elements, the weight needs 13"):
        dequantize(*data, 385, "nf4", 32, out)
    with pytest.raises(KernelError, match=r"out must be a contiguous .* got a strided"):
        dequantize(*data, 385, "nf4", 64, torch.empty(77, 5).t())
    with pytest.raises(KernelError, match=r"out must be .*float64"):
        dequantize(*data, 385, "nf4", 64, out.double())
    with pytest.raises(KernelError, match="out holds 384 elements"):
        dequantize(*data, 385, "nf4", 64, out.view(-1)[:384])
    with pytest.raises(KernelError, match="belong together"):
        dequantize(data.codes, data.absmax, data.absmax_scale, None, 385, "nf4", 64, out)
    with pytest.raises(KernelError, match="weight must be a contiguous"):
        quantize(weight.t(), "nf4", 64, True)
    with pytest.raises(ConfigError, match="block_size must be one of"):
        quantize(weight, "nf4", 65, True)
    with pytest.raises(KernelError, match="no instruction set 'sse9'"):
        quantize(weight, "nf4", 64, True, isa="sse9")


@needs_compiler
@pytest.mark.parametrize("allowed", ["avx2", "default"])
def test_torch_s_variable_holds_ours_to_an_instruction_set(allowed: str) -> None:
    """ATEN_CPU_CAPABILITY, by which users hold torch's kernels to less than the machine has: read at the start."""
    if "avx2" not in cpu.supported_isas():
        pytest.skip("this machine has no AVX2")
    program = """
import torch
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpu, devices
print(devices.kind("cpu"), cpu.supported_isas()[0], devices.multiplies_natively(torch.bfloat16))
print([kernels.find(op, "cpu") for op in ("lora_down", "attention_forward", "cross_entropy")])
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": allowed}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    kind = {"avx2": "cpu-avx2 avx2 False", "default": "cpu portable False"}[allowed]
    assert done.stdout.splitlines() == [kind, "[None, None, None]"], done.stdout + done.stderr


def test_no_kernel_for_other_devices_and_ops() -> None:
    assert kernels.find("dequantize_4bit", "meta") is None
    assert kernels.find("no_such_op", "cpu") is None
    assert kernels.source_files("no_such_op", "cpu") == ()


@needs_compiler
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """All paths on exactly sized buffers under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = cpp_build.find_compiler()
    assert compiler is not None
    sources = [str(cpp_build.write_source(template)) for template in sorted(set(cpu.TEMPLATES.values()))]
    program = tmp_path / "selfcheck"
    flags = ["-std=c++17", "-O1", "-g0", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wextra"]
    flags += ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # in gcc 12's own AVX-512 header
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    main = str(Path(__file__).with_name("cpu_kernels_selfcheck.cpp"))
    command = [compiler, *flags, *sanitize, *sources, main, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler's sanitizer libraries are not installed")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    # libgomp keeps its thread pool until exit, which the leak check would report.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    maps = [tmp_path / "signed", tmp_path / "unsigned"]
    for path in maps:
        path.write_bytes(cpu_paged_step.code_map(path.name == "signed").numpy().tobytes())
    call = [str(program), *map(str, maps)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=120)
    if "ReserveShadowMemoryRange failed" in done.stderr:
        pytest.skip("the address space is limited (ulimit -v): AddressSanitizer cannot run")
    assert done.returncode == 0, done.stdout + done.stderr
