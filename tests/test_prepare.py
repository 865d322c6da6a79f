from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config
from transformers.activations import ACT2FN

from npu_fusion import _mergeable
from npu_fusion.backend import get_npu_backend
from npu_fusion.config import FusionConfig
from npu_fusion.prepare import Merged, mergeable, prepare
from npu_fusion.quantization import W8A8DynamicLinear, quantize_linears

HIDDEN, INNER = 12, 20


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class MLP(nn.Module):
    """The form of Llama, Qwen2, Mistral and DeepSeek."""

    def __init__(self, bias: bool = False, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=bias)
        self.act_fn = activation or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(2, rows, HIDDEN)


def reasons(model: nn.Module) -> list[str]:
    """What is refused in a model that has nothing to merge, and is left as it was."""
    before = repr(model)
    done = prepare(model)
    assert not done.merged
    assert repr(model) == before
    return [entry.reason for entry in done.skipped]


# Models of transformers.

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with bias": LlamaConfig(**SIZES, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "mistral": MistralConfig(**SIZES, hidden_act="swish"),
}


def causal_lm(name: str, quantized: bool) -> nn.Module:
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").eval()
    if quantized:
        quantize_linears(model)
    return model


def logits(model: Callable[..., Any], ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def compiled(model: nn.Module, ids: Tensor) -> tuple[Tensor, Any]:
    torch._dynamo.reset()
    backend = get_npu_backend(host="eager", fusion_config={"strict": True})
    result = logits(torch.compile(model, backend=backend, fullgraph=True), ids)
    (report,) = backend.reports
    return result, report


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "w8a8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_compute_the_same_and_fuse(name: str, quantized: bool) -> None:
    model = causal_lm(name, quantized)
    ids = torch.randint(0, 64, (2, 5))
    operator = "npu_dequant_swiglu_quant" if quantized else "npu_swiglu"
    expected = logits(model, ids)

    done = prepare(model)
    assert list(done) == [
        Merged(f"model.layers.{i}.mlp", "gate_proj", "up_proj", "gate_up_proj") for i in range(2)
    ]
    assert not done.skipped
    torch.testing.assert_close(logits(model, ids), expected)

    result, report = compiled(model, ids)
    assert report.fused[operator] == 2
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("name", "quantized"), [("mistral", False), ("qwen2", True), ("llama with bias", True)]
)
def test_reports_of_unprepared_models_name_prepare(name: str, quantized: bool) -> None:
    _, report = compiled(causal_lm(name, quantized), torch.randint(0, 64, (2, 5)))
    fusion = "dequant_swiglu_quant" if quantized else "swiglu"
    near = [r for r in report.refused if r.fusion == fusion]
    assert f"npu_{fusion}" not in report.fused
    assert [r.reason for r in near] == ["gate and up are two separate matmuls of the same input"] * 2
    assert all("npu_fusion.prepare(model)" in r.detail for r in near)


def test_reports_still_show_the_lines_of_the_model() -> None:
    model = causal_lm("llama", quantized=False)
    ids = torch.randint(0, 64, (2, 5))

    def places(report: Any, kind: str) -> set[str]:
        return {entry.source for entry in getattr(report, kind) if entry.fusion == "swiglu"}

    (before,) = places(compiled(model, ids)[1], "refused")
    prepare(model)
    (after,) = places(compiled(model, ids)[1], "fusions")
    assert before == after
    assert "modeling_llama.py:" in after


def test_saves_as_a_pretrained_model(tmp_path: Any) -> None:
    model = causal_lm("llama", quantized=False)
    ids = torch.randint(0, 64, (2, 5))
    prepare(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))


# What is found.


