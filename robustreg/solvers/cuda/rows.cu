// Rows of P as a block holds them, and the chain K = g P_pi of a policy on them (`problems/successors.py`,
// `problems/dense.py`).

// Of one lane, in device memory.
struct Tables {
  const int* near;             // [ENTRIES, S]: successors of a state, entry by entry; nothing if rows are dense
  const float* probabilities;  // [A, SLOTS, S]; [S, A, S] if rows are dense
  const float* reward;         // [A, S]
  const float* leave;          // [A, S] if episodes end
  const float* prior;          // [A, S], or [A] if all states share it
  const float* beta;           // [S] if states have their own
};

#if DENSE

// Each of the COPIES threads of a state keeps the row of one of its actions: the first HELD entries in registers, the
// others in shared memory, entry by entry.
#define HELD (STATES < 64 ? STATES : 64)
#ifdef __CUDACC__
extern __shared__ float others[];
#else
static float others[(STATES - HELD) * THREADS + 1];
#endif

struct Rows {
  float row[HELD];

  DEVICE void load(const Tables& tables) {
    const int a = threadIdx.x % COPIES, s = state(0);
    const float* at = tables.probabilities + (s * ACTIONS + (a < ACTIONS ? a : 0)) * STATES;
#if STATES % 4
#pragma unroll
    for (int k = 0; k < HELD; k++) row[k] = __ldg(at + k);
#else
#pragma unroll
    for (int k = 0; k < HELD; k += 4) {
      const float4 four = __ldg((const float4*)(at + k));
      row[k] = four.x, row[k + 1] = four.y, row[k + 2] = four.z, row[k + 3] = four.w;
    }
#endif
    // (A thread reads what it wrote itself: no barrier.)
#pragma unroll 8
    for (int k = HELD; k < STATES; k++) others[(k - HELD) * THREADS + threadIdx.x] = __ldg(at + k);
  }

  // Expectation of v for the action of this thread.
  DEVICE float own(const float* shared) const {
    const float* v = (const float*)__builtin_assume_aligned(shared, 16);
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < HELD; k++) sum[k % 4] = fmaf(row[k], v[k], sum[k % 4]);
#pragma unroll 16
    for (int k = HELD; k < STATES; k++)
      sum[k % 4] = fmaf(others[(k - HELD) * THREADS + threadIdx.x], v[k], sum[k % 4]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // Expectations of v, one per action.
  template <class Source> DEVICE void expect(const Source&, int, const float* v, Actions& ahead) const {
    const float mine = own(v);
#pragma unroll
    for (int a = 0; a < ACTIONS; a++) ahead[a] = __shfl_sync(ALL, mine, threadIdx.x % 32 / COPIES * COPIES + a);
  }
};

// Its rows are in registers already.
struct InMemory {
  static constexpr bool CLEAN = false;
  const Tables& tables;
};
using InRegisters = InMemory;

struct Chain {
  const Tables& tables;
  const Rows& rows;
  const Numbers& lane;
  Block& block;
  float share_of_action;  // g times the probability of this thread's action

  DEVICE void set(int, const Actions& policy) {
    share_of_action = 0;
#pragma unroll
    for (int a = 0; a < ACTIONS; a++) share_of_action = threadIdx.x % COPIES == a ? policy[a] : share_of_action;
    share_of_action *= lane.discount;
  }

  DEVICE void operator()(const Vector& x, Vector& y) const {
    const float* at = share<0>(block, x);
    // Rows of actions that are not taken may hold anything.
    float sum = share_of_action == 0 ? 0.f : share_of_action * rows.own(at);
#pragma unroll
    for (int o = COPIES / 2; o; o >>= 1) sum += __shfl_xor_sync(ALL, sum, o);
    y[0] = sum;
  }
};

#else

// Long lists are not written out in full: some 16 successors at once keep memory busy, and more only fill registers.
constexpr int SLOTS_AT_ONCE = KEPT ? SLOTS : ACTIONS < 16 ? 16 / ACTIONS : 1;

// Where the successors of this thread's states are; long lists are read again at every use.
struct Rows {
#if KEPT
  unsigned short near[OWN][ENTRIES];  // in bytes from the first state's place
#endif

  DEVICE void load(const Tables& tables) {
#if KEPT
#pragma unroll
    for (int e = 0; e < OWN; e++)
#pragma unroll
      for (int i = 0; i < ENTRIES; i++) near[e][i] = 4 * tables.near[i * STATES + state(e)];
#endif
  }

