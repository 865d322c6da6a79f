"""The numerics benchmark measures every fusion and keeps the tables of docs/fusions.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import numerics
from npu_fusion.passes.pattern import FUSIONS

SIZES = numerics.Sizes(tokens=24, hidden=128)
DOCUMENT = Path(__file__).parents[2] / "docs" / "fusions.md"


def test_every_fusion_has_a_case() -> None:
    assert set(numerics.CASES) == set(FUSIONS)


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_fused_is_as_close_to_the_exact_value_as_eager(fusion: str) -> None:
    rows = numerics.measure_all([fusion], SIZES)
    assert [*dict.fromkeys(r.source for r in rows)] == [
        numerics.SHORT[d] for d in numerics.CASES[fusion].dtypes
    ]
    for row in rows:
        # behind two matmuls the largest error is that of one unlucky element, on either side
        factor = 3 if row.level == "relaxed" else 1.5 if fusion == "mla_prolog" else 1.1
        assert _largest(row.fused) <= _largest(row.eager) * factor + 1e-6, row
        if "rms" in row.fused and row.level != "relaxed":
            assert _rms(row.fused) <= _rms(row.eager) * 1.05 + 1e-6, row
        assert row.level != "strict" or row.same == 1, row


def _largest(error: str) -> float:
    return float(error.partition("max ")[2].partition(",")[0])


def _rms(error: str) -> float:
    return float(error.partition("rms ")[2])


def test_a_fusion_that_is_not_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_FUSION_SWIGLU", "0")
    with pytest.raises(RuntimeError, match=r"^swiglu \(fp32\): expected npu_swiglu"):
        numerics.measure_all(["swiglu"], SIZES)


def test_the_errors_are_those_of_known_values() -> None:
    exact = {"y": torch.tensor([[100, -50]], dtype=torch.int8), "scale": torch.tensor([[0.5]])}
    other = {"y": torch.tensor([[100, -48]], dtype=torch.int8), "scale": torch.tensor([[0.5]])}
    assert numerics._error("y", exact, exact) == "all equal, max 0, rms 0"
    assert numerics._error("y", other, exact) == "50.00% equal, max 2, rms 1.4e-02"
    assert numerics._error("scale", {"scale": torch.tensor([[0.55]])}, exact) == "max 1.0e-01"
    assert numerics._error("y", {"y": torch.tensor([4.0, 1.0])}, {"y": torch.tensor([4.0, 2.0])}) == (
        "max 2.5e-01, rms 1.8e-01"
    )


def test_it_never_rounds_up_to_all() -> None:
    assert numerics.percent(1 - 1e-9) == "99.99%"
    assert numerics.percent(1) == "all"


def test_it_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tokens", "24", "--hidden", "64"]
    assert numerics.main(["swiglu", *small]) == 0
    assert "fused = eager" in capsys.readouterr().out
    assert numerics.main(["swiglu", "--markdown", *small]) == 0
    header, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert header == "| source | level | output | eager | fused | fused = eager |"
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| fp32", "| bf16", "| fp16"]


def test_it_refuses_an_unknown_fusion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        numerics.main(["swigloo"])
    assert "FUSION is 'swigloo'; accepted: rms_norm," in capsys.readouterr().err


def test_it_updates_a_document(tmp_path: Path) -> None:
    document = tmp_path / "fusions.md"
    document.write_text("before\n<!-- numerics: swiglu -->\nold\n<!-- end -->\nafter\n")
    arguments = ["swiglu", "--update", str(document), "--tokens", "24", "--hidden", "64"]
    for _ in range(2):
        assert numerics.main(arguments) == 0
        lines = document.read_text().splitlines()
        assert (lines[0], lines[1], lines[-2], lines[-1]) == (
            "before",
            "<!-- numerics: swiglu -->",
            "<!-- end -->",
            "after",
        )
        assert sum("| y |" in line for line in lines) == 3
    with pytest.raises(ValueError, match="the document has no '<!-- numerics: rms_norm -->"):
        numerics.update(document.read_text(), numerics.measure_all(["rms_norm"], SIZES))


def test_the_documentation_has_the_tables_of_every_fusion() -> None:
    text = DOCUMENT.read_text()
    for fusion in FUSIONS:
        _, found, rest = text.partition(f"\n<!-- numerics: {fusion} -->\n")
        assert found, fusion
        table = rest.partition("<!-- end -->")[0]
        for dtype in numerics.CASES[fusion].dtypes:
            assert f"\n| {numerics.SHORT[dtype]} |" in table, (fusion, dtype)
