"""How one format of checkpoints is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from npu_fusion.quantization.checkpoints._files import Tensors
from npu_fusion.quantization.checkpoints._target import Target


class Reader(ABC):
    """A format. Every method raises ``ValueError`` that names file and tensor or setting."""

    name: ClassVar[str]
    """As in ``load_checkpoint(format=)``."""
    methods: ClassVar[tuple[str, ...]]
    """``quant_method`` in ``config.json``."""
    deploys: ClassVar[bool] = True
    """False: all weights of the format become floats, which then needs no warning."""
    siblings: ClassVar[bool] = True
    """Whether equal scales of inputs of neighbouring layers are to be one tensor."""
    weights: str | None = None
    """The file with the tensors, or their index, if the description says it."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        """Check the settings.

        Args:
            config: ``quantization_config`` of ``config.json``, or the description of the format.
            where: the file that it is from, for messages.
        """
        self.config = dict(config)
        self.where = where

    @abstractmethod
    def read(self, tensors: Tensors, target: Target) -> None:
        """Take the tensors of all quantized layers, and tell ``target`` what they are."""
