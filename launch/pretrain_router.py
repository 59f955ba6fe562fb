"""Train Mixture-of-Depths routers into a frozen language model.

torchrun --standalone --nproc_per_node N launch/pretrain_router.py --config FILE \\
    [--section.field value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.process import catch_signals, one_message


def main() -> None:
    with one_message():
        catch_signals()
        from megatron_mod.config import cli

        config = cli.parse(description=__doc__)
        # The heavy imports come after the command line has been understood.
        from megatron_mod.parallel import topology
        from megatron_mod.training.loop import describe, prepare, train

        limit = {"minutes": config.train.timeout, "setting": "train.timeout"}
        topology.meet(**limit)
        plan = prepare(config)
        with topology.joined(plan.topology, seed=config.train.seed, **limit):
            describe(config, plan)
            train(config, plan)


if __name__ == "__main__":
    main()
