"""Known sizes: the published LLaVA-1.6, 1.5 and v1 models, the quickstart's, and one for debugging."""

import dataclasses

from llava_jax.shapes import CaptionConfig, ClipConfig, LlavaConfig, TextConfig, VisionConfig

# openai/clip-vit-large-patch14-336
CLIP_L_336 = VisionConfig(
    image_size=336,
    patch_size=14,
    embed_dim=1024,
    hidden_dim=4096,
    num_layers=24,
    num_heads=16,
    norm_eps=1e-5,
    activation="quick_gelu",
)

# openai/clip-vit-large-patch14
CLIP_L_224 = dataclasses.replace(CLIP_L_336, image_size=224)

# lmsys/vicuna-7b-v1.5
VICUNA_7B = TextConfig(
    vocab_size=32_000,
    num_layers=32,
    embed_dim=4096,
    hidden_dim=11_008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rope_theta=10_000.0,
    rope_scaling=None,
    norm_eps=1e-5,
    max_positions=4096,
    tie_embeddings=False,
    sliding_window=None,
)

# lmsys/vicuna-13b-v1.5
VICUNA_13B = TextConfig(
    vocab_size=32_000,
    num_layers=40,
    embed_dim=5120,
    hidden_dim=13_824,
    num_heads=40,
    num_kv_heads=40,
    head_dim=128,
    rope_theta=10_000.0,
    rope_scaling=None,
    norm_eps=1e-5,
    max_positions=4096,
    tie_embeddings=False,
    sliding_window=None,
)

# NousResearch/Nous-Hermes-2-Yi-34B
YI_34B = TextConfig(
    vocab_size=64_000,
    num_layers=60,
    embed_dim=7168,
    hidden_dim=20_480,
    num_heads=56,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=5_000_000.0,
    rope_scaling=None,
    norm_eps=1e-5,
    max_positions=4096,
    tie_embeddings=False,
    sliding_window=None,
)

# liuhaotian/llava-v1.5-7b and -13b
LLAVA_15_7B = LlavaConfig(
    vision=CLIP_L_336,
    text=VICUNA_7B,
    projector="mlp2x_gelu",
    select_layer=-2,
    select_feature="patch",
    image_newline=False,
)
LLAVA_15_13B = dataclasses.replace(LLAVA_15_7B, text=VICUNA_13B)

# The v1 models: openai/clip-vit-large-patch14 (224 pixels), one linear layer, lmsys/vicuna-7b-v1.3 and -13b-v1.3
LLAVA_V1_7B = dataclasses.replace(
    LLAVA_15_7B,
    vision=CLIP_L_224,
    text=dataclasses.replace(VICUNA_7B, norm_eps=1e-6, max_positions=2048),
    projector="linear",
)
LLAVA_V1_13B = dataclasses.replace(LLAVA_V1_7B, text=dataclasses.replace(VICUNA_13B, norm_eps=1e-6, max_positions=2048))

# liuhaotian/llava-v1.6-vicuna-7b and liuhaotian/llava-v1.6-34b
LLAVA_16_7B = dataclasses.replace(LLAVA_15_7B, image_newline=True)
LLAVA_16_34B = dataclasses.replace(LLAVA_15_7B, text=YI_34B, image_newline=True)

# The quickstart's tokenizer has at most this many tokens.
QUICKSTART_VOCABULARY = 512
QUICKSTART_VISION = VisionConfig(
    image_size=64,
    patch_size=8,
    embed_dim=64,
    hidden_dim=256,
    num_layers=3,
    num_heads=2,
    norm_eps=1e-5,
    activation="quick_gelu",
)
QUICKSTART_CLIP = ClipConfig(
    vision=QUICKSTART_VISION,
    caption=CaptionConfig(
        vocab_size=QUICKSTART_VOCABULARY,
        context_length=8,
        embed_dim=64,
        hidden_dim=256,
        num_layers=1,
        num_heads=2,
        norm_eps=1e-5,
        activation="quick_gelu",
        eos_id=2,
    ),
    projection_dim=64,
)
QUICKSTART_LLAVA = LlavaConfig(
    vision=QUICKSTART_VISION,
    text=TextConfig(
        vocab_size=QUICKSTART_VOCABULARY,
        num_layers=3,
        embed_dim=128,
        hidden_dim=256,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        max_positions=512,
        tie_embeddings=True,
        sliding_window=None,
    ),
    projector="mlp2x_gelu",
    select_layer=-2,
    select_feature="patch",
    image_newline=False,
)

# The vocabulary is that of `data/generated.py`.
DEBUG = LlavaConfig(
    vision=VisionConfig(
        image_size=16,
        patch_size=8,
        embed_dim=32,
        hidden_dim=64,
        num_layers=2,
        num_heads=2,
        norm_eps=1e-5,
        activation="quick_gelu",
    ),
    text=TextConfig(
        vocab_size=320,
        num_layers=2,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        max_positions=256,
        tie_embeddings=False,
        sliding_window=None,
    ),
    projector="mlp2x_gelu",
    select_layer=-2,
    select_feature="patch",
    image_newline=False,
)
