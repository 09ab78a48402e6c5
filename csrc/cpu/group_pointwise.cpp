// Group pointwise convolution with its epilogue, one matrix product a group and chunk of pixels: pixels x weights in
// channels_last, weights x planes in contiguous. Bytes: M read + N written a pixel; multiply-adds: M*N/groups a pixel.
#include "kernels.h"
#include "pointwise_weights.h"
#include "row.h"

namespace espk::ESPK_ISA {
namespace {

constexpr int64_t kNearBytes = 768 * 1024;  // a map that the second-level cache holds

PointwiseWeights weights_of(const GroupPointwise& p) {
  return {p.type,
          p.layout == Layout::channels_last,
          p.groups,
          p.in_channels / p.groups,
          p.out_channels / p.groups,
          p.weight_transposed,
          p.bfloat16};
}

// In channels_last the batch is one long image: pixels lie in one row. A chunk is a run of pixels of one image. A unit is a
// chunk of one part of the channels: one group, all groups where they are narrow or multiplied in pairs, or for a few pixels,
// as a classifier has them, a part of one group's outputs.
struct Chunks {
  int64_t images, pixels, size, count;  // count a whole image
  int64_t parts;                        // of all channels
  bool cut;                             // a part is one block of packed columns
  bool part_by_part;

  template <class C>
  static Chunks of(const GroupPointwise& p) {
    Chunks chunks(p);
    const PointwiseWeights weights = weights_of(p);
    chunks.parts = weights.is_narrow<C>() || weights.in_pairs() ? 1 : p.groups;
    chunks.cut = weights.pixels && p.groups == 1 && chunks.pixels < 8;
    if (chunks.cut) {
      chunks.parts = 0;
      for_column_blocks<C>(weights.out, kMostVectors, [&](int64_t, int64_t, int, int64_t) { ++chunks.parts; });
    }
    return chunks;
  }

  int64_t units() const { return images * count * parts; }

  struct Unit {
    int64_t image, chunk, part;
  };
  // All parts of a chunk in turn, which read the same lines; or where the weights outweigh the map, all chunks of a part,
  // so that a thread reads few of the weights, which another one has prepared.
  Unit at(int64_t unit) const {
    const int64_t all = images * count, part = part_by_part ? unit / all : unit % parts;
    const int64_t chunk = part_by_part ? unit % all : unit / parts;
    return {chunk / count, chunk % count, part};
  }

