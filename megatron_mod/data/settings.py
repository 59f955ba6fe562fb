"""What a caller's users call the settings that messages about data ask them to change."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SettingNames:
    """The name of each setting; ``None``: there is none, so no message may name it."""

    max_length: str
    cache: str
    on_bad_record: str | None = None
    template: str | None = None


OF_A_RUN = SettingNames("data.max_length", "data.cache", "data.on_bad_record", "data.template")
OF_A_TOOL = SettingNames("--max-length", "$MEGATRON_MOD_CACHE")
