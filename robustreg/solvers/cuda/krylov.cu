// Vectors over the states of a lane, spread over the threads of its block, and BiCGSTAB on them (`solvers/krylov.py`).
//
// COPIES threads next to each other hold the same states: one if rows are lists, one per action if they are dense. The
// places beyond the last state are copies of state 0, which lead where it leads and to which nothing leads: that state
// counts for more in a sum, which is as good an inner product, and in no maximum.

#define PLACES (THREADS / COPIES)  // states that a block holds at a time
#define OWN ((STATES + PLACES - 1) / PLACES)
#define WARPS (THREADS / 32)
#define ALL 0xffffffffu

struct Vector {
  float x[OWN];
  DEVICE float& operator[](int e) { return x[e]; }
  DEVICE float operator[](int e) const { return x[e]; }
};

// A thread's place e, and the state there.
DEVICE int place(int e) { return threadIdx.x / COPIES + e * PLACES; }
DEVICE int state(int e) { return place(e) < STATES ? place(e) : 0; }

// Memory of a block, two of each: what was read since the last barrier is not to be written to.
struct alignas(16) Shared {
  float vector[2][OWN * PLACES];  // (four states at least)
  float partial[2][WARPS][8];
};

struct Block {
  Shared& memory;
  int partial;  // which of the two is next
};

DEVICE void barrier() {
  if (WARPS > 1) __syncthreads();
  else __syncwarp();
}

// Make a vector readable for all threads, in one of the two places, known to the compiler. Whoever does so again before a
// reduction, which has a barrier of its own, takes the other.
template <int PLACE> DEVICE const float* share(Block& block, const Vector& x) {
  float* at = block.memory.vector[PLACE];
#pragma unroll
  for (int e = 0; e < OWN; e++)
    if (threadIdx.x % COPIES == 0) at[place(e)] = x[e];
  barrier();
  return at;
}

template <bool SUM> DEVICE float joined(float a, float b) { return SUM ? a + b : fmaxf(a, b); }

DEVICE constexpr int log2_of(int n) { return n < 2 ? 0 : 1 + log2_of(n / 2); }

// Sums or maxima over the states of N numbers, the same in every thread, always in the same order.
//
// A warp halves the numbers that a thread holds at every exchange, instead of exchanging all of them five times; what
// its threads then hold is read back from shared memory. Copies of a state hold the same and do not take part.
template <int N, bool SUM> DEVICE void reduce(Block& block, float (&x)[N]) {
  constexpr int padded = N < 2 ? 1 : N < 3 ? 2 : N < 5 ? 4 : 8;
  constexpr int distinct = log2_of(32 / COPIES), numbers = log2_of(padded);
  constexpr int halvings = numbers < distinct ? numbers : distinct, left = padded >> halvings;
  float y[padded];
#pragma unroll
  for (int i = 0; i < padded; i++) y[i] = i < N ? x[i] : 0.f;
#pragma unroll
  for (int k = 0; k < distinct; k++) {
    const int half = padded >> (k + 1), offset = 16 >> k;
    const bool upper = threadIdx.x & offset;
    if (k < halvings) {
#pragma unroll
      for (int i = 0; i < half; i++) {
        const float kept = upper ? y[i + half] : y[i], sent = upper ? y[i] : y[i + half];
        y[i] = joined<SUM>(kept, __shfl_xor_sync(ALL, sent, offset));
      }
    } else {
#pragma unroll
      for (int i = 0; i < left; i++) y[i] = joined<SUM>(y[i], __shfl_xor_sync(ALL, y[i], offset));
    }
  }
  float (*at)[8] = block.memory.partial[block.partial];
  const int thread = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (thread % (32 >> halvings) == 0)
#pragma unroll
    for (int i = 0; i < left; i++) at[warp][thread / (32 >> halvings) * left + i] = y[i];
  barrier();
  block.partial ^= 1;
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = at[0][i];
#pragma unroll
  for (int w = 1; w < WARPS; w++)
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = joined<SUM>(x[i], at[w][i]);
}

// h less the middle of its range, which moves to c; returns max |h| then: rounding grows with it.
DEVICE float recentre(Block& block, Vector& h, float& c) {
  float ends[2] = {-INF, -INF};
#pragma unroll
  for (int e = 0; e < OWN; e++) {
    ends[0] = fmaxf(ends[0], -h[e]);
    ends[1] = fmaxf(ends[1], h[e]);
  }
  reduce<2, false>(block, ends);
  const float middle = 0.5f * (ends[1] - ends[0]);
#pragma unroll
  for (int e = 0; e < OWN; e++) h[e] -= middle;
  c += middle;
  return 0.5f * (ends[1] + ends[0]);
}

