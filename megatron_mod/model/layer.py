"""The transformer layer that asks a router what to compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_mod.config.lora import LoraSettings
from megatron_mod.model import recompute
from megatron_mod.model.balance import Balance
from megatron_mod.model.exact_choice import ExactChoice
from megatron_mod.model.expert_choice import ExpertChoice
from megatron_mod.model.layout import AttentionPlan, TokenLayout
from megatron_mod.model.lora import LayerAdapters
from megatron_mod.model.mixture import MixtureOfExperts
from megatron_mod.model.noop_choice import NoopChoice
from megatron_mod.model.trainable import LORA, ROUTERS, STAND_INS
from megatron_mod.parallel import device
from megatron_mod.routing.auxiliary import beside
from megatron_mod.routing.config import AUTO, RoutingConfig
from megatron_mod.routing.decision import Decisions, keep_mask
from megatron_mod.routing.expert_router import ExpertRouter
from megatron_mod.routing.noop_gate import NoopGate
from megatron_mod.routing.predictor import Predictor
from megatron_mod.routing.router import Router
from megatron_mod.routing.scheme import Place
from megatron_mod.routing.selection import (
    Everything,
    Selection,
    StandInOf,
)
from megatron_mod.routing.stand_in import StandIn

_NO_GRAPH = "what a routed layer computes depends on its router's decisions, which no graph repeats"


class RoutedTransformerLayer(ExactChoice, ExpertChoice, NoopChoice, TransformerLayer):
    """``y = x + m * F(x) + (1 - m) * S(x)`` with ``F`` attention, MLP or both, ``m`` its router's
    decision, and ``S`` its stand-in, or nothing; or so for the attention and then for the MLP, each
    with a router and a stand-in of its own, which decide when the layer is entered.

    The router reads the output of the input norm, the stand-in too, but that of an MLP what the MLP
    would read. In training every unit is computed and
    multiplied by the straight-through mask (``training_compute: dense``), or chosen units
    only (``sparse``); in evaluation chosen units only, and stand-ins of the others.

    With an exact selection (``router.selection: top_k``) it is ``y = x + r * F(x)`` at the chosen
    tokens of each document, ``r`` the router's logit, and ``y = x`` at the others; a predictor or
    the router itself learns beside it which these are (``_choose_exactly``).

    Of a mixture of experts the router may decide about each expert: ``y = x + sum of g_e m_e
    F_e(x)`` over those that the model's own gate sends a token to (``_choose_experts``); or there
    is none, and the gate chooses among experts that return nothing too (``_leave_noops``).

    With sequence parallelism the layer gathers its rows, works as if there were none, and
    scatters them again: its tensor-parallel ranks then decide on the same numbers, and
    only chosen tokens take part in its reductions.
    """

    adds: ClassVar[dict[str, str]] = {
        "router": ROUTERS, "noop_gate": ROUTERS, "predictor": ROUTERS, "stand_in": STAND_INS,
        "lora": LORA,
    }  # fmt: skip

    def __init__(
        self, config, *args, routing: RoutingConfig, lora: LoraSettings | None = None, **kwargs
    ) -> None:
        if config.hidden_dropout:
            raise ValueError(
                f"hidden_dropout = {config.hidden_dropout}: a routed layer adds its update without "
                "dropout; set hidden_dropout to 0."
            )
        if config.cuda_graph_impl != "none":
            raise ValueError(
                f"cuda_graph_impl = {config.cuda_graph_impl!r}: {_NO_GRAPH}; set it to 'none'."
            )
        self.gathers_rows = config.sequence_parallel
        if self.gathers_rows:
            config = copy.copy(config)
            config.sequence_parallel = False
        super().__init__(config, *args, **kwargs)
        self.recomputes = recompute.whole_layers(config)
        self.recomputes_mlp = recompute.feed_forwards(config)
        self.routing = routing
        place = None if config.use_cpu_initialization else torch.cuda.current_device()
        targets = routing.scheme.targets
        self.router = self.noop_gate = None
        if num_noops := routing.num_noop_experts:
            self.noop_gate = NoopGate(*self._of_experts, num_noops=num_noops, device=place)
        else:
            self.router = _for_each(targets, partial(self._make_router, device=place))
        self.predictor = None
        if size := routing.predictor_size:
            self.predictor = _for_each(
                targets, lambda: Predictor(config.hidden_size, size, device=place)
            )
        self.stand_in = None
        if rank := routing.stand_in_rank:
            self.stand_in = _for_each(
                targets, lambda: StandIn(config.hidden_size, rank, device=place)
            )
        self.lora = None if lora is None else LayerAdapters(self, lora)

    def _make_router(self, *, device: int | None) -> Router:
        config, routing = self.config, self.routing
        if routing.scheme.per_expert:
            return ExpertRouter(*self._of_experts, bias=routing.bias, device=device)
        return Router(
            config.hidden_size,
            bias=routing.bias,
            is_factor=routing.is_exact,
            position=routing.budgets and routing.position(routing.budget),
            device=device,
        )

    @property
    def _of_experts(self) -> tuple[int, int, int]:
        """Hidden size, experts, and those that a token is sent to."""
        return self.config.hidden_size, self.config.num_moe_experts, self.config.moe_router_topk

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: TokenLayout | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        """``[S, B, H]`` (``[S / tp, B, H]`` with sequence parallelism) to the same shape.

        Raises:
            ValueError: an attention mask or packed parameters that are not a ``TokenLayout``, or
                a CUDA graph is being captured.
        """
        if device.is_capturing():
            raise ValueError(
                f"a CUDA graph is being captured: {_NO_GRAPH}; run the layer as it is."
            )
        if attention_mask is not None or not isinstance(
            packed_seq_params, (TokenLayout, type(None))
        ):
            raise ValueError(
                "a routed layer attends causally and takes roles and documents from a TokenLayout: "
                "call the model with attention_mask=None and packed_seq_params=TokenLayout(...)."
            )
        x, tp = hidden_states, self.pg_collection.tp
        if self.gathers_rows:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=tp)
        cp = self.pg_collection.cp
        layout = packed_seq_params or TokenLayout.of_prompts(
            x, context_rank=cp.rank(), context_ranks=cp.size()
        )
        normed = self.input_layernorm(x)
        auxiliary: list[Tensor] = []
        chosen = self._choose(normed, layout, auxiliary)
        about_experts = self._ask_experts(normed, layout)
        rest = x, normed, chosen, about_experts, layout, rotary_pos_emb
        x = recompute.again(self._compute, *rest) if self.recomputes else self._compute(*rest)
        if about_experts is not None:
            self._note_experts(normed, layout)
        elif self.noop_gate is not None:
            self._note_noops(layout)
        for loss in auxiliary:
            x = beside(x, loss)
        if self.gathers_rows:
            x = scatter_to_sequence_parallel_region(x, group=tp)
        return x, None

    def _compute(
        self,
        x: Tensor,
        normed: Tensor,
        chosen: dict[str, Selection | Everything],
        about_experts: Tensor | None,
        layout: TokenLayout,
        rotary_pos_emb: Tensor | None,
    ) -> Tensor:
        """All that follows on the choices, by target, and on logits about experts, of rows
        ``[S, B, H]``."""
        if block := chosen.get("block"):
            update = self._attend(normed, block, layout, rotary_pos_emb)
            told = self._about_mixture(block, layout)
            update = update + self._feed_forward(block.take(x) + update, **told)
            self._show("block", layout, x, normed, update)
            return block.add(x, update, self._instead("block", normed))
        attending, feeding = (chosen.get(part) or Everything() for part in ("attn", "mlp"))
        update = self._attend(normed, attending, layout, rotary_pos_emb)
        self._show("attn", layout, x, normed, update)
        x = attending.add(x, update, self._instead("attn", normed))
        told = self._about_mixture(feeding, layout, about_experts)
        update = self._feed_forward(feeding.take(x), **told)
        if layout.step.watch_units and "mlp" in self.routing.scheme.targets:
            self._show("mlp", layout, x, self.pre_mlp_layernorm(x), update)
        return feeding.add(x, update, self._instead("mlp", x, self.pre_mlp_layernorm))

    def _about_mixture(
        self,
        chosen: Selection | Everything,
        layout: TokenLayout,
        about_experts: Tensor | None = None,
    ) -> dict[str, Any]:
        """What a mixture is told beside the tokens of a choice; an MLP nothing."""
        if not isinstance(self.mlp, MixtureOfExperts):
            return {}
        balance = Balance.of(layout)
        if balance is not None and isinstance(chosen, Selection):
            balance = balance._replace(valid=None)  # no padding is chosen
        told: dict[str, Any] = {"balance": balance}
        if about_experts is not None:
            told["pairs"] = partial(self._choose_experts, about_experts, layout)
        elif self.noop_gate is not None:
            told |= {"noops": self.noop_gate, "pairs": partial(self._leave_noops, layout)}
        return told

    @property
    def index(self) -> int:
        """The global layer index."""
        return self.layer_number - 1

    @property
    def routers(self) -> dict[Place, Router]:
        """This layer's, by what they decide about; no-ops of its gate stand for one."""
        return self._by_place(self.noop_gate or self.router)

    @property
    def predictors(self) -> dict[Place, Predictor]:
        """This layer's, if it has any."""
        return {} if self.predictor is None else self._by_place(self.predictor)

    @property
    def stand_ins(self) -> dict[Place, StandIn]:
        """This layer's, if it has any."""
        return {} if self.stand_in is None else self._by_place(self.stand_in)

    def _by_place(self, modules: torch.nn.Module) -> dict:
        places = self.routing.scheme.places(self.index)
        return {place: self._own(modules, place.target) for place in places}

    def _own(self, modules: torch.nn.Module, target: str) -> Any:
        """A target's among what ``_for_each`` made."""
        return modules if len(self.routing.scheme.targets) == 1 else modules[target]

    def logit_border(self, place: Place, layout: TokenLayout) -> float:
        """The logit from which on a unit is kept."""
        own = layout.step.borders.get(place)
        return self.routing.logit_border(place) if own is None else own

    def _show(self, target: str, layout: TokenLayout, *grids: Tensor) -> None:
        if layout.step.watch_units and target in self.routing.scheme.targets:
            place = Place(self.index, target)
            layout.step.watch_units(place, *(grid[layout.valid] for grid in grids))

    def _instead(
        self, target: str, grid: Tensor, norm: Callable[[Tensor], Tensor] = lambda x: x
    ) -> StandInOf | None:
        """What the target's stand-in makes of chosen tokens of ``[S, B, H]``, which ``norm``
        readies; ``None`` without one."""
        if self.stand_in is None or target not in self.routing.scheme.targets:
            return None
        stand_in = self._own(self.stand_in, target)

        def of(chosen: Selection | Everything) -> Tensor:
            tokens = chosen.take(grid)
            return stand_in(norm(tokens) if len(tokens) else tokens)

        return of

    def _choose(
        self, normed: Tensor, layout: TokenLayout, auxiliary: list[Tensor]
    ) -> dict[str, Selection | Everything]:
        """Ask the routers about normed hidden states ``[S, B, H]``; the choice of each target.

        Shares of losses that routers have of their own are added to ``auxiliary``.
        """
        targets = self.routing.scheme.targets
        if layout.step.dense:
            return dict.fromkeys(targets, Everything())
        if self.routing.scheme.per_expert:
            return {}  # what they are sent is known when the mixture is entered
        if self.routing.is_exact:
            return self._choose_exactly(normed, layout, auxiliary)
        decide = self._decide_tokens
        if self.routing.scheme.per_sequence:
            decide = self._decide_sequences
        masks = {target: decide(Place(self.index, target), normed, layout) for target in targets}
        kept = {target: mask.detach().bool() for target, mask in masks.items()}
        if layout.step.check_decisions:
            for one in kept.values():
                self._require_equal_decisions(one)
        if self.training and self.routing.training_compute == "dense":
            return {target: Everything(mask) for target, mask in masks.items()}
        return self._select(kept, masks if self.training else {}, layout)

    def _select(
        self,
        choices: dict[str, Tensor],
        factors: dict[str, Tensor],
        layout: TokenLayout,
        *,
        known: list[list[int]] | None = None,
    ) -> dict[str, Selection | Everything]:
        """What is kept by each choice, bool ``[S, B]``, and what its update is multiplied by.

        ``known``: kept tokens, ``[targets][documents]``, where the host knows them.
        """
        cp, made = self.pg_collection.cp, [layout.grid.choose(one) for one in choices.values()]
        ranks = [known]
        if known is None:
            counts = torch.stack([one.counts for one in made])[None]
            if cp.size() > 1:
                counts = gather_from_sequence_parallel_region(counts, group=cp)
            # The one host synchronisation, where there is any: shapes follow from it. What does
            # not has been started before.
            ranks = counts.tolist()
        found: dict[str, Selection | Everything] = {}
        for target, choice, counts in zip(choices, made, zip(*ranks, strict=True), strict=True):
            mine = factors.get(target)
            if min(map(sum, counts)) == layout.valid.numel():
                found[target] = Everything(mine)
            else:
                found[target] = choice.selection(counts, rank=cp.rank(), mask=mine)
        return found

    def _decide_tokens(self, place: Place, normed: Tensor, layout: TokenLayout) -> Tensor:
        """The mask ``[S, B]`` of what is kept, with its gradient: ones and zeros."""
        router, sizes = self._own(self.router, place.target), layout.sizes(self._window)
        mask = self._decide(place, router(normed), layout.valid, sizes, layout)
        if every := router.notes_every:
            places = layout.every(every, context_rank=self.pg_collection.cp.rank())
            flat = normed.flatten(0, 1), layout.valid.flatten()
            noted = [tokens[places] for tokens in flat]
            router.note_inputs(*noted, sizes.flatten(1)[:, places])
        return mask

    def _decide_sequences(self, place: Place, normed: Tensor, layout: TokenLayout) -> Tensor:
        """As ``_decide_tokens``, with one decision for all tokens of a document."""
        router = self._own(self.router, place.target)
        pooled = layout.pooled(self.routing.pooling)
        total = layout.pool(router(normed), pooled)
        cp = self.pg_collection.cp
        if cp.size() > 1:
            total = reduce_from_tensor_model_parallel_region(total, group=cp)
        of, sizes = layout.document_sizes(self.routing.pooling, self._window, group=cp)
        of, is_valid = of.to(total.dtype), sizes[0] > 0
        mask = self._decide(place, total / of, is_valid, sizes, layout)
        if every := router.notes_every:
            read = layout.pool(normed.detach().float(), pooled[..., None])
            if cp.size() > 1:
                read = reduce_from_tensor_model_parallel_region(read, group=cp)
            read = read / of[:, None]
            router.note_inputs(read[::every], is_valid[::every], sizes[:, ::every])
        if cp.size() > 1:
            # Each rank's use of the mask sees only its tokens: add up what comes back.
            mask = copy_to_tensor_model_parallel_region(mask, group=cp)
        return layout.per_token(mask)

    @property
    def _window(self) -> int | None:
        """How many tokens a query attends to, its own included; ``None``: all before it."""
        return self.config.window_size and self.config.window_size[0] + 1

    def _decide(
        self, place: Place, logits: Tensor, valid: Tensor, sizes: Tensor, layout: TokenLayout
    ) -> Tensor:
        """``_mask``, noted with the units' ``sizes`` in the router."""
        mask = self._mask(place, logits, valid, layout)
        self._own(self.router, place.target).note(layout.decisions[place], sizes)
        return mask

    def _mask(self, place: Place, logits: Tensor, valid: Tensor, layout: TokenLayout) -> Tensor:
        """The mask of units with these logits, zero where there is none; noted in the layout."""
        router = self._own(self.router, place.target)
        penalty = layout.step.penalty_per_unit.get(place)
        finds_price = self.routing.capacity_loss_weight == AUTO
        mask = keep_mask(
            logits,
            valid,
            border=self.logit_border(place, layout),
            penalty=logits.new_zeros(()) if penalty is None else penalty,
            pull=router.pull if finds_price else None,
            # No price is known for what was not computed.
            only_kept=finds_price and self.routing.training_compute == "sparse",
        )
        layout.decisions[place] = Decisions(logits, mask, valid)
        return mask

    def _attend(
        self,
        normed: Tensor,
        chosen: Selection | Everything,
        layout: TokenLayout,
        rotary_pos_emb: Tensor | None,
    ) -> Tensor:
        """The attention's update of the chosen tokens, a grid ``[S, B, H]`` or a stream."""
        if isinstance(chosen, Selection) and not chosen.segments.lengths:
            return normed.new_zeros(0, 1, normed.shape[-1])
        everyone = self.routing.keys_values == "all" or isinstance(chosen, Everything)
        if rotary_pos_emb is not None and (layout.packed or isinstance(chosen, Selection)):
            grid = layout.rotary(rotary_pos_emb)
            queries = chosen.take(grid)
            rotary_pos_emb = (queries, grid if everyone else queries)
        output, bias = self.self_attention(
            chosen.take(normed),
            attention_mask=None,
            key_value_states=normed if everyone and isinstance(chosen, Selection) else None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=self._plan(chosen, layout, everyone=everyone),
        )
        return output if bias is None else output + bias

    def _plan(
        self, chosen: Selection | Everything, layout: TokenLayout, *, everyone: bool
    ) -> AttentionPlan:
        if isinstance(chosen, Selection):
            if everyone:
                return AttentionPlan(
                    queries=chosen.segments, keys=layout.tokens, documents=chosen.documents
                )
            return AttentionPlan(queries=chosen.segments, keys=chosen.segments)
        is_mask = chosen.mask is not None and not self.routing.is_exact
        if self.routing.keys_values == "selected" and is_mask:
            kept = layout.tokens.pad(chosen.mask.detach()) > 0
            return AttentionPlan(queries=layout.tokens, keys=layout.tokens, kept_keys=kept)
        return layout.attention

    def _feed_forward(self, hidden_states: Tensor, **told: Any) -> Tensor:
        """The MLP's update of a grid ``[S, B, H]`` or a stream ``[N, 1, H]``; of a mixture that is
        ``told`` so (``_about_mixture``).

        It is entered with no tokens too, because other ranks may wait in it.
        """
        trains = hidden_states.requires_grad or (self.lora is not None and self.lora.trains)
        if self.recomputes_mlp and (trains or "pairs" in told):
            return recompute.again(self._mlp, hidden_states, **told)
        return self._mlp(hidden_states, **told)

    def _mlp(self, hidden_states: Tensor, **told: Any) -> Tensor:
        if len(hidden_states):
            hidden_states = self.pre_mlp_layernorm(hidden_states)
        output, bias = self.mlp(hidden_states, **told)
        return output if bias is None else output + bias

    def _require_equal_decisions(self, kept: Tensor) -> None:
        group = self.pg_collection.tp
        if group.size() == 1:
            return
        ours = kept.flatten().to(torch.uint8)
        theirs = gather_from_sequence_parallel_region(ours, group=group).view(group.size(), -1)
        if bool((theirs != ours).any()):
            raise RuntimeError(
                f"layer {self.index} ({self.routing.granularity}): tensor-parallel "
                f"ranks decided differently on {int((theirs != ours).any(0).sum())} of "
                f"{ours.numel()} tokens; what follows would be wrong or never end."
            )


def _for_each(targets: tuple[str, ...], make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A module for the one target, or one for each in a dict of them."""
    if len(targets) == 1:
        return make()
    return torch.nn.ModuleDict({target: make() for target in targets})
