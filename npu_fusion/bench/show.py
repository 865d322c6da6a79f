"""Tables of what was measured, and how it stands against the goals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from npu_fusion.bench.cases import CASES
from npu_fusion.bench.measure import Measured
from npu_fusion.bench.products import MATMULS, PROLOGS
from npu_fusion.bench.table import Rows

LARGE = 2048
"""Tokens from which the copy is the limit."""
BATCHED = 16
"""Tokens from which the cost of a call no longer decides."""

GAIN = {"dequant_swiglu_quant": 3.0, "add_rms_norm_dynamic_quant": 2.0, "dynamic_quant": 2.0}
"""So many times as fast as Inductor: the first from ``BATCHED`` tokens on."""
OF_COPY = dict.fromkeys(GAIN, 0.6)
"""Of the speed of a copy, with ``LARGE`` tokens."""
OVER_PRODUCTS = dict.fromkeys(MATMULS, 1.1) | dict.fromkeys(PROLOGS, 1.15)
"""The time over that of the products alone, at most."""
CALL = {"dequant_swiglu_quant": 12e-6}
"""Seconds that a call with one token takes over its arithmetic, at most."""


def tables(measured: Sequence[Measured]) -> list[Rows]:
    """One table for each operator, and the goals."""
    operators = dict.fromkeys(m.operator for m in measured)
    shown = [operator_table([m for m in measured if m.operator == name]) for name in operators]
    limits = goals(measured)
    return [*shown, limits] if limits.rows else shown


def operator_table(measured: Sequence[Measured]) -> Rows:
    """All sizes of one operator."""
    operator = measured[0].operator
    bound, share = ("copy", "of copy") if operator in CASES else ("products", "over products")
    header = [
        "tokens",
        "width",
        "threads",
        "fused",
        "eager",
        "Inductor",
        "its code",
        bound,
        "x Inductor",
        share,
    ]
    referenced = any(m.reference is not None for m in measured)
    if referenced:
        header.insert(4, "reference")
    rows = []
    for m in sorted(measured, key=lambda m: (m.threads, m.width or 0, m.tokens)):
        ratio = m.of_bound if operator in CASES else 1 / m.of_bound
        seconds = (m.fused, m.reference, m.eager, m.inductor, m.code, m.bound)
        cells = [duration(s) for s in (seconds if referenced else (m.fused, *seconds[2:]))]
        gain = "" if m.gain is None else f"{m.gain:.2f}"
        rows.append([str(m.tokens), str(m.width or ""), str(m.threads), *cells, gain, f"{ratio:.2f}"])
    return Rows(operator, f"{operator}, microseconds", header, rows)


def duration(seconds: float | None) -> str:
    """Microseconds with three digits; nothing for None."""
    if seconds is None:
        return ""
    micro = seconds * 1e6
    return f"{micro:.2f}" if micro < 10 else f"{micro:.1f}" if micro < 100 else f"{micro:,.0f}"


def call_cost(measured: Iterable[Measured]) -> dict[tuple[str, int | None, int], float]:
    """Seconds of a call with one token over its arithmetic, by operator, width and threads.

    The arithmetic of a row is what one more row costs: the difference between 16 tokens and one, by 15, with
    one thread. One token is one row, which no kernel splits among threads.
    """
    times = {(m.operator, m.width, m.threads, m.tokens): m.fused for m in measured}
    cost = {}
    for operator, width, threads, tokens in times:
        many, one = times.get((operator, width, 1, BATCHED)), times.get((operator, width, 1, 1))
        if tokens == 1 and many is not None and one is not None:
            row = (many - one) / (BATCHED - 1)
            cost[operator, width, threads] = times[operator, width, threads, 1] - row
    return cost


def goals(measured: Sequence[Measured]) -> Rows:
    """The worst row of each operator and number of threads against each goal that it has."""
    rows: list[Sequence[str]] = []

    def add(what: str, threads: int, goal: str, found: list[tuple[float, str, str]], most: bool) -> None:
        """``found``: (number, as shown, where); the largest is the worst if ``most``."""
        if found:
            number, shown, where = (max if most else min)(found)
            limit = float(goal.split()[-1])
            met = number <= limit if most else number >= limit
            rows.append((what, str(threads), goal, shown, where, "yes" if met else "no"))

    costs = call_cost(measured)
    for threads in sorted({m.threads for m in measured}):
        own = [m for m in measured if m.threads == threads]
        for operator in dict.fromkeys(m.operator for m in own):
            at = [m for m in own if m.operator == operator]
            if operator in GAIN:
                enough = [m for m in at if m.tokens >= BATCHED or operator != "dequant_swiglu_quant"]
                gains = [(m.gain, f"{m.gain:.2f}", where(m)) for m in enough if m.gain is not None]
                add(f"{operator}: times Inductor", threads, f"at least {GAIN[operator]}", gains, False)
                copies = [(m.of_bound, f"{m.of_bound:.2f}", where(m)) for m in at if m.tokens >= LARGE]
                add(f"{operator}: of the copy", threads, f"at least {OF_COPY[operator]}", copies, False)
            if operator in CALL:
                calls = [
                    (seconds * 1e6, f"{seconds * 1e6:.1f}", f"width {width}")
                    for (name, width, count), seconds in costs.items()
                    if name == operator and count == threads
                ]
                goal = f"at most {CALL[operator] * 1e6:.0f}"
                add(f"{operator}: microseconds of a call over its arithmetic", threads, goal, calls, True)
            if operator in OVER_PRODUCTS:
                over = [(1 / m.of_bound, f"{1 / m.of_bound:.2f}", where(m)) for m in at]
                add(
                    f"{operator}: over its products",
                    threads,
                    f"at most {OVER_PRODUCTS[operator]}",
                    over,
                    True,
                )
    header = ("what", "threads", "goal", "worst", "where", "met")
    return Rows("goals", "Against the goals", header, rows)


def disturbance(measured: Sequence[Measured]) -> str:
    """How quiet the machine was, in one line."""
    share = sum(m.disturbed for m in measured) / len(measured)
    return f"other work took a processor away during {share:.0%} of the blocks"


def where(m: Measured) -> str:
    return f"{m.tokens} tokens" if m.width is None else f"{m.tokens} x {m.width}"
