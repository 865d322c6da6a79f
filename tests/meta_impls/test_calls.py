"""Which kernel answers a call, and which checks come before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion import kernels
from npu_fusion.meta_impls import _calls


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = _calls.CHOICE.kind
    _calls.CHOICE.kind = "compiled"
    yield
    _calls.CHOICE.kind = before


def operator(calls: list[str], *, takes: bool = True) -> Any:
    def fake(x: Tensor, option: Any = None) -> None:
        calls.append("fake")
        if x.dim() != 1:
            raise ValueError("x has the wrong rank")

    def compiled(x: Tensor, option: Any = None) -> Any:
        calls.append("compiled")
        return x if takes else NotImplemented

    def reference(x: Tensor, option: Any = None) -> Tensor:
        calls.append("reference")
        return x

    return _calls.checked("npu_example", fake, reference, compiled)


def test_checks_run_once_for_each_signature(calls: list[str]) -> None:
    call = operator(calls)
    call(torch.zeros(3))
    call(torch.ones(3))
    assert calls == ["fake", "compiled", "compiled"]
    for other in (torch.zeros(4), torch.zeros(3, dtype=torch.int8), torch.zeros(6)[::2]):
        calls.clear()
        call(other)
        assert calls == ["fake", "compiled"]


@pytest.mark.parametrize(
    "option, other", [(1, True), (1, 1.0), (0, None), ([1, 2], [2, 1]), ([1], 1), ("a", "b")]
)
def test_options_are_told_apart(calls: list[str], option: Any, other: Any) -> None:
    call = operator(calls)
    for given in (option, other):
        calls.clear()
        call(torch.zeros(3), given)
        assert calls[0] == "fake"
    calls.clear()
    call(torch.zeros(3), option)
    call(torch.zeros(3), option=option)
    call(torch.zeros(3), option=option)
    assert calls == ["compiled", "fake", "compiled", "compiled"]


def test_a_refused_call_is_refused_again(calls: list[str]) -> None:
    call = operator(calls)
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong rank"):
            call(torch.zeros(3, 3))
    assert calls == ["fake", "fake"]


def test_what_has_no_signature_is_always_checked(calls: list[str]) -> None:
    call = operator(calls)
    for _ in range(2):
        call(torch.zeros(3), object())
    assert calls == ["fake", "compiled"] * 2


def test_the_memory_of_signatures_is_bounded(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "_REMEMBERED", 2)
    call = operator(calls)
    for size in (1, 2, 3, 3, 1):
        call(torch.zeros(size))
    assert calls.count("fake") == 4


def test_the_reference_takes_what_the_compiled_kernel_does_not(calls: list[str]) -> None:
    operator(calls, takes=False)(torch.zeros(3))
    assert calls == ["fake", "compiled", "reference"]


def test_use(calls: list[str]) -> None:
    call = operator(calls)
    call(torch.zeros(3))
    calls.clear()
    with kernels.use("reference"):
        call(torch.zeros(3))
    call(torch.zeros(3))
    kernels.use("reference")
    call(torch.zeros(3))
    assert calls == ["reference", "compiled", "reference"]
    with pytest.raises(ValueError, match="kernels is 'fast'; accepted: 'compiled' or 'reference'"):
        kernels.use("fast")
    assert _calls.CHOICE.kind == "reference"


def test_use_again() -> None:
    quiet = kernels.use("reference")
    for _ in range(2):
        with quiet:
            assert _calls.CHOICE.kind == "reference"
            with quiet:
                assert _calls.CHOICE.kind == "reference"
            assert _calls.CHOICE.kind == "reference"
        assert _calls.CHOICE.kind == "compiled"


def test_exactly_is_for_the_calls_inside(calls: list[str]) -> None:
    call = operator(calls)
    call(torch.zeros(3))
    calls.clear()
    _calls.exactly(call)(torch.zeros(3))
    call(torch.zeros(3))
    assert calls == ["reference", "compiled"]


def test_autograd_gets_the_reference(calls: list[str]) -> None:
    call = operator(calls)
    x = torch.zeros(3, requires_grad=True)
    call(x)
    with torch.no_grad():
        call(x)
    call(x.detach())
    assert [c for c in calls if c != "fake"] == ["reference", "compiled", "compiled"]


def test_gradients_of_an_operator_with_a_compiled_kernel() -> None:
    x = torch.linspace(-2, 2, 128).view(2, 64).requires_grad_()
    torch.ops.npu.npu_swiglu(x).sum().backward()
    got, x.grad = x.grad, None
    left, right = x.chunk(2, -1)
    (torch.nn.functional.silu(left) * right).sum().backward()
    assert got is not None and x.grad is not None
    torch.testing.assert_close(got, x.grad)


@pytest.mark.parametrize("numerics, expected", [("strict", "reference"), ("accurate", "compiled")])
@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_strict_graphs_run_the_reference(
    numerics: str, expected: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import npu_fusion

    seen = []
    fast = _calls.fast
    monkeypatch.setattr(_calls, "fast", lambda: seen.append(fast()) or fast())
    backend = npu_fusion.get_npu_backend(fusion_config={"numerics": numerics}, host=host)

    @torch.compile(backend=backend)
    def model(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.npu.npu_dequant_swiglu_quant(x, weight_scale=scale, quant_mode=1)

    model(torch.ones(2, 8, dtype=torch.int32), torch.ones(8))
    assert seen == [expected == "compiled"]
    torch._dynamo.reset()
