"""When each prefetch must begin: times of nodes by FLOPs and bytes, deadlines from the end back, the budget from the start.

All times are estimated ms from the start of the backward pass.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..flops import node_flops
from ..fx_utils import called_graph, hint
from ..page_plan import PageMove, PageTimeline, Speeds

SAFETY = 2.0  # times the estimated copy: pages that leave are copied in between, and estimates are estimates


@dataclass(frozen=True)
class Group:
    """Parameters whose state is needed at one moment: after node `ready`, at `needed_ms`."""

    numbers: tuple[int, ...]
    names: tuple[str, ...]
    state_bytes: int
    gradient_bytes: int
    ready: int
    needed_ms: float


@dataclass(frozen=True)
class Issue:
    """The prefetch of a group goes after node `after` (an index; -1: at the start), at `at_ms`."""

    group: Group
    after: int
    at_ms: float


def clock(nodes: Sequence[fx.Node], speeds: Speeds) -> list[float]:
    """When each node is done, in ms: the longer of its FLOPs and its bytes, one node after the other."""
    now, ends = 0.0, []
    for node in nodes:
        region = called_graph(node)
        if region is not None:
            now += clock(list(region.nodes), speeds)[-1]
        elif node.op == "call_function":
            moved = _bytes(node) + sum(_bytes(source) for source in node.all_input_nodes)
            now += 1e3 * max(node_flops(node) / speeds.flops, moved / speeds.memory)
        ends.append(now)
    return ends


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):  # lists are counted by the nodes that take them apart
        return 0
    return hint(value.numel()) * value.element_size()


def schedule(
    groups: Sequence[Group], anchors: Sequence[int], ends: Sequence[float], budget: int | None, speeds: Speeds
) -> list[Issue]:
    """Groups in the order of their need -> where each prefetch goes: as late as its copy allows, and not before what
    was needed earlier has made room for it. `anchors` are the nodes that one may follow, in order."""
    starts = _latest_starts(groups, speeds)
    times = [ends[anchor] for anchor in anchors]
    issues = []
    for group, start in zip(groups, starts):
        if budget is not None:
            start = max(start, _room_at(groups, group, budget))
        # an anchor that is done by then, but never one that comes after the group is needed
        at = bisect.bisect_right(times, start) - 1
        while at >= 0 and anchors[at] >= group.ready:
            at -= 1
        issues.append(Issue(group, anchors[at], times[at]) if at >= 0 else Issue(group, -1, 0.0))
    return issues


def _latest_starts(groups: Sequence[Group], speeds: Speeds) -> list[float]:
    """Copies run one after the other: each must be done when it is needed, and when the next has to begin."""
    latest, starts = float("inf"), []
    for group in reversed(groups):
        latest = min(latest, group.needed_ms) - SAFETY * copy_ms(group, speeds)
        starts.append(latest)
    return starts[::-1]


def _room_at(groups: Sequence[Group], group: Group, budget: int) -> float:
    """When the groups before have left so far that this one fits the budget beside those that are still to be used."""
    at = next(index for index, other in enumerate(groups) if other is group)
    room = budget - group.state_bytes
    while at > 0 and groups[at - 1].state_bytes <= room:
        at -= 1
        room -= groups[at].state_bytes
    return groups[at - 1].needed_ms if at > 0 else 0.0


def copy_ms(group: Group, speeds: Speeds) -> float:
    """How long the state of a group takes from tier to tier."""
    return 1e3 * group.state_bytes / speeds.copy


def fill(timeline: PageTimeline, issues: Sequence[Issue], names: Sequence[str], speeds: Speeds, evicts: bool) -> None:
    """What the plan hides and what is resident when, played through: one copy at a time, in the order of the issues."""
    free, changes = 0.0, []
    for issue in sorted(issues, key=lambda issue: (issue.at_ms, issue.group.needed_ms)):
        group = issue.group
        taken = copy_ms(group, speeds)
        begun = max(free, issue.at_ms)
        free = begun + taken
        hidden = max(0.0, taken - max(0.0, free - group.needed_ms))
        after = names[issue.after] if issue.after >= 0 else ""
        move = PageMove(group.names, group.state_bytes, after, issue.at_ms, group.needed_ms, taken, hidden, begun)
        timeline.prefetches.append(move)
        changes.append((issue.at_ms, group.state_bytes, 0))
        if evicts:
            changes.append((group.needed_ms, -group.state_bytes, 0))
    add_resident(timeline, changes)


def add_resident(timeline: PageTimeline, changes: Sequence[tuple[float, int, int]]) -> None:
    """Changes of (state bytes, gradient bytes) over time -> what is resident after each, beside what is there already."""
    steps = [*_differences(timeline.resident), *changes]
    state = gradient = 0
    line: dict[float, tuple[float, int, int]] = {}
    for ms, more_state, more_gradient in sorted(steps):
        state, gradient = state + more_state, gradient + more_gradient
        line[ms] = (ms, state, gradient)
    timeline.resident = list(line.values())


def _differences(line: Sequence[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    before = (0.0, 0, 0)
    found = []
    for entry in line:
        found.append((entry[0], entry[1] - before[1], entry[2] - before[2]))
        before = entry
    return found
