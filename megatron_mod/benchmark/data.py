"""The data benchmark's figures as a person reads them."""

from __future__ import annotations

from megatron_mod.benchmark.data_speed import measure, needed_tokens_per_second
from megatron_mod.data.tokenizer import open_tokenizer


def compare(data: str, tokenizer: str, *, flops: float, parameters: float, **settings: int) -> dict:
    """Measure and print; the figures.

    Args:
        data: JSON lines file.
        tokenizer: Hugging Face folder.
        flops, parameters: of the device and of the model that is to be fed.
        settings: as ``benchmark.data_speed.measure`` takes them.

    Raises:
        ValueError: a folder without a tokenizer.
    """
    needed = needed_tokens_per_second(parameters=parameters, flops=flops)
    result = measure(data, open_tokenizer(tokenizer), **settings)
    result["needed_tokens_per_second"] = needed
    _print(result)
    return result


def _print(result: dict) -> None:
    wall, cpu = result["tokens_per_second"], result["tokens_per_cpu_second"]
    print(f"{result['samples']} samples, {result['tokens']} tokens")
    for name in wall:
        shares = [f"{of[name] / of['batch_encoding']:5.2f}" for of in (wall, cpu)]
        print(
            f"{name:18} {wall[name]:12,.0f} tokens/s, {cpu[name]:12,.0f} a core's second;"
            f" {shares[0]} and {shares[1]} of batch_encoding"
        )
    needed = result["needed_tokens_per_second"]
    for name, tokens in result["loader_tokens_per_second"].items():
        print(f"loader, {name:10} {tokens:12,.0f} tokens/s  {tokens / needed:5.1f} times the need")
    print("padding: " + ", ".join(f"{n} {100 * s:.1f} %" for n, s in result["padding"].items()))
