"""State of a paged optimizer moves with the backward graph: prefetched before it is needed, evicted after its last use.

    optimizer.step() after backward       gradient -> accumulate_grad(gradient): `.grad` lies in a page
                                          ... prefetch_page(...): what the step begins with, over the last nodes
    step_in_backward=True                 prefetch_page(...), some nodes later:
                                          gradient -> step_page(gradient), evict_page(...), and no output

Which parameters there are and how large their state is, the backend says (`ctx.pages`); page numbers are the runtime's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..flops import node_flops
from ..fx_utils import storages
from ..page_plan import PagedParameter, PageLink, PageTimeline
from ..pass_manager import PassContext
from .page_schedule import Group, Issue, add_resident, clock, fill, schedule

_ops = torch.ops.qlora
_CHUNKS = 8  # prefetches ahead of optimizer.step(), so that one late copy does not hold up all


@dataclass(frozen=True)
class _Gradient:
    """One output of the graph: its place there, the node that computes it, whose gradient it is."""

    output: int
    node: fx.Node
    parameter: PagedParameter
    position: int  # of the parameter among the graph's inputs


def page_optimizer(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of gradients that a paged optimizer takes over."""
    count = 0
    for link in ctx.pages:
        found = _gradients(gm.graph, link)
        if not found:
            continue
        reason = link.idle_reason()
        if reason is not None:
            ctx.decline(link.optimizer, reason)
            continue
        planner = _Planner(gm.graph, link, found)
        ctx.timelines.append(planner.in_backward() if link.step_in_backward else planner.before_step(ctx))
        count += len(found)
    return count


def _gradients(graph: fx.Graph, link: PageLink) -> list[_Gradient]:
    output = graph.output_node()
    outputs: Any = output.args[0]
    found = []
    for index, (node, description) in enumerate(zip(outputs, output.meta.get("desc", ()))):
        position = getattr(getattr(description, "grad_of", None), "idx", -1)
        if isinstance(node, fx.Node) and position in link.parameters:
            found.append(_Gradient(index, node, link.parameters[position], position))
    return found


