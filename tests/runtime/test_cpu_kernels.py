"""The generated C++ codec: every path against the torch reference, bit for bit; building, caching, bad arguments."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile import nf4
from qlora_compile.errors import ConfigError, KernelError
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpp_build, cpu

DTYPES = tuple(cpu.DTYPES)
needs_compiler = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> str:
    if cpp_build.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    if request.param not in cpu.supported_isas():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    """Nothing built or looked up yet, before and after."""
    caches = (kernels.find, kernels._warn_no_compiler, cpp_build.load, cpp_build.compiler_version)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


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


def test_no_kernel_for_other_devices_and_ops() -> None:
    assert kernels.find("dequantize_4bit", "meta") is None
    assert kernels.find("no_such_op", "cpu") is None
    assert kernels.kernel_source("no_such_op", "cpu") is None


def test_no_compiler_warns_once_and_finds_nothing(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    monkeypatch.setattr(cpp_build, "find_compiler", lambda: None)
    with pytest.warns(RuntimeWarning, match=r"No C\+\+ compiler was found.*apt install g\+\+.*set CXX"):
        assert kernels.find("dequantize_4bit", "cpu") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.find("dequantize_4bit", "cpu") is None
        assert kernels.find("quantize_4bit", "cpu") is None
    assert kernels.kernel_source("quantize_4bit", "cpu") is None


def test_find_compiler_asks_inductor_then_cxx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "my-c++"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.delitem(sys.modules, "torch._inductor.config", raising=False)
    assert cpp_build.find_compiler() == str(fake)
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert cpp_build.find_compiler() is None


@needs_compiler
def test_source_header_names_template_spec_and_flags() -> None:
    path = kernels.kernel_source("dequantize_4bit", "cpu")
    assert path is not None and path.suffix == ".cpp"
    head = path.read_text().splitlines()[:5]
    assert "dequantize_4bit: 4-bit codes" in head[0]
    assert "runtime/kernels/dequantize_4bit.cpp.jinja" in head[1]
    assert "nf4, fp4" in head[2] and "portable" in head[2]
    assert "-ffp-contract=off" in head[3]
    assert "{{" not in path.read_text() and "{%" not in path.read_text()


@needs_compiler
def test_compile_failure_carries_the_compilers_message(tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int main( { return undeclared_name; }\n")
    compiler = cpp_build.find_compiler()
    assert compiler is not None
    with pytest.raises(KernelError, match=r"failed on .*broken\.cpp(.|\n)*error:"):
        cpp_build.compile_library(source, tmp_path / "broken.so", compiler, cpp_build.compiler_flags())
    assert [p.name for p in tmp_path.iterdir()] == ["broken.cpp"], "nothing half-written stays"


@needs_compiler
def test_a_library_cut_short_is_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_kernels: None
) -> None:
    monkeypatch.setenv("QLORA_COMPILE_CACHE_DIR", str(tmp_path))
    source = cpp_build.write_source("dequantize_4bit")
    source.with_suffix(".so").write_bytes(b"\x7fELF cut short")
    assert cpp_build.load("dequantize_4bit").qlora_best_isa() >= 0
    assert source.with_suffix(".so").stat().st_size > 1000


def test_cache_folder_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(KernelError, match="belongs to another user"):
        cpp_build.cache_dir()


def test_cache_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_COMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(KernelError, match=r"cannot be made.*QLORA_COMPILE_CACHE_DIR"):
        cpp_build.cache_dir()


def test_cache_folder_stands_beside_inductors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QLORA_COMPILE_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    folder = cpp_build.cache_dir()
    assert folder.parent == tmp_path and folder.name.startswith("qlora_compile_")
    assert folder.stat().st_mode & 0o077 == 0


RACER = """
import torch
from qlora_compile import nf4
from qlora_compile.runtime.kernels import find
weight = torch.linspace(-1, 1, 205)
data = find("quantize_4bit", "cpu")(weight, "nf4", 32, True)
assert torch.equal(data.codes, nf4.quantize_reference(weight, "nf4", 32, True).codes)
"""


@needs_compiler
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"QLORA_COMPILE_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", RACER], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for run in runs:
        _, message = run.communicate(timeout=120)
        assert run.returncode == 0, message
    names = sorted(p.suffix for p in tmp_path.iterdir())
    assert names == [".cpp", ".so"], "one library, no temporary files"


@needs_compiler
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """All paths on exactly sized buffers under AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = cpp_build.find_compiler()
    assert compiler is not None
    sources = [str(cpp_build.write_source(op)) for op in ("dequantize_4bit", "quantize_4bit")]
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
    done = subprocess.run([str(program)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
