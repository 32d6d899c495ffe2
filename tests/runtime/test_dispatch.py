"""The choice between kernels: forced, measured here, from the shipped table, by default; who may register what."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_compile.errors import KernelError, UnknownOptionError
from qlora_compile.runtime.kernels import autotune, cpu_gemm, devices, dispatch, tuning
from qlora_compile.runtime.kernels.dispatch import Candidate, Problem

BF16 = Problem("lora_linear", 512, (192, 64), 128, 8, torch.bfloat16, "nf4", 64)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder and a list of candidates of the test's own; no shipped table."""
    monkeypatch.setenv("QLORA_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(dispatch, "_candidates", list(dispatch._candidates))
    monkeypatch.setattr(dispatch, "TABLES", tmp_path / "tables")
    dispatch.table.cache_clear()
    dispatch.forget_choices()
    yield
    dispatch.table.cache_clear()
    dispatch.forget_choices()


def ship(tmp_path: Path, *entries: tuple[object, ...]) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    lines = [tuning.Entry(*entry)._asdict() for entry in entries]  # type: ignore[arg-type]
    (folder / f"{devices.kind('cpu')}.json").write_text(json.dumps({"entries": lines}))


@pytest.mark.parametrize("native", [True, False])
def test_default_is_fp32_only_where_bf16_has_no_instructions(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(devices, "multiplies_natively", lambda dtype: native)
    choice = dispatch.choose(BF16)
    fused = cpu_gemm.is_preferred() and cpu_gemm.declines() is None
    assert choice.name == ("library_gemm" if native else "fused_fp32" if fused else "fp32_gemm")
    assert choice.why == f"the default for {devices.kind('cpu')}"
    # no second precision to choose from
    choice = dispatch.choose(BF16._replace(dtype=torch.float32))
    assert choice.name == ("fused_fp32" if fused else "library_gemm")
    forced = dispatch.choose(BF16._replace(dtype=torch.float32), "fp32_gemm")
    assert "fp32_gemm was asked for but declines: products are in fp32 already" in forced.why


def test_the_nearest_entry_of_the_table_decides(tmp_path: Path) -> None:
    ship(
        tmp_path,
        ("lora_linear", 512, (300,), 128, "bfloat16", True, {"library_gemm": 90.0, "fp32_gemm": 30.0}),
        ("lora_linear", 4096, (300,), 128, "bfloat16", True, {"library_gemm": 30.0, "fp32_gemm": 90.0, "gone": 1.0}),
        (
            "lora_linear",
            512,
            (256,),
            128,
            "bfloat16",
            False,
            {"library_gemm": 1.0},
        ),  # a dense weight is another problem
    )
    near, far = dispatch.choose(BF16), dispatch.choose(BF16._replace(m=2048))
    assert near.name == "fp32_gemm" and far.name == "library_gemm"
    assert near.why == "table: M=512 N=300 K=128: fp32_gemm 30 us, library_gemm 90 us"


def test_what_was_measured_here_beats_the_table_for_its_own_sizes_only(tmp_path: Path) -> None:
    ship(tmp_path, ("lora_linear", 512, (256,), 128, "bfloat16", True, {"library_gemm": 90.0, "fp32_gemm": 30.0}))
    tuning.remember([dispatch.entry_of(BF16, {"library_gemm": 10.0, "fp32_gemm": 20.0})], "cpu")
    dispatch.forget_choices()
    assert dispatch.choose(BF16).name == "library_gemm"
    assert dispatch.choose(BF16).why.startswith("measured here: ")
    assert dispatch.choose(BF16._replace(k=256)).name == "fp32_gemm"
    assert dispatch.choose(BF16._replace(n=(256,))).name == "fp32_gemm"  # one linear is not a group of two


def test_of_two_entries_of_a_size_the_group_of_as_many_linears_decides(tmp_path: Path) -> None:
    one, two = {"library_gemm": 90.0, "fp32_gemm": 30.0}, {"library_gemm": 30.0, "fp32_gemm": 90.0}
    ship(
        tmp_path,
        ("lora_linear", 512, (256,), 128, "bfloat16", True, one),
        ("lora_linear", 512, (128, 128), 128, "bfloat16", True, two),
    )
    assert dispatch.choose(BF16).why.startswith("table: M=512 N=128+128 K=128: library_gemm 30 us")
    assert dispatch.choose(BF16._replace(n=(300,))).why.startswith("table: M=512 N=256 K=128: fp32_gemm 30 us")


def test_what_the_table_knows_to_be_far_behind_is_not_measured(tmp_path: Path) -> None:
    """torch's bf16 backward of a 4096 x 4096 linear takes a minute on a CPU with AVX2 and nothing wider."""
    called = []
    for name in ("quick", "near", "slow", "new"):
        dispatch.register(
            Candidate("dense_linear", name, lambda x, weight, bias, name=name: called.append(name), ("cpu",))
        )
    times = {"quick": 10.0, "near": 30.0, "slow": 900.0, "library_gemm": 900.0, "fp32_gemm": 900.0, "fused_fp32": 900.0}
    ship(tmp_path, ("dense_linear", 16, (64,), 64, "bfloat16", False, times))
    measured = autotune.measure(Problem("dense_linear", 16, (64,), 64, 0, torch.bfloat16))
    assert {"quick", "near", "new"} == set(called) == set(measured)


def test_what_a_version_with_other_kernels_measured_is_measured_again() -> None:
    dispatch.register(Candidate("dense_linear", "new", lambda x, weight, bias: None, ("cpu",)))
    problem = Problem("dense_linear", 16, (64,), 64, 0, torch.bfloat16)
    tuning.remember([dispatch.entry_of(problem, {"library_gemm": 1.0, "of_before": 2.0})], "cpu")
    measured = autotune.measure(problem)
    assert "new" in measured and "of_before" not in measured
    assert autotune.measure(problem) == measured  # from the file


def test_a_cache_that_cannot_be_written_holds_measurements_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise KernelError("The kernel cache is read-only.")

    monkeypatch.setattr(tuning, "_locked", refuse)
    monkeypatch.setattr(tuning, "_unwritten", {})
    with pytest.warns(RuntimeWarning, match=r"holds for this process only: The kernel cache is read-only\."):
        tuning.remember([dispatch.entry_of(BF16, {"library_gemm": 10.0, "fp32_gemm": 20.0})], "cpu")
    tuning.remember([dispatch.entry_of(BF16._replace(k=256), {"library_gemm": 10.0, "fp32_gemm": 20.0})], "cpu")
    dispatch.forget_choices()
    assert dispatch.choose(BF16).why.startswith("measured here: ") and len(tuning.measured("cpu")) == 2


def test_a_forced_kernel_wins_and_says_why_not_where_it_declines() -> None:
    for name in ("library_gemm", "fp32_gemm"):
        choice = dispatch.choose(BF16, name)
        assert (choice.name, choice.why) == (name, "forced by option")
    declined = dispatch.choose(BF16, "codes")
    assert declined.name != "codes"
    assert declined.why.endswith("codes was asked for but declines: for at most 64 rows")


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownOptionError, match="fp32_gemm"):
        dispatch.check_forced({"lora_linear": "fp32_gem"})
    with pytest.raises(UnknownOptionError, match="lora_linear"):
        dispatch.check_forced({"lora_linaer": "fp32_gemm"})
    with pytest.raises(KernelError, match="no op 'lora'"):
        dispatch.register(Candidate("lora", "mine", None))
    with pytest.raises(KernelError, match="already has a kernel 'library_gemm'"):
        dispatch.register(Candidate("lora_linear", "library_gemm", None))


def test_a_kernel_of_another_device_registers_without_touching_the_cpu() -> None:
    before = dispatch.choose(BF16).name
    mine = dispatch.register(Candidate("lora_linear", "mine", lambda *a: None, ("cuda",)))
    assert dispatch.choose(BF16).name == before
    assert mine in dispatch.candidates("lora_linear", "cuda")
    assert dispatch.choose(BF16._replace(device="cuda"), "mine").candidate is mine


@pytest.mark.parametrize(("rows", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (512, 512), (513, 1024)])
def test_buckets(rows: int, expected: int) -> None:
    assert dispatch.bucket(rows) == expected


def _remember(number: int) -> None:
    for k in range(5):
        problem = BF16._replace(n=(number + 1,), k=k + 1)
        tuning.remember([dispatch.entry_of(problem, {"library_gemm": float(number)})], "cpu")


def test_processes_that_measure_at_once_lose_nothing() -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_remember, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(tuning.measured("cpu")) == 20


@pytest.mark.parametrize("text", ["", "{", '{"entries": [{"op": "x"}]}', "[]"])
def test_a_broken_cache_file_counts_as_empty(text: str) -> None:
    tuning.cache_file("cpu").write_text(text)
    assert tuning.measured("cpu") == ()
    tuning.remember([dispatch.entry_of(BF16, {"library_gemm": 1.0})], "cpu")
    assert len(tuning.measured("cpu")) == 1
