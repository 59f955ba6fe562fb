"""LoRA adapters: which projections of which layers have one, and of what size.

An adapter belongs to one projection by Hugging Face's names, also where Megatron fuses several of
them into one linear, so that each is one of PEFT's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

# Each projection, in the order of settings and files, and the linear that Megatron computes it in.
TARGETS = {
    "q_proj": "linear_qkv",
    "k_proj": "linear_qkv",
    "v_proj": "linear_qkv",
    "o_proj": "linear_proj",
    "gate_proj": "linear_fc1",
    "up_proj": "linear_fc1",
    "down_proj": "linear_fc2",
}
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSettings:
    """``y = W x + (alpha / rank) * B A dropout(x)`` in some projections of some layers.

    ``A`` is ``[rank, in]`` and ``B`` ``[out, rank]``. ``targets`` are keys of ``TARGETS``, in its
    order; ``layers`` global, zero-based indices in ascending order.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank

    @property
    def names(self) -> tuple[str, ...]:
        """Of a layer's tensors: ``q_proj.a``, ``q_proj.b`` and so on."""
        return tuple(f"{target}.{key}" for target in self.targets for key in ("a", "b"))

    def shapes(self, projections: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Of a layer's adapters, by their names in it: ``q_proj.a`` ``[rank, in]``, ``q_proj.b``
        ``[out, rank]`` and so on.

        ``projections``: each one's ``(in, out)`` (``Architecture.projections``).
        """
        shapes = {}
        for target in self.targets:
            inputs, outputs = projections[target]
            shapes[f"{target}.a"] = (self.rank, inputs)
            shapes[f"{target}.b"] = (outputs, self.rank)
        return shapes

    def to_dict(self) -> dict:
        """JSON form; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> LoraSettings:
        lists = {name: tuple(values[name]) for name in ("targets", "layers")}
        return cls(**{**values, **lists})


def require_projections(
    targets: Sequence[str], known: Sequence[str], *, field: str = "lora.targets"
) -> None:
    """Refuse adapters on projections that a model's layers have many of.

    ``known``: those that they have one of (``Architecture.projections``).

    Raises:
        ValueError: naming ``field`` and the projections.
    """
    if experts := [target for target in targets if target not in known]:
        raise ValueError(
            f"{field}: {', '.join(experts)}: are projections of this model's experts, which have "
            f"no adapters; name some of {', '.join(known)}."
        )


def lora_of(manifest: Mapping) -> LoraSettings | None:
    """The adapters of a training's step, by its manifest; ``None``: it has none."""
    values = manifest.get("lora")  # steps of before there were adapters say nothing
    return None if values is None else LoraSettings.from_dict(values)


def resolve_targets(
    names: str | Sequence[str],
    *,
    projections: Collection[str] = tuple(TARGETS),
    field: str = "lora.targets",
) -> tuple[str, ...]:
    """Projections, in the order of ``TARGETS``, of what a user calls them.

    Args:
        names: ``all-linear``, as PEFT says, for all that may have adapters, or names of Hugging
            Face's (``q_proj``) or Megatron's (``linear_qkv``, which stands for all projections in
            it).
        projections: those that the model's layers have one of (``Architecture.projections``).

    Raises:
        ValueError: naming ``field``: a name of nothing, no name at all, or one said twice.
    """
    if names == ALL_LINEAR:
        return tuple(name for name in TARGETS if name in projections)
    named = [names] if isinstance(names, str) else list(names)
    known = (*TARGETS, *dict.fromkeys(TARGETS.values()))
    if not named:
        raise ValueError(
            f"{field} = []: adapters need a projection; name one of {', '.join(known)}, or use "
            f"{ALL_LINEAR}."
        )
    if unknown := [name for name in named if name not in known]:
        raise ValueError(
            f"{field}: {', '.join(unknown)}: not a projection of these models; use {ALL_LINEAR}, "
            f"or some of {', '.join(known)}."
        )
    meant = [hf for name in named for hf in TARGETS if name in (hf, TARGETS[hf])]
    if twice := [hf for hf in TARGETS if meant.count(hf) > 1]:
        raise ValueError(f"{field} = {named}: names {', '.join(twice)} twice; say each once.")
    return tuple(hf for hf in TARGETS if hf in meant)
