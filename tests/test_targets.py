"""What a target names: which operators, in which form, each SoC and each release of torch_npu is given."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from npu_fusion import FusionConfig, _releases, targets
from npu_fusion._releases import RELEASES, SOCS, reaches
from npu_fusion.config import fusion_flags
from npu_fusion.explain import _shapes_only
from npu_fusion.meta_impls._registry import OPERATORS
from npu_fusion.passes import pipeline
from npu_fusion.passes.compose import mla_prolog
from npu_fusion.report import FusionReport
from npu_fusion.targets import TARGETS, choose, detect, missing, resolve
from tests.passes._harness import Outcome, fuse, fuse_only
from tests.passes._mla import Dims, Prolog, QuantizedProlog, Spelling, inputs
from tests.passes._mla_judge import separately
from tests.passes.test_kv_rmsnorm_rope_cache import PLAIN, Keys

npu = torch.ops.npu
BF16 = torch.bfloat16
V1, V2, V3 = "npu_mla_prolog", "npu_mla_prolog_v2", "npu_mla_prolog_v3_functional"
ALL = [(soc, release) for soc, first in SOCS.items() for release in RELEASES if reaches(release, first)]
DEVICE = Dims(B=1, S=2, He=7168, Hcq=1536, N=32, D=128, Dr=64, Hckv=512, page=16)


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def int8(x: Tensor) -> Tensor:
    return x.round().clamp(-128, 127).to(torch.int8)


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return int8(x.float() / scale), scale


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def normed(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    return F.rms_norm(total, (64,), g, 1e-6), total


def static_norm(a: Tensor, b: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    y, total = normed(a, b, g)
    return int8(y.float() / s.float()), total


def dynamic_norm(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, total = normed(a, b, g)
    return (*per_token(y), total)


def mlp(q: Tensor, w: Tensor, channels: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return per_token(swiglu(torch._int_mm(q, w).float() * channels * token))


def linear(q: Tensor, w: Tensor, channels: Tensor, token: Tensor) -> Tensor:
    return (torch._int_mm(q, w).float() * channels * token).to(BF16)


def bytes_(*shape: int) -> Tensor:
    return (20 * random(*shape, dtype=torch.float32)).round().to(torch.int8)


NORMED = (random(4, 64), random(4, 64), random(64))
PRODUCT = (bytes_(32, 48), bytes_(48, 64), torch.rand(64), torch.rand(32, 1))


def _prolog() -> tuple[Callable[..., Any], list[Tensor]]:
    model = Prolog(Spelling(down="matmul", up="matmul"), DEVICE)
    return model, inputs(model)


def _w8a8_prolog() -> tuple[Callable[..., Any], list[Tensor]]:
    model = QuantizedProlog("npu", DEVICE)
    return model, inputs(model)


def _keys() -> tuple[Callable[..., Any], list[Tensor]]:
    model = Keys(PLAIN, Dims(Hckv=512, Dr=64))
    return model, inputs(model)


MODELS: dict[str, Callable[[], tuple[Callable[..., Any], Any]]] = {
    "dequant_swiglu_quant": lambda: (mlp, PRODUCT),
    "swiglu_quant": lambda: (lambda x: per_token(swiglu(x)), (random(4, 64),)),
    "add_rms_norm_quant": lambda: (static_norm, (*NORMED, torch.full((64,), 0.02, dtype=BF16))),
    "add_rms_norm_dynamic_quant": lambda: (dynamic_norm, NORMED),
    "kv_rmsnorm_rope_cache": _keys,
    "mla_prolog": _prolog,
    "mla_prolog, W8A8": _w8a8_prolog,
}

Emitted = dict[str, int]
EVERYWHERE: dict[str, dict[str, Emitted]] = {
    "dequant_swiglu_quant": {"7.0": {"npu_dequant_swiglu_quant": 1}},
    "swiglu_quant": {"7.0": {"npu_swiglu": 1, "npu_dynamic_quant": 1}, "7.2": {"npu_swiglu_quant": 1}},
    "add_rms_norm_quant": {
        "7.0": {"npu_add_rms_norm": 1, "npu_quantize": 1},
        "7.1": {"npu_add_rms_norm_quant": 1},
    },
    "add_rms_norm_dynamic_quant": {
        "7.0": {"npu_add_rms_norm": 1, "npu_dynamic_quant": 1},
        "7.2": {"npu_add_rms_norm_dynamic_quant": 1},
    },
    "kv_rmsnorm_rope_cache": {
        "7.0": {"npu_kv_rmsnorm_rope_cache": 1},
        "7.2": {"npu_kv_rmsnorm_rope_cache_v2_functional": 1},
    },
}
"""Fusion -> release -> what is emitted from then on."""
BY_SOC: dict[str, dict[str, dict[str, Emitted]]] = {
    "mla_prolog": {
        "ascend910b": {"7.0": {V1: 1}, "7.1": {V2: 1}, "26.1": {V3: 1}},
        "ascend910_93": {"7.0": {V1: 1}, "7.1": {V2: 1}, "7.3": {V3: 1}},
        "ascend950": {"26.0": {V3: 1}},
    },
    "mla_prolog, W8A8": {
        "ascend910b": {"7.0": {}, "7.1": {}, "7.2": {V2: 1}, "26.1": {V3: 1}},
        "ascend910_93": {"7.0": {}, "7.1": {}, "7.2": {V2: 1}, "7.3": {V3: 1}},
        "ascend950": {"26.0": {V3: 1}},
    },
}


def since(table: dict[str, Any], release: str) -> Any:
    return table[[first for first in table if reaches(release, first)][-1]]


@functools.lru_cache
def captured(name: str) -> fx.GraphModule:
    """The graph of a model, of which nothing is executed."""
    found: list[fx.GraphModule] = []

    def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
        found.append(gm)
        return make_boxed_func(_shapes_only(gm))

    model, args = MODELS[name]()
    backend = aot_autograd(fw_compiler=compiler, keep_inference_input_mutations=True)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        torch.compile(model, backend=backend, dynamic=False, fullgraph=True)(*args)
    return found[0]


def dry_run(name: str, target: str) -> FusionReport:
    """What would be made of a model; only by its own fusion where others have a share in it, too."""
    flags = {flag: name.startswith(flag) for flag in fusion_flags()} if name.startswith(("mla", "kv")) else {}
    config = FusionConfig(target=target, dry_run=True, strict=True, **flags)
    return pipeline.run(captured(name).graph, config)


@pytest.mark.parametrize("name", MODELS)
def test_what_each_target_is_given(name: str) -> None:
    for soc, release in ALL:
        table = EVERYWHERE[name] if name in EVERYWHERE else BY_SOC[name][soc]
        report = dry_run(name, f"{soc}-{release}")
        assert report.fused == since(table, release), (soc, release, report.refused)


def test_a_soc_alone_means_the_latest_release() -> None:
    for soc in SOCS:
        assert TARGETS[soc] == TARGETS[f"{soc}-{RELEASES[-1]}"]
        for name in MODELS:
            assert dry_run(name, soc).fused == dry_run(name, f"{soc}-{RELEASES[-1]}").fused


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        (
            "swiglu_quant",
            "ascend910b-7.1",
            "npu_swiglu_quant came with torch_npu 7.2, the target has 7.1",
        ),
        (
            "add_rms_norm_quant",
            "ascend910_93-7.0",
            "npu_add_rms_norm_quant came with torch_npu 7.1, the target has 7.0",
        ),
        (
            "add_rms_norm_dynamic_quant",
            "ascend910b-7.0",
            "npu_add_rms_norm_dynamic_quant came with torch_npu 7.2, the target has 7.0",
        ),
        ("mla_prolog, W8A8", "ascend910b-7.0", "npu_mla_prolog in torch_npu 7.0: weight_quant_mode 2"),
        ("mla_prolog, W8A8", "ascend910_93-7.1", "npu_mla_prolog_v2 in torch_npu 7.1: weight_quant_mode 2"),
    ],
)
def test_the_report_says_what_the_release_lacks(name: str, target: str, reason: str) -> None:
    fusion = name.partition(",")[0]
    assert reason in [r.detail for r in dry_run(name, target).refused if r.fusion == fusion]


def same(outcome: Outcome, rtol: float = 2e-2) -> None:
    for have, want in zip(outcome.result, outcome.expected, strict=True):
        torch.testing.assert_close(have, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("target", "spelled"), [("ascend910b-7.3", "torch.bfloat16"), ("ascend910b", "15")])
def test_a_dtype_as_the_release_spells_it(target: str, spelled: str) -> None:
    outcome = fuse(linear, PRODUCT, target=target, verify=True)
    assert outcome.fused == {"npu_quant_matmul": 1}
    assert f"output_dtype = {spelled})" in outcome.code
    same(outcome)


@pytest.mark.parametrize(("target", "spelled"), [("ascend910_93-7.0", "torch.int32"), ("ascend910_93", "3")])
def test_an_int32_product_as_the_release_spells_it(target: str, spelled: str) -> None:
    def called(q: Tensor, w: Tensor, channels: Tensor, token: Tensor) -> Any:
        rows = npu.npu_quant_matmul(q, w, channels, pertoken_scale=token.view(-1), output_dtype=BF16)
        return npu.npu_dynamic_quant(npu.npu_swiglu(rows))

    outcome = fuse(called, PRODUCT, target=target)
    assert outcome.fused == {"npu_dequant_swiglu_quant": 1}
    assert f"output_dtype = {spelled})" in outcome.code


@pytest.mark.parametrize(("target", "spelled"), [("ascend910b-7.0", "torch.qint8"), ("ascend910b", "1")])
def test_int8_of_a_static_quantization(target: str, spelled: str) -> None:
    x, s = random(4, 64), torch.full((64,), 0.02)
    outcome = fuse(lambda x, s: int8(x.float() / s), (x, s), target=target, verify=True)
    assert outcome.fused == {"npu_quantize": 1}
    assert f"None, {spelled}, -1" in outcome.code
    assert torch.equal(outcome.result, outcome.expected)


def test_the_older_cache_operator_gives_the_same_caches() -> None:
    model, args = _keys()
    outcome = fuse_only("kv_rmsnorm_rope_cache", separately(model), args, target="ascend910b-7.1")
    assert outcome.fused == {"npu_kv_rmsnorm_rope_cache": 1}
    same(outcome)
    for have, want in zip(args[4:], outcome.result, strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize(("target", "fused"), [("ascend910b-7.1", 0), ("ascend910b-7.2", 1)])
def test_what_it_overwrites_may_not_be_read(target: str, fused: int) -> None:
    model, args = _keys()

    def fn(*args: Tensor) -> Any:
        before = args[4].float().sum()
        return (*model(*args), before)

    outcome = fuse_only("kv_rmsnorm_rope_cache", separately(fn), args, target=target)
    assert sum(outcome.fused.values()) == fused
    same(outcome)


def test_quantized_weights_in_an_older_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, which no target takes, so the version is chosen here."""
    monkeypatch.setattr(mla_prolog, "choose", lambda target, *names: V2)
    model = QuantizedProlog("npu", Dims(B=6, S=3))
    outcome = fuse_only("mla_prolog", separately(model), inputs(model))
    assert outcome.fused == {V2: 1}, outcome.report.refused
    same(outcome, rtol=4e-2)


