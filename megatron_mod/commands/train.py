"""``megatron-mod-train``."""

from __future__ import annotations

from megatron_mod.commands.command import mistakes_told
from megatron_mod.config import cli
from megatron_mod.config.validate import check_outputs
from megatron_mod.process import catch_signals

DESCRIPTION = """Train Mixture-of-Depths routers into a frozen language model.

torchrun --standalone --nproc_per_node N launch/pretrain_router.py --config FILE \\
    [--section.field value ...]"""


def main(arguments: list[str] | None = None) -> None:
    with mistakes_told(network=True):  # data.train may name a dataset that is not here yet
        catch_signals()
        config = cli.parse(arguments, description=DESCRIPTION)
        check_outputs(config)
        # The heavy imports come after the command line has been understood.
        from megatron_mod.parallel import topology
        from megatron_mod.training.loop import describe, prepare, train

        limit = {"minutes": config.train.timeout, "setting": "train.timeout"}
        topology.meet(**limit)
        plan = prepare(config)
        with topology.joined(plan.topology, seed=config.train.seed, **limit):
            describe(config, plan)
            train(config, plan)
