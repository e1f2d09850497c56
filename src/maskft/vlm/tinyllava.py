"""Import of TinyLLaVA Factory's checkpoints into the LLaVA form of Transformers.

Source: https://github.com/TinyLLaVA/TinyLLaVA_Factory, `tinyllava/model` and `tinyllava/data/template`. Two layouts:

    whole:  config.json, tokenizer, model.safetensors (or shards) with the prefixes language_model.,
            vision_tower._vision_tower. and connector._connector.
    parts:  config.json, tokenizer, language_model/, vision_tower/ and connector/ with a weight file each

What its forward pass does, and how it is kept here:

- It takes hidden state -2 of the tower and, with the strategy "patch", leaves the first token out, also of SigLIP,
  which has no class token: 728 image tokens of 729 patches. That is the strategy "default" here.
- Gemma multiplied all input embeddings by sqrt(hidden size), image features too. Transformers does so to token
  embeddings alone since, so the factor goes into the projector's last matrix.
- Phi's head has a bias, which `absorb_head_bias` moves.
- The image stands at the token -200, which is no row of the embeddings; here it gets a token of its own.
- Text before and after an image is tokenised apart, so sentencepiece may begin the second with a space;
  the chat template writes that space where it makes the same tokens.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskft.errors import MissingExtraError, ModelError, gathered
from maskft.folders import refuse_existing
from maskft.vlm.chat import vicuna_template
from maskft.vlm.compose import DTYPES, UNUSED, assemble, check_choice
from maskft.vlm.join import measure_tower

LANGUAGES = ("gemma", "llama", "phi", "qwen2", "stablelm")
TOWERS = ("siglip_vision_model", "clip_vision_model", "dinov2")
_PREFIXES = {
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector._connector.",
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
_BUFFERS = ("rotary_emb.inv_freq", "position_ids")  # saved by old versions, computed now
Parts = dict[str, dict[str, Tensor]]


def import_tinyllava(folder: Path, out: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Write a TinyLLaVA Factory checkpoint as an ordinary LLaVA folder. Runs none of its code and reads no pickle.

    Args:
        folder: the checkpoint.
        out: new or empty folder; it appears only once it is complete.
        dtype: "float32", "bfloat16" or "float16"; None that of the checkpoint.

    Returns:
        As `compose`, with "source".

    Raises:
        ModelError: the checkpoint is of another kind, incomplete, or has parts the LLaVA form cannot hold.
        RunError: `out` exists and is not empty.
    """
    refuse_existing(out)
    if dtype is not None:
        check_choice("--dtype", dtype, DTYPES)
    config = read_config(folder)
    projector = _connector_kind(config)
    tokenizer = _load_tokenizer(folder, config)
    images = _image_processor(folder, config)
    parts = _read_weights(folder)
    stored = str(next(iter(parts["language_model"].values())).dtype).removeprefix("torch.")
    language = _build(config["text_config"], parts["language_model"], "language_model", dtype or stored)
    tower = _build(config["vision_config"], parts["vision_tower"], "vision_tower", dtype or stored)
    measured = measure_tower(
        tower, images, layer=config.get("vision_feature_layer", -2), keep_class_token=True, name=f"in {folder}"
    )
    if config.get("vision_feature_select_strategy", "patch") == "patch":
        measured = measured._replace(strategy="default", tokens=measured.tokens - 1)
    made = assemble(
        out,
        tower=tower,
        images=images,
        features=measured,
        language=language,
        tokenizer=tokenizer,
        name=str(folder),
        projector=projector,
        weights=_projector_weights(config, projector, parts["connector"]),
        template=_template,
    )
    return {**made, "source": str(folder)}


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json, with the model types of its parts checked.

    Raises:
        ModelError: there is none, it is of another program, or names a part that cannot be imported.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"cannot read {folder / 'config.json'}: {error.strerror}. Give a checkpoint's folder."
        ) from error
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or not str(config.get("model_type", "")).startswith("tinyllava"):
        found = config.get("model_type") if isinstance(config, dict) else None
        raise ModelError(
            f"{folder} is not a checkpoint of TinyLLaVA Factory: model_type in its config.json is {found!r}, not "
            "'tinyllava'. A folder that Transformers knows needs no import; give it as model.base."
        )
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter (adapter_config.json). Merge it with TinyLLaVA Factory first.")
    for key, allowed in (("text_config", LANGUAGES), ("vision_config", TOWERS)):
        kind = config.get(key, {}).get("model_type") if isinstance(config.get(key), dict) else None
        if kind not in allowed:
            raise ModelError(f"{key}.model_type in {folder} is {kind!r}; what can be imported is {', '.join(allowed)}.")
    if config.get("vision_model_name_or_path2"):
        raise ModelError(f"{folder} mixes two vision towers (mof); a LLaVA model has one.")
    strategy = config.get("vision_feature_select_strategy", "patch")
    if strategy not in ("patch", "cls_patch"):
        raise ModelError(f"vision_feature_select_strategy in {folder} is {strategy!r}, but must be patch or cls_patch.")
    if (ratio := config.get("image_aspect_ratio") or "square") not in ("square", "pad"):
        raise ModelError(f"image_aspect_ratio in {folder} is {ratio!r}; what can be imported is square and pad.")
    return config


