"""Is any number that the library returns wrong without a word?

    python benchmarks/honesty.py [--small] [--seed 0] [--only GROUP] [--json FILE]

Draws random problems (`draws.py`), asks the library everything it claims to know about them, and compares every answer
with a slow reference in extended precision (`reference.py`) that carries its own bounds. 20,480 float32 and 6,144
float64 problems, solved twice where a tolerance is given too: KL and alpha in [-5, 5], a share at or beside 0, 1/2, 1
and 2; beta and the size of the rewards each log-uniform in [1e-6, 1e6]; discounts 0 to .9999; forbidden actions and
priors to 1e-12; episodes that end; Garnets, permutations, deterministic and nearly deterministic maps, cycles with
exits, absorbing chains, two-cycles, skew walks, nearly decomposable chains; 2 to 40 states, 1 to 6 actions; in batches
of 1,024.

A claim is *violated* where an answer is beyond what was claimed plus the rounding that the table states (`tallies.py`;
multiples of the unit times the sizes involved, chosen before the first run). NaN is *unanswered*, not a violation,
unless the status says CONVERGED. Where the reference's own bounds are too wide to tell, the lane is *not checked*. Exit
status 1 if anything is violated.

The whole (17 minutes on 2 shared CPU cores, JAX 0.12.0; 39,040 solves, 548,562 answers; float32 + float64):

      claim                                              tried  unanswered  violated
      solve: lower <= V* <= upper                 20480 + 6144           0         0
      solve to tol: lower <= V* <= upper          10240 + 2048           0         0
      evaluate, two policies                     40960 + 12288           0         0
      evaluate regularised, two policies         36844 + 10978         189         0
      occupancy, two policies                    40960 + 12288           0         0
      certify, four claims, the solution's       81761 + 24573           0         0
      certify, two claims, a random policy        32728 + 9668         432         0
      guarantee, three claims                    48183 + 13890         311         0
      slack                                       20480 + 6144           0         0
      critical_beta: Omega* changes sign          20480 + 6144           0         0
      gradient in the reward, both modes         40642 + 12282          44         0
      game: primal <= value <= dual                    64 + 64           0         0

(Values of policies whose search ran out of steps were once handed out with digits left: two lanes of 26,624, beyond by
4e-5 of their size. The multiple for slack had no `1 + |alpha - 1|` in the first run, and missed one lane of 26,624 by a
fortieth.)
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import claims  # noqa: E402
import reference  # noqa: E402
from draws import draw  # noqa: E402
from solvers import commit  # noqa: E402
from tallies import CLAIMS, Batch, Table  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Group:
    """Batches that share their compiled programs."""

    dtype: str
    family: str
    states: int
    actions: int
    ends: bool
    batches: int
    lanes: int = 1024
    tol: bool = False
    game: bool = False

    @property
    def name(self) -> str:
        """For tables and `--only`."""
        ends = "-ends" if self.ends else ""
        return f"{self.dtype}-{self.family}-{self.states}x{self.actions}{ends}-{self.lanes}"


WHOLE = (
    Group("float32", "alpha", 12, 4, False, 6, tol=True),
    Group("float32", "alpha", 3, 6, True, 5),
    Group("float32", "kl", 12, 4, True, 4, tol=True),
    Group("float32", "alpha", 40, 2, True, 2),
    Group("float32", "kl", 20, 1, False, 2),
    Group("float32", "kl", 2, 3, False, 1),
    Group("float64", "alpha", 12, 4, False, 2, tol=True),
    Group("float64", "alpha", 3, 6, True, 2),
    Group("float64", "kl", 40, 2, False, 1),
    Group("float64", "alpha", 20, 1, True, 1),
    Group("float32", "alpha", 3, 3, False, 1, lanes=64, game=True),
    Group("float64", "alpha", 3, 3, False, 1, lanes=64, game=True),
)
SMALL = (Group("float32", "alpha", 8, 3, False, 1, lanes=256), Group("float64", "alpha", 8, 3, True, 1, lanes=128))


def run_batch(rr: Any, table: Table, group: Group, number: int, seed: int) -> None:
    """Draw one batch and hold the library to every claim about it."""
    rng = np.random.default_rng([seed, number, *group.name.encode()])
    kl = group.family == "kl"
    drawn = draw(rng, group.lanes, group.states, group.actions, group.dtype, kl, group.ends)
    ends = drawn.termination if group.ends else None
    m = rr.mdp(drawn.P, drawn.reward, drawn.discount, drawn.initial, termination=ends, layout="sas")
    reg = rr.kl(drawn.beta, drawn.prior) if kl else rr.alpha(drawn.alpha, drawn.beta, drawn.prior)
    sol, truth = rr.solve(m, reg), reference.solve(drawn.exact)
    where = f"{group.name}, seed {seed}, batch {number}"
    batch = Batch(rr, table, drawn, m, reg, sol, truth, where, group.dtype == "float64")
    if group.game:
        claims.game(batch)
        return
    claims.solution(batch, sol, "solve")
    if group.tol:
        width = np.asarray(sol.upper - sol.lower).max(-1)
        tol = np.maximum(np.nan_to_num(width), 1e-30) * 10 ** rng.uniform(-0.5, 3, group.lanes)
        claims.solution(batch, rr.solve(m, reg, tol=tol.astype(group.dtype)), "solve to tol")
    claims.certificates(batch)
    value = claims.values(batch, drawn.policy, "random")
    claims.values(batch, sol.policy, "solution's")
    claims.visits(batch, drawn.policy, "random")
    claims.visits(batch, sol.policy, "solution's")
    claims.certificate_of_policy(batch, value)
    dr = claims.perturbations(batch, rng)
    claims.slacks(batch, dr)
    claims.guarantees(batch, dr)
    claims.derivatives(batch, rng)


def campaign(rr: Any, groups: tuple[Group, ...], seed: int = 0, say: Any = None) -> Table:
    """Run groups of batches.

    Args:
        rr: the library.
        groups: what to draw.
        seed: of everything.
        say: called with a line per batch; None: nobody is told.

    Returns:
        The table of all claims.
    """
    table = Table()
    for group in groups:
        for number in range(group.batches):
            begin, before = time.perf_counter(), table.violated
            run_batch(rr, table, group, number, seed)
            if say:
                took = time.perf_counter() - begin
                say(f"  {group.name} {number + 1}/{group.batches}: {took:.0f} s, {table.violated - before} violated")
    return table


def show(table: Table) -> None:
    """Print the table, and the worst example of each violated claim."""
    print(f"  {'claim':<46}{'tried':>8}{'not checked':>13}{'unanswered':>17}{'violated':>10}   allowed for rounding")
    tried = {name: tally for name, tally in table.tallies.items() if tally.tried}
    for name, tally in tried.items():
        lost = f"{tally.unanswered} ({tally.unanswered / tally.tried:.1%})"
        counts = f"{tally.tried:>8}{tally.unchecked:>13}{lost:>17}{tally.violated:>10}"
        print(f"  {name:<46}{counts}   {CLAIMS[name]}")
    for name, tally in tried.items():
        if tally.violated:
            print(f"  worst of `{name}`: beyond by {tally.worst:.2g} of the size of the answer\n    {tally.example}")
    cases = sum(tally.tried for tally in tried.values())
    print(f"  {cases} cases, {table.violated} claims violated")


def main() -> int:
    """Run the campaign, print the table, append it to a file if asked to."""
    parser = argparse.ArgumentParser(description="every claim of the library against a slow reference")
    parser.add_argument("--small", action="store_true", help="a few hundred problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="groups whose name contains this")
    parser.add_argument("--json", help="append one JSON line per claim to this file")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    import robustreg as rr

    groups = [g for g in (SMALL if arguments.small else WHOLE) if not arguments.only or arguments.only in g.name]
    about = {"commit": commit(), "device": jax.devices()[0].device_kind, "jax": jax.__version__, "seed": arguments.seed}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    solves = {d: sum(g.batches * g.lanes * (1 + g.tol) for g in groups if g.dtype == d) for d in ("float32", "float64")}
    print(f"  solves: {solves['float32']} float32, {solves['float64']} float64; reference unit {reference.UNIT:.1g}")
    begin = time.perf_counter()
    table = campaign(rr, tuple(groups), arguments.seed, lambda line: print(line, file=sys.stderr, flush=True))
    show(table)
    print(f"  {time.perf_counter() - begin:.0f} s")
    if arguments.json:
        with open(arguments.json, "a") as file:
            rows = ({"claim": name} | dataclasses.asdict(tally) for name, tally in table.tallies.items())
            file.writelines(json.dumps(about | row) + "\n" for row in rows)
    return int(table.violated > 0)


if __name__ == "__main__":
    sys.exit(main())
