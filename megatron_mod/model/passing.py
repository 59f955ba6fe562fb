"""The place of a layer that a model does not compute."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor


class PassingLayer(MegatronModule):
    """Passes its hidden states on and has no parameters: the layers around it keep their indices,
    and with them their keys in checkpoints and their pipeline stages."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
        **unused: object,
    ) -> None:
        super().__init__(config)
        offset = get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.layer_number = layer_number + offset

    def forward(self, hidden_states: Tensor, *unused: object, **named: object) -> tuple:
        return hidden_states, None
