"""Freed memory that stays with the process: what glibc is told, and that a process then takes no page faults."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest

from qlora_compile.runtime.host_memory import keep_freed_memory

ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
SCRIPT = """
import resource
import torch
from qlora_compile.runtime.host_memory import keep_freed_memory

def step():
    blocks = [torch.ones(7_000_000) for _ in range(20)]  # 28 MB each
    while blocks:
        blocks.pop()  # the last one first, as after a backward pass

assert keep_freed_memory()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture
def mallopt(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    told = mock.Mock(return_value=1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=told))
    monkeypatch.setattr(sys, "platform", "linux")
    return told


def test_what_glibc_is_told(mallopt: mock.Mock) -> None:
    """M_MMAP_THRESHOLD: the largest that it adapts to by itself; M_TRIM_THRESHOLD: never (malloc.h, mallopt(3))."""
    assert keep_freed_memory()
    assert mallopt.mock_calls == [mock.call(-3, 32 << 20), mock.call(-1, -1)]
    mallopt.return_value = 0
    assert not keep_freed_memory()


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch, mallopt: mock.Mock, name: str) -> None:
    monkeypatch.setenv(name, "1000000")
    assert not keep_freed_memory() and not mallopt.called


def test_other_systems_and_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch, mallopt: mock.Mock) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory() and not mallopt.called


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told")
def test_a_step_takes_no_page_faults() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"})
    assert int(done.stdout) < 100  # of 410,000 pages that the three steps write
