// Multi-scale deformable attention on the CPU (Deformable DETR, arXiv 2010.04159, equation 3).
//
// Letters: B batch size, Q queries, M heads, D channels per head, L levels, P points per level,
// S = sum of height * width over all levels. All arrays are contiguous: value (B, S, M, D),
// locations (B, Q, M, L, P, 2), weights (B, Q, M, L, P), out (B, Q, M, D).
//
// A task is one head of one image. No two tasks write to the same place, so the result is the same
// for any number of threads. A task copies its head out of `value`, where a head's rows lie M * D
// apart, into a map of its own, which fits into a core's cache. For each query, `locate` finds the
// four pixels around its L * P points (a loop over points, which the compiler vectorizes), and
// blocks of channels are summed over all of them (loops over vectors of channels).
//
// C++17 with the vector extensions of gcc and clang. The locations, weights and outputs of the next
// queries are prefetched: without this the encoder at 800 pixels takes twice as long. Tried and no
// faster: queries in 2-D tiles, prefetching rows of the map, registers of 64 bytes, several sums at
// a time.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {
#if defined(__AVX__)
constexpr int REGISTER = 32;  // bytes
#else
constexpr int REGISTER = 16;
#endif
constexpr int CHUNK = 64;  // points of a query that are handled at a time
constexpr int AHEAD = 4;   // how many queries before it is needed the memory is prefetched

struct Sizes {
  int64_t threads, B, S, M, D, Q, L, P;
  const int64_t* shapes;  // (L, 2): height, width
};

// The size and the first row of the level that each of the L * P points of a query lies in.
template <typename T> struct Levels {
  std::vector<T> width, height;
  std::vector<int32_t> columns, start;  // the width as an integer; the level's first row of the map

  explicit Levels(const Sizes& z) {
    int32_t first = 0;
    for (int64_t l = 0; l < z.L; ++l) {
      const int64_t h = z.shapes[2 * l], w = z.shapes[2 * l + 1];
      height.insert(height.end(), z.P, T(h)), width.insert(width.end(), z.P, T(w));
      columns.insert(columns.end(), z.P, int32_t(w)), start.insert(start.end(), z.P, first);
      first += int32_t(h * w);
    }
  }
};

// Up to CHUNK points and the four pixels around each: upper left, upper right, lower left, lower
// right.
template <typename T> struct Points {
  int32_t row[4][CHUNK];   // the pixel's row of the map; any valid row for a pixel outside
  T inside[4][CHUNK];      // 1 inside the map, 0 outside
  T fx[CHUNK], fy[CHUNK];  // distance to the right of and below the upper left pixel, in 0..1
  T share[4][CHUNK];       // the pixel's bilinear coefficient times the weight; 0 outside
};

// Finds the pixels around n points. There are no branches: a point far away, or NaN, is moved to
// where all its pixels lie just outside the map.
template <typename T>
void locate(const T* __restrict xy, const T* __restrict weight, const Levels<T>& levels,
            int64_t first, int n, Points<T>& points) {
  const T *__restrict width = &levels.width[first], *__restrict height = &levels.height[first];
  const int32_t* __restrict columns = &levels.columns[first];
  const int32_t* __restrict start = &levels.start[first];
  for (int i = 0; i < n; ++i) {
    const T w = width[i], h = height[i];
    T x = xy[2 * i] * w - T(0.5), y = xy[2 * i + 1] * h - T(0.5);
    x = x > -2 ? x : T(-2), x = x < w ? x : w;
    y = y > -2 ? y : T(-2), y = y < h ? y : h;
    const T x0 = std::floor(x), y0 = std::floor(y), x1 = x0 + 1, y1 = y0 + 1;
    const T left = (x0 >= 0) & (x0 < w) ? T(1) : T(0), right = (x1 >= 0) & (x1 < w) ? T(1) : T(0);
    const T top = (y0 >= 0) & (y0 < h) ? T(1) : T(0), bottom = (y1 >= 0) & (y1 < h) ? T(1) : T(0);
    const T fx = x - x0, fy = y - y0;
    points.fx[i] = fx, points.fy[i] = fy;
    points.inside[0][i] = top * left, points.inside[1][i] = top * right;
    points.inside[2][i] = bottom * left, points.inside[3][i] = bottom * right;
    points.share[0][i] = top * left * (1 - fy) * (1 - fx) * weight[i];
    points.share[1][i] = top * right * (1 - fy) * fx * weight[i];
    points.share[2][i] = bottom * left * fy * (1 - fx) * weight[i];
    points.share[3][i] = bottom * right * fy * fx * weight[i];
    const int32_t column0 = int32_t(x0 * left), column1 = int32_t(x1 * right);
    const int32_t row0 = start[i] + columns[i] * int32_t(y0 * top);
    const int32_t row1 = start[i] + columns[i] * int32_t(y1 * bottom);
    points.row[0][i] = row0 + column0, points.row[1][i] = row0 + column1;
    points.row[2][i] = row1 + column0, points.row[3][i] = row1 + column1;
  }
}