// Mean of a vector, from its sum. Vectors are kept free of it, because constants are what I - K nearly loses; if episodes
// end they are not, and nothing is taken off.
DEVICE float mean(float total) { return ENDS ? 0.f : total * (1.f / (OWN * PLACES)); }

// (I - K)^{-1} b for b of size `scale`, to a residual of `reduction` times that of x = 0, in the place of b.
// `apply(x, y)` puts K x in y. Returns the number of products.
template <class Apply>
DEVICE int bicgstab(Block& block, Vector& b, float scale, float reduction, const Apply& apply) {
  scale = scale > 0 ? scale : 1;
  Vector x, best, r, p, shadow, u;
  float total[1] = {0};
#pragma unroll
  for (int e = 0; e < OWN; e++) total[0] += b[e];
  reduce<1, true>(block, total);
#pragma unroll
  for (int e = 0; e < OWN; e++) x[e] = best[e] = (b[e] - mean(total[0])) / scale;
  apply(x, shadow);
  float sums[3] = {0, 0, 0};
#pragma unroll
  for (int e = 0; e < OWN; e++) {
    sums[0] += shadow[e];
    sums[1] += shadow[e] * shadow[e];
    sums[2] += x[e] * x[e];
  }
  reduce<3, true>(block, sums);
  float rho = sums[1] - mean(sums[0]) * sums[0], size = rho, least = rho;
  const float target = reduction * reduction * sums[2];
#pragma unroll
  for (int e = 0; e < OWN; e++) {
    shadow[e] -= mean(sums[0]);
    r[e] = p[e] = shadow[e];
  }
  int steps = 0;
  bool done = size <= target || !(fabsf(size) < INF);
#pragma unroll 1
  for (; !done && steps < INNER_STEPS; steps++) {
    apply(p, u);
    float first[2] = {0, 0};
#pragma unroll
    for (int e = 0; e < OWN; e++) {
      u[e] = p[e] - u[e];
      first[0] = fmaf(shadow[e], u[e], first[0]);
      first[1] += u[e];
    }
    reduce<2, true>(block, first);
    const float a = __fdividef(rho, first[0]);
    Vector v = u, s;
#pragma unroll
    for (int e = 0; e < OWN; e++) {
      v[e] -= mean(first[1]);
      s[e] = r[e] - a * v[e];
    }
    apply(s, u);
    // Vectors of mean 0 do not see what centring takes off a product, so that one pass finds all inner products.
    float f[6] = {0, 0, 0, 0, 0, 0};
#pragma unroll
    for (int e = 0; e < OWN; e++) {
      u[e] = s[e] - u[e];
      f[0] = fmaf(u[e], s[e], f[0]);
      f[1] = fmaf(u[e], u[e], f[1]);
      f[2] = fmaf(s[e], s[e], f[2]);
      f[3] = fmaf(shadow[e], u[e], f[3]);
      f[4] = fmaf(shadow[e], s[e], f[4]);
      f[5] += u[e];
    }
    reduce<6, true>(block, f);
    // An exact half step leaves s = 0 and a product of 0: nothing more is to be taken off.
    const float squared = f[1] - mean(f[5]) * f[5], omega = squared > 0 ? __fdividef(f[0], squared) : 0.f;
    const float next = f[4] - omega * f[3], turn = __fdividef(next, rho) * __fdividef(a, omega);
    size = fmaxf(f[2] - omega * f[0], 4 * EPS * f[2]);
    // A vanishing inner product shows as NaN or infinity here: the best iterate so far is the answer.
    const bool finite = fabsf(f[2] - omega * f[0]) < INF && fabsf(next) < INF, better = finite && size < least;
    least = better ? size : least;
#pragma unroll
    for (int e = 0; e < OWN; e++) {
      x[e] += a * p[e] + omega * s[e];
      r[e] = s[e] - omega * (u[e] - mean(f[5]));
      p[e] = r[e] + turn * (p[e] - omega * v[e]);
      best[e] = better ? x[e] : best[e];
    }
    rho = next;
    done = size <= target || !finite;
  }
#pragma unroll
  for (int e = 0; e < OWN; e++) b[e] = scale * best[e];
  return 1 + 2 * steps;
}
