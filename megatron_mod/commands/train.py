"""``megatron-mod-train``."""

from __future__ import annotations

from megatron_mod.commands.command import mistakes_told
from megatron_mod.config import cli
from megatron_mod.config.lifetime import end_with_torchrun
from megatron_mod.config.validate import check_outputs

DESCRIPTION = """Train Mixture-of-Depths routers into a frozen language model.

torchrun --nproc_per_node N launch/pretrain_router.py --config FILE [--section.field value ...]"""


def main(arguments: list[str] | None = None) -> None:
    end_with_torchrun()
    with mistakes_told(network=True):  # data.train may name a dataset that is not here yet
        config = cli.parse(arguments, description=DESCRIPTION)
        check_outputs(config)
        # The heavy imports come after the command line has been understood.
        from megatron_mod.parallel import topology
        from megatron_mod.training.loop import describe, prepare, train

        plan = prepare(config)
        topology.initialize(plan.topology, seed=config.train.seed)
        describe(config, plan)
        train(config, plan)
        topology.shutdown()
