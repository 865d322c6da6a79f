"""The drawn pictures of fusions."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from npu_fusion import _picture
from npu_fusion._listing import Line

SWIGLU = [
    Line("split", "", "aten.split.Tensor(x, 8, -1)", ("x",)),
    Line("getitem", "", "split[0]", ("split",)),
    Line("getitem_1", "", "split[1]", ("split",)),
    Line("silu", "", "aten.silu.default(getitem)", ("getitem",)),
    Line("mul", "", "aten.mul.Tensor(silu, getitem_1)", ("silu", "getitem_1")),
]
FUSED = [Line("npu_swiglu", "", "npu.npu_swiglu.default(x)", ("x",))]


def boxes(svg: str) -> list[tuple[str, float, float, float, float]]:
    """(text, left, top, width, height) of every box, in the coordinates of its half of the picture."""
    rect = re.compile(r'<rect class="[^"]*" x="([\d.-]+)" y="([\d.-]+)" width="([\d.]+)" height="([\d.]+)"')
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    return [(text, *map(float, numbers)) for text, numbers in zip(texts, rect.findall(svg), strict=True)]


def test_draws_every_node_input_and_edge() -> None:
    svg = _picture.draw(SWIGLU, FUSED, "npu_swiglu", {"mul"})
    ElementTree.fromstring(svg)
    assert sorted(box[0] for box in boxes(svg)) == sorted(
        ["x", "split", "[0]", "[1]", "silu", "mul", "x", "npu_swiglu"]
    )
    # Six edges on the left, one of them bent once, and one on the right.
    assert svg.count('class="edge"') == 8
    assert svg.count("strong") == 2


def test_layers_follow_the_data_and_boxes_do_not_overlap() -> None:
    left = boxes(_picture.draw(SWIGLU, FUSED, "npu_swiglu"))[:6]
    top = {text: y for text, _, y, _, _ in left}
    assert top["x"] < top["split"] < top["[0]"] == top["[1]"] < top["silu"] < top["mul"]
    for first in left:
        for second in left:
            if first[0] < second[0] and first[2] == second[2]:
                assert first[1] + first[3] <= second[1] or second[1] + second[3] <= first[1], (first, second)


def test_shape_is_independent_of_names_and_sees_other_wiring() -> None:
    def renamed(line: Line) -> Line:
        return Line(f"{line.name}_9", "", line.code, tuple(f"{name}_9" for name in line.inputs))

    shape = _picture.shape(SWIGLU, FUSED)
    assert shape == _picture.shape([renamed(line) for line in SWIGLU], [renamed(line) for line in FUSED])
    other = [*SWIGLU[:3], Line("silu", "", SWIGLU[3].code, ("getitem_1",)), SWIGLU[4]]
    assert shape != _picture.shape(other, FUSED)
    assert shape != _picture.shape(SWIGLU, [])


def test_without_emitted_nodes_the_operator_stands_for_them() -> None:
    assert [box[0] for box in boxes(_picture.draw(SWIGLU, [], "npu_swiglu"))][-1] == "npu_swiglu"


def test_hostile_names_are_escaped() -> None:
    svg = _picture.draw([Line("a", "", "<&>.x.y(b)", ("<b>",))], [], 'x"<script>')
    ElementTree.fromstring(svg)
    assert "<script>" not in svg


def test_refuses_what_no_one_could_read() -> None:
    nodes = [Line(f"n{index}", "", "aten.neg.default(x)") for index in range(_picture.MOST_NODES + 1)]
    with pytest.raises(ValueError, match="picture of npu_swiglu: 81 nodes given; accepted: at most 80"):
        _picture.draw(nodes, [], "npu_swiglu")
