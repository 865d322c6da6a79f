from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules import Deployed, deploy, empty, share
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme
from tests.quantization.modules._cases import (
    CONVOLUTIONS,
    FLOATS,
    LINEAR,
    ONE_OF_EACH,
    Case,
    Made,
    example,
    make,
)

ALL = [*LINEAR, *CONVOLUTIONS]
EVERY = [
    pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")
    for case in ALL
    for dtype in case.dtypes
]
EVERY_LINEAR = [p for p in EVERY if not p.values[0].conv]


def assert_one_rounding(made: Made, x: Tensor) -> None:
    """Equal to float64 up to the rounding to the dtype of x, and what fp32 sums lose before it."""
    y, exact = made.deployed(x), made.exact(x)
    assert (y.dtype, y.shape) == (x.dtype, exact.shape)
    sums = 2.0**-20 * exact.abs().max().item()
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(x.dtype).eps / 2 * 1.01 + 2e-6, atol=sums)


@pytest.mark.parametrize(("case", "dtype"), EVERY)
@pytest.mark.parametrize("bias", [True, False])
def test_matches_float64(case: Case, dtype: torch.dtype, bias: bool) -> None:
    made = make(case, dtype, bias)
    assert_one_rounding(made, example(case, dtype))
    # Values that calibration has not seen are beyond the range of a static scale.
    assert_one_rounding(made, 3 * example(case, dtype))


@pytest.mark.parametrize(("case", "dtype"), EVERY_LINEAR)
def test_matches_float64_with_smoothing(case: Case, dtype: torch.dtype) -> None:
    made = make(case, dtype, smooth=True)
    assert_one_rounding(made, example(case, dtype))


@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_is_close_to_the_float_layer(case: Case, dtype: torch.dtype) -> None:
    """The oracle shares the weight with the layer, so that is compared with what was to be quantized."""
    made = make(case, dtype, smooth=not case.conv)
    x = example(case, dtype)
    y, exact = made.deployed(x).double(), made.layer.double()(x.double()).detach()
    worst = 0.2 if "4" in (case.weights.type.removesuffix("_e4m3fn")) else 0.06
    assert (y - exact).norm() <= worst * exact.norm()


@pytest.mark.parametrize(("case", "dtype"), EVERY)
@pytest.mark.parametrize("smooth", [False, True])
def test_the_weight_is_the_one_that_was_given(case: Case, dtype: torch.dtype, smooth: bool) -> None:
    if smooth and case.conv:
        return
    made = make(case, dtype, smooth=smooth)
    given, kept = made.weight, made.deployed.quantized_weight()
    assert kept.scheme == given.scheme
    assert kept.codes.dtype == given.codes.dtype
    assert torch.equal(kept.codes.view(torch.uint8), given.codes.view(torch.uint8))
    # Where an operator has fewer digits for a scale, it is the nearest one.
    digits = (
        {torch.float16: 11, torch.bfloat16: 8}[dtype]
        if case.inputs is None and dtype != torch.float32
        else 24
    )
    if case.conv:
        digits = 11
    assert kept.scale.shape == given.scale.shape
    torch.testing.assert_close(kept.scale, given.scale, rtol=1.01 * 2.0**-digits, atol=2.0**-25)
    for name, tolerance in (("offset", 0.0), ("channel_scale", 2.0**-11)):
        before, after = getattr(given, name), getattr(kept, name)
        assert (before is None) == (after is None)
        if before is not None:
            torch.testing.assert_close(after, before, rtol=tolerance, atol=0)


@pytest.mark.parametrize(("case", "dtype"), EVERY)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smooth", [False, True])
def test_description_and_state_dict_make_the_same_layer(
    case: Case, dtype: torch.dtype, bias: bool, smooth: bool
) -> None:
    if smooth and case.conv:
        return
    made = make(case, dtype, bias, smooth)
    x = example(case, dtype)
    expected = made.deployed(x)
    again = empty(json.loads(json.dumps(made.deployed.describe())))
    assert type(again) is type(made.deployed)
    assert again.scheme == made.deployed.scheme
    assert not torch.equal(again(x), expected)
    again.load_state_dict(made.deployed.state_dict())
    assert torch.equal(again(x), expected)
    assert again.describe() == made.deployed.describe()
    assert repr(again) == repr(made.deployed)
    for copied in (copy.deepcopy(made.deployed), pickle.loads(pickle.dumps(made.deployed))):
        assert torch.equal(copied(x), expected)


