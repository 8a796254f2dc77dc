"""LLaVA in pure JAX and Flax: `load` a model and its processor, `generate`, `stream` and `score` answers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_jax.data.records import Turn as Turn
    from llava_jax.inference.generate import Sampling as Sampling
    from llava_jax.inference.generate import generate as generate
    from llava_jax.inference.generate import stream as stream
    from llava_jax.inference.model import load as load
    from llava_jax.inference.model import read_images as read_images
    from llava_jax.inference.score import score as score

# Each public name and the module that defines it; imported on first use, since JAX takes a second to import.
_HOMES = {
    "Turn": "llava_jax.data.records",
    "Sampling": "llava_jax.inference.generate",
    "generate": "llava_jax.inference.generate",
    "stream": "llava_jax.inference.generate",
    "load": "llava_jax.inference.model",
    "read_images": "llava_jax.inference.model",
    "score": "llava_jax.inference.score",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llava_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
