"""npu_format_cast: the same values in another storage format of the NPU.

Shape, dtype and values as PyTorch sees them do not change; only the order of the bytes in device memory does
(``acl_format`` 29, FRACTAL_NZ, is the one that matrix operands profit from). The CPU has no such formats:
here it copies. It must be a copy, as the schema says that the result does not alias the input; it is
contiguous.

``customize_dtype`` and ``input_dtype`` only tell the device how wide the logical elements are when it
chooses a layout; here they do nothing.

Source: op-plugin documentation; Meta implementation of ``_npu_format_cast`` and the ``Format`` enumeration of
torch_npu 2.13.0.
"""

from __future__ import annotations

from torch import Tensor

from npu_fusion.meta_impls._checks import check_choice
from npu_fusion.meta_impls._registry import operator

FRACTAL_NZ = 29

# NCHW, NHWC, ND, NC1HWC0, FRACTAL_Z, NC1HWC0_C04, HWCN, NDHWC, FRACTAL_NZ, NCDHW, NDC1HWC0, FRACTAL_Z_3D, NC,
# NCL, FRACTAL_NZ_C0_16, _32, _2, _4, _8.
_ACL_FORMATS = (0, 1, 2, 3, 4, 12, 16, 27, FRACTAL_NZ, 30, 32, 33, 35, 47, 50, 51, 52, 53, 54)


@operator(
    "npu_format_cast(Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) "
    "-> Tensor"
)
def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """A contiguous tensor of the shape and dtype (any) of ``input``.

    ``acl_format`` is a value of torch_npu's ``Format`` enumeration; ``ValueError`` for another.
    """
    check_choice("npu_format_cast", "acl_format", acl_format, _ACL_FORMATS)
    return input.new_empty(input.shape)


@operator(
    "npu_format_cast.Tensor(Tensor input, Tensor dst, *, int? customize_dtype=None, int? input_dtype=None) "
    "-> Tensor"
)
def npu_format_cast_tensor(
    input: Tensor, dst: Tensor, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """As :func:`npu_format_cast`, with the format that ``dst`` (any shape and dtype) has."""
    return input.new_empty(input.shape)
