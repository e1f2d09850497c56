"""External plugin for ms-swift: adds the tuner `mask`.

    MASKFT='{"gate": "soft"}' swift sft --external_plugins maskft_swift.py --tuner_type mask ...

ms-swift imports this file and looks tuners up in `tuners_map`. Its arguments have no place for the fields of
`MaskConfig`, so they come from the environment variable MASKFT, as a JSON object.
"""

from __future__ import annotations

import json
import os
from typing import Any

from swift.tuner_plugin import PeftTuner, tuners_map

from maskft import MaskConfig  # registers the method with PEFT, which is what loading needs
from maskft.errors import UserError
from maskft.tuner import attach

SETTINGS = "MASKFT"


class MaskTuner(PeftTuner):
    """Saving and loading are PEFT's, as for ms-swift's own PEFT tuners."""

    @staticmethod
    def prepare_model(args: Any, model: Any) -> Any:
        """Freeze the model and put masks on it."""
        return attach(model, config())


def config() -> MaskConfig:
    """The configuration in the environment; the defaults where the variable is not set.

    Raises:
        UserError: the variable holds no JSON object, or a field that MaskConfig does not have or refuses.
    """
    text = os.environ.get(SETTINGS, "{}")
    try:
        return MaskConfig(**json.loads(text))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{SETTINGS} is {text!r}: {error}. It must be a JSON object with fields of maskft.MaskConfig, such as "
            '{"gate": "soft"}.'
        ) from error


tuners_map["mask"] = MaskTuner
