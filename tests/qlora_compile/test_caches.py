"""Compile caches over several processes: what is served, and what must not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_compile import fingerprint

# A process that trains one step of a small model and says what the caches did. Its arguments are JSON: `width` of the
# model (never seen before by the caches of this run), `options` of the backend, whether it is `prepared`, another
# `fingerprint` instead of the real one.
STEP = """
    import json, sys, time
    import torch
    from torch import nn
    from torch._dynamo.utils import counters
    import qlora_compile as qc
    from qlora_compile import fingerprint

    job = json.loads(sys.argv[1])
    if "fingerprint" in job:
        fingerprint.sources = lambda: job["fingerprint"]

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 53), nn.Linear(53, width)

        def forward(self, x):
            return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model = nn.Sequential(*[Block(job["width"]) for _ in range(3)])
    options = {"block_size": 32, "r": 3, "compute_dtype": "float32", **job["options"]}
    if job["prepared"]:
        qc.prepare(model, {k: v for k, v in options.items() if k != "outline_layers"})
    compiled = torch.compile(model, backend="qlora", options=options)
    x = torch.randn(4, job["width"], requires_grad=True)
    loss = compiled(x).square().mean()
    loss.backward()
    counts = {name: counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")}
    counts["fxgraph_bypass"] = counters["inductor"]["fxgraph_cache_bypass"]
    print(json.dumps({"counts": counts, "numbers": [loss.item(), x.grad.square().sum().item()]}))
"""

LANGUAGE_MODEL = """
    import json
    import torch
    from torch._dynamo.utils import counters
    from transformers import LlamaConfig, LlamaForCausalLM
    import qlora_compile as qc

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=211, use_cache=False)
    ids = torch.arange(34).view(2, 17)
    for keep_logits in (True, False):
        model = LlamaForCausalLM(config).bfloat16()
        qc.prepare(model, {"r": 3, "keep_logits": keep_logits})
        optimizer = qc.PagedAdamW([p for p in model.parameters() if p.requires_grad])  # all on the device
        compiled = torch.compile(model, backend="qlora")
        compiled(input_ids=ids, attention_mask=(ids % 17 > 3).long(), labels=ids).loss.backward()
    print(json.dumps({name: counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("hit", "miss", "bypass")}))
"""

HIT = {"hit": 1, "miss": 0, "bypass": 0, "fxgraph_bypass": 0}
MISS = {"hit": 0, "miss": 1, "bypass": 0, "fxgraph_bypass": 0}


def new_width() -> int:
    return 41 + 2 * (time.time_ns() // 1000 % 400)


def step(width: int, *, prepared: bool = True, outline: bool = True, **job: Any) -> dict[str, Any]:
    options = {"outline_layers": outline} | job.pop("options", {})
    text = json.dumps({"width": width, "prepared": prepared, "options": options} | job)
    command = [sys.executable, "-c", textwrap.dedent(STEP), text]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_second_process_is_served_and_computes_the_same() -> None:
    width = new_width()
    first, second = step(width), step(width)
    assert first["counts"] == MISS
    assert second["counts"] == HIT
    assert second["numbers"] == first["numbers"]


def test_a_language_model_that_computes_its_loss_is_served_too(tmp_path: Path) -> None:
    """Both forms of the loss that `chunk_cross_entropy` writes, padding, whose mask `lower_attention` splits, and a paged
    optimizer without a budget, whose pages the backward graph has not to move."""
    command = [sys.executable, "-c", textwrap.dedent(LANGUAGE_MODEL)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    counts = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    assert counts == [{"hit": 0, "miss": 2, "bypass": 0}, {"hit": 2, "miss": 0, "bypass": 0}]


@pytest.mark.slow
@pytest.mark.parametrize(("prepared", "outline"), [(False, True), (True, False), (False, False)])
def test_so_it_is_by_the_other_door_and_flat(prepared: bool, outline: bool) -> None:
    width = new_width()
    assert step(width, prepared=prepared, outline=outline)["counts"] == MISS
    assert step(width, prepared=prepared, outline=outline)["counts"] == HIT


@pytest.mark.slow
def test_another_configuration_or_version_of_ours_is_not_served() -> None:
    width = new_width()
    assert step(width)["counts"] == MISS
    for changed in (
        {"options": {"lora_alpha": 7}},
        {"options": {"r": 4}},
        {"options": {"activation_budget": 0.5}},
        {"options": {"lora_dropout": 0.25}},
        {"fingerprint": "sources of another version"},
    ):
        assert step(width, **changed)["counts"] == MISS, changed  # type: ignore[arg-type]
    assert step(width)["counts"] == HIT
    # what changes no compiled code is served: another seed draws other adapters
    assert step(width, options={"seed": 5})["counts"] == HIT


def test_a_changed_added_or_renamed_source_changes_the_digest(tmp_path: Path) -> None:
    seen = set()
    for name, text in (
        ("a.py", "x = 1"),
        ("a.py", "x = 2"),
        ("b.py", ""),
        ("b.py", "x = 2"),
        ("notes.txt", "no source"),
    ):
        (tmp_path / name).write_text(text)
        seen.add(fingerprint.digest([tmp_path]))
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    seen.add(fingerprint.digest([tmp_path]))
    assert len(seen) == 5
    folders = [[path.name for path in folder.glob("*.py")] for folder in fingerprint.FOLDERS]
    assert "ops.py" in folders[0]
    assert "outline_layers.py" in folders[1]
