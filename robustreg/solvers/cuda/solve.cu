// A certified solve of one lane per block: the loop of `robustreg.solve` with Newton's method, from the first backup to
// the last, without leaving the chip.
//
// The first proposal is some plain sweeps: far from the solution a policy is not worth evaluating. All others are Newton
// steps. Every lane stops by itself, and what it computes depends on its own numbers alone.

// T V - c at this thread's place e for V = v + c, the policy, and the largest action value less c.
template <bool EXACT>
DEVICE float backup(const Chain& chain, int e, const float* v, float c, Actions& policy, float& best) {
  const Tables& tables = chain.tables;
  const Numbers& lane = chain.lane;
  const int s = state(e);
  Actions q, log_prior;
  chain.rows.expect(InMemory{tables}, e, v, q);
#pragma unroll
  for (int a = 0; a < ACTIONS; a++) {
    const float leave = ENDS ? __ldg(tables.leave + a * STATES + s) : lane.complement;
    q[a] = fmaf(lane.discount, q[a], __ldg(tables.reward + a * STATES + s) - c * leave);
    log_prior[a] = __ldg(tables.prior + (STATE_PRIOR ? a * STATES + s : a));
  }
  const float beta = STATE_BETA ? __ldg(tables.beta + s) : lane.beta;
  return maximise<EXACT>(q, log_prior, beta, lane.h, policy, best);
}

// One backup of all states, the policy's chain, and the residual d = T V - V with its extremes.
DEVICE Residual look(Chain& chain, const Vector& h, float c, Vector& d) {
  const float* at = share<0>(chain.block, h);
  float found[3] = {-INF, -INF, -INF};
#pragma unroll
  for (int e = 0; e < OWN; e++) {
    Actions policy;
    float best;
    const float th = backup<true>(chain, e, at, c, policy, best);
    chain.set(e, policy);
    d[e] = th - h[e];
    // A maximum passes over NaN.
    const bool finite = fabsf(d[e]) < INF;
    found[0] = fmaxf(found[0], finite ? -d[e] : INF);
    found[1] = fmaxf(found[1], finite ? d[e] : INF);
    found[2] = fmaxf(found[2], finite ? best - th : INF);
  }
  reduce<3, false>(chain.block, found);
  return {-found[0], found[1], found[2]};
}

#if ALPHA

// V <- T V for a fixed c.
struct Sweep {
  Chain& chain;
  float c;

  DEVICE void prepare() {}

  template <int PLACE> DEVICE void once(Vector& h) {
    const float* at = share<PLACE>(chain.block, h);
#pragma unroll
    for (int e = 0; e < OWN; e++) {
      Actions policy;
      float best;
      h[e] = backup<false>(chain, e, at, c, policy, best);
    }
  }
};

#else

// V <- T V for a fixed c: log2 sum 2^(scale P V + offset) over the actions, where `offset` holds all that V does not
// change. Half of the instructions of a backup; the certificate does not rest on it.
struct Sweep {
  Chain& chain;
  float c;
  InRegisters source{chain.tables};
  Actions offset[OWN];
  float beta[OWN], scale[OWN];

  DEVICE void prepare() {
    const Tables& tables = chain.tables;
#pragma unroll
    for (int e = 0; e < OWN; e++) {
      const int s = state(e);
      beta[e] = LOG2_E * (STATE_BETA ? __ldg(tables.beta + s) : chain.lane.beta);
      scale[e] = beta[e] * chain.lane.discount;
#pragma unroll
      for (int a = 0; a < ACTIONS; a++) {
        const float leave = ENDS ? __ldg(tables.leave + a * STATES + s) : chain.lane.complement;
        const float log_prior = __ldg(tables.prior + (STATE_PRIOR ? a * STATES + s : a));
        const float reward = __ldg(tables.reward + a * STATES + s) - c * leave;
        offset[e][a] = log_prior == -INF ? -INF : fmaf(beta[e], reward, LOG2_E * log_prior);
      }
    }
  }

  template <int PLACE> DEVICE void once(Vector& h) {
    const float* at = share<PLACE>(chain.block, h);
#pragma unroll
    for (int e = 0; e < OWN; e++) {
      Actions x;
      chain.rows.expect(source, e, at, x);
      float top = -INF, total = 0;
#pragma unroll
      for (int a = 0; a < ACTIONS; a++) {
        x[a] = fmaf(scale[e], x[a], offset[e][a]);
        // Rows of masked actions may hold anything.
        if (!InRegisters::CLEAN) x[a] = offset[e][a] == -INF ? -INF : x[a];
        top = fmaxf(top, x[a]);
      }
#pragma unroll
      for (int a = 0; a < ACTIONS; a++) total += power_of_two(x[a] - top);
      h[e] = __fdividef(top + __log2f(total), beta[e]);
    }
  }
};

#endif

// An even number of sweeps: one place for the vector of every other one, so that a barrier a sweep is enough.
DEVICE void sweep(Chain& chain, Vector& h, float c, int count) {
  Sweep sweep{chain, c};
  sweep.prepare();
#pragma unroll 1
  for (int k = 0; k < count; k += 2) {
    sweep.once<0>(h);
    sweep.once<1>(h);
  }
}