  // What v is at successor k of action a, of 0 if actions share their successors.
  DEVICE float next(const Tables& tables, int e, const float* v, int a, int k) const {
#if KEPT
    return *(const float*)((const char*)v + near[e][a * SLOTS + k]);
#else
    return v[__ldg(tables.near + (k * STATES + state(e)) + a * SLOTS * STATES)];
#endif
  }

  // Expectations of v at this thread's place e, one per action, with probabilities from a `source`.
  template <class Source> DEVICE void expect(const Source& source, int e, const float* v, Actions& ahead) const {
#pragma unroll
    for (int a = 0; a < ACTIONS; a++) ahead[a] = 0;
#pragma unroll SLOTS_AT_ONCE
    for (int k = 0; k < SLOTS; k++) {
      const float common = JOINT ? next(source.tables, e, v, 0, k) : 0;
#pragma unroll
      for (int a = 0; a < ACTIONS; a++) {
        ahead[a] = fmaf(source(e, a, k), JOINT ? common : next(source.tables, e, v, a, k), ahead[a]);
      }
    }
  }
};

// Probabilities of a successor, by place, action and slot: from device memory,
struct InMemory {
  static constexpr bool CLEAN = false;  // whether rows of masked actions are known to be finite
  const Tables& tables;

  DEVICE float operator()(int e, int a, int k) const {
#if KEPT
    return __ldg(tables.probabilities + (a * SLOTS + k) * STATES + state(e));
#else
    // (One address for all actions.)
    return __ldg(tables.probabilities + (k * STATES + state(e)) + a * SLOTS * STATES);
#endif
  }
};

// or, for sweep after sweep, from registers, if there are few.
#if KEPT && OWN * ACTIONS * SLOTS <= 80
struct InRegisters {
  static constexpr bool CLEAN = true;
  const Tables& tables;
  float at[OWN][ACTIONS][SLOTS];

  DEVICE InRegisters(const Tables& tables) : tables(tables) {
    const InMemory memory{tables};
#pragma unroll
    for (int e = 0; e < OWN; e++)
#pragma unroll
      for (int a = 0; a < ACTIONS; a++) {
        const bool masked = __ldg(tables.prior + (STATE_PRIOR ? a * STATES + state(e) : a)) == -INF;
#pragma unroll
        for (int k = 0; k < SLOTS; k++) at[e][a][k] = masked ? 0.f : memory(e, a, k);
      }
  }

  DEVICE float operator()(int e, int a, int k) const { return at[e][a][k]; }
};
#else
using InRegisters = InMemory;
#endif

// The chain's weights where there are few, else the policy itself.
struct Chain {
  const Tables& tables;
  const Rows& rows;
  const Numbers& lane;
  Block& block;
#if KEPT
  float weight[OWN][ENTRIES];
#else
  Actions policy[OWN];
#endif

  // Set the policy of this thread's place e.
  DEVICE void set(int e, const Actions& choice) {
#if KEPT
#pragma unroll
    for (int i = 0; i < ENTRIES; i++) {
      weight[e][i] = 0;
#pragma unroll
      for (int a = 0; a < ACTIONS; a++) {
        if (!JOINT && i / SLOTS != a) continue;
        const float p = InMemory{tables}(e, a, JOINT ? i : i % SLOTS);
        // Rows of actions that are not taken may hold anything.
        weight[e][i] += choice[a] == 0 ? 0.f : choice[a] * p;
      }
      weight[e][i] *= lane.discount;
    }
#else
    policy[e] = choice;
#endif
  }

  DEVICE void operator()(const Vector& x, Vector& y) const {
    const float* at = share<0>(block, x);
#pragma unroll
    for (int e = 0; e < OWN; e++) {
      float sum = 0;
#if KEPT
#pragma unroll
      for (int i = 0; i < ENTRIES; i++) sum = fmaf(weight[e][i], rows.next(tables, e, at, 0, i), sum);
      y[e] = sum;
#else
      Actions ahead;
      rows.expect(InMemory{tables}, e, at, ahead);
#pragma unroll
      for (int a = 0; a < ACTIONS; a++) sum += policy[e][a] == 0 ? 0.f : policy[e][a] * ahead[a];
      y[e] = lane.discount * sum;
#endif
    }
  }
};

#endif
