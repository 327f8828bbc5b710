"""Collectives in compiled programs, loops as often as they run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saisa_jax.planning.traffic import traffic


@pytest.mark.multi_device
def test_collectives_in_a_compiled_loop() -> None:
    """Four layers whose weights are split over eight devices: a gather in each turn, of 7/8 of the weights."""
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    split = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    stack = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32, sharding=split(None, "fsdp", None))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=split("fsdp", None))

    def forward(x, stack):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, split(None, None))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), split("fsdp", None)), None

        return jax.lax.scan(layer, x, stack)[0]

    found = traffic(jax.jit(forward).lower(x, stack).compile().as_text(), 8)
    assert found["all-gather"].count in (1, 4)  # the compiler may gather the whole stack before the loop
    assert found["all-gather"].bytes == 4 * 64 * 64 * 4 * 7 / 8


LIBTPU = """HloModule step

%add (p.0: f32[], q.0: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%p.0, %q.0)
}

%cond (p.1: (u32[], f32[4,8])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%part_of_gather (p.2: bf16[1,16]) -> bf16[8,16] {
  %g.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=2,'b'=8] {'b'}
}

%body (p.3: (u32[], f32[4,8])) -> (u32[], f32[4,8]) {
  %f.1 = bf16[8,16] fusion(%x), kind=kCustom, calls=%part_of_gather
  %s = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=3
  %d = f32[4,8]{1,0} collective-permute-done(%s)
}

%ring_cond (p.4: (u32[], bf16[4,8], /*index=5*/f32[2])) -> pred[] {
  %ring_bound = u32[]{:T(128)} constant(8)
  %ring_i = u32[]{:T(128)} get-tuple-element(%p.4), index=0
  ROOT %ring_less = pred[]{:T(512)} compare(%ring_i, %ring_bound), direction=LT
}

%ring (p.5: (u32[], bf16[4,8], /*index=5*/f32[2])) -> (u32[], bf16[4,8], /*index=5*/f32[2]) {
  %two = u32[]{:T(128)} constant(2)
  %j = u32[]{:T(128)} get-tuple-element(%p.5), index=0
  %next = u32[]{:T(128)} add(%j, %two), metadata={op_name="dot_general"}
  %rs = (bf16[4,8]{1,0:T(8,128)}, bf16[4,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=11
  %rd = bf16[4,8]{1,0} collective-permute-done(%rs)
  ROOT %out = (u32[]{:T(128)}, bf16[4,8], /*index=5*/f32[2]) tuple(%next, %rd, /*index=5*/%z)
}

ENTRY %main (a: bf16[1,16]) -> f32[4,8] {
  %f.0 = bf16[8,16] fusion(%a), kind=kCustom, calls=%start_of_gather
  %w = (u32[], f32[4,8]) while(%t), condition=%cond, body=%body
  %w.2 = (u32[], bf16[4,8], /*index=5*/f32[2]) while(%t.2), condition=%ring_cond, body=%ring
  %recv = (f32[2,8]{1,0:T(8,128)}, u32[], token[]) recv(%after), channel_id=12, is_host_transfer=true, attributes={}
  %r = f32[100]{0} all-reduce(%b), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  %q = f32[10]{0} reduce-scatter(%c), channel_id=10, replica_groups=[4,4]<=[16], dimensions={0}, to_apply=%add
}
"""


def test_what_libtpu_writes() -> None:
    start = LIBTPU[LIBTPU.index("%part_of_gather") : LIBTPU.index("%body")].replace("part_of", "start_of")
    found = traffic(LIBTPU.replace("ENTRY", start + "ENTRY"), 16)
    assert found == {
        "all-gather": (1, 8 * 16 * 2 * 7 / 8),  # one channel, though a part of it is in the loop
        "collective-permute": (8 + 4, 8 * 4 * 8 * 4 + 4 * 4 * 8 * 2),  # a scan's, and a ring's, which counts in twos
        "all-reduce": (1, 2 * 400 * 3 / 4),
        "reduce-scatter": (1, 40 * 3),
        "between slices": (1, 2 * 8 * 4),
    }
