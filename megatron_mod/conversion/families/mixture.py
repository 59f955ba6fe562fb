"""What families whose layers are mixtures of experts share: config.json's fields, rows, layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mod.conversion.families.base import value_of
from megatron_mod.conversion.mappings import Direct, GatedMLP, Mapping, Part
from megatron_mod.model.architecture import Architecture, Mixture

_COUNTS = ("num_experts", "num_local_experts")  # releases differ in which a family's file has


def read_mixture(
    hf_config: dict, *, ffn: str, normalizes_weights: bool, auxiliary_loss: float
) -> Mixture:
    """The experts a ``config.json`` describes.

    Args:
        ffn: the field with the channels of one expert.
        normalizes_weights: as ``Mixture``.
        auxiliary_loss: the family's ``router_aux_loss_coef`` where the file has none.

    Raises:
        ValueError: a field that is missing, fields that contradict each other, more experts for a
            token than there are, or one whose weight is normalised, or a loss that rewards
            imbalance; naming the field.
    """
    num_experts = _num_experts(hf_config)
    top_k = value_of(hf_config, "num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(
            f"config.json: num_experts_per_tok = {top_k}: must be at most the number of experts, "
            f"{num_experts}."
        )
    if normalizes_weights and top_k == 1:
        raise ValueError(
            "config.json: num_experts_per_tok = 1: Megatron's gate cannot normalise the weight of "
            "one expert, as Mixtral and norm_topk_prob do; it must be at least 2 with them."
        )
    weight = hf_config.get("router_aux_loss_coef")
    weight = float(auxiliary_loss if weight is None else weight)
    if not 0 <= weight < math.inf:
        raise ValueError(f"config.json: router_aux_loss_coef = {weight}: must be 0 or more.")
    return Mixture(
        num_experts=num_experts,
        top_k=top_k,
        ffn_hidden_size=value_of(hf_config, ffn),
        normalizes_weights=normalizes_weights,
        auxiliary_loss_weight=weight,
    )


def _num_experts(hf_config: dict) -> int:
    first, second = (hf_config.get(name) for name in _COUNTS)
    if None not in (first, second) and first != second:
        raise ValueError(
            f"config.json: {_COUNTS[0]} = {first}: is not {_COUNTS[1]} = {second}, which means the "
            "same; leave out the one that is wrong, or set both alike."
        )
    return first or second or value_of(hf_config, _COUNTS[0])


@dataclass(frozen=True)
class Names:
    """What a family calls a mixture's tensors in Hugging Face's per-expert layout.

    Transformers 4.57 and 5.x write ``{layer}.{block}.gate.weight`` ``[E, H]`` and, for each expert,
    ``{layer}.{block}.experts.{e}.{gate}.weight`` and ``{up}`` ``[F, H]``, and ``{down}``
    ``[H, F]``. 5.x's model itself, and files saved with ``save_original_format=False``, have all
    experts in one: ``{layer}.mlp.experts.gate_up_proj`` ``[E, 2 F, H]`` and ``down_proj``
    ``[E, H, F]``.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def rows(self, arch: Architecture, mcore: str, hf: str) -> list[Mapping]:
        """A layer's norm, the model's gate, and each expert: two parameters of its own."""
        assert arch.mixture is not None
        found: list[Mapping] = [
            Direct(f"{mcore}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight"),
            Direct(f"{mcore}.mlp.router.weight", f"{hf}.{self.block}.gate.weight"),
        ]
        for expert in range(arch.mixture.num_experts):
            ours, theirs = f"{mcore}.mlp.experts.experts.{expert}", self._expert(hf, expert)
            found += [
                GatedMLP(
                    f"{ours}.linear_fc1.weight",
                    gate=f"{theirs}.{self.gate}.weight",
                    up=f"{theirs}.{self.up}.weight",
                ),
                Direct(f"{ours}.linear_fc2.weight", f"{theirs}.{self.down}.weight"),
            ]
        return found

    def fused(self, arch: Architecture) -> dict[str, Part]:
        """Where ``rows``' tensors are in the fused layout; ``Family.fused``."""
        assert arch.mixture is not None
        num_experts, ffn = arch.mixture.num_experts, arch.ffn_hidden_size
        found = {}
        for hf in (f"model.layers.{index}" for index in range(arch.num_layers)):
            stem = f"{hf}.mlp.experts"
            for e in range(num_experts):
                name = self._expert(hf, e)
                both, down = f"{stem}.gate_up_proj", f"{stem}.down_proj"
                found[f"{name}.{self.gate}.weight"] = Part(both, e, 0, ffn)
                found[f"{name}.{self.up}.weight"] = Part(both, e, ffn, 2 * ffn)
                found[f"{name}.{self.down}.weight"] = Part(down, e, 0, arch.hidden_size)
            if self.block != "mlp":
                gate = Part(f"{hf}.mlp.gate.weight", None, 0, num_experts)
                found[f"{hf}.{self.block}.gate.weight"] = gate
        return found

    def _expert(self, hf: str, expert: int) -> str:
        return f"{hf}.{self.block}.experts.{expert}"
