"""What `robustreg certify` checks: a policy's guarantee, and what it is worth under a deployed reward.

A subject is a problem with a policy for it: that of a configuration (solved here), of a result on disk, or of the
user. Three claims are checked, those that apply:

* *the solution*: its certificate, recomputed from nothing but value, policy and perturbation (`certificates`);
* *the guarantee* of the user's own policy: the certified lower bound on its regularised value is met by its return
  under its own worst case (an equality in theory, hence a check of both sides);
* *the deployed reward*: the policy earns at least its guarantee there. That is promised where the deployed reward is in
  the robust set, on average over the policy's visits; elsewhere it may hold by luck, and the report says so.

The critical beta of a deployed reward is the largest beta whose (aggregated) robust set holds it: with a smaller one,
hence a stronger regulariser, the guarantee would have been a promise.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustreg import archive
from robustreg._core import checks
from robustreg._core.files import write_whole
from robustreg._core.npz import opened
from robustreg.adversary import perturbations
from robustreg.adversary.calibration import critical_beta
from robustreg.adversary.certificates import certify
from robustreg.adversary.guarantees import guarantee
from robustreg.cli import config
from robustreg.problems.mdps import MDP
from robustreg.regularisers.balls import NormBall
from robustreg.regularisers.regulariser import Regulariser, Sum
from robustreg.solvers import evaluation
from robustreg.solvers.loop import solve
from robustreg.solvers.solution import Solution, SolveError


@dataclasses.dataclass(frozen=True)
class Question:
    """Hold what is to be certified.

    Attributes:
        job: the problem and its regulariser.
        solution: solved, here or before.
        policy: the user's own, `[S, A]`; None: that of the solution.
        deployed: the reward that it meets, `[S, A]`; None: the problem's own.
    """

    job: config.Job
    solution: Solution
    policy: jax.Array | None
    deployed: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Hold what was found.

    Attributes:
        holds: the verdict.
        rows: the findings for people, by name.
        arrays: the findings per state, by name.
    """

    holds: bool
    rows: Mapping[str, str]
    arrays: Mapping[str, np.ndarray]

    def write(self, path: Path, header: Mapping[str, Any]) -> Path:
        """Write the findings as a NumPy archive, the rows in its JSON `header`."""
        text = json.dumps({**header, "holds": self.holds, "table": dict(self.rows)})
        content: Any = {"header": np.array(text), **self.arrays}
        write_whole(path, lambda file: np.savez(file, **content))
        return path


def precision_of(source: str | Path) -> str:
    """Return the precision that a result was solved in; float64 for a configuration."""
    return str(_header(source).get("dtype", "float64")) if _is_result(source) else "float64"


def load(source: str | Path, policy: Path | None = None, deployed: Path | None = None) -> Question:
    """Read what is to be certified, in the precision that JAX is set to; a configuration is solved.

    Args:
        source: a TOML file, or a result of `robustreg solve`, which holds its configuration.
        policy: an archive with an array `policy [S, A]`.
        deployed: an archive with an array `reward [S, A]`.

    Raises:
        ConfigError: a file that cannot be read or does not fit the problem.
        SolveError: a configuration that could not be solved.
    """
    job, solution = _result(source) if _is_result(source) else (config.load(source), None)
    m = job.problem.mdp
    if job.ambiguity is not None and (policy or deployed):
        raise config.ConfigError(
            f"{source}: has an [ambiguity] table, and what a policy or a deployed reward of one's own is promised is "
            "checked for uncertain rewards alone: take the table out"
        )
    chosen = None if policy is None else _policy(policy, m)
    met = None if deployed is None else jnp.asarray(_array(deployed, "reward", m), m.dtype)
    if solution is None:
        limits: Any = {"tol": job.tol, "max_steps": job.max_steps, "ambiguity": job.ambiguity}
        solution = solve(m, job.regulariser, job.solver, **limits).raise_if_failed()
    return Question(job, solution, chosen, met)


def examine(question: Question) -> Verdict:
    """Check everything that the subject claims.

    Returns:
        A `Verdict`; the first claim that fails is named in its row "verdict".
    """
    m, reg = question.job.problem.mdp, question.job.regulariser
    rows = {"problem": question.job.problem.title, "regulariser": name_of(reg), **ambiguity_of(question.job)}
    rows["precision"] = str(m.dtype)
    found, arrays, failure = _solved(question) if question.policy is None else _own(question)
    rows |= found
    verdict = "holds: the guarantee is certified"
    if question.deployed is not None:
        found, more, promised, earned = _deployed(question)
        rows, arrays = rows | found, arrays | more
        verdict = "holds: the deployed reward is in the robust set"
        if not promised:
            verdict = "holds, but by luck: the deployed reward is outside the robust set"
        if not earned:
            failure = failure or "under the deployed reward the policy earns less than its guarantee"
    rows["verdict"] = f"fails: {failure}" if failure else verdict
    return Verdict(not failure, rows, {name: np.asarray(x) for name, x in arrays.items()})


