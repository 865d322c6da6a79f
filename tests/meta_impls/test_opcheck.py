"""The checks of ``_opcheck`` must be able to fail: each is shown an operator with the defect it looks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

Define = Callable[[Callable[[Tensor], Tensor]], None]


@pytest.fixture
def define() -> Iterator[Define]:
    """Define ``npu::defective(Tensor x) -> Tensor`` with the given fake, beside a kernel that doubles x."""
    with torch.library._scoped_library("npu", "FRAGMENT") as library:

        def with_fake(fake: Callable[[Tensor], Tensor]) -> None:
            library.define("defective(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
            library.impl("defective", lambda x: (x * 2).contiguous(), "CPU")
            torch.library.register_fake("npu::defective", fake, lib=library)

        yield with_fake


def test_a_sound_operator_passes(define: Define) -> None:
    define(lambda x: x.new_empty(x.shape))
    check_operator("defective", torch.randn(3, 4).T)
    compile_dynamic(torch.ops.npu.defective.default, lambda t: (torch.randn(t, 2),), [3, 5])


def test_a_wrong_dtype_is_seen(define: Define) -> None:
    define(lambda x: x.new_empty(x.shape, dtype=torch.float16))
    with pytest.raises(Exception, match=r"float16|Half"):
        check_operator("defective", torch.randn(3, 4))


def test_a_wrong_stride_is_seen(define: Define) -> None:
    define(torch.empty_like)
    with pytest.raises(Exception, match="Stride mismatch"):
        check_operator("defective", torch.randn(3, 4).T)


def test_a_specialized_size_is_seen(define: Define) -> None:
    define(lambda x: x.new_empty([int(size) for size in x.shape]))
    with pytest.raises(Exception, match=r"(?i)specializ"):
        compile_dynamic(torch.ops.npu.defective.default, lambda t: (torch.randn(t, 2),), [3, 5])


def test_a_missing_refusal_is_seen(define: Define) -> None:
    define(lambda x: x.new_empty(x.shape))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_refused("defective", "anything", torch.randn(3))
