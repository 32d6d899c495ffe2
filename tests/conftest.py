"""Shared by all tests: compile caches of one run, a clean Dynamo after each test, a tiny Llama and its checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported. One compile cache for the whole run, subprocesses included; nothing of an earlier run.
_OWN_CACHE = None
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _OWN_CACHE = tempfile.mkdtemp(prefix="qlora_compile_tests_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _OWN_CACHE
# Tests read local files only; without these a wrong path becomes a slow network error.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

VOCAB_SIZE = 211
SENTENCES = (
    "the quick brown fox jumps over the lazy dog while seven wizards mix a jug of bad liquor",
    "a state of the union speech is given to the congress of the united states every year",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped, not deselected, so that the summary counts them."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line to read in a CI log: how many tests passed, were skipped (and for want of a GPU), failed."""
    stats = terminalreporter.stats
    passed, skipped = stats.get("passed", []), stats.get("skipped", [])
    no_gpu = sum("gpu" in getattr(report, "keywords", ()) for report in skipped)  # a module that was skipped has none
    failed = len(stats.get("failed", [])) + len(stats.get("error", []))
    line = f"tests: {len(passed)} passed, {len(skipped)} skipped ({no_gpu} need a GPU), {failed} failed"
    terminalreporter.write_line(line)


def pytest_unconfigure() -> None:
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """Each test starts from one seed and leaves no compiled code, gradient mode or default dtype behind."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _foreground_signals() -> Iterator[None]:
    """Interrupts and hang-ups as a process in the foreground gets them: behind `nohup` or a shell's `&` they are ignored, in
    this process and in those that a test starts."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in usual if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def _cacheable_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph of a test is one that AOTAutograd caches for no second process because of what our passes put into it: a
    method of a node without an example value, which torch takes for no tensor (`check_node_safe`)."""
    from qlora_compile import backend

    bind = backend.bind

    def checked(work: torch.fx.GraphModule, *args: Any) -> Any:
        methods = [node for node in work.graph.nodes if node.op == "call_method"]
        unknown = [node.format_node() for node in methods if "example_value" not in node.args[0].meta]
        assert not unknown, f"methods of what AOTAutograd takes for no tensor: {unknown}"
        return bind(work, *args)

    monkeypatch.setattr(backend, "bind", checked)


@pytest.fixture
def slow_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU without bf16 instructions, whatever runs the tests, and no table of measurements for it."""
    from qlora_compile.runtime.kernels import devices, dispatch

    monkeypatch.setattr(devices, "multiplies_natively", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(dispatch, "table", lambda device: ())
    dispatch.forget_choices()
    yield
    dispatch.forget_choices()


@pytest.fixture
def tiny_llama() -> Callable[..., torch.nn.Module]:
    """A maker of small random Llamas; keywords override `LlamaConfig`'s, `dtype` and `seed` are ours.

    hidden 48, intermediate 80, 3 layers, 3 query heads and 1 key-value head of 18, vocabulary 211, tied embeddings: no
    linear is square, and attention's (40.5 and 13.5 blocks of 64) end in half a block while the MLP's (60) do not.
    """
    return make_tiny_llama


def make_tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 18,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "use_cache": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
    return model.to(dtype)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the tiny Llama (bf16) and a tokenizer with a chat template. Read only."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    model = make_tiny_llama(torch.bfloat16)
    model.save_pretrained(path)  # type: ignore[operator]
    _make_tokenizer().save_pretrained(path)
    return path


def _make_tokenizer() -> Any:
    """BPE over the letters of SENTENCES: at most VOCAB_SIZE tokens, anything else is `<unk>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
