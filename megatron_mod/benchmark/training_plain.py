"""Routers trained in plain Transformers, as they are published, and full fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM

from megatron_mod.benchmark.training_ways import Taken
from megatron_mod.config.schema import Config
from megatron_mod.data.batch import MicroBatch
from megatron_mod.data.chat import IGNORE
from megatron_mod.data.dataset import load_data
from megatron_mod.data.loader import Loader
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.routing.config import resolve_layers

FULL_LR = 1e-5  # a router's would ruin the weights


def wide(dtype: torch.dtype) -> torch.dtype:
    """What routers and losses are computed in."""
    return torch.promote_types(dtype, torch.float32)


def gradient_of(weight: Tensor) -> Tensor:
    """A copy of what a backward pass has left."""
    assert weight.grad is not None
    return weight.grad.detach().clone()


class MaskedUpdate:
    """Multiplies what a decoder layer of Transformers adds to its input, or one of its two parts,
    by a straight-through mask of each token (Router-Tuning, arXiv 2410.13184):
    ``m = 1 if p >= t else 0`` with ``p = sigmoid(w . norm(x))``; backward ``dL/dp = dL/dm``.
    """

    def __init__(self, layer: torch.nn.Module, *, target: str, threshold: float) -> None:
        """``target``: ``attn``, ``mlp`` or ``block``."""
        self.target, self.threshold = target, threshold
        norm = layer.get_parameter("input_layernorm.weight")
        self.weight = torch.zeros(1, len(norm), device=norm.device, dtype=wide(norm.dtype))
        self.weight.requires_grad_()
        layer.get_submodule("input_layernorm").register_forward_hook(self._decide)
        attention, mlp = (layer.get_submodule(name) for name in ("self_attn", "mlp"))
        attention.register_forward_hook(partial(self._masked, part="attn"))
        mlp.register_forward_hook(partial(self._masked, part="mlp"))
        if target == "block":
            layer.register_forward_hook(self._block)

    def _decide(self, module: torch.nn.Module, inputs: tuple, normed: Tensor) -> None:
        score = torch.sigmoid(linear(normed.to(self.weight), self.weight))
        kept = (score >= self.threshold).to(score)
        self.mask = (kept + score - score.detach()).to(normed.dtype)
        self.added: list[Tensor] = []

    def _masked(self, module: torch.nn.Module, inputs: tuple, output, *, part: str):
        added, *others = output if isinstance(output, tuple) else (output,)
        self.added.append(added)
        if part != self.target:
            return None
        return (self.mask * added, *others) if others else self.mask * added

    def _block(self, layer: torch.nn.Module, inputs: tuple, output):
        """Anew from the layer's input ``[B, S, H]`` and the two parts."""
        masked = inputs[0] + self.mask * sum(self.added)
        return (masked, *output[1:]) if isinstance(output, tuple) else masked


class Plain:
    """A training of a way in plain Transformers, in one process."""

    def __init__(self, way: str, config: Config, *, dtype: torch.dtype) -> None:
        """Load model and data.

        Args:
            way: ``published``, ``published_stop`` or ``full``.
            dtype: of frozen weights and activations.
        """
        assert config.model.hf_path is not None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(
            config.model.hf_path,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
        )
        cast(torch.nn.Module, self.model).to(device)  # Transformers' own has lost its signature
        shape = self.model.config
        tokenizer = load_tokenizer(config.model.hf_path, vocab_size=shape.vocab_size)
        samples, _ = load_data(config.data, tokenizer, seed=config.train.seed)
        self.loader = Loader(
            samples,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            seed=config.train.seed,
            parts=samples.weights,
        )
        self.shape = (shape.hidden_size, shape.intermediate_size)
        self.routers: list[Tensor] = []
        self.model.train()
        if way != "full":
            self.model.requires_grad_(False)
            layers = resolve_layers(config.router.layers, num_layers=shape.num_hidden_layers)
            target = config.router.granularity.removesuffix("_token")
            for number in layers:
                layer = self.model.get_submodule(f"model.layers.{number}")
                added = MaskedUpdate(layer, target=target, threshold=config.router.threshold)
                self.routers.append(added.weight)
        if way == "published":
            self.model.enable_input_require_grads()
        self.trained = self.routers or list(self.model.parameters())
        rate = config.optimizer.lr if self.routers else FULL_LR
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=0.0)

    def step(self, number: int) -> Taken:
        """Take a step, counted from 0."""
        batch = self.loader.step(number)
        for micro_batch in batch.micro_batches:
            self._loss(micro_batch.to(self.model.device), batch.num_labels).backward()
        gradient = None
        if self.routers:
            gradient = torch.cat([gradient_of(weight) for weight in self.routers])
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Taken(batch.num_tokens, gradient)

    def _loss(self, batch: MicroBatch, num_labels: int) -> Tensor:
        """Padding is at the end of rows, where causal attention needs no mask for it."""
        output = self.model(batch.input_ids, use_cache=False)
        logits = output.logits.to(wide(output.logits.dtype)).flatten(0, 1)
        labels = batch.labels.flatten()
        total = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        return total / num_labels

    def capacity(self) -> float | None:
        """Everything is computed."""
        return None
