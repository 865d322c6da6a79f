"""What quantization costs the demo's Llama in accuracy, and how long it takes.

::

    python -m benchmarks.quantization                                all tables
    python -m benchmarks.quantization outliers weights               some
    python -m benchmarks.quantization --update docs/quantization.md  put them into the document

Accuracy is the loss in nats per byte on text that the model has not seen, in bfloat16, after calibration on 8
batches of text that it was trained on. ``size`` is how much larger six channels of each norm were made than
the others, by ``npu_fusion.demo.outliers``, which does not change what the model computes. What it takes for
a model of seven billion parameters is measured by ``benchmarks.quantization_scaling``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import npu_fusion
from npu_fusion.demo.corpus import evaluation_text, training_text
from npu_fusion.demo.model import context_length, load_byte_llama
from npu_fusion.demo.outliers import plant_outliers
from npu_fusion.quantization import PRESETS

EVALUATED = slice(100_000, 116_384)
CALIBRATED = slice(1_000_000, 1_065_536)
BATCHES, SEQUENCES = 8, 16
SIZES = (1, 64, 256, 1024)


# -- model, text, loss --------------------------------------------------------------------------------------


@functools.cache
def windows(evaluated: bool) -> Tensor:
    """[n, 256] bytes to measure the loss on, or to calibrate with."""
    text = evaluation_text()[EVALUATED] if evaluated else training_text()[CALIBRATED]
    length = context_length()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return ids[: ids.numel() // length * length].view(-1, length)


def calibration() -> Sequence[Tensor]:
    return windows(False)[: BATCHES * SEQUENCES].split(SEQUENCES)


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """Nats per byte."""
    total, count = 0.0, 0
    for rows in windows(True).split(SEQUENCES):
        logits = model(rows, use_cache=False).logits[:, :-1].double().flatten(0, 1)
        total += nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item()
        count += rows[:, 1:].numel()
    return total / count


def planted(size: float = 1, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return plant_outliers(load_byte_llama(), size).to(dtype)


def quantized(config: Any, size: float = 1, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The demo's Llama after quantize, calibration and convert."""
    model = planted(size, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every layer must be quantized
        npu_fusion.quantize(model, {**config, "batch_num": BATCHES}, progress=False)
        with torch.no_grad():
            for batch in calibration():
                model(batch, use_cache=False)
        return npu_fusion.convert(model)


def relative(model: nn.Module, float_loss: float) -> str:
    return f"{loss(model) / float_loss - 1:+.2%}"


# -- tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """A table, whose first row has the headings."""

    title: str
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        head, *body = self.rows
        lines = [head, ["---"] * len(head), *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def print(self) -> None:
        table = Table(*self.rows[0], title=self.title)
        for row in self.rows[1:]:
            table.add_row(*row)
        Console(width=140).print(table)


def int8_inputs(strategy: str, symmetric: bool = True) -> dict[str, Any]:
    return {"type": "int8", "symmetric": symmetric, "strategy": strategy}


def weights(
    kind: str, strategy: str, group_size: int | None = None, symmetric: bool = True
) -> dict[str, Any]:
    wanted: dict[str, Any] = {"type": kind, "symmetric": symmetric, "strategy": strategy}
    return wanted if group_size is None else {**wanted, "group_size": group_size}


def configured(
    algorithm: Any, weight: dict[str, Any], inputs: dict[str, Any] | None = None
) -> dict[str, Any]:
    quant_cfg = {"weights": weight} if inputs is None else {"weights": weight, "inputs": inputs}
    return {"quant_cfg": quant_cfg, "algorithm": algorithm, "skip_layers": {"lm_head"}}


def _float8(kind: str, strategy: str, algorithm: str = "ofmr") -> dict[str, Any]:
    return configured(
        {algorithm}, weights(kind, strategy), {"type": kind, "symmetric": True, "strategy": "tensor"}
    )


SMOOTH = {"smoothquant": {"smooth_strength": 0.5}}
FULL: dict[str, dict[str, Any]] = {
    "int8, weights and inputs per tensor (naive)": configured(
        {"minmax"}, weights("int8", "tensor"), int8_inputs("tensor")
    ),
    "int8, weights per channel, inputs per token": PRESETS["W8A8_DYNAMIC_CFG"],
    "smoothquant, weights and inputs per tensor": configured(
        SMOOTH, weights("int8", "tensor"), int8_inputs("tensor")
    ),
    "INT8_SMOOTHQUANT_CFG: weights per channel, inputs per tensor": PRESETS["INT8_SMOOTHQUANT_CFG"],
    "smoothquant, inputs per tensor asymmetric": configured(
        SMOOTH, weights("int8", "channel"), int8_inputs("tensor", symmetric=False)
    ),
    "W8A8_DYNAMIC_SMOOTHQUANT_CFG: inputs per token": PRESETS["W8A8_DYNAMIC_SMOOTHQUANT_CFG"],
    "FP8_OFMR_CFG: per tensor": PRESETS["FP8_OFMR_CFG"],
    "float8_e4m3fn, ofmr, weights per channel": _float8("float8_e4m3fn", "channel"),
    "HIFP8_OFMR_CFG: per tensor": PRESETS["HIFP8_OFMR_CFG"],
    "hifloat8, ofmr, weights per channel": _float8("hifloat8", "channel"),
    "HIFP8_CAST_CFG": PRESETS["HIFP8_CAST_CFG"],
    "HIFP8_QUANTILE_CFG": PRESETS["HIFP8_QUANTILE_CFG"],
    "MXFP8_QUANT_CFG": PRESETS["MXFP8_QUANT_CFG"],
    "mxfp8_e4m3fn inputs, mxfp4_e2m1 weights": configured(
        {"mxquant"},
        weights("mxfp4_e2m1", "group", 32),
        {"type": "mxfp8_e4m3fn", "symmetric": True, "strategy": "group"},
    ),
    "float8_e4m3fn inputs, float4_e2m1 weights, minmax": configured(
        {"minmax"},
        weights("float4_e2m1", "group", 32),
        {"type": "float8_e4m3fn", "symmetric": True, "strategy": "tensor"},
    ),
}
ALONE: dict[str, dict[str, Any]] = {
    "int8 per channel": weights("int8", "channel"),
    "int4 per channel": weights("int4", "channel"),
    "int4 in groups of 32": weights("int4", "group", 32),
    "int4 in groups of 32, asymmetric": weights("int4", "group", 32, symmetric=False),
    "mxfp4_e2m1": weights("mxfp4_e2m1", "group", 32),
    "float4_e2m1 in groups of 32": weights("float4_e2m1", "group", 32),
    "float4_e1m2 in groups of 32": weights("float4_e1m2", "group", 32),
}
BY = ("minmax", "gptq", "awq", "autoround")


def outliers() -> Rows:
    float_loss = loss(planted())
    rows = [["inputs and weights", *(f"size {size}" for size in SIZES)]]
    rows.append(["loss in bfloat16", *(f"{loss(planted(size)):.4f}" for size in SIZES)])
    for name, config in FULL.items():
        rows.append([name, *(relative(quantized(config, size), float_loss) for size in SIZES)])
    return Rows("change of the loss, inputs and weights quantized", rows)


def alone() -> Rows:
    float_loss = loss(planted())
    rows = [["weights alone", "size", *BY]]
    for name, weight in ALONE.items():
        for size in (1, 256):
            losses = [relative(quantized(configured({by}, weight), size), float_loss) for by in BY]
            rows.append([name, str(size), *losses])
    return Rows("change of the loss, weights quantized", rows)


def few_bits() -> Rows:
    """Integers of less than four bits, which the configuration does not offer, stored as int4."""
    float_loss = loss(planted())
    rows = [["bits, groups of 32", "size", *FEW_BITS]]
    for bits in (4, 3, 2):
        for size in (1, 256):
            losses = [relative(with_bits(by, bits, size), float_loss) for by in FEW_BITS]
            rows.append([str(bits), str(size), *losses])
    return Rows("change of the loss, fewer bits", rows)


FEW_BITS = ("minmax", "gptq", "autoround")


def with_bits(by: str, bits: int, size: float = 1) -> nn.Module:
    """The demo's Llama with symmetric integers of ``bits`` bits in groups of 32."""
    from npu_fusion.quantization.algorithms import ALGORITHMS
    from npu_fusion.quantization.calibration import Calibration
    from npu_fusion.quantization.scheme import Scheme, WeightScheme

    model = planted(size)
    name = f"{by} in {bits} bits"
    ALGORITHMS[name] = _FewBits(by, bits)
    try:
        scheme = Scheme(WeightScheme("int4", True, "group", 32), None, name)
        linears = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
        calibration_state = Calibration(model, dict.fromkeys(linears, scheme), BATCHES, False)
        with torch.no_grad():
            for batch in calibration():
                model(batch, use_cache=False)
        calibration_state.finish()
    finally:
        del ALGORITHMS[name]
    return model


class _FewBits:
    """An algorithm of the package with fewer bits than the type has."""

    smooths = False

    def __init__(self, by: str, bits: int) -> None:
        self.by, self.bits = by, bits

    def needs(self, scheme: Any) -> frozenset[str]:
        return frozenset() if self.by == "minmax" else frozenset({"gram"})

    def solve(self, problem: Any) -> Any:
        from npu_fusion.quantization.algorithms import autoround, gptq
        from npu_fusion.quantization.algorithms._base import Solution
        from npu_fusion.quantization.qparams import round_to_nearest

        scheme, gram, bits = problem.scheme.weights, problem.statistics.gram, self.bits
        if self.by == "minmax":
            return Solution(tuple(round_to_nearest(w, scheme, bits=bits) for w in problem.weights))
        if self.by == "autoround":
            return Solution(tuple(autoround.signround(w, gram, scheme, bits=bits) for w in problem.weights))
        hessian = gptq.prepare(gram)
        return Solution(tuple(gptq.gptq_weight(w, gram, hessian, scheme, bits=bits) for w in problem.weights))


def time_of_presets() -> Rows:
    rows = [["preset", "seconds"]]
    for name, config in {**dict(PRESETS), "int4, groups of 32, autoround": _autoround()}.items():
        model = planted()
        batches = calibration()
        started = time.perf_counter()
        npu_fusion.quantize(model, {**config, "batch_num": BATCHES}, progress=False)
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False)
        npu_fusion.convert(model)
        rows.append([name, f"{time.perf_counter() - started:.1f}"])
        print(*rows[-1], file=sys.stderr, flush=True)
    return Rows("seconds to calibrate and convert, one thread", rows)


def _autoround() -> dict[str, Any]:
    return configured({"autoround"}, ALONE["int4 in groups of 32"])


def digits() -> Rows:
    from tests.quantization._digits import accuracy, digits_cnn, quantized_cnn

    rows = [["convolutions", "accuracy on held-out digits"]]
    rows.append(["float32", f"{accuracy(digits_cnn()):.2%}"])
    for kind in ("hifloat8", "float8_e4m3fn"):
        for strategy in ("tensor", "channel"):
            rows.append([f"{kind}, weights per {strategy}", f"{accuracy(quantized_cnn(kind, strategy)):.2%}"])
    return Rows("a small CNN over scikit-learn's digits", rows)


TABLES: dict[str, Callable[[], Rows]] = {
    "outliers": outliers,
    "weights": alone,
    "bits": few_bits,
    "digits": digits,
    "time": time_of_presets,
}


# -- command ------------------------------------------------------------------------------------------------


def update(document: str, name: str, rows: Rows) -> str:
    """``document`` with the table between its two marker lines.

    Raises:
        ValueError: it has no such lines.
    """
    begin, end = f"<!-- quantization: {name} -->", "<!-- end -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"the document has no {begin!r}")
    return pattern.sub(lambda _: f"{begin}\n{rows.markdown()}\n{end}", document)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default: all")
    parser.add_argument("--update", type=Path, metavar="FILE", help="put the tables into this document")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.tables if name not in TABLES]
    if unknown:
        parser.error(f"TABLE is {unknown[0]!r}; accepted: {', '.join(TABLES)}")
    for name in arguments.tables or TABLES:
        with threads(1):  # the model is so small that a second one waits more than it works
            rows = TABLES[name]()
        rows.print()
        if arguments.update:
            text = arguments.update.read_text(encoding="utf-8")
            arguments.update.write_text(update(text, name, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
