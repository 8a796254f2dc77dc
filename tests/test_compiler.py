"""Options of XLA: those that its version has are given, others left out."""

import jax
import pytest

from llava_jax import compiler


@pytest.mark.parametrize("options", [compiler.WITHOUT_YNNPACK, {"xla_no_such_option": "1"}], ids=["known", "unknown"])
def test_an_option_that_this_xla_does_not_have_is_left_out(options: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(compiler.OPTIONS, "cpu", options)
    # Past the cache, so that other tests find what they would have found.
    found = compiler.compiler_options.__wrapped__(jax.devices()[0])
    assert found == (None if "xla_no_such_option" in options else options)