def test_every_name_in_the_tables_is_declared() -> None:
    for name in (*_releases.OPERATORS, *_releases.ARGUMENTS, *_releases.ELSEWHERE, *_releases.IGNORED):
        assert name in OPERATORS
    declared = {name: {a.name for a in op.overload._schema.arguments} for name, op in OPERATORS.items()}
    for name, arguments in _releases.ARGUMENTS.items():
        assert set(arguments) <= declared[name]
        assert set(arguments.values()) <= set(RELEASES)
    for name, by_soc in _releases.IGNORED.items():
        assert set(by_soc) <= set(SOCS)
        assert all(set(arguments) <= declared[name] for arguments in by_soc.values())


DSQ = npu.npu_dequant_swiglu_quant.default


@pytest.mark.parametrize(
    ("target", "call", "positions", "names", "why"),
    [
        ("ascend910b-7.1", DSQ, 1, ("bias", "quant_mode"), None),
        (
            "ascend910b-7.1",
            DSQ,
            1,
            ("swiglu_mode",),
            "argument swiglu_mode of npu_dequant_swiglu_quant came with torch_npu 7.2, the target has 7.1",
        ),
        ("ascend910b-7.2", DSQ, 1, ("swiglu_mode",), None),
        (
            "ascend950",
            DSQ,
            1,
            ("swiglu_mode",),
            "npu_dequant_swiglu_quant ignores swiglu_mode on ascend950",
        ),
        ("ascend910b", DSQ, 1, ("dst_type",), "npu_dequant_swiglu_quant ignores dst_type on ascend910b"),
        ("ascend950", DSQ, 1, ("dst_type",), None),
        ("ascend950", npu.npu_mla_prolog_v2.default, 12, (), f"{V2} does not run on ascend950"),
        ("ascend950-26.0", npu.npu_mla_prolog.default, 12, (), f"{V1} does not run on ascend950"),
        (
            "ascend910b-7.3",
            npu.npu_mla_prolog_v3_functional.default,
            11,
            (),
            f"{V3} is for ascend910b from torch_npu 26.1 on, the target has 7.3",
        ),
        ("ascend910_93-7.3", npu.npu_mla_prolog_v3_functional.default, 11, ("cache_index",), None),
        (
            "ascend910_93-26.0",
            npu.npu_mla_prolog_v3_functional.default,
            11,
            ("kv_cache_dtype",),
            f"argument kv_cache_dtype of {V3} came with torch_npu 26.1, the target has 26.0",
        ),
        # scales2 by position is beta since 7.2: what stands behind a younger argument is refused with it.
        (
            "ascend910b-7.1",
            npu.npu_add_rms_norm_quant.default,
            6,
            (),
            "argument beta of npu_add_rms_norm_quant came with torch_npu 7.2, the target has 7.1",
        ),
        ("ascend910b-7.1", npu.npu_add_rms_norm_quant.default, 5, ("scales2", "epsilon"), None),
        ("ascend910b-7.3", npu.npu_rotary_mul.default, 4, (), None),
        (
            "ascend910b-7.3",
            npu.npu_rotary_mul.default,
            5,
            (),
            "argument rotate of npu_rotary_mul came with torch_npu 26.0, the target has 7.3",
        ),
        ("ascend910b-7.0", torch.ops.aten.mm.default, 2, (), None),
        ("ascend910b-7.0", len, 1, (), None),
        (None, npu.npu_mla_prolog_v3_functional.default, 11, ("kv_cache_dtype",), None),
    ],
)
def test_missing(
    target: str | None, call: Any, positions: int, names: tuple[str, ...], why: str | None
) -> None:
    named = None if target is None else TARGETS[target]
    assert missing(named, call, [None] * positions, dict.fromkeys(names)) == why


