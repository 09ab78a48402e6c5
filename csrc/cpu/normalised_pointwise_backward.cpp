// Both gradients of a group pointwise convolution between two batch norms, a chunk of pixels at a time: the gradient in
// front of the norm behind it is made in the cache, multiplied with the normalised input into the weights' gradient and
// with the weights into the input's, which goes through the PReLU in front and leaves the sums of the norm there. Weight
// gradients and sums are two-stage, in order.
// Bytes: 2*N + M read (+ M of the residual) + M written a pixel; multiply-adds: 2*M*N/groups a pixel.
#include "channel_sums.h"
#include "far_map.h"
#include "kernels.h"
#include "normalised_rows.h"
#include "ordered_sum.h"
#include "pixel_runs.h"
#include "pointwise_weights.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = NormalisedPointwiseBackward;

PointwiseWeights weights_of(const Problem& p) {
  return {p.type, true, p.groups, p.out_channels / p.groups, p.in_channels / p.groups, true};
}

int64_t weight_size(const Problem& p) { return p.out_channels * (p.in_channels / p.groups); }

PixelRuns runs_of(const Problem& p) {
  const int64_t channels = p.out_channels + (p.normalise.scale ? 2 : 1) * p.in_channels;
  return {p.pixels, channels * (p.type == Type::float64 ? 8 : 4), weight_size(p)};
}

template <class C>
struct Shared {
  C* weights;
  NormGradientVectors<C> norm;
  NormaliseVectors<C> normalise;
  PieceSums<C> sums;
  C* weight_sums;  // of each run
  int64_t bytes;

  Shared(const Problem& p, void* memory) : Shared(p, Carving(memory)) {}

 private:
  Shared(const Problem& p, Carving memory)
      : weights(memory.take<C>(weights_of(p).bytes() / static_cast<int64_t>(sizeof(C)))),
        norm(p.norm, p.out_channels, memory),
        normalise(p.in_channels, memory),
        sums(p.normalise.scale ? runs_of(p).count : 0, p.in_channels, memory),
        weight_sums(memory.take<C>(runs_of(p).count * weight_size(p))),
        bytes(memory.bytes()) {}
};

void before(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    const Shared<C> shared(p, memory);
    if (p.grad_x) weights_of(p).prepare(p.weight, shared.weights);
    shared.norm.fill(p.norm, p.out_channels);
    shared.normalise.fill(p.normalise, p.in_channels);
    fill_vector<C>(shared.sums.mean, p.sums.mean, p.in_channels, 0);
  });
}

int64_t units(const Problem& p) { return runs_of(p).count; }

// weight_sums += gradient^T x input, for every group.
template <class C>
void add_weight_gradient(const Problem& p, C* weight_sums, const PixelRows<C>& gradient, const PixelRows<C>& input,
                         int64_t pixels, Ahead* ahead) {
  const int64_t in = p.in_channels / p.groups, out = p.out_channels / p.groups;
  for (int64_t group = 0; group < p.groups; ++group) {
    MatrixProduct<C> product = weight_gradient<C>(weight_sums + group * out * in, out, in, pixels,
                                                  Matrix<C>{gradient.data + group * out, 1, gradient.pitch},
                                                  input.data + group * in, input.pitch);
    product.ahead = ahead;
    multiply(product);
  }
}

