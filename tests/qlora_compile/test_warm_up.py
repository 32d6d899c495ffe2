"""The compiler's work that needs no graph: after it, Inductor and our ops find everything there."""

from __future__ import annotations

from typing import Any

import pytest
from torch._inductor import codecache
from torch._inductor.cpp_builder import CppBuilder
from torch._inductor.cpu_vec_isa import pick_vec_isa

from qlora_compile import warm_up
from qlora_compile.errors import KernelError
from qlora_compile.runtime import kernels

pytestmark = pytest.mark.skipif(kernels.cpp_build.find_compiler() is None, reason="needs a C++ compiler")

KERNEL = 'extern "C" void kernel(float* x) {}  // at::vec:: as in what Inductor writes'


def test_a_kernel_of_inductors_and_ours_find_all_but_themselves_built(monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up.start(kernels.find, ("dequantize_4bit",)).join()

    def build(self: CppBuilder) -> None:
        raise AssertionError(f"{self.get_command_line()} was left to do")

    monkeypatch.setattr(CppBuilder, "build", build)
    monkeypatch.setattr(kernels.cpp_build, "compile_library", build)
    assert pick_vec_isa().bit_width() >= 0
    misses = codecache._precompile_header.cache_info().misses
    codecache.CppPythonBindingsCodeCache.load_pybinding_async(["float*"], KERNEL)
    assert codecache._precompile_header.cache_info().misses == misses
    assert kernels.find("dequantize_4bit", "cpu") is not None


def test_it_begins_once() -> None:
    assert warm_up.start(kernels.find, ("dequantize_4bit",)) is warm_up.start(kernels.find, ("dequantize_4bit",))


def test_what_fails_is_left_to_the_caller_who_needs_it_but_a_bug_is_not_hidden() -> None:
    def failing(error: Exception) -> Any:
        def find(op: str, device_type: str) -> object:
            raise error

        return find

    warm_up._run(failing(KernelError("The C++ compiler failed.")), ("dequantize_4bit",))
    with pytest.raises(ValueError, match="a bug"):
        warm_up._run(failing(ValueError("a bug")), ("dequantize_4bit",))
