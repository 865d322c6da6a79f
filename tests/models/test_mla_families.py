"""Real models with multi-head latent attention: absorbed while decoding, with the tokens of eager mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import npu_fusion

transformers = pytest.importorskip("transformers", minversion="5.15")  # the cache holds the latent since then

from benchmarks import mla_families  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "docs" / "fusions.md"

IN_ANOTHER_GRAPH = {"glm5_next"}
"""Its indexer breaks the graph between the expansion of keys and values and the attention to them."""


FUSED = {
    "axk1",
    "bailing_hybrid",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "longcat_flash",
    "youtu",
}
"""The prolog of every layer is fused, without preparing anything."""

FAST = {"deepseek_v2", "deepseek_v3", "minicpm3", "mistral4", "youtu"}
"""Of every way in which a prolog is refused or fused one; the others take minutes together."""


def slow_unless(fast: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if fast else pytest.mark.slow)


FAMILIES = [slow_unless(name in FAST, name) for name in mla_families.FAMILIES]


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding(name: str) -> None:
    pytest.importorskip(f"transformers.models.{name}")
    row = mla_families.measure(name)
    assert row.same
    assert row.absorbed == (0 if name in IN_ANOTHER_GRAPH else row.layers)
    assert row.prolog == (row.layers if name in FUSED else 0)
    assert bool(row.reason) == (name not in FUSED)
    if name in IN_ANOTHER_GRAPH:
        assert row.reason == mla_families.BREAK


@pytest.mark.parametrize("name", ["minicpm3", slow_unless(False, "hy_v4"), "deepseek_v3"])
def test_prepared(name: str) -> None:
    """Rope columns are paired where the model rotates halves."""
    row = mla_families.measure(name, prepared=True)
    assert row.same
    assert (row.absorbed, row.prolog) == (row.layers, row.layers)


def deepseek(**changes: Any) -> Any:
    """Two layers; values of the size of keys, so that attention stays one operator, unless changed."""
    settings = {**mla_families.SMALL, "num_hidden_layers": 2, "first_k_dense_replace": 2, "v_head_dim": 24}
    settings = {**mla_families.known(transformers.DeepseekV3Config, settings), **changes}
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**settings)).eval()
    return mla_families.randomized(model)


@pytest.mark.parametrize(
    ("cache", "attention"),
    [
        ("static", "sdpa"),
        slow_unless(False, "dynamic", "eager"),
        slow_unless(False, "static", "eager"),
        slow_unless(False, "dynamic", "sdpa"),
    ],
)
def test_generate(cache: str, attention: str) -> None:
    torch._dynamo.reset()
    model = deepseek(attn_implementation=attention)
    settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "use_cache": True}
    if cache == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    prompt = torch.randint(2, mla_families.VOCABULARY, (2, 5))
    with torch.no_grad():
        expected = model.generate(prompt, **settings)
        config = {"numerics": "relaxed", "strict": True, "mla_prolog": False, "kv_rmsnorm_rope_cache": False}
        backend = npu_fusion.get_npu_backend(fusion_config=config, host="eager")
        model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
        result = model.generate(prompt, **settings)
    assert torch.equal(result, expected)
    prefill, decode = backend.reports
    assert prefill.fused.get("mla_absorb", 0) == 0
    (((_, reason), refused),) = prefill.refusals("mla_absorb").items()
    assert (reason, len(refused)) == ("the query is too long for absorbing to pay", 2)
    assert decode.fused["mla_absorb"] == 2
    # keys and values are no longer expanded from the whole cache
    projections = {"aten.mm": -2, "aten.bmm": 4, "aten.new_empty": -2, "aten.slice_scatter": -4}
    for operator, more in projections.items():
        before, after = (n.get(operator, 0) for n in (decode.operators_before, decode.operators_after))
        assert after - before == more, operator


def test_the_documentation_has_a_row_of_every_model() -> None:
    table = DOCUMENT.read_text(encoding="utf-8").partition("<!-- mla families -->\n")[2]
    rows = [line for line in table.partition("<!-- end -->")[0].splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [
        "| ---",
        *(f"| {name}" for name in mla_families.FAMILIES),
    ]


def test_the_table_is_updated(tmp_path: Path) -> None:
    rows = [
        mla_families.Row("youtu", 1, 1, 0, "`why \\d`", True, 1),
        mla_families.Row("axk1", 1, 1, 1, "", True, 1),
    ]
    document = "before\n<!-- mla families -->\nold\n<!-- end -->\nafter\n"
    for _ in range(2):
        document = mla_families.update(document, rows)
    assert document.splitlines() == [
        "before",
        "<!-- mla families -->",
        "| model | layers | absorbed | prolog fused | prepared | otherwise because |",
        "| --- | --- | --- | --- | --- | --- |",
        "| youtu | 1 | 1 | 0 | 1 | `why \\d` |",
        "| axk1 | 1 | 1 | 1 | 1 | |",
        "<!-- end -->",
        "after",
    ]
    with pytest.raises(ValueError, match="the document has no '<!-- mla families -->'"):
        mla_families.update("", rows)


def test_it_refuses_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mla_families.main(["llama"])
    assert "MODEL is 'llama'; accepted: axk1, axk2," in capsys.readouterr().err


def test_other_tokens_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    row = mla_families.Row("youtu", 1, 1, 0, "", False)
    monkeypatch.setattr(mla_families, "measure", lambda name, **_: row)
    with pytest.raises(RuntimeError, match="other tokens than in eager mode: youtu"):
        mla_families.main(["youtu"])
