"""FLOPs counted in a jaxpr against the formula, and collectives in compiled programs, loops as often as they run."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saisa_jax import flops
from saisa_jax.config import TRAIN_ALL_BUT_VISION, TRAIN_PROJECTOR, Config
from saisa_jax.planning import counted
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training.setup import setup_stage
from saisa_jax.training.step import make_train_step


def counted_flops(function, *arguments) -> float:
    return counted.flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_products_convolutions_loops_and_branches() -> None:
    x, w = jnp.zeros((2, 8, 16)), jnp.zeros((16, 32))
    product = 2 * 2 * 8 * 16 * 32
    assert counted_flops(lambda x, w: x @ w, x, w) == product
    assert counted_flops(jax.jit(lambda x, w: jax.checkpoint(jnp.matmul)(x, w)), x, w) == product
    square = jnp.zeros((16, 16))
    loop = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]  # noqa: E731
    assert counted_flops(loop, square, square) == 5 * 2 * 16**3
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    assert counted_flops(branch, square) == 2 * 2 * 16**3
    image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((2, 2, 3, 4))
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(2, 2), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert counted_flops(convolve, image, kernel) == 2 * 4 * 4 * 4 * (2 * 2 * 3)


def test_cudnns_attention_is_counted_by_its_name() -> None:
    """It cannot be traced without cuDNN; its primitives are there all the same."""
    q, k = jax.ShapeDtypeStruct((2, 6, 4, 8), "bfloat16"), jax.ShapeDtypeStruct((2, 10, 2, 8), "bfloat16")
    for primitive, products in (
        (fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper, 2),
        (fused_attention_stablehlo._dot_product_attention_bwd_p_wrapper, 5),
    ):
        equation = SimpleNamespace(primitive=primitive, params={}, invars=[SimpleNamespace(aval=x) for x in (q, k, k)])
        assert counted.flops(SimpleNamespace(eqns=[equation])) == products * 2 * (2 * 4 * 6 * 10 * 8)


def step_flops(config: Config, stage: str) -> tuple[float, float]:
    """(counted, by formula)."""
    p = setup_stage(config, stage, 10)
    s = p.settings
    step = make_train_step(p.model, p.optimizer, p.shardings, s.accumulation)
    counted_ = counted_flops(step, p.abstract_state(), p.abstract_batch())
    return counted_, flops.train_step(p.model, s.groups, s.batch_size, s.text_length, s.max_images)


@pytest.mark.parametrize("alignment", ["saisa", "naavit", "llava"])
@pytest.mark.parametrize(("stage", "groups"), [("pretrain", TRAIN_PROJECTOR), ("finetune", TRAIN_ALL_BUT_VISION)])
def test_a_train_step_costs_what_the_formula_says(alignment: str, stage: str, groups) -> None:
    config = tiny_config(alignment)
    config = dataclasses.replace(config, **{stage: dataclasses.replace(config.stage(stage), groups=groups)})
    counted_, formula = step_flops(config, stage)
    # The last layer of NAAViT updates visual tokens for nobody, whose backward pass is not in the program.
    assert counted_ == pytest.approx(formula, rel=0.08 if alignment == "naavit" else 0.02)


def test_recomputation_is_counted_and_accumulation_changes_nothing() -> None:
    config = tiny_config()
    plain, formula = step_flops(config, "finetune")
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat_policy="full"))
    recomputed, same = step_flops(full, "finetune")
    assert same == formula and 1.2 * plain < recomputed < 4 / 3 * plain
    mesh = dataclasses.replace(config.mesh, data=4, fsdp=1, tensor=2)
    halves = dataclasses.replace(config, mesh=mesh, finetune=dataclasses.replace(config.finetune, accumulation=2))
    assert step_flops(halves, "finetune")[0] == pytest.approx(plain, rel=1e-6)


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

    found = counted.traffic(jax.jit(forward).lower(x, stack).compile().as_text(), 8)
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
    found = counted.traffic(LIBTPU.replace("ENTRY", start + "ENTRY"), 16)
    assert found == {
        "all-gather": (1, 8 * 16 * 2 * 7 / 8),  # one channel, though a part of it is in the loop
        "collective-permute": (8 + 4, 8 * 4 * 8 * 4 + 4 * 4 * 8 * 2),  # a scan's, and a ring's, which counts in twos
        "all-reduce": (1, 2 * 400 * 3 / 4),
        "reduce-scatter": (1, 40 * 3),
        "between slices": (1, 2 * 8 * 4),
    }
