#include "channel_sums.h"

namespace espk::ESPK_ISA {
namespace {

// P pixels side by side of J vectors: enough sums that none waits for another.
template <class C, int N, int P, int J, bool Partial, class T>
void add_block(double* sums, double* squared, const T* origin, const T* map, int64_t pitch, int64_t pixels,
               int64_t valid) {
  using V = Vector<C, N>;
  auto numbers = [&](const T* from) { return Partial ? load_first<N>(from, valid) : load<N>(from); };
  constexpr int64_t kTogether = 64;  // pixels summed in the compute type
  for (int64_t first = 0; first < pixels; first += kTogether) {
    const int64_t end = least(first + kTogether, pixels);
    V sum[P][J], square[P][J], center[J];
    for (int j = 0; j < J; ++j) center[j] = numbers(origin + j * N);
    for (int p = 0; p < P; ++p) {
      for (int j = 0; j < J; ++j) sum[p][j] = square[p][j] = V{};
    }
    int64_t i = first;
    for (; i + P <= end; i += P) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
          const V v = numbers(map + (i + p) * pitch + j * N) - center[j];
          sum[p][j] += v;
          square[p][j] += v * v;
        }
      }
    }
    for (; i < end; ++i) {
      for (int j = 0; j < J; ++j) {
        const V v = numbers(map + i * pitch + j * N) - center[j];
        sum[0][j] += v;
        square[0][j] += v * v;
      }
    }
    for (int j = 0; j < J; ++j) {
      for (int p = 1; p < P; ++p) {
        sum[0][j] += sum[p][j];
        square[0][j] += square[p][j];
      }
      if constexpr (Partial) {
        add_to<C, N>(sums, sum[0][j], valid);
        add_to<C, N>(squared, square[0][j], valid);
      } else {
        add_to<C, N>(sums + j * N, sum[0][j]);
        add_to<C, N>(squared + j * N, square[0][j]);
      }
    }
  }
}

}  // namespace

template <class C>
void PieceMoments<C>::begin(int64_t piece, int64_t first, int64_t channels) const {
  for (int64_t i = 0; i < channels; ++i) mean(piece)[first + i] = squares(piece)[first + i] = 0;
}

template <class C>
template <class T>
void PieceMoments<C>::add(int64_t piece, int64_t first, int64_t channels, const T* origin, const T* map, int64_t pitch,
                          int64_t pixels) const {
  for_channel_blocks<C>(channels, [&](auto lanes, auto vectors, int64_t channel, auto valid) {
    constexpr int N = decltype(lanes)::value, J = decltype(vectors)::value;
    double *sums = mean(piece) + first + channel, *squared = squares(piece) + first + channel;
    if (valid < N)
      return add_block<C, N, 4, 1, true>(sums, squared, origin + channel, map + channel, pitch, pixels, valid);
    if constexpr (J == 1) {
      add_block<C, N, 4, 1, false>(sums, squared, origin + channel, map + channel, pitch, pixels, valid);
    } else {
      add_block<C, N, 1, J, false>(sums, squared, origin + channel, map + channel, pitch, pixels, valid);
    }
  });
}

template <class C>
template <class T>
void PieceMoments<C>::finish(int64_t piece, int64_t first, int64_t channels, const T* origin, int64_t pixels) const {
  for (int64_t i = 0; i < channels; ++i) {
    double &m = mean(piece)[first + i], &s = squares(piece)[first + i];
    s = s - m * m / static_cast<double>(pixels);
    s = s < 0 ? 0 : s;
    m = static_cast<double>(load_one(origin + i)) + m / static_cast<double>(pixels);
  }
}

template <class C>
void PieceSums<C>::begin(int64_t piece, int64_t first, int64_t channels) const {
  for (int s = 0; s < 3; ++s) {
    for (int64_t i = 0; i < channels; ++i) of(piece, s)[first + i] = 0;
  }
}

template <class C>
void PieceSums<C>::merge(const NormSums& to, int64_t pieces) const {
  double* results[3] = {to.grad, to.grad_centred, to.slope};
  for (int s = 0; s < 3; ++s) {
    if (!results[s]) continue;
    for (int64_t i = 0; i < channels_; ++i) results[s][i] = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      for (int64_t i = 0; i < channels_; ++i) results[s][i] += of(piece, s)[i];
    }
  }
  // The kernel's mean is rounded to its type, which a mean far from zero would show.
  for (int64_t i = 0; i < channels_; ++i) {
    to.grad_centred[i] += (static_cast<double>(mean[i]) - to.mean[i]) * to.grad[i];
  }
}

template class PieceSums<float>;
template class PieceSums<double>;
template class PieceMoments<float>;
template class PieceMoments<double>;
template void PieceMoments<float>::add(int64_t, int64_t, int64_t, const float*, const float*, int64_t, int64_t) const;
template void PieceMoments<float>::finish(int64_t, int64_t, int64_t, const float*, int64_t) const;
template void PieceMoments<double>::add(int64_t, int64_t, int64_t, const double*, const double*, int64_t,
                                        int64_t) const;
template void PieceMoments<double>::finish(int64_t, int64_t, int64_t, const double*, int64_t) const;
template void PieceMoments<float>::add(int64_t, int64_t, int64_t, const bfloat16*, const bfloat16*, int64_t,
                                       int64_t) const;
template void PieceMoments<float>::finish(int64_t, int64_t, int64_t, const bfloat16*, int64_t) const;
template void PieceMoments<float>::add(int64_t, int64_t, int64_t, const float16*, const float16*, int64_t,
                                       int64_t) const;
template void PieceMoments<float>::finish(int64_t, int64_t, int64_t, const float16*, int64_t) const;

}  // namespace espk::ESPK_ISA