Found = tuple[dict[str, str], dict[str, Any], str]


def _solved(question: Question) -> Found:
    """The certificate of a solution, and what is wrong with it."""
    m, sol = question.job.problem.mdp, question.solution
    proof = certify(m, question.job.regulariser, sol, ambiguity=question.job.ambiguity)
    rounding, failure = float(proof.rounding), ""
    # A file may claim any tolerance. It counts as far as the configuration asks for it, or, if that asks for none, as
    # a solve may have stopped there: its half-width is then at most twice the rounding.
    most = 4 * rounding if question.job.tol is None else float(question.job.tol)
    try:
        sol.raise_if_failed()
        proof.raise_if_loose(min(float(sol.tol), most) + rounding)
    except SolveError as error:
        failure = str(error)
    rows = {
        "guarantee": _range(_start(m, proof.lower), _start(m, proof.upper)),
        "certified gap": f"{float(jnp.max(proof.gap)):.2e}",
        "indifference residual": f"{float(jnp.max(proof.indifference)):.2e}",
    }
    return rows, {name: getattr(proof, name) for name in ("lower", "upper", "indifference", "slack")}, failure


def _own(question: Question) -> Found:
    """The guarantee of the user's policy, from below by a certificate and from above by its worst case."""
    m, reg, policy = question.job.problem.mdp, question.job.regulariser, question.policy
    assert policy is not None
    dr = perturbations.worst_case(reg, policy)
    value = evaluation.evaluate(m, policy, reg=reg)
    attacked = evaluation.evaluate(m, policy, reward=m.reward - dr)
    proof = certify(m, reg, Solution(**{**vars(question.solution), "value": value, "policy": policy}))
    lower, upper, best = _start(m, proof.lower), _start(m, attacked), _start(m, question.solution.value)
    rows = {
        "guarantee": f"{lower:.9g}",
        "under its worst case": f"{upper:.9g}",
        "best guarantee of any policy": f"{best:.9g}",
        "given away": f"{best - lower:.4g}",
    }
    # The lower bound lies two roundings below the value; evaluation rounds in its own way, by as much.
    close = abs(upper - lower) <= 8 * float(proof.rounding)
    failure = "" if close else "its worst case does not attain the certified bound: check in float64"
    if not np.isfinite(lower):
        failure = "nothing is guaranteed: the policy takes an action that the prior excludes, or (alpha <= 0) omits one"
    return rows, {"lower": proof.lower, "worst_case": dr, "worst_case_value": attacked}, failure


def _deployed(question: Question) -> tuple[dict[str, str], dict[str, Any], bool, bool]:
    """Evaluate the policy under the deployed reward: what it gets, whether that was promised, whether it is enough."""
    m, reg, reward = question.job.problem.mdp, question.job.regulariser, question.deployed
    assert reward is not None
    policy = question.solution.policy if question.policy is None else question.policy
    met = guarantee(m, reg, policy, reward)
    change = m.reward - reward
    visits = jnp.sum(evaluation.occupancy(m, policy), axis=-1)
    limit, each = critical_beta(reg, change, weights=visits), critical_beta(reg, change)
    promised = bool(met.covered)
    unit = 64 * float(jnp.finfo(m.dtype).eps)
    earned = float(met.margin) >= -unit * (abs(float(met.guaranteed)) + abs(float(met.actual)))
    inside = jnp.all(met.slack >= 0)
    where = ("yes, in every state" if inside else "yes, on average over visits") if promised else "no"
    rows = {
        "deployed return": f"{float(met.actual):.9g}",
        "bound there": f"{float(met.bound):.9g}",
        "margin": f"{float(met.margin):.9g}",
        "in the robust set": where,
        "critical beta": f"{float(limit):.6g} (in every state: {float(jnp.min(each)):.6g})",
    }
    return rows, {"deployed_slack": met.slack, "deployed_critical_beta": each}, promised, promised or earned


def _start(m: MDP, value: jax.Array) -> float:
    return float(jnp.sum(m.initial * value))


def _range(low: float, high: float) -> str:
    return f"{0.5 * (low + high):.9g} ± {0.5 * (high - low):.1e}"


