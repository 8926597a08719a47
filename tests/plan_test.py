"""The planner: collectives read from programs, memory against compilers, the command's answers."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from prophy_jax import build
from prophy_jax.plan import collectives, hardware, memory, programs, search, table
from prophy_jax.plan.planner import Job, make_plan
from prophy_jax.plan.traced import trace
from prophy_jax.run import parallel
from prophy_jax.run.errors import UserError
from tests.commands import run_here
from tests.conftest import get_config

MESH = {"data": 2, "fsdp": 2, "context": 2}
needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: pip install jax[tpu]"
)

# A loop of 5 around one of 3 (its condition says so), a sum of two arrays, and every way to write a group.
HLO = """
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %exchange = f32[4,8]{1,0:T(8,128)} all-to-all(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %exchange)
}

%inner_condition (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

%outer_body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]) parameter(0)
  %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%y), replica_groups=[2,4]<=[4,2]T(1,0)
  %done = bf16[16,8]{1,0} all-gather-done(%start)
  ROOT %loop = (s32[], f32[4,8]) while(%p), condition=%inner_condition, body=%inner_body
}

%outer_condition (p: (s32[], f32[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%fused (p: f32[16]) -> f32[8] {
  %p = f32[16] parameter(0)
  ROOT %scatter = f32[8] reduce-scatter(%p), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8] parameter(0)
  %sums = (f32[2,3]{1,0}, /*index=1*/bf16[5]{0}) all-reduce(%u, %v), replica_groups=mesh['a'=4,'b'=2] {'a'}
  %everyone = f32[10]{0} all-reduce(%w), replica_groups={}, to_apply=%add
  %alone = f32[1000]{0} all-reduce(%w), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}
  %shift = (f32[6], f32[6], u32[], u32[]) collective-permute-start(%z), source_target_pairs={{0,2},{6,4}}
  %shifted = f32[6] collective-permute-done(%shift)
  %nested = () while(%t), condition=%outer_condition, body=%outer_body, config={"known_trip_count":{"n":"5"}}
  ROOT %f = f32[8] fusion(%s), kind=kLoop, calls=%fused
}
"""


def test_collectives_of_a_program_are_those_counted_by_hand():
    found = {(one.kind, one.axes): one for one in collectives.count(HLO, MESH)}
    by_hand = {
        # (kind, axes): devices in a group, bytes of a call, calls, bytes sent
        ("all-to-all", ("context",)): (2, 4 * 8 * 4, 5 * 3, 5 * 3 * 128 / 2),
        ("all-gather", ("data", "fsdp")): (4, 16 * 8 * 2, 5, 5 * 256 * 3 / 4),
        ("all-reduce", ("data", "fsdp")): (4, 2 * 3 * 4 + 5 * 2, 1, 2 * 34 * 3 / 4),
        ("all-reduce", ("data", "fsdp", "context")): (8, 40, 1, 2 * 40 * 7 / 8),
        ("reduce-scatter", ("data",)): (2, 16 * 4, 1, 64 / 2),
        ("collective-permute", ("fsdp",)): (2, 6 * 4, 1, 24),
    }
    assert found.keys() == by_hand.keys()
    for key, expected in by_hand.items():
        one = found[key]
        assert (one.group, one.bytes, one.count, one.sent) == expected, key


def test_parts_of_axes_that_xla_names_are_groups_too():
    groups = collectives._mesh_groups("'a'=8", "", "'a':(2)2")  # device = (2, 2, 2): the middle varies
    assert sorted(map(sorted, groups)) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    # Positions in order (0 2 4 6 1 3 5 7), as 4 x 2: the first axis varies.
    groups = collectives._mesh_groups("'a'=4,'b'=2", ", device_ids=([4,2]T(1,0))", "'a'")
    assert sorted(map(sorted, groups)) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    groups = collectives._mesh_groups("'a'=2,'b'=2", ", device_ids=(0,3,1,2)", "'b'")
    assert sorted(map(sorted, groups)) == [[0, 3], [1, 2]]


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="outer_condition"):
        collectives.count(HLO.replace("known_trip_count", "something_else"), MESH)


def tiny(mesh, **backbone):
    config = get_config("tiny")
    config.mesh = dict(zip(parallel.AXES, mesh, strict=True))
    config.batch_size = mesh[0] * mesh[1]
    config.optimizer.groups = (("branch/", 1e-2), ("backbone/", None))
    config.backbone.update(backbone)
    return config


def compiled(config, devices):
    mesh = build.build_mesh(config.mesh, config.batch_size, devices)
    model = build.build_model(config, mesh)
    program, arguments = programs.train_program(config, model, mesh, config.batch_size)
    with jax.set_mesh(mesh):
        return program.lower(*arguments).compile(), arguments


def test_data_parallel_steps_sum_each_gradient_once():
    executable, arguments = compiled(tiny((8, 1, 1)), jax.devices())
    found = collectives.count(executable.as_text(), {"data": 8, "fsdp": 1, "context": 1})
    trained = 4 * sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params))
    summed = sum(one.bytes * one.count for one in found if one.kind == "all-reduce")
    # Besides gradients in fp32: losses, statistics, and the small arrays of the loss that compares clips.
    assert trained <= summed <= trained + 20_000
    stated = executable.memory_analysis().argument_size_in_bytes
    assert sum(programs.argument_bytes("train", arguments).values()) == pytest.approx(
        stated, abs=1000
    )  # padding


def test_steps_with_split_parameters_gather_each_once_and_sum_each_gradient_once(monkeypatch):
    monkeypatch.setattr(parallel, "MIN_SHARDED_SIZE", 64)
    executable, arguments = compiled(tiny((1, 8, 1)), jax.devices())
    found = collectives.count(executable.as_text(), {"data": 1, "fsdp": 8, "context": 1})
    found = collectives.by_axis(found, rate=lambda one: 1.0)
    assert {row["kind"] for row in found} == {"all-gather", "all-reduce"}  # no activations go anywhere
    trained = 4 * sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params))
    for row in found:  # and the small arrays, as above
        assert row["bytes"] == pytest.approx(trained, abs=20_000)


def test_context_parallel_steps_exchange_within_context_alone():
    executable, _ = compiled(tiny((2, 2, 2)), jax.devices())
    found = collectives.count(executable.as_text(), MESH)
    assert {one.axes for one in found if one.kind == "all-to-all"} == {("context",)}
    # 2 blocks and 2 copies, each with q, k, v and the output, in both passes but for the first block, which
    # has no backward pass: 4 x 4 + 3 x 4.
    assert sum(one.count for one in found if one.kind == "all-to-all") == 28


def test_held_memory_of_small_programs_is_counted_by_hand():
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    size = 256 * 256 * 4

    def held(function, *arguments):
        return memory.peak(jax.make_jaxpr(function)(*arguments), memory.array_bytes)

    # a = x y is stored, tanh(a) is read by a product: stored over a; then the product is the output.
    assert held(lambda x, y: jnp.tanh(x @ y) @ y, shape, shape).total == size
    # A chain of elementwise operations stores nothing.
    assert held(lambda x: jnp.exp(x) * 2 + 1, shape).total == 0

    def loss(w, x):
        def body(x, _):
            return jnp.sin(x @ w), None

        return jax.lax.scan(body, x, length=5)[0].sum()

    # The backward pass reads the input and the cosine of each of 5 layers.
    activations = held(jax.grad(loss), shape, shape).activations
    assert activations == pytest.approx(10 * size, rel=0.11)  # and what goes into the loop


def test_executed_operations_without_remat_are_those_of_the_model():
    traced = trace(tiny((1, 1, 1), remat="none"), "train", "cpu", 1)
    assert traced.flops == traced.model_flops > 0


def test_model_operations_are_of_one_clip_whatever_remat_and_kernels_compute_again():
    traced = [trace(tiny((1, 1, 1), remat=remat), "train", "tpu", 4) for remat in ("none", "full")]
    assert traced[0].model_flops == traced[1].model_flops
    assert traced[1].flops > 4 * traced[1].model_flops


def test_activations_grow_with_what_remat_keeps_and_shrink_with_context():
    held = {
        remat: trace(tiny((1, 1, 1), num_layers=4), "train", "cpu", 16, remat, model_flops=1).held(
            {"fsdp": 1, "context": 1}
        )
        for remat in ("none", "products", "qkv", "attention", "self_attention", "full")
    }
    sizes = [one.activations for one in held.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 4 * sizes[-1]


def test_counted_memory_is_near_the_compilers():
    """Without remat, when most of it is saved arrays: XLA fuses less for a CPU than for accelerators."""
    config = tiny((1, 1, 1), remat="none", num_layers=6, dim=96, ffn_dim=384)
    config.parts, config.losses = {}, {}
    config.optimizer.groups = (("backbone/", 1e-2),)
    config.data.update(frames=33, height=128, width=128)
    executable, arguments = compiled(config, jax.devices()[:1])
    temporary = executable.memory_analysis().temp_size_in_bytes
    counted = trace(config, "train", "cpu", 1, model_flops=1).held({"fsdp": 1, "context": 1}).total
    assert counted == pytest.approx(temporary, rel=0.1)  # measured: 6 % more


def test_links_are_those_of_the_torus_or_of_the_server():
    chip = hardware.CHIPS["h100"]

    def rate(chip, *members):
        return hardware.link_rate(chip, jax.devices(), [jax.devices()[member] for member in members])

    assert rate(chip, 0, 7) == chip.link
    small = hardware.Chip("small", 1, 1, 1, link=100.0, network=5.0, per_server=4)
    assert rate(small, 3, 4) == 5.0


def test_a_job_that_does_not_fit_is_answered_with_what_is_too_much_and_a_remedy(monkeypatch):
    config = tiny((8, 1, 1), remat="none")
    config.batch_size = 16
    chip = hardware.Chip("h100", 1e12, 10_000, 1e9, 1e9, 1e9, 8)
    monkeypatch.setitem(hardware.CHIPS, "h100", chip)
    small = make_plan(Job.of(config), "h100:8", compiled=False)
    assert not small.fits
    line = table.does_not_fit(small)
    assert "most of it" in line and "\n" not in line
    config.batch_size = 512
    large = table.does_not_fit(make_plan(Job.of(config), "h100:8", compiled=False))
    assert "try --config.accumulation=64, which keeps the batch, or --config.backbone.remat=products" in large
    config.accumulation = 64
    least = make_plan(Job.of(config), "h100:8", compiled=False)
    assert least.clips == 512 and "accumulation" not in table.does_not_fit(least)
    config.batch_size, config.accumulation = 16, 1
    assert small.compiled is None and json.dumps(table.as_json(small))
    with pytest.raises(UserError, match="nothing fits h100:8"):
        search.search(config, "h100:8", "sample")


def test_gpu_plans_count_gradients_in_the_type_in_which_they_are_summed():
    found = make_plan(Job.of(tiny((8, 1, 1), dtype="bfloat16")), "h100:8")
    summed = sum(row["bytes"] for row in found.collectives if row["kind"] == "all-reduce")
    # Matrices of the copied blocks in bfloat16, everything else in float32.
    assert 2 * found.trained < summed < 4 * found.trained
    assert found.compiled is None and found.attention == "cudnn"


def test_every_line_of_the_table_has_its_figures():
    found = make_plan(Job.of(tiny((8, 1, 1))), "h100:8", compiled=False)
    text = table.table(found)
    for words in ("parameters", "optimizer and EMA", "activations", "all-reduce over data", "limited by"):
        assert words in text
    assert text.endswith("GB of the 76.00 GB that h100 has for it") and "\nfits: needs " in text
    kinds = found.memory
    assert found.bytes == sum(kinds.values())
    work = max(found.floors["compute"], found.floors["memory"])
    assert found.seconds["unhidden"] == work + found.floors["links"]


def test_a_plan_of_one_device_says_nothing_of_links():
    found = make_plan(Job.of(tiny((1, 1, 1))), "h100:1", compiled=False)
    text = table.table(found)
    assert "1 device, mesh" in text and "nothing is sent between devices" in text
    assert "links" not in text and "communication" not in text and "efficiency" not in text


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v9:2x2", "name a chip of v5e"),
        ("h100:2x2", "have a number"),
        ("v5p", "name a chip"),
        ("v5p:0x2", "name"),
    ],
)
def test_topologies_that_mean_nothing_are_refused(topology, words):
    with pytest.raises(UserError, match=words):
        hardware.parse(topology)


@pytest.mark.parametrize("mesh", ["1,2", "1,2,x", "1,2,3,4"])
def test_meshes_are_three_numbers(mesh):
    with pytest.raises(UserError, match="three numbers"):
        table.read_mesh(mesh)


@pytest.mark.parametrize(
    ("mesh", "words"), [((3, 1, 1), "does not fit 8 devices"), ((8, 1, 1), "does not divide")]
)
def test_meshes_that_do_not_fit_are_refused(mesh, words):
    config = tiny(mesh)
    config.batch_size = 4
    with pytest.raises(UserError, match=words):
        make_plan(Job.of(config), "h100:8", compiled=False)


def test_bad_input_is_answered_in_one_line():
    result = run_here("prophy_jax.plan", "--config=configs/wan.py:tiny", "--topology=h100:8", "--mode=x")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "choose one of train, sample" in result.stderr


@needs_tpu_compiler
def test_tpu_topologies_that_do_not_exist_are_refused_in_one_line():
    with pytest.raises(UserError, match="the TPU compiler refuses it"):
        hardware.get_devices(hardware.CHIPS["v5p"], "v5p:3x3", (3, 3))


@needs_tpu_compiler
def test_the_step_compiles_for_a_tpu_that_is_not_there():
    # Not smaller: libtpu 0.0.50 aborts on all-reduces of a few values.
    config = tiny((4, 1, 1), dtype="bfloat16", dim=256, num_heads=2, ffn_dim=512)
    found = make_plan(Job.of(config), "v5p:2x2x1")
    assert found.attention == "splash" and found.compiled > sum(
        found.memory[kind] for kind in ("parameters", "optimizer and EMA", "inputs")
    )
    summed = sum(row["bytes"] for row in found.collectives if row["kind"] == "all-reduce")
    assert 2 * found.trained <= summed <= 4 * found.trained + 20_000


@needs_tpu_compiler
def test_over_several_slices_the_data_axis_alone_crosses_the_network():
    from jax.experimental import topologies

    hardware.get_devices(hardware.CHIPS["v5p"], "v5p:2x2x1", (2, 2, 1))  # sets what the compiler reads
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1", num_slices=2).devices
    mesh = parallel.make_mesh({"data": 4, "fsdp": 2, "context": 1}, 8, devices)
    slices = [[device.slice_index for device in row.ravel()] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match="mesh.data=1 does not divide over 2 TPU slices"):
        parallel.make_mesh({"data": 1, "fsdp": 8, "context": 1}, 8, devices)

    @jax.jit
    def loss(weights, batch):
        return jnp.mean((batch @ weights) ** 2)

    weights = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=parallel.replicated(mesh))
    batch = jax.ShapeDtypeStruct(
        (8, 256), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, parallel.BATCH)
    )
    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss)).lower(weights, batch).compile()
