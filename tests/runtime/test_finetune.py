"""Training runs from files to files on a tiny model: what they write, that they repeat, that they resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_compile.config import QLoRAConfig
from qlora_compile.errors import CheckpointError, ConfigError, MemoryBudgetError
from qlora_compile.runtime.finetune import FinetuneConfig, FinetuneResult, _Run, finetune
from qlora_compile.runtime.interrupts import InterruptedRunError
from qlora_compile.runtime.metrics import read_metrics
from qlora_compile.runtime.reporters import SilentReporter, StepRecord

ADAPTER = "adapter_model.safetensors"


class Recorder(SilentReporter):
    """Keeps what is said, and sends this process a signal at step `at`."""

    def __init__(self, at: int = 0, signal_number: int = signal.SIGINT) -> None:
        self.at, self.signal_number = at, signal_number
        self.notices: list[str] = []
        self.steps: list[StepRecord] = []

    def notice(self, message: str) -> None:
        self.notices.append(message)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)
        if record.step == self.at:
            os.kill(os.getpid(), self.signal_number)


def run(config: FinetuneConfig, reporter: Any = None) -> FinetuneResult:
    return finetune(config, reporter or SilentReporter())


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / ADAPTER)


def assert_same_run(one: FinetuneResult, other: FinetuneResult) -> None:
    assert one.losses == other.losses and one.perplexity == other.perplexity
    first, second = adapter_of(one.out), adapter_of(other.out)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_learns_and_writes_everything(make_config: Any, texts: Path) -> None:
    reporter = Recorder()
    result = run(make_config(eval_data=texts / "b.txt", eval_every=4, warmup=2), reporter)
    assert result.losses[-1] < result.losses[0] - 0.2 and len(result.losses) == result.steps == 8
    assert result.perplexity < result.perplexity_quantized and result.perplexity_dense is not None
    out = result.out
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "checkpoints", "metrics.jsonl", "run.json"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-6", "step-8"]
    lines = read_metrics(out / "metrics.jsonl")
    evals = [(line["step"], line["stage"]) for line in lines if line["event"] == "eval"]
    assert evals == [(0, "dense"), (0, "quantized"), (4, "training"), (8, "final")]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["loss"] for line in steps] == list(result.losses)
    assert [line["lr"] for line in steps[:3]] == [0.005, 0.01, 0.01]
    assert all(line["tokens"] <= 4 * 10 and line["grad_norm"] > 0 for line in steps)
    assert [record.step for record in reporter.steps] == list(range(1, 9))
    assert any(re.search(r"training data: 2 documents, \d+ blocks of 11 tokens; 8 steps", n) for n in reporter.notices)


def test_run_json_says_what_was_run(make_config: Any) -> None:
    config = make_config(seed=5, steps=2)
    result = run(config)
    content = json.loads((config.out / "run.json").read_text())
    assert content["status"] == "done" and content["seed"] == 5 and content["config"] == config.to_dict()
    assert content["versions"]["torch"] == torch.__version__ and re.fullmatch("[0-9a-f]{64}", content["data"]["sha256"])
    assert content["results"]["perplexity"] is None and content["results"]["steps"] == 2
    assert json.loads(json.dumps(result.to_dict()))["losses"] == list(result.losses)


def test_the_same_seed_gives_the_same_run_and_another_does_not(make_config: Any) -> None:
    first, second = run(make_config("one")), run(make_config("two"))
    assert_same_run(first, second)
    assert run(make_config("three", seed=1)).losses != first.losses


def test_the_adapter_loads_in_peft_with_the_same_loss(make_config: Any, tiny_checkpoint: Path, texts: Path) -> None:
    from peft import PeftModel

    from qlora_compile.runtime.data import load_data
    from qlora_compile.runtime.evaluate import evaluate
    from qlora_compile.runtime.models import load_model

    # Without quantization base + adapter is the same function in PEFT.
    config = make_config(eval_data=texts, qlora={"quantize": False})
    result = run(config)
    model, tokenizer = load_model(tiny_checkpoint, torch.float32)
    assert (config.base_dtype, result.perplexity_dense) == (torch.float32, result.perplexity_quantized)
    with_adapter = PeftModel.from_pretrained(model, str(result.adapter))
    found = evaluate(with_adapter, load_data(texts, tokenizer, 11), batch=2)
    assert found.perplexity == pytest.approx(result.perplexity, rel=1e-5)  # fp32, another order of sums
    assert found.perplexity < 0.9 * result.perplexity_dense


class TestResume:
    @pytest.mark.parametrize("stop_at", [1, 3, 5])
    def test_an_interrupted_run_goes_on_bit_for_bit(self, make_config: Any, texts: Path, stop_at: int) -> None:
        whole = run(make_config("whole", eval_data=texts))
        config = make_config("cut", eval_data=texts)
        with pytest.raises(InterruptedRunError, match=rf"SIGINT after step {stop_at} of 8.*step-{stop_at}: .* resume"):
            run(config, Recorder(at=stop_at))
        assert json.loads((config.out / "run.json").read_text())["status"] == "interrupted"
        assert not (config.out / "adapter").exists()
        reporter = Recorder()
        resumed = run(make_config("cut", eval_data=texts, resume=True), reporter)
        assert [record.step for record in reporter.steps] == list(range(stop_at + 1, 9))
        assert_same_run(whole, resumed)
        assert (resumed.perplexity_dense, resumed.perplexity_quantized) == (
            whole.perplexity_dense,
            whole.perplexity_quantized,
        )

    def test_sigterm_and_sighup_in_a_row(self, make_config: Any) -> None:
        with pytest.raises(InterruptedRunError, match="SIGTERM after step 2"):
            run(make_config(), Recorder(at=2, signal_number=signal.SIGTERM))
        with pytest.raises(InterruptedRunError, match="SIGHUP after step 4"):
            run(make_config(resume=True), Recorder(at=4, signal_number=signal.SIGHUP))
        assert run(make_config(resume=True)).losses == run(make_config("whole")).losses

    def test_the_handlers_are_put_back(self, make_config: Any) -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        run(make_config("one", steps=1))
        with pytest.raises(InterruptedRunError):
            run(make_config("two"), Recorder(at=2))
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_a_damaged_checkpoint_is_skipped_and_no_step_counted_twice(self, make_config: Any) -> None:
        whole = run(make_config("whole"))
        with pytest.raises(InterruptedRunError):
            run(make_config(), Recorder(at=5))
        config = make_config(resume=True)
        weights = config.out / "checkpoints" / "step-5" / "parameters.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        reporter = Recorder()
        resumed = run(config, reporter)
        assert "parameters.safetensors is corrupt" in reporter.notices[0] and "at step 3" in reporter.notices[1]
        assert_same_run(whole, resumed)
        steps = [line["step"] for line in read_metrics(config.out / "metrics.jsonl") if line["event"] == "step"]
        assert steps == list(range(1, 9))

    def test_fp16_goes_on_with_its_loss_scale(self, make_config: Any) -> None:
        half = {"qlora": {"compute_dtype": "float16"}}
        whole = run(make_config("whole", **half))
        with pytest.raises(InterruptedRunError):
            run(make_config("cut", **half), Recorder(at=4))
        assert_same_run(whole, run(make_config("cut", resume=True, **half)))
        first, second = (read_metrics(r / "metrics.jsonl") for r in (whole.out, whole.out.with_name("cut")))
        assert [line["loss_scale"] for line in first] == [line["loss_scale"] for line in second]

    def test_a_finished_run_can_be_made_longer(self, make_config: Any) -> None:
        run(make_config(steps=4, schedule="constant", warmup=0))
        longer = run(make_config(steps=8, schedule="constant", warmup=0, resume=True))
        assert_same_run(longer, run(make_config("whole", schedule="constant", warmup=0)))

    def test_from_a_checkpoint_that_is_named(self, make_config: Any) -> None:
        whole = run(make_config())
        reporter = Recorder()
        again = run(make_config(resume=whole.out / "checkpoints" / "step-6"), reporter)
        assert [record.step for record in reporter.steps] == [7, 8]
        assert_same_run(whole, again)
        assert (whole.out / "checkpoints" / "step-8.set-aside").is_dir()
        elsewhere = run(make_config("elsewhere", resume=whole.out / "checkpoints" / "step-6"))
        assert adapter_of(elsewhere.out).keys() == adapter_of(whole.out).keys()
        assert elsewhere.losses == whole.losses[6:]

    def test_before_the_first_checkpoint_it_starts_at_step_0(self, make_config: Any) -> None:
        reporter = Recorder()
        first = run(make_config(resume=True), reporter)
        assert any("no checkpoint" in notice for notice in reporter.notices) and first.steps == 8

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lr": 1e-3}, "lr=0.01, this run has 0.001"),
            ({"seq_len": 12}, "seq_len"),
            ({"seed": 3}, "seed"),
            ({"qlora": {"r": 4}}, "r=3, this run has 4"),
            ({"qlora": {"block_size": 128}}, "block_size"),
        ],
    )
    def test_changed_settings_are_refused(self, make_config: Any, changes: dict[str, Any], message: str) -> None:
        run(make_config(steps=1))
        with pytest.raises(CheckpointError, match=message):
            run(make_config(resume=True, **changes))

    def test_changed_data_and_another_model_are_refused(
        self, make_config: Any, tmp_path: Path, tiny_checkpoint: Path
    ) -> None:
        run(make_config(steps=1))
        (tmp_path / "other.txt").write_text("a jug of bad liquor " * 20)
        with pytest.raises(CheckpointError, match=r"another data than .*other\.txt"):
            run(make_config(resume=True, data=tmp_path / "other.txt"))
        other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
        tensors = load_file(other / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
        from safetensors.torch import save_file

        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="another model than"):
            run(make_config(resume=True, model=other))


KILLED = """
import sys
from qlora_compile.config import QLoRAConfig
from qlora_compile.runtime.finetune import FinetuneConfig, finetune
model, data, out, steps = sys.argv[1:]
finetune(FinetuneConfig(
    model=model, data=data, out=out, qlora=QLoRAConfig(r=3, compute_dtype="float32", lora_dropout=0.1),
    steps=int(steps), batch=2, grad_accum=2, seq_len=11, lr=1e-2, save_every=3, compile=False, resume=True,
))
"""


def test_kill_9_loses_at_most_the_steps_since_the_last_save(
    make_config: Any, tiny_checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(texts), str(out), "40"]
    for target in (8, 17):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        metrics = out / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and f'"step": {target},' in metrics.read_text()):
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    reporter = Recorder()
    resumed = run(make_config("killed", steps=40, resume=True), reporter)
    assert reporter.steps[0].step >= 16  # step 15 was saved, and step 17 reached
    assert resumed.losses == run(make_config("whole", steps=40)).losses


def test_chats_train_on_completions_only(make_config: Any, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "the lazy dog"}, {"role": "assistant", "content": "seven wizards"}]
    lines = [{"messages": chat}, {"prompt": "the quick brown ", "completion": "fox"}, {"text": "a jug"}] * 5
    data = tmp_path / "chat.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    config = make_config(data=data, steps=2)
    run(config)
    tokens = sum(line["tokens"] for line in read_metrics(config.out / "metrics.jsonl"))
    assert 0 < tokens < 0.8 * 2 * 4 * 10


def test_modules_to_save_are_trained_and_resumed(make_config: Any) -> None:
    changes = {"qlora": {"modules_to_save": ("norm",)}}
    whole = run(make_config("whole", **changes))
    assert any("norm" in name for name in adapter_of(whole.out))
    with pytest.raises(InterruptedRunError):
        run(make_config("cut", **changes), Recorder(at=4))
    assert_same_run(whole, run(make_config("cut", resume=True, **changes)))


def test_a_compiled_run_gives_the_same_losses_from_one_graph(make_config: Any, texts: Path) -> None:
    # Evaluation in the middle runs eagerly: it must neither compile a second graph nor undo the first.
    common: dict[str, Any] = {"eval_data": texts, "eval_every": 3, "qlora": {"lora_dropout": 0.0, "lowering": "eager"}}
    eager = run(make_config("eager", **common))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(make_config("compiled", compile=True, **common))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    # fp32 with sums in another order, over 8 steps.
    assert compiled.losses == pytest.approx(eager.losses, abs=1e-4)
    assert compiled.perplexity == pytest.approx(eager.perplexity, rel=1e-3)


def test_a_step_in_backward_gives_the_run_of_the_usual_way(make_config: Any) -> None:
    options = {"optimizer": "paged_adamw", "optimizer_budget": "16KiB", "max_grad_norm": 0.0, "grad_accum": 1}
    usual = run(make_config("usual", **options))
    within = run(make_config("within", step_in_backward=True, **options))
    assert_same_run(usual, within)
    lines = [line for line in read_metrics(within.out / "metrics.jsonl") if line["event"] == "step"]
    assert all(line["grad_norm"] is None and not line["skipped"] for line in lines)
    for name, value in (("step_in_backward", True), ("memory_budget", "1GiB")):
        config = make_config("other", **options, **{name: value})
        with pytest.raises(ConfigError, match=f"{name} is for one process, and this run has 2"):
            _Run(config, SilentReporter(), SimpleNamespace(count=2))  # type: ignore[arg-type]


def test_without_compile_a_memory_budget_is_for_a_step_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Any]()
    monkeypatch.setattr("qlora_compile.runtime.finetune.StepMemory", lambda model, qlora, *_, **__: seen.append(qlora))
    for compiled in (True, False):
        config = SimpleNamespace(
            memory_budget="1GiB", compile=compiled, seq_len=8, optimizer="adamw", optimizer_budget=None
        )
        this: Any = SimpleNamespace(config=config, reporter=SilentReporter(), model=None, device=torch.device("cpu"))
        _Run._memory(this, QLoRAConfig(keep_logits=False, activation_budget=0.5))
    found = [(qlora.lowering, qlora.keep_logits, qlora.activation_budget) for qlora in seen]
    assert found == [("inductor", False, 0.5), ("eager", True, 1.0)]


@pytest.mark.slow
def test_a_memory_budget_splits_steps_that_do_not_fit_and_is_told_once(make_config: Any) -> None:
    """A model of several times the size of its activations, in a budget between that of one row and that of all."""
    reporter, options = (
        Recorder(),
        {"optimizer": "paged_adamw", "grad_accum": 1, "batch": 6, "qlora": {"lora_dropout": 0.0}},
    )
    whole = run(make_config("whole", **options))
    with pytest.raises(MemoryBudgetError, match=r"One sequence of 11 tokens takes about ([\d.]+) KiB") as caught:
        run(make_config("small", memory_budget="8KiB", **options))
    least = float(re.search(r"about ([\d.]+) KiB", str(caught.value))[1]) * 1024  # type: ignore[index]
    split = run(make_config("split", memory_budget=int(least * 1.1), **options), reporter)
    told = [notice for notice in reporter.notices if "do not fit the memory budget" in notice]
    assert len(told) == 1 and "6 sequences of 11 tokens do not fit the memory budget" in told[0]
    assert "split into micro-batches of at most" in told[0]
    assert split.losses == pytest.approx(whole.losses, rel=1e-4) and split.losses != whole.losses