def numbers_of(reg: Regulariser) -> dict[str, str]:
    """List the numbers of a regulariser without batch axes, by name, for tables and titles; a sum has none itself."""
    numbers = {name: f"{float(getattr(reg, name)):g}" for name in reg._scalars}
    return numbers | ({"p": f"{reg.p:g}"} if isinstance(reg, NormBall) else {})


def name_of(reg: Regulariser) -> str:
    """Write a regulariser with its numbers."""
    if isinstance(reg, Sum):
        return " + ".join(name_of(part) for part in reg.parts)
    return f"{type(reg).__name__}({', '.join(f'{name}={value}' for name, value in numbers_of(reg).items())})"


def ambiguity_of(job: config.Job) -> dict[str, str]:
    """Write the uncertain transitions of a job, a row for a table; none where there are none."""
    ball = job.ambiguity
    if ball is None:
        return {}
    scales = [name for name in ("per_state", "per_pair") if getattr(ball, name) is not None]
    p = ball.p if isinstance(ball.p, str) else f"{ball.p:g}"
    numbers = [f"radius={float(ball.radius):g}", f"p={p}", ball.rectangular, ball.form, *scales]
    return {"ambiguity": f"TransitionBall({', '.join(numbers)})"}


# ---- files


def _is_result(source: str | Path) -> bool:
    return Path(source).suffix == ".npz"


def _refusal(path: str | Path, error: Exception) -> config.ConfigError:
    """An error about a file, which names it once."""
    return config.ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}")


def _header(source: str | Path) -> dict[str, Any]:
    try:
        return archive.read_header(source)
    except (OSError, ValueError) as error:
        raise _refusal(source, error) from error


def _result(source: str | Path) -> tuple[config.Job, Solution]:
    """The configuration and the solution in a result."""
    table = _header(source).get("config")
    try:
        solution = archive.load(source)
    except (OSError, ValueError) as error:
        raise _refusal(source, error) from error
    if not isinstance(table, dict) or not isinstance(solution, Solution):
        raise config.ConfigError(
            f"{source}: holds no solution with its configuration; `robustreg solve --out` writes one"
        )
    config.refuse_huge(table, f"{source}: header: config")
    job = config.build(table, f"{source}: header: config")
    _expect_solution(source, job, solution)
    return job, jax.tree.map(lambda x: _cast(x, job.problem.mdp), solution)


def _expect_solution(source: str | Path, job: config.Job, found: Solution) -> None:
    """Refuse a solution whose arrays do not have the shapes that a solve of its configuration gives."""
    m, reg, ball = job.problem.mdp, job.regulariser, job.ambiguity
    wanted = jax.eval_shape(lambda: solve(m, reg, job.solver, tol=job.tol, ambiguity=ball))
    for field in dataclasses.fields(Solution):
        shapes = [[x.shape for x in jax.tree.leaves(getattr(s, field.name))] for s in (found, wanted)]
        if shapes[0] != shapes[1]:
            has, wants = (", ".join(map(str, x)) or "no array" for x in shapes)
            raise config.ConfigError(f"{source}: {field.name} has shape {has}, its configuration says {wants}")


def _cast(x: jax.Array, m: MDP) -> jax.Array:
    return x.astype(m.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _policy(path: Path, m: MDP) -> jax.Array:
    """A policy, rescaled to sum to 1 in this precision: it was rounded in its own."""
    policy = _array(path, "policy", m)
    try:
        checks.check_policy(policy, (m.n_states, m.n_actions), "S, A")
    except ValueError as error:
        raise config.ConfigError(f"{path}: {error}") from error
    exact = policy.astype(np.float64)
    return jnp.asarray(exact / exact.sum(-1, keepdims=True), m.dtype)


def _array(path: Path, name: str, m: MDP) -> np.ndarray:
    """One array `[S, A]` of an archive, finite, in the precision of the file."""
    shape = (m.n_states, m.n_actions)
    try:
        with opened(path) as archive:
            has = archive.shape(name)  # before anything is read of it
            checks.expect_shape(name, has, shape, "S, A")
            if len(has) != 2:
                raise ValueError(f"{name} has shape {has}; expected one [S, A], without batch axes")
            array = archive.read(name, compressed=True)
        checks.number(name, array)
    except FileNotFoundError as error:
        raise config.ConfigError(f"{path}: no such file; expected an archive with an array `{name}`") from error
    except (OSError, TypeError, ValueError) as error:
        raise _refusal(path, error) from error
    place = checks.first(~np.isfinite(array))
    if place is not None:
        raise config.ConfigError(
            f"{path}: {checks.place(name, place, ('s', 'a'))} is {array[place]}; expected a number"
        )
    return array if array.dtype.kind == "f" else array.astype(np.float64)