class _Planner:
    """Inserts the ops of one optimizer into one graph; positions are indices of the nodes as they were before."""

    def __init__(self, graph: fx.Graph, link: PageLink, gradients: list[_Gradient]) -> None:
        self.graph, self.link, self.gradients = graph, link, gradients
        self.nodes = list(graph.nodes)
        self.index = {node: index for index, node in enumerate(self.nodes)}
        self.first = max((i for i, node in enumerate(self.nodes) if node.op == "placeholder"), default=0)
        self.ends = clock(self.nodes, link.speeds)
        self.timeline = PageTimeline(link.optimizer, link.budget, link.step_in_backward, self.ends[-1])
        self.cursor: dict[int, fx.Node] = {}
        value = next(g.node.meta["val"] for g in gradients)
        self.fake_mode = value.fake_mode
        with graph.inserting_after(self.nodes[self.first]):
            self.token = graph.call_function(
                torch.ops.aten.empty.memory_format, ([1],), {"dtype": torch.uint8, "device": value.device}
            )
        with self.fake_mode:
            self.token.meta["val"] = torch.empty(1, dtype=torch.uint8, device=value.device)
        self.cursor[self.first] = self.token

    # --- two ways to step ---------------------------------------------------------------------------------------------

    def in_backward(self) -> PageTimeline:
        """Every gradient is used up where it is ready."""
        groups = self._groups(self._last_use)
        issues = schedule([g for g, _ in groups], self._anchors(), self.ends, self.link.budget, self.link.speeds)
        paged = self.link.budget is not None
        steps: dict[int, list[tuple[Group, list[_Gradient]]]] = {}
        for group, members in groups:
            steps.setdefault(group.ready, []).append((group, members))
        for index in sorted({*steps, *(self._after(issue) for issue in issues)}):
            for group, members in steps.get(index, ()):
                self._step(index, group, members, evict=paged)
            if paged:
                self._prefetch(index, [issue for issue in issues if self._after(issue) == index])
        self._drop_outputs(self.gradients)
        fill(self.timeline, issues if paged else [], [n.name for n in self.nodes], self.link.speeds, evicts=True)
        gradients = [(g.needed_ms, 0, sum(m.parameter.gradient_bytes for m in members)) for g, members in groups]
        add_resident(self.timeline, [*gradients, *((ms + 1e-6, 0, -size) for ms, _, size in gradients)])
        return self.timeline

    def before_step(self, ctx: PassContext) -> PageTimeline:
        """Gradients go to pages as far as they fit the budget; the rest of it is filled with state by the end."""
        budget = self.link.budget
        assert budget is not None
        paged = [g for g in self.gradients if g.parameter.gradient_bytes]
        if not paged:
            ctx.decline(f"{self.link.optimizer}: .grad in pages", f"all gradients and four pages exceed {budget} bytes")
        groups = self._groups(lambda gradient: self.index[gradient.node])
        held = 0
        for group, members in groups:
            chosen = [m for m in members if m.parameter.gradient_bytes]
            if chosen:
                self._accumulate(group.ready, chosen)
                held += sum(m.parameter.gradient_bytes for m in chosen)
        self.timeline.gradients_in_pages = len(paged)
        chunks = self._chunks(budget - held)
        issues = schedule(chunks, self._anchors(), self.ends, None, self.link.speeds)
        for index in sorted({self._after(issue) for issue in issues}):
            self._prefetch(index, [issue for issue in issues if self._after(issue) == index])
        fill(self.timeline, issues, [n.name for n in self.nodes], self.link.speeds, evicts=False)
        in_pages = [(g.needed_ms, 0, sum(m.parameter.gradient_bytes for m in members)) for g, members in groups]
        add_resident(self.timeline, in_pages)
        return self.timeline

    # --- what is ready when -------------------------------------------------------------------------------------------

    def _groups(self, ready: Callable[[_Gradient], int]) -> list[tuple[Group, list[_Gradient]]]:
        """Gradients of one op together, in the order in which they are ready."""
        by_source: dict[fx.Node, list[_Gradient]] = {}
        for gradient in self.gradients:
            node = gradient.node
            source = node.args[0] if node.target is operator.getitem else node
            by_source.setdefault(source, []).append(gradient)  # type: ignore[arg-type]
        found = []
        for members in by_source.values():
            at = max(self.first, *(ready(member) for member in members))
            parameters = [member.parameter for member in members]
            group = Group(
                tuple(p.number for p in parameters),
                tuple(p.name for p in parameters),
                sum(p.state_bytes for p in parameters),
                sum(p.gradient_bytes for p in parameters),
                at,
                self.ends[at],
            )
            found.append((group, members))
        return sorted(found, key=lambda entry: entry[0].ready)

    def _last_use(self, gradient: _Gradient) -> int:
        """The last node that computes the gradient or reads the parameter, whose update must wait for both."""
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        own = [node for node in placeholders if _position(node) == gradient.position]
        if not own:  # the forward may have saved a view of it, which nothing here names as such
            size = sum(storages(gradient.node).values())
            own = [n for n in placeholders if _position(n) is None and size in storages(n).values()]
        return max([self.index[gradient.node], *(self._last_read(node) for node in own)])

    def _last_read(self, node: fx.Node) -> int:
        last, storage = -1, storages(node).keys()
        for user in node.users:
            if user.op != "output":
                last = max(last, self.index[user])
                if storages(user).keys() & storage:
                    last = max(last, self._last_read(user))
        return last

    def _anchors(self) -> list[int]:
        """Products and attention: they end up as calls of their own, whatever else is fused."""
        return [i for i, node in enumerate(self.nodes) if node_flops(node) and self._tensor(node) is not None]

    def _tensor(self, node: fx.Node) -> fx.Node | None:
        """The node, or the first that takes its list apart."""
        if isinstance(node.meta.get("val"), torch.Tensor):
            return node
        return next((user for user in node.users if user.target is operator.getitem), None)

    def _chunks(self, room: int) -> list[Group]:
        """State in the order of the step, as much as there is room for, needed when the graph is done."""
        order = sorted((g.parameter for g in self.gradients), key=lambda parameter: parameter.number)
        chunks: list[list[PagedParameter]] = [[]]
        left = room
        for parameter in order:
            left -= parameter.state_bytes
            if left < 0:
                break
            if sum(p.state_bytes for p in chunks[-1]) >= room / _CHUNKS:
                chunks.append([])
            chunks[-1].append(parameter)
        end = len(self.nodes) - 1
        return [
            Group(
                tuple(p.number for p in chunk),
                tuple(p.name for p in chunk),
                sum(p.state_bytes for p in chunk),
                0,
                end,
                self.ends[end],
            )
            for chunk in chunks
            if chunk
        ]

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _after(self, issue: Issue) -> int:
        """The index of the node that an issue's op is put behind."""
        tensor = self._tensor(self.nodes[issue.after]) if issue.after >= 0 else None
        return self.first if tensor is None else max(self.first, self.index[tensor])

    def _call(self, index: int, target: Any, args: tuple[Any, ...], like: fx.Node | None = None) -> fx.Node:
        """A call behind node `index` and all that was put there before."""
        with self.graph.inserting_after(self.cursor.get(index, self.nodes[index])):
            node = self.graph.call_function(target, args)
        node.meta = {
            k: v for k, v in (like.meta if like is not None else {}).items() if k not in ("val", "tensor_meta")
        }
        node.meta["val"] = None
        self.cursor[index] = node
        return node

    def _prefetch(self, index: int, issues: Iterable[Issue]) -> None:
        numbers = [number for issue in issues for number in issue.group.numbers]
        if numbers:
            node = self.nodes[index]
            after = [node] if node.op != "placeholder" else []
            self._call(index, _ops.prefetch_page.default, (self.token, after, self.link.pager, numbers))

    def _step(self, index: int, group: Group, members: Sequence[_Gradient], *, evict: bool) -> None:
        inputs = {_position(node): node for node in self.nodes if node.op == "placeholder"}
        read = [inputs[m.position] for m in members if m.position in inputs]
        args = (self.token, [m.node for m in members], read, self.link.pager, list(group.numbers))
        self._call(index, _ops.step_page.default, args, members[0].node)
        if evict:
            self._call(index, _ops.evict_page.default, (self.token, self.link.pager, list(group.numbers)))

    def _accumulate(self, index: int, members: Sequence[_Gradient]) -> None:
        numbers = [member.parameter.number for member in members]
        args = ([member.node for member in members], self.link.pager, numbers)
        call = self._call(index, _ops.accumulate_grad.default, args, members[0].node)
        with self.fake_mode:
            call.meta["val"] = [torch.empty_like(member.node.meta["val"]) for member in members]
        placed = {}
        for at, member in enumerate(members):
            node = self._call(index, operator.getitem, (call, at), member.node)
            node.meta["val"] = call.meta["val"][at]
            placed[member.output] = node
        self._replace_outputs(placed)

    def _drop_outputs(self, gradients: Sequence[_Gradient]) -> None:
        self._replace_outputs({gradient.output: None for gradient in gradients})

    def _replace_outputs(self, changes: dict[int, fx.Node | None]) -> None:
        output = self.graph.output_node()
        values: Any = output.args[0]
        output.args = (tuple(changes.get(i, value) for i, value in enumerate(values)),)
        visible = output.meta.get("user_visible_output_idxs")
        if visible is not None:
            output.meta["user_visible_output_idxs"] = [i for i in visible if output.args[0][i] is not None]  # type: ignore[index]


def _position(node: fx.Node) -> int | None:
    """Where a placeholder stands among the inputs of the traced function; None for what the forward saved."""
    return getattr(node.meta.get("desc"), "idx", None)
