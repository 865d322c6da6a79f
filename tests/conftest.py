"""What all tests run with."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch

# The models and matrices of tests are small: they lose more by waiting for a second core than they gain from
# it, the more so where several workers share the cores. tests/kernels has two again.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what ``by_turns`` leaves to ``make test-all``."""
    forms: dict[str, list[Hashable]] = {}
    cases: dict[str, list[Hashable]] = {}
    for item in items:
        marker = item.get_closest_marker("by_turns")
        if marker is None or not isinstance(item, pytest.Function):
            continue
        given = item.callspec.params
        form = tuple(given[name] for name in marker.args)
        case = tuple(id(value) for name, value in given.items() if name not in marker.args)
        test = item.nodeid.partition("[")[0]
        turn = _position(forms.setdefault(test, []), form), _position(cases.setdefault(test, []), case)
        item.stash[_TURN] = turn
    for item in items:
        if _TURN in item.stash:
            form_index, case_index = item.stash[_TURN]
            if form_index != case_index % len(forms[item.nodeid.partition("[")[0]]):
                item.add_marker(pytest.mark.slow)


_TURN = pytest.StashKey[tuple[int, int]]()


def _position(known: list[Hashable], value: Hashable) -> int:
    if value not in known:
        known.append(value)
    return known.index(value)
