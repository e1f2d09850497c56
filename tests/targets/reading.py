"""Language models."""

from __future__ import annotations

import transformers as t

from tests.targets.forms import EXPERTS, MOE, TEXT, WIDE, Family, Stack, llama, tokens

SHARED = " mlp.{}.{{gate,up,down}}_proj"
BOTTLENECK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

READING: dict[str, Family] = {
    "Llama": Family(lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)), llama("model.layers")),
    "GPT-2": Family(
        lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=128, **tokens())),
        llama("transformer.h", attn="attn.{c_attn,c_proj}", mlp="mlp.{c_fc,c_proj}"),
    ),
    "Phi-3": Family(
        lambda: t.Phi3ForCausalLM(t.Phi3Config(**TEXT)),
        llama("model.layers", attn="self_attn.{qkv,o}_proj", mlp="mlp.{gate_up,down}_proj"),
    ),
    "GPT-NeoX": Family(
        lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**{k: v for k, v in TEXT.items() if "key_value" not in k})),
        llama("gpt_neox.layers", attn="attention.{query_key_value,dense}", mlp="mlp.{dense_h_to_4h,dense_4h_to_h}"),
    ),
    "OPT": Family(
        lambda: t.OPTForCausalLM(
            t.OPTConfig(
                hidden_size=32,
                word_embed_proj_dim=16,
                ffn_dim=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                vocab_size=128,
                **tokens(),
            )
        ),
        llama("model.decoder.layers", attn="self_attn.{q,k,v,out}_proj", mlp="{fc1,fc2}"),
    ),
    "Qwen3-MoE": Family(lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**MOE)), llama("model.layers", mlp=EXPERTS)),
    "Qwen2-MoE": Family(
        lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=12)),
        llama("model.layers", mlp=EXPERTS + SHARED.format("shared_expert")),
    ),
    "Mixtral": Family(
        lambda: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=4)), llama("model.layers", mlp=EXPERTS)
    ),
    "GPT-OSS": Family(
        lambda: t.GptOssForCausalLM(t.GptOssConfig(**WIDE, num_local_experts=4)), llama("model.layers", mlp=EXPERTS)
    ),
    "DeepSeek-V3": Family(
        lambda: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(
                **{**TEXT, "num_key_value_heads": 4},
                **BOTTLENECK,
                moe_intermediate_size=12,
                n_routed_experts=4,
                n_group=2,
                topk_group=1,
                num_experts_per_tok=2,
                first_k_dense_replace=1,
            )
        ),
        (
            *llama("model.layers", attn="self_attn.{q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj}", mlp=""),
            Stack("model.layers", (0,), "", "mlp.{gate,up,down}_proj"),
            Stack("model.layers", (1, 2), "", EXPERTS + SHARED.format("shared_experts")),
        ),
    ),
    "T5": Family(
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=128, decoder_start_token_id=0)
        ),
        (
            *llama("encoder.block", attn="layer.0.SelfAttention.{q,k,v,o}", mlp="layer.1.DenseReluDense.{wi,wo}"),
            *llama(
                "decoder.block",
                attn="layer.0.SelfAttention.{q,k,v,o} layer.1.EncDecAttention.{q,k,v,o}",
                mlp="layer.2.DenseReluDense.{wi,wo}",
            ),
        ),
    ),
    "BERT": Family(
        lambda: t.BertLMHeadModel(
            t.BertConfig(**{k: v for k, v in TEXT.items() if "key_value" not in k}, is_decoder=True)
        ),
        llama(
            "bert.encoder.layer",
            attn="attention.self.{query,key,value} attention.output.dense",
            mlp="intermediate.dense output.dense",
        ),
    ),
}
