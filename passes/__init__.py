"""The pipeline: one pass a file, in order, as one tuple."""

if __name__ != "qlora_compile.passes":
    raise ImportError(
        "import this package as 'qlora_compile.passes': a second copy under another name would register everything twice."
    )

from .chunk_cross_entropy import chunk_cross_entropy
from .fuse_lora_linear import fuse_lora_linear
from .group_linears import group_linears
from .insert_adapters import insert_adapters
from .match_lora import match_lora
from .normalize_linear import normalize_linear
from .outline_layers import outline_layers
from .quantize_weights import quantize_weights

PIPELINE = (
    # one spelling: every linear is F.linear(x, W), every adapter a branch beside it
    normalize_linear,
    match_lora,
    # state: frozen dense weights -> 4 bits, adapters beside them
    quantize_weights,
    insert_adapters,
    # one op: dequantize + product + adapters, then one op for all that share an input
    fuse_lora_linear,
    group_linears,
    # memory: no logits where nobody wants them
    chunk_cross_entropy,
    # equal layers -> one subgraph, compiled once
    outline_layers,
)

__all__ = ["PIPELINE", *(p.__name__ for p in PIPELINE)]
