"""The reader of compiled programs, on a hand-written one."""

import pytest

from trace_jax.compile_check import hlo

# A loop of 28 around a loop of 3; a gather by itself and one inside a fusion; one that is begun and done; a slice of a
# stack read in place, a stack written in place; an array on the chip, S(1); a kernel whose
# attributes go over several lines.
TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (p0: bf16[28,64], p1: s32[]) -> bf16[64] {
  %p0 = bf16[28,64]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %part = bf16[1,64]{1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,64}
  ROOT %row = bf16[64]{0:T(128)(2,1)S(1)} bitcast(%part)
}

%overlapped (p2: bf16[16,8]) -> bf16[16,32] {
  %p2 = bf16[16,8]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[16,32]{1,0} all-gather(%p2), channel_id=3, replica_groups=[2,4]<=[8], dimensions={1}
}

%inner_condition (s: (s32[], f32[4])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %s = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %three), direction=LT
}

%inner_body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %permuted = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %arrived = f32[4]{0} collective-permute-done(%permuted)
  ROOT %next = (s32[], f32[4]{0}) tuple(%i, %arrived)
}

%condition (u: (s32[], f32[4])) -> pred[] {
  %count = s32[]{:T(128)} constant(28)
  %u = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%u), index=0
  ROOT %lower = pred[]{:T(512)} compare(%j, %count), direction=LT
}

%body (w: (s32[], bf16[28,64], f32[4])) -> (s32[], bf16[28,64], f32[4]) {
  %w = (s32[], bf16[28,64]{1,0}, f32[4]{0}) parameter(0)
  %k = s32[] get-tuple-element(%w), index=0
  %stack = bf16[28,64]{1,0} get-tuple-element(%w), index=1
  %y = f32[4]{0} get-tuple-element(%w), index=2
  %kernel = f32[4]{0:S(1)} custom-call(), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="splash"}
  %layer = bf16[64]{0:S(1)} fusion(%stack, %k), kind=kLoop, calls=%sliced, backend_config={"estimated_cycles":"10"}
  %gathered = bf16[512]{0:S(1)} all-gather(%layer), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %reduced = f32[4]{0} all-reduce(%y), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add
  %loop = (s32[], f32[4]{0}) while(%both), condition=%inner_condition, body=%inner_body
  ROOT %done = (s32[], bf16[28,64]{1,0}, f32[4]{0}) tuple(%k, %stack, %reduced)
}

ENTRY %main (q: bf16[16,8], r: (s32[], bf16[28,64], f32[4])) -> bf16[16,32] {
  %q = bf16[16,8]{1,0} parameter(0)
  %r = (s32[], bf16[28,64]{1,0}, f32[4]{0}) parameter(1)
  %run = (s32[], /*index=1*/bf16[28,64]{1,0}, f32[4]{0}) while(%r), condition=%condition, body=%body
  ROOT %out = bf16[16,32]{1,0} fusion(%q), kind=kCustom, calls=%overlapped, backend_config={"estimated_cycles":"7"}
}
"""


def test_collectives_are_weighted_by_trip_counts():
    found = {each.kind: each for each in hlo.read(TEXT).collectives}
    assert set(found) == {"all-gather", "all-reduce", "collective-permute"}
    gather, reduce, permute = found["all-gather"], found["all-reduce"], found["collective-permute"]
    assert gather.count == 28 + 1
    assert gather.result == 28 * 512 * 2 + 16 * 32 * 2
    assert gather.sent == 28 * 1024 * 7 / 8 + 1024 * 3 / 4
    assert gather.exposed == 28 * 1024 * 7 / 8  # the one in a fusion runs beside its product
    assert (reduce.count, reduce.sent, reduce.exposed) == (28, 28 * 16 * 2 * 7 / 8, 28 * 28)
    assert (permute.count, permute.sent, permute.exposed) == (28 * 3, 28 * 3 * 16, 0)


def test_traffic_counts_slices_and_leaves_out_what_is_on_the_chip():
    summary = hlo.read(TEXT)
    slices = 28 * (64 * 2 + 4)  # one layer of the stack, and its index
    reduced = 28 * (16 + 16)
    assert summary.hbm_bytes == slices + reduced + 16 * 8 * 2 + 16 * 32 * 2
    assert summary.cycles == 28 * 10 + 7
    assert summary.unknown_loops == 0


NESTED = """HloModule jit_step, is_scheduled=true

%layer (p0: bf16[28,64,32]) -> bf16[64,32] {
  %p0 = bf16[28,64,32]{2,1,0} parameter(0)
  %one = bf16[1,64,32]{2,1,0} slice(%p0), slice={[3:4], [0:64], [0:32]}
  ROOT %flat = bf16[64,32]{1,0} bitcast(%one)
}

%written (p1: bf16[8,32], p2: bf16[1,32], p3: s32[]) -> bf16[8,32] {
  %p1 = bf16[8,32]{1,0} parameter(0)
  %p2 = bf16[1,32]{1,0} parameter(1)
  %p3 = s32[] parameter(2)
  ROOT %put = bf16[8,32]{1,0} dynamic-update-slice(%p1, %p2, %p3, %p3)
}

