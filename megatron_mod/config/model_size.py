"""A size of the models that are trained from scratch for a benchmark, as its option says it."""

from __future__ import annotations

from typing import NamedTuple

HEAD = 32  # channels of an attention head
EXPERTS, TOP_K = 8, 2  # of a layer that is a mixture of them, and those that compute a token
BALANCE = 0.01  # the weight of its load-balancing loss


class ModelSize(NamedTuple):
    """Hidden size and number of layers; heads have ``HEAD`` channels, and an MLP 8/3 of the hidden
    size, up to a multiple of ``HEAD``, as Llama's."""

    hidden: int
    layers: int

    @classmethod
    def parse(cls, text: str) -> ModelSize:
        """``96x6``.

        Raises:
            ValueError: it is something else, or no model could have it.
        """
        hidden, _, layers = text.partition("x")
        if not (hidden.isdecimal() and layers.isdecimal()):
            raise ValueError(f"--sizes {text}: write hidden size and layers, as 96x6.")
        found = cls(int(hidden), int(layers))
        if found.hidden < HEAD or found.hidden % HEAD:
            raise ValueError(
                f"--sizes {text}: the hidden size must be a multiple of {HEAD}, the channels of an "
                "attention head."
            )
        if found.layers < 2 or found.layers % 2:
            raise ValueError(
                f"--sizes {text}: the layers must be an even number, of which every other is "
                "routed, or removed."
            )
        return found

    def __str__(self) -> str:
        return f"{self.hidden}x{self.layers}"

    def fields(self, *, layers: int, experts: bool = False) -> dict[str, object]:
        """Those of a Llama's config.json with so many layers; or of a Mixtral's, ``TOP_K`` of whose
        experts are together as wide as the MLP, so that a token costs the same but for its gate."""
        width = -(-self.hidden * 8 // (3 * HEAD)) * HEAD
        heads = self.hidden // HEAD
        shape: dict[str, object] = {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "tie_word_embeddings": True,
        }
        if not experts:
            return shape
        return {
            **shape,
            "model_type": "mixtral",
            "intermediate_size": width // TOP_K,
            "num_key_value_heads": heads,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "router_aux_loss_coef": BALANCE,
            "rope_theta": 10000.0,
        }
