"""The training run, from files to files: load, quantize, train, evaluate, save; and go on after an interruption."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
from torch import nn

from ..config import QLoRAConfig
from ..errors import CheckpointError, ConfigError
from ..interruption import check
from ..preparation import prepare
from .adapters import save_adapter
from .checkpoint import Checkpoint, prune, save_checkpoint
from .data import Batch, BlockOrder, PackedData, load_data
from .dense_layers import with_dense_layers
from .distributed import Processes
from .evaluations import Evaluations
from .finetune_config import FinetuneConfig
from .finetune_result import FinetuneResult
from .interrupts import InterruptedRunError, SignalWatch
from .mapped_experts import join_experts
from .metrics import Clock, PagingMeter, finite_or_none, memory_bytes, versions
from .model_check import check_model_reads
from .models import load_tokenizer, load_weights, model_fingerprint
from .optimizer import make_optimizer, trainable_parameters
from .reporters import Reporter, SilentReporter, StepRecord, make_reporter
from .run_folder import RunFolder
from .run_record import RunRecord
from .runs import open_sinks
from .schedule import learning_rate, warmup_steps
from .step_memory import StepMemory
from .train_step import StepResult, TrainStep
from .training_state import capture, restore

__all__ = ["FinetuneConfig", "FinetuneResult", "finetune"]


def finetune(config: FinetuneConfig, reporter: Reporter | None = None) -> FinetuneResult:
    """Train adapters on `config.data` and write `config.out`: adapter/, metrics.jsonl, run.json and checkpoints/.

    `reporter` None reports to standard error: a progress bar on a terminal, plain lines elsewhere. The output folder
    and the data are checked before the model is loaded. SIGINT, SIGTERM and SIGHUP end the run after the step in
    progress, with a checkpoint. Raises QLoRACompileError's subclasses, InterruptedRunError among them.

    Under torchrun every process takes its part of each batch, and the first one writes (runtime/distributed.py).
    """
    processes = Processes.join(config.pick_device())
    with processes.own_folder(config) as own, processes.ended_by_signal(), processes.watched():
        reporter = SilentReporter() if not processes.first else make_reporter() if reporter is None else reporter
        result = _finetune(_Run(own, reporter, processes))
        processes.leave()
    return result


def _finetune(run: _Run) -> FinetuneResult:
    try:
        with run.processes.watched():
            run.load()
            with run.record.logging(run.step, without="eval" if run.evaluations.changed else ""):
                run.prepare()
                run.train()
                return run.finish()
    except BaseException as error:
        run.record.fail(run.step, error)
        raise
    finally:
        run.reporter.close()
        run.folder.release()


class _Run:
    """One training run: the state that `load`, `prepare`, `train` and `finish` share, called in this order."""

    model: nn.Module
    data: PackedData
    evaluations: Evaluations
    take_step: TrainStep
    paging: PagingMeter
    order: BlockOrder

    def __init__(self, config: FinetuneConfig, reporter: Reporter, processes: Processes) -> None:
        self.config = config
        self.reporter = reporter
        self.processes = processes
        self.started = time.perf_counter()
        if processes.count > 1 and (config.step_in_backward or config.memory_budget is not None):
            what = "step_in_backward" if config.step_in_backward else "memory_budget"
            raise ConfigError(f"{what} is for one process, and this run has {processes.count}: leave it out.")
        self.device = processes.device(config.pick_device())
        self.folder = RunFolder(config.out)
        self.record = RunRecord(self.folder, open_sinks(config, reporter.notice), reporter.notice)
        self.checkpoint: Checkpoint | None = processes.from_first(lambda: self.folder.open(config, reporter))
        if not processes.first:
            self.folder.open(config, reporter)
        self.step = self.checkpoint.step if self.checkpoint else 0

    def load(self) -> None:
        """Read the data, then the model: what is wrong with the data is known in seconds."""
        config = self.config
        tokenizer = load_tokenizer(config.model)
        self.data = load_data(config.data, tokenizer, config.seq_len)
        eval_data = load_data(config.eval_data, tokenizer, config.seq_len) if config.eval_data else None
        self.total_steps = config.total_steps(len(self.data), self.processes.count)
        count = f"{self.data.documents} documents, {len(self.data)} blocks of {config.seq_len} tokens"
        self.reporter.notice(f"training data: {count}; {self.total_steps} steps of {self._step_tokens} tokens")
        self._check_same("data", self.data.fingerprint, config.data)
        self.processes.check_same("data", self.data.fingerprint)
        self.evaluations = Evaluations(eval_data, config, self.checkpoint, self.reporter)
        self.reporter.notice(f"loading {config.model}")
        self.model = load_weights(config.model, config.base_dtype, map_experts=True).to(self.device)
        check_model_reads(self.model, config.seq_len, self.data, eval_data)
        self.model_fingerprint = model_fingerprint(self.model)
        self._check_same("model", self.model_fingerprint, config.model)
        self.processes.check_same("model", self.model_fingerprint)
        content = {
            "id": self.folder.run_id(),
            "config": config.to_dict(),
            "versions": versions(),
            "seed": config.data_seed,
            "processes": self.processes.count,
            "data": self.data.summary(),
            "eval_data": None if eval_data is None else eval_data.summary(),
        }
        self.record.begin(self.step, content)

    def prepare(self) -> None:
        """Quantize, add the adapters, and only then make the optimizer; then take up the checkpoint's state."""
        config = self.config
        if "dense" not in self.evaluations.perplexity:
            self._evaluate("dense")
        self.model.config.use_cache = False  # type: ignore[union-attr]  # no key-value cache among the graph's outputs
        qlora = with_dense_layers(self.model, config, self.reporter)
        self.record.content["dense_modules"] = list(qlora.dense_modules)
        memory = self._memory(qlora)
        prepare(self.model, qlora)
        join_experts(self.model)  # those that are not in 4 bits now
        if "quantized" not in self.evaluations.perplexity:  # a checkpoint's adapters come later
            self._evaluate("quantized")
        call = self.processes.wrap(self.model, split=config.fsdp, notice=self.reporter.notice)
        optimizer = make_optimizer(
            self.model,
            name=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            device_budget=config.optimizer_budget,
            page_folder=config.optimizer_folder,
            step_in_backward=config.step_in_backward,
        )
        scaler = torch.amp.GradScaler(self.device.type) if config.scales_loss else None
        self.take_step = TrainStep(
            self.model,
            optimizer,
            max_grad_norm=config.max_grad_norm,
            scaler=scaler,
            call=call,
            processes=self.processes,
            memory=memory,
            notice=self.reporter.notice,
        )
        self.paging = PagingMeter(optimizer)
        self.order = BlockOrder(len(self.data), config.data_seed)
        torch.manual_seed(config.data_seed + self.processes.rank)
        if self.checkpoint is not None:
            restore(self.checkpoint, trainable_parameters(self.model), optimizer, scaler)
            self.order.position = self.checkpoint.state["position"]
            if not self.processes.first:  # the state that was stored is the first one's
                torch.manual_seed(config.data_seed + self.processes.rank + self.processes.count * self.step)
            self.checkpoint = None  # its tensors are a second copy of the adapters and their moments

    def _memory(self, qlora: QLoRAConfig) -> StepMemory | None:
        """The memory budget against the plan of the model's step, which is made before the model is quantized."""
        config = self.config
        if config.memory_budget is None:
            return None
        if not config.compile:  # nothing is fused, no loss is taken in chunks, nothing is computed again
            qlora = dataclasses.replace(qlora, lowering="eager", keep_logits=True, activation_budget=1.0)
        self.reporter.notice("estimating the memory of a step")
        return StepMemory(
            self.model,
            qlora,
            config.memory_budget,
            seq_len=config.seq_len,
            optimizer=config.optimizer,
            optimizer_budget=config.optimizer_budget,
            device=self.device.type,
        )

    def train(self) -> None:
        """The loop. Raises InterruptedRunError after a signal, with a checkpoint of the last whole step."""
        config = self.config
        self.model.train()
        if config.compile and self.step < self.total_steps:
            self.model.compile(backend="qlora")
            self.reporter.notice("compiling the model: the first step takes a minute or two")
        clock = Clock(self.total_steps)
        self.reporter.start(self.step, self.total_steps)
        if self.step and self._evaluates and not self.processes.from_first(lambda: self.record.evaluated(self.step)):
            self._evaluate("training")  # what was interrupted right before it
        with SignalWatch(self._on_signal) as watch:
            while self.step < self.total_steps:
                self._one_step(clock)
                last = self.step == self.total_steps
                stopped = self.processes.total(float(watch.signal_name is not None), self.device) > 0
                if stopped and not last:
                    self._stop(watch.signal_name or "a signal to another process")
                if config.save_every and (self.step % config.save_every == 0 or last):
                    self._save()
                if self._evaluates:
                    self._evaluate("training")

    def finish(self) -> FinetuneResult:
        """Write the adapter, measure it, and record the results."""
        save_adapter(self.model, self.folder.adapter)
        self.reporter.close()
        self._evaluate("final")
        seconds = time.perf_counter() - self.started
        result = FinetuneResult.of_run(self.folder, self.step, self.evaluations.perplexity, seconds)
        self.record.end("done", self.step, results=result.to_dict() | {"losses": None})
        self.reporter.notice(f"adapter saved to {self.folder.adapter}")
        return result

    @property
    def _evaluates(self) -> bool:
        """Whether there is an evaluation after the step that was the last one so far."""
        every = self.config.eval_every
        return every > 0 and self.step % every == 0 and self.step < self.total_steps

    @property
    def _step_tokens(self) -> int:
        return self.config.batch * self.config.grad_accum * self.config.seq_len * self.processes.count

    def _one_step(self, clock: Clock) -> None:
        check()
        config = self.config
        warmup = warmup_steps(config.warmup, self.total_steps)
        lr = learning_rate(
            self.step, lr=config.lr, schedule=config.schedule, total_steps=self.total_steps, warmup=warmup
        )
        batches = [self._next_batch() for _ in range(config.grad_accum)]
        started = time.perf_counter()
        result = self.take_step(batches, lr)
        seconds = time.perf_counter() - started
        self.step += 1
        record = self._step_record(result, lr, seconds, clock.seconds_left(self.step))
        self.record.line(record.to_dict())
        self.reporter.step(record)

    def _next_batch(self) -> Batch:
        blocks = self.order.take(self.config.batch * self.processes.count)
        batch = self.data.batch(self.processes.mine(blocks))
        return batch._replace(input_ids=batch.input_ids.to(self.device), labels=batch.labels.to(self.device))

    def _step_record(self, result: StepResult, lr: float, seconds: float, seconds_left: float | None) -> StepRecord:
        scaler = self.take_step.scaler
        return StepRecord(
            step=self.step,
            total_steps=self.total_steps,
            loss=finite_or_none(result.loss),
            lr=lr,
            grad_norm=finite_or_none(result.grad_norm),
            tokens=result.loss_tokens,
            tokens_per_s=round(self._step_tokens / seconds, 2),
            seconds=round(seconds, 4),
            memory_bytes=memory_bytes(self.device),
            seconds_left=seconds_left,
            skipped=result.skipped,
            loss_scale=None if scaler is None else scaler.get_scale(),
            paging=self.paging(),
        )

    def _evaluate(self, stage: str) -> None:
        check()
        record = self.evaluations.measure(self.model, stage, self.step)
        if record is not None:
            self.record.line(record.to_dict())
            self.reporter.evaluated(record)

    def _save(self) -> Path:
        parameters, scaler = self.take_step.parameters, self.take_step.scaler
        tensors, state = capture(parameters, self.take_step.optimizer, scaler)
        if not self.processes.first:
            return self.folder.checkpoints
        state |= {
            "config": self.config.to_dict(),
            "data": self.data.fingerprint,
            "model": self.model_fingerprint,
            "position": self.order.position,
            "perplexity": self.evaluations.perplexity,
            "evaluation": self.evaluations.measured_on,
        }
        path = save_checkpoint(self.folder.checkpoints, self.step, tensors, state)
        prune(self.folder.checkpoints, self.config.keep_last)
        self.reporter.saved(path, self.step)
        return path

    def _on_signal(self, name: str) -> None:
        self.reporter.notice(f"{name}: stopping after this step with a checkpoint (once more: stop at once)")

    def _stop(self, signal_name: str) -> None:
        own = self._save()
        path = self.processes.from_first(lambda: own)  # which also has all wait until it is written
        raise InterruptedRunError(
            f"Stopped by {signal_name} after step {self.step} of {self.total_steps}; the checkpoint is {path}: "
            f"to go on, run the same command with --resume (in Python: resume=True)."
        )

    def _check_same(self, what: str, fingerprint: str, path: Path) -> None:
        if self.checkpoint and self.checkpoint.state.get(what) != fingerprint:
            raise CheckpointError(f"{self.checkpoint.path} was trained with another {what} than {path} holds now.")
