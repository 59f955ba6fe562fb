"""``megatron-mod-train``."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from dataclasses import dataclass

from megatron_mod import verbosity
from megatron_mod.commands.command import mistakes_told
from megatron_mod.config import cli
from megatron_mod.config.machines import Machines
from megatron_mod.config.options import option, parse_options
from megatron_mod.config.validate import check_outputs
from megatron_mod.process import catch_signals, is_first_rank

DESCRIPTION = """Train Mixture-of-Depths routers into a language model, frozen or whole.

torchrun --standalone --nproc_per_node N launch/pretrain_router.py --config FILE \\
    [--section.field value ...] [--log-level debug|info|warning|error]
python launch/pretrain_router.py --dry-run --config FILE [--section.field value ...] \\
    [--nodes N] [--gpus-per-node N] [--gpu h100] [--hf-config FILE]

--dry-run says what would run, starts nothing and needs no GPU: the configuration, files found and
missing, ranks needed, and the estimate of tools/estimate.py, whose options it takes."""


@dataclass(frozen=True, kw_only=True)
class DryRun(Machines):
    """Options beside a training's settings.

    Args:
        dry_run: say what would run, and stop.
    """

    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not self.dry_run and value != field.default:
                raise ValueError(
                    f"{option(field.name)} {value}: would be ignored without --dry-run; add that, "
                    "or leave it out."
                )


def main(arguments: list[str] | None = None) -> None:
    # data.train may name a dataset that is not here yet
    with mistakes_told(network=True), ExitStack() as stack:
        catch_signals()
        arguments = sys.argv[1:] if arguments is None else arguments
        names = [option(field.name) for field in dataclasses.fields(DryRun)]
        own, settings = cli.split_off(arguments, names)
        config = cli.parse(settings, description=DESCRIPTION)
        check_outputs(config)
        options = parse_options(DryRun, own)
        stack.enter_context(verbosity.at(config.logging.level))
        verbosity.tell_libraries(config.logging.level)
        # The heavy imports come after the command line has been understood.
        if options.dry_run:
            if is_first_rank():
                from megatron_mod.estimate.dry_run import show

                show(config, options)
            return
        from megatron_mod.parallel import topology
        from megatron_mod.training.loop import train
        from megatron_mod.training.plan import prepare

        limit = {"minutes": config.train.timeout, "setting": "train.timeout"}
        topology.meet(**limit)
        plan = prepare(config)
        with topology.joined(plan.topology, seed=config.train.seed, **limit):
            train(config, plan)
