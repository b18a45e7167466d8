// CUDA's vocabulary for g++: the blocks of a launch one after the other, the threads of a block as fibers.
//
// A fiber runs until it meets a barrier or a shuffle and then makes room for the next thread, so that all threads have
// come to one barrier before any passes it. Every thread must meet the same ones, as CUDA demands of the kernel.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#undef __noinline__
#define __noinline__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static

struct Index {
  int x;
};
struct float4 {
  float x, y, z, w;
};
static Index threadIdx, blockIdx;
static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<std::vector<char>> stacks;
static std::vector<char> finished;
static std::vector<float> exchanged[2];
static std::vector<int> turn;

static void make_room() {
  const int self = threadIdx.x;
  swapcontext(&fibers[self], &scheduler);
  threadIdx.x = self;
}
static void __syncthreads() { make_room(); }
static void __syncwarp() { make_room(); }
static float exchange(float value, int other) {
  const int self = threadIdx.x, now = turn[self] ^= 1;
  exchanged[now][self] = value;
  make_room();
  return exchanged[now][other];
}
static float __shfl_xor_sync(unsigned, float value, int offset) { return exchange(value, threadIdx.x ^ offset); }
static float __shfl_sync(unsigned, float value, int lane) {
  return exchange(value, threadIdx.x / 32 * 32 + lane);
}
static float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdividef(float a, float b) { return a / b; }
#define __log2f log2f
template <class T> static T __ldg(const T* at) { return *at; }

#include KERNEL

static void** arguments;

static void thread() {
  void** p = arguments;
  solve((int*)p[0], (float*)p[1], (float*)p[2], (float*)p[3], (float*)p[4], (float*)p[5], (Numbers*)p[6],
        (Integers*)p[7], (float*)p[8], (float*)p[9], (float*)p[10], (float*)p[11], (float*)p[12], (int*)p[13],
        (int*)p[14], (int*)p[15]);
  finished[threadIdx.x] = 1;
}

extern "C" void launch(void** buffers, int blocks) {
  arguments = buffers;
  fibers.resize(THREADS);
  stacks.resize(THREADS);
  for (auto& x : exchanged) x.assign(THREADS, 0);
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
    finished.assign(THREADS, 0);
    turn.assign(THREADS, 0);
    for (int t = 0; t < THREADS; t++) {
      stacks[t].resize(1 << 17);
      getcontext(&fibers[t]);
      fibers[t].uc_stack.ss_sp = stacks[t].data();
      fibers[t].uc_stack.ss_size = stacks[t].size();
      fibers[t].uc_link = &scheduler;
      makecontext(&fibers[t], thread, 0);
    }
    // Forwards and backwards in turn: what reads before a barrier what another thread writes would not go unnoticed.
    bool any = true;
    for (int round = 0; any; round++) {
      any = false;
      for (int i = 0; i < THREADS; i++) {
        const int t = round % 2 ? THREADS - 1 - i : i;
        if (finished[t]) continue;
        threadIdx.x = t;
        swapcontext(&scheduler, &fibers[t]);
        any = true;
      }
    }
  }
}
