"""Train Mixture-of-Depths routers into a frozen language model.

torchrun --nproc_per_node N launch/pretrain_router.py --config FILE [--section.field value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.config import cli
from megatron_mod.config.errors import one_message
from megatron_mod.config.lifetime import end_with_torchrun


def main() -> None:
    end_with_torchrun()
    with one_message():
        config = cli.parse(description=__doc__)
        # The heavy imports come after the command line has been understood.
        from megatron_mod.parallel import topology
        from megatron_mod.training.loop import describe, prepare, train

        plan = prepare(config)
        topology.initialize(plan.topology, seed=config.train.seed)
        describe(config, plan)
        train(config, plan)
        topology.shutdown()


if __name__ == "__main__":
    main()
