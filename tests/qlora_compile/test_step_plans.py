"""`estimate` of models whose ops change with the sequence's length, or that take no long one: against measured peaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import qlora_compile as qc
from qlora_compile import lora_gradients, lora_group
from qlora_compile.errors import ModelStateError
from qlora_compile.estimate import Estimator
from qlora_compile.memory_plan import MemoryPlan, Size
from qlora_compile.resident import measured_peak
from qlora_compile.runtime import kernels
from qlora_compile.step_plan import Symbols, _PlanBuilder
from qlora_compile.step_plans import LENGTHS, SYMBOLS, StepPlans, symbols_for
from qlora_compile.tracing import meta_copy

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 4000,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 96,
}
HEADS = {"intermediate_size": 208, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "mamba2": {
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 6,
        "head_dim": 32,
        "n_groups": 2,
        "chunk_size": 64,
    },
    "lfm2": HEADS | {"layer_types": ["conv", "full_attention"]},
    "bert": HEADS | {"is_decoder": True, "max_position_embeddings": 512},
    "mpt": {"d_model": 96, "n_heads": 6, "n_layers": 2, "max_seq_len": 512},
    "gpt2": {"n_head": 6, "n_layer": 2, "n_positions": 512, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0},
    "falcon": {"num_attention_heads": 6, "num_hidden_layers": 2},
    "gpt_neo": {
        "num_heads": 6,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 512,
    },
}
CONFIG = qc.QLoRAConfig(r=3, block_size=32, lowering="aot_eager", keep_logits=False)


def build(name: str) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(name, **(SIZES | MODELS[name]))
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.train()


def test_which_models_are_formulas_of_their_length() -> None:
    found = {name: symbols_for(meta_copy(build(name)).train()) for name in MODELS}
    assert found == {
        "llama": SYMBOLS,
        "mamba2": None,  # chunks of 64
        "lfm2": None,  # a convolution pads the sequence by two
        "bert": Symbols(SYMBOLS.batch, 509, slack=0),  # a buffer of 512 positions
        "mpt": Symbols(SYMBOLS.batch, 509, slack=0),  # a bias of as many
        "gpt2": SYMBOLS,
        "falcon": SYMBOLS,
        "gpt_neo": Symbols(SYMBOLS.batch, 509, slack=0),
    }


@pytest.mark.parametrize(
    "name", [pytest.param("mamba2", marks=pytest.mark.slow), "lfm2", "mpt", "gpt2", "falcon", "gpt_neo"]
)
def test_the_peak_is_what_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a machine that multiplies bf16, see test_tracing.py
    both = {"lora_linear": lora_group.forward, "lora_linear_backward": lora_gradients.backward}
    monkeypatch.setattr(kernels, "lora_kernel", lambda op, *_, **__: both[op])
    model, batch, length = build(name), 3, 448  # between the lengths that were traced
    estimator = Estimator(model, CONFIG)
    planned = estimator.plans.read(batch, length, lambda plan: {"peak": plan.peak().bytes})["peak"]
    assert estimator(batch, length).fitted == (LENGTHS if name in ("mamba2", "lfm2") else ())
    qc.prepare(model, CONFIG, {"input_ids": torch.ones(1, 8, dtype=torch.long)})
    compiled = torch.compile(model, backend="qlora")
    tokens = torch.randint(3, 3999, (batch, length))
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    measured = measured_peak(compiled, {"input_ids": tokens, "labels": tokens})
    # as in test_tracing.py; these models have more products whose workspace is the library's own
    assert planned == pytest.approx(measured, rel=0.1), f"{planned / measured - 1:+.1%}"


def test_what_lengths_are_padded_to() -> None:
    assert [StepPlans(build(name), CONFIG, None).chunk for name in ("mamba2", "lfm2")] == [64, 8]
    plans = StepPlans(build("mamba2"), CONFIG, None)
    plans.by_length = {length: MemoryPlan([], []) for length in LENGTHS}
    read = lambda seq: plans.read(1, seq, lambda plan: {"tokens": plan.seq})
    assert [read(seq)["tokens"] for seq in (1, 64, 65, 300)] == pytest.approx([64, 64, 128, 320])


def test_sizes_near_a_short_sequence_are_not_the_sequence() -> None:
    """Of 512 positions the symbol is 509, and four bytes of 1024 features are nearly eight of it."""
    config = transformers.AutoConfig.for_model(
        "bert", **SIZES | HEADS | {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 8},
        is_decoder=True, max_position_embeddings=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    tokens = torch.zeros(2, 128, dtype=torch.long, device="meta")
    direct = qc.trace(model, {"input_ids": tokens, "labels": tokens}, CONFIG).plan
    found = StepPlans(model, CONFIG, None).read(2, 128, lambda plan: {"saved": plan.saved_bytes()})
    assert direct is not None and found["saved"] == pytest.approx(direct.saved_bytes(), rel=0.01)


def test_a_storage_that_ends_before_the_batch_does_is_the_batchs() -> None:
    """As of a slice that was written into: the last element's rest is not there."""
    node = fx.Graph().placeholder("cut")
    node.meta["val"] = torch.empty_strided((2 * 7919, 20), (21, 1), device="meta")
    builder = _PlanBuilder(Symbols(7919, 100003), {}, "cpu", fused=False, outlined=False)
    assert builder.size_of(node, node.meta["val"].untyped_storage().nbytes()) == Size(2 * 21 * 4, 1, 0)
    node.meta["val"] = torch.empty_strided((2 * 7919 + 1, 20), (21, 1), device="meta")
    assert builder.size_of(node, 84) == Size(84)


class Mistaken(torch.nn.Module):
    """Adds 54 numbers to 53."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = torch.nn.Embedding(97, 37), torch.nn.Linear(37, 53)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (self.up(self.embed(input_ids)) + input_ids.new_ones(54)).sum()


def test_why_a_model_cannot_be_traced_is_dynamos_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ModelStateError, match=r"cannot be traced without its weights: Attempting to broadcast a dimension of length 54"
    ):
        StepPlans(Mistaken(), CONFIG, None).by_length  # noqa: B018
    assert "Traceback" not in capsys.readouterr().err
