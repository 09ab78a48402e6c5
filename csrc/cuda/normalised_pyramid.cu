// The spatial pyramid of a map that is normalised on the way into shared memory, zero outside of the map behind the norm,
// with the moments of its result: what the batch norm in front asks of a map and what the one behind asks, in one pass.
// Bytes: d read (and the halo again) + K*d written a pixel, and 4 numbers a channel for each part; multiply-adds: 9*K*d a
// pixel.
#include "pyramid_sums.cuh"
#include "spatial_pyramid.cuh"

namespace espk::cuda {
namespace {

template <class T>
struct Params {
  const T* x;
  const T* weight;
  T* out;
  PartSums<Compute<T>>* parts;  // null: nobody asks for moments
  PyramidShape shape;
  Normalised<T> normalise;
  Window window;
  int64_t rectangles, rectangles_a_part, blocks;
  bool vector_fill;
};

// 128 registers a thread, so that one block fills its window while another multiplies.
template <class T, class Traits>
__global__ void __launch_bounds__(Traits::threads, 512 / Traits::threads) normalised_pyramid_kernel(const Params<T> p) {
  using C = Compute<T>;
  using Sums = ThreadSums<C, Traits, MomentSums<C>>;
  constexpr int kRows = Traits::rows, kVector = Traits::channels;
  const PyramidShape& s = p.shape;
  C* weights = reinterpret_cast<C*>(shared_memory());
  const Sums sums_of_threads{weights + round_up(9 * s.branches * s.cut.channels, 4)};
  C* around = sums_of_threads.of(s.branches, 0, 0);  // [K][channels]: a number of each, the part's first
  T* window = reinterpret_cast<T*>(around + round_up(s.branches * s.cut.channels, 4));
  const Items items(s.cut, kRows, kVector, true);
  const int thread = static_cast<int>(threadIdx.x), threads = threads_of<Traits>(items);

  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const int64_t part = block / s.cut.slices, first_rectangle = part * p.rectangles_a_part;
    int64_t pixels = 0;
    if (p.parts) sums_of_threads.clear(s.branches);
    for (int64_t rectangle = first_rectangle; rectangle < least(first_rectangle + p.rectangles_a_part, p.rectangles);
         ++rectangle) {
      const Place place(s.cut, rectangle * s.cut.slices + block % s.cut.slices);
      const int channels = static_cast<int>(least(s.cut.channels, s.channels - place.channel));
      const T* image = p.x + place.image * s.in.image + place.channel;
      pixels += pixels_of(place, s.cut, s.out_height, s.out_width);
      __syncthreads();
      if (rectangle == first_rectangle) load_branch_weights(weights, p.weight, s, place.channel, channels);
      if constexpr (Traits::staged) {
        const MapView<T> map{image, s.in, s.height, s.width, channels};
        fill_window<Fill::replace>(window, p.window, map, place.row * s.stride - s.halo_rows,
                                   place.column * s.stride - s.halo_columns, p.vector_fill, p.normalise, place.channel);
      }
      __syncthreads();

      for (int first = 0; first < items.count; first += threads) {
        const bool busy = thread < threads && first + thread < items.count;
        const Item at = items[busy ? first + thread : 0];
        const bool there = busy && at.channel < channels;
        C sums[kRows][kVector] = {};
        for (int k = 0; k < s.branches; ++k) {
          if (there) {
            add_branch<Traits>(sums, s, k, weights, p.window, window, image, place, channels, at, items.row_groups,
                               p.normalise);
          }
          // The part's first pixel is that of the first threads.
          C* of_branch = around + k * s.cut.channels + at.channel;
          if (p.parts && rectangle == first_rectangle && first == 0) {
            if (there && thread < items.channels) {
#pragma unroll
              for (int v = 0; v < kVector; ++v) of_branch[v] = widen(narrow<T>(sums[0][v]));
            }
            __syncthreads();
          }
          if (!there) continue;
          MomentSums<C> moments[kVector];
          const int64_t channel = k * s.channels + place.channel + at.channel;
          T* out = p.out + place.image * s.out.image + channel;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int64_t y = place.row + at.row + r * items.row_groups, x = place.column + at.column;
            if (y < s.out_height && x < s.out_width) {
              store<kVector>(out + y * s.out.row + x * s.out.column, sums[r]);
              if (p.parts) {
#pragma unroll
                for (int v = 0; v < kVector; ++v) moments[v].add(widen(narrow<T>(sums[r][v])) - of_branch[v]);
              }
            }
            if (!s.hff) {
#pragma unroll
              for (int v = 0; v < kVector; ++v) sums[r][v] = 0;
            }
          }
          if (p.parts) sums_of_threads.add(k, moments);
        }
      }
    }
    if (!p.parts) continue;
    __syncthreads();
    for (int i = thread; i < s.branches * s.cut.channels; i += Traits::threads) {
      const int k = i / s.cut.channels, c = i % s.cut.channels;
      const int64_t channel = block % s.cut.slices * s.cut.channels + c;
      if (channel >= s.channels) continue;
      C total[Sums::count];
      sums_of_threads.total(total, k, c, threads, items.channels);
      p.parts[(part * s.branches + k) * s.channels + channel] = {
          {static_cast<C>(pixels), around[i], total[0], total[1]}};
    }
    __syncthreads();
  }
}