def _connector_kind(config: Mapping[str, Any]) -> str:
    kind = str(config.get("connector_type"))
    if kind in ("linear", "mlp1x_gelu"):
        return "linear"
    if kind != "mlp2x_gelu":
        raise ModelError(
            f"the checkpoint's connector is {kind!r}, which the LLaVA form cannot hold; what can be imported is "
            "linear, mlp1x_gelu and mlp2x_gelu."
        )
    return kind


def _projector_weights(config: Mapping[str, Any], projector: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The connector's tensors under the LLaVA projector's names, fp32, with Gemma's factor."""
    layers = {
        "linear": {"": "linear_1"},
        "mlp1x_gelu": {"0.": "linear_1"},
        "mlp2x_gelu": {"0.": "linear_1", "2.": "linear_2"},
    }
    names = {
        f"{old}{kind}": f"{new}.{kind}"
        for old, new in layers[config["connector_type"]].items()
        for kind in ("weight", "bias")
    }
    if names.keys() != tensors.keys():
        raise ModelError(
            f"the connector {config['connector_type']} needs the tensors {sorted(names)}, but has {sorted(tensors)}."
        )
    weights = {new: tensors[old].float() for old, new in names.items()}
    if config["text_config"]["model_type"] == "gemma":
        last = "linear_2" if projector == "mlp2x_gelu" else "linear_1"
        for name in (f"{last}.weight", f"{last}.bias"):
            weights[name] = weights[name] * weights[f"{last}.bias"].shape[0] ** 0.5
    return weights


def _read_weights(folder: Path) -> Parts:
    """The tensors of the three parts, without their prefixes."""
    parts: Parts = {name: {} for name in _PREFIXES}
    if all((folder / name).is_dir() for name in _PREFIXES):
        for name in _PREFIXES:
            prefix = "_connector." if name == "connector" else ""
            parts[name] = {key.removeprefix(prefix): value for key, value in _tensors(folder / name).items()}
        return parts
    unknown = []
    for key, tensor in _tensors(folder).items():
        for name, prefix in _PREFIXES.items():
            if key.startswith(prefix):
                parts[name][key.removeprefix(prefix)] = tensor
                break
        else:
            unknown.append(key)
    empty = [name for name, tensors in parts.items() if not tensors]
    if unknown or empty:
        raise ModelError(
            f"{folder} is not in TinyLLaVA Factory's layout. Tensors are named {', '.join(_PREFIXES.values())}; "
            + gathered([f"{key} is none of them" for key in unknown] + [f"{name} has no tensor" for name in empty])
        )
    return parts


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files. Raises ModelError where there is none, or a damaged one."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(folder.glob("*.bin"))
        if pickled:
            raise ModelError(
                f"{pickled[0]} is a pickle, which can run code when it is read, so it is not read here. Where you "
                'trust it, convert it: python -c "import torch, safetensors.torch as s; '
                f"s.save_file(torch.load('{pickled[0]}', map_location='cpu', weights_only=True), "
                f"'{pickled[0].with_name('model.safetensors')}')\""
            )
        raise ModelError(f"{folder} holds no .safetensors file.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read: {error}. Download it again.") from error
    return tensors


def _build(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], part: str, dtype: str) -> Any:
    """A Transformers model of a part's configuration and tensors, in evaluation mode."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig

    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    kind, tensors = settings.pop("model_type"), dict(tensors)
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    try:
        config = AutoConfig.for_model(kind, **settings)
        if getattr(config, "tie_word_embeddings", False) and head in tensors:  # tied ones have either name
            tensors.setdefault(embeddings, tensors.pop(head))
        if embeddings in tensors:
            config.vocab_size = tensors[embeddings].shape[0]
        known = MODEL_FOR_CAUSAL_LM_MAPPING if part == "language_model" else MODEL_MAPPING
        model, report = known[type(config)].from_pretrained(
            None, config=config, state_dict=tensors, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the checkpoint's {part} ({kind}) does not fit its configuration: {error}") from error
    problems = [f"{key} is missing" for key in _needed(report["missing_keys"], config)]
    problems += [f"{key} is unknown" for key in sorted(report["unexpected_keys"]) if not key.endswith(_BUFFERS)]
    if problems:
        raise ModelError(f"the checkpoint's {part} ({kind}) does not fit its configuration:\n{gathered(problems)}")
    return model.eval()


def _needed(missing: Iterable[str], config: Any) -> list[str]:
    """Missing tensors without those that are tied or not used."""
    tied = ("lm_head.weight",) if getattr(config, "tie_word_embeddings", False) else ()
    return sorted(key for key in missing if key not in tied and not key.startswith(UNUSED))


def _load_tokenizer(folder: Path, config: Mapping[str, Any]) -> Any:
    """The tokenizer as TinyLLaVA Factory prepares it: no padding token of its own where there is one for unknowns."""
    from transformers import AutoTokenizer

    present = [name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if "tokenizer_config.json" not in present or len(present) < 2:
        raise ModelError(
            f"{folder} holds no tokenizer. Copy the tokenizer's files of "
            f"{config.get('tokenizer_name_or_path') or 'its language model'} into it."
        )
    if "tokenizer.model" in present and "tokenizer.json" not in present and find_spec("sentencepiece") is None:
        raise MissingExtraError("sentencepiece", "pip install 'maskft[import]'", "The checkpoint's tokenizer.model")
    try:
        with tempfile.TemporaryDirectory() as copied:  # beside config.json its model type would be looked up
            for name in present:
                shutil.copy(folder / name, copied)
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            settings.pop("auto_map", None)
            if "tokenizer.model" in present:
                settings.setdefault("add_bos_token", True)
            (Path(copied) / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
            tokenizer = AutoTokenizer.from_pretrained(copied)
    except Exception as error:  # tokenizers raises that and nothing narrower
        raise ModelError(f"cannot load the tokenizer in {folder}: {error}") from error
    if config["text_config"]["model_type"] != "qwen2" and tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    tokenizer.chat_template = None
    return tokenizer


def _image_processor(folder: Path, config: Mapping[str, Any]) -> Any:
    """The tower's image processor: the folder's own, else the published one of its family."""
    from transformers import AutoImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    kind, size = config["vision_config"]["model_type"], config["vision_config"].get("image_size", 224)
    square = {"height": size, "width": size}
    if (folder / "preprocessor_config.json").is_file():
        images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    elif kind == "siglip_vision_model":
        images = SiglipImageProcessorPil(size=square)
    elif kind == "clip_vision_model":
        images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    else:
        raise ModelError(
            f"{folder} has no preprocessor_config.json, and towers of the type {kind} use several. Copy that of "
            f"{config.get('vision_model_name_or_path') or 'its vision tower'} into it."
        )
    if config.get("image_aspect_ratio") != "pad":
        return images
    settings = {key: value for key, value in images.to_dict().items() if key != "image_processor_type"}
    crop = settings.pop("crop_size", None) or square
    settings |= {"do_center_crop": settings.get("do_center_crop", False), "crop_size": crop, "do_pad": True}
    return LlavaImageProcessorPil(**settings)


def _template(tokenizer: Any, image_token: str) -> str:
    """The chat template whose tokens are those of TinyLLaVA Factory, which tokenises around an image apart."""
    texts = ("USER: ", "\nWhat is it? ASSISTANT: A cat.")
    start = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = [*start, *apart[0], tokenizer.convert_tokens_to_ids(image_token), *apart[1]]
    for after in ("\n", " \n"):
        if tokenizer(f"{texts[0]}{image_token}{after}{texts[1][1:]}")["input_ids"] == expected:
            return vicuna_template(image_token, tokenizer.eos_token, after_image=after)
    return vicuna_template(image_token, tokenizer.eos_token)
