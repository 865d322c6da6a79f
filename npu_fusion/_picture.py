"""Pictures of fusions as inline SVG: the replaced nodes on the left, the emitted operator on the right.

The layout is the layered one of Sugiyama in its simplest form: every node one layer below its lowest
input, edges over several layers bent through invisible points, the order within a layer by the mean
position of the neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from npu_fusion._listing import Line
from npu_fusion._report_text import counted

CHARACTER = 7.3
PADDING = 10.0
HEIGHT = 24.0
LAYER = 40.0
SPACE = 14.0
MARGIN = 8.0
ARROW = 70.0
MOST_NODES = 80
MOST_LABEL = 30
SWEEPS = 8


@dataclass
class _Box:
    """Something to place: a node, an input, or (``label`` empty) a bend of a long edge."""

    label: str
    layer: int
    style: str = "bend"
    above: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)
    x: float = 0.0

    @property
    def width(self) -> float:
        return len(self.label) * CHARACTER + 2 * PADDING if self.label else 2.0

    @property
    def y(self) -> float:
        return MARGIN + HEIGHT / 2 + self.layer * LAYER


def shape(nodes: Sequence[Line], emitted: Sequence[Line]) -> tuple[object, ...]:
    """What two regions share when their pictures are the same."""
    found: list[object] = []
    for group in (nodes, emitted):
        place = {line.name: index for index, line in enumerate(group)}
        found.append(tuple((line.operator, *(place.get(name) for name in line.inputs)) for line in group))
    return tuple(found)


def draw(nodes: Sequence[Line], emitted: Sequence[Line], operator: str, outputs: Iterable[str] = ()) -> str:
    """An ``<svg>`` of a fusion; its colours come from the page's CSS classes.

    ``nodes``: the replaced nodes in graph order, at most ``MOST_NODES`` (else ValueError). ``emitted``: what
    took their place; without any (a dry run) a box with ``operator`` stands for it. ``outputs``: the
    replaced nodes that other nodes read, drawn with a stronger frame.
    """
    if len(nodes) > MOST_NODES:
        raise ValueError(f"picture of {operator}: {len(nodes)} nodes given; accepted: at most {MOST_NODES}")
    left = _place(nodes, frozenset(outputs), "node")
    right = _place(emitted or [Line(operator, "", "")], frozenset(), "fused")
    left_width, right_width = _extent(left), _extent(right)
    layers = 1 + max(box.layer for box in (*left, *right))
    height = 2 * MARGIN + HEIGHT + (layers - 1) * LAYER
    width = 2 * MARGIN + left_width + ARROW + right_width
    lower = (layers - 1 - max(box.layer for box in right)) * LAYER / 2
    middle = height / 2
    start = MARGIN + left_width + ARROW / 4
    title = f"{counted(len(nodes), 'node')} replaced by {operator}"
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f'<g transform="translate({MARGIN:.0f} 0)">{_svg(left)}</g>'
        f'<path class="become" d="M{start:.0f} {middle:.0f}h{ARROW / 2:.0f}m-7-6 7 6-7 6"/>'
        f'<g transform="translate({MARGIN + left_width + ARROW:.0f} {lower:.0f})">{_svg(right)}</g></svg>'
    )


def _place(nodes: Sequence[Line], strong: frozenset[str], style: str) -> list[_Box]:
    boxes, index = _layered(nodes, strong, style)
    _bend(boxes, nodes, index)
    rows: list[list[int]] = [[] for _ in range(1 + max(box.layer for box in boxes))]
    for place, box in enumerate(boxes):
        rows[box.layer].append(place)
    _sort(boxes, rows)
    _spread(boxes, rows)
    return boxes


def _layered(nodes: Sequence[Line], strong: frozenset[str], style: str) -> tuple[list[_Box], dict[str, int]]:
    """Boxes of the nodes and of their outer inputs, each input right above the first node that reads it."""
    inner = {line.name for line in nodes}
    layer: dict[str, int] = {}
    for line in nodes:
        layer[line.name] = 1 + max((layer.get(name, 0) for name in line.inputs), default=-1)
    outer: dict[str, int] = {}
    for line in nodes:
        for name in line.inputs:
            if name not in inner:
                outer[name] = min(outer.get(name, layer[line.name] - 1), layer[line.name] - 1)
    boxes = [_Box(_short(name), row, "input") for name, row in outer.items()]
    index = {name: place for place, name in enumerate(outer)}
    for line in nodes:
        index[line.name] = len(boxes)
        kind = f"{style} strong" if line.name in strong else style
        boxes.append(_Box(_short(line.operator or line.name), layer[line.name], kind))
    return boxes, index


def _bend(boxes: list[_Box], nodes: Sequence[Line], index: Mapping[str, int]) -> None:
    """Link the boxes; an edge over several layers gets an invisible box in each layer that it passes."""
    for line in nodes:
        target = index[line.name]
        for name in line.inputs:
            above = index[name]
            for row in range(boxes[above].layer + 1, boxes[target].layer):
                boxes.append(_Box("", row))
                _link(boxes, above, len(boxes) - 1)
                above = len(boxes) - 1
            _link(boxes, above, target)


def _link(boxes: list[_Box], above: int, below: int) -> None:
    boxes[above].below.append(below)
    boxes[below].above.append(above)


def _sort(boxes: list[_Box], rows: list[list[int]]) -> None:
    place = {box: order for row in rows for order, box in enumerate(row)}

    def mean(box: int, neighbours: list[int]) -> float:
        return sum(place[n] for n in neighbours) / len(neighbours) if neighbours else place[box]

    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else rows[::-1]:
            row.sort(key=lambda box: mean(box, boxes[box].above if down else boxes[box].below))
            place.update((box, order) for order, box in enumerate(row))


def _spread(boxes: list[_Box], rows: list[list[int]]) -> None:
    """Horizontal places: towards the mean of the neighbours, without overlap, order kept."""
    for row in rows:
        _push_apart(boxes, row, [0.0] * len(row))
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 else rows[::-1]:
            wishes = []
            for box in row:
                neighbours = boxes[box].above + boxes[box].below
                mean = sum(boxes[n].x for n in neighbours) / len(neighbours) if neighbours else boxes[box].x
                wishes.append(mean)
            _push_apart(boxes, row, wishes)
    leftmost = min(box.x - box.width / 2 for box in boxes)
    for placed in boxes:
        placed.x -= leftmost


def _push_apart(boxes: list[_Box], row: list[int], wishes: list[float]) -> None:
    """Place ``row`` near ``wishes``: the mean of packing from the left and packing from the right."""

    def pack(order: Iterable[int], sign: int) -> dict[int, float]:
        found: dict[int, float] = {}
        edge = None
        for slot in order:
            half = boxes[row[slot]].width / 2
            x = sign * wishes[slot]
            x = x if edge is None else max(x, edge + SPACE + half)
            found[slot], edge = sign * x, x + half
        return found

    forth, back = pack(range(len(row)), 1), pack(reversed(range(len(row))), -1)
    for slot, place in enumerate(row):
        boxes[place].x = (forth[slot] + back[slot]) / 2


def _extent(boxes: list[_Box]) -> float:
    return max(box.x + box.width / 2 for box in boxes)


def _svg(boxes: list[_Box]) -> str:
    parts = [_edge(box, boxes[below]) for box in boxes for below in box.below]
    for box in boxes:
        if box.label:
            radius = HEIGHT / 2 if box.style == "input" else 5
            parts.append(
                f'<rect class="{box.style}" x="{box.x - box.width / 2:.1f}" y="{box.y - HEIGHT / 2:.1f}" '
                f'width="{box.width:.1f}" height="{HEIGHT:.0f}" rx="{radius:.0f}"/>'
                f'<text class="{box.style}" x="{box.x:.1f}" y="{box.y + 4:.1f}">{escape(box.label)}</text>'
            )
    return "".join(parts)


def _edge(above: _Box, below: _Box) -> str:
    top = above.y + (HEIGHT / 2 if above.label else 0)
    bottom = below.y - (HEIGHT / 2 if below.label else 0)
    half = (top + bottom) / 2
    return (
        f'<path class="edge" d="M{above.x:.1f} {top:.1f}C{above.x:.1f} {half:.1f} '
        f'{below.x:.1f} {half:.1f} {below.x:.1f} {bottom:.1f}"/>'
    )


def _short(label: str) -> str:
    return label if len(label) <= MOST_LABEL else label[: MOST_LABEL - 1] + "…"
