"""The graphs of a training step -> its memory plan: which storage is born, read last and gone at which node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import page_ops  # noqa: F401 - registers its ops
from .flops import node_flops
from .fusion import is_by_element, never_written
from .fx_utils import module_path, storages
from .memory_plan import Buffer, Event, MemoryPlan, Rows, Size, chunk_rows
from .page_plan import PagedParameter
from .pass_manager import target_name
from .step_graphs import StepGraphs, graph_outputs
from .workspace import scratch_bytes, workspace_bytes

_PREFETCH, _EVICT = torch.ops.qlora.prefetch_page.default, torch.ops.qlora.evict_page.default
_SLACK = 16  # a dimension of seq + 1 (shifted labels) or one padded to a multiple of 8 still counts as the sequence


@dataclass(frozen=True)
class Symbols:
    """A batch and a sequence length so odd that they can be found again in every size that they are part of."""

    batch: int
    seq: int
    powers: int = 8  # of `seq`, at most
    slack: int = _SLACK  # 0 for a short one, which sizes of a model come near to

    def size(self, number: int) -> Size:
        """`number` as coefficient * batch^b * seq^s."""
        b = s = 0
        while number and number % self.batch == 0:
            number, b = number // self.batch, b + 1
        while number and s < self.powers and number % self.seq == 0:
            number, s = number // self.seq, s + 1
        for times in (1, 2, 4, 8):  # bytes of an element
            if number and s < self.powers and abs(number - times * self.seq) <= self.slack * times:
                number, s = times, s + 1
        return Size(number, b, s)


def plan_of(
    steps: Sequence[StepGraphs],
    symbols: Symbols | None,
    paged: Mapping[int, PagedParameter] | None = None,
    device: str = "cpu",
    fused: bool = False,
    outlined: bool = False,
) -> MemoryPlan:
    """The life of every storage over forward and backward; residents (weights, inputs) are the caller's to add.

    `paged`: the parameters, by number, whose optimizer state the graphs prefetch and evict. `device` (a kind) decides
    what ops of ours work on at a time. `fused`: Inductor generates the kernels, and what stays inside them takes no memory;
    of `outlined` graphs they may not overwrite what the forward saved (see `lowering`).

    Several steps are the graphs of one model with graph breaks: forwards in order, then backwards in reverse. What one
    hands to the next is then taken to live to the end of the forward.
    """
    builder = _PlanBuilder(symbols, paged or {}, device, fused, outlined)
    builder.whole = len(steps) == 1  # else what comes into a backward graph is what another one gave
    for part, step in enumerate(steps):
        builder.add("forward", part, step.forward)
        given = graph_outputs(step.forward)
        builder.close_forward(part, [node for node in given[step.outputs :] if isinstance(node, fx.Node)])
    last_forward = len(builder.events) - 1
    for part, step in enumerate(steps):
        for node in graph_outputs(step.forward)[: step.outputs]:
            if isinstance(node, fx.Node):
                builder.mark(("forward", part), node, "output", last_forward)
                builder.kept.update(("forward", part, key) for key in storages(node))
    for part, step in reversed([*enumerate(steps)]):
        if step.backward is not None:
            builder.add("backward", part, step.backward)
    for part, step in enumerate(steps):
        for node in graph_outputs(step.backward) if step.backward is not None else ():
            if isinstance(node, fx.Node):
                builder.mark(("backward", part), node, "gradients", len(builder.events) - 1)
    return MemoryPlan(builder.events, builder.buffers(), scratch=builder.scratch)


class _PlanBuilder:
    """Walks both graphs in order; a storage is born at the first node that has it and dies after the last that reads it."""

    def __init__(
        self, symbols: Symbols | None, paged: Mapping[int, PagedParameter], device: str, fused: bool, outlined: bool
    ) -> None:
        self.symbols, self.paged, self.device = symbols, paged, device
        self.fused, self.outlined = fused, outlined
        self.whole = True
        self.events: list[Event] = []
        self.scratch: dict[str, Size] = {}
        self.live: dict[Any, Buffer] = {}  # storage -> its buffer so far
        self.saved: dict[tuple[int, str], list[Any]] = {}  # (part, name of a saved node) -> its storages
        self.kept: set[Any] = set()  # storages that are the caller's
        self.by_element: list[tuple[Any, list[Any]]] = []  # a storage that is written so -> those read for it
        self.workspaces: list[Buffer] = []
        self.pages: dict[int, int] = {}  # number of a parameter whose state is on the device -> its place in `states`
        self.states: list[Buffer] = []

    def size(self, number: int | Rows) -> Size:
        if not isinstance(number, Rows):
            return self.symbols.size(number) if self.symbols else Size(number)
        rows, row_bytes, chunk = number
        found = self.symbols.size(rows) if self.symbols else Size(rows)
        if found.coefficient != 1:  # no symbols, or other rows than tokens: as traced
            return Size(row_bytes * (chunk_rows(rows, chunk) if chunk else rows))
        return Size(row_bytes, found.b, found.s, chunk)

    def size_of(self, node: fx.Node, nbytes: int) -> Size:
        """Of a storage of the node's value; one that ends within the batch's last element's is counted as whole."""
        size = self.size(nbytes)
        if size.b or self.symbols is None or not _has_batch(node.meta.get("val"), self.symbols.batch):
            return size
        return self.size(nbytes + -nbytes % self.symbols.batch)

    def add(self, phase: str, part: int, gm: fx.GraphModule) -> None:
        """A node that the backward computes again stands on the forward's fake tensor: a storage's key names its graph."""
        known: dict[Any, Any] = {}  # storage in this graph -> what the forward's buffer of it is kept under
        inputs: set[Any] = set()
        unwritten = never_written(gm.graph) if self.fused else set()
        inside: dict[Any, list[Any]] = {}  # storage of a value that no kernel writes -> those it is computed from

        def read(nodes: Iterable[fx.Node]) -> list[Any]:
            named = [known.get(key, (phase, part, key)) for node in nodes for key in storages(node)]
            return [*dict.fromkeys(source for key in named for source in inside.get(key, (key,)))]

        for node in gm.graph.nodes:
            keys = storages(node)
            if node.op == "placeholder":
                known.update(zip(keys, self.saved.get((part, node.name), ())))
                if self.whole and node.name.startswith("tangents"):
                    self._give_tangent(node, (phase, part))
                else:
                    inputs.update(key for key in keys if key not in known)
                continue
            if node.op == "output":
                continue
            index = len(self.events)
            own = {key: known.get(key, (phase, part, key)) for key in keys if key not in inputs}
            fresh = [key for key in own if own[key] not in self.live and own[key] not in inside]
            if node in unwritten:
                inside |= {own[key]: read(node.all_input_nodes) for key in fresh}
                fresh = []
            self.events.append(self._event(phase, node, bool(fresh)))
            for key in () if node in unwritten else read((*node.all_input_nodes, node)):
                self._touch(key, index)
            for key in fresh:
                size = self.size_of(node, keys[key])
                self.live[own[key]] = Buffer(node.name, module_path(node), "temporary", size, index, index)
                if self.fused and is_by_element(node):
                    self.by_element.append((own[key], read(node.all_input_nodes)))
            self._add_workspace(node, index)
            self._move_pages(node, index)

    def _give_tangent(self, node: fx.Node, graph: tuple[str, int]) -> None:
        """The gradient of an output that the loss does not use (the logits, in a language model) comes as zeros."""
        start = len(self.events)
        for key, nbytes in storages(node).items():
            self.live[(*graph, key)] = Buffer(node.name, "", "temporary", self.size(nbytes), start, start)
            self.kept.add((*graph, key))

    def _move_pages(self, node: fx.Node, index: int) -> None:
        """State lives on the device from its prefetch to its eviction, or to the end of the step."""
        numbers: Any = node.args[-1] if node.target in (_PREFETCH, _EVICT) else ()
        for number in numbers:
            if node.target is _EVICT:
                place = self.pages.pop(number, None)
                if place is not None:
                    self.states[place] = _with(self.states[place], end=index)
            elif number in self.paged and number not in self.pages:
                parameter = self.paged[number]
                self.pages[number] = len(self.states)
                module = parameter.name.rpartition(".lora_")[0] or parameter.name.rpartition(".")[0]
                size = Size(parameter.state_bytes)
                self.states.append(Buffer(f"state of {parameter.name}", module, "optimizer", size, index, index))

    def _touch(self, key: Any, index: int) -> None:
        if key in self.live:
            self.live[key] = _with(self.live[key], end=max(index, self.live[key].end))

    def _event(self, phase: str, node: fx.Node, allocates: bool) -> Event:
        flops = node_flops(node)
        traffic = tuple(self.size(nbytes) for nbytes in _traffic(node)) if flops else ()
        target, module = target_name(node), module_path(node)
        return Event(phase, node.name, target, module, allocates, (self.size(flops),) if flops else (), traffic)

    def _add_workspace(self, node: fx.Node, index: int) -> None:
        for nbytes in workspace_bytes(node, self.device):
            buffer = Buffer(f"{node.name}: workspace", module_path(node), "workspace", self.size(nbytes), index, index)
            self.workspaces.append(buffer)
        for name, nbytes in scratch_bytes(node, self.device).items():
            size = self.size(nbytes) if isinstance(nbytes, Rows) else Size(nbytes)
            if self.device != "cpu":  # torch's allocator has it back at the end of the op
                named = f"{node.name}: {name}"
                self.workspaces.append(Buffer(named, module_path(node), "workspace", size, index, index))
            elif name not in self.scratch or self.scratch[name].coefficient < size.coefficient:
                self.scratch[name] = size

    def close_forward(self, part: int, saved: list[fx.Node]) -> None:
        """What the forward saves lives until the backward has used it."""
        for node in saved:
            self.saved[part, node.name] = [("forward", part, key) for key in storages(node)]
            self.mark(("forward", part), node, "saved", len(self.events) - 1)

    def mark(self, graph: tuple[str, int], node: fx.Node, kind: str, end: int) -> None:
        """Tell what a buffer is for, and that it lives at least to this event."""
        for key in storages(node):
            buffer = self.live.get((*graph, key))
            if buffer is not None:
                known = buffer.kind if buffer.kind != "temporary" else kind
                self.live[(*graph, key)] = _with(buffer, kind=known, end=max(end, buffer.end))

    def buffers(self) -> list[Buffer]:
        self._write_in_place()
        last, held = len(self.events) - 1, set(self.pages.values())
        states = [_with(state, end=last) if place in held else state for place, state in enumerate(self.states)]
        return [*self.live.values(), *self.workspaces, *states]

    def _write_in_place(self) -> None:
        """What is written element by element takes the place of an input of its size that nothing reads afterwards."""
        for key, sources in self.by_element:
            new = self.live[key]
            for source in sources:
                old = self.live.get(source)
                if old is None or source in self.kept or (self.outlined and source[0] != key[0]):
                    continue
                if old.start < old.end == new.start and old.size == new.size:
                    self.live[source] = _with(old, end=old.end - 1)
                    break


def _with(buffer: Buffer, **changes: Any) -> Buffer:
    return Buffer(**(buffer.__dict__ | changes))


def _has_batch(value: Any, batch: int) -> bool:
    return isinstance(value, torch.Tensor) and any(size and size % batch == 0 for size in value.shape)


def _traffic(node: fx.Node) -> list[int]:
    """Bytes of each storage that the node writes or reads."""
    return [nbytes for each in (node, *node.all_input_nodes) for nbytes in storages(each).values()]
