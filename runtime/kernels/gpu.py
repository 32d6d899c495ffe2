"""The Triton kernels that the ops call by name on a GPU, each compared with its reference on that GPU at first use.

No GPU runs the tests of every change, so a kernel has to prove itself where it is used: on a small random weight it must
give the reference's bits (milliseconds, once a process). One that does not is left out, with a warning.
"""

from __future__ import annotations

import importlib.util
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ...errors import KernelError
from ...nf4 import dequantize_reference, quantize_reference

OPS = ("dequantize_4bit", "quantize_4bit", "dropout_mask", "paged_step", "cross_entropy")
_SHAPE = (37, 97)  # odd, and the last block is ragged


def is_available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def make(op: str, device: torch.device) -> Callable[..., Any] | None:
    """The kernel of one of OPS, proved on this device; None, with a warning, where it cannot run or is wrong."""
    if not is_available():
        warnings.warn(
            "Triton is not installed, so 4-bit work on this GPU runs in plain torch, many times slower. Install the "
            "triton package that belongs to your build of torch.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    from . import triton_codec, triton_cross_entropy, triton_low_rank, triton_paged_step
    from .paged_step_proof import proves_paged_step

    kernels: dict[str, Callable[..., Any]] = {
        "dequantize_4bit": triton_codec.dequantize_4bit,
        "quantize_4bit": triton_codec.quantize_4bit,
        "dropout_mask": triton_low_rank.dropout_mask,
        "paged_step": triton_paged_step.paged_step,
        "cross_entropy": triton_cross_entropy.cross_entropy,
    }
    kernel = kernels[op]
    proofs: dict[str, Callable[..., bool]] = {
        "dequantize_4bit": proves_dequantize,
        "quantize_4bit": proves_quantize,
        "dropout_mask": proves_dropout_mask,
        "paged_step": proves_paged_step,
        "cross_entropy": proves_cross_entropy,
    }
    why = _why_not(proofs[op], kernel, device)
    if why:
        warnings.warn(
            f"The Triton kernel {op} {why} on {torch.cuda.get_device_name(device)}: plain torch runs instead, many times "
            "slower. Please report this with what `qlora-compile doctor` prints.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    return kernel


def _why_not(proof: Callable[..., bool], kernel: Callable[..., Any], device: torch.device) -> str:
    """What is wrong with a kernel; empty if nothing is. A proof whose memory ran out proves nothing: that error passes."""
    from triton.errors import TritonError

    # what compilers and drivers raise; Triton also compiles a launcher in C (no Python.h), caches and loads it
    expected = (RuntimeError, KernelError, TritonError, OSError, ImportError, subprocess.SubprocessError)
    try:
        with torch.inference_mode(False), torch.no_grad():
            return "" if proof(kernel, device) else "does not give the reference's numbers"
    except torch.OutOfMemoryError:
        raise
    except expected as error:  # the warning tells it
        first, _, _ = str(error).strip().partition("\n")
        return f"fails ({type(error).__name__}: {first})"


def _normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """fp32 on the CPU, whatever torch's default device and dtype are: a user may have set both."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def proves_dequantize(kernel: Callable[..., Any], device: torch.device) -> bool:
    """Every output dtype, scales double-quantized and not, against the reference on the CPU."""
    weight = _normal(_SHAPE, 7)
    for double_quant in (True, False):
        data = quantize_reference(weight, "nf4", 64, double_quant)
        there = [None if part is None else part.to(device) for part in data]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.empty(_SHAPE, dtype=dtype, device=device)
            kernel(*there, out.numel(), "nf4", 64, out)
            if not torch.equal(out.cpu(), dequantize_reference(*data, _SHAPE, "nf4", 64, dtype)):
                return False
    return True


def proves_quantize(kernel: Callable[..., Any], device: torch.device) -> bool:
    """The codes and fp32 scales of the reference on the CPU."""
    weight = _normal(_SHAPE, 8)
    got = kernel(weight.to(device).view(-1), "nf4", 64, False)
    expected = quantize_reference(weight, "nf4", 64, False)
    return torch.equal(got.codes.cpu(), expected.codes) and torch.equal(got.absmax.cpu(), expected.absmax)


def proves_dropout_mask(kernel: Callable[..., Any], device: torch.device) -> bool:
    """0 or 1 / keep, about the right share of them (five standard deviations), and the same again from the same seed."""
    like, seed, keep = torch.empty(_SHAPE, dtype=torch.float32, device=device), torch.tensor(5, device="cpu"), 0.75
    mask, again = kernel(seed, like, keep).cpu().double(), kernel(seed, like, keep).cpu().double()
    kept = mask != 0
    share = kept.double().mean().item()
    right = bool(((mask * keep - 1).abs()[kept] < 1e-6).all()) and torch.equal(mask, again)
    return right and abs(share - keep) < 5 * (keep * (1 - keep) / mask.numel()) ** 0.5


def proves_cross_entropy(kernel: Callable[..., Any], device: torch.device) -> bool:
    """Losses and gradients of some rows of bf16 logits, as they are and scaled and capped, against fp64 on the CPU: chosen
    among others, and all of them in place, which is what training calls."""
    return _proves_cross_entropy(kernel, device, 5003, False) and _proves_cross_entropy(kernel, device, 5008, True)


def _proves_cross_entropy(kernel: Callable[..., Any], device: torch.device, classes: int, in_place: bool) -> bool:
    z = (_normal((11, classes), 9) * 4).bfloat16()
    rows, target = torch.tensor([7, 2, 9], device="cpu"), torch.tensor([5002, 0, 17], device="cpu")
    wide, chosen = z[rows].double(), torch.nn.functional.one_hot(target, classes)
    capped = 5 * torch.tanh(wide / 10)  # scale 1 / 2, cap 5
    for y, slope, change in ((wide, 1.0, ()), (capped, 0.5 * (1 - (capped / 5) ** 2), (0.5, 5.0))):
        losses = torch.empty(3, dtype=torch.float32, device=device)
        source = (z[rows] if in_place else z).to(device)
        out = source if in_place else torch.empty(3, classes, dtype=z.dtype, device=device)
        kernel(source, target.to(device), losses, out, None if in_place else rows.to(device), *change)
        expected, picked = (y.softmax(1) - chosen) * slope, y.gather(1, target[:, None])[:, 0]
        close = torch.allclose(losses.cpu().double(), y.logsumexp(1) - picked, rtol=1e-5, atol=1e-5)
        # one rounding to bf16, or two units of it where the interpreter truncates
        if not close or not ((out.cpu().double() - expected).abs() <= expected.abs() * 2**-7 + 1e-6).all():
            return False
    return True