// BYTES bytes of channels, in as many registers as needed.
template <typename T, int BYTES> struct Block {
  static constexpr int SIZE = BYTES < REGISTER ? BYTES : REGISTER, COUNT = BYTES / SIZE;
  static constexpr int LANES = SIZE / sizeof(T), WIDTH = BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(SIZE)));
  Vector v[COUNT];

  static Block load(const T* src) {
    Block b;
    for (int k = 0; k < COUNT; ++k) std::memcpy(&b.v[k], src + k * LANES, SIZE);
    return b;
  }
  void store(T* dst) const {
    for (int k = 0; k < COUNT; ++k) std::memcpy(dst + k * LANES, &v[k], SIZE);
  }
  void add(T share, const Block& other) {  // += share * other
    for (int k = 0; k < COUNT; ++k) v[k] += share * other.v[k];
  }
  void multiply(const Block& other, T* dst) const {  // the dot product in LANES parts
    Vector sum{};
    for (int k = 0; k < COUNT; ++k) sum += v[k] * other.v[k];
    std::memcpy(dst, &sum, SIZE);
  }
};

// Calls work(block, first channel) for blocks that cover D channels, the largest blocks first.
template <typename T, int BYTES = 128, typename F> void blocks(int64_t D, F work, int64_t c = 0) {
  for (; c + Block<T, BYTES>::WIDTH <= D; c += Block<T, BYTES>::WIDTH) work(Block<T, BYTES>{}, c);
  if constexpr (BYTES > int(sizeof(T)))
    if (c < D) blocks<T, BYTES / 2>(D, work, c);
}

// A thread's own map. It begins at a cache line, so that no row touches more lines than necessary:
// 8 to 20 % faster.
template <typename T> struct Map {
  struct alignas(64) Line { char bytes[64]; };
  std::vector<Line> lines;

  explicit Map(int64_t n) : lines((n * sizeof(T) + 63) / 64) {}
  T& operator[](int64_t i) { return reinterpret_cast<T*>(lines.data())[i]; }
};

// Sums groups of `lanes` neighbors, pair by pair: n * lanes values in `parts` become n sums.
template <typename T> const T* sum_lanes(T* parts, T* spare, int n, int lanes) {
  for (; lanes > 1; lanes /= 2, std::swap(parts, spare)) {
    const T* __restrict src = parts;
    T* __restrict dst = spare;
    for (int j = 0; j < n * lanes / 2; ++j) dst[j] = src[2 * j] + src[2 * j + 1];
  }
  return parts;
}

// Processors do not prefetch one head's part of an array by themselves: its pieces lie far apart.
template <int WRITE = 0, typename T> void prefetch(const T* src, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(src + i, WRITE);
}