// Newton's forcing: a lane whose certificate a step did not halve solves ten times more accurately from then on.
struct Forcing {
  float share, last;
};

// V + (I - K)^{-1} d, loosely at first. Returns the number of products.
DEVICE int newton(Chain& chain, Vector& h, Vector& d, const Certificate& found, float goal, Forcing& forcing) {
  if (found.width > 0.5f * forcing.last) forcing.share = fmaxf(0.1f * forcing.share, 10 * EPS);
  forcing.last = found.width;
  const float reduction = found.width <= goal ? 1.f : fmaxf(forcing.share, 0.25f * goal / found.width);
  const int products = bicgstab(chain.block, d, found.largest, reduction, chain);
#pragma unroll
  for (int e = 0; e < OWN; e++) h[e] += d[e];
  return products;
}

// Where the answers go: h and c of the value, certified half-width, rounding in the last step's, backups, status, products
// with K.
struct Answer {
  float *h, *c, *half_width, *noise;
  int *steps, *status, *products;
};

DEVICE void write(const Answer& answer, const Vector& h, float c) {
#pragma unroll
  for (int e = 0; e < OWN; e++) {
    if (place(e) < STATES && threadIdx.x % COPIES == 0) answer.h[(size_t)blockIdx.x * STATES + place(e)] = h[e];
  }
  if (threadIdx.x == 0) answer.c[blockIdx.x] = c;
}

// Whether the rounding of sweeps, some units of 1/beta each, is small beside the rewards. Where it is not, the policy is
// next to the prior from the start.
DEVICE bool worth_sweeping(const Numbers& lane) { return lane.charged >= 1e-3f * lane.temperature; }

DEVICE void run(Chain& chain, const Integers& at, const Answer& answer, Vector h) {
  const Numbers& lane = chain.lane;
  Books books = {INF, INF, 0, 0};
  Forcing forcing = {FORCING, INF};
  Vector d;
  float c = 0, size = recentre(chain.block, h, c);
  int status = at.valid ? RUNNING : NONFINITE_INPUT, products = 0;
  if (!at.valid) write(answer, h, c);
  while (status == RUNNING) {
    const Residual residual = look(chain, h, c, d);
    const Certificate found = certify(lane, residual, size, c);
    bool improved;
    const bool first = books.steps == 0;
    status = judge(lane, found, at.limit, books, improved);
    // From here V = h + c, and h + d + c is the middle of the certified interval.
    c += found.shift;
#pragma unroll
    for (int e = 0; e < OWN; e++) d[e] -= found.middle;
    // The value that a half-width belongs to is written with it: a later one may be worse.
    if (improved || (first && status != RUNNING)) {
      Vector middle;
#pragma unroll
      for (int e = 0; e < OWN; e++) middle[e] = h[e] + d[e];
      write(answer, middle, c);
    }
    if (status != RUNNING) break;
    if (first && at.sweeps > 0 && worth_sweeping(lane)) {
#pragma unroll
      for (int e = 0; e < OWN; e++) h[e] += d[e];
      sweep(chain, h, c, at.sweeps);
      books.steps += at.sweeps;
    } else {
      products += newton(chain, h, d, found, lane.tol < 0 ? found.noise : lane.tol - found.noise, forcing);
    }
    size = recentre(chain.block, h, c);
  }
  if (threadIdx.x == 0) {
    answer.half_width[blockIdx.x] = books.half_width;
    answer.noise[blockIdx.x] = books.noise;
    answer.steps[blockIdx.x] = books.steps;
    answer.status[blockIdx.x] = status;
    answer.products[blockIdx.x] = products;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    solve(const int* __restrict__ near, const float* __restrict__ probabilities, const float* __restrict__ reward,
          const float* __restrict__ leave, const float* __restrict__ prior, const float* __restrict__ beta,
          const Numbers* __restrict__ numbers, const Integers* __restrict__ integers, const float* __restrict__ start,
          float* __restrict__ h, float* __restrict__ c, float* __restrict__ half_width, float* __restrict__ noise,
          int* __restrict__ steps, int* __restrict__ status, int* __restrict__ products) {
  __shared__ Shared memory;
  const Integers& at = integers[blockIdx.x];
  const Numbers& lane = numbers[blockIdx.x];
  const Tables tables = {
      near + (size_t)at.near * ENTRIES * STATES,
      probabilities + (size_t)at.probabilities * ACTIONS * SLOTS * STATES,
      reward + (size_t)at.reward * ACTIONS * STATES,
      leave + (size_t)at.leave * ACTIONS * STATES,
      prior + (size_t)at.prior * ACTIONS * (STATE_PRIOR ? STATES : 1),
      beta + (size_t)at.beta * STATES,
  };
  Rows rows;
  rows.load(tables);
  Vector value;
#pragma unroll
  for (int e = 0; e < OWN; e++) value[e] = start[(size_t)blockIdx.x * STATES + state(e)];
  Block block = {memory, 0};
  Chain chain = {tables, rows, lane, block};
  run(chain, at, {h, c, half_width, noise, steps, status, products}, value);
}
