// The gradients of bilinear resizing and of means over windows that share a map out. Both are sums over rows, then over
// columns: a pixel gets of each result that reads it that result's gradient times its share. A row of the result is one sum
// of rows, and waits in the cache for the sums of its pixels; shares are found once a call.
// Bytes: the gradient, read as many times as results of a column share a pixel (twice where the map was enlarged), mostly
// from the cache, + C written a pixel.
#include "bilinear.h"
#include "kernels.h"
#include "normalise.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = ResamplingBackward;

// What a result reads along one axis: inputs [first, end), each with a share. Neither ever falls from result to result.
template <class C>
struct Mixed {
  Between<C> at;

  Mixed(int64_t i, int64_t size, int64_t out_size) : at(i, size, out_size) {}
  int64_t first() const { return at.first; }
  int64_t end() const { return at.second + 1; }
  C share_of(int64_t input) const {
    return (input == at.first ? at.share_of_first : C(0)) + (input == at.second ? at.share_of_second : C(0));
  }
};

template <class C>
struct Averaged {
  AdaptiveWindow window;

  Averaged(int64_t i, int64_t size, int64_t out_size) : window(i, size, out_size) {}
  int64_t first() const { return window.first; }
  int64_t end() const { return window.end; }
  C share_of(int64_t) const { return C(1) / static_cast<C>(window.count()); }
};

// The results that read each input along one axis: those from `first` on, as many as it has shares.
template <class C>
struct Readers {
  int64_t *first, *begin;  // [size], [size + 1]: where an input's shares begin
  C* shares;

  // A window reads as many inputs as it has, and at most two more than its part of them.
  Readers(int64_t size, int64_t out_size, Carving& memory)
      : first(memory.take<int64_t>(size)),
        begin(memory.take<int64_t>(size + 1)),
        shares(memory.take<C>(size + 2 * out_size)) {}

  template <class Read>
  void fill(int64_t size, int64_t out_size) const {
    int64_t reader = 0, count = 0;
    for (int64_t i = 0; i < size; ++i) {
      while (reader < out_size && Read(reader, size, out_size).end() <= i) ++reader;
      first[i] = reader;
      begin[i] = count;
      for (int64_t o = reader; o < out_size; ++o) {
        const Read read(o, size, out_size);
        if (read.first() > i) break;
        shares[count++] = read.share_of(i);
      }
    }
    begin[size] = count;
  }
  int64_t count(int64_t i) const { return begin[i + 1] - begin[i]; }
  const C* shares_of(int64_t i) const { return shares + begin[i]; }
};

template <class C>
struct Shared {
  Carving memory;  // ahead of what is taken from it
  Readers<C> rows, columns;
  int64_t bytes;

  Shared(const Problem& p, void* given)
      : memory(given),
        rows(p.height, p.out_height, memory),
        columns(p.width, p.out_width, memory),
        bytes(memory.bytes()) {}
};

// to [numbers] = sum of `count` rows `pitch` apart, each times its share.
template <class T, class To>
inline void sum_rows(To* to, const T* from, int64_t pitch, int64_t numbers, const Compute<T>* shares, int64_t count) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  for_whole_vectors<N>(numbers, [&](int64_t i, int64_t valid) {
    Vector<C, N> sum{};
    for (int64_t k = 0; k < count; ++k) sum += load_first<N>(from + k * pitch + i, valid) * shares[k];
    store_first<N>(to + i, sum, valid);
  });
}

// A unit is a row of one image.
int64_t units(const Problem& p) { return p.batch * p.height; }

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Shared<C> shared(p, memory);
  const int64_t out_row = p.out_width * p.channels;
  C* row = static_cast<C*>(scratch(Slot::rows, out_row * static_cast<int64_t>(sizeof(C))));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / p.height, y = unit % p.height;
    const T* grad = static_cast<const T*>(p.grad) + (image * p.out_height + shared.rows.first[y]) * out_row;
    sum_rows(row, grad, out_row, out_row, shared.rows.shares_of(y), shared.rows.count(y));
    T* to = static_cast<T*>(p.grad_x) + unit * p.width * p.channels;
    if (p.channels == 1) {  // a plane, which has nothing for a vector to run over
      for (int64_t x = 0; x < p.width; ++x) {
        const C *from = row + shared.columns.first[x], *shares = shared.columns.shares_of(x);
        C sum = 0;
        for (int64_t k = 0; k < shared.columns.count(x); ++k) sum += from[k] * shares[k];
        store_one(to + x, sum);
      }
      continue;
    }
    for (int64_t x = 0; x < p.width; ++x, to += p.channels) {
      sum_rows(to, row + shared.columns.first[x] * p.channels, p.channels, p.channels, shared.columns.shares_of(x),
               shared.columns.count(x));
    }
  }
}

template <template <class> class Read>
constexpr Kernel<Problem> kernel = {
    carved_bytes<Shared, Problem>,
    [](const Problem& p, void* memory) {
      with_type(p.type, [&](auto* type) {
        using C = Compute<std::remove_pointer_t<decltype(type)>>;
        const Shared<C> shared(p, memory);
        shared.rows.template fill<Read<C>>(p.height, p.out_height);
        shared.columns.template fill<Read<C>>(p.width, p.out_width);
      });
    },
    units,
    [](const Problem& p, void* memory, int64_t begin, int64_t end) {
      with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, memory, begin, end); });
    },
    nullptr};

}  // namespace

extern const Kernel<Problem> resize_backward = kernel<Mixed>;
extern const Kernel<Problem> adaptive_average_backward = kernel<Averaged>;

}  // namespace espk::ESPK_ISA
