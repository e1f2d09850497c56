"""Mask fine-tuning for vision-language models.

`from maskft import MaskConfig` registers the method with PEFT; nothing else happens on import.

    `MaskConfig`   what is masked, and by which gate: the configuration that `peft.get_peft_model` takes
    `__version__`  of the package; the wheel's is read here

All else is imported from where it is: `maskft.gates`, `maskft.tuner`, `maskft.adapters`, `maskft.data`,
`maskft.recipe`, `maskft.training`, `maskft.evaluation`, `maskft.analysis`.
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
