"""Small shapes and data that the tests share."""

import dataclasses

import numpy as np

from llava_jax.data import rows
from llava_jax.data.anyres import one_tile
from llava_jax.data.conversation import IMAGE_TOKEN, Tokenized
from llava_jax.data.rows import Example
from llava_jax.shapes import CaptionConfig, ClipConfig
from llava_jax.sizes import DEBUG

VISION = dataclasses.replace(DEBUG.vision, patch_size=4, hidden_dim=48, num_layers=3, num_heads=4)
CAPTION = CaptionConfig(
    vocab_size=99,
    context_length=12,
    embed_dim=24,
    hidden_dim=40,
    num_layers=2,
    num_heads=3,
    norm_eps=1e-5,
    activation="quick_gelu",
    eos_id=98,
)
CLIP = ClipConfig(vision=VISION, caption=CAPTION, projection_dim=20)
TEXT = dataclasses.replace(DEBUG.text, num_layers=3, hidden_dim=48, max_positions=512)
LLAVA = dataclasses.replace(DEBUG, vision=VISION, text=TEXT)


def make_example(tokens: list[int], is_answer: np.ndarray, images: list[np.ndarray]) -> Example:
    """A sequence whose pictures are one tile each; their slots hold `IMAGE_TOKEN`."""
    text = Tokenized(np.array(tokens, np.int32), np.asarray(is_answer))
    num_features = text.tokens.tolist().count(IMAGE_TOKEN) // max(len(images), 1)
    size = images[0].shape[0] if images else VISION.image_size
    tiles = [image[None] for image in images]
    return rows.make_example(text, tiles, [one_tile(num_features)] * len(images), size)
