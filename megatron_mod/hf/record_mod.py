"""What calls of a routed model decided, and what their caches hold: ``routing_report``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .layer_mod import RoutingCall
from .room_mod import stored_bytes


class RoutingRecord:
    """Decisions and cache sizes of one call, or of the calls of one ``generate``."""

    def __init__(self) -> None:
        self.decisions: dict[tuple[int, str], list[Tensor]] = {}  # counted when somebody asks
        self.tokens: Tensor | int = 0  # of all calls, without padding
        # of each layer's cache, the latest: bytes held, sequences, and tokens of each
        self.caches: dict[int, tuple[int, int, int]] = {}
        self.agreed: dict[tuple[int, str], Tensor] = {}  # of routers that kept the largest
        self.experts: dict[int, Tensor] = {}  # assigned and executed tokens of each, [2, E]

    def add(self, routing: RoutingCall, cache: Any) -> None:
        """Take note of a forward call and its cache (None: it has none), without waiting for the
        device."""
        length = 0 if cache is None else cache.get_seq_length()
        for place, agreed in routing.agreed.items():
            self.agreed[place] = self.agreed.get(place, 0) + agreed
        for layer, counted in routing.experts.items():
            self.experts[layer] = self.experts.get(layer, 0) + counted
        for (layer, target), keep in routing.decisions.items():
            if keep.dim() == 1:  # a sequence stays what it is at later steps
                self.decisions[layer, target] = [keep]
            else:
                self.decisions.setdefault((layer, target), []).append(keep)
            if cache is not None:
                self.caches[layer] = stored_bytes(cache.layers[layer]), keep.shape[0], length
        if routing.decisions and keep.dim() == 2:
            valid = routing.tokens
            self.tokens += keep.numel() if valid is None else valid[:, -keep.shape[1] :].sum()

    def summary(self, model: Any) -> dict[str, Any]:
        """``routing_report`` of the ``RoutedModel`` whose calls they are."""
        routers: dict[int, dict[str, dict[str, Any]]] = {}
        for (layer, target), decisions in self.decisions.items():
            units, agreed = self.tokens, self.agreed.get((layer, target))
            if decisions[0].dim() == 1:
                units = len(decisions[0])
            elif layer in self.experts:
                units = self.experts[layer][0].sum()
            routers.setdefault(layer, {})[target] = _with_shares(
                kept=int(sum(keep.sum() for keep in decisions)),
                units=int(units),
                **({} if agreed is None else {"agreed": int(agreed)}),
            )
        layers, own = {}, ("kept", "units", *(("agreed",) if self.agreed else ()))
        for layer, parts in routers.items():
            held, batch, length = self.caches.get(layer, (0, 0, 0))
            dense = _dense_bytes(model, layer, batch=batch, length=length)
            layers[layer] = {
                **_sum(parts.values(), own),
                "cache_bytes": held,
                "cache_bytes_saved": dense - held,
                **(parts if len(parts) > 1 else {}),
            }
            if layer in self.experts:
                names = "tokens_assigned", "tokens_executed"
                layers[layer].update(zip(names, self.experts[layer].tolist(), strict=True))
        names = (*own, "cache_bytes", "cache_bytes_saved")
        return {**_sum(layers.values(), names), "layers": layers}


def _with_shares(**counts: Any) -> dict[str, Any]:
    for share, part in (("capacity", "kept"), ("agreement", "agreed")):
        if part in counts:
            counts[share] = counts[part] / counts["units"] if counts["units"] else 1.0
    return counts


def _sum(entries: Iterable[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    entries = list(entries)
    return _with_shares(**{name: sum(entry[name] for entry in entries) for name in names})


def _dense_bytes(model: Any, layer: int, *, batch: int, length: int) -> int:
    """What a layer's cache would hold were all of ``length`` tokens stored."""
    routed = model.layers[layer]
    length = min(length, routed.window - 1) if routed.window else length
    token = 2 * routed.self_attn.k_proj.out_features * model.embed_tokens.weight.element_size()
    return batch * length * token
