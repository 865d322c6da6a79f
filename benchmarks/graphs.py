"""Graphs of real size to measure the passes on: tiny widths, as many layers as asked for.

============ ==================================================================== ============================
form         model                                                                captured
============ ==================================================================== ============================
npu          Llama in bfloat16, linears in torch_npu's W8A8 operators as          undecomposed, as torchair
             vllm-ascend writes them                                              and the eager host do
plain        Llama in bfloat16, quantized and prepared by this package            the same
inductor     the same                                                             decomposed, as Inductor does
nothing      LayerNorm, GELU and attention in bfloat16: nothing to fuse           undecomposed
mla          DeepSeek-V3 in bfloat16 with dense layers, prepared by this package: undecomposed
             one token is decoded with a static cache
mla-inductor the same                                                             decomposed
============ ==================================================================== ============================
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

import npu_fusion
from npu_fusion import _compat
from npu_fusion.quantization import quantize_linears
from npu_fusion.quantization.modules.w8a8_linear import quantize_rows

FORMS = ("npu", "plain", "inductor", "nothing", "mla", "mla-inductor")
DECOMPOSED = ("inductor", "mla-inductor")
MLA = ("mla", "mla-inductor")
"""Of these forms the fusions are ``relaxed`` ones."""

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 64, 96, 4, 2, 64
TOKENS = 20
BATCH, PLACES = 2, 32  # of the static cache


def build(form: str, layers: int) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model of ``form`` with ``layers`` layers, and what to call it with."""
    torch.manual_seed(0)
    if form == "nothing":
        # a layer has half the operators of a quantized Llama's: twice the layers make a graph of that size
        model: nn.Module = nn.Sequential(*(_PlainLayer() for _ in range(2 * layers)))
        return model.bfloat16().eval(), (torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16),)
    if form in MLA:
        return _decoding(layers)
    llama = _llama(layers)
    if form == "npu":
        for layer in llama.model.layers:
            _use_npu_operators(layer)
    else:
        quantize_linears(llama)
        npu_fusion.prepare(llama)
    return _Logits(llama).eval(), (torch.randint(0, VOCABULARY, (1, TOKENS)),)


def _llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


class _Logits(nn.Module):
    def __init__(self, llama: LlamaForCausalLM) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, tokens: Tensor) -> Tensor:
        return self.llama(tokens, use_cache=False).logits


class _Decode(nn.Module):
    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cache: StaticCache) -> Tensor:
        return self.model(tokens, past_key_values=cache).logits


@torch.no_grad()
def _decoding(layers: int) -> tuple[nn.Module, tuple[Tensor, StaticCache]]:
    """With a cache that has a prompt in it, since an empty one is made inside of the graph."""
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=PLACES,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = DeepseekV3ForCausalLM(config).bfloat16().eval()
    npu_fusion.prepare(model)
    cache = StaticCache(config=config, max_cache_len=PLACES)
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    model(tokens, past_key_values=cache)
    return _Decode(model).eval(), (tokens[:, :1].clone(), cache)


class _NpuLinear(nn.Module):
    """W8A8 linear in torch_npu's operators, on rows."""

    def __init__(self, *linears: nn.Module) -> None:
        super().__init__()
        weight, scale = quantize_rows(torch.cat([linear.weight.detach() for linear in linears]))
        self.register_buffer("weight", weight.t().contiguous())
        self.register_buffer("weight_scale", scale.flatten().bfloat16())

    def rows(self, x: Tensor) -> Tensor:
        q, scale = torch.ops.npu.npu_dynamic_quant(x)
        return torch.ops.npu.npu_quant_matmul(
            q, self.weight, self.weight_scale, pertoken_scale=scale, output_dtype=torch.bfloat16
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.weight.shape[1])


class _NpuMLP(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_up = _NpuLinear(mlp.gate_proj, mlp.up_proj)
        self.down = _NpuLinear(mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        middle = torch.ops.npu.npu_swiglu(self.gate_up.rows(x.reshape(-1, x.shape[-1])))
        return self.down.rows(middle).reshape(x.shape)


def _use_npu_operators(layer: nn.Module) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(layer.self_attn, name, _NpuLinear(getattr(layer.self_attn, name)))
    layer.mlp = _NpuMLP(layer.mlp)


class _PlainLayer(nn.Module):
    """A transformer layer of the kind before RMSNorm, SwiGLU and RoPE, with a convolution over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.mixed = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(INTERMEDIATE, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before_attention(x)
        y = y + self.mixed(y.transpose(1, 2)).transpose(1, 2)
        q, k, v = (
            linear(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) * (HIDDEN // HEADS) ** -0.5, dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


@dataclass
class Captured:
    """One captured graph."""

    form: str
    layers: int
    dynamic: bool
    gm: fx.GraphModule
    nodes: int
    """Number of ``call_function`` nodes."""
    seconds: float
    """Wall time from the call of the compiled model until the graph is there, its passes not begun."""
    cpu_seconds: float

    @property
    def decomposed(self) -> bool:
        return self.form in DECOMPOSED


def capture(form: str, layers: int, dynamic: bool = False) -> Captured:
    """Capture the graph of ``form`` as ``torch.compile`` does, and time it."""
    model, args = build(form, layers)
    torch._dynamo.reset()
    found: list[tuple[fx.GraphModule, float, float]] = []
    compile_graph = _decomposed if form in DECOMPOSED else _undecomposed

    def keep(gm: fx.GraphModule) -> None:
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        # a copy: Inductor goes on with the graph, and its cache writes are in place at the end
        found.append((copy.deepcopy(gm), *seconds))

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        _compat.specialize_floats(gm)  # as the package's own backend does
        return compile_graph(gm, inputs, keep)

    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad(), _compat.without_compile_caches():
        compiled(*args)
    ((gm, seconds, cpu_seconds),) = found
    nodes = sum(node.op == "call_function" for node in gm.graph.nodes)
    return Captured(form, layers, dynamic, gm, nodes, seconds, cpu_seconds)


def _undecomposed(gm: fx.GraphModule, inputs: Sequence[Any], keep: Callable[[fx.GraphModule], None]) -> Any:
    def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        keep(gm)
        return make_boxed_func(gm.forward)

    return aot_autograd(fw_compiler=compiler)(gm, inputs)


def _decomposed(gm: fx.GraphModule, inputs: Sequence[Any], keep: Callable[[fx.GraphModule], None]) -> Any:
    """What Inductor does to a graph until it calls its user's pass; no code is generated."""
    from torch._inductor.compile_fx import compile_fx, fake_tensor_prop
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.virtualized import V

    def until_the_pass(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        view_to_reshape(gm)
        with V.set_fake_mode(fake_tensor_prop(gm, inputs)):
            post_grad_passes(gm, is_inference=True)
        gm.recompile()
        return gm.forward

    def custom_pass(graph: fx.Graph) -> None:
        keep(fx.GraphModule(graph.owning_module, graph))

    patches = {"post_grad_custom_pre_pass": custom_pass, "fx_graph_cache": False}
    return compile_fx(gm, inputs, inner_compile=until_the_pass, config_patches=patches)
