"""``npu-fusion demo --model mla``, and that it can tell a wrong result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import npu_fusion
from npu_fusion.demo import mla_run
from npu_fusion.demo.mla_model import Cache, Output, load_byte_mla

pytest.importorskip("safetensors")
pytest.importorskip("rich")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # tables without line breaks
    torch._dynamo.reset()


def test_the_fused_model_writes_what_the_eager_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = mla_run.run(host="eager", dump_dir=str(tmp_path), length=40)
    layers = len(load_byte_mla().layers)
    assert result.fused.shape == (mla_run.SEQUENCES, 40)
    assert torch.equal(result.fused, result.eager)
    assert result.loss_fused == pytest.approx(result.loss_eager, abs=1e-5)
    assert 0 < result.largest_difference < 1e-3
    fused = result.report.fused
    assert (fused[mla_run.ABSORB], fused[mla_run.PROLOG]) == (layers, layers)
    shown = capsys.readouterr().out
    for text in ("320 of 320", "mla_model.py:", mla_run.PROLOG, "nats per byte", "of capture"):
        assert text in shown
    assert "graphs were compiled" not in shown
    assert len(list(tmp_path.glob("*/report.html"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("host", ["eager", "inductor"])
@pytest.mark.parametrize("prepared", [False, True])
def test_bytes_are_the_same_without_symbolic_sizes_and_preparation(host: str, prepared: bool) -> None:
    model = load_byte_mla()
    token, caches = torch.tensor([[100], [101]]), model.new_caches(2)
    with torch.no_grad():
        eager = mla_run.write(model, token, 33, caches)
        if prepared:
            npu_fusion.prepare(model)
        expect = dict.fromkeys((mla_run.ABSORB, mla_run.PROLOG), len(model.layers))
        backend = npu_fusion.get_npu_backend(
            host=host, fusion_config={"strict": True, "numerics": "relaxed", "expect": expect}
        )
        compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
        fused = mla_run.write(compiled, token, 33, model.new_caches(2))
    assert torch.equal(fused, eager)
    assert len(backend.reports) == 1


class NextByte:
    """Sure that byte b is followed by b + 1; remembers where it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, tokens: Tensor, positions: Tensor, caches: Sequence[Cache]) -> Output:
        assert tokens.shape == (2, 1)
        self.asked += positions.tolist()
        return Output(torch.nn.functional.one_hot((tokens + 1) % 256, 256).double() * 1000)


def test_decoding_goes_on_after_the_prompt() -> None:
    step = NextByte()
    written = mla_run.write(step, torch.tensor([[5], [254]]), 4, [])
    assert written.tolist() == [[5, 6, 7, 8], [254, 255, 0, 1]]
    assert step.asked == [mla_run.PROMPT, mla_run.PROMPT + 1, mla_run.PROMPT + 2]


def test_every_byte_but_the_first_is_predicted_once() -> None:
    step = NextByte()
    texts = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 11]])
    logits = mla_run.read(step, texts, [])
    assert step.asked == [0, 1, 2]
    assert mla_run.loss(logits[:1], texts[:1]) == pytest.approx(0)
    assert mla_run.loss(logits, texts) == pytest.approx(1000 / 6)  # one byte of six was thought impossible


def test_more_bytes_than_the_context_has_are_refused() -> None:
    assert mla_run.longest() == 192
    with pytest.raises(ValueError, match="length is 193; accepted: up to 192"):
        mla_run.run(length=193)
