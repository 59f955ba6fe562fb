"""Devices and process groups. Importing this package readies ``torch`` for Megatron-core."""

from megatron_mod.parallel import device

device.prepare()
