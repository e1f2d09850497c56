"""Hard masks of many adapters in memory at one bit a weight, one of them on the model at a time.

    bank = MaskBank(model)            # the bare base model
    bank.add("counting", folder)      # an adapter saved with storage "bits"
    bank.use("counting")              # the model's weights are now W * m
    bank.use(None)                    # and W again, bit for bit

The model stays a plain one, as fast as the base. Beside the masks the bank keeps a copy of the weights under them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from maskft.adapters.files import SavedAdapter
from maskft.compiling import compiled
from maskft.errors import AdapterError, UserError, gathered
from maskft.fingerprint import fingerprint

_PREFIX = "base_model.model."
_SCORES = ".mask_scores"


class MaskBank:
    """Switches a model between the hard masks of several adapters.

    Args:
        model: a base model, without adapters on it, in fp32, bf16 or fp16.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._originals: dict[str, Tensor] = {}
        self._masks: dict[str, dict[str, Tensor]] = {}
        self.active: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of the adapters there are."""
        return list(self._masks)

    @property
    def bytes(self) -> int:
        """Size of all masks."""
        return sum(plane.nbytes for planes in self._masks.values() for plane in planes.values())

    def add(self, name: str, folder: Path) -> None:
        """Read an adapter's masks.

        Args:
            name: what to call it.
            folder: where it was saved, with storage "bits".

        Raises:
            UserError: the name is taken, or masks are on the model while it is added.
            AdapterError: it has other things than masks in bits, or layers that the model doesn't have; it is of
                another base.
        """
        if name in self._masks:
            raise UserError(f"there is a mask '{name}' in the bank already; take another name.")
        if self.active is not None:
            raise UserError(f"the mask '{self.active}' is on the model; call use(None) before another is added.")
        adapter = SavedAdapter(folder)
        problems = [f"{other} is no mask" for other in adapter.others]
        planes = {}
        for score in adapter.scores:
            layer = score.removeprefix(_PREFIX).removesuffix(_SCORES)
            try:
                planes[layer] = self._planes(adapter, score, layer)
            except AdapterError as error:
                problems.append(f"{score} {error}")
        if problems or not planes:
            raise AdapterError(f"{folder} cannot be put into a bank:\n{gathered(problems or ['it has no masks'])}")
        expected = adapter.config.base_fingerprint
        if expected and expected != fingerprint({layer: self._weight(layer) for layer in planes}):
            raise AdapterError(f"{folder} was trained on another base: the weights under its masks differ.")
        self._masks[name] = planes

    @torch.no_grad()
    def use(self, name: str | None) -> None:
        """Put a mask on the model in place of what is on it; None puts the base's weights back.

        Raises:
            UserError: there is no mask of this name.
        """
        if name is not None and name not in self._masks:
            raise UserError(f"there is no mask '{name}' in the bank; it has {', '.join(self._masks) or 'none'}.")
        planes = {} if name is None else self._masks[name]
        for layer in self._originals.keys() - planes.keys():
            self._weight(layer).copy_(self._originals.pop(layer))
        for layer, plane in planes.items():
            weight = self._weight(layer)
            original = self._originals.setdefault(layer, weight.clone())
            _put_on(original.view(8, -1), plane, weight.view(8, -1))
        self.active = name

    def _weight(self, layer: str) -> Tensor:
        weight: Tensor = self._modules[layer].weight
        return weight.detach()

    def _planes(self, adapter: SavedAdapter, score: str, layer: str) -> Tensor:
        """The mask as bytes (n / 8,): bit b of byte i is that of entry b n/8 + i, so that a bit serves neighbours."""
        if not adapter.packed(score):
            raise AdapterError("is not packed. Pack it: maskft pack FOLDER OUT --storage bits")
        kept = adapter.read(score)
        if kept.dtype != torch.bool:
            raise AdapterError("is a soft mask")
        module = self._modules.get(layer)
        if not isinstance(module, nn.Linear):
            raise AdapterError("belongs to no linear layer of this model")
        weight = self._weight(layer)
        if weight.shape != kept.shape or not weight.is_floating_point():
            raise AdapterError(f"is of shape {tuple(kept.shape)}, its weight {tuple(weight.shape)} of {weight.dtype}")
        if kept.numel() % 8 or not weight.is_contiguous():
            raise AdapterError("has a number of entries that is no multiple of 8")
        bits = kept.view(8, -1).to(torch.uint8)
        planes = torch.zeros(bits.shape[1], dtype=torch.uint8)
        for place in range(8):
            planes |= bits[place] << place
        return planes.to(weight.device)


@compiled
def _put_on(original: Tensor, planes: Tensor, weight: Tensor) -> None:
    """weight (8, n / 8) = original where its bit is set, else 0."""
    places = torch.arange(8, dtype=torch.uint8, device=planes.device)
    kept = (planes[None, :] >> places[:, None]) & 1
    weight.copy_(torch.where(kept.bool(), original, 0.0))
