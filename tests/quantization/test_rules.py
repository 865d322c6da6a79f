from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion._prepared_layers import TransposedLinear
from npu_fusion.quantization.config import parse
from npu_fusion.quantization.presets import PRESETS
from npu_fusion.quantization.rules import Plan, Skipped, plan, why_not
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

BF16 = torch.bfloat16


def linear(k: int, n: int, bias: bool = False, dtype: torch.dtype = BF16) -> nn.Linear:
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def conv(dtype: torch.dtype = BF16, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(3, 5, 3, dtype=dtype, **options)


def alone(kind: str, strategy: str = "channel", size: int | None = None, algorithm: str = "minmax") -> Scheme:
    return Scheme(WeightScheme(kind, True, strategy, size), None, algorithm)


def both(weights: WeightScheme, inputs: InputScheme, algorithm: str) -> Scheme:
    return Scheme(weights, inputs, algorithm)


INT8 = alone("int8")
INT4 = alone("int4")
INT4_GROUPS = alone("int4", "group", 64)
FP4 = alone("float4_e1m2", "group", 32)
MXFP4 = alone("mxfp4_e2m1", "group", 32)
HIF8 = both(WeightScheme("hifloat8"), InputScheme("hifloat8"), "ofmr")
FP8 = both(WeightScheme("float8_e4m3fn", True, "tensor"), InputScheme("float8_e4m3fn"), "ofmr")
FP8_TOKEN = both(WeightScheme("float8_e4m3fn"), InputScheme("float8_e4m3fn", True, "token"), "ofmr")
MX88 = both(
    WeightScheme("mxfp8_e4m3fn", True, "group", 32), InputScheme("mxfp8_e4m3fn", True, "group"), "mxquant"
)
MX84 = both(
    WeightScheme("mxfp4_e2m1", True, "group", 32), InputScheme("mxfp8_e4m3fn", True, "group"), "mxquant"
)
FP84 = both(WeightScheme("float4_e2m1", True, "group", 64), InputScheme("float8_e4m3fn"), "minmax")
STATIC = both(WeightScheme("int8"), InputScheme("int8", False), "minmax")
TOKEN = both(WeightScheme("int8"), InputScheme("int8", True, "token"), "minmax")


@pytest.mark.parametrize(
    ("scheme", "k", "n"),
    [
        (INT8, 32, 32),
        (INT8, 96, 32),
        (alone("int8", "group", 32), 64, 32),
        (INT4, 64, 128),
        (INT4_GROUPS, 128, 64),
        (FP4, 64, 64),
        (MXFP4, 64, 128),
        (HIF8, 7, 5),
        (FP8, 7, 5),
        (FP8_TOKEN, 7, 5),
        (alone("hifloat8", "channel", None, "gptq"), 7, 5),
        (alone("float8_e4m3fn"), 7, 65535),
        (MX88, 64, 5),
        (MX88, 33, 5),
        (MX84, 64, 5),
        (FP84, 128, 5),
        (STATIC, 7, 5),
        (STATIC, 131071, 1),
        (TOKEN, 16, 8),
        (TOKEN, 48, 24),
    ],
)
def test_layers_that_can(scheme: Scheme, k: int, n: int) -> None:
    assert why_not("fc", linear(k, n), scheme) is None


K_AND_N = "K is {} and N is {}; accepted for "


@pytest.mark.parametrize(
    ("scheme", "layer", "reason"),
    [
        (
            INT8,
            lambda: linear(48, 32),
            "K is 48 and N is 32; accepted for weights int8 alone: K and N in multiples of 32",
        ),
        (
            INT8,
            lambda: linear(32, 48),
            "K is 32 and N is 48; accepted for weights int8 alone: K and N in multiples of 32",
        ),
        (
            INT4,
            lambda: linear(96, 64),
            "K is 96 and N is 64; accepted for weights int4 alone: K and N in multiples of 64",
        ),
        (
            INT4,
            lambda: linear(64, 96),
            "K is 64 and N is 96; accepted for weights int4 alone: K and N in multiples of 64",
        ),
        (
            FP4,
            lambda: linear(64, 32),
            "K is 64 and N is 32; accepted for weights float4_e1m2 alone: K and N in multiples",
        ),
        (
            MXFP4,
            lambda: linear(96, 64),
            "K is 96 and N is 64; accepted for weights mxfp4_e2m1 alone: K and N in multiples",
        ),
        (
            INT8,
            lambda: linear(65536, 32),
            "K is 65536 and N is 32; accepted for weights int8 alone: K and N up to 65535",
        ),
        (
            INT8,
            lambda: linear(32, 65536),
            "K is 32 and N is 65536; accepted for weights int8 alone: K and N up to 65535",
        ),
        (
            alone("hifloat8"),
            lambda: linear(1, 65536),
            "K is 1 and N is 65536; accepted for weights hifloat8 alone: K and N up to 65535",
        ),
        (
            MX88,
            lambda: linear(96, 8),
            "K is 96, which are 3 blocks; accepted for weights mxfp8_e4m3fn with inputs mxfp8_e4m3fn per "
            "group: an even "
            "number of blocks of 32 along K",
        ),
        (MX88, lambda: linear(65, 8), "K is 65, which are 3 blocks; accepted"),
        (
            MX84,
            lambda: linear(96, 8),
            "K is 96; accepted for weights mxfp4_e2m1 with inputs mxfp8_e4m3fn per group: K in multiples "
            "of 64",
        ),
        (
            FP84,
            lambda: linear(96, 8),
            "K is 96; accepted for weights float4_e2m1 with inputs float8_e4m3fn per tensor: K in "
            "multiples of 64",
        ),
        (
            FP84,
            lambda: linear(128, 8, bias=True),
            "it has a bias; accepted for weights float4_e2m1 with inputs float8_e4m3fn per tensor: no bias",
        ),
        (
            TOKEN,
            lambda: linear(24, 8),
            "K is 24 and N is 8; accepted for weights int8 with inputs int8 per token: K in multiples of "
            "16, N in "
            "multiples of 8",
        ),
        (
            TOKEN,
            lambda: linear(16, 12),
            "K is 16 and N is 12; accepted for weights int8 with inputs int8 per token",
        ),
        (
            TOKEN,
            lambda: linear(131072, 8),
            "K is 131072; accepted for weights int8 with inputs int8 per token: K up to 131071",
        ),
        (
            STATIC,
            lambda: linear(131072, 1),
            "K is 131072; accepted for weights int8 with inputs int8 per tensor: K up to 131071",
        ),
        (INT4_GROUPS, lambda: linear(64, 64), "K is 64 and group_size 64; accepted: group_size less than K"),
        (alone("int8", "group", 96), lambda: linear(64, 64), "K is 64 and group_size 96; accepted"),
        (
            INT8,
            lambda: linear(32, 32, dtype=torch.float32),
            "its weight is float32; accepted for weights int8 alone: float16, bfloat16; convert the "
            "model with "
            ".to(torch.bfloat16)",
        ),
        (
            STATIC,
            lambda: linear(32, 32, dtype=torch.float32),
            "its weight is float32; accepted for weights int8 with",
        ),
        (
            MX88,
            lambda: linear(64, 8, dtype=torch.float16),
            "its weight is float16; accepted for weights mxfp8_e4m3fn with inputs mxfp8_e4m3fn per "
            "group: bfloat16; "
            "convert the model with .to(torch.bfloat16)",
        ),
        (INT4, lambda: linear(64, 64, dtype=torch.float64), "its weight is float64; accepted"),
        (
            HIF8,
            lambda: conv(padding=1, padding_mode="reflect"),
            "padding_mode is 'reflect'; accepted for weights hifloat8 with inputs hifloat8 per tensor: "
            "padding_mode "
            "'zeros'",
        ),
        (
            INT8,
            conv,
            "Conv2d is not quantized as weights int8 alone by minmax; accepted: hifloat8 with inputs "
            "hifloat8 per tensor "
            "by ofmr; float8_e4m3fn with inputs float8_e4m3fn per tensor by ofmr",
        ),
        (
            FP8_TOKEN,
            conv,
            "Conv2d is not quantized as weights float8_e4m3fn with inputs float8_e4m3fn per token by ofmr",
        ),
        (
            alone("hifloat8", algorithm="ofmr"),
            conv,
            "Conv2d is not quantized as weights hifloat8 alone by ofmr; accepted",
        ),
    ],
)
def test_layers_that_cannot(scheme: Scheme, layer: Callable[[], nn.Module], reason: str) -> None:
    found = why_not("fc", layer(), scheme)
    assert found is not None
    assert found.startswith(reason)


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
@pytest.mark.parametrize("scheme", [HIF8, FP8, INT4])
def test_types_that_every_model_can_have(scheme: Scheme, dtype: torch.dtype) -> None:
    assert why_not("fc", linear(64, 64, dtype=dtype), scheme) is None
    if scheme is not INT4:
        assert why_not("conv", conv(dtype), scheme) is None


class Subclass(nn.Linear):
    pass


def with_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(linear(32, 32, dtype=torch.float32))


def with_own_forward() -> nn.Module:
    layer = linear(32, 32)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


def with_integers() -> nn.Module:
    layer = linear(32, 32)
    layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    return layer


class Wrapped(Tensor):
    pass


def with_a_subclass_of_tensor() -> nn.Module:
    layer = linear(32, 32)
    layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=BF16).as_subclass(Wrapped))
    return layer


