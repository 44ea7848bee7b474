"""The model families: names in a table, numbers from config.json. Declarations only; architecture.py and
checkpoint.py read them.

A row holds
    prefix, names  of the tensors in the file, canonical part -> template. Several parts, one name: a fused
                   tensor, its rows in that order
    buffers        tensors that are no weights (a pattern for the whole name, without the prefix)
    numbers        field of Config, or what leads to one -> what transformers' configuration class takes when
                   config.json is silent. window is that of the blocks from slide_from on, but for each
                   whole_every-th
    keys           where it differs from KEYS; "": no key says it
    must           keys that the class reads, with the one value that we support
    also           keys that architecture.py reads by name, or that have no effect up to `context` tokens
    biased         the parts with a bias whatever config.json says
and whatever neither file nor config.json shows: a literal, with the place that proves it. A class named in a
comment is one of transformers, in modeling_FAMILY.py or configuration_FAMILY.py.

A key of config.json that transformers' classes of the family read stands in numbers, must or also, or is
inert (tests/test_load.py asks the installed transformers). Any other changes nothing there either: it is
ignored, and named in the line that load prints.

A new family: a row here, a variant and its mutations in tests/test_model.py.
"""
import re

MOST_LAYERS = 4096  # more is a damaged file: refused before anything is made that long
KEYS = dict(  # field of Config -> key of config.json, unless a family's row names others (any of several)
    vocab="vocab_size", context="max_position_embeddings", width="hidden_size", layers="num_hidden_layers",
    heads="num_attention_heads", kv_heads="num_key_value_heads", head_dim="head_dim",
    inner="intermediate_size", tied="tie_word_embeddings", act="hidden_act", eps="rms_norm_eps",
    base="rope_theta", local_base="rope_local_base_freq", fraction="", window="sliding_window",
    scale="query_pre_attn_scalar", attn_cap="attn_logit_softcapping", logit_cap="final_logit_softcapping",
    parallel="use_parallel_residual", attention_bias="attention_bias", mlp_bias="mlp_bias",
    slide_from="max_window_layers", whole_every="sliding_window_pattern")
WHOLE = "vocab context width layers heads kv_heads head_dim inner window slide_from whole_every".split()
LOGICAL = "tied parallel attention_bias mlp_bias use_sliding_window".split()
NULLABLE = "kv_heads head_dim inner window scale attn_cap logit_cap".split()  # null: none, or from the others
GENERATION = (  # keys of GenerationConfig: PreTrainedConfig drops them
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature "
    "top_k top_p typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens num_assistant_tokens "
    "num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind")
INERT_KEYS = re.compile(  # keys that change nothing in a forward pass without dropout
    r"model_type|architectures|transformers_version|_?name_or_path|_commit_hash|(torch_)?dtype|use_cache"
    r"|.*(dropout|_pdrop|layerdrop)(_prob)?|initializer_range|init_std|(bos|eos|pad|unk|sep)_token_id|prefix"
    r"|summary_.*|id2label|label2id|_?num_labels|task_specific_params|n_special|predict_special_tokens"
    r"|output_.*|n_ctx|is_decoder|_?(attn|experts)_implementation|tie_last_hidden_states"
    r"|pretraining_tp|is_llama_config|gradient_checkpointing|chunk_size_feed_forward|is_encoder_decoder"
    r"|return_dict|problem_type|tokenizer_class|reorder_and_upcast_attn|cache_implementation|"
    + GENERATION.replace(" ", "|"))
MUST = dict(  # in every family: read elsewhere than in its own classes
    is_causal=True, per_layer_config=None, transformers_weights=None)


def but(row: dict, names: dict = {}, numbers: dict = {}, **changes) -> dict:
    """A row with some entries changed; a part named None is taken out."""
    named = {part: name for part, name in (row["names"] | names).items() if name}
    return row | changes | dict(names=named, numbers=row["numbers"] | numbers)


LLAMA = dict(
    prefix="model.", buffers=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    must=dict(partial_rotary_factor=1.0),  # LlamaRotaryEmbedding: read where RoPE is scaled
    names={"embed": "embed_tokens", "norm": "norm", "head": "lm_head", "norm1": "layers.{}.input_layernorm",
           "q": "layers.{}.self_attn.q_proj", "k": "layers.{}.self_attn.k_proj",
           "v": "layers.{}.self_attn.v_proj", "o": "layers.{}.self_attn.o_proj",
           "norm2": "layers.{}.post_attention_layernorm", "gate": "layers.{}.mlp.gate_proj",
           "up": "layers.{}.mlp.up_proj", "down": "layers.{}.mlp.down_proj"},
    numbers=dict(vocab=32000, context=2048, width=4096, layers=32, heads=32, kv_heads=None, head_dim=None,
                 inner=11008, act="silu", eps=1e-6, tied=False, base=1e4, fraction=1.0,
                 attention_bias=False, mlp_bias=False))