class Functional(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class UpFirst(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


class TorchMul(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.mul(self.up_proj(x), self.act_fn(self.gate_proj(x))))


class MethodMul(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate).mul(self.up_proj(x)))


class Expert(nn.Module):
    """Other names, the second half of which is declared first; a norm before; not ending in a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.w3 = nn.Linear(HIDDEN, HIDDEN)
        self.w1 = nn.Linear(HIDDEN, HIDDEN)
        self.scale = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return F.silu(self.w1(y)) * self.w3(y) * self.scale + x


@pytest.mark.parametrize(
    ("module", "merged"),
    [
        (MLP(bias=True), ("gate_proj", "up_proj", "gate_up_proj")),
        (MLP(activation=ACT2FN["silu"]), ("gate_proj", "up_proj", "gate_up_proj")),
        (Functional(), ("gate_proj", "up_proj", "gate_up_proj")),
        (UpFirst(), ("gate_proj", "up_proj", "gate_up_proj")),
        (TorchMul(), ("gate_proj", "up_proj", "gate_up_proj")),
        (MethodMul(), ("gate_proj", "up_proj", "gate_up_proj")),
        (Expert(), ("w1", "w3", "w1_w3")),
    ],
    ids=["nn", "transformers", "functional", "up first", "torch.mul", "method", "other names"],
)
def test_is_found_by_what_it_computes(module: nn.Module, merged: tuple[str, str, str]) -> None:
    module = copy.deepcopy(module)
    x = inputs()
    expected, before = module(x), copy.deepcopy(module)
    assert list(prepare(module)) == [Merged("", *merged)]
    torch.testing.assert_close(module(x), expected)
    gate = before.get_submodule(merged[0]).weight
    assert torch.equal(module.get_submodule(merged[2]).weight[: len(gate)], gate)
    assert type(module) is type(before)
    assert module.state_dict().keys() == before.state_dict().keys()


def test_two_pairs_of_one_module() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_gate = nn.Linear(HIDDEN, INNER)
            self.a_up = nn.Linear(HIDDEN, INNER)
            self.b_gate = nn.Linear(INNER, HIDDEN)
            self.b_up = nn.Linear(INNER, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.a_gate(x)) * self.a_up(x)
            return F.silu(self.b_gate(x)) * self.b_up(x)

    module = Two()
    x, keys = inputs(), list(module.state_dict())
    expected = module(x)
    assert [pair.merged for pair in prepare(module)] == ["a_gate_a_up", "b_gate_b_up"]
    torch.testing.assert_close(module(x), expected)
    assert list(module.state_dict()) == keys


class _CountMatmuls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._opname in ("mm", "addmm", "_int_mm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantized", [False, True])
def test_eager_runs_one_matmul_for_two(quantized: bool) -> None:
    model = Stack(MLP())
    if quantized:
        quantize_linears(model)
    counts = []
    for _ in range(2):
        with _CountMatmuls() as mode, torch.no_grad():
            model(inputs())
        counts.append(mode.count)
        prepare(model)
    assert counts == [3, 2]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(2, 9), st.integers(1, 9)),
    rows=st.integers(0, 4),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**20),
)
def test_int8_layers_give_the_same_bits(
    sizes: tuple[int, int], rows: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    module = MLP()
    module.gate_proj, module.up_proj = (
        W8A8DynamicLinear.from_float(nn.Linear(*sizes, bias=bias)) for _ in range(2)
    )
    module.down_proj = nn.Identity()
    x = torch.randn(rows, sizes[0]).to(dtype)
    gate, up = module.gate_proj(x), module.up_proj(x)
    assert len(prepare(module)) == 1
    both = module.gate_up_proj(x)
    assert torch.equal(both, torch.cat((gate, up), -1))
    # silu of a tensor of its own may differ in the last bit: the CPU's vectorized kernel and its remainder.
    assert torch.equal(module(x), F.silu(both.chunk(2, -1)[0]) * up)


def test_quantizing_afterwards_is_the_same() -> None:
    first = Stack(MLP(bias=True), MLP(bias=True))
    second = copy.deepcopy(first)
    prepare(first)
    quantize_linears(first)
    quantize_linears(second)
    keys = list(second.state_dict())
    prepare(second)
    x = inputs()
    assert torch.equal(first(x), second(x))
    assert list(first.state_dict()) == list(second.state_dict()) == keys


def test_a_module_used_twice_is_merged_once() -> None:
    shared = MLP()
    model = Stack(shared, MLP(), shared)
    x, saved = inputs(), copy.deepcopy(model.state_dict())
    expected = model(x)
    done = prepare(model)
    assert [entry.module for entry in done] == ["layers.0", "layers.1"]
    assert model.layers[0] is model.layers[2]
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == list(saved)
    model.load_state_dict(saved, strict=True)
    torch.testing.assert_close(model(x), expected)


class TwoDown(MLP):
    """Has two layers of one shape even after its gate and up are merged."""

    def __init__(self) -> None:
        super().__init__()
        self.other_down_proj = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(y) + self.other_down_proj(y)


def test_a_second_call_does_nothing() -> None:
    model = Stack(MLP(), TwoDown())
    assert len(prepare(model)) == 2
    forward, weight = model.layers[0].forward, model.layers[0].gate_up_proj.weight
    hooks = len(model.layers[0]._state_dict_hooks)
    again = prepare(model)
    assert (again.merged, again.skipped) == ((), ())
    assert model.layers[0].forward is forward
    assert model.layers[0].gate_up_proj.weight is weight
    assert len(model.layers[0]._state_dict_hooks) == hooks == 1


# What is refused.


def _with(change: Callable[[Any], object], module: nn.Module | None = None) -> nn.Module:
    module = module or MLP()
    change(module)
    return module


class _LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


class _GateTwice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) + self.gate_proj(x))


class _OutputTwice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up + up)


class _WeightRead(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + self.up_proj.weight.sum()


class _OneForBoth(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.gate_proj(x))


class _OtherInput(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x + 1))


class _ChangedInput(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(x))
        x.add_(1)
        return self.down_proj(gate * self.up_proj(x))


class _InPlace(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True) * self.up_proj(x))


class _Deeper(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({"gate": self.gate_proj, "up": self.up_proj})
        self.gate_proj = nn.Linear(HIDDEN, INNER)
        self.up_proj = nn.Linear(HIDDEN, INNER)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.projections["gate"](x)) * self.projections["up"](x))


class _DataDependent(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _Optional(MLP):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y if residual is None else y + residual


class _Training(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, training=self.training)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _NoGrad(MLP):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.act_fn(self.gate_proj(x))
            return self.down_proj(gate * self.up_proj(x))


class _Autocast(MLP):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _passed_on(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any) -> Any:
        return forward(*args)

    return wrapper


class _Decorated(MLP):
    @_passed_on
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _Counting(MLP):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _tied_to_a_third(module: MLP) -> None:
    module.down_proj = nn.Linear(HIDDEN, INNER, bias=False)
    module.down_proj.weight = module.up_proj.weight


def _tied_by_a_view(module: MLP) -> None:
    module.register_buffer("part", module.gate_proj.weight.detach()[3:5])


def _tied_on_meta(module: MLP) -> None:
    module.to("meta")
    module.register_buffer("same", module.gate_proj.weight)


class _SubclassedTensor(Tensor):
    pass


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "lora": (
        _with(lambda m: setattr(m, "up_proj", _LoRA(m.up_proj))),
        f"up_proj is a _LoRA; accepted: {_mergeable.mergeable_names()}",
    ),
    "subclass": (
        _with(
            lambda m: setattr(
                m, "gate_proj", nn.modules.linear.NonDynamicallyQuantizableLinear(HIDDEN, INNER)
            )
        ),
        "gate_proj is a NonDynamicallyQuantizableLinear; accepted: Linear",
    ),
    "parametrized": (
        _with(lambda m: weight_norm(m.gate_proj)),
        "gate_proj is a ParametrizedLinear; accepted: Linear",
    ),
    "one quantized": (
        _with(lambda m: quantize_linears(m, skip=["up_proj"])),
        "gate_proj has a weight_scale, up_proj has not",
    ),
    "forward hook": (
        _with(lambda m: m.gate_proj.register_forward_hook(lambda *a: None)),
        "gate_proj has hooks (_forward_hooks)",
    ),
    "forward pre-hook": (
        _with(lambda m: m.up_proj.register_forward_pre_hook(lambda *a: None)),
        "up_proj has hooks (_forward_pre_hooks)",
    ),
    "replaced forward": (
        _with(lambda m: setattr(m.gate_proj, "forward", lambda x: x)),
        "the forward of gate_proj was replaced on the object",
    ),
    "own replaced forward": (
        _with(lambda m: setattr(m, "forward", lambda x: x)),
        "its forward was replaced on the object",
    ),
    "tensor subclass": (
        _with(
            lambda m: setattr(
                m.up_proj, "weight", nn.Parameter(torch.zeros(INNER, HIDDEN).as_subclass(_SubclassedTensor))
            )
        ),
        "up_proj.weight is a _SubclassedTensor; accepted: plain tensors",
    ),
    "gradient": (
        _with(lambda m: m(inputs()).sum().backward()),
        "gate_proj.weight has a gradient, which would be lost",
    ),
    "nested": (_Deeper(), "projections.gate is no child of the module itself"),
    "layer twice": (_GateTwice(), "gate_proj is used more than once"),
    "output twice": (_OutputTwice(), "the output of up_proj is used more than once"),
    "weight read": (_WeightRead(), "up_proj is used more than once"),
    "same layer": (_OneForBoth(), "gate_proj is used more than once"),
    "two names": (
        _with(lambda m: m.register_module("alias", m.gate_proj)),
        "gate_proj is a layer of other modules, too",
    ),
    "other input": (_OtherInput(), "gate_proj and up_proj have different inputs"),
    "changed input": (_ChangedInput(), "something else runs between gate_proj and up_proj"),
    "in place": (_InPlace(), "the activation works in place"),
    "in place module": (MLP(activation=nn.SiLU(inplace=True)), "the activation works in place"),
    "one bias": (
        _with(lambda m: setattr(m, "up_proj", nn.Linear(HIDDEN, INNER))),
        "up_proj has a bias, gate_proj has not",
    ),
    "dtypes": (
        _with(lambda m: m.up_proj.half()),
        "gate_proj.weight is float32 [20, 12] on cpu, trained, up_proj.weight is float16 [20, 12] on cpu",
    ),
    "devices": (
        _with(lambda m: m.gate_proj.to("meta")),
        "gate_proj.weight is float32 [20, 12] on meta, trained, up_proj.weight is float32 [20, 12] on cpu",
    ),
    "frozen half": (
        _with(lambda m: m.up_proj.requires_grad_(False)),
        "gate_proj.weight is float32 [20, 12] on cpu, trained, up_proj.weight is float32 [20, 12] on cpu",
    ),
    "tied": (_with(_tied_to_a_third), "up_proj.weight shares its memory with down_proj.weight"),
    "tied view": (_with(_tied_by_a_view), "gate_proj.weight shares its memory with part"),
    "tied on meta": (_with(_tied_on_meta), "gate_proj.weight shares its memory with same"),
    "name taken": (
        _with(lambda m: setattr(m, "gate_up_proj", 3)),
        "the module has an attribute gate_up_proj already",
    ),
    "data dependent": (
        _DataDependent(),
        "torch.fx cannot trace its forward (TraceError: symbolically traced",
    ),
    "optional argument": (_Optional(), "its forward takes (residual: 'Tensor | None' = None)"),
    "training": (_Training(), "its forward is another one in training than in evaluation"),
    "no_grad": (_NoGrad(), "it changes the gradient or autocast mode"),
    "autocast": (_Autocast(), "it changes the gradient or autocast mode"),
    "decorated": (_Decorated(), "its forward is decorated or no Python function"),
    "counting": (_Counting(), "its forward changes attributes of the module"),
    "graph module": (fx.symbolic_trace(MLP()), "it is a GraphModule, which generates its forward"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case: str) -> None:
    module, reason = REFUSED[case]
    before = dict(vars(module))
    (given,) = reasons(module)
    assert reason in given
    assert vars(module) == before


def test_a_layer_of_two_modules_is_refused() -> None:
    model = Stack(MLP(), MLP(), MLP())
    model.layers[1].up_proj = model.layers[0].up_proj
    done = prepare(model)
    assert [entry.module for entry in done] == ["layers.2"]
    assert [(entry.module, entry.reason) for entry in done.skipped] == [
        (f"layers.{i}", "up_proj is a layer of other modules, too") for i in (0, 1)
    ]


def test_a_weight_of_two_modules_is_refused() -> None:
    model = Stack(MLP(), MLP())
    model.layers[1].down_proj.weight = nn.Parameter(
        model.layers[0].up_proj.weight.detach().view(HIDDEN, INNER)
    )
    done = prepare(model)
    assert [entry.module for entry in done] == ["layers.1"]
    assert str(done.skipped[0].reason) == "up_proj.weight shares its memory with layers.1.down_proj.weight"


def test_disjoint_parts_of_one_storage_are_merged() -> None:
    module = MLP()
    flat = torch.randn(2 * INNER, HIDDEN)
    module.gate_proj.weight, module.up_proj.weight = (nn.Parameter(half) for half in flat.chunk(2))
    assert len(prepare(module)) == 1
    assert torch.equal(module.gate_up_proj.weight, flat)


class _Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))


class _NotSilu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * 2


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask)


@pytest.mark.parametrize(
    "module",
    [
        MLP(activation=nn.GELU()),
        MLP(activation=_NotSilu()),
        _Plain(),
        _Attention(),
        nn.Linear(2, 2),
        nn.ReLU(),
    ],
    ids=["geglu", "scaled silu", "sequential", "attention", "linear", "leaf"],
)
def test_what_is_no_swiglu_is_not_mentioned(module: nn.Module) -> None:
    assert reasons(module) == []


# The module afterwards.


def prepared(bias: bool = True, quantized: bool = False) -> tuple[Stack, Stack]:
    """A model and the same one prepared."""
    model = Stack(MLP(bias), MLP(bias))
    if quantized:
        quantize_linears(model)
    other = copy.deepcopy(model)
    assert len(prepare(other)) == 2
    return model, other


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("keep_vars", [False, True])
def test_state_dict_is_that_of_the_original(quantized: bool, keep_vars: bool) -> None:
    original, model = prepared(quantized=quantized)
    expected, got = original.state_dict(), model.state_dict(keep_vars=keep_vars)
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert dict(got._metadata) == dict(expected._metadata)
    merged = model.layers[0].gate_up_proj.weight
    assert got["layers.0.gate_proj.weight"].data_ptr() == merged.data_ptr()
    half = merged[len(merged) // 2 :]
    assert got["layers.0.up_proj.weight"].data_ptr() == half.data_ptr()

    fresh = copy.deepcopy(original)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    fresh.load_state_dict(got, strict=True)
    x = inputs()
    assert torch.equal(fresh(x), original(x))


def test_state_dict_of_the_module_itself_and_into_a_given_one() -> None:
    original, model = MLP(), MLP()
    prepare(model)
    assert list(model.state_dict()) == list(original.state_dict())
    plain: dict[str, Any] = {}
    model.state_dict(destination=plain, prefix="a.")
    assert list(plain) == [f"a.{key}" for key in original.state_dict()]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_loads_what_the_original_saved(quantized: bool, assign: bool, meta: bool) -> None:
    original, model = prepared(quantized=quantized)
    checkpoint = original.state_dict()
    for tensor in model.state_dict().values():
        tensor.zero_()
    if meta:
        model.to("meta")
        if not assign:
            model.to_empty(device="cpu")
    result = model.load_state_dict(checkpoint, strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    x = inputs()
    torch.testing.assert_close(model(x), original(x))
    assert list(model.state_dict()) == list(checkpoint)
    trained = [p.requires_grad for p in model.parameters()]
    assert trained == [True] * len(trained)


def test_loading_keeps_the_parameters_unless_assigned() -> None:
    original, model = prepared()
    weight = model.layers[0].gate_up_proj.weight
    model.load_state_dict(original.state_dict())
    assert model.layers[0].gate_up_proj.weight is weight
    model.load_state_dict(original.state_dict(), assign=True)
    assert model.layers[0].gate_up_proj.weight is not weight
    assert isinstance(model.layers[0].gate_up_proj.weight, nn.Parameter)


def test_loads_other_dtypes_as_the_original_does() -> None:
    original, model = prepared()
    checkpoint = {key: tensor.half() for key, tensor in original.state_dict().items()}
    checkpoint["layers.0.up_proj.weight"] = checkpoint["layers.0.up_proj.weight"].double()
    for m in (original, model):
        m.load_state_dict(checkpoint)
    assert model.layers[0].gate_up_proj.weight.dtype == torch.float32
    for key, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)
    with pytest.raises(
        RuntimeError,
        match=r"cannot assign layers\.0\.gate_proj\.weight \(torch\.float16, cpu\) and "
        r"layers\.0\.up_proj\.weight \(torch\.float64, cpu\): npu_fusion\.prepare made them one tensor",
    ):
        model.load_state_dict(checkpoint, assign=True)


@pytest.mark.parametrize("assign", [False, True])
def test_complains_about_a_checkpoint_as_the_original_does(assign: bool) -> None:
    original, model = prepared()
    checkpoint = original.state_dict()
    checkpoint["layers.0.up_proj.weight"] = torch.zeros(3, HIDDEN)
    del checkpoint["layers.1.gate_proj.weight"], checkpoint["layers.1.gate_proj.bias"]
    del checkpoint["layers.1.up_proj.bias"]
    checkpoint["layers.1.side_proj.weight"] = torch.zeros(1)
    messages = []
    for m in (original, model):
        with pytest.raises(RuntimeError) as caught:
            m.load_state_dict(checkpoint, assign=assign)
        messages.append(sorted(str(caught.value).replace(",", "").replace(".\n", "\n").split()))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("assign", [False, True])
def test_loads_a_part_as_the_original_does(assign: bool) -> None:
    original, model = prepared()
    part = {
        "layers.0.up_proj.weight": torch.ones(INNER, HIDDEN),
        "layers.1.gate_proj.bias": torch.ones(INNER),
        "else": torch.ones(1),
    }
    results = [m.load_state_dict(dict(part), strict=False, assign=assign) for m in (original, model)]
    assert sorted(results[0].missing_keys) == sorted(results[1].missing_keys)
    assert results[0].unexpected_keys == results[1].unexpected_keys == ["else"]
    for key, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)


def test_loads_its_own_named_parameters() -> None:
    _, model = prepared()
    own = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    assert "layers.0.gate_up_proj.weight" in own
    model.load_state_dict(own, strict=True)
    assert torch.equal(model.layers[0].gate_up_proj.weight, own["layers.0.gate_up_proj.weight"])


def test_hooks_of_the_module_on_its_state_see_the_original_keys() -> None:
    module = MLP()
    seen: list[list[str]] = []

    def saved(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        seen.append(list(state_dict))

    def loading(module: nn.Module, state_dict: dict[str, Any], *rest: Any) -> None:
        seen.append(list(state_dict))

    module.register_state_dict_post_hook(saved)
    module.register_load_state_dict_pre_hook(loading)
    module.load_state_dict(module.state_dict())
    prepare(module)
    module.load_state_dict(module.state_dict())
    assert len(seen) == 4
    assert all(keys == seen[0] for keys in seen)


def test_a_layer_of_another_kind_in_its_place_keeps_its_own_keys() -> None:
    module = MLP()
    prepare(module)
    module.gate_up_proj = _LoRA(module.gate_up_proj)
    keys = ["gate_up_proj.base_layer.weight", "down_proj.weight"]
    state = module.state_dict()
    assert list(state) == keys
    module.load_state_dict(state, strict=True)


def test_children_replaced_afterwards_are_used() -> None:
    module = MLP()
    prepare(module)
    module.down_proj = nn.Identity()
    x = inputs()
    gate, up = module.gate_up_proj(x).chunk(2, -1)
    assert torch.equal(module(x), F.silu(gate) * up)


def _deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [_deepcopy, _pickle, _torch_save])
def test_a_copy_is_a_prepared_model_of_its_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    original, model = prepared()
    x = inputs()
    expected = model(x)
    other = duplicate(model)
    checkpoint = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    assert list(checkpoint) == list(original.state_dict())
    assert torch.equal(other(x), expected)
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert torch.equal(other(x), expected)
    other.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in checkpoint.items()})
    assert torch.equal(other(x), x)
    model.load_state_dict(checkpoint)
    assert torch.equal(model(x), expected)
    assert prepare(other).merged == ()


def test_hooks_of_the_module_and_its_other_children_run() -> None:
    module = MLP()
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *a: calls.append("before"))
    module.act_fn.register_forward_hook(lambda *a: calls.append("activation"))
    module.register_forward_hook(lambda *a: calls.append("after"))
    prepare(module)
    module(inputs())
    assert calls == ["before", "activation", "after"]


def test_moves_and_changes_mode_as_a_whole() -> None:
    original, model = prepared()
    x = inputs()
    model.eval()
    assert not model.layers[0].gate_up_proj.training
    model.to(torch.float64)
    torch.testing.assert_close(model(x.double()), original.double()(x.double()), rtol=1e-12, atol=1e-12)
    assert model.to("meta")(x.to("meta")).device.type == "meta"


def test_trains_as_before() -> None:
    original, model = prepared()
    x = inputs()
    for m in (original, model):
        m(x).square().sum().backward()
    for half, gradient in zip(
        ("gate_proj", "up_proj"), model.layers[0].gate_up_proj.weight.grad.chunk(2), strict=True
    ):
        torch.testing.assert_close(gradient, original.layers[0].get_submodule(half).weight.grad)


def test_keeps_frozen_weights_and_evaluation_mode() -> None:
    model = Stack(MLP()).eval().requires_grad_(False)
    prepare(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())


def test_prepares_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Stack(MLP(), MLP())
    assert len(prepare(model)) == 2
    assert model.layers[0].gate_up_proj.weight.is_meta


def test_the_old_weights_are_freed_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(*(MLP() for _ in range(4)))
    old = [
        weakref.ref(layer.get_submodule(n).weight) for layer in model.layers for n in ("gate_proj", "up_proj")
    ]
    alive: list[int] = []
    join = _mergeable.join

    def counting(*layers: nn.Module) -> nn.Module:
        alive.append(sum(weight() is not None for weight in old))
        return join(*layers)

    monkeypatch.setattr(_mergeable, "join", counting)
    gc.disable()
    try:
        prepare(model)
    finally:
        gc.enable()
    assert alive == [8, 6, 4, 2]
    assert not any(weight() is not None for weight in old)


def test_a_traceback_shows_the_line_of_the_model() -> None:
    module = MLP()
    prepare(module)
    with pytest.raises(RuntimeError) as caught:
        module(torch.randn(2, HIDDEN + 1))
    lines = [frame.line for frame in traceback.extract_tb(caught.tb) if frame.filename == __file__]
    assert lines[-1] == "return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
    assert "gate_up_proj = self.gate_up_proj(x)" in repr(module.forward)


# torch.compile.


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_is_traced_as_one_graph(quantized: bool, dynamic: bool) -> None:
    _, model = prepared(quantized=quantized)
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 4):
        x = inputs(rows)
        torch.testing.assert_close(run(x), model(x))


def test_layers_compiled_one_by_one_are_compiled_once() -> None:
    model = Stack(*(MLP() for _ in range(10)))
    prepare(model)
    counter = CompileCounter()
    run = torch.compile(lambda layer, x: layer(x), backend=counter, fullgraph=True)
    x = inputs()
    for layer in copy.deepcopy(model).layers:
        assert torch.equal(run(layer, x), layer(x))
    assert counter.frame_count == 1


def test_a_rewritten_forward_is_not_taken_for_another() -> None:
    class Plus(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + self.plus

    one, two = Plus(), Plus()
    one.plus, two.plus = 1.0, 2.0
    run = torch.compile(lambda layer, x: layer(x), backend="eager", fullgraph=True)
    prepare(one)
    prepare(two)
    x = inputs()
    for module in (one, two, MLP()):
        assert torch.equal(run(module, x), module(x))


def test_preparing_after_compiling_is_noticed() -> None:
    model = Stack(MLP())
    counter = CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True)
    x = inputs()
    expected = run(x)
    prepare(model)
    torch.testing.assert_close(run(x), expected)
    assert counter.frame_count == 2


# The call.


def test_says_what_it_did() -> None:
    model = Stack(MLP(), MLP(), MLP(), _InPlace(), Expert())
    done = prepare(model)
    assert str(done) == (
        "prepare: 4 SwiGLU merged, 1 left as they are\n"
        "  layers.0 ... layers.2 (3 modules): gate_proj and up_proj merged into gate_up_proj\n"
        "  layers.4: w1 and w3 merged into w1_w3\n"
        "  layers.3: left as it is: the activation works in place"
    )
    assert len(done) == 4
    assert done[-1] == Merged("layers.4", "w1", "w3", "w1_w3")
    assert done[:1] == done.merged[:1]
    assert str(prepare(MLP())).endswith("(the model): gate_proj and up_proj merged into gate_up_proj")


def test_dry_run_changes_nothing() -> None:
    model = Stack(MLP(), _InPlace())
    before = [dict(vars(m)) for m in model.modules()]
    done = prepare(model, {"dry_run": True})
    assert [dict(vars(m)) for m in model.modules()] == before
    assert [entry.module for entry in done] == ["layers.0"]
    assert [entry.module for entry in done.skipped] == ["layers.1"]
    assert "(dry run: nothing was changed)" in str(done)
    assert prepare(model).merged == done.merged


def test_without_the_fusions_there_is_nothing_to_prepare() -> None:
    off = {"swiglu": False, "swiglu_quant": False, "dequant_swiglu_quant": False}
    done = prepare(Stack(MLP()), off)
    assert (done.merged, len(done.skipped)) == ((), 1)
    assert done.skipped[0].reason == ("fusion_config switches off swiglu, swiglu_quant, dequant_swiglu_quant")
    for flag in off:
        assert len(prepare(Stack(MLP()), FusionConfig(**{**off, flag: True}))) == 1


@pytest.mark.parametrize("model", [None, MLP, {"a": MLP()}], ids=["None", "class", "dict"])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"prepare: model is a \w+; accepted: torch.nn.Module"):
        prepare(model)


def test_bad_configurations_are_refused() -> None:
    model = MLP()
    with pytest.raises(ValueError, match="no key 'swish'"):
        prepare(model, {"swish": True})
    with pytest.raises(TypeError, match="fusion_config is a int"):
        prepare(model, 3)
    assert hasattr(model, "gate_proj")


# Other classes of layers.


class _Scaled(nn.Module):
    def __init__(self, in_features: int, out_features: int, device: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features, device=device))
        self.register_buffer("scale", torch.rand(out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.scale


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_mergeable, "_CLASSES", dict(_mergeable._CLASSES))


def scaled() -> MLP:
    module = MLP()
    module.gate_proj, module.up_proj = _Scaled(HIDDEN, INNER), _Scaled(HIDDEN, INNER)
    return module


@pytest.mark.usefixtures("registry")
def test_another_class_can_join() -> None:
    assert reasons(scaled()) == [f"gate_proj is a _Scaled; accepted: {_mergeable.mergeable_names()}"]

    @mergeable(_Scaled)
    def double(layer: _Scaled) -> _Scaled:
        return _Scaled(layer.in_features, 2 * layer.out_features, device="meta")

    module = scaled()
    x, keys = inputs(), list(module.state_dict())
    expected = module(x)
    assert len(prepare(module)) == 1
    torch.testing.assert_close(module(x), expected)
    assert list(module.state_dict()) == keys


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "double",
    [
        lambda layer: _Scaled(layer.in_features, layer.out_features),
        lambda layer: nn.Linear(layer.in_features, 2 * layer.out_features),
    ],
    ids=["not doubled", "other class"],
)
def test_a_wrong_registration_fails_before_anything_is_changed(double: Any) -> None:
    mergeable(_Scaled)(double)
    model = Stack(MLP(), scaled())
    with pytest.raises(RuntimeError, match=r"mergeable\(_Scaled\): the registered function returned a"):
        prepare(model)
    assert hasattr(model.layers[0], "gate_proj")
    assert hasattr(model.layers[1], "gate_proj")


def test_only_modules_can_be_registered() -> None:
    with pytest.raises(TypeError, match="mergeable: cls is"):
        mergeable(OrderedDict)


def test_without_memory_the_rest_stays_and_can_be_prepared_later(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stack(MLP(), MLP(), MLP())
    model = copy.deepcopy(original)
    join, calls = _mergeable.join, []

    def failing(*layers: nn.Module) -> nn.Module:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return join(*layers)

    with monkeypatch.context() as patch:
        patch.setattr(_mergeable, "join", failing)
        with pytest.raises(torch.OutOfMemoryError):
            prepare(model)
    x = inputs()
    assert [hasattr(layer, "gate_up_proj") for layer in model.layers] == [True, False, False]
    torch.testing.assert_close(model(x), original(x))
    assert [entry.module for entry in prepare(model)] == ["layers.1", "layers.2"]
    torch.testing.assert_close(model(x), original(x))