def with_value(value: float, name: str = "weight") -> nn.Module:
    layer = linear(32, 32, bias=True)
    with torch.no_grad():
        getattr(layer, name).view(-1)[5] = value
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            lambda: Subclass(32, 32),
            "its class is tests.quantization.test_rules.Subclass; accepted: torch.nn.Linear and",
        ),
        (lambda: TransposedLinear(linear(32, 32)), "npu_fusion.prepare has rearranged it; accepted: a model"),
        (lambda: nn.LazyLinear(4), "its class is torch.nn.modules.linear.LazyLinear; accepted"),
        (
            lambda: nn.utils.parametrizations.weight_norm(linear(32, 32, dtype=torch.float32)),
            "its class is torch.nn.utils.parametrize.ParametrizedLinear; accepted",
        ),
        (
            with_weight_norm,
            "its weight is no parameter (weight_norm, say, computes it); accepted: a parameter",
        ),
        (with_own_forward, "its forward was replaced by another; accepted: that of its class"),
        (
            lambda: nn.Linear(32, 32, device="meta"),
            "its weight is on the meta device; accepted: a weight with data",
        ),
        (with_integers, "its weight is int8; accepted: floating point"),
        (with_a_subclass_of_tensor, "its weight is a Wrapped; accepted: a torch.Tensor"),
        (lambda: nn.Linear(0, 32), "its weight has shape [32, 0]; accepted: no size of 0"),
        (lambda: nn.Linear(32, 0), "its weight has shape [0, 32]; accepted: no size of 0"),
        (lambda: with_value(float("nan")), "its weight has infinities or NaN; accepted: finite values"),
        (lambda: with_value(-float("inf")), "its weight has infinities or NaN; accepted: finite values"),
        (lambda: with_value(float("inf"), "bias"), "its bias has infinities or NaN; accepted: finite values"),
        (lambda: nn.Identity(), "its class is torch.nn.modules.linear.Identity; accepted"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_that_never_can(layer: Callable[[], nn.Module], reason: str) -> None:
    found = why_not("fc", layer(), INT8)
    assert found is not None
    assert found.startswith(reason)


def test_the_model_itself() -> None:
    assert why_not("", linear(32, 32), INT8) == "it is the model itself, which cannot be replaced in place"


# ---------------------------------------------------------------------------- plans


class Block(nn.Module):
    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.q_proj = linear(size, 64)
        self.up = linear(64, 128)
        self.down = linear(128, 64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.layers = nn.ModuleList([Block(), Block(40)])
        self.special = Subclass(64, 64)
        self.patch = conv()
        self.lm_head = linear(64, 96)


def config(algorithm: Any = "minmax", **overrides: Any) -> dict[str, Any]:
    return {"quant_cfg": {"weights": {"type": "int8"}, **overrides}, "algorithm": algorithm}


def test_a_plan_names_every_layer_once() -> None:
    model = Model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = plan(model, parse(PRESETS["INT8_MINMAX_WEIGHT_QUANT_CFG"]))
    assert found == Plan(
        {
            "layers.0.q_proj": INT8,
            "layers.0.up": INT8,
            "layers.0.down": INT8,
            "layers.1.up": INT8,
            "layers.1.down": INT8,
        },
        (
            Skipped(
                "layers.1.q_proj",
                "K is 40 and N is 64; accepted for weights int8 alone: K and N in multiples of 32",
            ),
            Skipped(
                "special",
                "its class is tests.quantization.test_rules.Subclass; accepted: torch.nn.Linear and "
                "torch.nn.Conv2d themselves, since a subclass may use its weight in another way",
            ),
            Skipped("patch", "Conv2d is not quantized by 'minmax'; accepted: 'ofmr'"),
        ),
        ("lm_head",),
        (),
    )
    assert list(found.schemes) == [
        f"layers.{i}.{name}" for i, name in ((0, "q_proj"), (0, "up"), (0, "down"), (1, "up"), (1, "down"))
    ]
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_overrides_and_skips_by_name() -> None:
    found = plan(
        Model(),
        parse(
            {
                **config(
                    **{
                        "*.down.weights": {"strategy": "tensor"},
                        "*.dwn.weights": {"strategy": "tensor"},
                        "*q_proj.inputs": {"enable_quant": False},
                        "embed.weights": {},
                    }
                ),
                "skip_layers": ["layers.1", "embed", "lm_haed", "layers.?", "l*d", "patch", "special"],
            }
        ),
    )
    assert list(found.schemes) == ["layers.0.q_proj", "layers.0.up", "layers.0.down"]
    assert found.schemes["layers.0.down"].weights.strategy == "tensor"
    assert found.schemes["layers.0.up"].weights.strategy == "channel"
    assert found.skipped == ()
    assert found.excluded == (
        "layers.1.q_proj",
        "layers.1.up",
        "layers.1.down",
        "special",
        "patch",
        "lm_head",
    )
    # "layers.?" is the name of a block, but of no layer in it.
    assert found.unmatched == (
        "quant_cfg['*.dwn.weights']",
        "quant_cfg['embed.weights']",
        "skip_layers 'layers.?'",
        "skip_layers 'lm_haed'",
    )
    assert found.warning() == (
        "no layer matches quant_cfg['*.dwn.weights'], quant_cfg['embed.weights'], skip_layers 'layers.?', "
        "skip_layers 'lm_haed'"
    )


def test_convolutions_with_ofmr() -> None:
    found = plan(Model(), parse("HIFP8_OFMR_CFG"))
    assert "patch" in found.schemes
    assert [layer.name for layer in found.skipped] == ["special"]


def test_impossible_overrides_are_refused_for_the_layer() -> None:
    overrides = {
        "inputs": {"type": "int8"},
        "*up.weights": {"type": "int4"},
        "*q*.inputs": {"enable_quant": False},
    }
    message = "quantize: quant_cfg['*up.weights'].type is 'int4' with quant_cfg.inputs.type 'int8'; "
    with pytest.raises(ValueError, match=re.escape(message) + r".*\(layer 'layers.0.up'\)$"):
        plan(Model(), parse(config(**overrides)))


def test_a_layer_with_two_names_is_planned_once() -> None:
    model = nn.ModuleDict({"a": linear(32, 32), "b": nn.ModuleDict({"c": linear(32, 32)})})
    model["b"]["d"] = model["a"]
    assert list(plan(model, parse(config())).schemes) == ["a", "b.c"]
    found = plan(model, parse({**config(), "skip_layers": "b.d"}))
    assert (list(found.schemes), found.excluded) == (["b.c"], ("a",))
    message = (
        "quantize: quant_cfg gives 'a' and 'b.d' different schemes; accepted: one, since they are one layer"
    )
    with pytest.raises(ValueError, match=message):
        plan(model, parse(config(**{"b.d.weights": {"strategy": "tensor"}})))


def test_a_model_that_is_a_layer() -> None:
    found = plan(linear(32, 32), parse(config()))
    assert found.schemes == {}
    assert found.skipped == (Skipped("", "it is the model itself, which cannot be replaced in place"),)


def test_layers_that_were_prepared_before_are_named() -> None:
    model = nn.Sequential(TransposedLinear(linear(32, 32)), linear(32, 32))
    found = plan(model, parse(config()))
    assert list(found.schemes) == ["1"]
    (skipped,) = found.skipped
    assert skipped.name == "0" and skipped.reason.startswith("npu_fusion.prepare has rearranged it")


def test_a_model_without_layers() -> None:
    assert plan(nn.Sequential(nn.ReLU()), parse()) == Plan({}, (), (), ("skip_layers 'lm_head'",))


def test_algorithms_of_the_user_take_classes_by_name() -> None:
    registered = {"mine": ("Block", "Embedding"), "linears": ("Linear",)}
    found = plan(Model(), parse(config({"minmax", "mine"}), registered))
    assert {name: scheme.algorithm for name, scheme in found.schemes.items()} == {
        "embed": "mine",
        "layers.0": "mine",
        "layers.1": "mine",
        "lm_head": "minmax",
    }
    inside = [layer.reason for layer in found.skipped if layer.name.startswith("layers.1.")]
    assert inside == ["it is a part of 'layers.1', which is replaced as a whole"] * 3

    found = plan(Model(), parse(config("linears"), registered))
    assert [scheme.algorithm for scheme in found.schemes.values()] == ["linears"] * 7
    assert [layer.name for layer in found.skipped] == ["special", "patch"]

    found = plan(Block(), parse(config("mine"), registered))
    assert found.skipped[0] == Skipped("", "it is the model itself, which cannot be replaced in place")
    assert found.skipped[1].reason == "Linear is not quantized by 'mine'; accepted: " + ", ".join(
        map(
            repr,
            sorted(
                ["minmax", "smoothquant", "awq", "gptq", "ofmr", "mxquant", "autoround", "cast", "quantile"]
            ),
        )
    )


# ---------------------------------------------------------------------------- the warning


def test_nothing_to_warn_of() -> None:
    model = nn.Sequential(linear(32, 32))
    assert plan(model, parse(config())).warning() is None
    # Presets skip lm_head, which is no mistake in a model without one.
    found = plan(model, parse("INT8_MINMAX_WEIGHT_QUANT_CFG"))
    assert (found.unmatched, found.warning()) == (("skip_layers 'lm_head'",), None)


def test_the_warning_groups_layers_by_reason() -> None:
    model = nn.Sequential(*[linear(40, 32) for _ in range(5)], linear(32, 40), linear(32, 32))
    found = plan(model, parse(config(**{"*x.weights": {}})))
    assert found.warning() == (
        "6 of 7 layers stay in float:\n"
        "  5 (0, 1, 2, ...): K is 40 and N is 32; accepted for weights int8 alone: K and N in multiples "
        "of 32\n"
        "  1 (5): K is 32 and N is 40; accepted for weights int8 alone: K and N in multiples of 32\n"
        "no layer matches quant_cfg['*x.weights']"
    )


def test_the_warning_stays_short() -> None:
    model = nn.Sequential(*[linear(33 + i, 32) for i in range(20)])
    text = plan(model, parse(config())).warning()
    assert text is not None
    lines = text.splitlines()
    assert len(lines) == 1 + 8 + 1
    assert lines[-1] == "  12 for 12 other reasons"


def test_layers_that_the_user_left_out_are_not_warned_of() -> None:
    found = plan(nn.Sequential(linear(40, 32)), parse({**config(), "skip_layers": "0"}))
    assert (found.excluded, found.warning()) == (("0",), None)
