"""Vision-language models."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import nn

from tests.targets.forms import (
    EXPERTS,
    IMAGE_TOKEN,
    MOE,
    TEXT,
    VISION,
    WIDE,
    Family,
    Stack,
    clip,
    llama,
    patches,
    pixels,
)

QWEN_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
QWEN_TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 101, "vision_start_token_id": 102}
QWEN_TOKENS["vision_end_token_id"] = 103
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
LINEARS = "model.multi_modal_projector.linear_{1,2}"
QWEN_VISUAL = {"prefix": "model.visual.blocks", "attn": "attn.{qkv,proj}"}


def llava(vision: Any, text: Any, **others: Any) -> nn.Module:
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, **others)
    )


SEEING: dict[str, Family] = {
    "LLaVA (CLIP + Llama)": Family(
        lambda: llava(t.CLIPVisionConfig(**VISION), t.LlamaConfig(**TEXT)), llama(), clip(depth=2), LINEARS, pixels(1)
    ),
    "LLaVA (SigLIP + Gemma)": Family(
        lambda: llava(
            t.SiglipVisionConfig(**VISION),
            t.GemmaConfig(**WIDE),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        llama(),
        clip(),
        LINEARS,
        pixels(1),
    ),
    "LLaVA (CLIP + Phi-2)": Family(
        lambda: llava(t.CLIPVisionConfig(**VISION), t.PhiConfig(**TEXT)),
        llama(attn="self_attn.{q_proj,k_proj,v_proj,dense}", mlp="mlp.{fc1,fc2}"),
        clip(depth=2),
        LINEARS,
        pixels(1),
    ),
    "LLaVA (SigLIP + Qwen2)": Family(
        lambda: llava(t.SiglipVisionConfig(**VISION), t.Qwen2Config(**TEXT), vision_feature_select_strategy="full"),
        llama(),
        clip(depth=2),
        LINEARS,
        pixels(1),
    ),
    "LLaVA (DINOv2 + Llama)": Family(
        lambda: llava(
            t.Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"}), t.LlamaConfig(**TEXT)
        ),
        llama(),
        clip("model.vision_tower.encoder.layer", depth=2, attn="attention.{q,k,v,o}_proj"),
        LINEARS,
        pixels(1),
    ),
    "LLaVA-NeXT": Family(
        lambda: t.LlavaNextForConditionalGeneration(
            t.LlavaNextConfig(
                vision_config=t.CLIPVisionConfig(**VISION),
                text_config=t.LlamaConfig(**TEXT),
                image_token_index=IMAGE_TOKEN,
                image_grid_pinpoints=[[28, 28]],
            )
        ),
        llama(),
        clip(depth=2),
        LINEARS,
        pixels(1, 2, image_sizes=torch.tensor([[28, 28]])),
    ),
    "LLaVA-OneVision": Family(
        lambda: t.LlavaOnevisionForConditionalGeneration(
            t.LlavaOnevisionConfig(
                vision_config=t.SiglipVisionConfig(**VISION),
                text_config=t.Qwen2Config(**TEXT),
                image_token_index=IMAGE_TOKEN,
                image_grid_pinpoints=[[28, 28]],
            )
        ),
        llama(),
        clip(),
        LINEARS,
        pixels(1, 2, image_sizes=torch.tensor([[28, 28]])),
    ),
    "VipLLaVA": Family(
        lambda: t.VipLlavaForConditionalGeneration(
            t.VipLlavaConfig(
                vision_config=t.CLIPVisionConfig(**VISION),
                text_config=t.LlamaConfig(**TEXT),
                image_token_index=IMAGE_TOKEN,
                vision_feature_layers=[-2, 1],
            )
        ),
        llama(),
        clip(depth=2),
        LINEARS,
        pixels(1),
    ),
    "Qwen2-VL": Family(
        lambda: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(
                text_config={**TEXT, **ROPE},
                vision_config={"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
                **QWEN_TOKENS,
            )
        ),
        llama(),
        clip(**QWEN_VISUAL),
        "model.visual.merger.mlp.{0,2}",
        patches(3 * 2 * 14 * 14),
    ),
    "Qwen2.5-VL": Family(
        lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(text_config={**TEXT, **ROPE}, vision_config=QWEN_VISION, **QWEN_TOKENS)
        ),
        llama(),
        clip(**QWEN_VISUAL, mlp="mlp.{gate,up,down}_proj"),
        "model.visual.merger.mlp.{0,2}",
        patches(3 * 2 * 14 * 14),
    ),
    "Qwen3-VL": Family(
        lambda: t.Qwen3VLForConditionalGeneration(
            t.Qwen3VLConfig(
                text_config={**WIDE, **ROPE},
                vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
                **QWEN_TOKENS,
            )
        ),
        llama(),
        clip(**QWEN_VISUAL, mlp="mlp.linear_{fc1,fc2}"),
        "model.visual.merger.linear_{fc1,fc2} model.visual.deepstack_merger_list.{0,1}.linear_{fc1,fc2}",
        patches(3 * 2 * 16 * 16),
    ),
    "Qwen3-VL-MoE": Family(
        lambda: t.Qwen3VLMoeForConditionalGeneration(
            t.Qwen3VLMoeConfig(
                text_config={**MOE, **ROPE},
                vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
                **QWEN_TOKENS,
            )
        ),
        llama(mlp=EXPERTS),
        clip(**QWEN_VISUAL, mlp="mlp.linear_{fc1,fc2}"),
        "model.visual.merger.linear_{fc1,fc2} model.visual.deepstack_merger_list.{0,1}.linear_{fc1,fc2}",
        patches(3 * 2 * 16 * 16),
    ),
    "SmolVLM": Family(
        lambda: t.SmolVLMForConditionalGeneration(
            t.SmolVLMConfig(
                text_config={"model_type": "llama", **TEXT}, vision_config=VISION, image_token_id=IMAGE_TOKEN
            )
        ),
        llama("model.text_model.layers"),
        clip("model.vision_model.encoder.layers"),
        "model.connector.modality_projection.proj",
        pixels(1, 1),
    ),
    "Idefics3": Family(
        lambda: t.Idefics3ForConditionalGeneration(
            t.Idefics3Config(
                text_config={"model_type": "llama", **TEXT}, vision_config=VISION, image_token_id=IMAGE_TOKEN
            )
        ),
        llama("model.text_model.layers"),
        clip("model.vision_model.encoder.layers"),
        "model.connector.modality_projection.proj",
        pixels(1, 1),
    ),
    "PaliGemma": Family(
        lambda: t.PaliGemmaForConditionalGeneration(
            t.PaliGemmaConfig(
                text_config={"model_type": "gemma", **WIDE},
                vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
                projection_dim=32,
                image_token_index=IMAGE_TOKEN,
            )
        ),
        llama(),
        clip(),
        "model.multi_modal_projector.linear",
        pixels(1),
    ),
    "Gemma-3": Family(
        lambda: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(text_config=WIDE, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN)
        ),
        llama(),
        clip(),
        "model.multi_modal_projector.mm_input_projection_weight",
        pixels(1),
    ),
    "InternVL": Family(
        lambda: t.InternVLForConditionalGeneration(
            t.InternVLConfig(
                text_config={"model_type": "qwen2", **TEXT},
                vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
                image_token_id=IMAGE_TOKEN,
            )
        ),
        llama(),
        clip("model.vision_tower.encoder.layer", attn="attention.{q_proj,k_proj,v_proj,projection_layer}"),
        LINEARS,
        pixels(1),
    ),
    "Mistral-3 (Pixtral)": Family(
        lambda: t.Mistral3ForConditionalGeneration(
            t.Mistral3Config(
                text_config={"model_type": "mistral", **WIDE},
                vision_config={"model_type": "pixtral", **VISION, "image_size": 56},
                image_token_index=IMAGE_TOKEN,
            )
        ),
        llama(),
        clip(
            "model.vision_tower.transformer.layers",
            attn="attention.{q,k,v,o}_proj",
            mlp="feed_forward.{gate,up,down}_proj",
        ),
        f"model.multi_modal_projector.patch_merger.merging_layer {LINEARS}",
        pixels(1, size=56, image_sizes=torch.tensor([[56, 56]])),
    ),
    "Llama-4": Family(
        lambda: t.Llama4ForConditionalGeneration(
            t.Llama4Config(
                text_config={
                    **WIDE,
                    "intermediate_size_mlp": 48,
                    "num_local_experts": 4,
                    "interleave_moe_layer_step": 2,
                },
                vision_config={
                    **VISION,
                    "intermediate_size": 128,
                    "vision_output_dim": 32,
                    "projector_input_dim": 32,
                    "projector_output_dim": 32,
                },
                image_token_index=IMAGE_TOKEN,
            )
        ),
        (
            *llama("language_model.model.layers", mlp=""),
            Stack("language_model.model.layers", (0, 2), "", "feed_forward.{gate,up,down}_proj"),
            Stack(
                "language_model.model.layers",
                (1,),
                "",
                "feed_forward.experts.{gate_up,down}_proj feed_forward.shared_expert.{gate,up,down}_proj",
            ),
        ),
        clip("vision_model.model.layers", attn="self_attn.{q,k,v,o}_proj"),
        "vision_model.vision_adapter.mlp.{fc1,fc2} multi_modal_projector.linear_1",
        pixels(1),
    ),
    "Mllama": Family(
        lambda: t.MllamaForConditionalGeneration(
            t.MllamaConfig(
                text_config={**TEXT, "cross_attention_layers": [1]},
                vision_config={
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 3,
                    "num_global_layers": 2,
                    "attention_heads": 4,
                    "image_size": 28,
                    "patch_size": 14,
                    "vision_output_dim": 64,
                    "intermediate_layers_indices": [0],
                },
                image_token_index=IMAGE_TOKEN,
            )
        ),
        (
            *llama(attn=""),
            Stack("model.language_model.layers", (0, 2), "self_attn.{q,k,v,o}_proj", ""),
            Stack("model.language_model.layers", (1,), "cross_attn.{q,k,v,o}_proj", ""),
        ),
        (
            *clip("model.vision_model.transformer.layers", attn="self_attn.{q,k,v,o}_proj"),
            *clip("model.vision_model.global_transformer.layers", depth=2, attn="self_attn.{q,k,v,o}_proj"),
        ),
        "model.multi_modal_projector",
        pixels(
            1,
            1,
            4,
            aspect_ratio_ids=torch.tensor([[1]]),
            aspect_ratio_mask=torch.ones(1, 1, 4, dtype=torch.long),
            cross_attention_mask=torch.ones(1, 14, 1, 4),
        ),
    ),
    "BLIP-2": Family(
        lambda: t.Blip2ForConditionalGeneration(
            t.Blip2Config(
                vision_config=VISION,
                qformer_config={
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "encoder_hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "vocab_size": 64,
                },
                text_config={"model_type": "llama", **TEXT},
                num_query_tokens=4,
                image_token_index=IMAGE_TOKEN,
            )
        ),
        llama("language_model.model.layers"),
        clip("vision_model.encoder.layers", attn="self_attn.{qkv,projection}"),
        "language_projection",
        pixels(1),
    ),
}
