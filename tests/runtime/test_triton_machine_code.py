"""Every Triton kernel, compiled ahead of time for four GPUs that are not here: what came out is what was meant.

Launches are recorded, not run: each call below is what the ops launch for a Llama-3-8B-shaped layer, so sizes, strides,
alignment and options are those of real work. Numbers are tested in `interpreted_triton.py`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: `pip install triton` (Linux)")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qlora_compile import nf4  # noqa: E402
from qlora_compile.runtime.kernels import (  # noqa: E402
    triton_codec,
    triton_common,
    triton_cross_entropy,
    triton_linear,
    triton_low_rank,
    triton_paged_step,
    triton_vector,
)
from qlora_compile.runtime.kernels.cpu_common import DTYPES  # noqa: E402
from qlora_compile.runtime.kernels.triton_operands import Adapter, VectorAdapter, Weight  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Shared memory that one program can have, in bytes: CUDA programming guide, table of compute capabilities; CDNA 3 ISA.
MOST_SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_CORE = {"sm_80": r"\bmma\.sync", "sm_90": r"\b(wgmma\.|mma\.sync)", "sm_100": r"\b(tcgen05\.mma|mma\.sync)"}
TENSOR_CORE["gfx942"] = r"\bv_mfma_"
# The codec's tiles give each of 4 warps' 128 threads 16 bytes of codes; a wave of AMD's has 64 threads: 8 bytes each.
CODE_BYTES = {"sm_80": 16, "sm_90": 16, "sm_100": 16, "gfx942": 8}
WIDE_LOAD = {"gfx942": r"\b(global|buffer)_load_dwordx[24]"}
WIDE_LOAD |= dict.fromkeys(
    ("sm_80", "sm_90", "sm_100"), r"\bld\.global(\.\w+)*\.v4\.b32|\bcp\.async\.\w+\.shared\.global[^;]*0x10"
)

M_TRAIN, K, N, R = 2048, 4096, 1024, 16


@dataclass
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def _weight(n: int, k: int, double_quant: bool = True) -> Weight:
    blocks = n * k // 64
    codes = torch.empty(n * k // 2, dtype=torch.uint8)
    if not double_quant:
        return Weight(nf4.QuantizedData(codes, torch.empty(blocks), None, None), n, k, "nf4", 64)
    data = nf4.QuantizedData(codes, torch.empty(blocks, dtype=torch.uint8), torch.empty(blocks // 256), torch.empty(()))
    return Weight(data, n, k, "nf4", 64)


def _bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def _dequantize(dtype: torch.dtype, apart: int = 0) -> None:
    weight = _weight(N, K)
    triton_codec.dequantize_4bit(*weight.data, N * K, "nf4", 64, torch.empty(N, K + apart, dtype=dtype)[:, :K])


def _adapters(m: int, n: int, count: int = 1) -> tuple[torch.Tensor, list[Adapter]]:
    h = _bf16(m, count * R)
    return h, [Adapter(part, torch.empty(n, R), 2.0, torch.empty(())) for part in h.split(R, dim=1)]


def _vector(m: int, k: int = K, rank: int = R) -> None:
    """q, k and v of one token, or of a few."""
    weights = [_weight(n, k) for n in (4096, 1024, 1024)]
    h = _bf16(m, 3 * rank)
    adapters = [[VectorAdapter(torch.empty(rank, k), torch.empty(w.rows, rank), 2.0, torch.empty(()))] for w in weights]
    bias = [torch.empty(w.rows) for w in weights]
    triton_vector.lora_linear_vector(_bf16(m, k), weights, [_bf16(m, w.rows) for w in weights], h, adapters, bias)


def _gemm(m: int) -> None:
    adapters = _adapters(m, N)[1]
    triton_linear.lora_linear_gemm(_bf16(m, K), _weight(N, K), _bf16(m, N), adapters, torch.empty(N))


def _dx(m: int) -> None:
    low = _bf16(m, 2 * R)
    adapters = [Adapter(part, torch.empty(R, K)) for part in low.split(R, dim=1)]
    triton_linear.lora_linear_dx(_bf16(m, K), [_bf16(m, N)] * 2, [_weight(N, K), _weight(N, K)], adapters)


def _paged_step(dtype: torch.dtype, narrow: bool) -> None:
    """A window of 24 pieces."""
    pieces, places = (torch.zeros(24, n, dtype=torch.int64) for n in (6, 2))
    triton_paged_step.paged_step(pieces, torch.zeros(1, 8), False, narrow, DTYPES[dtype], 64 * K, places)


def _cross_entropy(dtype: torch.dtype, scale: float = 1.0, soft_cap: float = 0.0) -> None:
    """In place, over Llama-3's vocabulary."""
    z = torch.empty(64, 128256, dtype=dtype)
    triton_cross_entropy.cross_entropy(z, torch.zeros(64, dtype=torch.int64), torch.empty(64), z, None, scale, soft_cap)


def _dropout(count: int) -> triton_low_rank.Dropout:
    return triton_low_rank.Dropout([torch.zeros((), dtype=torch.int64)] * count, 0.9)


