"""What is read from the text of a compiled program, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.learner.hlo import BETWEEN_SLICES, Traffic, read_facts

WHOLE = """\
HloModule jit_step, is_scheduled=true

%inner (p: bf16[8,64]) -> bf16[16,64] {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}
}

%body (arg: (u32[], bf16[8,64])) -> (u32[], bf16[8,64]) {
  %two = u32[]{:T(128)} constant(2), metadata={op_name="x"}
  %arg = (u32[]{:T(128)}, bf16[8,64]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,64]{1,0} get-tuple-element(%arg), index=1
  %start = (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[8,64]{1,0}, u32[]) collective-permute-start(%x), channel_id=1
  %done = bf16[8,64]{1,0} collective-permute-done(%start)
  %begun = bf16[16,64]{1,0} fusion(%x), kind=kCustom, calls=%inner
  %ended = bf16[16,64]{1,0} fusion(%x), kind=kCustom, calls=%inner
  %square = bf16[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %out = (u32[]{:T(128)}, bf16[8,64]{1,0}) tuple(%next, %done)
}

%condition (arg.1: (u32[], bf16[8,64])) -> pred[] {
  %limit = u32[]{:T(128)} constant(9)
  %arg.1 = (u32[]{:T(128)}, bf16[8,64]{1,0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: bf16[8,64], k: bf16[4,64,4,32]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %k = bf16[4,64,4,32]{3,2,1,0} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %first = (u32[]{:T(128)}, bf16[8,64]{1,0}) tuple(%zero, %a)
  %loop = (u32[]{:T(128)}, bf16[8,64]{1,0}) while(%first), condition=%condition, body=%body
  %kernel = f32[8,64]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
  %buffer = f32[8,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %wide = f32[8,64]{0,1} copy(%kernel)
  ROOT %result = bf16[8,64]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    """From 0 to 9 in steps of 2: five times. Each: 64 x 64 sums of 8 products, a permute and a gather."""
    facts = read_facts(WHOLE)
    assert facts.flops == 5 * 2 * 64 * 64 * 8
    assert facts.traffic == {
        # Its two pieces, of one channel, are one.
        "all-gather": Traffic(5, 5 * 16 * 64 * 2),
        "collective-permute": Traffic(5, 5 * 8 * 64 * 2),
        "copy": Traffic(1, 8 * 64 * 4),
    }
    assert facts.kernels == {"tpu_custom_call": 1}


TWO_OF_A_CHANNEL = """\
ENTRY %main (a: f32[8,64], b: f32[4]) -> (f32[8,64], f32[4], f32[]) {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %c = f32[]{:T(128)} constant(1)
  %most = f32[]{:T(128)} all-reduce(%c), channel_id=1, to_apply=%larger, metadata={op_name="jit(f)/pmax" id=2}
  %sum = (f32[8,64]{1,0:T(8,128)}, /*index=1*/f32[4]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add, \
metadata={op_name="jit(f)/psum"}
  %second = f32[8,64]{1,0} all-reduce-start(%a), channel_id=1, to_apply=%add, metadata={op_name="jit(f)/psum"}
  %send = (f32[8,64]{1,0}, u32[], token[]) send(%a, %t), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %offloaded = (f32[8,64]{1,0}, u32[], token[]) send(%a, %t), channel_id=3, is_host_transfer=true
  ROOT %out = (f32[8,64]{1,0}, f32[4]{0}, f32[]) tuple(%sum, %b, %most)
}
"""


def test_collectives_of_several_arrays_and_of_one_channel_and_between_slices():
    """The sum of two arrays has 8 x 64 + 4 numbers; all three are of one channel, as those of `shard_map` are."""
    assert read_facts(TWO_OF_A_CHANNEL).traffic == {
        "all-reduce": Traffic(3, 4 * (8 * 64 + 4 + 1 + 8 * 64)),
        BETWEEN_SLICES: Traffic(1, 4 * 8 * 64),
    }


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "flops"),
    [
        # a plain product
        ("[4,256,32]", "[512,32,1]", "[4,256,512]", "dim_labels=b0f_oi0->b0f", 4 * 256 * 512 * 32),
        # heads as a window of 4 over padding of 3 on each side: each place of the output meets one input
        (
            "[2,1,16,224]", "[4,128,1,224]", "[2,16,4,128]",
            "window={size=4x1 pad=3_3x0_0 rhs_reversal=1x0}, dim_labels=b01f_0o1i->b10f", 2 * 16 * 4 * 128 * 224,
        ),
        # a sum over rows, as a window over all four
        ("[4,8,16]", "[4,8,32]", "[16,32,1]", "window={size=4}, dim_labels=0fb_0io->bf0", 4 * 8 * 16 * 32),
    ],
)  # fmt: skip
def test_products_as_tpus_write_them(left, right, out, attributes, flops):
    text = f"""
ENTRY %main (a: bf16{left}, b: bf16{right}) -> f32{out} {{
  %a = bf16{left}{{0}} parameter(0)
  %b = bf16{right}{{0}} parameter(1)
  ROOT %c = f32{out}{{0}} convolution(%a, %b), {attributes}
}}
"""
    assert read_facts(text).flops == 2 * flops


def test_a_program_of_this_machine():
    """Seven layers of a scan, [16, 32] by [32, 32], and one product behind it."""

    def step(x, layers, head):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)
        return x @ head

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 32), (7, 32, 32), (32, 48))]
    facts = read_facts(jax.jit(step).lower(*shapes).compile().as_text())
    assert facts.flops == 7 * 2 * 16 * 32 * 32 + 2 * 16 * 32 * 48
    assert not facts.kernels and set(facts.traffic) <= {"copy"}
