"""The TPU compiler's estimates: turns of loops counted, what is inside a fusion not."""

import pytest

from benchmarks.cycles import estimates

TEXT = """
%inside (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} convolution(%p, %p), backend_config={"estimated_cycles":"1000"}
}
%body (carried: (s32[], f32[8])) -> (s32[], f32[8]) {
  %product = f32[8]{0} fusion(%x), calls=%inside, metadata={op_name="step/dot"}, backend_config={"estimated_cycles":"7"}
  %moved = f32[8]{0} copy(%product), metadata={op_name="step/move"}, backend_config={"estimated_cycles":"5"}
}
%condition (carried: (s32[], f32[8])) -> pred[] {
  %bound = s32[] constant(3)
  %i = s32[] get-tuple-element(%carried), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body
  ROOT %sum = f32[4]{0} add(%y, %y), metadata={op_name="step/add"}, backend_config={"estimated_cycles":"2"}
}
"""


def test_turns_count_and_insides_do_not():
    assert sorted(estimates(TEXT)) == [
        ("copies", "f32[8] step/move", 15.0),
        ("others", "f32[4] step/add", 2.0),
        ("products", "f32[8] step/dot", 21.0),
    ]


def test_a_loop_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="does not say how often it turns"):
        estimates(TEXT.replace("direction=LT", "direction=NE"))
