"""What a module's code says about its linears: is its own forward a linear, does a parent read a child's weight itself.

Both matter before anything is traced: `prepare` without example inputs sees modules only.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_TRANSPOSES = {"t", torch.t}
_PRODUCTS = {operator.matmul, torch.matmul, torch.mm, "matmul", "mm"}
_SUMS = {operator.add, torch.add, "add"}
_linear_forwards: dict[tuple[type, bool], bool] = {}


def own_forward_is_linear(module: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear with a forward of its own still computes x Wᵀ (+ b), like Falcon's linears."""
    key = (type(module), module.bias is None)
    if key not in _linear_forwards:
        _linear_forwards[key] = _traces_to_linear(module)
    return _linear_forwards[key]


def _traces_to_linear(module: nn.Module) -> bool:
    try:
        graph = fx.Tracer().trace(module)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # Any code may stand in a forward, and a proxy in place of its input: what cannot be traced is no known linear.
        return False
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or not isinstance(result, fx.Node):
        return False
    if _is_call(result, {F.linear, torch._C._nn.linear}):
        given = dict(zip(("input", "weight", "bias"), result.args)) | dict(result.kwargs)
        bias = given.get("bias")
        return given.get("input") is inputs[0] and _reads(given.get("weight"), "weight") and _is_bias(bias, module)
    bias = None
    if _is_call(result, _SUMS) and len(result.args) == 2 and not result.kwargs:
        result, bias = result.args  # type: ignore[assignment]
    product = _is_call(result, _PRODUCTS) and len(result.args) == 2
    return product and result.args[0] is inputs[0] and _is_transposed(result.args[1]) and _is_bias(bias, module)


def _is_call(node: Any, targets: set[Any]) -> bool:
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def _reads(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target == name


def _is_bias(node: Any, module: nn.Module) -> bool:
    return _reads(node, "bias") if module.bias is not None else node is None


def _is_transposed(node: Any) -> bool:
    if _is_call(node, {getattr}):
        return node.args[1] in ("T", "mT") and _reads(node.args[0], "weight")
    return _is_call(node, _TRANSPOSES) and _reads(node.args[0], "weight")


def weights_read_directly(module: nn.Module) -> dict[str, str]:
    """Children whose weight this module's own code uses as a tensor (`self.out_proj.weight`): name -> class name.

    A look at the dtype, shape or device (`self.proj.weight.dtype`), an isinstance check and a slice (Bloom's path for
    bit-exact tensor parallelism, which is off) are no such use. Methods that only initialize do not count.
    """
    found: dict[str, str] = {}
    for cls in type(module).__mro__:
        if not cls.__module__.startswith("torch.") and cls is not object:
            found |= dict.fromkeys(_direct_reads(cls), cls.__name__)
    return {name: cls for name, cls in found.items() if name in module._modules}


_reads_of_class: dict[type, frozenset[str]] = {}


def _direct_reads(cls: type) -> frozenset[str]:
    if cls not in _reads_of_class:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):  # made at run time: there is no source to read
            tree = ast.Module([], [])
        visitor = _WeightReads()
        visitor.visit(tree)
        _reads_of_class[cls] = frozenset(visitor.found)
    return _reads_of_class[cls]


class _WeightReads(ast.NodeVisitor):
    """Collects X of every `self.X.weight` that is used as a value."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in ("__init__", "_init_weights", "init_weights", "reset_parameters"):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if not (isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr", "getattr")):
            self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not _is_weight_of_child(node.value):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner = node.value
        if _is_weight_of_child(node):
            assert isinstance(inner, ast.Attribute)
            self.found.add(inner.attr)
        elif not (node.attr in ("dtype", "shape", "device", "requires_grad", "is_cuda") and _is_weight_of_child(inner)):
            self.generic_visit(node)


def _is_weight_of_child(node: ast.AST) -> bool:
    """`self.X.weight`"""
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
    )
