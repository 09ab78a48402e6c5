// Both gradients of the spatial pyramid between two batch norms. Each makes the gradient in front of the norm behind it
// where it reads the gradient; that of the input goes through the PReLU in front and leaves the sums of the norm there.
// Bytes: of the weights' (2*K + 1)*d read a pixel; of the input's (2*K + 1)*d read + d written. Multiply-adds: 18*K*d a
// pixel.
#include "pyramid_sums.cuh"
#include "spatial_pyramid_backward_input.cuh"
#include "spatial_pyramid_backward_weight.cuh"

namespace espk::cuda {
namespace {

template <class T>
struct Params {
  const T *grad, *x;
  const T* weight;
  T* grad_x;
  PartSums<Compute<T>>* parts;
  PyramidShape shape;
  ThroughNorm<T> through;
  Normalised<T> normalise;
  const double* mean;
  Window window;
  int64_t rectangles, rectangles_a_part, blocks;
  bool vector_fill;
};

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::threads, 1) normalised_pyramid_backward_kernel(const Params<T> p) {
  using C = Compute<T>;
  using Sums = ThreadSums<C, Traits, GradientSums<C>>;
  constexpr int kRows = Traits::rows, kVector = Traits::channels;
  const PyramidShape& s = p.shape;
  C* weights = reinterpret_cast<C*>(shared_memory());
  const Sums sums_of_threads{weights + round_up(9 * s.branches * s.cut.channels, 4)};
  C* window = sums_of_threads.of(1, 0, 0);
  const Items items(s.cut, kRows, kVector, true);
  const int thread = static_cast<int>(threadIdx.x), threads = threads_of<Traits>(items);

  for (int64_t block = blockIdx.x; block < p.blocks; block += gridDim.x) {
    const int64_t part = block / s.cut.slices, first_rectangle = part * p.rectangles_a_part;
    sums_of_threads.clear(1);
    for (int64_t rectangle = first_rectangle; rectangle < least(first_rectangle + p.rectangles_a_part, p.rectangles);
         ++rectangle) {
      const Place place(s.cut, rectangle * s.cut.slices + block % s.cut.slices);
      const int channels = static_cast<int>(least(s.cut.channels, s.channels - place.channel));
      __syncthreads();
      if (rectangle == first_rectangle) load_branch_weights(weights, p.weight, s, place.channel, channels);
      for (int first = 0; first < items.count; first += threads) {
        const bool busy = thread < threads && first + thread < items.count;
        const Item at = items[busy ? first + thread : 0];
        C behind[kRows][kVector] = {};
        gather_branches<Traits>(behind, s, p.grad, weights, p.window, window, p.vector_fill, place, channels, at, busy,
                                items.row_groups, p.through);
        if (!busy || at.channel >= channels) continue;
        const int64_t channel = place.channel + at.channel;
        const auto normalise = p.normalise.template channels<kVector>(channel);
        GradientSums<C> sums[kVector];
        C mean[kVector];
#pragma unroll
        for (int v = 0; v < kVector; ++v) mean[v] = static_cast<C>(p.mean[channel + v]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int64_t y = place.row + at.row + r * items.row_groups, x = place.column + at.column;
          if (y >= s.height || x >= s.width) continue;
          const int64_t pixel = place.image * s.in.image + y * s.in.row + x * s.in.column + channel;
          C map[kVector], between[kVector];
          load<kVector>(map, p.x + pixel);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            between[v] =
                sums[v].add(behind[r][v], normalise.before_prelu(v, map[v]), map[v], normalise.slope[v], mean[v]);
          }
          store<kVector>(p.grad_x + pixel, between);
        }
        sums_of_threads.add(0, sums);
      }
    }
    __syncthreads();
    for (int c = thread; c < s.cut.channels; c += Traits::threads) {
      const int64_t channel = block % s.cut.slices * s.cut.channels + c;
      if (channel >= s.channels) continue;
      C total[Sums::count];
      sums_of_threads.total(total, 0, c, threads, items.channels);
      p.parts[part * s.channels + channel] = {{total[0], total[1], total[2], C(0)}};
    }
    __syncthreads();
  }
}