// The gradient behind the PReLU of the input becomes the one in front of it.
template <class T>
void pass_prelu(const Problem& p, const Shared<Compute<T>>& shared, int64_t run, const Compute<T>* behind,
                int64_t first, int64_t pixels, bool far) {
  using C = Compute<T>;
  const T* x = static_cast<const T*>(p.x) + first * p.in_channels;
  T* grad_x = static_cast<T*>(p.grad_x) + first * p.in_channels;
  for_channel_blocks<C>(p.in_channels, [&](auto lanes, auto vectors, int64_t channel, auto valid) {
    constexpr int N = decltype(lanes)::value, J = decltype(vectors)::value;
    AffinePreluLanes<C, N> normalise[J];
    NormSumLanes<C, N> sums[J];
    for (int j = 0; j < J; ++j) {
      normalise[j] = shared.normalise.template at<N>(channel + j * N);
      sums[j] = shared.sums.template at<N>(channel + j * N);
    }
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t at = i * p.in_channels + channel;
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        const auto v = load_first<N>(x + at + j * N, valid), g = load_first<N>(behind + at + j * N, valid);
        store_rows<N>(grad_x + at + j * N, sums[j].add(g, normalise[j].affine(v), v, normalise[j].slope), valid, far);
      }
    }
    for (int j = 0; j < J; ++j) shared.sums.add(run, channel + j * N, sums[j], valid);
  });
  if (far) finish_far_stores();
}

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Shared<C> shared(p, memory);
  const PixelRuns runs = runs_of(p);
  const PointwiseWeights weights = weights_of(p);
  const bool far = p.normalise.scale && is_far(static_cast<T*>(p.grad_x), p.pixels, p.in_channels);
  for (int64_t run = begin; run < end; ++run) {
    C* weight_sums = shared.weight_sums + run * weight_size(p);
    if (p.grad_weight) fill_zero(weight_sums, weight_size(p));
    if (p.normalise.scale) shared.sums.begin(run, 0, p.in_channels);
    runs.for_chunks(run, [&](int64_t first, int64_t pixels, int64_t next) {
      const int64_t out_at = first * p.out_channels, in_at = first * p.in_channels;
      const T *grad = static_cast<const T*>(p.grad) + out_at, *out = static_cast<const T*>(p.out) + out_at;
      const T* x = static_cast<const T*>(p.x) + in_at;
      Ahead ahead;  // of what is overwritten too: the machine reads lines before it writes to them
      if (p.grad_x && !far) {
        ahead.add(static_cast<const T*>(p.grad_x) + in_at + pixels * p.in_channels, next * p.in_channels);
      }
      ahead.add(grad + pixels * p.out_channels, next * p.out_channels);
      ahead.add(out + pixels * p.out_channels, next * p.out_channels);
      ahead.add(x + pixels * p.in_channels, next * p.in_channels);
      ahead.over((p.grad_weight && p.grad_x ? 2 : 1) * pixels * p.out_channels * weights.out);
      const PixelRows<C> gradient = norm_gradient_rows(shared.norm, grad, out, p.out_channels, pixels, Slot::map);
      if (p.grad_weight) {
        const PixelRows<C> z = input_rows(shared.normalise, p.normalise, x, p.in_channels, pixels, Slot::rows);
        add_weight_gradient(p, weight_sums, gradient, z, pixels, &ahead);
      }
      if (!p.grad_x) return;
      if (p.normalise.scale) {
        C* behind = static_cast<C*>(scratch(Slot::tile, pixels * p.in_channels * static_cast<int64_t>(sizeof(C))));
        multiply_pixels<C>(weights, shared.weights, gradient.data, gradient.pitch, pixels, Epilogue{}, behind,
                           p.in_channels, &ahead);
        pass_prelu<T>(p, shared, run, behind, first, pixels, far);
      } else {
        Epilogue epilogue{};
        if (p.residual) epilogue.residual = static_cast<const T*>(p.residual) + in_at;
        multiply_pixels<T>(weights, shared.weights, gradient.data, gradient.pitch, pixels, epilogue,
                           static_cast<T*>(p.grad_x) + in_at, p.in_channels, &ahead);
      }
    });
  }
}

void run(const Problem& p, void* memory, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, memory, begin, end); });
}

void after(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    const Shared<C> shared(p, memory);
    const int64_t count = runs_of(p).count;
    if (p.grad_weight) sum_in_order(static_cast<T*>(p.grad_weight), shared.weight_sums, count, weight_size(p));
    if (p.normalise.scale && p.grad_x) shared.sums.merge(p.sums, count);
  });
}

}  // namespace

extern const Kernel<Problem> normalised_pointwise_backward = {carved_bytes<Shared>, before, units, run, after};

}  // namespace espk::ESPK_ISA
