// The branches of efficient pyramid pooling and their merge, a 3x3 convolution in groups: rows of all branches are made, a
// few at a time and in a panel of vectors, where the merge reads them, so that none of them is ever a map.
// Bytes: C read + C written a pixel, and the branches below the size of the map, which are maps; multiply-adds: 9*C*S a pixel,
// and those of the branches.
#include "depthwise_taps.h"
#include "pooled_branch.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = PyramidPooling;

// Each strip makes two rows that others make too; one for each thread.
Strips strips_of(const Problem& p) { return choose_strips(p.height, 0, 2, p.batch, most(p.threads, 1)); }

int64_t units(const Problem& p) { return p.batch * strips_of(p).count; }

// What the calls share: the weights of the merge, and what is prepared of each branch. Without memory it counts bytes.
template <class C>
struct Shared {
  FlatWeights<C> merge;
  SharedBranch<C> branch[kMaxBranches];
  int64_t bytes;

  Shared(const Problem& p, void* given) {
    Carving memory(given);
    merge = FlatWeights<C>::of_channels(9 * p.branches(), p.row(), p.channels(), memory);
    for (int64_t k = 0; k < p.branches(); ++k) branch[k] = SharedBranch<C>(p, p.branch[k], memory);
    bytes = memory.bytes();
  }
};

void before(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Shared<Compute<T>> shared(p, memory);
    shared.merge.fill_filters(static_cast<const T*>(p.weight), p.branches(), p.channels(), p.epilogue);
    for (int64_t k = 0; k < p.branches(); ++k) PooledRows<T>(p, p.branch[k], shared.branch[k]).prepare();
  });
}

// One thread's strips. Of each branch as many rows are made as the merge then has sums of, and the last two of them kept.
template <class T>
class PooledStrips {
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;
  // Two more to read: a strip's first sums begin at the third row, and each time the rows for eight of them are read.
  static constexpr int64_t kKept = 2, kRows = kKept + kFlatRows + 2;

 public:
  PooledStrips(const Problem& problem, void* memory)
      : p_(problem),
        shared_(problem, memory),
        strips_(strips_of(problem)),
        vectors_(ceil_div(p_.row(), N)),
        beside_(ceil_div(p_.channels(), N)),
        panel_(flat_panel(vectors_, N, p_.channels())),
        pitch_(flat_pitch<C>((panel_ + 2 * beside_) * N)) {}

  void run(int64_t unit) const {
    const int64_t image = unit / strips_.count, first = unit % strips_.count * strips_.rows;
    const int64_t end = least(first + strips_.rows, p_.height);
    for (int64_t vector = 0; vector < vectors_ && first < end; vector += panel_) {
      run_panel(image, first, end, vector, least(vector + panel_, vectors_));
    }
  }

 private:
  // Rows [first, end) of vectors [left, right).
  void run_panel(int64_t image, int64_t first, int64_t end, int64_t left, int64_t right) const {
    const FlatRows<C> branches{numbers(Slot::tile, p_.branches() * kRows * pitch_), (left - beside_) * N, pitch_};
    fill_zero(branches.numbers, p_.branches() * kRows * pitch_);
    const int64_t resized_size = 2 * PooledRows<T>::resized_pitch(panel_ + 2 * beside_, p_.channels());
    C* resized_rows = numbers(Slot::results, p_.branches() * resized_size);
    ResizedRows<C> resized[kMaxBranches];
    for (int64_t k = 0; k < p_.branches(); ++k) resized[k].numbers = resized_rows + k * resized_size;
    T* out = static_cast<T*>(p_.out) + image * p_.height * p_.row();

    int64_t summed = first;
    for (int64_t row = first - 1; row <= end; row += kFlatRows) {
      const int64_t made = least(row + kFlatRows, end + 1);
      for (int64_t k = 0; k < p_.branches(); ++k) {
        const int64_t place = k * kRows;
        const C* kept = branches.at(place + kFlatRows, branches.origin);
        if (row >= first) copy_row(branches.at(place, branches.origin), kept, kKept * pitch_);
        PooledPart<C> part{most(row, 0), least(made, p_.height), most(left - beside_, 0),
                           least(right + beside_, vectors_), branches};
        part.to.numbers = branches.at(place + kKept + part.row - row, branches.origin);
        if (part.row < part.end_row) PooledRows<T>(p_, p_.branch[k], shared_.branch[k]).fill(part, image, resized[k]);
        if (made > p_.height) fill_zero(branches.at(place + kKept + p_.height - row, branches.origin), pitch_);
      }
      // The first row's taps begin one row above it.
      const FlatRows<C> touched{branches.at(summed - row + 1, branches.origin), branches.origin, pitch_};
      const FlatRows<T> to{out + summed * p_.row(), 0, p_.row()};
      sweep_flat<3, 2, 0>(touched, p_.branches(), kRows * pitch_, 1, p_.channels(), shared_.merge,
                          FlatSums<T>{to, left, right, made - 1 - summed, p_.row()});
      summed = made - 1;
    }
  }

  static C* numbers(Slot slot, int64_t count) {
    return static_cast<C*>(scratch(slot, count * static_cast<int64_t>(sizeof(C))));
  }

  const Problem& p_;
  const Shared<C> shared_;
  const Strips strips_;
  const int64_t vectors_, beside_, panel_;  // vectors of a row, of what taps reach beside a panel, and of a panel
  const int64_t pitch_;
};

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    const PooledStrips<std::remove_pointer_t<decltype(type)>> strips(p, shared);
    for (int64_t unit = begin; unit < end; ++unit) strips.run(unit);
  });
}

}  // namespace

extern const Kernel<Problem> pyramid_pooling = {carved_bytes<Shared, Problem>, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
