"""The pipeline: one pass a file, in order, as one tuple."""

if __name__ != "qlora_compile.passes":
    raise ImportError(
        "import this package as 'qlora_compile.passes': a second copy under another name would register everything twice."
    )

from .chunk_cross_entropy import chunk_cross_entropy
from .fuse_lora_linear import fuse_lora_linear
from .group_linears import group_linears
from .inline_checkpoints import inline_checkpoints
from .insert_adapters import insert_adapters
from .lower_attention import lower_attention
from .lower_kernels import lower_kernels
from .match_experts import match_experts
from .match_lora import match_lora
from .normalize_linear import normalize_linear
from .open_attention import open_attention
from .outline_layers import outline_layers
from .page_optimizer import page_optimizer
from .quantize_weights import quantize_weights
from .simplify_masks import simplify_masks
from .widen_matmuls import widen_matmuls

PIPELINE = (
    # one flat graph: what activation checkpointing hides in subgraphs, and torch's attention in one call
    inline_checkpoints,
    open_attention,
    # one spelling: every linear is F.linear(x, W), every adapter a branch beside it
    normalize_linear,
    match_lora,
    match_experts,
    # state: frozen dense weights -> 4 bits, adapters beside them
    quantize_weights,
    insert_adapters,
    # one op: dequantize + product + adapters, then one op for all that share an input
    fuse_lora_linear,
    group_linears,
    # memory: no logits where nobody wants them
    chunk_cross_entropy,
    # how it runs: what stays dense in the faster precision, the kernels of the rest
    widen_matmuls,
    simplify_masks,
    lower_attention,
    lower_kernels,
    # equal layers -> one subgraph, compiled once
    outline_layers,
)

# the backward graph that AOTAutograd makes of the result, where a paged optimizer has parameters of it
BACKWARD_PIPELINE = (page_optimizer,)

__all__ = ["BACKWARD_PIPELINE", "PIPELINE", *(p.__name__ for p in (*PIPELINE, *BACKWARD_PIPELINE))]
