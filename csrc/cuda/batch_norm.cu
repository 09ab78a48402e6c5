// The arithmetic of a unit's batch norms between its kernels, on the device: the second stage of their sums, and the few
// numbers a channel that come of them. All in float64; the results are written in the compute type.
#include "channel_sums.cuh"

namespace espk::cuda {
namespace {

// Threads of a block: so many neighbouring channels, and for each so many that share its parts.
constexpr int kChannels = 16, kShares = 32;

template <class C>
struct Params {
  BatchNorm norm;
  const PartSums<C>* sums;
  int64_t parts;
};

// Every share of a channel's parts adds to three sums, and the first share has those of all, added in order.
template <class C, class Add>
__device__ void add_parts(double (&total)[3], const Params<C>& p, int64_t channel, Add add) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), share = thread / kChannels;
  if (channel < p.norm.channels) {
#pragma unroll 4
    for (int64_t part = share; part < p.parts; part += kShares) add(p.sums[part * p.norm.channels + channel]);
  }
  __syncthreads();
  for (int i = 0; i < 3; ++i) shared[i * kChannels * kShares + thread] = total[i];
  __syncthreads();
  if (share > 0) return;
  for (int other = 1; other < kShares; ++other) {
    for (int i = 0; i < 3; ++i) total[i] += shared[i * kChannels * kShares + other * kChannels + thread];
  }
}

template <class C>
__device__ double number(const void* vector, int64_t i) {
  return static_cast<double>(static_cast<const C*>(vector)[i]);
}

template <class C>
__device__ void put(void* vector, int64_t i, double value) {
  if (vector) static_cast<C*>(vector)[i] = static_cast<C>(value);
}

template <class C>
__global__ void __launch_bounds__(kChannels* kShares) take_moments_kernel(const Params<C> p) {
  const BatchNorm& n = p.norm;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t first = int64_t{blockIdx.x} * kChannels; first < n.channels; first += int64_t{gridDim.x} * kChannels) {
    const int64_t channel = first + thread % kChannels;
    const bool there = channel < n.channels;
    double total[3] = {}, around = 0;
    if (p.parts && there) around = static_cast<double>(p.sums[channel].at[1]);
    add_parts(total, p, channel, [&](const PartSums<C>& part) {
      const double pixels = static_cast<double>(part.at[0]), sum = static_cast<double>(part.at[2]);
      const double apart = static_cast<double>(part.at[1]) - around;
      total[0] += pixels;
      total[1] += sum + pixels * apart;
      total[2] += static_cast<double>(part.at[3]) + apart * (2 * sum + pixels * apart);
    });
    if (thread >= kChannels || !there) continue;
    double mean, variance;
    if (p.parts) {
      mean = total[1] / total[0];
      variance = total[2] / total[0] - mean * mean;
      variance = variance < 0 ? 0 : variance;
      mean += around;
    } else {
      mean = n.mean[channel];
      variance = n.variance[channel];
    }
    if (n.found.mean) {
      n.found.mean[channel] = mean;
      n.found.variance[channel] = variance;
    }
    const double scale = number<C>(n.weight, channel) / sqrt(variance + n.eps);
    put<C>(n.scale, channel, scale);
    put<C>(n.shift, channel, number<C>(n.bias, channel) - mean * scale);
    put<C>(n.prelu, channel, n.slope ? number<C>(n.slope, channel) : 1.0);
  }
}

template <class C>
__global__ void __launch_bounds__(kChannels* kShares) take_gradients_kernel(const Params<C> p) {
  const BatchNorm& n = p.norm;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t first = int64_t{blockIdx.x} * kChannels; first < n.channels; first += int64_t{gridDim.x} * kChannels) {
    const int64_t channel = first + thread % kChannels;
    double total[3] = {};
    add_parts(total, p, channel, [&](const PartSums<C>& part) {
      for (int i = 0; i < 3; ++i) total[i] += static_cast<double>(part.at[i]);
    });
    if (thread >= kChannels || channel >= n.channels) continue;
    // The kernels' mean is rounded to their type, which a mean far from zero would show.
    const double mean = n.mean[channel], spread = n.variance[channel] + n.eps, deviation = sqrt(spread);
    const double grad = total[0], centred = total[1] + (static_cast<double>(static_cast<C>(mean)) - mean) * grad;
    put<C>(n.grad_weight, channel, centred / deviation);
    put<C>(n.grad_bias, channel, grad);
    put<C>(n.grad_slope, channel, total[2]);
    const double of_grad = number<C>(n.weight, channel) / deviation, count = static_cast<double>(n.count);
    put<C>(n.of_grad, channel, of_grad);
    if (!n.batch_statistics) continue;
    const double of_map = -of_grad * centred / (count * spread);
    put<C>(n.of_map, channel, of_map);
    put<C>(n.constant, channel, -of_grad * grad / count - of_map * mean);
  }
}

template <class C>
Outcome start(const char* name, void (*kernel)(Params<C>), const BatchNorm& norm, const void* sums, int64_t parts,
              void* stream) {
  return launch(name, kernel, ceil_div(norm.channels, kChannels), kChannels * kShares,
                3 * kChannels * kShares * int64_t{sizeof(double)}, stream,
                Params<C>{norm, static_cast<const PartSums<C>*>(sums), parts});
}

int64_t no_scratch(const BatchNorm&) { return 0; }

Outcome run_known(const BatchNorm& norm, void*, void* stream) { return take_moments(norm, nullptr, 0, stream); }

}  // namespace

Outcome take_moments(const BatchNorm& norm, const void* sums, int64_t parts, void* stream) {
  if (norm.type == Type::float64) return start("take_moments", take_moments_kernel<double>, norm, sums, parts, stream);
  return start("take_moments", take_moments_kernel<float>, norm, sums, parts, stream);
}

Outcome take_gradients(const BatchNorm& norm, const void* sums, int64_t parts, void* stream) {
  if (norm.type == Type::float64) {
    return start("take_gradients", take_gradients_kernel<double>, norm, sums, parts, stream);
  }
  return start("take_gradients", take_gradients_kernel<float>, norm, sums, parts, stream);
}

extern const Kernel<BatchNorm> known_moments = {no_scratch, run_known};

}  // namespace espk::cuda