CASES: dict[str, Callable[[], None]] = {
    "dequantize_bf16": lambda: _dequantize(torch.bfloat16),
    "dequantize_rows": lambda: _dequantize(torch.bfloat16, apart=16),
    "dequantize_fp32": lambda: _dequantize(torch.float32),
    "quantize": lambda: void(triton_codec.quantize_4bit(_bf16(N * K), "nf4", 64, False)),
    "down": lambda: triton_low_rank.lora_down(_bf16(M_TRAIN, K), [torch.empty(R, K)] * 3, _bf16(M_TRAIN, 3 * R)),
    "down_dropout": lambda: triton_low_rank.lora_down(
        _bf16(M_TRAIN, K), [torch.empty(R, K)] * 2, _bf16(M_TRAIN, 2 * R), dropout=_dropout(2)
    ),
    "up": lambda: triton_low_rank.lora_up(
        _bf16(M_TRAIN, N), [_bf16(M_TRAIN, R)], [torch.empty(N, R)], bias=torch.empty(N), accumulate=False
    ),
    "over_tokens": lambda: triton_low_rank.lora_over_tokens(
        [_bf16(M_TRAIN, R)] * 3, _bf16(M_TRAIN, K), [torch.empty(R, K)] * 3
    ),
    "vector_1": lambda: _vector(1),
    "vector_2": lambda: _vector(2),
    "vector_256_ranks": lambda: _vector(1, 14336, 256),
    "gemm_16": lambda: _gemm(16),
    "gemm_64": lambda: _gemm(64),
    "gemm_training": lambda: _gemm(M_TRAIN),
    "mask": lambda: void(triton_low_rank.dropout_mask(torch.zeros((), dtype=torch.int64), _bf16(M_TRAIN, K), 0.9)),
    "paged_step": lambda: _paged_step(torch.float32, narrow=False),
    "paged_step_bf16": lambda: _paged_step(torch.bfloat16, narrow=False),
    "paged_step_8_bit": lambda: _paged_step(torch.float32, narrow=True),
    "cross_entropy": lambda: _cross_entropy(torch.bfloat16),
    "cross_entropy_capped": lambda: _cross_entropy(torch.bfloat16, 0.5, 30.0),
    "dx_64": lambda: _dx(64),
    "dx_training": lambda: _dx(M_TRAIN),
}
READS_CODES = {name for name in CASES if name.startswith(("dequantize", "vector", "gemm", "dx"))}
READS_WIDE = READS_CODES | {name for name in CASES if name.startswith("cross")}
ON_TENSOR_CORES = {name for name in CASES if name.startswith(("down", "up", "over", "gemm", "dx"))}


def void(_: object) -> None:
    pass


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Kernels are not run, their launches are kept; the device is said to have an H100's 132 multiprocessors."""
    kept: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "enable_fp_fusion") if name in kwargs}
        kept.append(Launch(self, dict(zip(self.arg_names, args)) | kwargs, options))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    for module in (triton_low_rank, triton_linear, triton_vector):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    yield kept


