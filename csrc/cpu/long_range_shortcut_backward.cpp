// The gradients of the end of a down-sampler. Sums over pixels are two-stage, in order; those of the image go over the
// channels of a pixel. Bytes: 2*N + I read + N + I written a pixel; multiply-adds: 3*N*(I + 2) a pixel. channels_last.
#include "channel_sums.h"
#include "far_map.h"
#include "joined_maps.h"
#include "kernels.h"
#include "pixel_runs.h"
#include "row.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = LongRangeShortcutBackward;

// Sums a channel: with each channel of the image, then alone, then of the slope.
int64_t sum_count(const Problem& p) { return p.image_channels + 2; }

PixelRuns runs_of(const Problem& p) {
  return {p.pixels, 3 * p.channels() * bytes_of(p.type), sum_count(p) * p.channels()};
}

template <class C>
struct Shared {
  JoinedVectors<C> vectors;
  int64_t pitch;  // from sum to sum
  double* sums;  // of each run
  int64_t bytes;

  Shared(const Problem& p, void* memory) : Shared(p, Carving(memory)) {}

  double* of(const Problem& p, int64_t run, int64_t sum) const { return sums + (run * sum_count(p) + sum) * pitch; }

 private:
  Shared(const Problem& p, Carving memory)
      : vectors(p, memory),
        pitch(padded<double>(padded<C>(p.channels()))),
        sums(memory.take<double>(runs_of(p).count * sum_count(p) * pitch)),
        bytes(memory.bytes()) {}
};

void before(const Problem& p, void* memory) {
  with_type(p.type,
            [&](auto* type) { Shared<Compute<std::remove_pointer_t<decltype(type)>>>(p, memory).vectors.fill(p); });
}

int64_t units(const Problem& p) { return runs_of(p).count; }

// One part's channels of `pixels` pixels. `behind_image` has a vector of kLanes for each pixel and channel of the image,
// whose lanes add up to the gradient there.
template <class T>
void run_part(const Problem& p, const Shared<Compute<T>>& shared, const JoinedPart<T>& part, int64_t run, int64_t first,
              int64_t pixels, Compute<T>* behind_image) {
  using C = Compute<T>;
  const JoinedVectors<C>& vectors = shared.vectors;
  const int64_t images = p.image_channels;
  const bool far = part.grad && is_far(part.grad, p.pixels, part.channels);
  for_channel_blocks<C>(part.channels, [&](auto lanes, auto count, int64_t channel, auto valid) {
    constexpr int N = decltype(lanes)::value, J = decltype(count)::value;
    using V = Vector<C, N>;
    const int64_t in_result = part.first + channel;
    V with_image[kMostImageChannels][J], alone[J], of_slope[J], slope[J];
    for (int j = 0; j < J; ++j) {
      for (int64_t k = 0; k < images; ++k) with_image[k][j] = V{};
      alone[j] = of_slope[j] = V{};
      slope[j] = load<N>(vectors.slope + in_result + j * N);
    }
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t at = (first + i) * part.channels + channel;
      const T* grad = static_cast<const T*>(p.grad) + (first + i) * p.channels() + in_result;
      if (i + kPixelsAhead < pixels) {
        fetch_ahead<N, J>(part.map + at, part.channels);
        fetch_ahead<N, J>(grad, p.channels());
      }
      const ImagePixel<T> image(p, first + i);
      V between[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        const V v = joined<N>(vectors, images, image, in_result + j * N, load_first<N>(part.map + at + j * N, valid));
        const V g = load_first<N>(grad + j * N, valid);
        of_slope[j] += v > V{} ? V{} : g * v;
        between[j] = v > V{} ? g : g * slope[j];
        alone[j] += between[j];
        if (part.grad) store_rows<N>(part.grad + at + j * N, between[j], valid, far);
      }
      for (int64_t k = 0; k < images; ++k) {
        C* sums = behind_image + (i * images + k) * kLanes<C>;
        V sum = load<N>(sums);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
          with_image[k][j] += between[j] * image.values[k];
          sum += between[j] * load<N>(vectors.weight + k * vectors.pitch + in_result + j * N);
        }
        store<N>(sums, sum);
      }
    }
    for (int j = 0; j < J; ++j) {
      const int64_t to = in_result + j * N;
      for (int64_t k = 0; k < images; ++k) add_to<C, N>(shared.of(p, run, k) + to, with_image[k][j], valid);
      add_to<C, N>(shared.of(p, run, images) + to, alone[j], valid);
      add_to<C, N>(shared.of(p, run, images + 1) + to, of_slope[j], valid);
    }
  });
  if (far) finish_far_stores();
}

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Shared<C> shared(p, memory);
  const PixelRuns runs = runs_of(p);
  const JoinedPart<T> parts[] = {
      {static_cast<const T*>(p.pooled), static_cast<T*>(p.grad_pooled), p.pooled_channels, 0},
      {static_cast<const T*>(p.expanded), static_cast<T*>(p.grad_expanded), p.expanded_channels, p.pooled_channels}};
  for (int64_t run = begin; run < end; ++run) {
    for (int64_t i = 0; i < sum_count(p) * shared.pitch; ++i) shared.of(p, run, 0)[i] = 0;
    runs.for_chunks(run, [&](int64_t first, int64_t pixels, int64_t) {
      const int64_t count = pixels * p.image_channels;
      C* behind_image = static_cast<C*>(scratch(Slot::map, count * kLanes<C> * static_cast<int64_t>(sizeof(C))));
      fill_zero(behind_image, count * kLanes<C>);
      for (const JoinedPart<T>& part : parts) run_part<T>(p, shared, part, run, first, pixels, behind_image);
      if (!p.grad_image) return;
      T* grad_image = static_cast<T*>(p.grad_image) + first * p.image_channels;
      for (int64_t i = 0; i < count; ++i) {
        C sum = 0;
        for (int lane = 0; lane < kLanes<C>; ++lane) sum += behind_image[i * kLanes<C> + lane];
        store_one(grad_image + i, sum);
      }
    });
  }
}

void run(const Problem& p, void* memory, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, memory, begin, end); });
}

void after(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    const Shared<Compute<std::remove_pointer_t<decltype(type)>>> shared(p, memory);
    for (int64_t sum = 0; sum < sum_count(p); ++sum) {
      const int64_t with = sum - p.image_channels;
      double* to = with < 0 ? p.grad_weight + sum * p.channels() : with == 0 ? p.grad_shift : p.grad_slope;
      for (int64_t i = 0; i < p.channels(); ++i) to[i] = 0;
      for (int64_t run = 0; run < runs_of(p).count; ++run) {
        for (int64_t i = 0; i < p.channels(); ++i) to[i] += shared.of(p, run, sum)[i];
      }
    }
  });
}

}  // namespace

extern const Kernel<Problem> long_range_shortcut_backward = {carved_bytes<Shared>, before, units, run, after};

}  // namespace espk::ESPK_ISA
