// Runs cuda.cu on the CPU, to test it where there is no GPU: the threads of a block are coroutines,
// one block after the other.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static
#define __CUDA_ARCH__ 900
using std::floor;
using std::min;

struct Index { unsigned x; };
static Index threadIdx, blockIdx;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static std::vector<int> arrived, passed;  // by warp
static std::vector<double> slots;         // by thread

inline void __syncwarp() {
  const unsigned me = threadIdx.x, warp = me / 32;
  const int before = passed[warp];
  if (++arrived[warp] == 32) arrived[warp] = 0, ++passed[warp];
  while (passed[warp] == before) {
    swapcontext(&threads[me].context, &scheduler);
    threadIdx.x = me;
  }
}

template <typename T> T __shfl_xor_sync(unsigned, T value, int step) {
  slots[threadIdx.x] = double(value);
  __syncwarp();
  const T other = T(slots[threadIdx.x ^ unsigned(step)]);
  __syncwarp();
  return other;
}

struct float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename T> void atomicAdd(T* to, T what) { *to += what; }
inline void atomicAdd(float4* to, float4 what) {
  to->x += what.x, to->y += what.y, to->z += what.z, to->w += what.w;
}
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }

// Runs kernel() in every thread of every block.
template <typename F> void run_blocks(unsigned blocks, unsigned count, F kernel) {
  static F* body;
  body = &kernel;
  threads = std::vector<Thread>(count);
  slots.assign(count, 0), arrived.assign(count / 32, 0), passed.assign(count / 32, 0);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (auto& thread : threads) {
      getcontext(&thread.context);
      thread.context.uc_stack = {thread.stack.data(), 0, thread.stack.size()};
      thread.context.uc_link = &scheduler, thread.done = false;
      makecontext(&thread.context, +[] { (*body)(), threads[threadIdx.x].done = true; }, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (unsigned i = 0; i < count; ++i) {
        if (threads[i].done) continue;
        left = true, threadIdx.x = i;
        swapcontext(&scheduler, &threads[i].context);
      }
    }
  }
}

#include KERNEL

// arguments: as cuLaunchKernel takes them.
extern "C" void launch(unsigned blocks, unsigned count, void** arguments) {
  const Sizes& z = *static_cast<Sizes*>(arguments[0]);
  const auto order = *static_cast<const int**>(arguments[1]);
  const auto stored = [&](int i) { return *static_cast<Stored**>(arguments[i]); };
  const auto real = [&](int i) { return *static_cast<Real**>(arguments[i]); };
  run_blocks(blocks, count, [&] {
#if BACKWARD
    backward(z, order, stored(2), stored(3), real(4), real(5), real(6), real(7), real(8));
#else
    forward(z, order, stored(2), real(3), real(4), stored(5));
#endif
  });
}
