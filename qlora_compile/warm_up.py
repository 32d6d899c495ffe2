"""What the C++ compiler can do before there is a graph, begun in a thread while the graph is still being traced.

Inductor's first kernel for a CPU waits until six small libraries have shown which vector instructions compiler and
machine have, and until its header is precompiled; our ops compile their kernels at the first call. That is 12 s of the
first step of SmolLM2 with cold caches, one process at a time, on a machine whose second core is idle.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable

from .errors import KernelError

# Inductor looks at the source to choose the flags: those of a kernel with vector instructions
_KERNEL = 'extern "C" void kernel() {}  // at::vec::'


@functools.cache
def start(find: Callable[[str, str], object], ops: tuple[str, ...]) -> threading.Thread:
    """Begin once in a process; `find(op, "cpu")` builds the kernel of each op. What fails here fails again, and with
    its message, where it is needed."""
    from torch._inductor import codecache, cpu_vec_isa  # noqa: F401  imported here: two threads may not import one module

    # Inductor's configuration is kept by context, not by process
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_run, find, ops), name="qlora-compile-warm-up", daemon=True)
    thread.start()
    return thread


def _run(find: Callable[[str, str], object], ops: tuple[str, ...]) -> None:
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        valid_vec_isa_list()
        for op in ops:
            find(op, "cpu")
        # precompiles the header; the kernel itself would be compiled at its first call, which never comes
        CppPythonBindingsCodeCache.load_pybinding_async([], _KERNEL)
    except (KernelError, CppCompileError, InvalidCxxCompiler, OSError):
        return
