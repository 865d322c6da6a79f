"""Reading the code that ``GraphModule.print_readable`` writes, and laying two listings side by side.

A report keeps its graphs as code, not as FX objects, so that it can be stored, cached and shown later.
Reading a listing back gives each node's name, type, expression and inputs::

    silu: "f32[2, 17, 96]" = torch.ops.aten.silu.default(getitem);  getitem = None
    ────   ──────────────                 ────────────────────────  ──────────────
    name   type                           code                      left out
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_CLASS = re.compile(r"class (\S+?)\(torch\.nn\.Module\):")
_NODE = re.compile(r'(?P<name>[A-Za-z_]\w*)(?:\s*:\s*"(?P<type>[^"]*)")?\s*=\s*(?P<code>[^=\s].*)')
_DELETIONS = re.compile(r";\s+(?:\w+ = )+None\s*$")
_DECLARED = re.compile(r'([A-Za-z_]\w*)(?:\s*:\s*(?:"([^"]*)"|[^,="]+))?(?:\s*=[^,]*)?')
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_IDENTIFIER = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?!\w|\s*=[^=])")
_CALL = re.compile(r"(?P<target>[\w.]+)\(")
_NAME = re.compile(r"[A-Za-z_]\w*")
_ITEM = re.compile(r"\w+(?P<item>\[.*\])")


@dataclass(frozen=True)
class Line:
    """One node, or one line that is none (``name`` empty)."""

    name: str
    type: str
    code: str
    """The expression without ``torch.ops.`` in front and deletions behind it; empty for a placeholder."""
    inputs: tuple[str, ...] = ()
    """Names of the nodes that the expression reads, in order, each once."""
    comment: str = ""
    """Where the user's code made it, as FX wrote it."""
    graph: str = ""
    """Empty for the graph itself; the class name for a subgraph (the body of a ``cond``, say)."""

    @property
    def key(self) -> tuple[str, str]:
        """What is the same node in two listings."""
        return self.graph, self.name or self.code

    @property
    def operator(self) -> str:
        """Short name for a picture: ``silu``, ``npu_rms_norm``, ``[0]``."""
        call = _CALL.match(self.code)
        if call:
            parts = call["target"].split(".")
            packet = len(parts) >= 3 and parts[0] not in ("torch", "operator")
            return parts[-2] if packet else parts[-1]
        item = _ITEM.fullmatch(self.code)
        return item["item"] if item else _NAME.sub("x", self.code)


def parse(code: str) -> list[Line]:
    """The lines of one ``print_readable`` listing, comments attached to what follows them."""
    lines: list[Line] = []
    known: set[str] = set()
    graph, comment, seen_class = "", "", False
    for text in _statements(code):
        found = _CLASS.fullmatch(text)
        if found:
            graph, seen_class, known = (found[1] if seen_class else ""), True, set()
            if graph:
                lines.append(Line("", "", text, graph=graph))
        elif text.startswith("#"):
            comment = "" if text.startswith("# No stacktrace") else text
        elif text.startswith("def forward("):
            arguments = text.partition("(")[2].rpartition(")")[0]
            lines += [Line(n, t, "", graph=graph) for n, t in _DECLARED.findall(arguments) if n != "self"]
            known |= {line.name for line in lines if line.graph == graph}
        else:
            for line in _read(text, known, comment, graph):
                lines.append(line)
                known.add(line.name)
            comment = ""
    return lines


def _statements(code: str) -> Iterator[str]:
    """Stripped lines, with a signature that is spread over several lines put back into one."""
    pending = ""
    for raw in code.splitlines():
        text = raw.strip()
        if not text:
            continue
        if pending or text.startswith("def forward("):
            pending = f"{pending} {text}" if pending else text
            if not text.endswith(":"):
                continue
            text, pending = pending, ""
        yield text
    if pending:
        yield pending


def _read(text: str, known: set[str], comment: str, graph: str) -> list[Line]:
    text = _DELETIONS.sub("", text)
    if text.startswith("return "):
        return [Line("output", "", text, _inputs(text.removeprefix("return "), known), comment, graph)]
    found = _NODE.fullmatch(text)
    if found:
        expression = found["code"].removeprefix("torch.ops.")
        inputs = _inputs(expression, known)
        return [Line(found["name"], found["type"] or "", expression, inputs, comment, graph)]
    if re.fullmatch(r'(?:[A-Za-z_]\w*: "[^"]*";?\s*)+', text):
        # With a pytree signature FX declares the types of the flat inputs on a line of their own.
        return [Line(name, kind, "", graph=graph) for name, kind in _DECLARED.findall(text)]
    return [Line("", "", text, (), comment, graph)]


def _inputs(expression: str, known: set[str]) -> tuple[str, ...]:
    names = _IDENTIFIER.findall(_QUOTED.sub("", expression))
    return tuple(dict.fromkeys(name for name in names if name in known))


def by_name(lines: Iterable[Line]) -> dict[str, Line]:
    """The nodes of the graph itself, without those of its subgraphs."""
    return {line.name: line for line in lines if line.name and not line.graph}


@dataclass(frozen=True)
class Block:
    """A stretch of two listings: ``same`` nodes pair by pair, or what stands there on either side."""

    same: bool
    left: tuple[Line, ...]
    right: tuple[Line, ...]


def align(left: Sequence[Line], right: Sequence[Line]) -> list[Block]:
    """Cut two listings into blocks of common and of differing nodes, in order.

    The common nodes are the longest sequence that both sides have in the same order. Node names are
    unique, so it is a longest increasing subsequence and costs n log n, where a text diff of two graphs of
    thousands of nodes costs seconds.
    """
    position = {line.key: index for index, line in enumerate(right)}
    pairs = [(index, position[line.key]) for index, line in enumerate(left) if line.key in position]
    blocks: list[Block] = []
    i = j = 0
    run: list[tuple[int, int]] = []

    def close_run() -> None:
        if run:
            blocks.append(Block(True, tuple(left[a] for a, _ in run), tuple(right[b] for _, b in run)))
            run.clear()

    for a, b in [*_increasing(pairs), (len(left), len(right))]:
        if a > i or b > j:
            close_run()
            blocks.append(Block(False, tuple(left[i:a]), tuple(right[j:b])))
        run.append((a, b))
        i, j = a + 1, b + 1
    run.pop()
    close_run()
    return blocks


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest subsequence of ``pairs`` whose second members increase (patience sorting)."""
    tails: list[int] = []
    at: list[int] = []
    previous: list[int] = []
    for index, (_, value) in enumerate(pairs):
        place = bisect_left(tails, value)
        previous.append(at[place - 1] if place else -1)
        if place == len(tails):
            tails.append(value)
            at.append(index)
        else:
            tails[place], at[place] = value, index
    found = []
    index = at[-1] if at else -1
    while index >= 0:
        found.append(pairs[index])
        index = previous[index]
    return found[::-1]
