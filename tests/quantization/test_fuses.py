"""What deployed layers become in whole models: no operator of a quantization is left to itself.

Tiny random models of Transformers in bfloat16. Every linear layer but the head is deployed by hand, with
scales of one forward pass; layers that read the same tensor share its quantization.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import npu_fusion
from npu_fusion.config import FusionConfig
from npu_fusion.passes.pipeline import FusionExpectationError, check_expectation
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules import deploy, share
from npu_fusion.quantization.qparams import integer_parameters, round_to_nearest
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme
from tests.passes._harness import DIALECTS, Outcome, fuse
from tests.quantization.modules._cases import LINEAR, ONE_OF_EACH, Case, deployed_from

transformers = pytest.importorskip("transformers")

LAYERS = 2
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "vocab_size": 50}


@dataclass(frozen=True)
class Model:
    config: str
    settings: dict[str, Any]
    norms: int
    """In a layer, of heads or of compressed states; nothing is quantized there, or no residual is added."""
    products: int
    """In a layer, but for that which is part of the SwiGLU."""
    quantized: int
    """In a layer, separately: what is neither behind the norm of a residual nor a SwiGLU."""
    ropes: str = "npu_rotary_mul"

    def build(self) -> nn.Module:
        config = getattr(transformers, f"{self.config}Config")(
            **SIZES, num_attention_heads=4, **self.settings
        )
        return getattr(transformers, f"{self.config}ForCausalLM")(config)


GROUPED = {"num_key_value_heads": 2}
LATENT = {
    "num_key_value_heads": 4,
    "first_k_dense_replace": LAYERS,  # routing of random experts is a coin toss in bfloat16
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MODELS = {
    # q, k, v, o, down; the input of o is quantized alone.
    "llama": Model("Llama", GROUPED, 0, 5, 1),
    "mistral": Model("Mistral", GROUPED, 0, 5, 1),
    # A norm for the heads of the query and one for those of the key.
    "qwen3": Model("Qwen3", {**GROUPED, "head_dim": 16}, 2, 5, 1),
    # q_a, q_b, kv_a, kv_b, o, down; the inputs of q_b and kv_b come out of norms without a residual.
    "deepseek": Model("DeepseekV3", LATENT, 2, 6, 3, "npu_interleave_rope"),
}


@dataclass(frozen=True)
class Preset:
    inputs: InputScheme
    smooth: bool = False
    casts: int = 0
    """In a layer: vectors of down_proj in bfloat16, which npu_dequant_swiglu_quant wants in float32."""
    fills: int = 0
    """In a graph: zeros, the offset that npu_dequant_swiglu_quant wants beside a scale."""


PRESETS = {
    "dynamic": Preset(InputScheme("int8", True, "token")),
    "dynamic-smooth": Preset(InputScheme("int8", True, "token"), True, casts=1),
    "static": Preset(InputScheme("int8", True, "tensor"), casts=1, fills=1),
    "static-smooth": Preset(InputScheme("int8", True, "tensor"), True, fills=1),
    "static-asymmetric": Preset(InputScheme("int8", False, "tensor"), casts=2),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name].build().eval()
    for parameter in model.parameters():  # norm weights are ones in a fresh model: nothing would miss them
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    return model.to(torch.bfloat16)


IDS = torch.tensor([[1, 7, 30, 2, 49, 5, 0], [8, 8, 41, 3, 12, 26, 9]])


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def quantize_by_hand(model: nn.Module, preset: Preset) -> None:
    """Deploy every linear layer but the head."""
    read: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and name != "lm_head"
    ]
    logits(model, IDS)
    for hook in hooks:
        hook.remove()
    siblings: dict[Tensor, list[str]] = {}
    for name, x in read.items():  # the very tensor that was read, or an equal view of it
        first = next((other for other in siblings if other.shape == x.shape and torch.equal(other, x)), x)
        siblings.setdefault(first, []).append(name)
    scheme = Scheme(WeightScheme("int8"), preset.inputs)
    for x, names in siblings.items():
        smooth = (torch.rand(x.size(-1)) + 0.5).to(x.dtype) if preset.smooth else None
        factor = torch.ones(()) if smooth is None else smooth.float()
        smoothed = x.float() * factor
        low, high = smoothed.amin().reshape(1), smoothed.amax().reshape(1)
        inputs = None
        if not preset.inputs.dynamic:
            inputs = InputParameters(*integer_parameters(low, high, 8, preset.inputs.symmetric))
        for name in names:
            layer = model.get_submodule(name)
            weight = round_to_nearest(layer.weight.float() / factor, scheme.weights)
            model.set_submodule(name, deploy(layer, scheme, weight, inputs, smooth))
        share([model.get_submodule(name) for name in names])


def expected(model: Model, preset: Preset) -> dict[str, int]:
    """The first norm reads the embedding; the others, with the last one before the head, residual sums."""
    quantize, with_norm = "npu_quantize", "npu_add_rms_norm_quant"
    if preset.inputs.dynamic:
        quantize, with_norm = "npu_dynamic_quant", "npu_add_rms_norm_dynamic_quant"
    return {
        "npu_dequant_swiglu_quant": LAYERS,
        with_norm: 2 * LAYERS - 1,
        "npu_rms_norm": 1 + model.norms * LAYERS,
        "npu_add_rms_norm": 1,
        quantize: 1 + model.quantized * LAYERS,
        "npu_quant_matmul": model.products * LAYERS,
        model.ropes: 2 * LAYERS,
    }


@functools.cache
def float_operators(name: str, dialect: str) -> Counter[str]:
    """What is left of the float model."""
    model = build(name)
    npu_fusion.prepare(model)
    outcome = fuse(functools.partial(logits, model), (IDS,), dialect=dialect, dynamic=True)
    return Counter(outcome.report.operators_after)


def run(name: str, preset: Preset, dialect: str) -> tuple[Outcome, Tensor]:
    model = build(name)
    with torch.no_grad():
        exact = logits(build(name).double(), IDS)
    quantize_by_hand(model, preset)
    done = npu_fusion.prepare(model)
    assert len(done) == LAYERS
    outcome = fuse(functools.partial(logits, model), (IDS,), dialect=dialect, dynamic=True)
    check_expectation(outcome.report, FusionConfig(expect=expected(MODELS[name], preset)))
    return outcome, exact


VIEWS = {
    "view",
    "_unsafe_view",
    "reshape",
    "t",
    "permute",
    "transpose",
    "unsqueeze",
    "split_with_sizes",
    "slice",
    "cat",
}
FAST = [("llama", "dynamic", "aot")]


@pytest.mark.parametrize(
    ("name", "preset", "dialect"),
    [
        pytest.param(*row, marks=() if row in FAST else pytest.mark.slow)
        for row in ((n, p, d) for n in MODELS for p in PRESETS for d in DIALECTS)
    ],
)
def test_a_model(name: str, preset: str, dialect: str) -> None:
    outcome, exact = run(name, PRESETS[preset], dialect)
    assert outcome.fused == expected(MODELS[name], PRESETS[preset])

    # Beside the float model there are the quantized operators; of plain ones the int32 products before
    # SwiGLU, and nothing that scales, rounds, clamps, takes a maximum or converts, but for the vectors of
    # down_proj.
    added, left = Counter(outcome.report.operators_after), float_operators(name, dialect)
    more = {op: added[op] - left[op] for op in added | left if added[op] != left[op]}
    plain = {
        op: count
        for op, count in more.items()
        if not op.startswith("npu.") and op.split(".")[1] not in VIEWS and op != "aten.mm"
    }
    cast = "aten._to_copy" if dialect == "aot" else "prims.convert_element_type"
    wanted = {
        "aten._int_mm": LAYERS,
        cast: PRESETS[preset].casts * LAYERS,
        "aten.full": PRESETS[preset].fills,
    }
    assert plain == {op: count for op, count in wanted.items() if count}
    assert added["aten.mm"] == 1  # the head

    fused, eager = ((t.double() - exact).norm() / exact.norm() for t in (outcome.result, outcome.expected))
    assert eager < 0.03
    assert fused <= eager * 1.25


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["dynamic", "static-asymmetric"])
def test_on_a_target_too(preset: str) -> None:
    """A norm takes scale and zero point in bfloat16 there; the sizes of rotary are for another test."""
    model = build("llama")
    quantize_by_hand(model, PRESETS[preset])
    npu_fusion.prepare(model)
    options: dict[str, Any] = {"dynamic": True, "target": "ascend910b", "rotary_mul": False}
    outcome = fuse(functools.partial(logits, model), (IDS,), **options)
    wanted = expected(MODELS["llama"], PRESETS[preset])
    del wanted["npu_rotary_mul"]
    assert outcome.fused == wanted


@pytest.mark.slow
def test_siblings_with_scales_of_their_own_are_quantized_apart() -> None:
    """So it is the shared buffer, and nothing else, that makes q, k and v read one quantization."""
    model = build("llama")
    preset = PRESETS["static"]
    quantize_by_hand(model, preset)
    for name, module in model.named_modules():
        if name.endswith("k_proj"):
            module.input_scale = module.input_scale.clone()
    npu_fusion.prepare(model)
    outcome = fuse(functools.partial(logits, model), (IDS,), dynamic=True)
    with pytest.raises(FusionExpectationError, match="npu_add_rms_norm_quant"):
        check_expectation(outcome.report, FusionConfig(expect=expected(MODELS["llama"], preset)))


class _MLP(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(96, 128, bias=False).to(dtype)
        self.up_proj = nn.Linear(96, 128, bias=False).to(dtype)
        self.down_proj = nn.Linear(128, 96, bias=False).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    ("case", "dialect"),
    [
        pytest.param(c, d, id=f"{c}-{d}", marks=() if c in ONE_OF_EACH and d == "aot" else pytest.mark.slow)
        for c in LINEAR
        for d in DIALECTS
    ],
)
def test_gate_and_up_are_one_layer_of_every_kind(case: Case, dialect: str) -> None:
    dtype = torch.bfloat16
    torch.manual_seed(0)
    module, x = _MLP(dtype), torch.randn(2, 3, 96).to(dtype)
    with torch.no_grad():
        hidden = F.silu(module.gate_proj(x)) * module.up_proj(x)
        gate = deployed_from(module.gate_proj, case, False, x)
        module.gate_proj = gate.deployed
        up = round_to_nearest(module.up_proj.weight.float(), case.weights, case.inputs)
        module.up_proj = deploy(module.up_proj, case.scheme, up, gate.inputs)
        share([module.gate_proj, module.up_proj])
        module.down_proj = deployed_from(module.down_proj, case, False, hidden).deployed
        alone = module(x)
        state = {key: t.clone() for key, t in module.state_dict().items()}
        assert [pair.merged for pair in npu_fusion.prepare(module)] == ["gate_up_proj"]
        assert_close(module(x), alone)
        assert_same(module.state_dict(), state)
        for tensor in module.gate_up_proj.buffers():
            tensor.zero_()
        module.load_state_dict(state)
        assert_same(module.state_dict(), state)
        assert_close(module(x), alone)
    outcome = fuse(module, (x,), dynamic=True, dialect=dialect)
    into = (
        "npu_dequant_swiglu_quant"
        if case.inputs is not None and case.weights.type == "int8"
        else "npu_swiglu"
    )
    assert outcome.fused[into] == 1
    assert "aten.mul" not in outcome.report.operators_after
    assert_close(outcome.result, outcome.expected)


def assert_close(result: Tensor, expected: Tensor) -> None:
    """Up to values next to a rounding boundary: a few steps of the coarsest type."""
    assert (result - expected).double().norm() <= 0.03 * expected.double().norm()


def assert_same(state: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(state) == list(other)
    for key, tensor in state.items():
        assert tensor.dtype == other[key].dtype
        assert torch.equal(tensor, other[key]), key
