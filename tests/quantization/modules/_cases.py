"""Every kind of deployed layer: how one is made, and what it has to compute, in float64.

A :class:`Case` is a row of the tables of ``quantize``; :func:`make` deploys a layer of it, and
:meth:`Made.exact` is the float layer with the dequantized weight and the quantized and dequantized input,
written out without the layer's own code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion import formats
from npu_fusion.quantization import qparams
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules import Deployed, deploy
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)


@dataclass(frozen=True)
class Case:
    weights: WeightScheme
    inputs: InputScheme | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    bias: bool = True
    """Whether there may be one."""
    conv: bool = False

    def __str__(self) -> str:
        weights, inputs = self.weights, self.inputs
        words = [
            weights.type,
            weights.strategy,
            str(weights.group_size or ""),
            "" if weights.symmetric else "asym",
        ]
        if inputs is not None:
            words += ["x", inputs.type, inputs.strategy, "" if inputs.symmetric else "asym"]
        return "-".join(filter(None, [*words, "conv" if self.conv else ""]))

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.weights, self.inputs)


def _weights(type: str, strategy: str, size: int | None = None, symmetric: bool = True) -> WeightScheme:
    return WeightScheme(type, symmetric, strategy, size)


def _integers_alone() -> list[Case]:
    cases = []
    for type in ("int8", "int4"):
        for strategy, size in (("tensor", None), ("channel", None), ("group", 32), ("group", 64)):
            for symmetric in (True, False):
                dtypes = FLOATS if type == "int4" else HALVES
                cases.append(Case(_weights(type, strategy, size, symmetric), dtypes=dtypes))
    return cases


LINEAR = [
    *(Case(_weights("int8", s), InputScheme("int8", True, "token")) for s in ("tensor", "channel")),
    *(
        Case(_weights("int8", s), InputScheme("int8", symmetric, "tensor"))
        for s in ("tensor", "channel")
        for symmetric in (True, False)
    ),
    *(
        Case(_weights(type, s), InputScheme(type, True, t))
        for type in ("hifloat8", "float8_e4m3fn")
        for s in ("tensor", "channel")
        for t in ("tensor", "token")
    ),
    Case(_weights("mxfp8_e4m3fn", "group", 32), InputScheme("mxfp8_e4m3fn", True, "group"), HALVES),
    Case(_weights("mxfp4_e2m1", "group", 32), InputScheme("mxfp8_e4m3fn", True, "group"), HALVES),
    Case(
        _weights("float4_e2m1", "group", 32), InputScheme("float8_e4m3fn", True, "tensor"), HALVES, bias=False
    ),
    *_integers_alone(),
    *(
        Case(_weights(type, s), dtypes=HALVES)
        for type in ("hifloat8", "float8_e4m3fn")
        for s in ("tensor", "channel")
    ),
    Case(_weights("mxfp4_e2m1", "group", 32), dtypes=HALVES),
    *(Case(_weights(type, "group", 64), dtypes=HALVES) for type in ("float4_e2m1", "float4_e1m2")),
]
CONVOLUTIONS = [
    Case(_weights(type, s), InputScheme(type, True, "tensor"), conv=True)
    for type in ("hifloat8", "float8_e4m3fn")
    for s in ("tensor", "channel")
]


@dataclass
class Made:
    case: Case
    layer: nn.Linear | nn.Conv2d
    weight: QuantizedWeight
    inputs: InputParameters | None
    smooth_scales: Tensor | None
    deployed: Deployed

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    def exact(self, x: Tensor) -> Tensor:
        """What the layer has to give for ``x``, in float64."""
        weight = self.deployed.quantized_weight().dequantize()
        if self.case.inputs is None:
            weight = weight.to(self.dtype)  # the operator multiplies in the dtype of x
        values = _quantized_input(self, x).double()
        bias = None if self.layer.bias is None else self._bias(weight)
        if isinstance(self.layer, nn.Conv2d):
            kernel = weight.double().unflatten(1, self.layer.weight.shape[1:])
            c = self.layer
            return F.conv2d(values, kernel, bias, c.stride, c.padding, c.dilation, c.groups)
        return F.linear(values, weight.double(), bias)

    def _bias(self, weight: Tensor) -> Tensor:
        bias = self.layer.bias.detach().double()
        inputs = self.case.inputs
        if inputs is None or (inputs.type, inputs.strategy) != ("int8", "tensor"):
            return bias
        # Rounded to int32 in units of the product of the two scales.
        unit = (
            (_static_scale(self).double() * self.deployed.quantized_weight().scale.double()).float().double()
        )
        return (bias / unit).round() * unit


def _static_scale(made: Made) -> Tensor:
    """That of a static int8 input, which bfloat16 models keep in bfloat16 (but not beside smooth scales)."""
    assert made.inputs is not None
    narrow = made.dtype == torch.bfloat16 and made.smooth_scales is None
    return made.inputs.scale.bfloat16().float() if narrow else made.inputs.scale


def _quantized_input(made: Made, x: Tensor) -> Tensor:
    """``x`` quantized and dequantized, smoothing included."""
    scheme, smooth = made.case.inputs, made.smooth_scales
    if scheme is None or scheme.strategy == "group":
        x = x if smooth is None else x * smooth  # rounded: there is an operator behind that takes no factor
        return x if scheme is None else _microscaled(x.float(), scheme.type)
    if scheme.strategy == "tensor":
        assert made.inputs is not None
        scale = _static_scale(made) if scheme.type == "int8" else made.inputs.scale
        steps = x.float() / (scale if smooth is None else scale / smooth.float())
        if made.inputs.offset is not None:
            return ((steps + made.inputs.offset).round().clamp(-128, 127) - made.inputs.offset) * scale
        return qparams.nearest_numbers(steps, scheme.type) * scale
    if made.dtype == torch.float32 and scheme.type != "int8":
        x = x.bfloat16()
    values = x.float() if smooth is None else x.float() * smooth.float()
    top = {"int8": 127, "float8_e4m3fn": 448, "hifloat8": 15}[scheme.type]
    scale = values.abs().amax(-1, keepdim=True) / top
    steps = values / torch.where(scale == 0, 1.0, scale)
    return qparams.nearest_numbers(steps, scheme.type) * scale


def _microscaled(x: Tensor, type: str) -> Tensor:
    missing = -x.size(-1) % 32
    blocks = F.pad(x, (0, missing)).unflatten(-1, (-1, 32))
    exponent = formats.mx.shared_exponent(blocks.abs().amax(-1, keepdim=True), type, "floor")
    codes = formats.encode(torch.ldexp(blocks, -exponent), type)
    return torch.ldexp(formats.decode(codes, type), exponent).flatten(-2)[..., : x.size(-1)]


INPUTS, OUTPUTS = 96, 48


def make(
    case: Case,
    dtype: torch.dtype,
    bias: bool = True,
    smooth: bool = False,
    seed: int = 0,
    x: Tensor | None = None,
) -> Made:
    """A layer of a case, deployed; ``x`` is what a static input is calibrated with."""
    torch.manual_seed(seed)
    layer: nn.Linear | nn.Conv2d
    if case.conv:
        layer = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=bias)
    else:
        layer = nn.Linear(INPUTS, OUTPUTS, bias=bias and case.bias)
    layer = layer.to(dtype)
    return deployed_from(layer, case, smooth, example(case, dtype) if x is None else x)


def deployed_from(layer: nn.Linear | nn.Conv2d, case: Case, smooth: bool, x: Tensor) -> Made:
    smooth_scales = (torch.rand(x.size(-1)) + 0.5).to(x.dtype) if smooth else None
    weight = layer.weight.detach().flatten(1).float()
    smoothed = x.float()
    if smooth_scales is not None:
        weight, smoothed = weight / smooth_scales.float(), smoothed * smooth_scales.float()
    quantized = qparams.round_to_nearest(weight, case.weights, case.inputs)
    inputs = None
    if case.inputs is not None and not case.inputs.dynamic:
        low, high = smoothed.amin().reshape(1), smoothed.amax().reshape(1)
        if case.inputs.type == "int8":
            inputs = InputParameters(*qparams.integer_parameters(low, high, 8, case.inputs.symmetric))
        else:
            inputs = InputParameters(qparams.float_scale(torch.maximum(-low, high), case.inputs.type))
    made = deploy(layer, case.scheme, quantized, inputs, smooth_scales)
    return Made(case, layer, quantized, inputs, smooth_scales, made)


def example(case: Case, dtype: torch.dtype, *leading: int) -> Tensor:
    """An input with channels of different size; ``leading`` dimensions, two by default."""
    if case.conv:
        return torch.randn(*(leading or (2,)), 6, 9, 8).to(dtype)
    x = torch.randn(*(leading or (3, 5)), INPUTS) * torch.linspace(0.2, 3, INPUTS)
    return (x + 0.3).to(dtype)


ONE_OF_EACH = list({type(make(c, c.dtypes[0]).deployed): c for c in (*LINEAR, *CONVOLUTIONS)}.values())
"""One case for every kind of layer."""
