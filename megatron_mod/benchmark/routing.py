"""Times of a routed layer beside the dense layer's, and beside the work that it saves."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_mod.hf.thresholds_mod import border_at, threshold_at
from megatron_mod.model import fp8
from megatron_mod.model.architecture import Architecture
from megatron_mod.model.builder import build_model, transformer_config
from megatron_mod.model.layer import RoutedTransformerLayer
from megatron_mod.model.layout import TokenLayout
from megatron_mod.model.specs import choose_implementation
from megatron_mod.parallel import device, topology
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import OF_ANY_MODEL, Scheme

# hidden size, MLP channels, heads, query groups, channels a head; SmolLM2's, Llama-3-8B's and less
SIZES = {
    "tiny": (128, 384, 4, 2, 32),
    "small": (576, 1536, 9, 3, 64),
    "medium": (2048, 5632, 16, 8, 128),
    "large": (4096, 14336, 32, 8, 128),
}
# Calls that are timed together: as in a model, a GPU is still busy when the next begins.
CALLS = 4 if device.HAS_GPU else 1
CAPACITIES = (0.25, 0.5, 0.75, 0.95)
SCHEMES = [(name, None) for name in OF_ANY_MODEL]
SCHEMES += [("attn_token", "selected"), ("block_token", "selected")]


@dataclass(frozen=True)
class Setting:
    """What all layers are timed with."""

    batch: int
    length: int
    repetitions: int
    training: bool
    implementation: str
    dtype: torch.dtype
    fp8: str | None = None


def architecture(size: str, args: Setting) -> Architecture:
    """Of a model of one such layer."""
    hidden, ffn, heads, groups, channels = SIZES[size]
    return Architecture(
        num_layers=1, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads,
        num_query_groups=groups, kv_channels=channels, vocab_size=16,
        max_sequence_length=args.length, layernorm_epsilon=1e-5, rotary_base=10000.0,
        tied_embeddings=True,
    )  # fmt: skip


def layer_of(size: str, routing: RoutingConfig | None, args: Setting):
    """A model's only layer with its rotary table."""
    arch = architecture(size, args)
    config = transformer_config(arch, dtype=args.dtype, fp8=args.fp8)
    model = build_model(arch, config, routing, implementation=args.implementation)[0]
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    return model.decoder.layers[0], model.rotary_pos_emb(args.length)


class Timed:
    """A layer, its inputs, and the times it took."""

    def __init__(self, name: str, layer, rotary, args: Setting, size: str) -> None:
        self.name, self.layer, self.rotary, self.training = name, layer, rotary, args.training
        layer.train(args.training)
        generator = torch.Generator().manual_seed(2)
        shape = (args.length, args.batch, SIZES[size][0])
        self.hidden = torch.randn(shape, generator=generator).to(device.device(), args.dtype)
        self.hidden.requires_grad_(args.training)
        self.times: list[float] = []
        # What a model's layers share.
        self.layout = TokenLayout.of_prompts(self.hidden, context_rank=0, context_ranks=1)

    def run(self) -> None:
        layout = self.layout if isinstance(self.layer, RoutedTransformerLayer) else None
        with fp8.products(self.layer.config):
            output, _ = self.layer(
                self.hidden,
                attention_mask=None,
                rotary_pos_emb=self.rotary,
                packed_seq_params=layout,
            )
        if self.training:
            output.sum().backward()

    def measure(self) -> None:
        device.synchronize()
        start = time.perf_counter()
        with torch.set_grad_enabled(self.training):
            for _ in range(CALLS):
                self.run()
        device.synchronize()
        self.times.append((time.perf_counter() - start) / CALLS)

    def set_capacity(self, capacity: float) -> float:
        """Move each router's threshold between its units' logits; returns the share that is
        kept."""
        layer = self.layer
        with torch.no_grad():
            normed = layer.input_layernorm(self.hidden)
            logits = [router(normed) for router in layer.routers.values()]
            if layer.routing.scheme.per_sequence:
                logits = [of_tokens.mean(0) for of_tokens in logits]
        borders = [border_at(units.flatten(), capacity) for units in logits]
        layer.routing = replace(layer.routing, threshold=tuple(map(threshold_at, borders)))
        kept = [units >= border for units, border in zip(logits, borders, strict=True)]
        return float(torch.stack(kept).double().mean())

    @contextlib.contextmanager
    def _forward_alone(self) -> Iterator[None]:
        was, self.training = self.training, False
        with torch.no_grad():
            yield
        self.training = was

    def work(self) -> int:
        """Floating-point operations of a forward pass."""
        counter = FlopCounterMode(display=False)
        with self._forward_alone(), sdpa_kernel(SDPBackend.MATH), counter:
            self.run()
        return counter.get_total_flops()

    def operations(self) -> int:
        """That the host dispatches in a forward pass, views aside; what a model's layers share has
        been made."""
        with self._forward_alone():
            self.run()
            with Operations() as counter:
                self.run()
        return counter.count


