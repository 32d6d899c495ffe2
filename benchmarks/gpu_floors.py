"""What a Llama's training step and a decoded token cannot do without: operations, and bytes of weights. Used by gpu.py."""

from __future__ import annotations

from bounds import Work
from gpu_kernels import RANK

Shape = dict[str, int]


def linears(shape: Shape) -> list[tuple[int, int]]:
    """(N, K) of the linears of one layer: q, k, v, o, gate, up, down."""
    hidden, mlp = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return [
        (hidden, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, hidden),
        (mlp, hidden),
        (mlp, hidden),
        (hidden, mlp),
    ]


def step_operations(shape: Shape, layers: int, tokens: tuple[int, int]) -> int:
    """Of a forward and backward pass with a frozen base, T = B L tokens, P parameters in linears, head of V x H:

        4 T P          y and dX; less 2 T (P_q + P_k + P_v), for nothing before the first layer wants a dX
        4 T V H        the head's logits and their dX
        7 T L H layers causal attention: 2 products forward and 5 backward, 2 T L H each, half of which the mask hides

    Adapters (2 % of that at r=16) are left out.
    """
    batch, length = tokens
    count, hidden = batch * length, shape["hidden_size"]
    sizes = [n * k for n, k in linears(shape)]
    products = 4 * count * layers * sum(sizes) - 2 * count * sum(sizes[:3])
    return products + 4 * count * shape["vocab_size"] * hidden + 7 * count * length * hidden * layers


def token_bytes(name: str, shape: Shape, layers: int) -> int:
    """What one token reads at least: each linear's codes and scales (dense LoRA: bf16), its adapter, the bf16 head."""
    head, size = 2 * shape["vocab_size"] * shape["hidden_size"], linears(shape)
    if name == "dense_lora":
        return head + layers * sum(2 * n * k + 4 * RANK * (n + k) for n, k in size)
    return head + layers * sum(Work.of_linears(0, n, k, ranks=RANK).read for n, k in size)