// Asks for pages of 2 MB for the results: the system provides new memory page by page, and with
// pages of 4 KB this takes as long as all the sums.
template <typename T> void large_pages(T* results, int64_t n) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 1 << 21;
  const uintptr_t first = (uintptr_t(results) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = uintptr_t(results + n) / PAGE * PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Does tasks 0 .. count - 1 on up to `threads` threads. Each thread calls make() for a function
// that does one task and owns the memory needed for it. Returns false if memory ran out.
template <typename F> bool parallel(int64_t count, int64_t threads, F make) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> good{true};
  const auto work = [&] {
    try {
      auto task = make();
      for (int64_t i; (i = next++) < count;) task(i);
    } catch (const std::bad_alloc&) {
      good = false;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(threads, count); ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads available: those that exist do the work
  }
  work();
  for (auto& thread : others) thread.join();
  return good;
}

template <typename T>
bool forward(const Sizes& z, const T* value, const T* locations, const T* weights, T* out) {
  const Levels<T> levels(z);
  const int64_t num_points = z.L * z.P, D = z.D;
  large_pages(out, z.B * z.Q * z.M * D);
  return parallel(z.B * z.M, z.threads, [&] {
    return [&, map = Map<T>(z.S * D)](int64_t task) mutable {
      const int64_t b = task / z.M, m = task % z.M;
      for (int64_t s = 0; s < z.S; ++s)
        std::copy_n(value + ((b * z.S + s) * z.M + m) * D, D, &map[s * D]);
      Points<T> points;
      for (int64_t q = 0; q < z.Q; ++q) {
        const int64_t idx = (b * z.Q + q) * z.M + m;
        const int64_t prefetch_idx = idx + std::min<int64_t>(AHEAD, z.Q - 1 - q) * z.M;
        prefetch(locations + 2 * num_points * prefetch_idx, 2 * num_points);
        prefetch(weights + num_points * prefetch_idx, num_points);
        prefetch<1>(out + D * prefetch_idx, D);
        for (int64_t first = 0; first < num_points; first += CHUNK) {
          const int count = int(std::min<int64_t>(CHUNK, num_points - first));
          const int64_t point = idx * num_points + first;
          locate(locations + 2 * point, weights + point, levels, first, count, points);
          blocks<T>(D, [&](auto sum, int64_t c) {
            T* dst = out + idx * D + c;
            if (first) sum = sum.load(dst);
            for (int i = 0; i < count; ++i)
              for (int k = 0; k < 4; ++k)
                sum.add(points.share[k][i], sum.load(&map[points.row[k][i] * D + c]));
            sum.store(dst);
          });
        }
      }
    };
  });
}

// A point's gradients combine four dot products: of grad_out with each pixel around the point. In
// the map every row of the value is followed by the row of its gradient, so that one access fetches
// both.
template <typename T>
bool backward(const Sizes& z, const T* grad_out, const T* value, const T* locations,
              const T* weights, T* grad_value, T* grad_locations, T* grad_weights) {
  const Levels<T> levels(z);
  const int64_t num_points = z.L * z.P, D = z.D;
  large_pages(grad_value, z.B * z.S * z.M * D);
  large_pages(grad_locations, z.B * z.Q * z.M * num_points * 2);
  large_pages(grad_weights, z.B * z.Q * z.M * num_points);
  return parallel(z.B * z.M, z.threads, [&] {
    return [&, map = Map<T>(2 * z.S * D)](int64_t task) mutable {
      const int64_t b = task / z.M, m = task % z.M;
      for (int64_t s = 0; s < z.S; ++s) {
        std::copy_n(value + ((b * z.S + s) * z.M + m) * D, D, &map[2 * s * D]);
        std::fill_n(&map[(2 * s + 1) * D], D, T(0));
      }
      Points<T> points;
      constexpr int PARTS = 4 * CHUNK * REGISTER / sizeof(T);
      T dot[4 * CHUNK], parts[PARTS], spare[PARTS];
      for (int64_t q = 0; q < z.Q; ++q) {
        const int64_t idx = (b * z.Q + q) * z.M + m;
        const int64_t prefetch_idx = idx + std::min<int64_t>(AHEAD, z.Q - 1 - q) * z.M;
        prefetch(locations + 2 * num_points * prefetch_idx, 2 * num_points);
        prefetch(weights + num_points * prefetch_idx, num_points);
        prefetch(grad_out + D * prefetch_idx, D);
        prefetch<1>(grad_locations + 2 * num_points * prefetch_idx, 2 * num_points);
        prefetch<1>(grad_weights + num_points * prefetch_idx, num_points);
        for (int64_t first = 0; first < num_points; first += CHUNK) {
          const int count = int(std::min<int64_t>(CHUNK, num_points - first));
          const int64_t point = idx * num_points + first;
          locate(locations + 2 * point, weights + point, levels, first, count, points);
          std::fill_n(dot, 4 * count, T(0));
          blocks<T>(D, [&](auto grad, int64_t c) {
            grad = grad.load(grad_out + idx * D + c);
            for (int i = 0; i < count; ++i) {
              for (int k = 0; k < 4; ++k) {
                T* row = &map[2 * points.row[k][i] * D + c];
                grad.multiply(grad.load(row), parts + (4 * i + k) * grad.LANES);
                auto sum = grad.load(row + D);
                sum.add(points.share[k][i], grad);
                sum.store(row + D);
              }
            }
            const T* sums = sum_lanes(parts, spare, 4 * count, grad.LANES);
            for (int i = 0; i < 4 * count; ++i) dot[i] += sums[i];
          });
          const T *width = &levels.width[first], *height = &levels.height[first];
          T *grad_weight = grad_weights + point, *grad_xy = grad_locations + 2 * point;
          for (int i = 0; i < count; ++i) {
            const T fx = points.fx[i], fy = points.fy[i], weight = weights[point + i];
            const T w = width[i] * weight, h = height[i] * weight;
            const T d0 = dot[4 * i] * points.inside[0][i];
            const T d1 = dot[4 * i + 1] * points.inside[1][i];
            const T d2 = dot[4 * i + 2] * points.inside[2][i];
            const T d3 = dot[4 * i + 3] * points.inside[3][i];
            grad_weight[i] = (1 - fy) * ((1 - fx) * d0 + fx * d1) + fy * ((1 - fx) * d2 + fx * d3);
            grad_xy[2 * i] = w * ((1 - fy) * (d1 - d0) + fy * (d3 - d2));
            grad_xy[2 * i + 1] = h * ((1 - fx) * (d2 - d0) + fx * (d3 - d1));
          }
        }
      }
      for (int64_t s = 0; s < z.S; ++s)
        std::copy_n(&map[(2 * s + 1) * D], D, grad_value + ((b * z.S + s) * z.M + m) * D);
    };
  });
}

Sizes sizes(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s + 8}; }
}  // namespace

// s: threads, B, S, M, D, Q, L, P, then height and width of each level; t: the tensors in the order
// of the functions above. The functions return false if memory ran out.
#define EXPORT(T, suffix)                                                     \
  extern "C" bool forward_##suffix(const int64_t* s, T** t) {                 \
    return forward<T>(sizes(s), t[0], t[1], t[2], t[3]);                      \
  }                                                                           \
  extern "C" bool backward_##suffix(const int64_t* s, T** t) {                \
    return backward<T>(sizes(s), t[0], t[1], t[2], t[3], t[4], t[5], t[6]);   \
  }
EXPORT(float, f32)
EXPORT(double, f64)
