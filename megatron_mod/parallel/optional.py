"""Apex and Transformer Engine, of which Megatron-core takes what imports.

It counts on ``ImportError`` where they are not there. A package of the same name, one without its
kernels, and one built for other libraries would end it with an error of theirs, or mislead it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

GUARDED = ("apex", "transformer_engine")
ENGINE = "transformer_engine.pytorch"
OPTIMIZERS = f"{ENGINE}.optimizers"


def why_not_apex() -> str | None:
    """What is wrong with the ``apex`` that is installed; ``None``: nothing, or there is none."""
    spec = PathFinder.find_spec("apex")
    if spec is None:
        return None
    folders = map(Path, spec.submodule_search_locations or ())
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return "it is not NVIDIA's, but another package of that name"
    if PathFinder.find_spec("amp_C") is None:
        return "it was built without its CUDA kernels (amp_C)"
    return None


def guard(*, has_gpu: bool) -> None:
    """Have what cannot work here fail as what is not there; call before importing Megatron-core.

    Without a GPU that is all of apex, and Transformer Engine's optimizers: its layers can be built.
    """
    if not has_gpu or why_not_apex():
        _hide("apex")
    if ENGINE in sys.modules and not has_gpu:
        _hide(OPTIMIZERS)
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard(has_gpu=has_gpu))


def _hide(name: str) -> None:
    """Have imports of a module fail from now on, as the import system provides for."""
    sys.modules[name] = None  # type: ignore[assignment]


class _Guard(MetaPathFinder):
    """Turns every error of a guarded package's import into an ``ImportError`` that tells it."""

    def __init__(self, *, has_gpu: bool) -> None:
        self.has_gpu = has_gpu

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in GUARDED:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                execute(module)
            except ImportError:
                raise
            except Exception as error:
                raise ImportError(f"{type(error).__name__}: {error}", name=name) from error
            if name == ENGINE and not self.has_gpu:
                _hide(OPTIMIZERS)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
