"""What a training adds to layers, read from its step folders and held to what the model has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from megatron_mod.checkpoint.distributed import StateReader
from megatron_mod.checkpoint.manifest import STATE, read_manifest
from megatron_mod.conversion.finite import require_finite
from megatron_mod.model.trainable import AVERAGE
from megatron_mod.routing.config import NOOP_GATE, PREDICTOR, ROUTER, STAND_IN

ADDED = (
    ROUTER,
    NOOP_GATE,
    PREDICTOR,
    STAND_IN,
    "lora",
)  # to a layer, by the first word of a name in it


def is_added(key: str) -> bool:
    """Whether a step's tensor of this key is of what a training added to a layer."""
    parts = key.split(".")
    return parts[:2] == ["decoder", "layers"] and parts[3] in ADDED


def read_layers(
    step: Path,
    layers: Iterable[int],
    names: Iterable[str],
    *,
    key: str,
    what: str,
    is_one: Callable[[str], bool],
) -> dict[int, dict[str, Tensor]]:
    """Tensors by layer and by their ``names`` in it, averaged if the training averaged them. Called
    where a world of ranks is, of one or more.

    Args:
        key: of a tensor in a checkpoint, to format with its layer and name.
        what: they are called in messages.
        is_one: whether a key is one of theirs.

    Raises:
        ValueError: the folder has others of them, or one is not finite.
    """
    reader = StateReader(step / STATE)
    held, averaged = reader.names(), read_manifest(step).get("averaged")
    found: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    names = list(names)
    wanted = {key.format(layer, name): (layer, name) for layer in found for name in names}
    here = {one for one in held if is_added(one) and is_one(one)}
    if difference := sorted(here ^ set(wanted)):
        raise ValueError(f"{step}: {what} do not match its manifest: {difference}.")
    for one, (layer, name) in wanted.items():
        one = AVERAGE + one if averaged and AVERAGE + one in held else one
        found[layer][name] = tensor = reader.tensor(one).clone()
        require_finite(tensor, one, where=step / STATE)
    return found


def require_shapes(
    folder: Path,
    tensors: Mapping[int, Mapping[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    call: Callable[[str], str] = str,
) -> None:
    """Refuse tensors that another model's layers have.

    ``call``: what a tensor of a name is called.
    """
    for layer, own in tensors.items():
        for name, tensor in own.items():
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(
                    f"{folder}: {call(name)} of layer {layer} has shape {tuple(tensor.shape)} "
                    f"instead of {shapes[name]}, this model's; it belongs to another model."
                )
