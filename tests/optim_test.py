"""Every parameter in exactly one group, schedules, clipping, frozen leaves without moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from prophy_jax.run import optim
from prophy_jax.run.errors import UserError

PARAMS = {
    "branch": {"blocks": {"kernel": jnp.ones((2, 3))}, "exits": {"kernel": jnp.ones(4)}},
    "backbone": {"head": {"kernel": jnp.ones(5)}},
}
GROUPS = (("branch/blocks/", 1e-2), ("branch/", 1e-1), ("backbone/", None))
ADAM = dict(groups=GROUPS, warmup=4, decay="constant", clip=1e9, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0)


def test_first_matching_pattern_claims():
    assert optim.claim(PARAMS, GROUPS) == {
        "branch/blocks/kernel": "branch/blocks/",
        "branch/exits/kernel": "branch/",
        "backbone/head/kernel": "backbone/",
    }


def test_unclaimed_parameters_and_idle_patterns_are_named():
    with pytest.raises(UserError, match="1 unclaimed.*backbone/head/kernel"):
        optim.claim(PARAMS, GROUPS[:2])
    with pytest.raises(UserError, match=r"without a parameter \['lora/'\]"):
        optim.claim(PARAMS, (*GROUPS, ("lora/", 1.0)))


NAMES = (("branch/blocks/", "blocks"), ("branch/", "branch"), ("backbone/", "backbone"))


@pytest.mark.parametrize("frozen", [0, 0.0, None])
def test_groups_take_their_learning_rates_by_name(frozen):
    rates = dict(blocks=1e-2, branch=1e-1, backbone=frozen)
    settings = ConfigDict(ADAM | dict(groups=NAMES, learning_rates=rates))
    assert optim.groups_of(settings) == GROUPS == optim.groups_of(ConfigDict(ADAM))
    logged = optim.learning_rates(100, settings)
    assert logged.keys() == {"blocks", "branch"}  # frozen parameters have none
    assert [float(logged["branch"](step)) for step in (0, 3, 50)] == pytest.approx([0.025, 0.1, 0.1])


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        (
            dict(blocks=1.0, branch=1.0),
            r"groups names \['backbone'\], .*learning_rates has \['blocks', 'branch'\]",
        ),
        (dict(blocks=1.0, branch=1.0, backbone=0, lora=1.0), r"has \['lora'\], which no group"),
    ],
)
def test_a_name_without_a_group_or_a_rate_is_refused(rates, words):
    with pytest.raises(UserError, match=words) as error:
        optim.groups_of(ConfigDict(dict(groups=NAMES, learning_rates=rates)))
    assert "\n" not in str(error.value)


def test_a_broken_pattern_and_a_run_that_trains_nothing_are_refused():
    with pytest.raises(UserError, match=r"optimizer.groups: 'branch\(' is not a regular expression"):
        optim.groups_of(ConfigDict(dict(groups=(("branch(", 1.0),))))
    with pytest.raises(UserError, match="nothing trains"):
        make({})


def test_numbers_in_place_of_names_leave_no_rate_unused_without_a_word(capsys):
    optim.warn_of_unused_rates(ConfigDict(dict(groups=NAMES, learning_rates=dict(branch=1.0))))
    assert not capsys.readouterr().err
    optim.warn_of_unused_rates(ConfigDict(dict(groups=GROUPS, learning_rates=dict(branch=1.0))))
    assert "learning_rates ['branch'] are not used" in capsys.readouterr().err


def test_split_and_merge_are_inverse():
    trainable, frozen = optim.split(PARAMS, GROUPS)
    assert set(trainable) == {"branch"} and set(frozen) == {"backbone"}
    assert jax.tree.structure(optim.merge(trainable, frozen)) == jax.tree.structure(PARAMS)


def make(trainable, **changes):
    return optim.make_optimizer(trainable, 100, ConfigDict(ADAM | changes))


def run(steps, **changes):
    trainable, _ = optim.split(PARAMS, GROUPS)
    optimizer = make(trainable, **changes)
    state, moves = optimizer.init(trainable), []
    gradient = jax.tree.map(jnp.ones_like, trainable)
    for _ in range(steps):
        updates, state = optimizer.update(gradient, state, trainable)
        moves.append(-updates["branch"]["exits"]["kernel"][0])
    return moves, updates, state


def test_groups_have_their_own_rate_after_a_linear_warm_up():
    moves, updates, _ = run(6)
    # Adam with a constant gradient moves by the learning rate.
    np.testing.assert_allclose(moves, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-5)
    np.testing.assert_allclose(updates["branch"]["blocks"]["kernel"], -1e-2, rtol=1e-5)


def test_cosine_ends_at_zero_and_unknown_decay_is_refused():
    moves, _, _ = run(100, decay="cosine")
    assert moves[52] == pytest.approx(0.05, rel=1e-3) and moves[-1] < 1e-4
    with pytest.raises(UserError, match="sideways"):
        run(1, decay="sideways")


def test_clipping_is_by_the_norm_over_all_groups():
    trainable, _ = optim.split(PARAMS, GROUPS)
    gradient = jax.tree.map(jnp.ones_like, trainable)  # norm sqrt(10)
    clipped = make(trainable, clip=1.0, eps=1e3)
    free = make(trainable, eps=1e3)
    # With a huge eps Adam is linear in the gradient, so clipping shows as a factor.
    a, _ = clipped.update(gradient, clipped.init(trainable), trainable)
    b, _ = free.update(gradient, free.init(trainable), trainable)
    ratio = jax.tree.map(lambda x, y: x / y, a, b)
    np.testing.assert_allclose(jax.tree.leaves(ratio)[0], 10**-0.5, rtol=1e-3)


def test_frozen_leaves_have_no_moments():
    _, _, state = run(1)
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(sizes) == [4, 4, 6, 6]


def test_group_norms():
    norms = optim.group_norms(PARAMS)
    assert norms.keys() == {"branch/blocks", "branch/exits", "backbone/head"}
    np.testing.assert_allclose(norms["branch/blocks"], np.sqrt(6), rtol=1e-6)
    np.testing.assert_allclose(optax.tree.norm(PARAMS) ** 2, 15, rtol=1e-6)
