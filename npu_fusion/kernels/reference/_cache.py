"""Writing rows into paged caches: what every operator that fills a KV cache shares.

A cache is [BlockNum, BlockSize, 1, H]. A slot counts its rows through all pages::

    slot = page * BlockSize + offset                          negative: the row is not written

    plain    cache[page, offset, 0, :] = row
    nz       the memory of a page is [H / d0][BlockSize][d0] with d0 = 32 bytes: column c of the row goes to
             element (c // d0) * BlockSize * d0 + offset * d0 + c % d0 of the page

Traps: an ``nz`` cache keeps the shape above, so PyTorch shows its elements in an order that is not theirs; d0
is 16 for bfloat16 and float16 but 32 for int8, so a quantized cache has another order. A negative slot is not
counted from the end. Devices leave open which of two rows with the same slot stays; here it is the last.

Source: public kernel sources (``service_scatter_cache.h`` of mla_prolog) and op-plugin documentation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion.meta_impls._cache import nz_width


def write_slots(cache: Tensor, rows: Tensor, slots: Tensor, *, nz: bool) -> None:
    """Write ``rows`` [R, H] in place into ``cache`` [BlockNum, BlockSize, 1, H] at ``slots`` int64 [R].

    ``cache`` may be strided; its trailing dimensions may be any whose product is H. Rows with a negative slot
    are skipped; of rows with the same slot the last wins. A cache without elements takes nothing. Raises
    ``ValueError`` for a slot beyond the cache.
    """
    pages, block = cache.shape[:2]
    if cache.numel() == 0 or slots.numel() == 0:
        return
    highest = int(slots.max())
    if highest >= pages * block:
        raise ValueError(
            f"cache: slot is {highest}; accepted: below {pages * block} ({pages} pages of {block} rows), "
            "negative for a row that is not written"
        )
    kept = last_of_each(slots)
    page, offset = slots[kept] // block, slots[kept] % block
    if not nz:
        cache[page, offset] = rows[kept].unflatten(-1, cache.shape[2:])
        return
    width, d0 = rows.shape[-1], nz_width(cache.dtype)
    column = torch.arange(width, device=cache.device)
    element = column // d0 * (block * d0) + offset.unsqueeze(1) * d0 + column % d0
    cache[page.unsqueeze(1), element // width, 0, element % width] = rows[kept]


def page_slots(pages: Tensor, tokens: Tensor, block: int) -> Tensor:
    """The slots, int64 [sum(tokens)], of sequences that fill pages of ``block`` rows from their beginning.

    ``tokens`` int64 [B] is the length of each sequence; ``pages`` is flat, ceil(length / block) page numbers
    for each sequence in turn. A negative page gives negative slots: its rows are not written.
    """
    sequence = torch.repeat_interleave(tokens)
    position = torch.arange(sequence.numel(), device=pages.device) - _starts(tokens)[sequence]
    first_page = _starts((tokens + block - 1) // block)
    return pages[first_page[sequence] + position // block] * block + position % block


def _starts(sizes: Tensor) -> Tensor:
    """Where each of consecutive parts of these sizes begins."""
    return sizes.cumsum(0) - sizes


def last_of_each(slots: Tensor) -> Tensor:
    """The positions (int64) of the last occurrence of each slot that is not negative.

    An indexed assignment with duplicates would let threads decide which row stays.
    """
    written = torch.nonzero(slots >= 0).squeeze(1)
    different, which = slots[written].unique(return_inverse=True)
    last = written.new_zeros(different.numel())
    return last.scatter_reduce_(0, which, written, "amax", include_self=False)
