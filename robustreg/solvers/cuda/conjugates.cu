// The regularised maximum of one state's action values and its policy: `robustreg.regularisers.conjugates` for one thread.

#define INF __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)
#define UNIT 5.9604645e-8f        // unit of rounding, half of eps
#define EPS (2 * UNIT)
#define RESOLUTION 7.064e-5f      // EPS^0.6: largest logarithm of a sum of probabilities that counts as resolved
#define NEAR_PRIOR 0.125f         // gaps up to which a logarithm is that of a number known to be close to 1
#define TINY_GAP 8.6317e-5f       // EPS^0.5 / 4: gaps (1 + |h|) below this leave nothing but two moments
#define SMALL_ORDER 1.4210855e-14f  // EPS^2: below this h counts as 0
#define LOG2_E 1.4426950f

// 2^x to some seven digits, 0 where it is no normal number.
DEVICE float power_of_two(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

struct Actions {
  float x[ACTIONS];
  DEVICE float& operator[](int a) { return x[a]; }
  DEVICE float operator[](int a) const { return x[a]; }
};

// Largest action value that the prior allows, and beta (largest - q), 0 on masked actions. NaN where q is NaN.
DEVICE float best_and_gaps(const Actions& q, const Actions& log_prior, float beta, Actions& gap) {
  float best = -INF;
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) best = fmaxf(best, log_prior[a] == -INF ? -INF : q[a]);
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) gap[a] = log_prior[a] == -INF ? 0.f : __fmul_rn(beta, best - q[a]);
  return best;
}

#if ALPHA

// (exp(h x) - 1)/h, x at h = 0.
DEVICE float deformed_exp(float x, float h) { return fabsf(h) < SMALL_ORDER ? x : expm1f(h * x) / h; }

// log(1 + h x)/h, x at h = 0. Lets NaN through, which fmaxf would not.
DEVICE float deformed_log(float x, float h) {
  const float y = h * x;
  return fabsf(h) < SMALL_ORDER ? x : log1pf(y < -1 ? -1.f : y) / h;
}

struct Level {
  Actions ratio, rho, policy;  // log(p/p0), 1 - h gap exp(-h level), p
  float excess, slope;         // log of the sum of p by that of the prior; mean of 1/rho
};

// The policy at a log-ratio `level` of the best action, which need not sum to one.
DEVICE Level at_level(float level, const Actions& gap, const Actions& log_prior, float h, float mass) {
  Level found;
  float total = 0, curvature = 0;
  const float factor = expf(-h * level);
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) {
    const float scaled = gap[a] == 0 ? 0.f : gap[a] * factor, y = -h * scaled;
    // Where the factor overflows (h < 0, small priors) the ratio has a limit that does not depend on the level.
    const float ratio = y == INF ? logf(-h * gap[a]) / h : level + deformed_log(-scaled, h);
    const float rho = fmaxf(1 + y, 0.f), p = expf(log_prior[a] + ratio);
    found.ratio[a] = ratio;
    found.rho[a] = rho;
    found.policy[a] = p;
    total += p;
    curvature += rho > 0 && p > 0 ? p / rho : 0.f;
  }
  found.excess = logf(total / mass);
  found.slope = curvature / total;
  return found;
}

// The level at which p sums to the mass of the prior: Newton's method, kept inside [low, high] by bisection.
template <bool EXACT>
DEVICE float root(const Actions& gap, const Actions& log_prior, float h, float mass, float& low, float& high) {
  float best = 0;
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) best += gap[a] == 0 ? expf(log_prior[a]) : 0.f;
  low = 0;
  high = fmaxf(logf(mass / best), 0.f);
  const float near = EXACT ? 2 * EPS : 1e-3f, slack = EXACT ? 64 * EPS : 1e-3f;
  float level = h > 1 ? low : high, last = INF;
#pragma unroll 1
  for (int k = 0; k < 80; k++) {
    const Level found = at_level(level, gap, log_prior, h, mass);
    const float excess = found.excess, size = fabsf(excess);
    low = excess < 0 ? level : low;
    high = excess > 0 ? level : high;
    const bool slow = size > 0.5f * last, exhausted = high - low <= 2 * EPS * high;
    if (exhausted || size <= near || (slow && size <= slack)) return exhausted && excess > RESOLUTION ? low : level;
    const float newton = level + deformed_log(deformed_exp(-excess, h) / found.slope, h);
    const bool outside = !(newton > low && newton < high), at_prior = newton <= 0 && low == 0 && !slow;
    level = outside || slow ? (at_prior ? 0.f : 0.5f * (low + high)) : newton;
    last = slow ? INF : size;
  }
  return level;
}

// p0 - p from log(p/p0), relative to rounding of the difference.
DEVICE float missing(float p, float prior, float ratio) {
  return ratio > 0 ? p * expm1f(-ratio) : -fmaxf(prior, p) * expm1f(ratio);
}

