"""Adapters that start from the weight itself: `W` -> 4-bit base, A and B with `base + s B A` close to W.

- `pissa` (arXiv 2404.02948): `s B A` holds the r largest singular values of W, the base is the rest, quantized.
  `pissa_niter_4` finds them by 4 rounds of subspace iteration instead of a whole decomposition.
- `olora` (arXiv 2406.01775): B and A are the first r columns and rows of W = QR; the base is `W - s B A`, quantized.
- `loftq` (arXiv 2310.08659): `s B A` holds the r largest singular values of what quantization loses; the base is W,
  quantized, or with `loftq_iter` > 1 what is left of W after the last `s B A`.

Definitions are peft's (`tuners/lora/layer.py`), but for two of its traits: its LoftQ leaves the scaling s out, so that
it is right for s = 1 only, and its PiSSA does not take 4-bit bases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import QLoRAConfig
from .errors import ConfigError
from .tensor import QuantizedTensor, stack_experts

SPECTRAL = ("pissa", "olora", "loftq")
# [out, in] -> (the base as it is stored, the [out, in] values that it stands for)
Store = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SpectralStart:
    """The stored base, and fp32 factors `a` [r, in] and `b` [out, r]; of experts [E, ., .] all three."""

    base: Tensor
    a: Tensor
    b: Tensor


def is_spectral(init: object) -> bool:
    """Whether `init_lora_weights` names one of these methods."""
    return isinstance(init, str) and init.partition("_niter_")[0] in SPECTRAL


def start_from_weight(
    name: str, param: Tensor, config: QLoRAConfig, quantize: Callable[[Tensor], Tensor] | None, *, transposed: bool
) -> SpectralStart:
    """What `config.init_lora_weights` makes of the parameter `name` (`transposed`: it is [in, out]).

    Of a weight of E experts [E, ., .] each is a matrix of its own: `a` [E, r, in], `b` [E, out, r].

    `quantize` maps a dense parameter, and an expert's matrix, to a QuantizedTensor; None leaves the base dense. Raises
    ConfigError (a rank above the matrix's, LoftQ on a weight whose dense values are gone).
    """
    method, rank = str(config.init_lora_weights), config.rank_for(name)
    most = min(param.shape[-2:])
    if rank > most:
        raise ConfigError(f"init_lora_weights={method!r} needs r of at most {most} at {name}, got {rank}.")
    if isinstance(param, QuantizedTensor) and method == "loftq":
        raise ConfigError(f"init_lora_weights='loftq' needs the dense weights, and {name} is in 4 bits already.")
    dense = param.dequantize() if isinstance(param, QuantizedTensor) else param.detach()

    def turn(weight: Tensor) -> Tensor:
        return weight.t().contiguous() if transposed else weight

    def store(weight: Tensor) -> tuple[Tensor, Tensor]:
        stored = turn(weight).to(dense.dtype)
        if quantize is None:
            return stored, turn(stored)
        quantized = quantize(stored)
        return quantized, turn(quantized.dequantize())  # type: ignore[operator]

    def start(matrix: Tensor) -> SpectralStart:
        return spectral_start(turn(matrix), method, rank, config.scaling_for(name), store, config.loftq_iter)

    if dense.dim() == 2:
        return start(dense)
    starts = [start(dense[expert]) for expert in range(dense.shape[0])]
    bases = [one.base for one in starts]
    base = torch.stack(bases) if quantize is None else stack_experts(bases)  # type: ignore[arg-type]
    return SpectralStart(base, torch.stack([one.a for one in starts]), torch.stack([one.b for one in starts]))


def spectral_start(
    weight: Tensor, method: str, rank: int, scaling: float, store: Store, loftq_iter: int = 1
) -> SpectralStart:
    """W [out, in] -> a stored base and factors. LoftQ's first round stores W itself: the ordinary base, bit for bit."""
    wide = weight.float()
    if method == "loftq":
        rest = weight
        for _ in range(loftq_iter):
            base, values = store(rest)
            a, b = top_singular(wide - values.float(), rank, scaling, None)
            rest = wide - scaling * (b @ a)
        return SpectralStart(base, a, b)
    name, _, rounds = method.partition("_niter_")
    a, b = _olora(wide, rank) if name == "olora" else top_singular(wide, rank, scaling, int(rounds) if rounds else None)
    return SpectralStart(store(wide - scaling * (b @ a))[0], a, b)


def top_singular(matrix: Tensor, rank: int, scaling: float, rounds: int | None) -> tuple[Tensor, Tensor]:
    """The r largest singular values of `matrix`, divided by s, their square roots on either side."""
    if rounds is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):  # the subspace's start is random: the same for every run
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank, niter=rounds)
        vh = v.t()
    roots = (s[:rank] / scaling).sqrt()
    return (roots[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * roots).contiguous()


def _olora(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix)
    return r[:rank].contiguous(), q[:, :rank].contiguous()