QK_NORM = {"q_norm": "layers.{}.self_attn.q_norm", "k_norm": "layers.{}.self_attn.k_norm"}
POST_NORMS = {"post1": "layers.{}.post_attention_layernorm", "post2": "layers.{}.post_feedforward_layernorm"}
UNBIASED = dict(attention_bias="", mlp_bias="")  # keys that these classes do not read
MISTRAL = but(
    LLAMA, keys=UNBIASED,
    numbers=dict(context=131072, kv_heads=8, inner=14336, window=4096))  # MistralModel: in all blocks
QWEN2 = but(
    LLAMA, numbers=dict(vocab=151936, context=32768, kv_heads=32, inner=22016, window=4096,
                        slide_from=28),  # Qwen2Config.layer_types; none at all without use_sliding_window
    biased="q k v",  # Qwen2Attention: bias=True for q, k, v and False for o; no key says so
    also="use_sliding_window layer_types", keys=UNBIASED)
QWEN3 = but(
    QWEN2, names=QK_NORM, numbers=dict(head_dim=128), keys=dict(mlp_bias=""),
    biased="")  # Qwen3Attention: config.attention_bias for all four
OLMO2 = but(
    LLAMA, names=QK_NORM | POST_NORMS | {"norm1": None, "norm2": None}, numbers=dict(vocab=50304, eps=1e-5),
    keys=dict(mlp_bias=""), wide_qk_norm=True)  # Olmo2Attention: q_norm and k_norm over all heads together
PHI3 = but(
    LLAMA, names={"q": None, "k": None, "v": None, "q k v": "layers.{}.self_attn.qkv_proj",
                  "gate": None, "up": None, "gate up": "layers.{}.mlp.gate_up_proj"},
    numbers=dict(vocab=32064, context=4096, width=3072, inner=8192, eps=1e-5,
                 window=None),  # Phi3Model: in all blocks, where there is one
    keys=dict(fraction="partial_rotary_factor", **UNBIASED), must={},
    also="original_max_position_embeddings")  # read by longrope alone, which is refused
GEMMA = but(
    LLAMA, numbers=dict(vocab=256000, context=8192, width=3072, layers=28, heads=16, kv_heads=16,
                        head_dim=256, inner=24576, act="gelu_pytorch_tanh", tied=True),
    must=LLAMA["must"] | dict(use_bidirectional_attention=False), keys=dict(mlp_bias=""),
    plus_one=True,     # GemmaRMSNorm multiplies by 1 + weight, in float32
    embed_scale=True,  # GemmaModel: embeddings times sqrt(width), a factor rounded to the activations' dtype
    act_means={"gelu": "gelu_pytorch_tanh"})  # early files say gelu, mean tanh: transformers #29402
GEMMA_TWICE_NORMED = but(  # Gemma2DecoderLayer, Gemma3DecoderLayer: a norm before and after each part
    GEMMA, names=POST_NORMS | {"norm2": "layers.{}.pre_feedforward_layernorm"},
    numbers=dict(width=2304, layers=26, heads=8, kv_heads=4, inner=9216, scale=256, logit_cap=None,
                 window=4096),
    keys=dict(act="hidden_activation", mlp_bias=""), act_means={})  # from Gemma 2 on, gelu means gelu
GEMMA2 = but(
    GEMMA_TWICE_NORMED, also="layer_types",
    keys=dict(act="hidden_activation", mlp_bias="", whole_every=""),
    numbers=dict(attn_cap=50.0, logit_cap=30.0, whole_every=2))  # Gemma2Config.layer_types: every second
GEMMA3 = but(
    GEMMA_TWICE_NORMED, names=QK_NORM,
    numbers=dict(vocab=262208, context=131072, base=1e6, local_base=1e4,  # Gemma3RotaryEmbedding: two bases
                 whole_every=6),  # Gemma3TextConfig.layer_types: blocks 5, 11, ... see all
    must=GEMMA["must"] | dict(attn_logit_softcapping=None),
    also="layer_types _sliding_window_pattern")
GPT2 = dict(
    prefix="transformer.", buffers=r"h\.\d+\.attn\.(masked_)?bias",
    layer_norm=True, biased="q k v o up down",  # GPT2Block: nn.LayerNorm, Conv1D with a bias
    names={"embed": "wte", "pos": "wpe", "norm": "ln_f", "head": "lm_head", "norm1": "h.{}.ln_1",
           "q k v": "h.{}.attn.c_attn", "o": "h.{}.attn.c_proj", "norm2": "h.{}.ln_2", "up": "h.{}.mlp.c_fc",
           "down": "h.{}.mlp.c_proj"},
    numbers=dict(vocab=50257, context=1024, width=768, layers=12, heads=12, inner=None, act="gelu_new",
                 eps=1e-5, tied=True),
    keys=dict(width="n_embd hidden_size", layers="n_layer num_hidden_layers", inner="n_inner",
              heads="n_head num_attention_heads", context="n_positions max_position_embeddings",
              act="activation_function", eps="layer_norm_epsilon"),
    must=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    transposed=True)  # Conv1D keeps its matrices (in, out)
