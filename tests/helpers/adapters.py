"""LoRA adapters that ``peft`` makes, on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_mod.config.lora import LoraSettings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS = LoraSettings(4, 6.0, 0.0, ("q_proj", "down_proj"), (0, 1, 2, 3))


def save_adapter(folder: Path, hf: Path, **changes: object) -> Path:
    """Save an adapter for a folder's model of four layers: that of ``SETTINGS`` but for some
    changes to ``peft.LoraConfig``; its ``B`` are not zero."""
    import peft

    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(SETTINGS.targets), **changes}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(hf)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
