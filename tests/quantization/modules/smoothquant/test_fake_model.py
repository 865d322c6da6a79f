from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from npu_fusion.quantization.modules.smoothquant import W8A8Linear, quantize_model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.again = self.down
        self.other = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.attention
        return (
            x
            + self.down(a.o_proj(a.q_proj(x) + a.k_proj(x) * a.v_proj(x)).repeat(1, 2))
            + self.again(self.up(x))
        )


def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(Block(), Block())
    made.lm_head = nn.Linear(8, 3)
    return made


def kinds(made: nn.Module) -> dict[str, W8A8Linear]:
    return {n: m for n, m in made.named_modules(remove_duplicate=False) if isinstance(m, W8A8Linear)}


def test_all_linear_layers_but_the_head() -> None:
    made = model()
    names = quantize_model(made, "per_tensor", "per_tensor")
    block = [
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.o_proj",
        "up",
        "down",
        "again",
    ]
    assert names == [f"{i}.{name}" for i in range(2) for name in block]
    layers = kinds(made)
    assert list(layers) == names
    assert {(m.weight_quant, m.act_quant, m.quantize_output) for m in layers.values()} == {
        ("per_tensor", "per_tensor", False)
    }
    assert made[0].again is made[0].down is not made[1].down
    assert type(made.lm_head) is nn.Linear
    assert isinstance(made[0].other.out_proj, nn.Linear)
    assert made[:2](torch.randn(4, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("q_proj", "k_proj", "v_proj"), ["q_proj", "k_proj", "v_proj"] * 2),
        (("attention.[qkv]_proj",), ["q_proj", "k_proj", "v_proj"] * 2),
        (("0.attention.q_proj", "1.*.v_proj"), ["q_proj", "v_proj"]),
        ((), []),
    ],
)
def test_operands_of_attention_are_quantized_by_name(patterns: tuple[str, ...], expected: list[str]) -> None:
    made = model()
    quantize_model(made, quantize_bmm_input=patterns)
    assert [n.split(".")[-1] for n, m in kinds(made).items() if m.quantize_output] == expected


def test_skip() -> None:
    made = model()
    names = quantize_model(made, skip=("attention.*", "0.up", "again"))
    assert names == ["1.up", "lm_head"]  # a layer with a name that is skipped is skipped under all
    assert type(made[0].down) is nn.Linear
    assert quantize_model(nn.Sequential(nn.Linear(4, 4)), skip=()) == ["0"]


def test_refusals_change_nothing() -> None:
    made = model()
    with pytest.raises(
        TypeError, match="quantize_model: skip must be a sequence of names, got the string 'up'"
    ):
        quantize_model(made, skip="up")
    with pytest.raises(TypeError, match="quantize_bmm_input must be a sequence of names, got the string"):
        quantize_model(made, quantize_bmm_input="q_proj")
    with pytest.raises(
        ValueError, match="quantize_bmm_input has 'query'; accepted: names of layers that are quanti"
    ):
        quantize_model(made, quantize_bmm_input=("q_proj", "query"))
    with pytest.raises(ValueError, match="quantize_bmm_input has 'lm_head'"):
        quantize_model(made, quantize_bmm_input=("lm_head",))
    with pytest.raises(ValueError, match="model is itself a Linear"):
        quantize_model(nn.Linear(4, 4))
    with torch.no_grad():
        made[1].down.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"quantize_model: layer 1.down: .* weight has infinities or NaN"):
        quantize_model(made)
    assert kinds(made) == {}