@pytest.mark.parametrize(
    ("target", "operator", "limits"),
    [
        ("ascend910b-7.0", V1, {"heads": (32, 64, 128), "weight_modes": (0,), "max_length": 16}),
        ("ascend910b-7.1", V2, {"heads": (8, 16, 32, 64, 128), "weight_modes": (0, 1), "hidden": (7168,)}),
        ("ascend910b-7.3", V2, {"heads": (1, 2, 4, 8, 16, 32, 64, 128), "block": (16, 128)}),
        ("ascend910_93-26.0", V3, {"hidden": (7168, 7680), "nope": (128,), "max_length": None}),
        ("ascend950", V3, {"query_rank": (1536, 2048), "nope": (128, 192), "max_length": None}),
    ],
)
def test_limits_of_the_versions(target: str, operator: str, limits: dict[str, Any]) -> None:
    found = TARGETS[target].mla(operator)
    assert {name: getattr(found, name) for name in limits} == limits


def test_resolve() -> None:
    assert resolve(FusionConfig()) is None
    assert resolve(FusionConfig(target="ascend950-26.0")) == TARGETS["ascend950-26.0"]
    with pytest.raises(ValueError, match=r"target is 'ascend950-7.3'; accepted: None, 'ascend910b'"):
        FusionConfig(target="ascend950-7.3")


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that a torch_npu without some operators, and a device with this SoC number, are there."""

    def pretend(number: int | None, lacks: tuple[str, ...] = ()) -> None:
        device = types.SimpleNamespace(
            is_available=lambda: number is not None,
            utils=types.SimpleNamespace(get_soc_version=lambda: number),
        )
        module = types.SimpleNamespace(npu=device, __version__="2.7.1")
        monkeypatch.setitem(sys.modules, "torch_npu", module)  # type: ignore[arg-type]
        monkeypatch.setattr(targets, "_of_torch_npu", lambda operator: operator not in lacks)

    return pretend


LACKING = {
    release: tuple(op for op, first in _releases.OPERATORS.items() if not reaches(release, first))
    for release in RELEASES
}


@pytest.mark.parametrize(
    ("number", "release", "name"),
    [
        (220, "7.0", "ascend910b-7.0"),
        (225, "7.1", "ascend910b-7.1"),
        (250, "7.2", "ascend910_93-7.2"),
        (256, "26.1", "ascend910_93-26.1"),
        (260, "26.1", "ascend950-26.1"),
        (260, "7.2", "ascend950-26.0"),
        (None, "26.1", None),
    ],
)
def test_detect(torch_npu: Callable[..., None], number: int | None, release: str, name: str | None) -> None:
    torch_npu(number, LACKING[release])
    assert detect() == name


def test_detect_without_torch_npu() -> None:
    assert "torch_npu" not in sys.modules
    assert detect() is None


@pytest.mark.parametrize("number", [104, 202, 241])
def test_detect_an_unknown_family(torch_npu: Callable[..., None], number: int) -> None:
    torch_npu(number)
    with pytest.warns(RuntimeWarning, match=f"SoC version {number}, whose limits npu_fusion does not know"):
        assert detect() is None


def test_the_installed_torch_npu_decides_besides(torch_npu: Callable[..., None]) -> None:
    torch_npu(None, lacks=(V3, "npu_swiglu_quant"))
    assert choose(None, V3, V2, V1) == V2
    assert choose(TARGETS["ascend910b"], V3, V2, V1) == V2
    why = "the torch_npu at hand (2.7.1) has no npu_swiglu_quant"
    for target in (None, TARGETS["ascend910b"]):
        assert missing(target, npu.npu_swiglu_quant.default) == why
        assert missing(target, npu.npu_swiglu.default) is None
    unknown = "the npu_swiglu at hand has no argument limit"
    assert missing(None, npu.npu_swiglu.default, (), {"limit": 7.0}) == unknown
    assert choose(TARGETS["ascend950"], V2, V1) == V2  # none is there: the gate says why
