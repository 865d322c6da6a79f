"""What the user is told when the offline environment cannot be made or used."""

from __future__ import annotations


class OfflineError(Exception):
    """The offline Ascend environment cannot be used; the message says what to do."""
