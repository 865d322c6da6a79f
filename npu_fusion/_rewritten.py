"""A module's forward as a graph, and a changed graph as the forward of that one object.

The class keeps its forward; the object gets one of its own, which reads children, parameters and buffers from
the object at every call, so that moving it, or replacing a child, works as before.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from dataclasses import dataclass, field
from itertools import chain
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn


@dataclass
class Traced:
    graph: fx.Graph
    """All submodules are calls of modules, however deep."""
    code: CodeType
    """Of the forward that was traced."""
    lines: dict[str, int] = field(default_factory=dict)
    """Node name -> line of that forward."""

    @property
    def source(self) -> str:
        return self.graph.python_code("self").src


class _Tracer(fx.Tracer):
    def __init__(self, module: nn.Module, code: CodeType) -> None:
        super().__init__()
        self.code = code
        self.lines: dict[str, int] = {}
        devices = {t.device.type for t in chain(module.parameters(), module.buffers())}
        self.devices = [d for d in devices if torch.amp.is_autocast_available(d)]
        self.modes = self._modes()

    def _modes(self) -> tuple[bool, ...]:
        return torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in self.devices)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self._modes() != self.modes:
            raise fx.proxy.TraceError("it changes the gradient or autocast mode, which a graph has not")
        node = super().create_node(*args, **kwargs)
        frame = inspect.currentframe()
        while frame is not None and frame.f_code is not self.code:
            frame = frame.f_back
        if frame is not None:
            self.lines[node.name] = frame.f_lineno
        return node


def trace(module: nn.Module) -> Traced | str:
    """The graph of ``module.forward``, or in words why there is none that stands for every call.

    What the forward reads from Python attributes (a number, a flag in a config) is fixed in the graph;
    whether the module trains is not, because a forward that asks is refused.
    """
    forward = type(module).forward
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if isinstance(module, fx.GraphModule):
        return "it is a GraphModule, which generates its forward"
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return "its forward is decorated or no Python function"
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind > parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            return f"its forward takes ({parameter}), and a trace cannot know which arguments are given"
    traced = _trace(module, forward.__code__)
    if isinstance(traced, str):
        return traced
    module.training = not module.training
    try:
        other = _trace(module, forward.__code__)
    finally:
        module.training = not module.training
    if isinstance(other, str) or traced.source != other.source:
        return "its forward is another one in training than in evaluation"
    return traced


def _trace(module: nn.Module, code: CodeType) -> Traced | str:
    tracer = _Tracer(module, code)
    places: tuple[dict[str, Any], ...] = (
        vars(module),
        module._parameters,
        module._buffers,
        module._modules,
    )
    before = [dict(place) for place in places]
    lines = tracer.lines
    changed = False
    try:
        graph = tracer.trace(module)
    except Exception as error:
        return f"torch.fx cannot trace its forward ({type(error).__name__}: {error})"
    finally:
        # torch.fx leaves the tracer in a reference cycle, and with it every layer that prepare replaces.
        vars(tracer).clear()
        for place, content in zip(places, before, strict=True):
            if place.keys() != content.keys() or any(place[key] is not content[key] for key in content):
                changed = True
                place.clear()
                place.update(content)
    if changed:
        return "its forward changes attributes of the module, or makes tensors out of constants"
    return Traced(graph, code, lines)


class RewrittenForward:
    """A graph's code as the forward of one module, with which it is copied and pickled."""

    def __init__(self, module: nn.Module, traced: Traced) -> None:
        self._module = module
        self._recipe = _recipe(traced)
        self._function = _compile(self._recipe)

    def install(self) -> None:
        # A method, because torch.compile guards on what it does; on the identity of other callable objects,
        # so that it would compile each layer of a model anew where layers are compiled one by one. A method
        # of the module itself could not be pickled.
        vars(self._module)["forward"] = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._module, *args, **kwargs)

    def __getstate__(self) -> tuple[nn.Module, _Recipe]:
        return self._module, self._recipe

    def __setstate__(self, state: tuple[nn.Module, _Recipe]) -> None:
        self._module, self._recipe = state
        self._function = _compile(self._recipe)

    def __repr__(self) -> str:
        return f"<rewritten forward of {type(self._module).__name__}:{self._recipe.source}>"


def is_rewritten(module: nn.Module) -> bool:
    return isinstance(getattr(vars(module).get("forward"), "__self__", None), RewrittenForward)


@dataclass(frozen=True)
class _Recipe:
    """What a function is made of, in a form that can be pickled and hashed."""

    source: str
    filename: str
    first_line: int
    lines: tuple[tuple[str, int], ...]
    modules: tuple[tuple[str, str], ...]
    objects: tuple[tuple[str, Any], ...]


def _recipe(traced: Traced) -> _Recipe:
    code = traced.graph.python_code("self")
    read = {node.id for node in ast.walk(ast.parse(code.src)) if isinstance(node, ast.Name)}
    names = {name: value for name, value in code.globals.items() if name in read}
    return _Recipe(
        code.src,
        traced.code.co_filename,
        traced.code.co_firstlineno,
        tuple(traced.lines.items()),
        tuple((name, value.__name__) for name, value in names.items() if isinstance(value, ModuleType)),
        tuple((name, value) for name, value in names.items() if not isinstance(value, ModuleType)),
    )


# One function for all layers with the same code: torch.compile guards on its identity.
@functools.cache
def _compile(recipe: _Recipe) -> FunctionType:
    """A function whose lines are those of the forward it came from: tracebacks and reports show the model."""
    tree = ast.parse(recipe.source)
    lines = dict(recipe.lines)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    _place(definition, recipe.first_line)
    line = recipe.first_line
    for statement in definition.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(target, ast.Name):
            line = lines.get(target.id, line)
        _place(statement, line)
    namespace: dict[str, Any] = {name: importlib.import_module(module) for name, module in recipe.modules}
    namespace.update(recipe.objects)
    exec(compile(tree, recipe.filename, "exec"), namespace)
    return namespace[definition.name]


def _place(tree: ast.AST, line: int) -> None:
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr, ast.arg, ast.keyword)):
            node.lineno = node.end_lineno = line
            node.col_offset = node.end_col_offset = 0
