// Multi-scale deformable attention on NVIDIA GPUs (Deformable DETR, arXiv 2010.04159, equation 3).
// Compiled at first use by NVRTC, without any header. cuda.py defines these macros:
//   DTYPE    of value and out: 0 float, 1 half, 2 bfloat16, 3 double; all else is float or double
//   D        channels per head
//   BACKWARD which function is compiled: 0 forward, 1 backward; their layouts of threads may differ
//   WIDTH    channels that a thread loads at once, up to 16 bytes of value or, in the backward
//            pass, of the fp32 or fp64 gradient that is added to memory
//   LANES    threads that share one head of one query, a power of two up to 32
//   THREADS  per block
//   TILE     neighboring queries that are handled together, head by head
//   LEVELS   maximum number of levels
//
// The letters and the layout of the arrays are those of cpu.cpp. A group of LANES neighboring
// threads (its lanes) shares one head of one query. Every lane loads WIDTH of a pixel's channels at
// once, and its sums stay in registers. The pixels and coefficients of a point are computed once,
// by one lane, and passed to the others through shared memory, BATCH points at a time.
template <int> struct Types { typedef float Real; typedef unsigned short Stored; };
template <> struct Types<0> { typedef float Real, Stored; };
template <> struct Types<3> { typedef double Real, Stored; };
typedef Types<DTYPE>::Real Real;
typedef Types<DTYPE>::Stored Stored;

// In each round a lane handles WIDTH channels, from (round * LANES + lane) * WIDTH on.
constexpr int ROUNDS = (D / WIDTH + LANES - 1) / LANES;
constexpr int BATCH = LANES < 4 ? 4 * LANES : 16;
constexpr int GROUPS = THREADS / LANES;  // per block
constexpr unsigned ALL = 0xffffffffu;

struct alignas(sizeof(Stored) * WIDTH) Channels { Stored c[WIDTH]; };
struct alignas(16) Four { Real v[4]; };
struct alignas(16) Pixels {  // around a point: upper left, upper right, lower left, lower right
  int row[4];                // the pixel's row of the map; any valid row for a pixel outside
  Real share[4];             // the pixel's bilinear coefficient times the weight; 0 outside
};

struct Sizes {  // as cuda.py passes them
  int B, S, M, Q, L, P;
  int height[LEVELS], width[LEVELS], start[LEVELS];  // start: the level's first row of the map
};