@pytest.mark.parametrize("case", LINEAR, ids=str)
@pytest.mark.parametrize(
    "leading", [(7,), (2, 3), (2, 1, 3), (1, 2, 1, 2), (2, 1, 1, 2, 1), (0,), (2, 0), ()]
)
def test_leading_dimensions(case: Case, leading: tuple[int, ...]) -> None:
    made = make(case, torch.bfloat16)
    x = example(case, torch.bfloat16, *leading) if leading else example(case, torch.bfloat16, 1)[0]
    y = made.deployed(x)
    assert y.shape == (*leading, made.layer.weight.size(0))
    assert torch.equal(y.flatten(0, -2) if leading else y[None], made.deployed(x.reshape(-1, x.size(-1))))


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_strided_input(case: Case) -> None:
    made = make(case, torch.bfloat16)
    x = example(case, torch.bfloat16, 4, 3).transpose(0, 1)
    assert not x.is_contiguous()
    assert torch.equal(made.deployed(x), made.deployed(x.contiguous()))


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_one_image_and_none(case: Case) -> None:
    made = make(case, torch.bfloat16)
    x = example(case, torch.bfloat16)
    assert torch.equal(made.deployed(x[0]), made.deployed(x)[0])
    assert made.deployed(x[:0]).shape == (0, *made.deployed(x).shape[1:])


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=() if c in ONE_OF_EACH else pytest.mark.slow) for c in ALL]
)
@pytest.mark.parametrize("smooth", [False, True])
def test_one_graph_for_any_number_of_tokens(case: Case, smooth: bool) -> None:
    if smooth and case.conv:
        return
    torch._dynamo.reset()
    made = make(case, torch.bfloat16, smooth=smooth)
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(gm)
        return gm

    compiled = torch.compile(
        made.deployed, backend=aot_autograd(fw_compiler=keep), dynamic=True, fullgraph=True
    )
    with torch.no_grad():
        for tokens in (3, 5, 17):
            x = example(case, torch.bfloat16, tokens)
            assert torch.equal(compiled(x), made.deployed(x))
    (graph,) = graphs
    # Nothing that was known when the layer was made is computed: buffers are used as they are, but for views.
    buffers = {n for n in graph.graph.nodes if n.op == "placeholder" and is_buffer(n.meta["val"])}
    assert buffers
    views = {"aten.t.default", "aten.view.dtype", "aten.transpose.int", "aten.unsqueeze.default"}
    if smooth:
        views.add("aten._to_copy.default")  # which the fusions take into the quantization
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and buffers.issuperset(node.all_input_nodes):
            assert str(node.target) in views, node.format_node()


def is_buffer(value: Any) -> bool:
    return isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_layer_is_left_as_it_is(case: Case) -> None:
    made = make(case, torch.bfloat16)
    layer = copy.deepcopy(made.layer).eval()
    before = copy.deepcopy(layer.state_dict())
    deployed = deploy(layer, case.scheme, made.weight, made.inputs)
    assert not deployed.training
    assert not list(deployed.parameters())
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
    memory = {t.untyped_storage().data_ptr() for t in layer.parameters()}
    assert not memory & {t.untyped_storage().data_ptr() for t in deployed.buffers()}


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_other_dtypes_of_the_model_leave_codes_and_scales(
    case: Case, change: Callable[[nn.Module], nn.Module]
) -> None:
    made = make(case, torch.bfloat16, smooth=not case.conv)
    before = {name: (t.dtype, t.clone()) for name, t in made.deployed.named_buffers()}
    change(made.deployed)
    for name, tensor in made.deployed.named_buffers():
        assert tensor.dtype == before[name][0]
        assert torch.equal(tensor, before[name][1])


def dynamic(names: str = "int8") -> Case:
    return next(
        c for c in LINEAR if c.inputs is not None and c.inputs.strategy == "token" and c.weights.type == names
    )


