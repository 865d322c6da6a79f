"""Is a rotation that of the operators of multi-head latent attention: of adjacent pairs, into halves?

A model that keeps the rotated pairs side by side has the same scores, but another order in its cache.
``cache_layout="npu"`` allows the operator's order. Then no graph may write pairs into such a cache:
:func:`kept_pairs` finds those that would.
"""

from __future__ import annotations

from npu_fusion.passes.compose._mla_sites import Turn, bare, sites
from npu_fusion.passes.pattern import Context, Refused

_SIDE_BY_SIDE = ("interleave", "complex")


def other_rotation(turn: Turn, *, pairs: bool = False) -> Refused | None:
    """Why the operators do not rotate like this, or None. ``pairs``: pairs may become halves, since the query
    is rewritten as well."""
    if turn.mode == "half":
        return Refused(
            "halves are rotated, the operator rotates adjacent pairs",
            "npu_fusion.prepare(model) permutes the weights for it",
            (turn.term,),
        )
    if turn.mode in _SIDE_BY_SIDE and not pairs:
        return Refused(
            "rotated pairs are stored side by side, the operator stores halves",
            "mla_prolog with cache_layout='npu' may use another order in the cache",
            (turn.term,),
        )
    last = turn.at.dims[-1]
    if not turn.sorted and (len(last) != 1 or last[0].step != 1):
        return Refused("the rotated columns are in another order", "", (turn.term,))
    return None


def kept_pairs(context: Context) -> list[Turn]:
    """Rotated keys that the graph still writes to a cache as pairs."""
    found, gone = sites(context), {*context.rewriter.dead, *context.rewriter.made}
    return [
        turn
        for turns in found.turns.values()
        for turn in turns
        if turn.mode in _SIDE_BY_SIDE
        and any(node not in gone for write in found.writes.get(bare(turn.term), ()) for node in write.nodes)
    ]
