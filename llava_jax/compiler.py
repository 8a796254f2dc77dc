"""Options of XLA that suit a platform."""

import functools

import jax

# XLA's own products and sums on CPUs, not YNNPACK's: they are faster for the few rows of a step of decoding and for the
# many of a step of training (docs/performance.md), and YNNPACK's largest of values with a NaN may be a number.
WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""}


@functools.cache
def compiler_options(platform: str) -> dict[str, str] | None:
    """What to give to `jax.jit` for programs that compute much; None is what XLA does by itself."""
    return WITHOUT_YNNPACK if platform == "cpu" and _is_known(WITHOUT_YNNPACK) else None


def _is_known(options: dict[str, str]) -> bool:
    """Whether this version of XLA has the options."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
