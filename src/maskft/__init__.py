"""Mask fine-tuning for vision-language models.

`from maskft import MaskConfig` registers the method with PEFT; nothing else happens on import.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskft.tuner import MaskConfig

__all__ = ["MaskConfig", "__version__"]
__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> Any:
    if name == "MaskConfig":
        from maskft.tuner import MaskConfig

        return MaskConfig
    raise AttributeError(f"module 'maskft' has no attribute '{name}'")
