"""What the backend asks of Dynamo's internals, in one place. `tests/test_dynamo_contract.py` pins each of these lines."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch._dynamo.exc import ShortenTraceback, UnspecializeRestartAnalysis
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, TypeSource
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import fake_tensor_tls
from torch.utils.weak import TensorWeakRef

from .errors import QLoRACompileError
from .page_ops import NUMBER, PAGER

_MODULE_ITEM = re.compile(r"\._(modules|parameters|buffers)\[")


def real_inputs(gm: fx.GraphModule) -> list[Any]:
    """The real object behind each placeholder (the `nn.Parameter` itself), None where there is none."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            argument = node.meta.get("grapharg")
            found.append(getattr(argument, "example", None) if argument is not None else None)
    return found


def source_names(gm: fx.GraphModule) -> list[str]:
    """`L['self']._modules['lm_head']._parameters['weight']` for each placeholder, "" where it has no source."""
    names = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            name = getattr(getattr(node, "_dynamo_source", None), "name", "")
            names.append(name() if callable(name) else name)
    return names


def root_modules(gm: fx.GraphModule) -> list[nn.Module]:
    """The modules that are being compiled: what the parameters' sources start from in the traced frame.

    Usually one; a function may call several. None is inside another: after a graph break Dynamo traces forwards of
    submodules, and the root is the module that `torch.compile` was called on.
    """
    scopes, outer = _frame_scopes(), _compiled_module()
    matches = [(name, _MODULE_ITEM.search(name)) for name in source_names(gm)]
    roots: list[nn.Module] = []
    for expression in dict.fromkeys(name[: match.start()] for name, match in matches if match is not None):
        value = eval(expression, dict(scopes)) if scopes is not None else None  # Dynamo's own source expression
        if isinstance(value, torch._dynamo.eval_frame.OptimizedModule):
            value = value._orig_mod
        if isinstance(value, nn.Module):
            roots.append(outer if outer is not None and _holds(outer, value) else value)
    unique = list({id(root): root for root in roots}.values())
    return [root for root in unique if not any(other is not root and _holds(other, root) for other in unique)]


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _compiled_module() -> nn.Module | None:
    """The module that `torch.compile` or `Module.compile` wrapped, from the wrapper's frame among the callers."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals["__name__"] == "torch._dynamo.eval_frame":
            function = frame.f_locals.get("fn")  # a bound method, or what `wrap_inline` made of a module of torch's
            owner = getattr(function, "__self__", None) or getattr(function, "__wrapped__", None)
            return owner if isinstance(owner, nn.Module) else None
        frame = frame.f_back
    return None


def traced_module() -> nn.Module | None:
    """The module whose forward Dynamo traces: the model, or after a graph break a part of it; None in a function."""
    scopes = _frame_scopes()
    module = scopes["L"].get("self") if scopes is not None else None
    return module if isinstance(module, nn.Module) else None


def _frame_scopes() -> dict[str, Any] | None:
    """{"L": locals, "G": globals} of the frame that Dynamo traces: its OutputGraph stands in a caller of the backend."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        owner: Any = frame.f_locals.get("self")
        if type(owner).__name__ == "OutputGraph":
            return {"L": owner.local_scope, "G": owner.global_scope}
        frame = frame.f_back
    return None


def guard_training(node: fx.Node) -> None:
    """Retrace when train() or eval() changes the module that owns this parameter: a graph traced before its module drops
    anything reads no `training`, so Dynamo guards none."""
    source: Any = node._dynamo_source  # type: ignore[attr-defined]
    module = getattr(getattr(source, "base", None), "base", None)  # of <module>._parameters['weight']
    if module is not None:
        install_guard(AttrSource(module, "training").make_guard(GuardBuilder.CONSTANT_MATCH))


def guard_pagers(root: nn.Module, trained: Mapping[fx.Node, nn.Parameter]) -> None:
    """Retrace when another paged optimizer takes one of these parameters over, or a first one does.

    An equal model with an optimizer of its own is otherwise served by the code of the first: it passes all its guards.
    """
    for parameter in (*root.parameters(), *trained.values()):  # also those of layers that this code is yet to serve
        if not hasattr(parameter, PAGER):
            setattr(parameter, PAGER, -1)
    _guard_attribute(trained, PAGER)