class Operations(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [each.alias_info for each in func._schema.returns]
        self.count += all(each is None or each.is_write for each in aliases)
        return func(*args, **(kwargs or {}))


def take_turns(layers: Sequence[Timed], repetitions: int) -> None:
    """Measure them all so many times, after two rounds that do not count."""
    for repetition in range(-2, repetitions):
        for timed in layers:
            timed.measure()
            if repetition < 0:
                timed.times.clear()


def compare(size: str, args: Setting) -> list[dict]:
    """All schemes of one size, a row for each capacity."""
    rows = []
    for granularity, keys_values in SCHEMES:
        dense = Timed("dense", *layer_of(size, None, args), args, size)
        routed = []
        for capacity in CAPACITIES:
            routing = RoutingConfig(
                granularity,
                (0,),
                (capacity,) * len(Scheme.parse(granularity).targets),
                keys_values=keys_values,
                training_compute="sparse",
            )
            timed = Timed(granularity, *layer_of(size, routing, args), args, size)
            timed.capacity = timed.set_capacity(capacity)
            routed.append(timed)
        take_turns([dense, *routed], args.repetitions)
        time_dense, work_dense = statistics.median(dense.times), work_of(dense, size, args)
        times = [statistics.median(timed.times) for timed in routed]
        dense_operations = dense.operations()
        meets = break_even([timed.capacity for timed in routed], times, time_dense)
        for timed, seconds in zip(routed, times, strict=True):
            ideal = 1 - work_of(timed, size, args) / work_dense
            rows.append(
                {
                    "size": size,
                    "granularity": granularity,
                    "keys_values": timed.layer.routing.keys_values,
                    "capacity": timed.capacity,
                    "dense_ms": 1e3 * time_dense,
                    "routed_ms": 1e3 * seconds,
                    "speedup": time_dense / seconds,
                    "ideal_speedup": 1 / (1 - ideal),
                    "share_of_ideal_saving": (1 - seconds / time_dense) / ideal
                    if ideal > 0.01
                    else None,
                    "break_even_capacity": meets,
                    "operations": timed.operations(),
                    "dense_operations": dense_operations,
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def work_of(timed: Timed, size: str, args: Setting) -> int:
    """Floating-point operations of a layer's forward pass, counted on a local layer of its kind:
    torch does not see what Transformer Engine multiplies."""
    if args.implementation == "local":
        return timed.work()
    local = replace(args, implementation="local")
    routing = getattr(timed.layer, "routing", None)
    twin = Timed(timed.name, *layer_of(size, routing, local), local, size)
    if routing is not None:
        twin.set_capacity(routing.capacity[0])
    return twin.work()


def share_of(ideal: float, reached: float) -> float | None:
    return reached / ideal if ideal > 0.01 else None


def break_even(capacities: list[float], times: list[float], dense: float) -> float | None:
    """The capacity whose time is ``dense`` on the least-squares line; ``None``: there is none."""
    if len(set(capacities)) < 2:
        return None
    slope, intercept = statistics.linear_regression(capacities, times)
    return (dense - intercept) / slope if slope > 0 else None


def line(row: dict) -> str:
    share, meets = row["share_of_ideal_saving"], row["break_even_capacity"]
    return (
        f"| {row['size']} | {row['granularity']} {row['keys_values'] or ''} |"
        f" {row['capacity']:.2f} | {row['dense_ms']:.2f} | {row['routed_ms']:.2f} |"
        f" {row['speedup']:.2f} | {row['ideal_speedup']:.2f} |"
        f" {'-' if share is None else f'{100 * share:.0f} %'} |"
        f" {'-' if meets is None else f'{meets:.2f}'} |"
        f" {row['operations']} ({row['dense_operations']}) |"
    )


def measure(
    sizes: Sequence[str],
    *,
    batch: int,
    length: int,
    repetitions: int,
    training: bool,
    implementation: str | None,
) -> list[dict]:
    """Print a table of all schemes and capacities at each of the sizes; its rows."""
    chosen = choose_implementation(implementation)
    dtype = torch.bfloat16 if device.HAS_GPU else torch.float32
    setting = Setting(batch, length, repetitions, training, chosen, dtype)
    print(f"{device.describe()}, {chosen}, {dtype}, {torch.__version__}")
    print(
        "| size | scheme | capacity | dense ms | routed ms | speed-up | ideal | share | meets |"
        " operations (dense) |"
    )
    print("| --- " * 10 + "|")
    with topology.single_process():
        return [row for size in sizes for row in compare(size, setting)]