GPT_NEO = but(
    GPT2, names={"q k v": None, "q": "h.{}.attn.attention.q_proj", "k": "h.{}.attn.attention.k_proj",
                 "v": "h.{}.attn.attention.v_proj", "o": "h.{}.attn.attention.out_proj"},
    buffers=r"h\.\d+\.attn\.attention\.(masked_)?bias", biased="o up down", transposed=False,
    numbers=dict(context=2048, width=2048, layers=24, heads=16, window=256),
    keys=dict(layers="num_layers num_hidden_layers", heads="num_heads num_attention_heads",
              act="activation_function", eps="layer_norm_epsilon", window="window_size"),
    kinds=[[["global", "local"], 12]],  # GPTNeoConfig.attention_types: [[kinds, times], ...] of the blocks
    also="attention_types attention_layers", must={},
    unscaled=True)  # GPTNeoSelfAttention never divides by sqrt(D)
QWEN = but(  # first generation: QWenAttention and QWenMLP in the repositories' own modeling_qwen.py
    GPT2, names={"pos": None, "gate": "h.{}.mlp.w2", "up": "h.{}.mlp.w1"},
    buffers=r"(h\.\d+\.attn\.)?rotary_emb\.inv_freq", biased="q k v", layer_norm=False, transposed=False,
    numbers=dict(vocab=151936, width=4096, layers=32, heads=32, head_dim=128, inner=22016, act="silu",
                 eps=1e-6, tied=False, context=8192, base=1e4, fraction=1.0),
    keys=dict(head_dim="kv_channels", eps="layer_norm_epsilon", base="rotary_emb_base", fraction="rotary_pct",
              act="",  # QWenMLP: silu, no key says so
              context="seq_length"),  # up to here logn attention and dynamic NTK are the identity: no more
    also="auto_map max_position_embeddings use_logn_attn use_dynamic_ntk use_flash_attn bf16 fp16 fp32 "
         "onnx_safe softmax_in_fp32",
    must=dict(no_bias=True, scale_attn_weights=True, use_cache_quantization=False, use_cache_kernel=False),
    halved=True)  # intermediate_size counts w1 and w2 together
GPT_NEOX = but(
    GPT2, prefix="gpt_neox.", buffers=r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    names={"embed": "embed_in", "pos": None, "norm": "final_layer_norm", "head": "embed_out",
           "norm1": "layers.{}.input_layernorm", "q k v": "layers.{}.attention.query_key_value",
           "o": "layers.{}.attention.dense", "norm2": "layers.{}.post_attention_layernorm",
           "up": "layers.{}.mlp.dense_h_to_4h", "down": "layers.{}.mlp.dense_4h_to_h"},
    numbers=dict(vocab=50432, context=2048, width=6144, layers=44, heads=64, inner=24576, act="gelu",
                 head_dim=None, tied=False, base=1e4, fraction=0.25, parallel=True, attention_bias=True),
    keys=dict(eps="layer_norm_eps", base="rotary_emb_base", fraction="rotary_pct"),
    biased="up down", must={}, transposed=False,
    per_head=True)  # GPTNeoXAttention views fused rows as (H, 3 D) before it splits: (H, 3, D), not (3, H, D)
OPT = but(
    GPT2, prefix="model.decoder.", buffers=r"(?!)",  # none
    names={"embed": "embed_tokens", "pos": "embed_positions", "norm": "final_layer_norm",
           "norm1": "layers.{}.self_attn_layer_norm", "q k v": None, "q": "layers.{}.self_attn.q_proj",
           "k": "layers.{}.self_attn.k_proj", "v": "layers.{}.self_attn.v_proj",
           "o": "layers.{}.self_attn.out_proj", "norm2": "layers.{}.final_layer_norm", "up": "layers.{}.fc1",
           "down": "layers.{}.fc2"},
    numbers=dict(vocab=50272, context=2048, inner=3072, act="relu", attention_bias=True, mlp_bias=True),
    keys=dict(inner="ffn_dim", act="activation_function", attention_bias="enable_bias",
              mlp_bias="enable_bias", eps=""),  # OPTDecoderLayer: LayerNorm's own default
    biased="", also="word_embed_proj_dim", transposed=False,
    must=dict(do_layer_norm_before=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False),
    pos_offset=2)  # OPTLearnedPositionalEmbedding: two rows stand before that of position 0
FAMILIES = dict(gpt2=GPT2, gpt_neo=GPT_NEO, gpt_neox=GPT_NEOX, opt=OPT, llama=LLAMA, mistral=MISTRAL,
                qwen=QWEN, qwen2=QWEN2, qwen3=QWEN3, gemma=GEMMA, gemma2=GEMMA2, gemma3_text=GEMMA3,
                olmo2=OLMO2, phi3=PHI3)
