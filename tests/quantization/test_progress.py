from __future__ import annotations

import sys
from typing import Any

import pytest

from npu_fusion.quantization._progress import progress


class Terminal:
    """A stderr that says that someone is watching."""

    def __init__(self, watched: bool) -> None:
        self.text, self.watched = "", watched

    def isatty(self) -> bool:
        return self.watched

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def shown(monkeypatch: pytest.MonkeyPatch, enabled: bool | None, watched: bool) -> str:
    stderr = Terminal(watched)
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress(3, "counting", enabled) as advance:
        for name in ("one", "two", "three"):
            advance(name)
        advance()
    return stderr.text


@pytest.mark.parametrize(
    ("enabled", "watched", "visible"),
    [(None, True, True), (None, False, False), (True, False, True), (True, True, True), (False, True, False)],
)
def test_when_there_is_a_bar(
    monkeypatch: pytest.MonkeyPatch, enabled: bool | None, watched: bool, visible: bool
) -> None:
    pytest.importorskip("rich")
    text = shown(monkeypatch, enabled, watched)
    assert ("counting" in text) == visible
    assert visible or text == ""


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert shown(monkeypatch, None, watched=True) == ""
    with pytest.raises(ImportError, match="progress=True needs rich"):
        shown(monkeypatch, True, watched=True)


def test_it_ends_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    rich = pytest.importorskip("rich.progress")
    stopped: list[Any] = []
    stop = rich.Progress.stop
    monkeypatch.setattr(rich.Progress, "stop", lambda self: (stopped.append(self), stop(self)))
    monkeypatch.setattr(sys, "stderr", Terminal(True))
    with pytest.raises(RuntimeError, match="^no$"), progress(None, "counting"):
        raise RuntimeError("no")
    assert stopped
