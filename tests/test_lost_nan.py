"""What cannot be computed is NaN wherever it is reported, in shapes in which the compiler's maxima lose NaN as well.

Some versions of JAX hand `jnp.max` to a kernel that skips NaN, from some hundred numbers on: small examples, which all
other tests have, do not show it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr
from robustreg._core import extremes

S, A, LANES, FAILED = 1000, 3, 8, 3
RNG = np.random.default_rng(0)
SUCCESSORS = rr.Successors(
    indices=jnp.asarray(RNG.integers(0, S, (S, A, 4)), jnp.int32),
    probabilities=jnp.asarray(RNG.dirichlet(np.ones(4), (S, A)), jnp.float32),
)
REWARD = np.broadcast_to(RNG.normal(size=(S, A)).astype(np.float32), (LANES, S, A)).copy()
BROKEN = REWARD.copy()
BROKEN[FAILED, S // 2, 1] = np.nan
BETA = np.linspace(1, 5, LANES, dtype=np.float32)
POLICY = jnp.broadcast_to(jnp.asarray(RNG.dirichlet(np.ones(A), S), jnp.float32), (LANES, S, A))

# Of a reward, a regulariser and a policy: what is NaN in the lane of a reward that is NaN in one action of one state.
WHOLE = {
    "gap": lambda r, reg: rr.solve(problem(r), reg).gap,
    "horizon": lambda r, reg: rr.solve_horizon(problem(r), reg, 3).gap,
    "average": lambda r, reg: rr.solve_average(problem(r), reg).gap,
    "evaluate": lambda r, reg: rr.evaluate(problem(r), POLICY, reg),
    "optimum": lambda r, _: rr.nominal_optimum(problem(r)),
    "actual": lambda r, reg: rr.guarantee(problem(REWARD), reg, POLICY, deployed=r).actual,
    "bound": lambda r, reg: rr.guarantee(problem(REWARD), reg, POLICY, deployed=r).bound,
    "strength": lambda r, reg: rr.critical_beta(reg, r, per_state=False),
    "certificate": lambda r, reg: rr.certify(problem(r), reg, rr.solve(problem(REWARD), reg)).gap,
}
# And what is NaN in that state alone.
STATE = {
    "slack": lambda r, reg: rr.slack(reg, r),
    "conjugate": lambda r, reg: reg.conjugate(r),
    "strengths": lambda r, reg: rr.critical_beta(reg, r),
    "radius": lambda r, reg: rr.adversary.RobustSet(reg).radius(r),
    "orthant": lambda r, reg: rr.adversary.Orthant(reg, POLICY).slack(r),
    "half-space": lambda r, reg: rr.adversary.HalfSpace(reg, POLICY).slack(r),
    "support": lambda r, reg: rr.adversary.HalfSpace(reg, POLICY).support(r),
    "indifference": lambda r, reg: rr.certify(problem(r), reg, rr.solve(problem(REWARD), reg)).indifference,
    "consistency": lambda r, reg: rr.certify(problem(r), reg, rr.solve(problem(REWARD), reg)).consistency,
}


def problem(reward):
    return rr.mdp(SUCCESSORS, reward, 0.9)


FAMILIES = {"kl": rr.kl, "alpha": lambda beta: rr.alpha(np.float32(1.7), beta)}


# (Indifference is of the actions that are taken: with alpha this one is not.)
CASES = [("kl", name) for name in (*WHOLE, *STATE)] + [
    ("alpha", name) for name in ("gap", *STATE) if name != "indifference"
]


@pytest.mark.parametrize("family, name", CASES)
def test_every_report(family, name):
    ask = (WHOLE | STATE)[name]
    lost = np.isnan(jax.jit(lambda r, beta: ask(r, FAMILIES[family](beta)))(BROKEN, BETA)).reshape(LANES, -1)
    assert not np.delete(lost, FAILED, 0).any()
    assert (lost[FAILED] if name in WHOLE else lost[FAILED, S // 2]).all()


@pytest.mark.parametrize(
    "shape, axis", [((8, 1000), 1), ((1000, 8), 0), ((20, 30, 40), (0, 1)), ((64, 64), (0, 1)), ((3,), 0)]
)
def test_extremes(shape, axis):
    x = RNG.normal(size=shape).astype(np.float32)
    for ours, numpys in ((extremes.largest, np.max), (extremes.smallest, np.min)):
        np.testing.assert_array_equal(jax.jit(ours, static_argnums=1)(x, axis), numpys(x, axis))
        y = x.copy()
        y[tuple(n // 2 for n in shape)] = np.nan
        np.testing.assert_array_equal(jax.jit(ours, static_argnums=1)(y, axis), numpys(y, axis))
