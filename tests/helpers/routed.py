"""A routed export, made without training it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_mod.checkpoint.companions import copy_companions
from megatron_mod.conversion.export import add_routing, make_portable
from megatron_mod.conversion.hf_reader import HFReader
from megatron_mod.conversion.hf_writer import HFWriter
from megatron_mod.conversion.routers import ROUTER, Added, hf_tensors
from megatron_mod.routing.config import RoutingConfig
from tests.helpers import formula


def save_export(
    export: Path,
    hf: Path,
    routers: dict[tuple[int, str], torch.Tensor],
    more: dict[int, dict[str, torch.Tensor]] | None = None,
    **routing: object,
) -> Path:
    """The folder ``convert_megatron_to_hf`` would write for ``hf`` with routers ``[1, H]``, by
    place, or by layer where it has one router.

    ``more``: other tensors of the routed layers, by layer and their names in it.
    ``routing`` holds fields of ``RoutingConfig``; the granularity is ``attn_sequence`` without.
    """
    settings = {"granularity": "attn_sequence", "capacity": (0.5,) * len(routers), **routing}
    added: Added = {}
    for (layer, target), weight in formula.by_place(routers, settings["granularity"]).items():
        name = formula.name_of(ROUTER, target, settings["granularity"])
        added.setdefault(layer, dict((more or {}).get(layer, {})))[name] = weight
    return _save(export, hf, added, RoutingConfig(layers=tuple(sorted(added)), **settings))


def save_with_noops(export: Path, hf: Path, rows: dict[int, torch.Tensor]) -> Path:
    """The folder of a mixture whose gates have rows ``[n, H]`` of no-op experts, by layer."""
    added = {layer: {"noop_gate.weight": own} for layer, own in rows.items()}
    (noops,) = {len(own) for own in rows.values()}
    routing = RoutingConfig("expert_token", tuple(rows), (1.0,) * len(rows))
    _save(export, hf, added, routing)
    path = export / "config.json"
    config = json.loads(path.read_text())
    config["routing"].update(num_noop_experts=noops)
    path.write_text(json.dumps(config))
    return export


def _save(export: Path, hf: Path, added: Added, routing: RoutingConfig) -> Path:
    export.mkdir()
    writer = HFWriter(export)
    with HFReader(hf) as reader:
        for name in sorted(reader.names()):
            writer.add(name, reader.tensor(name))
    for name, tensor in hf_tensors(added, torch.float32).items():
        writer.add(name, tensor)
    writer.close()
    copy_companions(hf, export)
    make_portable(export)
    add_routing(export, routing)
    return export
