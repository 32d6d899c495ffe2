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

# Three steps with each of some paged optimizers on a model of its own, after an evaluation; `width` and `options` as above,
# `dynamic`, and `rows` of the batch.
PAGED = """
    import json, sys
    import torch
    from torch import nn
    from torch._dynamo.utils import counters
    import qlora_compile as qc

    job = json.loads(sys.argv[1])
    x = torch.randn(job["rows"], job["width"], generator=torch.Generator().manual_seed(1))
    models = []
    for options in job["optimizers"]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(job["width"], 53), nn.SiLU(), nn.Linear(53, 29))
        qc.prepare(model, {"block_size": 32, "r": 3, "compute_dtype": "float32", "init_lora_weights": False})
        optimizer = qc.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
        compiled = torch.compile(model, backend="qlora", options=job["options"], dynamic=job["dynamic"])
        with torch.no_grad():
            compiled(x)
        before = dict(counters["aot_autograd"])
        losses = []
        for _ in range(3):
            loss = compiled(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        report = qc.explain(model)
        (edit,) = [p for p in report.passes if p.name == "page_optimizer"]
        models.append({
            "hit": counters["aot_autograd"]["autograd_cache_hit"] - before.get("autograd_cache_hit", 0),
            "losses": losses,
            "moved": optimizer.statistics().moved_in_bytes,
            "rewrites": edit.rewrites,
            "declined": edit.declined,
            "paging": [timeline.to_dict() for timeline in report.paging],
        })
    print(json.dumps(models))
"""

HIT = {"hit": 1, "miss": 0, "bypass": 0, "fxgraph_bypass": 0}
MISS = {"hit": 0, "miss": 1, "bypass": 0, "fxgraph_bypass": 0}


def new_width() -> int:
    return 41 + 2 * (time.time_ns() // 1000 % 400)


def run(script: str, job: dict[str, Any], **environment: str) -> Any:
    command = [sys.executable, "-c", textwrap.dedent(script), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return json.loads(done.stdout.splitlines()[-1])


def step(width: int, *, prepared: bool = True, outline: bool = True, **job: Any) -> dict[str, Any]:
    options = {"outline_layers": outline} | job.pop("options", {})
    answer: dict[str, Any] = run(STEP, {"width": width, "prepared": prepared, "options": options} | job)
    return answer


def paged(width: int, *optimizers: dict[str, Any], folder: str = "", **job: Any) -> list[dict[str, Any]]:
    job = {"width": width, "optimizers": optimizers, "rows": 4, "dynamic": None, "options": {}} | job
    answer: list[dict[str, Any]] = run(PAGED, job, **({"QLORA_COMPILE_CACHE_DIR": folder} if folder else {}))
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
    counts = [run(LANGUAGE_MODEL, {}, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert counts == [{"hit": 0, "miss": 2, "bypass": 0}, {"hit": 2, "miss": 0, "bypass": 0}]


IN_BACKWARD = {"device_budget": "4KiB", "step_in_backward": True}


def test_a_backward_graph_that_moves_pages_is_served_with_its_plan() -> None:
    width = new_width()
    (first,), (second,) = paged(width, IN_BACKWARD), paged(width, IN_BACKWARD)
    assert (first.pop("hit"), second.pop("hit")) == (0, 1)
    assert first == second
    assert first["rewrites"] == 4 and first["moved"] > 0 and first["paging"][0]["prefetches"]


@pytest.mark.slow
def test_it_is_served_to_no_other_optimizer_and_says_when_its_plan_is_gone(tmp_path: Path) -> None:
    width = new_width()
    usual = {"device_budget": "4KiB"}
    folder = str(tmp_path / "plans")
    jobs = [usual, {"device_budget": "8KiB"}, usual]  # the third is the first's equal, but the ops name it otherwise
    first = paged(width, *jobs, folder=folder)
    # AOTAutograd keeps no such graph
    paged(width, usual, folder=folder, options={"lowering": "aot_eager"})
    second = paged(width, *jobs, folder=folder)
    assert [model.pop("hit") for model in first] == [0, 0, 0]
    assert [model.pop("hit") for model in second] == [1, 1, 1]
    assert first == second
    assert first[0]["losses"] == first[1]["losses"] == first[2]["losses"]
    for plan in Path(folder).glob("plan-*.json"):
        plan.write_text("half of a pl")
    (third,) = paged(width, usual, folder=folder)
    assert third["hit"] == 1 and third["losses"] == first[0]["losses"] and third["moved"] == first[0]["moved"]
    assert third["paging"] == [] and "plan is not at hand" in third["declined"][0][1]


@pytest.mark.slow
def test_a_schedule_made_for_another_batch_is_not_served() -> None:
    width = new_width()
    for rows, hit in ((4, 0), (64, 0), (4, 1), (64, 1)):
        (model,) = paged(width, {"device_budget": "4KiB"}, rows=rows, dynamic=True)
        assert model["hit"] == hit, rows


@pytest.mark.slow
def test_what_is_served_is_written_down_all_the_same(tmp_path: Path) -> None:
    width = new_width()
    paged(width, IN_BACKWARD)
    (model,) = paged(width, IN_BACKWARD, options={"dump_dir": str(tmp_path)})
    assert model["hit"] == 0
    assert any(folder.name.endswith("_backward") for folder in tmp_path.iterdir())


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