// Calls f(element type, traits, plan) with the variant for the input's gradient.
template <class F>
auto with_variant(const NormalisedPyramidBackward& p, F&& f) {
  return with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    const int64_t vector = 4 * bytes_of(p.type);
    return with_pyramid_traits<T>(
        p, p.height, p.width, sizeof(C), aligned(p.grad_x, vector) && aligned(p.x, vector),
        [&](const Cut& cut, auto traits) {
          using Sums = ThreadSums<C, decltype(traits), GradientSums<C>>;
          return backward_plan(p, cut, Sums::numbers(1) * int64_t{sizeof(C)});
        },
        [&](auto traits, const PyramidPlan& plan) { return f(type, traits, plan); });
  });
}

SpatialPyramidBackwardWeight weight_of(const NormalisedPyramidBackward& p) {
  SpatialPyramidBackwardWeight w{};
  static_cast<Pyramid&>(w) = p;
  w.grad = p.grad;
  w.x = p.x;
  w.grad_weight = p.grad_weight;
  return w;
}

bool weight_vectors(const NormalisedPyramidBackward& p) { return aligned(p.out, 4 * bytes_of(p.type)); }

// The two gradients use the same memory one after the other.
int64_t scratch_bytes(const NormalisedPyramidBackward& p) {
  const int64_t of_weight = p.grad_weight ? pyramid_weight_scratch_bytes(weight_of(p), weight_vectors(p)) : 0;
  if (!p.grad_x) return of_weight;
  return most(of_weight, with_variant(p, [&](auto* type, auto, const PyramidPlan& plan) {
                using C = Compute<std::remove_pointer_t<decltype(type)>>;
                return part_bytes<C>(pyramid_parts(p, plan.shape.cut), p.channels);
              }));
}

Outcome run(const NormalisedPyramidBackward& p, void* scratch, void* stream) {
  if (p.grad_weight) {
    const Outcome outcome = run_pyramid_weight(
        weight_of(p), weight_vectors(p),
        [&](auto* type) { return through_norm<std::remove_pointer_t<decltype(type)>>(*p.behind, p.grad, p.out); },
        [&](auto* type) { return normalised_by<std::remove_pointer_t<decltype(type)>>(p.front); }, scratch, stream);
    if (outcome.failed()) return outcome;
  }
  if (!p.grad_x) return {};
  return with_variant(p, [&](auto* type, auto traits, const PyramidPlan& plan) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Traits = decltype(traits);
    const Cut& cut = plan.shape.cut;
    Params<T> params{};
    params.grad = static_cast<const T*>(p.grad);
    params.x = static_cast<const T*>(p.x);
    params.weight = static_cast<const T*>(p.weight);
    params.grad_x = static_cast<T*>(p.grad_x);
    params.parts = static_cast<PartSums<Compute<T>>*>(scratch);
    params.shape = plan.shape;
    params.through = through_norm<T>(*p.behind, p.grad, p.out);
    params.normalise = normalised_by<T>(p.front);
    params.mean = p.front->mean;
    params.window = plan.window;
    params.rectangles = rectangles_of(p, cut);
    params.rectangles_a_part = summed_rectangles(p, cut);
    params.blocks = pyramid_parts(p, cut) * cut.slices;
    params.vector_fill = aligned(p.grad, 16) && params.through.vectors() && plan.vector_fill;
    const Outcome outcome = launch("normalised_pyramid_backward", normalised_pyramid_backward_kernel<T, Traits>,
                                   params.blocks, Traits::threads, plan.shared_bytes, stream, params);
    return outcome.failed() ? outcome : take_gradients(*p.front, scratch, pyramid_parts(p, cut), stream);
  });
}

}  // namespace

extern const Kernel<NormalisedPyramidBackward> normalised_pyramid_backward = {scratch_bytes, run};

}  // namespace espk::cuda
