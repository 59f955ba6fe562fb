"""What Megatron's layers need to know about a micro-batch besides its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mod.data.batch import MicroBatch
from megatron_mod.routing.decision import Decisions
from megatron_mod.routing.masks import TokenRole, pooled_tokens, valid_tokens
from megatron_mod.routing.scheme import Place
from megatron_mod.routing.selection import Grid, Rows, Segments, Selection


@dataclass
class GridSegments:
    """Packed rows ``[S, B, ...]`` seen document by document; padding belongs to none."""

    selection: Selection
    shape: torch.Size

    def pad(self, grid: Tensor) -> Tensor:
        return self.selection.segments.pad(self.selection.take(grid))

    def unpad(self, padded: Tensor) -> Tensor:
        return self.selection.put(self.selection.segments.unpad(padded), self.shape)

    def pad_positions(self, fill: int) -> Tensor:
        return self.selection.segments.pad_positions(fill)


@dataclass
class AttentionPlan(PackedSeqParams):
    """Who attends to whom: causally, inside a document.

    It travels as Megatron's ``packed_seq_params``, which self-attention hands to its core.

    Args:
        queries, keys: how the query and the key (and value) tensors are padded by document.
        documents: the documents of ``keys`` that ``queries`` holds (``None``: all).
        kept_keys: bool ``[D, T]``, keys that others may attend to besides their own query
            (``None``: all).
        masks: made of these by the first layer that needs one, by size of its window.
    """

    queries: Rows | Segments | GridSegments | None = None
    keys: Rows | Segments | GridSegments | None = None
    documents: Tensor | None = None
    kept_keys: Tensor | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepContext:
    """What a pass asks of the routed layers; it travels in the ``TokenLayout``.

    Args:
        penalty_per_unit: the derivative of the capacity penalty by one unit's mask, by the
            router's place (``CapacityController.penalty_per_unit``); none without.
        causal_loss_share: what a token's causal loss is multiplied by.
        balance_share: what a token's part in a gate's load-balancing loss is multiplied by, where
            the gate trains.
        capacities: the shares of tokens that are kept with an exact selection, by the router's
            place, where they are not the settings'.
        lot: with a selection by lot: which.
        causal: with an exact selection: decide by the causal rule.
        check_decisions: stop if tensor-parallel ranks decide differently.
        dense: compute everything and ask no router.
        borders: logits from which on units are kept, instead of the routers' thresholds, by their
            place.
        watch_units: with ``dense``, is shown what a layer computes: its place, and of the
            tokens that are no padding, ``[N, H]`` each, the residual stream that the unit adds to,
            what a stand-in would read, and what the unit adds.
    """

    penalty_per_unit: Mapping[Place, Tensor] = field(default_factory=dict)
    causal_loss_share: float = 0.0
    balance_share: float = 0.0
    capacities: Mapping[Place, float] = field(default_factory=dict)
    lot: int = 0
    causal: bool = False
    check_decisions: bool = False
    dense: bool = False
    borders: Mapping[Place, float] = field(default_factory=dict)
    watch_units: Callable[[Place, Tensor, Tensor, Tensor], None] | None = None


NOTHING_ASKED = StepContext()


@dataclass
class TokenLayout(PackedSeqParams):
    """A micro-batch's roles and documents, as this context-parallel rank holds them, what the step
    asks of the layers, and what they then decided (``decisions``, by the router's place).

    Give it to Megatron's ``GPTModel`` as ``packed_seq_params``; without it every token counts as
    a valid one of a prompt and every row as one document.

    Args:
        roles: uint8 ``[B, S]`` of ``TokenRole``.
        position_ids: int64 ``[B, S]``, of each token in its document.
        documents: per row the lengths in tokens of its documents, in order; padding follows them.
        context_ranks: how many ranks share a row.
        step: what the step asks; nothing without.

    Raises:
        ValueError: several documents in a row that ranks share.
    """

    roles: Tensor | None = None
    position_ids: Tensor | None = None
    documents: Sequence[Sequence[int]] = ()
    context_ranks: int = 1
    step: StepContext = NOTHING_ASKED

    def __post_init__(self) -> None:
        if self.packed and self.context_ranks > 1:
            raise ValueError(
                f"{self.context_ranks} context-parallel ranks share rows of several documents: "
                "a row must hold one document; do not pack, or set context_parallel_size to 1."
            )
        self.qkv_format = "sbhd"
        # Megatron makes its rotary table this long and then takes this rank's part of it.
        self.max_seqlen_q = self.max_seqlen_kv = self.roles.shape[1] * self.context_ranks
        self.decisions: dict[Place, Decisions] = {}
        self._pooled: dict[str, Tensor] = {}
        self._sizes: dict[int | None, Tensor] = {}
        self._document_sizes: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}
        self._rotary: tuple[Tensor, Tensor] | None = None  # of a table, all layers' alike

    @classmethod
    def of(
        cls, batch: MicroBatch, *, context_ranks: int = 1, step: StepContext | None = None
    ) -> TokenLayout:
        """That of this rank's part of a micro-batch."""
        return cls(
            roles=batch.roles,
            position_ids=batch.position_ids,
            documents=batch.documents,
            context_ranks=context_ranks,
            step=step or NOTHING_ASKED,
        )

    @classmethod
    def of_prompts(cls, hidden_states: Tensor, *, context_rank: int, context_ranks: int):
        """Rows ``[S, B, H]`` that are one whole prompt each."""
        length, rows = hidden_states.shape[:2]
        device = hidden_states.device
        roles = torch.full((rows, length), int(TokenRole.PROMPT), dtype=torch.uint8, device=device)
        whole = torch.arange(length * context_ranks, device=device)
        local = zigzag(whole, dim=0, rank=context_rank, ranks=context_ranks)
        return cls(
            roles=roles,
            position_ids=local.expand(rows, length),
            documents=((length,),) * rows,
            context_ranks=context_ranks,
        )

    @property
    def packed(self) -> bool:
        """Whether a row holds several documents."""
        return any(len(row) > 1 for row in self.documents)

    @cached_property
    def num_documents(self) -> int:
        """Documents of the micro-batch; unpacked, a row is one even if it is all padding."""
        return sum(map(len, self.documents)) if self.packed else self.roles.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document, on the host."""
        if not self.packed:
            return [sum(row) for row in self.documents]
        return [length for row in self.documents for length in row]

    @cached_property
    def valid(self) -> Tensor:
        """bool ``[S, B]``: not padding."""
        return valid_tokens(self.roles).t()

    def sizes(self, window: int | None) -> Tensor:
        """Of each token as a unit its ``costs.SIZES``: twice whether it is one, and how many keys
        its query sees, its own included and at most ``window``; fp64 ``[3, S, B]``."""
        if window not in self._sizes:
            seen = self.position_ids.t() + 1
            seen = seen if window is None else seen.clamp(max=window)
            sizes = torch.stack((self.valid, self.valid, seen * self.valid))
            self._sizes[window] = sizes.double()  # which holds the pairs of the longest documents
        return self._sizes[window]

    def document_sizes(
        self, pooling: str, window: int | None, *, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """How many tokens of each document are pooled, at least 1, and of each as a unit its
        ``costs.SIZES``: fp64 ``[D]`` and ``[3, D]``, of what the context-parallel ``group`` holds
        of them together; called by all of it."""
        key = pooling, window
        if key not in self._document_sizes:
            _, tokens, pairs = self.sizes(window)
            counted = (self.pooled(pooling).double(), tokens, pairs)
            counts = torch.stack([self.pool(each, self.valid) for each in counted])
            if group.size() > 1:
                counts = reduce_from_tensor_model_parallel_region(counts, group=group)
            pooled, tokens, pairs = counts
            sizes = torch.stack(((tokens > 0).double(), tokens, pairs))
            self._document_sizes[key] = pooled.clamp(min=1), sizes
        return self._document_sizes[key]

    def pooled(self, pooling: str) -> Tensor:
        """bool ``[S, B]``: the tokens a sequence router averages over."""
        if pooling not in self._pooled:
            self._pooled[pooling] = pooled_tokens(self.roles, pooling=pooling).t()
        return self._pooled[pooling]

    @property
    def positions(self) -> Tensor:
        """int64 ``[S, B]``: of each token in its document."""
        return self.position_ids.t()

    @cached_property
    def document(self) -> Tensor:
        """int64 ``[S, B]``: which document a token belongs to, counted row by row."""
        rows, length = self.roles.shape
        if not self.packed:
            return torch.arange(rows, device=self.roles.device).expand(length, rows)
        starts = (self.position_ids == 0) & self.valid.t()
        return (starts.flatten().cumsum(0) - 1).clamp(min=0).view(rows, length).t()

    def rotary(self, table: Tensor | None) -> Tensor | None:
        """Rotary angles ``[S, B, 1, dim]`` of each token from Megatron's table ``[S, 1, 1, dim]``,
        which holds those of this rank's part of a row; made once for all layers."""
        if table is None:
            return None
        if self._rotary is None or self._rotary[0] is not table:
            rows, length = self.roles.shape
            if self.packed:
                angles = table[self.position_ids.t(), 0]
            else:
                # As a copy, which else every layer makes to take tokens from it.
                angles = table[:length].expand(length, rows, *table.shape[2:]).contiguous()
            self._rotary = table, angles
        return self._rotary[1]

    @cached_property
    def grid(self) -> Grid:
        """Its tokens, to choose from."""
        return Grid.of(
            self.document,
            self.positions,
            num_documents=self.num_documents,
            are_rows=not self.packed,
        )

    @cached_property
    def tokens(self) -> Rows | GridSegments:
        """How a grid of all tokens is padded by document."""
        if not self.packed:
            return Rows(self.position_ids)
        whole = self.grid.choose(self.valid).selection([self.lengths])
        return GridSegments(whole, self.valid.shape)

    @cached_property
    def attention(self) -> AttentionPlan:
        """Every token attends to its document's earlier tokens and to itself."""
        return AttentionPlan(queries=self.tokens, keys=self.tokens)

    def every(self, stride: int, *, context_rank: int) -> slice | Tensor:
        """Which of a context-parallel rank's tokens, counted over ``[S, B]``, are every
        ``stride``-th of all ranks': of every row at other places, for rows begin alike."""
        if self.context_ranks == 1:
            return slice(None, None, stride)
        length, rows = self.valid.shape
        places = torch.arange(length * self.context_ranks * rows).view(-1, rows)
        mine = zigzag(places, dim=0, rank=context_rank, ranks=self.context_ranks)
        chosen = (mine.flatten() % stride == 0).nonzero()[:, 0]
        return chosen.to(self.roles.device, non_blocking=True)

    def pool(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Sum ``[D, ...]`` over each document of ``values`` ``[S, B, ...]`` at ``tokens``, which
        has its shape or one at ends.

        Deterministic on every device, so that ranks that hold the same tokens agree.
        """
        return self.tokens.pad(values * tokens).sum(1)

    def per_token(self, values: Tensor) -> Tensor:
        """Each document's value ``[D]`` at its tokens, zero at padding: ``[S, B]``."""
        if self.packed:
            return values[self.document] * self.valid
        return values.expand(self.valid.shape) * self.valid


def zigzag(tensor: Tensor, *, dim: int, rank: int, ranks: int) -> Tensor:
    """One context-parallel rank's part of a sequence, cut as Megatron does: of ``2 * ranks`` equal
    chunks number ``rank`` and number ``2 * ranks - 1 - rank``, so that causal work is even."""
    if ranks == 1:
        return tensor
    chunks = tensor.chunk(2 * ranks, dim=dim)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), dim=dim)


def undo_zigzag(parts: Tensor, *, dim: int, ranks: int) -> Tensor:
    """The sequence whose ``zigzag`` parts follow each other by rank."""
    chunks = parts.chunk(2 * ranks, dim=dim)
    return torch.cat((*chunks[::2], *reversed(chunks[1::2])), dim=dim)
