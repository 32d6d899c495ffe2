"""Building the generated kernels: the compiler, the cache folder, failures, several processes at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_compile.errors import KernelError
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpp_build, cpu_linear, tuning

needs_compiler = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    """Nothing built or looked up yet, before and after."""
    caches = (kernels.find, kernels._warn_no_compiler, cpp_build.load, cpp_build.compiler_version)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_no_compiler_warns_once_and_finds_nothing(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    monkeypatch.setattr(cpp_build, "find_compiler", lambda: None)
    with pytest.warns(RuntimeWarning, match=r"No C\+\+ compiler was found.*apt install g\+\+.*set CXX"):
        assert kernels.find("dequantize_4bit", "cpu") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.find("dequantize_4bit", "cpu") is None
        assert kernels.find("quantize_4bit", "cpu") is None
    assert kernels.source_files("quantize_4bit", "cpu") == ()


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
    (path,) = kernels.source_files("dequantize_4bit", "cpu")
    assert path.suffix == ".cpp"
    head = path.read_text().splitlines()[:5]
    assert "dequantize_4bit: 4-bit codes" in head[0]
    assert "runtime/kernels/dequantize_4bit.cpp.jinja" in head[1]
    assert "nf4, fp4" in head[2] and "portable" in head[2]
    assert "-ffp-contract=off" in head[3]
    assert "{{" not in path.read_text() and "{%" not in path.read_text()


@needs_compiler
@pytest.mark.parametrize("op", ["wide_attention", "wide_linear_4bit_small"])
@pytest.mark.skipif(len(cpp_build.instruction_sets()) == 1, reason="another architecture")
def test_what_stands_in_an_instruction_sets_namespace_is_compiled_for_it(op: str) -> None:
    """SSE code between AVX code costs hundreds of cycles each way on some processors: half the time of short rows."""
    source = cpp_build.render(op, "test")
    for name in ("avx512", "avx2"):
        (part,) = re.findall(rf"^namespace {name} {{\n(.*?)^}}  // namespace {name}$", source, re.DOTALL | re.MULTILINE)
        functions = re.findall(r"^\w.*\) (?:const )?{$", part, re.MULTILINE)
        assert len(functions) > 5
        assert [f for f in functions if not f.startswith(f"{name.upper()} ")] == []


def test_compile_failure_carries_the_compilers_message(tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int main( { return undeclared_name; }\n")
    compiler = cpp_build.find_compiler()
    assert compiler is not None
    with pytest.raises(KernelError, match=r"failed on .*broken\.cpp(.|\n)*error:"):
        cpp_build.compile_library(source, tmp_path / "broken.so", compiler, cpp_build.compiler_flags())
    assert [p.name for p in tmp_path.iterdir()] == ["broken.cpp"], "nothing half-written stays"


LOADER = """
from qlora_compile.runtime.kernels import cpp_build
assert cpp_build.load("dequantize_4bit").qlora_best_isa() >= 0
"""


@needs_compiler
def test_what_was_cut_short_is_written_and_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_kernels: None
) -> None:
    """Half a library kills the process that loads it, so a process of its own does."""
    monkeypatch.setenv("QLORA_COMPILE_CACHE_DIR", str(tmp_path))
    cpp_build.load("dequantize_4bit")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (source,), (library,) = ([path for path in files if path.suffix == suffix] for suffix in (".cpp", ".so"))
    for path in (source, library):
        path.unlink()  # this process has it loaded
        path.write_bytes(files[path][: len(files[path]) // 2])
    subprocess.run([sys.executable, "-c", LOADER], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    assert source.read_bytes() == files[source] and len(library.read_bytes()) == len(files[library])
    monkeypatch.setattr(cpp_build, "compile_library", lambda *arguments: pytest.fail("what is whole is used"))
    cpp_build.load.cache_clear()
    cpp_build.load("dequantize_4bit")
    monkeypatch.undo()
    library.with_name(f"{library.name}.sha256").write_bytes(b"")
    assert not cpp_build._is_whole(library)


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_kernels: None
) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("QLORA_COMPILE_CACHE_DIR", str(tmp_path))
    expected = rf"kernel cache {tmp_path} cannot be written: .*Permission denied.*Set QLORA_COMPILE_CACHE_DIR"
    for module, name in ((cpp_build.tempfile, "mkstemp"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            with pytest.raises(KernelError, match=expected):
                cpp_build.load("dequantize_4bit")
        assert not list(tmp_path.iterdir())
    tuning.cache_file("cpu").with_suffix(".lock").mkdir()
    monkeypatch.setattr(tuning, "_unwritten", {})
    expected = r"for this process only: .* cannot be written: .*Is a directory.*Set QLORA_COMPILE_CACHE_DIR"
    with pytest.warns(RuntimeWarning, match=expected):
        tuning.remember((), "cpu")


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
    assert names == [".cpp", ".sha256", ".so"], "one library, no temporary files"


@pytest.mark.parametrize("op", ["linear_4bit_small", "lora_down", "attention_forward", "cross_entropy"])
def test_where_the_instructions_are_missing_nothing_is_built(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four libraries take 16 s: too long to learn that there are none."""
    monkeypatch.setitem(cpp_build._HAS, "avx512_bf16", lambda: False)
    monkeypatch.setattr(cpp_build, "load", lambda op: pytest.fail(f"{op} was built"))
    monkeypatch.setattr(cpu_linear, "_function", cpu_linear._function.__wrapped__)  # without its cache
    assert kernels.cpu.KERNELS[op]() is None
