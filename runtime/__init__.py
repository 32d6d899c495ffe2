"""What executes: kernels, adapters, training, formats. It never sees a graph."""

if __name__ != "qlora_compile.runtime":
    raise ImportError(
        "import this package as 'qlora_compile.runtime': a second copy under another name would register everything twice."
    )