 private:
  explicit Chunks(const GroupPointwise& p) {
    const bool last = p.layout == Layout::channels_last;
    images = last ? 1 : p.batch;
    pixels = last ? p.batch * p.pixels : p.pixels;
    // Enough units for many threads, rows that fill register blocks, and a chunk that stays in the first-level cache.
    const int64_t wanted = ceil_div(pixels * images * p.groups, 64);
    size = last ? least(most(round_up(wanted, 12), 24), 96) : least(most(round_up(wanted, 48), 48), 192);
    count = ceil_div(pixels, size);
    part_by_part = p.out_channels / p.groups > images * pixels;
  }
};

int64_t shared_bytes(const GroupPointwise& p) { return weights_of(p).bytes(); }

void before(const GroupPointwise& p, void* shared) { weights_of(p).prepare(p.weight, shared); }

int64_t units(const GroupPointwise& p) {
  return with_type(p.type,
                   [&](auto* type) { return Chunks::of<Compute<std::remove_pointer_t<decltype(type)>>>(p).units(); });
}

void run_pairs(const GroupPointwise& p, const void* shared, int64_t begin, int64_t end) {
  const Chunks chunks = Chunks::of<float>(p);
  const PointwiseWeights weights = weights_of(p);
  for (int64_t unit = begin; unit < end; ++unit) {
    const auto [image, chunk, part] = chunks.at(unit);
    const int64_t first = chunk * chunks.size;
    const int64_t first_column = chunks.cut ? packed_block<float>(p.out_channels, part) : 0;
    const int64_t end_column = chunks.cut ? packed_block<float>(p.out_channels, part + 1) : weights.out;
    Bfloat16Product product =
        weights.pairs(least(chunks.size, chunks.pixels - first), p.groups, end_column - first_column);
    product.a = static_cast<const uint16_t*>(p.x) + first * p.in_channels;
    product.a_row = p.in_channels;
    product.b = static_cast<const uint16_t*>(shared) + first_column * weights.in;
    const int64_t at = first * p.out_channels + first_column;
    product.out = static_cast<uint16_t*>(p.out) + at;
    product.out_row = p.out_channels;
    set_parameters(product, p.epilogue, first_column);
    if (p.epilogue.residual) product.residual = static_cast<const uint16_t*>(p.epilogue.residual) + at;
    p.bfloat16->multiply(product);
  }
}

template <class T>
void run_type(const GroupPointwise& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Chunks chunks = Chunks::of<C>(p);
  const PointwiseWeights weights = weights_of(p);
  const bool pixels = weights.pixels, is_narrow = weights.is_narrow<C>();
  const NarrowGroups<C> narrow = weights.narrow<C>();
  for (int64_t unit = begin; unit < end; ++unit) {
    const auto [image, chunk, part] = chunks.at(unit);
    const int64_t first = chunk * chunks.size, count = least(chunks.size, chunks.pixels - first);
    const int64_t group = chunks.cut || is_narrow ? 0 : part;
    const int64_t first_column = chunks.cut ? packed_block<C>(p.out_channels, part) : 0;
    const int64_t end_column = chunks.cut ? packed_block<C>(p.out_channels, part + 1) : weights.out;
    const int64_t in = is_narrow ? p.in_channels : weights.in;
    const int64_t out = is_narrow ? p.out_channels : end_column - first_column;
    const C* packed = static_cast<const C*>(shared) + group * weights.group_size<C>() + first_column * weights.in;
    // One row of `map` is a pixel, or a plane.
    const T* map = static_cast<const T*>(p.x) + (pixels ? first * p.in_channels + group * in
                                                        : (image * p.in_channels + group * in) * chunks.pixels + first);
    const int64_t rows = pixels ? count : in, columns = pixels ? in : count;
    int64_t row = pixels ? p.in_channels : chunks.pixels;
    const C* values;
    if constexpr (std::is_same_v<T, C>) {
      values = map;
    } else {
      C* copy = static_cast<C*>(scratch(Slot::map, rows * columns * static_cast<int64_t>(sizeof(C))));
      for (int64_t i = 0; i < rows; ++i) copy_row(copy + i * columns, map + i * row, columns);
      values = copy;
      row = columns;
    }
    MatrixProduct<C> product{};
    product.depth = weights.in;
    if (pixels) {
      product.rows = count;
      product.columns = out;
      product.a = values;
      product.a_row = row;
      product.a_depth = 1;
      product.b = packed;
      product.b_packed = true;
    } else {
      product.rows = out;
      product.columns = count;
      product.a = packed;
      product.a_packed = true;
      product.b = values;
      product.b_depth = row;
    }
    // Groups read a chunk that comes from afar piece by piece, so each fetches its share of the next one.
    Ahead ahead;
    const int64_t map_bytes = chunks.pixels * p.in_channels * static_cast<int64_t>(sizeof(T));
    if (pixels && chunks.parts > 1 && (p.part_of_far_map || map_bytes > kNearBytes)) {
      const int64_t next = least(chunks.size, chunks.pixels - first - count) * p.in_channels;
      const int64_t from = next * part / chunks.parts, to = next * (part + 1) / chunks.parts;
      ahead.add(static_cast<const T*>(p.x) + (first + count) * p.in_channels + from, to - from);
      ahead.over(count * weights.in * out);
      product.ahead = &ahead;
    }
    const int64_t channel = group * weights.out + first_column;
    set_epilogue(product, p.epilogue, channel, pixels);
    const int64_t at =
        pixels ? first * p.out_channels + channel : (image * p.out_channels + channel) * chunks.pixels + first;
    const T* residual = p.epilogue.residual ? static_cast<const T*>(p.epilogue.residual) + at : nullptr;
    multiply_into(product, static_cast<T*>(p.out) + at, residual, pixels ? p.out_channels : chunks.pixels,
                  is_narrow ? &narrow : nullptr);
  }
}

void run(const GroupPointwise& p, void* shared, int64_t begin, int64_t end) {
  if (weights_of(p).in_pairs()) return run_pairs(p, shared, begin, end);
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, shared, begin, end); });
}

}  // namespace

extern const Kernel<GroupPointwise> group_pointwise = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