#if DTYPE == 1
__device__ float real(Stored x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}
__device__ Stored stored(float x) {
  Stored r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
#elif DTYPE == 2
__device__ float real(Stored x) { return __uint_as_float(unsigned(x) << 16); }
__device__ Stored stored(float x) {  // rounds to nearest, ties to even; NaN stays NaN
  const unsigned bits = __float_as_uint(x);
  return x == x ? Stored((bits + 0x7fffu + (bits >> 16 & 1)) >> 16) : Stored(0x7fff);
}
#else
__device__ Real real(Real x) { return x; }
__device__ Real stored(Real x) { return x; }
#endif

struct Place {  // of a point in its level
  Real fx, fy;  // distance to the right of and below the upper left pixel, in 0..1
  Real width, height;
  bool left, right, top, bottom;  // whether these columns and rows of its four pixels lie inside
  int row[4];
};

// A point far away, or NaN, is moved to where all its pixels lie just outside the map.
__device__ Place locate(const Real* xy, const Sizes& z, int level) {
  const int h = z.height[level], w = z.width[level];
  Place at;
  at.width = Real(w), at.height = Real(h);
  Real x = xy[0] * at.width - Real(0.5), y = xy[1] * at.height - Real(0.5);
  x = x > Real(-2) ? x : Real(-2), x = x < at.width ? x : at.width;
  y = y > Real(-2) ? y : Real(-2), y = y < at.height ? y : at.height;
  const int x0 = int(floor(x)), y0 = int(floor(y)), x1 = x0 + 1, y1 = y0 + 1;
  at.fx = x - Real(x0), at.fy = y - Real(y0);
  at.left = x0 >= 0 && x0 < w, at.right = x1 >= 0 && x1 < w;
  at.top = y0 >= 0 && y0 < h, at.bottom = y1 >= 0 && y1 < h;
  const int column0 = at.left ? x0 : 0, column1 = at.right ? x1 : 0, start = z.start[level];
  const int row0 = start + (at.top ? y0 * w : 0), row1 = start + (at.bottom ? y1 * w : 0);
  at.row[0] = row0 + column0, at.row[1] = row0 + column1;
  at.row[2] = row1 + column0, at.row[3] = row1 + column1;
  return at;
}

struct Work {  // the head, query and image that a group handles
  int lane, group;
  bool any;             // false for the groups beyond the last query
  long long idx, map;  // index into (B, Q, M); index into value of the head's first channel
};

// Groups are ordered by image, tile of neighboring queries, head, query. order: see `forward`.
__device__ Work work(const Sizes& z, const int* order) {
  Work w;
  w.lane = threadIdx.x % LANES, w.group = threadIdx.x / LANES;
  const long long g = (long long)blockIdx.x * GROUPS + w.group, tiles = (z.Q + TILE - 1) / TILE;
  const long long m = g / TILE % z.M, tile = g / TILE / z.M % tiles, b = g / TILE / z.M / tiles;
  const long long place = tile * TILE + g % TILE;
  w.any = b < z.B && place < z.Q;
  const long long q = w.any ? (order ? order[place] : place) : 0;
  w.idx = w.any ? (b * z.Q + q) * z.M + m : 0;
  w.map = w.any ? (b * z.S * z.M + m) * D : 0;
  return w;
}

__device__ Channels load(const Stored* src) { return *reinterpret_cast<const Channels*>(src); }

// Each lane computes the pixels of some of the query's points from `first` on, for its whole group.
__device__ void share_pixels(Pixels* shared, const Work& w, const Sizes& z, int points,
                             const Real* locations, const Real* weights, int first, int count) {
  __syncwarp();
  for (int i = w.lane; i < count; i += LANES) {
    const long long p = w.idx * points + first + i;
    const Place at = locate(locations + 2 * p, z, (first + i) / z.P);
    const Real weight = weights[p];
    Pixels around;
    for (int k = 0; k < 4; ++k) around.row[k] = at.row[k];
    around.share[0] = at.top && at.left ? weight * (1 - at.fy) * (1 - at.fx) : Real(0);
    around.share[1] = at.top && at.right ? weight * (1 - at.fy) * at.fx : Real(0);
    around.share[2] = at.bottom && at.left ? weight * at.fy * (1 - at.fx) : Real(0);
    around.share[3] = at.bottom && at.right ? weight * at.fy * at.fx : Real(0);
    shared[i] = around;
  }
  __syncwarp();
}

__device__ void add(Real* dst, const Real* values) {  // adds WIDTH values, each atomically
  int c = 0;
#if DTYPE != 3 && __CUDA_ARCH__ >= 900
  for (; c + 4 <= WIDTH; c += 4)
    atomicAdd(reinterpret_cast<float4*>(dst + c),
              make_float4(values[c], values[c + 1], values[c + 2], values[c + 3]));
#endif
  for (; c < WIDTH; ++c) atomicAdd(dst + c, values[c]);
}

// The gradients of point p combine four dot products d: of grad_out with each pixel.
__device__ void write_gradients(const Place& at, Real weight, Four d, long long p,
                                Real* grad_locations, Real* grad_weights) {
  const Real d0 = at.top && at.left ? d.v[0] : Real(0), d1 = at.top && at.right ? d.v[1] : Real(0);
  const Real d2 = at.bottom && at.left ? d.v[2] : Real(0);
  const Real d3 = at.bottom && at.right ? d.v[3] : Real(0);
  grad_weights[p] =
      (1 - at.fy) * ((1 - at.fx) * d0 + at.fx * d1) + at.fy * ((1 - at.fx) * d2 + at.fx * d3);
  grad_locations[2 * p] = weight * at.width * ((1 - at.fy) * (d1 - d0) + at.fy * (d3 - d2));
  grad_locations[2 * p + 1] = weight * at.height * ((1 - at.fx) * (d2 - d0) + at.fx * (d3 - d1));
}

// order (Q,): the indices of the queries, neighbors together, or null for the order they come in.
#if !BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS)
    forward(const Sizes z, const int* __restrict__ order, const Stored* __restrict__ value,
            const Real* __restrict__ locations, const Real* __restrict__ weights,
            Stored* __restrict__ out) {
  __shared__ Pixels shared[GROUPS][BATCH];
  const Work w = work(z, order);
  const int points = z.L * z.P;
  const long long stride = (long long)z.M * D;
  Real sum[ROUNDS][WIDTH] = {};
  for (int first = 0; first < points; first += BATCH) {
    const int count = min(BATCH, points - first);
    share_pixels(shared[w.group], w, z, points, locations, weights, first, count);
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const Pixels p = shared[w.group][i];
      for (int r = 0; r < ROUNDS; ++r) {
        const int c = (r * LANES + w.lane) * WIDTH;
        if (c >= D) continue;
        for (int k = 0; k < 4; ++k) {
          const Channels pixel = load(value + w.map + p.row[k] * stride + c);
          for (int j = 0; j < WIDTH; ++j) sum[r][j] += p.share[k] * real(pixel.c[j]);
        }
      }
    }
  }
  if (!w.any) return;
  for (int r = 0; r < ROUNDS; ++r) {
    const int c = (r * LANES + w.lane) * WIDTH;
    if (c >= D) continue;
    Channels result;
    for (int j = 0; j < WIDTH; ++j) result.c[j] = stored(sum[r][j]);
    *reinterpret_cast<Channels*>(out + w.idx * D + c) = result;
  }
}