def static() -> Case:
    return next(c for c in LINEAR if str(c) == "int8-channel-x-int8-tensor-asym")


def siblings(case: Case, smooth: bool) -> list[Deployed]:
    torch.manual_seed(3)
    x = example(case, torch.bfloat16)
    first = make(case, torch.bfloat16, smooth=smooth, x=x)
    second = make(case, torch.bfloat16, seed=1, x=x)
    again = deploy(second.layer, case.scheme, second.weight, first.inputs, first.smooth_scales)
    return [first.deployed, again]


def test_siblings_share_what_belongs_to_their_input() -> None:
    one, other = siblings(dynamic(), smooth=True)
    assert one.smooth_scales is other.smooth_scales
    one, other = siblings(static(), smooth=False)
    share([one, nn.Identity(), other])
    assert one.input_scale is other.input_scale
    assert one.input_offset is other.input_offset
    assert one.weight is not other.weight


def test_what_is_not_equal_is_not_shared() -> None:
    one, other = siblings(static(), smooth=False)
    other.input_scale += 1
    kept = other.input_scale
    share([one, other])
    assert other.input_scale is kept
    assert one.input_offset is other.input_offset
    meta = copy.deepcopy(one).to("meta")
    share([one, meta])
    assert meta.input_offset.is_meta


@pytest.mark.parametrize("smooth", [False, True])
def test_sharing_survives_moving_copying_and_pickling(smooth: bool) -> None:
    model = nn.ModuleList(siblings(dynamic() if smooth else static(), smooth))
    share([*model])
    name = "smooth_scales" if smooth else "input_scale"

    def tied(model: nn.ModuleList) -> bool:
        return getattr(model[0], name) is getattr(model[1], name)

    assert tied(copy.deepcopy(model))
    assert tied(pickle.loads(pickle.dumps(model)))
    before = getattr(model[0], name).detach()  # holds the memory, so that it is not given to another
    model._apply(lambda t: t.clone())  # as Module.to does for another device
    assert tied(model)
    assert getattr(model[0], name).data_ptr() != before.data_ptr()
    assert model[0].state_dict().keys() == model[1].state_dict().keys()


LAYER = nn.Linear(64, 32)
CODES = torch.zeros(32, 64, dtype=torch.int8)
GIVEN = QuantizedWeight(WeightScheme("int8"), CODES, torch.ones(32))
TOKEN, TENSOR = InputScheme("int8", True, "token"), InputScheme("int8", True, "tensor")


def refuse(message: str, error: type[Exception] = ValueError, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "layer": LAYER,
        "scheme": Scheme(WeightScheme("int8"), TOKEN),
        "weight": GIVEN,
    }
    with pytest.raises(error, match=message):
        deploy(**(arguments | changes))


def test_deploy_refuses() -> None:
    refuse(
        "layer is a Bilinear; accepted: torch.nn.Linear, torch.nn.Conv2d",
        TypeError,
        layer=nn.Bilinear(2, 2, 2),
    )
    refuse(
        r"scheme is int8 weights \(channel\), hifloat8 inputs \(token\) for a Linear; no layer has it",
        scheme=Scheme(WeightScheme("int8"), InputScheme("hifloat8", True, "token")),
    )
    refuse("for a Conv2d; no layer has it", layer=nn.Conv2d(3, 3, 1))
    refuse("layer.weight is float64; accepted: float16, bfloat16, float32", layer=nn.Linear(64, 32).double())
    refuse("weight has the scheme .*'tensor'", scheme=Scheme(WeightScheme("int8", strategy="tensor"), TOKEN))
    refuse(r"weight has shape \[32, 64\]; accepted: \[32, 65\]", layer=nn.Linear(65, 32))
    scale = torch.ones(1)
    refuse("inputs is given; accepted: None with this scheme", inputs=InputParameters(scale))
    fixed = Scheme(WeightScheme("int8"), TENSOR)
    refuse("inputs is None; accepted: InputParameters with a static input", scheme=fixed)
    for wrong in (torch.zeros(1), torch.ones(2), torch.full((1,), torch.inf), torch.ones(1).double()):
        refuse("inputs.scale is .*; accepted: one positive", scheme=fixed, inputs=InputParameters(wrong))
    offset = torch.zeros(1, dtype=torch.int32)
    refuse(
        r"inputs.offset is int32 \[1\]; accepted: None", scheme=fixed, inputs=InputParameters(scale, offset)
    )
    asymmetric = Scheme(WeightScheme("int8"), InputScheme("int8", False, "tensor"))
    refuse(r"inputs.offset is None; accepted: int32 \[1\]", scheme=asymmetric, inputs=InputParameters(scale))
    refuse(r"smooth_scales is float32 \[3\]; accepted: float32 \[64\]", smooth_scales=torch.ones(3))
    refuse(r"smooth_scales is bfloat16 \[64\]; accepted", smooth_scales=torch.ones(64).bfloat16())
    refuse("smooth_scales has numbers that are not positive", smooth_scales=torch.zeros(64))
    refuse(
        r"weight_scale is float32 \[31\]; accepted: float32 \[32\]",
        weight=QuantizedWeight(WeightScheme("int8"), CODES, torch.ones(31)),
    )


