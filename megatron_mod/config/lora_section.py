"""The section ``lora`` of a training's settings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_mod.config.lora import ALL_LINEAR, LoraSettings, resolve_targets
from megatron_mod.config.rules import AT_LEAST_0, COUNT, Range, setting
from megatron_mod.routing.config import Layers, resolve_layers


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA) on the frozen model's projections, which train with the routers or
    without them (train.trainable). Of adapters that are given (model.lora) rank, alpha, targets and
    layers are theirs, unset or said again.

    Args:
        rank: of each adapter, at least 1; unset: there are none.
        alpha: what an adapter adds is multiplied by alpha / rank; above 0; unset: twice the rank.
        dropout: share of its inputs that an adapter does not see in training; 0 to 1, the latter
            excluded; unset: 0.
        targets: the projections that have one: `all-linear` (unset), all of a layer's, of a mixture
            of experts the attention's, which are all that may; or some, by Hugging Face's names
            (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj) or Megatron's, each for
            all projections in it (linear_qkv, linear_proj, linear_fc1, linear_fc2).
        layers: the layers that have them: `all` (unset), or as router.layers.
        lr: peak learning rate of the adapters, above 0; unset: optimizer.lr, or a tenth of it where
            routers train too, which take larger ones.
    """

    rank: int | None = setting(COUNT, default=None)
    alpha: float | None = setting(Range(above=0), default=None)
    dropout: float | None = setting(Range(least=0, below=1), default=None)
    targets: list[str] | str | None = None
    layers: Layers | None = setting(AT_LEAST_0, default=None)
    lr: float | None = setting(Range(above=0), default=None)

    def resolve(self, *, num_layers: int, projections: Collection[str]) -> LoraSettings | None:
        """These settings for a model of ``num_layers`` layers, which have one of each of
        ``projections``; ``None``: it has no adapters.

        Raises:
            ValueError: layers or projections that the model does not have.
        """
        if self.rank is None:
            return None
        layers = "all" if self.layers is None else self.layers
        return LoraSettings(
            rank=self.rank,
            alpha=2.0 * self.rank if self.alpha is None else self.alpha,
            dropout=self.dropout or 0.0,
            targets=resolve_targets(
                ALL_LINEAR if self.targets is None else self.targets, projections=projections
            ),
            layers=resolve_layers(layers, num_layers=num_layers, field="lora.layers"),
        )
