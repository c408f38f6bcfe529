"""The sizes of tiny models: of keys of a config, and of what single model types need beyond them."""

from typing import Any

VOCABULARY, WIDTH, HEADS, HEAD_WIDTH, DEPTH = 288, 32, 4, 8, 2
WINDOW = 8  # of sliding and chunked attention: shorter than the documents of the checks
N_POSITIONS = 256
FIRST_TOKEN_ID = 260  # the first id that no text of the checks has

LAYERS = r"(num|n)_(hidden_|encoder_|decoder_)?layers?|(encoder|decoder)_layers|num_blocks|num_layers_per_stack|depth"
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")

# By pattern of a key; the first that matches the full key counts.
SIZES: dict[str, Any] = {
    r"type_vocab_size": 2,
    r"ngram_vocab_size_base": 500,
    r"make_ngram_vocab_size_divisible_by": 8,
    r"(.*_)?vocab_size(_per_layer_input)?": VOCABULARY,
    r".*hash_byte_group_vocab|num_hash_buckets|num_position_embeddings": 64,
    r"hidden_size_per_layer_input": 8,
    # Experts.
    r"(moe|expert)_(intermediate|ffn_hidden|latent)_size|router_hidden_size": 16,
    r"(moe_)?num_(local_)?experts|n_routed_experts": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|zero_expert_num": 2,
    r"n_group|topk_group|num_expert_group|(moe_)?(n|num)_shared_experts": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_(start|end)_index|max_window_layers": 1,
    r"num_nextn_predict_layers|num_kv_shared_layers": 0,
    # Widths.
    r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|hidden_dim|(.*_)?ffn_hidden_size|n_inner|d_inner|d_ff|dff|dim_ff"
    r"|mlp_dim|feed_forward_size": 48,
    r"(backbone_|out_|true_|attention_|pooler_|downsample_)?hidden_size(_global)?|n_embd|d_model|dim|emb_dim|lru_width"
    r"|(input_|output_)?embedding_(size|dim)|word_embed_proj_dim|(shape|pronunciation)_embed_dim|entity_emb_size"
    r"|prediction_head_size": WIDTH,
    r"mamba_d_ssm": 2 * WIDTH,
    r"(kv|q|o)_lora_rank|qk_head_dim|(laurel|gated_norm|adapter)_rank|hc_lowrank|dim_model_base|ple_embed_dim": 16,
    r"(.*_)?head_dim|kv_channels|dim_head|d_head|d_kv|attention_head_size|query_pre_attn_scalar": HEAD_WIDTH,
    r"mamba_(d_head|headdim)|mamba_d_state|(ssm_)?state_size|(mamba_)?chunk_size": 8,
    # Heads.
    r"(linear_num_key|index_n|num_key_value|num_kv|kv_n|(swa_|global_)num_key_value|num_global_key_value)_heads": 2,
    r"num_query_groups": 2,
    r"mamba_(n|num)_heads": 8,
    r"mamba_n_?groups|n_groups|n_langs": 1,
    r"(.*_)?heads?": HEADS,
    r"mamba_dt_rank|time_step_rank|rotary_dim|d_rel|index_block_size|split_ngram_parts": 4,
    # Lengths.
    r"(.*_)?sliding_window(_size)?|window_size|attention_window(_size)?|local_attention(_window_len)?"
    r"|attention_chunk_size|keep_window_size|block_size|block_multiple_of|ffn_round_up_to_multiple_of": WINDOW,
    r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length"
    r"|max_(target|source)_positions|floor_scale": N_POSITIONS,
    r"index_topk(_blocks)?|rel_extent": 64,  # all keys: which of several equal ones are taken depends on padding
    r"sliding_window_pattern|layer_group_size|global_attn_every_n_layers|centroid_intermediate_top_k": 2,
    r"num_centroids": 8,
    # What an output layer does with logits, strong enough to be seen.
    r"final_logit_softcapping|logits_soft_cap|output_logit_soft_cap|logits_scaling": 2.0,
    r"lm_head_multiplier": 0.7,
    r"logit_scale": 0.5,
    r"initializer_range": 0.1,
}

# What the patterns cannot know, by model type, also of a part of another config: keys whose default is None, sizes that
# depend on one another, and what a small model would not have, such as a second type of attention.
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
SHARED_KEYS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
SHARED_KEYS |= {"num_kv_shared_layers": 2}
HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "use_mamba_kernels": False}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NO_EOS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": SLIDING | {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": SLIDING | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
    "esm": {"vocab_size": VOCABULARY, **NO_EOS},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3n_text": SHARED_KEYS | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size": [48] * 4},
    "gemma4_text": SHARED_KEYS,
    "gemma4_unified_text": SHARED_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "hunyuan_v1_moe": {"head_dim": HEAD_WIDTH},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "llama": {"num_key_value_heads": 2},
    "llama4_text": {
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "moe_layers": [1, 3],
    },
    "mamba2": {"expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "lilt": {"hidden_size": 48},
    "mistral4": {"head_dim": 16, "num_key_value_heads": HEADS},
    "perceiver": {"num_latents": 8, "d_latents": WIDTH, "num_blocks": 1, "num_self_attends_per_block": 1},
    "t5": {"decoder_start_token_id": 0},
    "ministral": SLIDING | {"head_dim": HEAD_WIDTH},
    "mobilebert": {"intra_bottleneck_size": WIDTH, "embedding_size": WIDTH},
    "nemotron": {"head_dim": HEAD_WIDTH, "num_key_value_heads": 2},
    "qwen2": SLIDING | {"use_sliding_window": True},
    "qwen3": SLIDING | {"use_sliding_window": True},
    "qwen4_exp_text": {
        "head_dim": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"], "num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "hash_seed": 0,
        "is_decoder": True,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "rwkv": {"rescale_every": 0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xlstm": {"chunkwise_kernel": "chunkwise--native_autograd", "hidden_size": 64, "embedding_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": HYBRID | {"attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 64},
    "zamba2": HYBRID | {"attention_head_dim": 16, "attention_hidden_size": 64, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}
FAMILIES["zamba"] |= {"attention_head_dim": 16}
FAMILIES["zamba2"] |= {"mamba_headdim": 8, "n_mamba_heads": 8, "num_query_groups": HEADS, "use_mem_rope": True}
# Model types of transformers' list of causal language models that do not predict tokens from tokens.
NOT_OF_TOKENS = {
    "gemma4_assistant": "it drafts tokens from the keys and values of another model",
    "gemma4_unified_assistant": "it drafts tokens from the keys and values of another model",
    "musicgen": "it generates audio",
    "musicgen_melody": "it generates audio",
}