def test_a_convolution_has_no_smooth_scales() -> None:
    made = make(CONVOLUTIONS[0], torch.float32)
    with pytest.raises(ValueError, match="smooth_scales is given for a convolution; accepted: None"):
        deploy(made.layer, made.case.scheme, made.weight, made.inputs, torch.ones(6))


DESCRIPTION = make(dynamic(), torch.float32).deployed.describe()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kind": "linear"}, ValueError, "kind is 'linear'; accepted: .*w8a8_dynamic_linear"),
        ({"kind": 3}, TypeError, "kind is 3; accepted: str"),
        ({"in_features": 0}, ValueError, "in_features is 0; accepted: at least 1"),
        ({"in_features": True}, TypeError, "in_features is True; accepted: int"),
        ({"bias": 1}, TypeError, "bias is 1; accepted: bool"),
        (
            {"smooth_scales": "int8"},
            ValueError,
            "smooth_scales is 'int8'; accepted: float16, bfloat16, float32",
        ),
        ({"color": "red"}, ValueError, "has no entry 'color'"),
        ({"scheme": None}, TypeError, "scheme is None; accepted: dict"),
        ({"scheme": {}}, ValueError, "description.scheme: weights is missing"),
    ],
)
def test_empty_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        empty(DESCRIPTION | changes)
    with pytest.raises(TypeError, match="description: is a list; accepted: a dict"):
        empty([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="description: kind is missing"):
        empty({})


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("weights", {"type": "int2"}, "description.scheme.weights: type is 'int2'; accepted: hifloat8"),
        ("weights", {"strategy": "row"}, "strategy is 'row'; accepted: tensor, channel, group"),
        ("weights", {"group_size": 32}, "has no entry 'group_size'"),
        ("weights", {"strategy": "group"}, "group_size is missing"),
        ("inputs", {"strategy": "channel"}, "description.scheme.inputs: strategy is 'channel'"),
    ],
)
def test_empty_refuses_schemes(part: str, changes: dict[str, Any], message: str) -> None:
    description = copy.deepcopy(DESCRIPTION)
    description["scheme"][part].update(changes)
    with pytest.raises(ValueError, match=message):
        empty(description)


def test_a_description_of_another_layer_does_not_fit_the_kind() -> None:
    """A scheme that the kind does not have is refused, not built."""
    description = copy.deepcopy(DESCRIPTION)
    description["scheme"]["weights"]["type"] = "int4"
    with pytest.raises(ValueError, match="scheme is int4 weights .*; w8a8_dynamic_linear has it not"):
        empty(description)


@pytest.mark.parametrize("dtype", FLOATS)
def test_refuses_inputs_of_other_dtypes(dtype: torch.dtype) -> None:
    for case in ALL:
        if dtype not in case.dtypes:
            continue
        made = make(case, dtype)
        with pytest.raises(ValueError, match=r"x has dtype torch\.float64; accepted: torch"):
            made.deployed(example(case, torch.float64))
        with pytest.raises(ValueError, match="x has shape"):
            made.deployed(example(case, dtype)[..., 1:, :, :] if case.conv else example(case, dtype)[..., 1:])
