"""What a routed model offers beside its family's methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from .attention_mod import IMPLEMENTATION
from .graph_mod import DecodingGraphs
from .layer_mod import RoutedLayer
from .mixture_mod import RoutedMixtureLayer
from .thresholds_mod import CapacityBorders, WatchedBorders, common_border, threshold_at

SELECTIONS = ("causal", "top_k")
T = TypeVar("T")


class RoutingControls:
    """What a routed model offers beside its family's methods; ``_decoder`` holds the layers."""

    supports_gradient_checkpointing = False
    _supports_flex_attn = False  # its block masks cannot be taken apart by sequence

    def _finish_init(self) -> None:
        routing = self.config.routing  # Transformers 4.57 refuses names that are not there
        named = ["router", "predictor"] if routing.get("predictor_size") else ["router"]
        self._keep_in_fp32_modules_strict = named if self.config.places else None
        self.post_init()

    @property
    def _decoder(self) -> Any:
        return getattr(self, "model", self)

    def _routed_layers(self) -> dict[int, RoutedLayer]:
        return {index: self._decoder.layers[index] for index in self.config.routing["layers"]}

    def set_selection(self, selection: str) -> None:
        """Say how routers that were trained to keep a number of tokens exactly decide.

        ``causal`` (at first): each token by itself, by the threshold. ``top_k``: those of the
        largest logits of each row's tokens, as in training; such a call sees the whole text and has
        no cache. ``save_pretrained`` writes nothing of it.

        Raises:
            ValueError: another word, or routers that decide by thresholds.
        """
        if not self.config.is_exact:
            raise ValueError(
                f"set_selection({selection!r}): these routers decide by thresholds and keep no "
                "exact number of tokens; leave it out, or train with router.selection top_k."
            )
        if selection not in SELECTIONS:
            raise ValueError(
                f"set_selection({selection!r}): must be {' or '.join(map(repr, SELECTIONS))}."
            )
        self._decoder.selection = selection

    def set_thresholds(self, threshold: float | Sequence[float]) -> None:
        """Keep a unit where ``sigmoid(logit)`` reaches ``threshold``: one number from 0 (keep all)
        to 1 (skip all), or one per router (per routed layer; of one that has two, its attention's
        first); of exact routers it is the causal rule's. ``save_pretrained`` writes it.

        Raises:
            ValueError: another number of thresholds than routers, or one out of range.
        """
        self._require_routers("set_thresholds")
        listed = list(threshold) if isinstance(threshold, (list, tuple)) else threshold
        thresholds = self._configured("threshold", listed, self.config.thresholds)
        for layer in self._routed_layers().values():
            layer.set_thresholds(thresholds)

    def _configured(self, name: str, value: Any, read: Callable[[], T]) -> T:
        """What the configuration says with another entry in ``routing``, which stays as it was
        where it is refused."""
        before = self.config.routing
        self.config.routing = {**before, name: value}
        try:
            return read()
        except ValueError:
            self.config.routing = before
            raise

    def _require_routers(self, call: str) -> None:
        if noops := self.config.routing.get("num_noop_experts"):
            raise ValueError(
                f"{call}: these layers have no routers; their gates choose among {noops} no-op "
                "experts."
            )

    def set_work(self, work: float) -> None:
        """Set the share of the dense model's operations that remains, on text of the kind that the
        routers were trained on; needs routers that were trained for a range of budgets
        (``router.work`` of two numbers), and no data. ``save_pretrained`` writes it.

        Raises:
            ValueError: other routers, or a budget out of their range.
        """
        if not isinstance(self.config.routing.get("work"), (list, tuple)):
            raise ValueError(
                "set_work: these routers were trained for one budget; use set_capacity on a text, "
                "or tools/calibrate_router.py --work."
            )
        position = self._configured("budget", work, self.config.work_position)
        for layer in self._routed_layers().values():
            layer.set_position(position)

    @torch.no_grad()
    def set_capacity(
        self,
        capacity: float | Sequence[float],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        scope: str | None = None,
    ) -> None:
        """Set the routers' thresholds so that ``capacity`` of a text's units is kept (by the causal
        rule, where routers are exact).

        Args:
            capacity: share of the units (sequences or tokens) from 0 to 1; one number, or with
                ``scope="layer"`` one per router, in the order of ``set_thresholds``.
            input_ids, attention_mask: ``[B, S]``, a text of the kind the model will see. For
                a sequence granularity: prompts, and enough of them.
            scope: ``layer`` holds every router to its capacity (in one pass, each layer sees what
                the ones before it leave); ``model`` gives all one threshold, at which their mean
                has it (in at most 20 passes). None: as the routers were trained (exact ones are
                each held to their own).

        Units with one score are kept or skipped together, so a capacity may be met only nearly;
        ``routing_report`` tells of the next call.

        Raises:
            ValueError: a capacity or scope out of range, another number of capacities than
                routers, or scores that no threshold can tell apart.
        """
        self._require_routers("set_capacity")
        places = self.config.places
        several = isinstance(capacity, (list, tuple))
        trained = "layer" if self.config.is_exact else self.config.routing.get("scope", "layer")
        scope = scope or ("layer" if several else trained)
        targets = list(capacity) if several else [capacity] * len(places)
        if len(targets) != len(places) or any(not 0.0 <= value <= 1.0 for value in targets):
            raise ValueError(
                f"capacity = {capacity}: must be a number from 0 to 1, or one per "
                f"{self.config.of_each} ({len(places)})."
            )
        if scope not in ("layer", "model") or (several and scope == "model"):
            raise ValueError(
                f"scope = {scope!r}: must be 'layer', or 'model' with one capacity for all."
            )
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if scope == "layer":
            borders = CapacityBorders(dict(zip(places, targets, strict=True)))
            self._decoder(**inputs, borders=borders)
            self.set_thresholds([threshold_at(borders.found[place]) for place in places])
            return

        def scores_at(border: float) -> Tensor:
            watched = WatchedBorders(border)
            self._decoder(**inputs, borders=watched)
            return torch.cat(watched.scores)

        border = common_border(scores_at, targets[0])
        self.set_thresholds([threshold_at(border)] * len(places))

    @contextmanager
    def graphed_decoding(self) -> Iterator[None]:
        """Within it decode steps are CUDA graphs, recorded at the first steps of each batch size:
        where a GPU waits for the host to launch kernels a step takes a fraction of the time (8B on
        an H200: 2.5 times as fast at batch 1)::

            with model.graphed_decoding():
                model.generate(...)

        Weights must not be replaced meanwhile; thresholds may. Steps that need gradients or return
        hidden states run as ever. Tensors taken out of a cache are the graphs' memory: clone them.

        Raises:
            ValueError: no GPU or several, an attention other than sdpa, a model in training, or
                mixtures of experts.
        """
        model = self._decoder
        wrong = None
        if len(devices := {weight.device for weight in model.parameters()}) > 1:
            wrong = f"the model is on {len(devices)} devices; load it on one"
        elif not DecodingGraphs.work_on(next(iter(devices))):
            wrong = "CUDA graphs need a GPU; move the model there with to('cuda')"
        elif (found := self.config._attn_implementation) != IMPLEMENTATION:
            wrong = f"attn_implementation is {found!r}; load the model with {IMPLEMENTATION!r}"
        elif self.training:
            wrong = "the model is in training; call eval()"
        elif issubclass(model.layer_class, RoutedMixtureLayer):
            wrong = "which experts a token goes to is no graph's to repeat; leave it out"
        if wrong:
            raise ValueError(f"graphed_decoding: {wrong}.")
        layers = model.layers[: model.config.num_hidden_layers]
        before, model.graphs = model.graphs, DecodingGraphs(layers)
        try:
            yield
        finally:
            model.graphs = before

    def routing_report(self) -> dict[str, Any]:
        """What the last call skipped and what it saved; after ``generate``, the whole of it.

        ``layers`` has, for each routed layer's index, the ``kept`` of its ``units`` (sequences,
        or tokens without padding) and their ratio ``capacity``, and ``cache_bytes`` with the
        ``cache_bytes_saved`` against the dense layer's. Of a layer with two routers these are sums,
        and its ``attn`` and ``mlp`` have their own. The sums of all layers are beside it. Where
        units are pairs of a token and an expert that the gate assigned it to, a layer also has for
        each expert (no-op experts behind) ``tokens_assigned`` and ``tokens_executed``. After a
        call by ``top_k`` there are also ``agreed``, the units that the causal rule decides about
        alike, and their share ``agreement``.

        Raises:
            ValueError: there was no call yet.
        """
        record = self._decoder.record
        if record is None:
            raise ValueError("routing_report: the model has not been called yet.")
        return {"granularity": self.config.routing["granularity"], **record.summary(self._decoder)}
