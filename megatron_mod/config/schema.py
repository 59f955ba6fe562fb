"""Every setting of a training run: name, meaning, unit and range.

The YAML file and the command line (``--section.field value``) both follow these
dataclasses, and ``--help`` is made from their docstrings. ``router`` and ``lora``, which depend on
the model's shape, have files of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_mod.config.lora_section import LoraConfig
from megatron_mod.config.router_section import RouterConfig
from megatron_mod.config.rules import (
    AT_LEAST_0,
    COUNT,
    SEED,
    SHARE,
    OutputFolder,
    Range,
    setting,
)

ALL_PARTS = ("base", "routers", "stand_ins")  # of train.trainable: all
MINUTES_OF_A_YEAR = 525_600


@dataclass
class ModelConfig:
    """The model: `checkpoint`, or `hf_path`; or `config`, to train one from scratch.

    Args:
        checkpoint: folder that tools/convert_hf_to_megatron.py, Megatron-LM or Megatron-Bridge
            wrote, or a run of ours that trained the whole model, or one of its steps.
        hf_path: Hugging Face folder to train from without converting it, each rank reading its
            part; with a checkpoint of Megatron-LM or Megatron-Bridge, the folder with its
            config.json and tokenizer.
        config: shape of a model that is trained from scratch (train.trainable: all): a Hugging Face
            config.json, a folder with one, or its fields (`{model_type: llama, hidden_size: 256,
            ...}`; those left out have the family's defaults); data.tokenizer says which tokenizer
            it has, where the folder has none.
        routers: folder with routers to start from: a training run, or one of the published
            Router-Tuning code; unset: those beside the checkpoint, if any, else untrained ones.
        lora: folder with adapters to start from: a PEFT adapter of this model, or a training run;
            they train if train.trainable says so, and else stay as they are; unset: new ones, if
            lora.rank asks for any.
        dtype: what weights and activations are held in; routers and adapters are float32, and other
            weights that train (train.trainable: all) have a float32 copy in the optimizer.
        transformer_impl: the layers' modules: `transformer_engine` (GPUs only) or `local`,
            Megatron's own with torch's attention; unset: Transformer Engine where it works, but
            `local` in float32, which Transformer Engine multiplies as TF32.
        fp8: in which format Transformer Engine multiplies by frozen weights: `hybrid` (forward in
            E4M3, backward in E5M2) or `e4m3`, each tensor scaled as it is; on GPUs that have FP8
            (Ada, Hopper and later), in bfloat16; unset: in the dtype.
    """

    checkpoint: str | None = None
    hf_path: str | None = None
    config: str | dict[str, Any] | None = None
    routers: str | None = None
    lora: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    transformer_impl: Literal["local", "transformer_engine"] | None = None
    fp8: Literal["hybrid", "e4m3"] | None = None


@dataclass
class DataConfig:
    """What is trained on.

    Args:
        train: JSON lines, JSON, Parquet or text (.txt) file, folder of such files, or name of a
            dataset (`name` or `name:split`); a list of them; or a mapping to weights: how many
            times an epoch holds each sample, above 0 (2.9 is twice, and 90 percent of them once
            more). A record holds `messages` (a list of `role`, `content`), `prompt` and
            `completion`, or a `text`, which is cut into pieces of max_length tokens with every
            token labelled, as a .txt file is.
        validation: the same, without weights, to measure the loss on; needs
            train.validation_interval.
        validation_split: share of the training samples that is held out for validation instead,
            drawn with train.seed; 0 to 1, both excluded but for 0: none.
        max_train_samples: samples an epoch at most, drawn once with train.seed; at least 1; unset:
            all.
        max_length: tokens a sample is cut to, at least 2.
        format: what records are: `conversations`, or `text`, documents that are cut into rows of
            max_length tokens with every token labelled; `auto`: of each record what its fields say.
        template: conversation to text: `tokenizer` its own chat template, `published`
            Router-Tuning's, `auto` the tokenizer's if it has one.
        tokenizer: folder of a Hugging Face tokenizer or SentencePiece .model file; unset: the
            model's.
        packing: put several documents into a row of up to max_length tokens, each attended and
            routed on its own; else one a row, rows of like length together. `auto`: where two or
            more fit into a row and every rank and pipeline stage still gets several rows a step.
        on_bad_record: `stop` at a record that cannot be used, or `skip` it: counted, and written
            to rejects.jsonl in checkpoint.save.
        cache: folder for tokenised data, which all jobs may share; unset: $MEGATRON_MOD_CACHE or
            ~/.cache/megatron_mod.
    """

    train: dict[str, float] | list[str] | str
    validation: list[str] | str | None = None
    validation_split: float = setting(Range(least=0, below=1), default=0.0)
    max_train_samples: int | None = setting(COUNT, default=None)
    max_length: int = setting(Range(least=2), default=2048)
    format: Literal["auto", "conversations", "text"] = "auto"
    template: Literal["auto", "published", "tokenizer"] = "auto"
    tokenizer: str | None = None
    packing: bool | Literal["auto"] = "auto"
    on_bad_record: Literal["stop", "skip"] = "stop"
    cache: str | None = None


@dataclass
class ParallelConfig:
    """How the job's ranks share the work; what the degrees leave over is data parallel.

    Args:
        tensor_model_parallel_size: ranks that share each layer; divides heads and query groups.
        pipeline_model_parallel_size: ranks that share the layers, each a stage of them.
        pipeline_layout: how many layers each stage holds: `auto`, so that the slowest has least to
            compute (backward ends at the first routed layer, and the last stage has the output
            layer); `even`; or a list with the layers of each stage, such as `[18, 12]`. With a
            virtual pipeline a list has a number for each part, in the order of the layers.
        virtual_pipeline_model_parallel_size: parts of the model each pipeline rank holds, at least
            2, for smaller pipeline bubbles; unset: one.
        context_parallel_size: ranks that share each sequence, from the embedding to the loss.
        expert_model_parallel_size: ranks that share each layer's experts, of those that are data or
            context parallel; divides both these and the number of experts.
        num_layers_in_first_pipeline_stage: layers of the first stage, the others sharing the rest
            evenly, in place of a pipeline_layout that says the same; unset: as that says.
        sequence_parallel: tensor-parallel ranks also split the sequence between layers; needs
            tensor_model_parallel_size above 1.
        use_distributed_optimizer: data-parallel ranks split the optimizer's state.
    """

    tensor_model_parallel_size: int = setting(COUNT, default=1)
    pipeline_model_parallel_size: int = setting(COUNT, default=1)
    pipeline_layout: Literal["auto", "even"] | list[int] = setting(AT_LEAST_0, default="auto")
    virtual_pipeline_model_parallel_size: int | None = setting(Range(least=2), default=None)
    context_parallel_size: int = setting(COUNT, default=1)
    expert_model_parallel_size: int = setting(COUNT, default=1)
    num_layers_in_first_pipeline_stage: int | None = setting(COUNT, default=None)
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False

    @property
    def degrees(self) -> dict[str, int]:
        """Those that multiply, as ``config/ranks.py`` calls them; data parallel ranks are left."""
        return {
            "tensor": self.tensor_model_parallel_size,
            "pipeline": self.pipeline_model_parallel_size,
            "context": self.context_parallel_size,
        }


@dataclass
class TrainConfig:
    """How long and on how much.

    Args:
        steps: optimizer steps; 0 saves the untrained routers. Either this or epochs.
        epochs: how many times all training samples are gone through, above 0, parts of an epoch
            too: so many steps, rounded up, as data.train's weights, data.max_train_samples and
            data.validation_split leave samples for.
        global_batch_size: documents (sequences) a step, over all ranks, packed or not.
        micro_batch_size: rows a forward pass; divides global_batch_size / data ranks.
        seed: of the data order and of initialisation; 0 to 4294967295.
        validation_interval: steps between measurements on data.validation; 0: none.
        max_skipped_steps: steps in a row that may be skipped because the loss or a gradient is not
            finite, before the run stops; 0 stops at the first.
        timeout: minutes, above 0, that the ranks wait for one that does not answer before the run
            stops and names it; also of every collective.
        exit_duration: minutes, above 0, since the job began after which it stops: at the end of a
            step, which it saves first; the same command goes on. For a limit that a batch system
            sets. Unset: none.
        exit_interval: steps after every so many of which it stops in the same way; 0: never.
        loss: what is minimised: `task`, the labels' cross entropy; `distill`, the Kullback-Leibler
            divergence from the dense model, the same weights with routing off, which costs one more
            forward pass; `both`, their sum.
        trainable: what trains: the `routers`, or with them the stand-ins (`routers+stand_ins`), the
            adapters of the section lora (`routers+lora`) or both (`routers+stand_ins+lora`); or
            `lora`, adapters alone: given routers (model.routers) then decide as they are, or there
            are none (router.layers: []); or `all`: every parameter, stepped in float32 whatever
            model.dtype is, with routers and stand-ins, or without any (router.layers: []); each
            checkpoint then holds the whole model.
        frozen_prefix: what becomes of the layers before the first that is routed or has adapters,
            whose result is the same whenever a sample is read: `recompute` them, or `cache` it:
            compute it once, keep it on the disk (hidden size x bytes of model.dtype a token), and
            train without these layers.
        prefix_cache: folder for that, which runs and sweeps of the same model and data share, and
            all machines of a job; unset: `prefix` in data.cache.
        recompute: activations that backward computes again, for memory: `none`; `selective`, those
            of the MLPs, which are more than half; `full`, all but what enters a layer. Nothing is
            kept, nor computed again, below the first that trains.
        deterministic: on a GPU, let equal steps give equal results to the last bit, so that a run
            that goes on is the run in one go; costs some time in attention's backward pass. A CPU
            does so anyway.
    """

    steps: int | None = setting(AT_LEAST_0, default=None)
    epochs: float | None = setting(Range(above=0), default=None)
    global_batch_size: int = setting(COUNT, default=64)
    micro_batch_size: int = setting(COUNT, default=1)
    seed: int = setting(SEED, default=1234)
    validation_interval: int = setting(AT_LEAST_0, default=0)
    max_skipped_steps: int = setting(AT_LEAST_0, default=3)
    timeout: float = setting(Range(above=0, below=MINUTES_OF_A_YEAR), default=10.0)
    exit_duration: float | None = setting(Range(above=0, below=MINUTES_OF_A_YEAR), default=None)
    exit_interval: int = setting(AT_LEAST_0, default=0)
    loss: Literal["task", "distill", "both"] = "task"
    trainable: Literal[
        "routers", "routers+stand_ins", "routers+lora", "routers+stand_ins+lora", "lora", "all"
    ] = "routers"
    frozen_prefix: Literal["recompute", "cache"] = "recompute"
    prefix_cache: str | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    deterministic: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the model that train (``model/trainable.py``)."""
        return ALL_PARTS if self.trainable == "all" else tuple(self.trainable.split("+"))


@dataclass
class OptimizerConfig:
    """Adam with a cosine schedule down to zero.

    Args:
        lr: peak learning rate, above 0; that of adapters (lora.lr) and of stand-ins
            (router.stand_in_lr) may be another.
        warmup_fraction: share of the steps over which the learning rate rises to lr; 0 to 1.
        weight_decay: decoupled weight decay, at least 0; norms and biases have none.
        clip_grad: largest gradient norm; 0 does not clip.
        average_fraction: share of the steps, the last ones, over which what trains is averaged for
            the final checkpoint; 0 keeps the last step's; 0 to 1.
    """

    lr: float = setting(Range(above=0), default=1e-3)
    warmup_fraction: float = setting(SHARE, default=0.03)
    weight_decay: float = setting(AT_LEAST_0, default=0.0)
    clip_grad: float = setting(AT_LEAST_0, default=1.0)
    average_fraction: float = setting(SHARE, default=0.0)


@dataclass
class CheckpointConfig:
    """What is kept of the training.

    Args:
        save: folder for the routers, the resolved configuration and the metrics; where it already
            holds a run of the same settings, that run goes on from its newest checkpoint.
        interval: steps between checkpoints; 0: only at the end.
        keep: newest checkpoints that are kept; 0: all.
        on_corrupt: what to do on resuming when the newest checkpoint is damaged: `stop`, or go on
            from the `previous` whole one.
        on_save_error: what to do when a checkpoint cannot be written, as on a full disk: `stop`, or
            `continue` to the next one; the last step's must be written.
    """

    save: str = setting(OutputFolder())
    interval: int = setting(AT_LEAST_0, default=0)
    keep: int = setting(AT_LEAST_0, default=3)
    on_corrupt: Literal["stop", "previous"] = "stop"
    on_save_error: Literal["stop", "continue"] = "stop"


@dataclass
class LoggingConfig:
    """What one sees of a training, and what is kept of that. Every record goes into `metrics.jsonl`
    in checkpoint.save; where one cannot be written, there or elsewhere, checkpoint.on_save_error
    says what happens.

    Args:
        interval: steps between records, at least 1.
        level: what is said, and `--log-level` for short: `info`, progress and what happens (on a
            terminal a live display, else a line a record); `warning`, only what may be wrong;
            `error`, only what ends the run; `debug`, also all that Megatron, Transformers, datasets
            and torch.distributed log, on every rank.
        timers: time the parts of a step (data, forward, backward, optimizer, validation,
            checkpoint), for which the host waits for the device at each border.
        tensorboard: write `tensorboard/` in checkpoint.save.
        wandb: send records to Weights & Biases, which has to be installed: `true`, as its own
            variables say (WANDB_MODE, WANDB_ENTITY and so on); `online`; or `offline`, into
            `wandb/` in checkpoint.save, for `wandb sync`.
        wandb_project: the project there; unset: `megatron_mod`.
        wandb_name: what the run is called there; unset: as the folder checkpoint.save.
    """

    interval: int = setting(COUNT, default=1)
    level: Literal["debug", "info", "warning", "error"] = "info"
    timers: bool = False
    tensorboard: bool = True
    wandb: bool | Literal["online", "offline"] = False
    wandb_project: str | None = None
    wandb_name: str | None = None


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig
    router: RouterConfig
    data: DataConfig
    parallel: ParallelConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    lora: LoraConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