// What the regulariser takes off the best action value, times beta, at a level: the dual function, see
// `conjugates.alpha_maximiser`.
DEVICE float loss(const Level& at, float level, const Actions& gap, const Actions& log_prior, float h, float mass) {
  const float alpha = h + 1;
  const bool upper = alpha >= 0.5f;
  const float order = upper ? h : alpha, scale = upper ? alpha : h;
  float paid = 0, divergence = 0, lacking = 0, mean = 0, square = 0, largest = 0;
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) {
    const float prior = expf(log_prior[a]), p = at.policy[a], heavy = upper ? p : prior;
    paid += p == 0 ? 0.f : p * gap[a];
    divergence += heavy == 0 ? 0.f : heavy * deformed_exp(at.ratio[a], order);
    lacking += missing(p, prior, at.ratio[a]);
    mean += prior * gap[a];
    largest = fmaxf(largest, gap[a]);
  }
  mean /= mass;
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) square += expf(log_prior[a]) * (gap[a] - mean) * (gap[a] - mean);
  if (largest * (1 + fabsf(h)) < TINY_GAP) return mean - 0.5f * square / mass;
  return (paid + (divergence + lacking) / scale + lacking * deformed_exp(level, h)) / mass;
}

// A policy that sums to one next to the one at the root: one Newton step in policy space, or, where the two sides of the
// bracket are far apart (alpha > 2, an action on the edge of the support), a mixture of them.
DEVICE void normalise(const Level& at, float low, float high, const Actions& gap, const Actions& log_prior, float h,
                      float mass, Actions& policy) {
  float total = 0, curvature = 0, sum = 0;
  Actions weight;
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) {
    total += at.policy[a];
    weight[a] = at.rho[a] > 0 && at.policy[a] > 0 ? at.policy[a] / at.rho[a] : 0.f;
    curvature += weight[a];
  }
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) policy[a] = fmaxf(at.policy[a] + (mass - total) / curvature * weight[a], 0.f);
  if (!(fabsf(at.excess) <= RESOLUTION)) {
    const Level below = at_level(low, gap, log_prior, h, mass), above = at_level(high, gap, log_prior, h, mass);
    const float less = mass * expf(below.excess), jump = mass * expf(above.excess) - less;
    const float share = fminf(fmaxf((mass - less) / (jump > 0 ? jump : 1.f), 0.f), 1.f);
#pragma unroll
    for (int a = 0; a < ACTIONS; a++) policy[a] = below.policy[a] + share * (above.policy[a] - below.policy[a]);
  }
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) sum += policy[a];
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) policy[a] /= sum;
}

// max_p <p, q> - D_alpha[p0 : p]/beta, its policy, and the largest action value. Where EXACT is false the value is good to
// some five digits and there is no policy: for sweeps, on which the certificate does not rest. Not inlined: a thread
// calls it for each of its states in turn.
template <bool EXACT>
__device__ __noinline__ float maximise(const Actions& q, const Actions& log_prior, float beta, float h, Actions& policy,
                                       float& best) {
  Actions gap;
  best = best_and_gaps(q, log_prior, beta, gap);
  float mass = 0, low, high;
  bool finite = true;
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) {
    mass += expf(log_prior[a]);
    finite = finite && fabsf(gap[a]) < INF;
  }
  if (!finite) {
#pragma unroll
    for (int a = 0; a < ACTIONS; a++) policy[a] = NOT_A_NUMBER;
    return NOT_A_NUMBER;
  }
  const float level = root<EXACT>(gap, log_prior, h, mass, low, high);
  const Level at = at_level(level, gap, log_prior, h, mass);
  if (EXACT) normalise(at, low, high, gap, log_prior, h, mass, policy);
  return best - loss(at, level, gap, log_prior, h, mass) / beta;
}

#else

// log sum p0 exp(-gap) to relative precision for small gaps, from a mean of exp(-gap) - 1.
DEVICE float level_near_prior(const Actions& gap, const Actions& log_prior) {
  float mean = 0;
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) {
    const float x = gap[a];
    const float series = ((((x * (1.f / 720) - 1.f / 120) * x + 1.f / 24) * x - 1.f / 6) * x + 0.5f) * x - 1;
    mean += expf(log_prior[a]) * x * series;
  }
  return log1pf(mean);
}

// log sum p0 exp(beta q) / beta, its policy, and the largest action value.
template <bool>
DEVICE float maximise(const Actions& q, const Actions& log_prior, float beta, float, Actions& policy, float& best) {
  Actions gap;
  best = best_and_gaps(q, log_prior, beta, gap);
  // Relative to the largest weight, not to that of the best action: its prior alone may underflow.
  float top = -INF, largest = 0, total = 0;
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) {
    top = fmaxf(top, log_prior[a] - gap[a]);
    largest = fmaxf(largest, gap[a]);
  }
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) {
    policy[a] = expf(log_prior[a] - gap[a] - top);
    total += policy[a];
  }
  const float share = 1 / total;
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) policy[a] *= share;
  // (Where a gap is NaN, so is the total.)
  const bool near = largest < NEAR_PRIOR && total < INF;
  return best + (near ? level_near_prior(gap, log_prior) : top + logf(total)) / beta;
}

#endif