#else
// grad_value must be zero at the start.
extern "C" __global__ void __launch_bounds__(THREADS, 8)
    backward(const Sizes z, const int* __restrict__ order, const Stored* __restrict__ grad_out,
             const Stored* __restrict__ value, const Real* __restrict__ locations,
             const Real* __restrict__ weights, Real* __restrict__ grad_value,
             Real* __restrict__ grad_locations, Real* __restrict__ grad_weights) {
  __shared__ Pixels shared[GROUPS][BATCH];
  __shared__ Four dots[GROUPS][BATCH];
  const Work w = work(z, order);
  const int points = z.L * z.P;
  const long long stride = (long long)z.M * D;
  Real grad[ROUNDS][WIDTH] = {};  // stays 0 for the groups beyond the last query
  for (int r = 0; r < ROUNDS; ++r) {
    const int c = (r * LANES + w.lane) * WIDTH;
    if (c >= D || !w.any) continue;
    const Channels src = load(grad_out + w.idx * D + c);
    for (int j = 0; j < WIDTH; ++j) grad[r][j] = real(src.c[j]);
  }
  for (int first = 0; first < points; first += BATCH) {
    const int count = min(BATCH, points - first);
    share_pixels(shared[w.group], w, z, points, locations, weights, first, count);
#pragma unroll 2
    for (int i = 0; i < count; ++i) {
      const Pixels p = shared[w.group][i];
      Real dot[4] = {};
      for (int r = 0; r < ROUNDS; ++r) {
        const int c = (r * LANES + w.lane) * WIDTH;
        if (c >= D) continue;
        for (int k = 0; k < 4; ++k) {
          const long long place = w.map + p.row[k] * stride + c;
          const Channels pixel = load(value + place);
          Real part[WIDTH];
          for (int j = 0; j < WIDTH; ++j) {
            dot[k] += grad[r][j] * real(pixel.c[j]);
            part[j] = p.share[k] * grad[r][j];
          }
          if (w.any && p.share[k] != 0) add(grad_value + place, part);
        }
      }
      for (int step = LANES / 2; step > 0; step /= 2)  // sums over the group's lanes
        for (int k = 0; k < 4; ++k) dot[k] += __shfl_xor_sync(ALL, dot[k], step);
      if (w.lane == 0) dots[w.group][i] = Four{{dot[0], dot[1], dot[2], dot[3]}};
    }
    __syncwarp();
    for (int i = w.lane; i < count && w.any; i += LANES) {
      const long long p = w.idx * points + first + i;
      const Place at = locate(locations + 2 * p, z, (first + i) / z.P);
      write_gradients(at, weights[p], dots[w.group][i], p, grad_locations, grad_weights);
    }
  }
}
#endif
