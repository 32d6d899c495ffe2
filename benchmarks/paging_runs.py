"""What `paging.py` runs in processes of their own: training with one optimizer, watched for memory, time and losses."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import resident_bytes, speeches

BUDGET = "24MiB"
TRAINING = ("resident", "paged", "in_backward")
BUDGETS = ("budget 1.0", "budget 0.3")
LOSSES = ("32-bit", "32-bit, a quarter on the device", "8-bit")
LOSS_STEPS, LOSS_TOKENS = 200, 96


class PeakSampler:
    """The most anonymous memory that this process has while it is open, looked at every two milliseconds."""

    def __enter__(self) -> PeakSampler:
        self.peak, self.open = resident_bytes("RssAnon"), True
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def _run(self) -> None:
        while self.open:
            self.peak = max(self.peak, resident_bytes("RssAnon"))
            time.sleep(0.002)

    def __exit__(self, *_: Any) -> None:
        self.open = False
        self.thread.join()


def model_bytes(model: Any) -> int:
    """Storages of parameters and buffers, each once; of a quantized weight its codes and scales."""
    found = {}
    waiting = [*model.parameters(), *model.buffers()]
    while waiting:
        tensor = waiting.pop()
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        waiting += [getattr(tensor, name) for name in inner]
        if not inner:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def train(arguments: argparse.Namespace, optimizer_of: Callable[[Any], Any], **options: Any) -> dict[str, Any]:
    """Some steps on one batch -> median seconds, losses, and bytes: `peak_bytes` of the device tier (model, gradients,
    activations, and optimizer states there), `anonymous_bytes` of the process above its imports, `activation_bytes`
    that the forward pass keeps for the backward pass."""
    import torch
    from transformers import AutoModelForCausalLM

    import qlora_compile as qc
    import qlora_compile.backend
    from qlora_compile.resident import allocated

    before = resident_bytes("RssAnon")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    model.config.use_cache = False
    qc.prepare(model, {"r": 64, "lowering": "aot_eager", "keep_logits": False} | options).train()
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    model.compile(backend="qlora")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.seq_len), generator=generator)
    seconds, losses = [], []

    def forward() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    def step() -> None:
        begin = time.perf_counter()
        loss = forward()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)

    step()
    step()
    with PeakSampler() as sampler:
        for _ in range(arguments.steps):
            step()
    found = {"seconds": statistics.median(seconds[2:]), "losses": [*losses]}
    found["anonymous_bytes"] = sampler.peak - before
    found["state_bytes"] = states = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if isinstance(optimizer, qc.PagedAdamW):
        found["paging"] = optimizer.statistics().to_dict()
        states = found["paging"]["peak_device_bytes"]
    found["peak_bytes"] = model_bytes(model) + states + allocated(step)[0]
    found["activation_bytes"] = allocated(forward)[1]
    return found


def losses_of(name: str, model_dir: str) -> dict[str, Any]:
    """`LOSS_STEPS` steps on speeches, each on other tokens -> losses, and that of held-out text at the end."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qlora_compile as qc

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.config.use_cache = False
    qc.prepare(model, {"r": 16, "compute_dtype": "float32"}).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    states = 8 * sum(p.numel() for p in parameters)
    options = {"state_bits": 8} if name == "8-bit" else {"device_budget": states // 4} if "quarter" in name else {}
    tokens = AutoTokenizer.from_pretrained(model_dir)(speeches(range(1790, 1800)), return_tensors="pt").input_ids[0]
    blocks = tokens[: len(tokens) // LOSS_TOKENS * LOSS_TOKENS].view(-1, 1, LOSS_TOKENS)
    with tempfile.TemporaryDirectory(dir=Path(__file__).parents[1] / "build") as folder:
        optimizer = qc.PagedAdamW(parameters, lr=5e-4, page_folder=folder, **options)
        losses = []
        for block in blocks[:LOSS_STEPS]:
            loss = model(input_ids=block, labels=block).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        paging = optimizer.statistics().to_dict()
    held_out = blocks[LOSS_STEPS : LOSS_STEPS + 16, 0]
    with torch.no_grad():
        after = model(input_ids=held_out, labels=held_out).loss.item()
    return {"losses": losses, "held_out": after, "state_bytes": states, "paging": paging}


def worker(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender in this process."""
    import torch

    import qlora_compile as qc

    if name in LOSSES:
        return losses_of(name, arguments.model)
    fused = lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True)
    if name in BUDGETS:
        return train(arguments, fused, activation_budget=float(name.removeprefix("budget ")), lowering="inductor")
    if name == "resident":
        return train(arguments, fused)
    with tempfile.TemporaryDirectory(dir=Path(__file__).parents[1] / "build") as folder:
        options = {"device_budget": BUDGET, "page_folder": folder, "step_in_backward": name == "in_backward"}
        return train(arguments, lambda p: qc.PagedAdamW(p, lr=1e-4, **options))
