"""prepare() of multi-head latent attention: models of transformers, and small attentions of other codes."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, MiniCPM3Config

from npu_fusion import _prepared_layers
from npu_fusion._prepared_layers import ExpandingLinear, SplitLinear, TransposedLinear
from npu_fusion.backend import get_npu_backend
from npu_fusion.prepare import Prepared, Rearranged, prepare
from npu_fusion.quantization import quantize_linears

HEADS, NOPE, ROPE, VALUE = 4, 6, 8, 10
HIDDEN, QUERY, LATENT = 24, 20, 16
NAMES = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
TRANSPOSED = "q_a_proj, q_b_proj and kv_a_proj_with_mqa transposed"
EXPANDED = "kv_b_proj kept as W_UK and W_UV"
PAIRED = "rope columns paired, as the model rotates halves"
UNKNOWN = "rope columns not touched, as it is unknown what the model rotates: "


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


# Models of transformers.

SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "vocab_size": 64,
    "q_lora_rank": QUERY,
    "kv_lora_rank": LATENT,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
}
COMPLEX = f"{UNKNOWN}apply_rotary_emb does not take q, k, cos and sin"
MODELS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "v3": (DeepseekV3Config(**SIZES), (TRANSPOSED, EXPANDED)),
    "v3 of halves": (DeepseekV3Config(**SIZES, rope_interleave=False), (TRANSPOSED, EXPANDED, PAIRED)),
    "v2": (DeepseekV2Config(**SIZES), (TRANSPOSED, EXPANDED, COMPLEX)),
    "v2 without low-rank query": (
        DeepseekV2Config(**{**SIZES, "q_lora_rank": None}),
        (
            "kv_a_proj_with_mqa transposed",
            EXPANDED,
            "the query has no low rank, so npu_mla_prolog does not apply",
            COMPLEX,
        ),
    ),
    "minicpm3": (
        MiniCPM3Config(**{k: v for k, v in SIZES.items() if "moe" not in k}),
        (TRANSPOSED, EXPANDED, PAIRED),
    ),
}


def causal_lm(name: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(MODELS[name][0]).eval()


def logits(model: Callable[..., Any], ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_and_save_the_same(name: str) -> None:
    model = causal_lm(name)
    ids = torch.randint(0, 64, (2, 5))
    expected, saved = logits(model, ids), copy.deepcopy(model.state_dict())
    done = prepare(model)
    names = NAMES if "q_a_proj" in MODELS[name][1][0] else NAMES[2:]
    assert done.rearranged == tuple(
        Rearranged(f"model.layers.{i}.self_attn", names, MODELS[name][1]) for i in range(2)
    )
    assert not done.skipped
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    for layer in names:
        assert type(model.model.layers[0].self_attn.get_submodule(layer)) is not nn.Linear
    assert_same_state(model, saved)
    fresh = causal_lm(name)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(fresh, ids), expected)


@pytest.mark.parametrize(
    ("name", "dynamic"), [("v3", False), pytest.param("v3 of halves", True, marks=pytest.mark.slow)]
)
def test_models_still_fuse(name: str, dynamic: bool) -> None:
    model = causal_lm(name)
    del model.model.layers[1:]
    ids = torch.randint(0, 64, (2, 5))
    fused = []
    for _ in range(2):
        torch._dynamo.reset()
        backend = get_npu_backend(host="eager", fusion_config={"strict": True})
        run = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(logits(run, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
        fused.append(sum(backend.reports[0].fused.values()))
        prepare(model)
    assert fused[1] >= fused[0] + 1  # the SwiGLU


@pytest.mark.parametrize("name", ["v3", "minicpm3"])
def test_saves_as_a_pretrained_model(name: str, tmp_path: Any) -> None:
    model = causal_lm(name)
    ids = torch.randint(0, 64, (2, 5))
    expected = logits(model, ids)
    prepare(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded.eval(), ids), expected)


def test_generates_the_same_tokens() -> None:
    model = causal_lm("v3 of halves")
    model.generation_config.pad_token_id = 0
    settings = {"max_new_tokens": 6, "do_sample": False}
    prompt = torch.randint(0, 64, (1, 4))
    expected = model.generate(prompt, **settings)
    prepare(model)
    assert torch.equal(model.generate(prompt, **settings), expected)


# Small attentions.


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


def rotary_of_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def rotary_of_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """De-interleaves and then rotates halves, as transformers did until version 5.11."""
    q, k = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (q, k))
    return rotary_of_halves(q, k, cos, sin)


class Attention(nn.Module):
    """The names of transformers on another class: not absorbed, without a cache, rotating halves."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qk_nope_head_dim, self.qk_rope_head_dim = HEADS, NOPE, ROPE
        self.v_head_dim, self.kv_lora_rank = VALUE, LATENT
        self.q_a_proj = nn.Linear(HIDDEN, QUERY, bias=False)
        self.q_a_layernorm = Norm(QUERY)
        self.q_b_proj = nn.Linear(QUERY, HEADS * (NOPE + ROPE), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(HIDDEN, LATENT + ROPE, bias=False)
        self.kv_a_layernorm = Norm(LATENT)
        self.kv_b_proj = nn.Linear(LATENT, HEADS * (NOPE + VALUE), bias=False)
        self.o_proj = nn.Linear(HEADS * VALUE, HIDDEN, bias=False)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_a_proj(x), self.kv_a_proj_with_mqa(x)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        angles = torch.outer(torch.arange(tokens), 1 / torch.arange(1, ROPE // 2 + 1)).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype).unsqueeze(0), angles.sin().to(x.dtype).unsqueeze(0)
        query, latent = self.projected(x)
        q = self.q_b_proj(self.q_a_layernorm(query)).view(batch, tokens, HEADS, -1).transpose(1, 2)
        q, q_rope = q.split([NOPE, ROPE], -1)
        latent, k_rope = latent.split([LATENT, ROPE], -1)
        q_rope, k_rope = rotary_of_halves(q_rope, k_rope.unsqueeze(1), cos, sin)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, tokens, HEADS, -1).transpose(1, 2)
        k, v = kv.split([NOPE, VALUE], -1)
        scores = q @ k.mT + q_rope @ k_rope.mT
        weights = (scores / math.sqrt(NOPE + ROPE)).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class OneDown(Attention):
    """Query and latent are projected down by one layer, as in SGLang and vLLM."""

    def __init__(self) -> None:
        super().__init__()
        del self.q_a_proj, self.kv_a_proj_with_mqa
        self.fused_qkv_a_proj_with_mqa = nn.Linear(HIDDEN, QUERY + LATENT + ROPE, bias=False)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, latent = self.fused_qkv_a_proj_with_mqa(x).split([QUERY, LATENT + ROPE], -1)
        return query, latent


class Absorbed(nn.Module):
    """DeepSeek's own names and its absorbed attention, which reads ``wkv_b.weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.n_local_heads = 2 * HEADS, HEADS
        self.q_lora_rank, self.kv_lora_rank = QUERY, LATENT
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = NOPE, ROPE, VALUE
        self.wq_a = nn.Linear(HIDDEN, QUERY, bias=False)
        self.q_norm = Norm(QUERY)
        self.wq_b = nn.Linear(QUERY, HEADS * (NOPE + ROPE), bias=False)
        self.wkv_a = nn.Linear(HIDDEN, LATENT + ROPE, bias=False)
        self.kv_norm = Norm(LATENT)
        self.wkv_b = nn.Linear(LATENT, HEADS * (NOPE + VALUE), bias=False)
        self.wo = nn.Linear(HEADS * VALUE, HIDDEN, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.wq_b(self.q_norm(self.wq_a(x))).unflatten(-1, (HEADS, NOPE + ROPE))
        q_nope, q_pe = q.split([NOPE, ROPE], -1)
        latent, k_pe = self.wkv_a(x).split([LATENT, ROPE], -1)
        latent = self.kv_norm(latent)
        wkv_b = self.wkv_b.weight.view(HEADS, -1, LATENT)
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, wkv_b[:, :NOPE])
        scores = torch.einsum("bshc,btc->bsht", q_nope, latent) + torch.einsum("bshr,btr->bsht", q_pe, k_pe)
        y = torch.einsum("bsht,btc->bshc", (scores * 0.3).softmax(-1), latent)
        return self.wo(torch.einsum("bshc,hdc->bshd", y, wkv_b[:, -VALUE:]).flatten(2))


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def inputs(tokens: int = 3) -> Tensor:
    return torch.randn(2, tokens, HIDDEN)


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    got = model.state_dict()
    assert list(got) == list(expected)
    for key, tensor in expected.items():
        assert got[key].dtype == tensor.dtype
        assert torch.equal(got[key], tensor), key


def prepared(*layers: nn.Module) -> tuple[Stack, Stack]:
    """A model and the same one prepared."""
    model = Stack(*(layers or (Attention(), OneDown(), Absorbed())))
    other = copy.deepcopy(model)
    assert len(prepare(other)) == len(model.layers)
    return model, other


KINDS = [Attention, OneDown, Absorbed]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_computes_the_same(kind: type[nn.Module], dtype: torch.dtype) -> None:
    original, model = prepared(kind().to(dtype))
    x = inputs().to(dtype)
    torch.testing.assert_close(model(x), original(x))
    assert_same_state(model, original.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_gives_the_same_bits(kind: type[nn.Module]) -> None:
    """Of small whole numbers, which every order of additions sums exactly."""
    module = kind()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-8, 9, parameter.shape))
    before = copy.deepcopy(module)
    for name in prepare(module).rearranged[0].layers:
        old, new = before.get_submodule(name), module.get_submodule(name)
        assert (new.in_features, new.out_features, new.bias) == (old.in_features, old.out_features, None)
        assert torch.equal(new.weight, old.weight)
        for shape in ((), (5,), (2, 3), (2, 1, 3), (0,)):
            x = torch.randint(-8, 9, (*shape, old.in_features)).float()
            assert torch.equal(new(x), old(x))
            assert new(x).stride() == old(x).stride()


def test_matrices_are_as_the_operators_take_them() -> None:
    before, module = Attention(), OneDown()
    x = torch.randn(5, HIDDEN)
    weights = {name: layer.weight for name, layer in before.named_children() if isinstance(layer, nn.Linear)}
    query = weights["q_b_proj"].view(HEADS, NOPE + ROPE, QUERY)
    after = copy.deepcopy(before)
    prepare(after)
    assert torch.equal(after.q_a_proj.weight_t, weights["q_a_proj"].t())
    for new, old in (
        (after.q_b_proj.weight_t.view(QUERY, HEADS, -1)[:, :, NOPE:], query[:, NOPE:].permute(2, 0, 1)),
        (after.kv_a_proj_with_mqa.weight_t[:, LATENT:], weights["kv_a_proj_with_mqa"][LATENT:].t()),
    ):
        assert torch.equal(new[..., 0::2], old[..., : ROPE // 2])
        assert torch.equal(new[..., 1::2], old[..., ROPE // 2 :])
    expanded = weights["kv_b_proj"].view(HEADS, NOPE + VALUE, LATENT)
    assert torch.equal(after.kv_b_proj.weight_uk, expanded[:, :NOPE])
    assert torch.equal(after.kv_b_proj.weight_uv, expanded[:, NOPE:])
    assert all(parameter.is_contiguous() for parameter in after.parameters())

    # The operator de-interleaves; the model's halves come out.
    pairs = (x @ after.kv_a_proj_with_mqa.weight_t)[:, LATENT:]
    halves = torch.cat((pairs[:, 0::2], pairs[:, 1::2]), -1)
    torch.testing.assert_close(halves, before.kv_a_proj_with_mqa(x)[:, LATENT:])

    joint = module.fused_qkv_a_proj_with_mqa.weight
    prepare(module)
    split = module.fused_qkv_a_proj_with_mqa
    assert torch.equal(split.weight_dq, joint[:QUERY].t())
    assert torch.equal(split.weight_dkv_kr[:, :LATENT], joint[QUERY : QUERY + LATENT].t())
    assert torch.equal(split.weight_dkv_kr[:, LATENT::2], joint[QUERY + LATENT :][: ROPE // 2].t())


def test_layers_and_what_is_said() -> None:
    _, model = prepared(Attention(), OneDown(), Absorbed())
    kinds = [
        [type(c) for c in layer.children() if type(c) not in (Norm, nn.Linear)] for layer in model.layers
    ]
    assert kinds == [
        [TransposedLinear, TransposedLinear, TransposedLinear, ExpandingLinear],
        [TransposedLinear, ExpandingLinear, SplitLinear],
        [TransposedLinear, TransposedLinear, TransposedLinear, ExpandingLinear],
    ]
    model = Stack(Attention(), Attention(), OneDown(), Absorbed(), Attention())
    model.layers[4].q_a_proj.bias = nn.Parameter(torch.zeros(QUERY))
    nothing = f"{UNKNOWN}its forward calls no function of a rotary name"
    done = prepare(model)
    assert str(done) == (
        "prepare: 0 SwiGLU merged, 4 latent attentions rearranged, 1 left as they are\n"
        f"  layers.0 ... layers.1 (2 modules): {TRANSPOSED}; {EXPANDED}; {PAIRED}\n"
        "  layers.2: q_b_proj transposed; fused_qkv_a_proj_with_mqa kept as the weights of query and latent, "
        f"transposed; {EXPANDED}; {PAIRED}\n"
        f"  layers.3: wq_a, wq_b and wkv_a transposed; wkv_b kept as W_UK and W_UV; {nothing}\n"
        "  layers.4: left as it is: q_a_proj has a bias, for which the operators have no argument"
    )
    assert list(done) == list(done.done) == list(done.rearranged)
    assert done[0] == Rearranged("layers.0", NAMES, (TRANSPOSED, EXPANDED, PAIRED))
    assert isinstance(done, Prepared) and not done.merged


# What the model rotates.


def _decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    return wrapper


def rotary_of_other_arguments(q: Tensor, angles: Tensor) -> Tensor:
    return q


def rotary_that_raises(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no")


def rotary_of_nothing(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


class OfPairs(Attention):
    def forward(self, x: Tensor) -> Any:
        return rotary_of_pairs(x, x, x, x)


class Decorated(Attention):
    @_decorated
    def forward(self, x: Tensor) -> Any:
        return rotary_of_halves(x, x, x, x)


class TwoRotaries(Attention):
    def forward(self, x: Tensor) -> Any:
        return rotary_of_halves(x, x, x, x), rotary_of_pairs(x, x, x, x)


class OtherArguments(Attention):
    def forward(self, x: Tensor) -> Any:
        return rotary_of_other_arguments(x, x)


class Raises(Attention):
    def forward(self, x: Tensor) -> Any:
        return rotary_that_raises(x, x, x, x)


class Nothing(Attention):
    def forward(self, x: Tensor) -> Any:
        return rotary_of_nothing(x, x, x, x)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Attention, PAIRED),
        (Decorated, PAIRED),
        (OfPairs, EXPANDED),
        (TwoRotaries, f"{UNKNOWN}its forward calls rotary_of_halves and rotary_of_pairs"),
        (OtherArguments, f"{UNKNOWN}rotary_of_other_arguments does not take q, k, cos and sin"),
        (Raises, f"{UNKNOWN}rotary_that_raises does not take q, k, cos and sin (RuntimeError: no)"),
        (
            Nothing,
            f"{UNKNOWN}rotary_of_nothing computes something else than the rotation of halves or of pairs",
        ),
    ],
)
def test_what_the_model_rotates_is_tried(kind: type[nn.Module], said: str) -> None:
    module = kind()
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        done = prepare(module)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert done.rearranged[0].what[-1] == said
    assert (module.kv_a_proj_with_mqa.rope is not None) == (said == PAIRED)


@pytest.mark.parametrize("width", [0, 2])
def test_few_rope_columns_have_one_order_only(width: int) -> None:
    module = Attention()
    module.qk_rope_head_dim, module.qk_nope_head_dim = width, NOPE + ROPE - width
    module.v_head_dim = VALUE - ROPE + width
    module.kv_a_proj_with_mqa = nn.Linear(HIDDEN, LATENT + width, bias=False)
    before = copy.deepcopy(module)
    assert prepare(module).rearranged[0].what == (TRANSPOSED, EXPANDED)
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(module.kv_a_proj_with_mqa(x), before.kv_a_proj_with_mqa(x))


# What is refused.


def _with(change: Callable[[Any], object], module: nn.Module | None = None) -> nn.Module:
    module = module or Attention()
    change(module)
    return module


class _Linear(nn.Linear):
    pass


class _SubclassedTensor(Tensor):
    pass


def _tied(module: Attention) -> None:
    module.register_buffer("part", module.kv_b_proj.weight.detach()[3:5])


def _extra(module: Attention) -> None:
    module.q_b_proj.register_buffer("weight_scale", torch.ones(1), persistent=False)


def _subclassed(module: Attention) -> None:
    weight = module.q_a_proj.weight.detach().as_subclass(_SubclassedTensor)
    module.q_a_proj.weight = nn.Parameter(weight)


def _quantized_weight(module: Attention) -> None:
    weight = torch.zeros(QUERY, HIDDEN, dtype=torch.int8)
    module.q_a_proj.weight = nn.Parameter(weight, requires_grad=False)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "bias": (
        _with(lambda m: setattr(m, "kv_a_proj_with_mqa", nn.Linear(HIDDEN, LATENT + ROPE))),
        "kv_a_proj_with_mqa has a bias, for which the operators have no argument",
    ),
    "quantized": (
        _with(lambda m: quantize_linears(m, skip=["o_proj"])),
        "q_a_proj is a W8A8DynamicLinear of npu_fusion.quantization.modules",
    ),
    "quantized weight": (_with(_quantized_weight), "q_a_proj.weight is int8; accepted: floating dtypes"),
    "subclass": (
        _with(lambda m: setattr(m, "kv_b_proj", _Linear(LATENT, HEADS * (NOPE + VALUE), bias=False))),
        "kv_b_proj is a _Linear of tests.test_prepare_mla; accepted: torch.nn.Linear",
    ),
    "parametrized": (
        _with(lambda m: weight_norm(m.q_b_proj)),
        "q_b_proj is a ParametrizedLinear of torch.nn.utils.parametrize; accepted: torch.nn.Linear",
    ),
    "no linear": (
        _with(lambda m: setattr(m, "q_b_proj", nn.Identity())),
        "q_b_proj is a Identity of torch.nn.modules.linear; accepted: torch.nn.Linear",
    ),
    "other tensors": (_with(_extra), "q_b_proj has other tensors than a weight (weight_scale)"),
    "tensor subclass": (
        _with(_subclassed),
        "q_a_proj.weight is a _SubclassedTensor; accepted: plain tensors",
    ),
    "hook": (
        _with(lambda m: m.kv_b_proj.register_forward_hook(lambda *a: None)),
        "kv_b_proj has hooks (_forward_hooks)",
    ),
    "replaced forward": (
        _with(lambda m: setattr(m.q_a_proj, "forward", lambda x: x)),
        "the forward of q_a_proj was replaced on the object",
    ),
    "gradient": (
        _with(lambda m: m(inputs()).sum().backward()),
        "q_a_proj.weight has a gradient, which would be lost",
    ),
    "two names": (
        _with(lambda m: m.register_module("alias", m.q_b_proj)),
        "q_b_proj is a layer of other modules, too",
    ),
    "tied": (_with(_tied), "kv_b_proj.weight shares its memory with part"),
    "no heads": (
        _with(lambda m: delattr(m, "num_heads")),
        "it has no number of heads (n_local_heads, num_local_heads, num_heads)",
    ),
    "no size": (_with(lambda m: delattr(m, "v_head_dim")), "it has no size v_head_dim"),
    "other heads": (
        _with(lambda m: setattr(m, "num_heads", 3)),
        "the weight of q_b_proj is [56, 20]; by the sizes of the attention: [42, 20]",
    ),
    "other input": (
        _with(lambda m: setattr(m, "q_a_proj", nn.Linear(5, QUERY, bias=False))),
        "the weight of q_a_proj is [20, 5]; by the sizes of the attention: [20, 24]",
    ),
    "rope of its own": (
        _with(lambda m: setattr(m, "kv_a_proj_with_mqa", nn.Linear(HIDDEN, LATENT, bias=False))),
        "the weight of kv_a_proj_with_mqa is [16, 24]; by the sizes of the attention: [24, 24]",
    ),
    "no norm": (_with(lambda m: delattr(m, "q_a_layernorm")), "it has no q_a_layernorm of 20 elements"),
    "other norm": (
        _with(lambda m: setattr(m, "kv_a_layernorm", Norm(3))),
        "it has no kv_a_layernorm of 16 elements",
    ),
    "half a query": (
        _with(lambda m: delattr(m, "q_a_proj")),
        "it has only one of q_a_proj and q_b_proj",
    ),
    "two down projections": (
        _with(lambda m: setattr(m, "q_a_proj", nn.Linear(HIDDEN, QUERY, bias=False)), OneDown()),
        "it has fused_qkv_a_proj_with_mqa beside another down projection",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case: str) -> None:
    module, reason = REFUSED[case]
    before = dict(module.named_modules())
    done = prepare(module)
    assert not done.rearranged
    (skipped,) = done.skipped
    assert reason in skipped.reason
    assert all(child is before[name] for name, child in module.named_modules())


def test_an_odd_rope_is_refused() -> None:
    module = Attention()
    module.qk_rope_head_dim, module.qk_nope_head_dim, module.v_head_dim = ROPE - 1, NOPE + 1, VALUE - 1
    module.kv_a_proj_with_mqa = nn.Linear(HIDDEN, LATENT + ROPE - 1, bias=False)
    assert prepare(module).skipped[0].reason == "qk_rope_head_dim is 7, which is odd"


def test_a_weight_of_two_attentions_is_refused() -> None:
    model = Stack(Attention(), Attention(), Attention())
    model.layers[1].q_b_proj.weight = model.layers[0].q_b_proj.weight
    done = prepare(model)
    assert [entry.module for entry in done] == ["layers.2"]
    assert [entry.reason for entry in done.skipped] == [
        f"q_b_proj.weight shares its memory with layers.{other}.q_b_proj.weight" for other in (1, 0)
    ]


def test_what_is_no_latent_attention_is_not_mentioned() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.kv_b_proj = (nn.Linear(4, 4) for _ in range(3))

    assert str(prepare(Attends())) == "prepare: 0 SwiGLU merged, 0 left as they are"


# The module afterwards.


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("meta", [False, True])
def test_loads_what_the_original_saved(assign: bool, meta: bool) -> None:
    original, model = prepared()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    if meta:
        model.to("meta")
        if not assign:
            model.to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    result = model.load_state_dict(original.state_dict(), strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    x = inputs()
    torch.testing.assert_close(model(x), original(x))
    assert_same_state(model, original.state_dict())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.is_contiguous()
        assert (parameter is parameters[name]) != assign


def test_saving_before_loading_keeps_variables() -> None:
    original, model = prepared()
    kept = model.state_dict(keep_vars=True)
    assert kept["layers.0.kv_b_proj.weight"].requires_grad
    assert not model.state_dict()["layers.0.kv_b_proj.weight"].requires_grad
    assert dict(model.state_dict()._metadata) == dict(original.state_dict()._metadata)


def test_loads_other_dtypes_as_the_original_does() -> None:
    original, model = prepared()
    checkpoint = {key: tensor.half() for key, tensor in original.state_dict().items()}
    for assign, dtype in ((False, torch.float32), (True, torch.float16)):
        for m in (original, model):
            m.load_state_dict(checkpoint, assign=assign)
        assert model.layers[0].q_b_proj.weight_t.dtype == dtype
        assert_same_state(model, original.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_complains_about_a_checkpoint_as_the_original_does(assign: bool) -> None:
    original, model = prepared()
    checkpoint = original.state_dict()
    checkpoint["layers.0.q_b_proj.weight"] = torch.zeros(3, QUERY)
    checkpoint["layers.0.q_a_proj.scale"] = torch.zeros(3)
    del checkpoint["layers.1.kv_b_proj.weight"], checkpoint["layers.2.wq_a.weight"]
    messages = []
    for m in (original, model):
        with pytest.raises(RuntimeError) as caught:
            m.load_state_dict(checkpoint, assign=assign)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("assign", [False, True])
def test_loads_a_part_as_the_original_does(assign: bool) -> None:
    original, model = prepared()
    part = {"layers.0.kv_b_proj.weight": torch.ones(HEADS * (NOPE + VALUE), LATENT), "else": torch.ones(1)}
    results = [m.load_state_dict(dict(part), strict=False, assign=assign) for m in (original, model)]
    assert results[0].missing_keys == results[1].missing_keys
    assert results[0].unexpected_keys == results[1].unexpected_keys == ["else"]
    assert_same_state(model, original.state_dict())


def test_loads_its_own_named_parameters() -> None:
    _, model = prepared()
    own = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    assert "layers.0.kv_b_proj.weight_uk" in own
    model.load_state_dict(own, strict=True)
    assert torch.equal(model.layers[0].kv_b_proj.weight_uk, own["layers.0.kv_b_proj.weight_uk"])


def _torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _torch_save])
def test_a_copy_is_a_prepared_model_of_its_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    original, model = prepared()
    x = inputs()
    expected = model(x)
    other = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(x), expected)
    assert_same_state(other, original.state_dict())
    assert prepare(other).done == prepare(other).skipped == ()


def test_moves_and_changes_mode_as_a_whole() -> None:
    original, model = prepared()
    x = inputs()
    model.eval()
    assert not any(m.training for m in model.modules())
    assert_same_state(model.half(), original.half().state_dict())
    model.to(torch.float64)
    torch.testing.assert_close(model(x.double()), original.double()(x.double()), rtol=1e-12, atol=1e-12)
    assert model.to("meta").layers[2].wkv_b.weight.is_meta


def test_trains_as_before() -> None:
    original, model = prepared()
    x = inputs()
    for m in (original, model):
        m(x).square().sum().backward()
    expected = original.layers[0]
    got = model.layers[0]
    torch.testing.assert_close(got.q_a_proj.weight_t.grad, expected.q_a_proj.weight.grad.t())
    gradient = expected.kv_b_proj.weight.grad.view(HEADS, -1, LATENT)
    torch.testing.assert_close(got.kv_b_proj.weight_uk.grad, gradient[:, :NOPE])
    torch.testing.assert_close(got.kv_b_proj.weight_uv.grad, gradient[:, NOPE:])


def test_keeps_frozen_weights_and_evaluation_mode() -> None:
    model = Stack(Attention(), OneDown()).eval().requires_grad_(False)
    assert len(prepare(model)) == 2
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())


def test_prepares_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Stack(Attention(), OneDown())
    assert len(prepare(model)) == 2
    assert all(p.is_meta for p in model.parameters())


def test_a_second_call_does_nothing() -> None:
    _, model = prepared()
    layers = list(model.modules())
    again = prepare(model)
    assert again.done == again.skipped == ()
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))


def test_dry_run_changes_nothing() -> None:
    model = Stack(Attention(), _with(lambda m: delattr(m, "q_a_layernorm")))
    before = list(model.modules())
    done = prepare(model, {"dry_run": True})
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert [entry.module for entry in done] == ["layers.0"]
    assert [entry.module for entry in done.skipped] == ["layers.1"]
    assert prepare(model).rearranged == done.rearranged


def test_without_the_fusion_there_is_nothing_to_prepare() -> None:
    done = prepare(Stack(Attention()), {"mla_prolog": False})
    assert (done.rearranged, len(done.skipped)) == ((), 1)
    assert done.skipped[0].reason == "fusion_config switches off mla_prolog"


def test_without_memory_the_rest_stays_and_the_model_works(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stack(Attention(), Attention())
    model = copy.deepcopy(original)
    take, calls = TransposedLinear._take, []

    def failing(self: TransposedLinear, layer: nn.Linear) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        take(self, layer)

    with monkeypatch.context() as patch:
        patch.setattr(TransposedLinear, "_take", failing)
        with pytest.raises(torch.OutOfMemoryError):
            prepare(model)
    x = inputs()
    torch.testing.assert_close(model(x), original(x))
    assert [entry.module for entry in prepare(model)] == ["layers.1"]
    torch.testing.assert_close(model(x), original(x))


class _FormatCasts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[list[int], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.npu.npu_format_cast.default:
            self.seen.append(([*args[0].shape], args[1]))
        return func(*args, **(kwargs or {}))


def test_matrices_get_their_format_on_an_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    nz = [[HIDDEN, QUERY], [HIDDEN, LATENT + ROPE], [QUERY, HEADS * (NOPE + ROPE)]]
    model = OneDown()
    saved = model.state_dict()
    monkeypatch.setattr(_prepared_layers, "_NPU", "cpu")
    for action, casts in (
        (lambda: prepare(model), nz),
        (lambda: model.load_state_dict(saved), []),  # the parameters stay, and their format with them
        (lambda: model.load_state_dict(saved, assign=True), nz),
    ):
        with _FormatCasts() as mode:
            action()
        assert sorted(mode.seen) == sorted((shape, 29) for shape in casts)
        assert_same_state(model, saved)


def test_other_devices_have_no_formats() -> None:
    with _FormatCasts() as mode:
        prepare(OneDown())
    assert mode.seen == []


# torch.compile.


def test_is_traced_as_one_graph() -> None:
    _, model = prepared()
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 4):
        x = inputs(tokens)
        torch.testing.assert_close(run(x), model(x))


def test_layers_compiled_one_by_one_are_compiled_once() -> None:
    _, model = prepared(*(Attention() for _ in range(4)))
    counter = CompileCounter()
    run = torch.compile(lambda layer, x: layer(x), backend=counter, fullgraph=True)
    x = inputs()
    for layer in model.layers:
        torch.testing.assert_close(run(layer, x), layer(x))
    assert counter.frame_count == 1


def test_preparing_after_compiling_is_noticed() -> None:
    model = Stack(Attention())
    counter = CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True)
    x = inputs()
    expected = run(x)
    prepare(model)
    torch.testing.assert_close(run(x), expected)
    assert counter.frame_count == 2
