"""What a user wants stand-ins solved for, and on what."""

from __future__ import annotations

import typing
from dataclasses import dataclass, replace
from typing import Literal

import yaml

from megatron_mod.config import mistakes
from megatron_mod.config.model_folder import ModelFolder, is_run
from megatron_mod.config.ranks import Degrees
from megatron_mod.config.router_section import RouterConfig
from megatron_mod.config.rules import COUNT, InputFile, InputFolder, NewFolder, Range, setting
from megatron_mod.routing.config import Layers
from megatron_mod.routing.scheme import Granularity, Scheme

_LAYERS = typing.get_type_hints(RouterConfig)["layers"]


class LayerChoice:
    """Layers as ``router.layers`` names them: a rule or a list, in the form of a YAML value."""

    @staticmethod
    def read(text: str) -> Layers:
        return yaml.safe_load(text)

    def problem(self, value: str) -> str | None:
        try:
            found = self.read(value)
        except yaml.YAMLError:
            found = None
        is_rule = found == "all" or isinstance(found, dict | list)
        if is_rule and mistakes.accepts(_LAYERS, found):
            return None
        return f"must be {mistakes.describe(_LAYERS)}, such as '{{deepest: 16}}' or '[3, 5, 7]'"


@dataclass(frozen=True)
class StandInRequest(Degrees):
    """Solve what skipped units add, in closed form, from what the dense model computes on a text.

        python tools/fit_stand_ins.py --load BASE --data FILE --save NEW_DIR
        torchrun --standalone --nproc_per_node N tools/fit_stand_ins.py --load BASE --data FILE \\
            --save NEW_DIR --tensor T --pipeline P

    Writes untrained routers with solved stand-ins, which a training starts from
    (model.routers NEW_DIR). A training that is not given any solves its own. The ranks that tensor
    x pipeline leave over share the text.

    Args:
        load: base checkpoint (of tools/convert_hf_to_megatron.py, Megatron-LM or Megatron-Bridge),
            or a Hugging Face folder.
        data: conversations (.jsonl, .json, .parquet) or a text, of the kind the model will see.
        save: new folder for the routers.
        hf_path: with a checkpoint of Megatron-LM or Megatron-Bridge, a Hugging Face folder of the
            same model.
        granularity: of the routers to be trained; what stands in depends on its unit, attention,
            MLP or block.
        layers: routed layers, as router.layers of a training: 'all', '{deepest: n}', '{every: n,
            offset: k}' or '[3, 5, 7]'; unset: its default.
        rank: of the map; unset: 32 for attention, 64 for MLPs and blocks, or half the hidden size
            where that is less.
        tokens: of the data, from samples in random order; read as far as needed, once.
        max_length: most tokens of a sample; unset: 2048, or what the model has positions for.
        batch_size: samples run together.
        dtype: what weights and activations are held in; stand-ins are solved in float64.

    Raises:
        ValueError: a value out of range, or a training run in the place of a base.
    """

    load: str = setting(ModelFolder())
    data: str = setting(InputFile())
    save: str = setting(NewFolder())
    hf_path: str | None = setting(InputFolder(), default=None)
    granularity: Granularity = "attn_token"
    layers: str | None = setting(LayerChoice(), default=None)
    rank: int | None = setting(COUNT, default=None)
    tokens: int = setting(COUNT, default=16384)
    max_length: int | None = setting(Range(least=2), default=None)
    batch_size: int = setting(COUNT, default=4)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_run(self.load):
            raise ValueError(
                f"--load {self.load}: is a training run; stand-ins are solved before routers are "
                "trained: give its base."
            )
        if Scheme.parse(self.granularity).per_expert:
            raise ValueError(
                f"--granularity {self.granularity}: nothing stands in for one of a token's "
                "experts; give another granularity, or train without (router.stand_in: none)."
            )

    def router(self) -> RouterConfig:
        """The settings of a training that the options are; layers and rank unset as there."""
        settings = RouterConfig(granularity=self.granularity, stand_in_rank=self.rank)
        if self.layers is None:
            return settings
        return replace(settings, layers=LayerChoice.read(self.layers))
