"""Plugin for Axolotl: adds `adapter: mask`, with the fields of `MaskConfig` under `mask:`.

plugins: [maskft_axolotl.MaskPlugin]
adapter: mask
mask: {gate: soft, modules: both}
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel
from pydantic import BaseModel, Field, field_validator

from maskft import MaskConfig  # registers the method with PEFT, which is what loading needs
from maskft.tuner import attach

ADAPTER = "mask"


class MaskArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    mask: dict[str, Any] = Field(default_factory=dict)
    """Fields of MaskConfig."""

    @field_validator("mask")
    @classmethod
    def _checked(cls, fields: dict[str, Any]) -> dict[str, Any]:
        try:
            MaskConfig(**fields)
        except TypeError as error:  # a field that it does not have; values it refuses are a ValueError already
            raise ValueError(str(error)) from error
        return fields


class MaskPlugin(BasePlugin):
    """Loads `adapter: mask` in place of Axolotl's LoRA."""

    def get_input_args(self) -> str:
        return f"{__name__}.MaskArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, MaskConfig | None] | None:
        """The masked model and its configuration; None for other adapters, which Axolotl then loads itself.

        `lora_model_dir` is Axolotl's name for a saved adapter of any kind.
        """
        if cfg.adapter != ADAPTER:
            return None
        config = MaskConfig(**dict(cfg.mask or {}))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return loaded, loaded.peft_config["default"]
        return attach(model, config), config
