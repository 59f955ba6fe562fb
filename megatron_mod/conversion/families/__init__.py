"""The model families that can be converted: one file each; README.md here shows how to add one."""

from __future__ import annotations

import importlib
import pkgutil

from megatron_mod.conversion.families.base import Family

_MODULES = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in _MODULES if hasattr(module, "FAMILY")
}


def family_of(hf_config: dict) -> Family:
    """The family of a Hugging Face ``config.json``.

    Raises:
        ValueError: an architecture that is not supported; the message lists those that are.
    """
    model_type = hf_config.get("model_type")
    family = FAMILIES.get(model_type)
    if family is None:
        supported = ", ".join(f"{f.model_type} ({f.architecture})" for f in FAMILIES.values())
        raise ValueError(
            f"config.json: model_type = {model_type!r} is not supported; supported: {supported}."
        )
    architectures = hf_config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise ValueError(
            f"config.json: architectures = {architectures} is not supported; for model_type "
            f"{model_type!r} it must be [{family.architecture!r}]."
        )
    return family
