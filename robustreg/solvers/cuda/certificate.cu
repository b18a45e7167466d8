// Numbers of a lane, and what one backup proves: `bellman.rounding`, `bellman.deviation_cost` and the stopping rule of
// `solve`, formula by formula. Change the two together.

#define CONVERGED 0
#define MAX_STEPS 1
#define STAGNATED 2
#define NONFINITE_INPUT 3
#define NONFINITE 4
#define RUNNING -1
#define PATIENCE 60

// In the order in which `resident.py` writes them.
struct Numbers {
  float beta, discount, complement, horizon, ratio, deviation, tol;
  float reward, charged, limit, temperature, log_prior, largest_beta, h;
};

struct Integers {
  int near, probabilities, reward, leave, prior, beta;  // rows of the tables
  int limit, sweeps, valid;                             // cap on backups, plain sweeps after the first, is it in range
};

// `conjugates.kl_noise` and `alpha_noise`: the rounding of a conjugate, in units of UNIT and of rewards.
DEVICE float conjugate_noise(const Numbers& lane, float cost, float reach) {
  const float logs = 2 + LOG_ACTIONS;
#if ALPHA
  const float order = fabsf(lane.h + 1);
  const float powers = log1pf(order * (order + 1) * lane.largest_beta * cost);
  const bool tiny = reach * lane.largest_beta * (2 + order) < 0.5f * TINY_GAP;
  return 4 * (logs + lane.log_prior + powers) * cost + (tiny ? 0.f : 512 * UNIT * lane.temperature);
#else
  return logs * (reach * lane.largest_beta < 0.5f * NEAR_PRIOR ? 2 * cost : lane.temperature);
#endif
}

// Error that floating point adds to each side of the certificate, for V = h + c with |h| <= size; `cost` is the largest
// of max q - T V.
DEVICE float rounding(const Numbers& lane, float size, float c, float cost) {
  const float root = sqrtf((float)ACTIONS);
  const float near = ENDS ? size + fabsf(c) : size;
  const float reward = near <= lane.limit ? lane.charged : lane.reward;
  cost = fabsf(cost);
  const float padded = cost + 4 * UNIT * (reward + size + fabsf(c));
  const float reach = 2 * (lane.reward + size) + fabsf(c);
  const float step = (TERMS + 2 + root) * size + (2 + root) * cost +
                     (2 + LOG_ACTIONS + lane.log_prior) * fminf(cost, lane.temperature) +
                     conjugate_noise(lane, padded, reach) + 3 * reward;
  return UNIT * (step * lane.horizon + 4 * fabsf(c) + 2 * size);
}

// Residual of a backup over all states: extremes, the most that the regulariser takes off, NaN made infinite.
struct Residual {
  float low, high, cost;
};

struct Certificate {
  float middle, shift, largest;  // what is taken off the residual, added to c, and left of it
  float width, noise;            // certified half-width, without and with rounding apart
};

DEVICE Certificate certify(const Numbers& lane, Residual r, float size, float c) {
  Certificate found;
  if (ENDS) {
    found.middle = found.shift = 0;
    found.largest = fmaxf(-fminf(r.low, 0.f), fmaxf(r.high, 0.f));
  } else {
    found.middle = 0.5f * (r.low + r.high);
    found.shift = found.middle / lane.complement;
    found.largest = 0.5f * (r.high - r.low);
  }
  // The half-width itself is a difference, a quotient and two products; the shift is a quotient and a sum.
  found.width = (1 + 4 * EPS) * lane.ratio * found.largest;
  found.noise = rounding(lane, size, c, r.cost) + 4 * UNIT * fabsf(found.shift);
  const float reach = size + fabsf(c) + fabsf(found.shift) + found.width;
  found.noise += 4 * lane.discount * lane.deviation * reach / lane.complement;
  return found;
}

// What the loop remembers of earlier backups.
struct Books {
  float noise, half_width;  // of the last backup; the smallest certified one
  int steps, stalled;       // backups; how many since that smallest one
};

// Status after a backup, before which there were `books.steps`. Enters it in the books.
DEVICE int judge(const Numbers& lane, const Certificate& found, int limit, Books& books, bool& improved) {
  const float width = found.width, noise = found.noise;
  improved = width + noise < books.half_width;
  books.half_width = improved ? width + noise : books.half_width;
  books.stalled = improved ? 0 : books.stalled + 1;
  // The bound of a start far away says nothing about the next step's.
  const bool steady = noise >= 0.5f * books.noise;
  const bool first = books.steps == 0;
  books.noise = noise;
  books.steps++;
  int status = books.steps >= limit ? MAX_STEPS : RUNNING;
  if ((steady && width <= 0.25f * noise) || books.stalled >= PATIENCE) status = STAGNATED;
  if (lane.tol < 0 ? steady && width <= noise : width <= lane.tol - noise) status = CONVERGED;
  if (!(width + noise < INF)) status = first ? NONFINITE_INPUT : NONFINITE;
  return status;
}