def _compile(launch: Launch, target: str) -> Any:
    """Machine code of a launch, specialized as Triton does: values of 1 and multiples of 16 are known to the compiler."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = triton.runtime.jit.mangle_type(value)
            if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = triton.runtime.jit.mangle_type(value)
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=launch.options)


def _spills(compiled: Any, target: str, folder: Path) -> list[str]:
    """The assembler's own words about registers that went to memory; empty if none did."""
    if target == "gfx942":
        found = re.findall(r"\.[sv]gpr_spill_count:\s+[1-9]\d*|^; ScratchSize: [1-9]\d*", compiled.asm["amdgcn"], re.M)
        return list(found)
    from triton.backends.nvidia.compiler import get_ptxas

    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    arch = re.search(r"^\.target\s+(\w+)", compiled.asm["ptx"], re.M)
    assert arch is not None
    assembler = get_ptxas(TARGETS[target].arch).path
    command = [assembler, "-v", f"--gpu-name={arch[1]}", str(source), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "spill stores" in done.stderr, done.stderr
    return re.findall(r"[1-9]\d* bytes (?:spill stores|spill loads|stack frame)", done.stderr)


def _bytes_of_codes(compiled: Any) -> set[int]:
    """How many bytes of codes lie side by side in a thread, in each load of codes: by the layouts of Triton's GPU dialect,
    where words of several rows are codes in every kernel but the codec, which reads bytes."""
    text = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[(?:\d+, )*(\d+)\]", text, re.M))
    kind, size = ("i8", 1) if "@dequantize_4bit" in text else ("i32", 4)
    load = r"\b(?:tt\.load|async_copy_global_to_local|buffer_load) "
    found = re.findall(rf"{load}.*?\btensor<(?:\d+x){{2,}}(?:!tt\.ptr<)?{kind}>?, (#\w+)>", text)
    return {int(layouts.get(layout, 0)) * size for layout in found}


def _check(case: str, target: str, launches: list[Launch], folder: Path) -> None:
    CASES[case]()
    wide, tensor_cores, codes = False, False, set[int]()
    for launch in launches:
        compiled = _compile(launch, target)
        assert compiled.metadata.shared <= MOST_SHARED_BYTES[target]
        assert _spills(compiled, target, folder) == []
        text = compiled.asm["amdgcn" if target == "gfx942" else "ptx"]
        wide |= re.search(WIDE_LOAD[target], text) is not None
        tensor_cores |= re.search(TENSOR_CORE[target], text) is not None
        codes |= _bytes_of_codes(compiled)
    assert launches
    assert (min(codes) >= CODE_BYTES[target]) if case in READS_CODES else not codes
    assert wide or case not in READS_WIDE
    assert tensor_cores == (case in ON_TENSOR_CORES)


ALL = [(case, target) for case in CASES for target in TARGETS]
QUICK = [
    ("dequantize_bf16", "gfx942"),
    ("vector_1", "sm_90"),
    ("gemm_64", "sm_80"),
    ("dx_training", "sm_100"),
    ("down_dropout", "sm_90"),
    ("paged_step_8_bit", "sm_80"),
]


@pytest.mark.parametrize(
    "case, target", [pytest.param(*both, marks=[] if both in QUICK else pytest.mark.slow) for both in ALL]
)
def test_machine_code(
    case: str, target: str, launches: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    _check(case, target, launches, tmp_path)


def test_codes_that_begin_between_16_bytes_are_seen_to_be_read_by_the_word(
    launches: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice of a gathered buffer (FSDP2). x is read 16 bytes at once all the same: one wide load proves nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    data = _weight(N, K).data
    sliced = Weight(data._replace(codes=torch.empty(N * K // 2 + 4, dtype=torch.uint8)[4:]), N, K, "nf4", 64)
    triton_linear.lora_linear_gemm(_bf16(M_TRAIN, K), sliced, _bf16(M_TRAIN, N))
    compiled = _compile(launches[0], "sm_90")
    assert _bytes_of_codes(compiled) == {4} and re.search(WIDE_LOAD["sm_90"], compiled.asm["ptx"])


def _loop_instructions(compiled: Any, folder: Path) -> list[int]:
    """How many machine instructions each innermost loop has, by NVIDIA's disassembler."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    done = subprocess.run([str(tool), "-c", str(cubin)], capture_output=True, text=True, check=True)
    labels: dict[str, int] = {}
    loops, count = [], 0
    for line in done.stdout.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*);", line):
            count += 1
            jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction[1])
            if jump and labels.get(jump[1], count) < count - 3:  # not the endless jump to itself after the end
                loops.append(count - labels[jump[1]])
    return loops


def test_what_a_weight_costs_one_token(launches: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token, gate and up projections of Llama-3-8B on an H100: 132 multiprocessors start 4 x 32 instructions a cycle.
    At 5.3 a weight and 1.75 GHz that is 21 us for 117 million weights, one and a half times what their codes take."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    weights = [_weight(14336, K)] * 2
    triton_vector.lora_linear_vector(_bf16(1, K), weights, [_bf16(1, 14336)] * 2, _bf16(1, 0))
    launch, rows = launches[-1], triton_vector.vector_rows(weights, 1, torch.device("cpu"))
    compiled = _compile(launch, "sm_90")
    assert rows == 4 and launch.arguments["BLOCK_N"] == 1
    for loop in _loop_instructions(compiled, tmp_path):
        assert loop / (rows * launch.arguments["WORDS"] * 8 / 32) < 6  # 5.3 by Triton 3.9, 5.5 by 3.6
    assert "bar.sync" not in compiled.asm["ptx"]  # a warp looks codes up by shuffles and waits for no other


@pytest.mark.parametrize("narrow", [False, True])
def test_a_program_behind_the_end_of_its_piece_reads_nothing_but_that(
    launches: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    """All have as many programs as the longest; `places` lies in the host's memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    _paged_step(torch.float32, narrow)
    text = _compile(launches[0], "sm_90").asm["ptx"]
    loads = [match.start() for match in re.finditer(r"\bld\.global", text)]
    jumps = [match.start() for match in re.finditer(r"\bbra\b", text)]
    assert loads[0] < jumps[0] < loads[1]


def test_no_literal_is_taken_for_fp64() -> None:
    """Triton 3.6 (torch 2.11's) takes a number below fp32's normal ones for fp64, and then refuses what meets it."""
    folder = Path(triton_common.__file__).parent
    literals = [
        (path.name, line, float(number))
        for path in folder.glob("*.py.jinja")
        for line in path.read_text(encoding="utf-8").splitlines()
        for number in re.findall(r"(?<![\w.])\d+\.?\d*e-?\d+", line.split("#")[0])
    ]
    assert literals
    for name, line, value in literals:
        typed = re.search(rf"tl\.full\(\[\w+\], {value}, tl\.float32\)", line)
        assert value >= torch.finfo(torch.float32).tiny or typed, f"{name}: {line}"


def test_the_device_map_is_shared() -> None:
    cpu = torch.device("cpu")
    assert triton_common.device_map(cpu) is triton_common.device_map(cpu)