def guard_numbers(paged: Iterable[fx.Node]) -> None:
    """Retrace for other parameters of the paged optimizer than these, which the ops in the backward graph name by number.

    The same code fits layers in another order, and one layer's fits another's.
    """
    _guard_attribute(paged, NUMBER)


def _guard_attribute(parameters: Iterable[fx.Node], name: str) -> None:
    for node in parameters:
        source: Any = node._dynamo_source  # type: ignore[attr-defined]
        install_guard(AttrSource(source, name).make_guard(GuardBuilder.CONSTANT_MATCH))


def guard_modules(nodes: list[fx.Node]) -> None:
    """Retrace for other modules than those that own these parameters: after a graph break Dynamo runs the code of one
    layer for every layer like it, whose parameters it hands over; what the backend itself fetches would be the first's."""
    sources = {}
    for node in nodes:
        source: Any = node._dynamo_source  # type: ignore[attr-defined]
        module = getattr(getattr(source, "base", None), "base", None)  # of <module>._parameters['weight']
        if module is not None:
            sources[module.name if isinstance(module.name, str) else module.name()] = module
    for module in sources.values():
        install_guard(module.make_guard(GuardBuilder.ID_MATCH))


def guard_replacements(replaced: list[torch.Tensor]) -> None:
    """Guards on these tensors look at what stands in their place when they are built, after the backend returns.

    Dynamo would build them from the traced tensor while anything (an optimizer, a list) still holds it, and then find
    the new one to be of another type.
    """
    ids = {id(tensor) for tensor in replaced}
    for guard in TracingContext.get().guards_context.dynamo_guards:
        create = guard.create_fn
        value = create.keywords.get("value") if isinstance(create, functools.partial) else None
        if isinstance(value, TensorWeakRef) and id(value()) in ids:
            guard.create_fn = functools.partial(create.func, *create.args)  # type: ignore[attr-defined]


def guards_classes_of(modules: Iterable[nn.Module]) -> bool:
    """Whether a guard looks into the class of one of these, at its bases, attributes or the defaults of its forward: built
    after the backend returns, it would look into a class that the module was given meanwhile."""
    ids = {id(module) for module in modules}
    if not ids:  # as for every graph of a prepared model
        return False
    scopes = dict(_frame_scopes() or {})
    expressions = set()
    for guard in TracingContext.get().guards_context.dynamo_guards:
        source: Any = guard.originating_source
        while source is not None:
            base = getattr(source, "base", None)
            if isinstance(source, TypeSource) and base is not None:
                expressions.add(base.name if isinstance(base.name, str) else base.name())
            source = base
    return any(id(eval(expression, scopes)) in ids for expression in expressions)  # Dynamo's own source expressions


class _TracedAgain(ShortenTraceback, UnspecializeRestartAnalysis):
    """What a backend may raise to have Dynamo trace the frame from its start: it passes this on and does begin again."""

    def __init__(self, reason: str) -> None:
        ShortenTraceback.__init__(self, reason, first_useful_frame=None)
        self.restart_reason = reason


def traced_again(reason: str) -> Exception:
    """To be raised by the backend after it changed the code that was traced (a module's class): nothing is compiled,
    the same call goes on with a trace of the new code."""
    return _TracedAgain(reason)


_Error = TypeVar("_Error", bound=QLoRACompileError)


def surfaced(error: _Error) -> _Error:
    """Our error in a form that Dynamo passes on unchanged, instead of wrapping it in BackendCompilerFailed."""
    kind = type(error)
    if issubclass(kind, ShortenTraceback):
        return error
    sentence = str(error)  # Dynamo appends advice on its own stack traces to args
    both = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__, "__str__": lambda _: sentence})
    new = both.__new__(both, *error.args)
    new.args = error.args
    new.__dict__.update(error.__dict__)
    new.first_useful_frame = None
    new._torch_dynamo_tracer_output = None
    new.frame_exec_strategy = None
    return new


@contextlib.contextmanager
def real_scalars() -> Iterator[None]:
    """Fake ops take real tensors: in a model on the meta device `torch.tensor(0.5, device=x.device)` is one."""
    before = fake_tensor_tls.allow_non_fake_inputs_override
    fake_tensor_tls.allow_non_fake_inputs_override = True
    try:
        yield
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override = before


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Torch logs each op that fake tensors fail in, with its stack, before it raises: what it raises is told here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
