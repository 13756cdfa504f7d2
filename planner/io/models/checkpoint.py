"""What a family's reader is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.io.models.fields import MAX_LAYERS

if TYPE_CHECKING:
    from planner.io.models.fields import Fields
    from planner.io.models.quantization import Quantization
    from simulator.model import Layer


@dataclass(frozen=True)
class Checkpoint:
    """One config and how its weights are stored.

    Parameters
    ----------
    fields
        Settings of the decoder: the file, or its ``text_config``.
    whole
        The file.
    quantization
        Which of its modules are stored in what.
    longest_request_tokens
        Most tokens of one request, prompt and output.

    """

    fields: Fields
    whole: Fields
    quantization: Quantization
    longest_request_tokens: int

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return self.fields.size("num_hidden_layers", high=MAX_LAYERS)

    def window(self, tokens: int) -> int:
        """``tokens`` as `simulator.model.Attention` has it: 0 for a window no request outgrows."""
        return 0 if tokens >= self.longest_request_tokens else tokens

    def dtype(self, layer: int, part: str, modules: tuple[str, ...]) -> str:
        """Dtype of the ``modules`` of one part of a layer (``self_attn``, ``mlp.experts.0``)."""
        return self.quantization.dtype(f"layers.{layer}.{part}", modules)


@dataclass(frozen=True)
class Decoder:
    """The part of a `simulator.model.ModelShape` that differs by family.

    Parameters
    ----------
    layers
        Every layer in order.
    tied_by_default
        Whether the head is the embedding where the config does not say.
    other_params
        Parameters outside the layers, the embedding and the head that the engine loads.

    """

    layers: tuple[Layer, ...]
    tied_by_default: bool = False
    other_params: int = 0
