"""Whose a parameter is, and whether it can be changed without changing something else.

A factor may only go into parameters that nothing else has: not tied (an ``lm_head`` that is the embedding),
not of a module with several places in the model, not computed by a parametrization, not of a module whose
hooks could look at it, and not read in the forward by other operators than those that were followed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from npu_fusion.quantization.smoothing.dataflow import Dataflow, place

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Ownership:
    """The parameters and buffers of ``model``, of which ``flow`` recorded (a part of) a forward."""

    def __init__(self, flow: Dataflow, model: nn.Module) -> None:
        self._flow = flow
        self._paths: dict[nn.Module, list[str]] = defaultdict(list)
        for root in dict.fromkeys((model, flow.module)):
            for path, module in root.named_modules(remove_duplicate=False):
                if root is model or module not in self._paths:
                    self._paths[module].append(path)
        self._owners: dict[int, list[tuple[nn.Module, nn.Parameter]]] = defaultdict(list)
        for module in self._paths:
            for parameter in module._parameters.values():
                if parameter is not None and not parameter.is_meta:
                    self._owners[place(parameter).storage].append((module, parameter))
        self._shared = self._find_shared()

    def name(self, module: nn.Module) -> str:
        return self._paths.get(module, ["a layer outside of the model"])[0]

    def of(self, storage: int) -> list[tuple[nn.Module, nn.Parameter]]:
        """The parameters in a storage, with their modules."""
        return self._owners.get(storage, [])

    def refusal(self, module: nn.Module, *parameters: Tensor) -> str:
        """Why ``parameters`` of ``module`` cannot be changed; empty if they can."""
        name, paths = self.name(module), self._paths.get(module, ())
        if len(paths) > 1:
            return f"{name} is also {paths[1]}"
        if isinstance(module, parametrize.ParametrizationList) or parametrize.is_parametrized(module):
            return f"{name} is parametrized"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks"
        for parameter in parameters:
            if type(parameter) is not nn.Parameter or parameter.is_meta or parameter.dtype not in _DTYPES:
                kind = "on the meta device" if parameter.is_meta else f"of {parameter.dtype}"
                return f"{name} has a {type(parameter).__name__} {kind}"
            if other := self._shared.get((module, parameter.data_ptr())):
                return f"{name} shares a parameter with {other}"
            if isinstance(module, nn.Linear) and (steps := self._flow.readers(place(parameter))):
                return f"a parameter of {name} is read by {self._flow.describe(steps[0])}"
        return ""

    def _find_shared(self) -> dict[tuple[nn.Module, int], str]:
        """Module and address of a parameter -> the tensor of another module in the same memory.

        Addresses, because two storages may be parts of one file in memory, and one storage may be cut into
        many parameters.
        """
        held = []
        for module in self._paths:
            for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None or type(tensor) not in (nn.Parameter, Tensor):
                    continue
                if not tensor.is_meta and tensor.numel():
                    start = tensor.data_ptr()
                    ref = place(tensor)
                    end = start + (ref.extent - ref.offset) * tensor.element_size()
                    held.append((start, end, module, f"{self.name(module)}.{attribute}"))
        held.sort(key=lambda item: item[:2])
        shared: dict[tuple[nn.Module, int], str] = {}
        widest = None
        for item in held:
            if widest is not None and item[0] < widest[1] and item[2] is not widest[2]:
                shared[item[2], item[0]] = widest[3]
                shared[widest[2], widest[0]] = item[3]
            if widest is None or item[1] > widest[1]:
                widest = item
        return shared


def unused_matrices(flow: Dataflow) -> Iterator[tuple[str, tuple[int, ...], set[int]]]:
    """Parameters with several dimensions that the forward did not use, as those of experts without tokens.

    Yields:
        Name; the sizes of what it could be multiplied by; the calls of modules in which it could have been
        used.
    """
    called = set(flow.called())
    calls: dict[nn.Module, set[int]] = defaultdict(set)
    for index, call in enumerate(flow.calls):
        calls[call.module].add(index)
    for path, module in flow.module.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2 or parameter.is_meta or module in called:
                continue
            if flow.readers(place(parameter)):
                continue
            around = path
            while around and flow.module.get_submodule(around) not in calls:
                around = around.rpartition(".")[0]
            sizes = (module.in_features,) if isinstance(module, nn.Linear) else tuple(parameter.shape)
            yield f"{path}.{attribute}", sizes, calls[flow.module.get_submodule(around)]
