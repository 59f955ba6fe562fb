"""The shape of a language model, independent of who stores its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mod.config.ranks import SETTINGS, degree

FP8_MULTIPLE = 16  # of which the sizes of a product in FP8 must be


@dataclass(frozen=True)
class Mixture:
    """The experts that stand in each layer where other models have one MLP.

    ``y = sum over the chosen experts e of g_e * F_e(x)``: a gate, a linear map ``H ->
    num_experts``, chooses ``top_k`` experts for each token by its softmax.

    Args:
        num_experts: of a layer.
        top_k: experts a token is sent to.
        ffn_hidden_size: channels of one expert's gated MLP.
        normalizes_weights: whether the chosen experts' ``g`` are divided by their sum, or are what
            the softmax over all experts gave them.
        auxiliary_loss_weight: of the load-balancing loss, where the whole model trains.
    """

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    normalizes_weights: bool = True
    auxiliary_loss_weight: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """What Megatron must build to hold a checkpoint of one of the families.

    ``ffn_hidden_size`` is an expert's where the layers are mixtures.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_sequence_length: int
    layernorm_epsilon: float
    rotary_base: float
    tied_embeddings: bool
    rope_scaling_factor: float | None = None  # Llama-3's scaling; None: none
    window_size: int | None = None  # tokens a query attends to, its own included; None: all before
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMSNorm on each head's query and key
    qk_norm_across_heads: bool = False  # on a token's whole query and key (OLMoE)
    mixture: Mixture | None = None  # None: one MLP a layer

    @property
    def query_channels(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def key_channels(self) -> int:
        return self.num_query_groups * self.kv_channels

    @property
    def query_weights(self) -> int:
        """Weights of a layer's query and output projections."""
        return 2 * self.hidden_size * self.query_channels

    @property
    def key_weights(self) -> int:
        """Weights of a layer's key and value projections."""
        return 2 * self.hidden_size * self.key_channels

    @property
    def expert_weights(self) -> int:
        """Weights of an MLP, or of one expert."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def gate_weights(self) -> int:
        """Of a layer's gate, where it is a mixture."""
        return self.hidden_size * self.mixture.num_experts if self.mixture else 0

    @property
    def mlp_weights(self) -> int:
        """Weights of a layer's MLP that a token is multiplied with; of a mixture the gate's and
        those of the experts that it is sent to."""
        return self.gate_weights + self.top_k * self.expert_weights

    @property
    def top_k(self) -> int:
        """MLPs of a layer that compute a token."""
        return self.mixture.top_k if self.mixture else 1

    @property
    def num_experts(self) -> int:
        """MLPs of a layer."""
        return self.mixture.num_experts if self.mixture else 1

    @property
    def attention_parameters(self) -> int:
        """Of a layer's attention without its norms."""
        biases = (self.query_channels + 2 * self.key_channels) * self.qkv_bias
        return self.query_weights + self.key_weights + biases

    @property
    def norm_parameters(self) -> int:
        """Of one layer."""
        across = (self.query_channels + self.key_channels) * self.qk_norm_across_heads
        return 2 * self.hidden_size + 2 * self.kv_channels * self.qk_norm + across

    @property
    def layer_parameters(self) -> int:
        """Of one layer, its norms and biases included."""
        mlp = self.gate_weights + self.num_experts * self.expert_weights
        return self.attention_parameters + mlp + self.norm_parameters

    @property
    def num_parameters(self) -> int:
        """Of the whole model, tied ones once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * self.layer_parameters + embeddings + self.hidden_size

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """``(in, out)`` of a layer's projections, by Hugging Face's names; those of experts, of
        which a layer has many, are not among them."""
        hidden, queries, keys = self.hidden_size, self.query_channels, self.key_channels
        attention = {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
        }
        if self.mixture is not None:
            return attention
        return {
            **attention,
            "gate_proj": (hidden, self.ffn_hidden_size),
            "up_proj": (hidden, self.ffn_hidden_size),
            "down_proj": (self.ffn_hidden_size, hidden),
        }


def padded_vocab_size(vocab_size: int, *, tensor: int) -> int:
    """The smallest vocabulary of at least ``vocab_size`` that ``tensor`` ranks can share."""
    return -(-vocab_size // tensor) * tensor


def check_parallel(
    arch: Architecture,
    *,
    tensor: int,
    pipeline: int,
    virtual_pipeline: int | None = None,
    expert: int = 1,
    names: Mapping[str, str] = SETTINGS,
) -> None:
    """Refuse degrees that do not fit the model.

    ``names``: what the user calls the degrees, ``SETTINGS`` or ``OPTIONS``.

    Raises:
        ValueError: naming the field, its value, the constraint and what would fit.
    """
    for what, number in (
        ("attention heads", arch.num_attention_heads),
        ("query groups (num_key_value_heads)", arch.num_query_groups),
        ("MLP channels (intermediate_size)", arch.ffn_hidden_size),
    ):
        if number % tensor:
            fits = _divisors(arch.num_attention_heads, arch.num_query_groups, arch.ffn_hidden_size)
            raise ValueError(
                f"{degree('tensor', tensor, names)}: does not divide this model's {number} {what}; "
                f"use one of {fits}."
            )
    if tensor > 1 and arch.qk_norm_across_heads:
        raise ValueError(
            f"{degree('tensor', tensor, names)}: this model's norm of queries and keys is one of "
            "all heads, of which a tensor-parallel rank has a part; use 1, and "
            f"{names['pipeline']} or {names['expert']} in its place."
        )
    _check_experts(arch, expert=expert, names=names)
    if pipeline > arch.num_layers:
        raise ValueError(
            f"{degree('pipeline', pipeline, names)}: each stage needs one of this model's "
            f"{arch.num_layers} layers; use at most {arch.num_layers}."
        )
    if virtual_pipeline is not None:
        _check_virtual(arch, pipeline=pipeline, virtual=virtual_pipeline)


def _check_experts(arch: Architecture, *, expert: int, names: Mapping[str, str]) -> None:
    if expert == 1:
        return
    if arch.mixture is None:
        raise ValueError(
            f"{degree('expert', expert, names)}: this model's layers have no experts to share; "
            "leave it 1."
        )
    if arch.mixture.num_experts % expert:
        raise ValueError(
            f"{degree('expert', expert, names)}: does not divide this model's "
            f"{arch.mixture.num_experts} experts; use one of "
            f"{_divisors(arch.mixture.num_experts)}."
        )


def _check_virtual(arch: Architecture, *, pipeline: int, virtual: int) -> None:
    name = f"parallel.virtual_pipeline_model_parallel_size = {virtual}"
    if pipeline == 1 or virtual < 2:
        raise ValueError(
            f"{name}: chunks a pipeline rank, needs 2 or more, and "
            f"parallel.pipeline_model_parallel_size ({pipeline}) 2 or more; raise them or leave it "
            "out."
        )
    if pipeline * virtual > arch.num_layers:
        raise ValueError(
            f"{name}: times the pipeline degree ({pipeline}) it is more than this model's "
            f"{arch.num_layers} layers, of which each chunk needs one; lower it or leave it out."
        )


def _divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


def check_fp8(arch: Architecture, fp8: str | None, *, tensor: int, name: str = "model.fp8") -> None:
    """That a model's products, shared by ``tensor`` ranks, can be in FP8 (``model/fp8.py``).

    Raises:
        ValueError: a mixture of experts, or sizes that are no multiples of 16.
    """
    if fp8 is None:
        return
    if arch.mixture is not None:
        raise ValueError(
            f"{name} = {fp8}: the model is a mixture of experts, whose products are not in FP8 "
            "here; leave it out."
        )
    sizes = {
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size / tensor ranks": arch.ffn_hidden_size // tensor,
        "query channels / tensor ranks": arch.num_attention_heads * arch.kv_channels // tensor,
        "key channels / tensor ranks": arch.num_query_groups * arch.kv_channels // tensor,
    }
    if wrong := {name: size for name, size in sizes.items() if size % FP8_MULTIPLE}:
        found = ", ".join(f"{name} = {size}" for name, size in wrong.items())
        raise ValueError(
            f"{name} = {fp8}: {found}, and FP8 products need multiples of {FP8_MULTIPLE}; leave it "
            "out, or use fewer tensor ranks."
        )
