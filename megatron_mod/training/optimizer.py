"""Megatron's DDP, optimizer and learning-rate schedule around what trains."""

from __future__ import annotations

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import (
    ParamGroupOverride,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mod.config.schema import Config
from megatron_mod.model.builder import ModelChunks


def wrap_ddp(
    model: ModelChunks, *, use_distributed_optimizer: bool
) -> list[DistributedDataParallel]:
    """Megatron's DDP around each chunk of a model that is already frozen; gradients are sums over
    the ranks, not means."""
    wrapped = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
                use_distributed_optimizer=use_distributed_optimizer,
            ),
            module=chunk,
        )
        for chunk in model
    ]
    no_sync = [chunk.no_sync for chunk in wrapped]
    model.config.finalize_model_grads_func = _sum_gradients
    model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def _sum_gradients(chunks: list, num_tokens: torch.Tensor | None = None, **kwargs: object) -> None:
    """Megatron's gradient reduction without its division by the tokens: shares are exact."""
    finalize_model_grads(chunks, None, **kwargs)


class _OneShape(OptimizerParamScheduler):
    """Each group's learning rate is the same share of its peak; Megatron's own would begin a
    warm-up at one rate for all."""

    def get_lr(self, param_group: dict) -> float:
        return super().get_lr({}) * (param_group["max_lr"] / self.max_lr)


BESIDE_ROUTERS = 0.1  # of their learning rate, for what would be undone by it


def own_rates(config: Config) -> dict[str, float]:
    """Peak learning rates of what has another than the rest, by its name in a layer."""
    parts, lr = config.train.trainable.split("+"), config.optimizer.lr  # "all": nothing has
    beside, found = BESIDE_ROUTERS * lr if "routers" in parts else lr, {}
    if "lora" in parts:
        found["lora"] = config.lora.lr or beside
    if "stand_ins" in parts:
        found["stand_in"] = config.router.stand_in_lr or beside
    return {name: rate for name, rate in found.items() if rate != lr}


def build_optimizer(
    chunks: list[DistributedDataParallel], config: Config, *, steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam over what trains and a cosine schedule with warm-up, down to zero after ``steps``;
    adapters and stand-ins may have a peak of their own. What the model has in bfloat16 is stepped
    in fp32 (Megatron's main parameters); norms and biases do not decay."""
    o, trained = config.optimizer, [p for c in chunks for p in c.parameters() if p.requires_grad]
    in_bfloat16 = any(parameter.dtype == torch.bfloat16 for parameter in trained)
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=0.0,
        weight_decay=o.weight_decay,
        clip_grad=o.clip_grad,
        adam_beta1=0.9,
        adam_beta2=0.999,
        params_dtype=torch.bfloat16 if in_bfloat16 else torch.float32,
        bf16=in_bfloat16,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    groups = get_standard_config_overrides(settings)
    if in_bfloat16:
        # A group of their own, with what all have: Megatron's distributed optimizer confuses the
        # parameters of a group of two dtypes as it saves it.
        wide = ParamPredicate(name="float32", fn=lambda param: param.dtype == torch.float32)
        groups[ParamKey(predicate=wide)] = ParamGroupOverride(max_lr=o.lr)  # type: ignore[typeddict-item]
    for name, rate in own_rates(config).items():
        own = ParamGroupOverride(max_lr=rate)  # type: ignore[typeddict-item]  # the rest
        groups[ParamKey(name=f"*.{name}.*")] = own
    optimizer = get_megatron_optimizer(settings, chunks, groups)
    warmup = min(round(o.warmup_fraction * steps), max(steps - 1, 0))
    scheduler = _OneShape(
        optimizer,
        init_lr=o.lr / (warmup + 1),
        max_lr=o.lr,
        min_lr=0.0,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(steps, 1),
        lr_decay_style="cosine",
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=max(steps, 1),
        wd_incr_style="constant",
    )
    return optimizer, scheduler