// Calls f(element type, traits, plan) with the variant for the problem.
template <class F>
auto with_variant(const NormalisedPyramid& p, F&& f) {
  return with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    return with_pyramid_traits<T>(
        p, p.out_height, p.out_width, bytes_of(p.type), aligned(p.out, 4 * bytes_of(p.type)),
        [&](const Cut& cut, auto traits) {
          const int64_t sums = ThreadSums<C, decltype(traits), MomentSums<C>>::numbers(p.branches);
          return forward_plan(p, cut, (sums + round_up(p.branches * cut.channels, 4)) * int64_t{sizeof(C)});
        },
        [&](auto traits, const PyramidPlan& plan) { return f(type, traits, plan); });
  });
}

int64_t scratch_bytes(const NormalisedPyramid& p) {
  if (!p.behind || !p.behind->batch_statistics) return 0;
  return with_variant(p, [&](auto* type, auto, const PyramidPlan& plan) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return part_bytes<C>(pyramid_parts(p, plan.shape.cut), p.out_channels());
  });
}

Outcome run(const NormalisedPyramid& p, void* scratch, void* stream) {
  return with_variant(p, [&](auto* type, auto traits, const PyramidPlan& plan) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Traits = decltype(traits);
    const Cut& cut = plan.shape.cut;
    const bool moments = p.behind && p.behind->batch_statistics;
    Params<T> params{};
    params.x = static_cast<const T*>(p.x);
    params.weight = static_cast<const T*>(p.weight);
    params.out = static_cast<T*>(p.out);
    params.parts = moments ? static_cast<PartSums<Compute<T>>*>(scratch) : nullptr;
    params.shape = plan.shape;
    params.normalise = normalised_by<T>(p.front);
    params.window = plan.window;
    params.rectangles = rectangles_of(p, cut);
    params.rectangles_a_part = summed_rectangles(p, cut);
    params.blocks = pyramid_parts(p, cut) * cut.slices;
    params.vector_fill = aligned(p.x, 16) && plan.vector_fill;
    const Outcome outcome = launch("normalised_pyramid", normalised_pyramid_kernel<T, Traits>, params.blocks,
                                   Traits::threads, plan.shared_bytes, stream, params);
    if (outcome.failed() || !p.behind) return outcome;
    return take_moments(*p.behind, scratch, moments ? pyramid_parts(p, cut) : 0, stream);
  });
}

}  // namespace

extern const Kernel<NormalisedPyramid> normalised_pyramid = {scratch_bytes, run};

}  // namespace espk::cuda