%product (p4: bf16[4,64], p5: bf16[28,64,32]) -> bf16[4,32] {
  %p4 = bf16[4,64]{1,0:S(1)} parameter(0)
  %p5 = bf16[28,64,32]{2,1,0} parameter(1)
  %weights = bf16[64,32]{1,0} fusion(%p5), kind=kLoop, calls=%layer
  ROOT %y = bf16[4,32]{1,0:S(1)} convolution(%p4, %weights), dim_labels=bf_io->bf
}

%looked_up (p9: bf16[100,32], p10: s32[4]) -> bf16[4,32] {
  %p9 = bf16[100,32]{1,0} parameter(0)
  %p10 = s32[4]{0} parameter(1)
  ROOT %rows = bf16[4,32]{1,0:S(1)} gather(%p9, %p10), offset_dims={1}, slice_sizes={1,32}
}

%scores (p6: bf16[8,32], p7: bf16[1,32], p8: s32[]) -> f32[8] {
  %p6 = bf16[8,32]{1,0} parameter(0)
  %p7 = bf16[1,32]{1,0:S(1)} parameter(1)
  %p8 = s32[]{:S(6)} parameter(2)
  %new = bf16[8,32]{1,0} fusion(%p6, %p7, %p8), kind=kLoop, calls=%written
  ROOT %sum = f32[8]{0:S(1)} reduce(%new, %new), dimensions={1}
}

ENTRY %main (a: bf16[4,64], w: bf16[28,64,32], k: bf16[8,32], n: bf16[1,32], i: s32[], t: bf16[100,32]) -> f32[8] {
  %a = bf16[4,64]{1,0:S(1)} parameter(0)
  %w = bf16[28,64,32]{2,1,0} parameter(1)
  %k = bf16[8,32]{1,0} parameter(2)
  %n = bf16[1,32]{1,0:S(1)} parameter(3)
  %i = s32[]{:S(6)} parameter(4)
  %t = bf16[100,32]{1,0} parameter(5)
  %ids = s32[4]{0:S(1)} custom-call(), custom_call_target="ids"
  %x = bf16[4,32]{1,0:S(1)} fusion(%t, %ids), kind=kCustom, calls=%looked_up
  %ahead = (bf16[8,32]{1,0:S(1)}, bf16[8,32]{1,0}, u32[]{:S(2)}) copy-start(%k)
  %part = ((bf16[28,64,32]{2,1,0}), bf16[1,64,32]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:1]}
  %z = bf16[4,32]{1,0:S(1)} fusion(%a, %w), kind=kOutput, calls=%product
  ROOT %s = f32[8]{0:S(1)} fusion(%k, %n, %i), kind=kLoop, calls=%scores
}
"""


def test_traffic_of_nested_fusions_and_of_copies_to_the_chip():
    """A product reads its layer of the stack, a gather its rows; scores all of the cache that they are put into."""
    layer, cache, rows = 64 * 32 * 2, 8 * 32 * 2, 4 * 32 * 2
    assert hlo.read(NESTED).hbm_bytes == layer + cache + rows + (cache + layer)


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    summary = hlo.read(TEXT.replace("compare(%j, %count), direction=LT", "not(%j)"))
    assert summary.unknown_loops == 1
    inside = 64 * 2 + 4 + 16 + 16  # of one trip
    assert summary.looped_bytes == inside
    assert summary.hbm_bytes == inside + 16 * 8 * 2 + 16 * 32 * 2
    assert {each.kind: each.count for each in summary.collectives} == {
        "all-gather": 2,
        "all-reduce": 1,
        "collective-permute": 3,
    }


def test_shapes():
    assert hlo.bytes_of("(s8[4], f8e4m3fn[2,3]{1,0}, pred[], s32[2]{0:T(128)S(1)})") == 4 + 6 + 1 + 8
    assert hlo.bytes_of("(s8[4], s32[2]{0:T(128)S(1)})", hbm_only=True) == 4


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("HloModule nothing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x={}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, x", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}, x", [[3, 2], [1, 0]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_are_read_in_every_form(text, expected):
    line = f"  %c = f32[8]{{0}} all-reduce(%x), channel_id=1, {text}"
    instruction = hlo._instruction(line)
    assert instruction is not None and hlo.groups(instruction).tolist() == expected


def test_what_leaves_a_slice_is_told_apart():
    """Two slices of four: the gather in the loop and the all-reduce cross; one in a fusion and permutes do not."""
    one = {each.kind: each for each in hlo.read(TEXT).collectives}
    two = {each.kind: each for each in hlo.read(TEXT, slice_devices=4).collectives}
    assert all(each.crossed == 0 for each in one.values())
    for kind, each in two.items():
        assert each.sent + each.crossed == one[kind].sent
        assert each.exposed + each.crossed_exposed == one[kind].exposed
    assert two["all-gather"].crossed == two["all-gather"].crossed_exposed == 28 * 1024 * 1 / 8
    assert two["all-reduce"].crossed == 28 * 2 * 16 * 1 / 8  # summed up by four first: a quarter each, both ways
    assert two["collective-permute"].crossed == 0
