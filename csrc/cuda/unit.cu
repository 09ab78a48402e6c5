// Which rectangle of its result a block of the unit's kernel takes, whether there is one that fits, and its start.
//
// Bytes with the reduction inside: M read (the halo again) + N written a pixel (+ N for a residual); without: d instead
// of M. Multiply-adds a pixel: M*d/reduce_groups for each pixel of the window, 9*K*d, and K*d*N/groups.
#include "unit.cuh"
#include "unit.h"

namespace espk::cuda {
namespace {

// A pixel of the window is computed or read for the halos of several blocks. Reducing it more than three times costs
// more than writing the reduced map and reading it back; reading it is cheaper.
constexpr int64_t kMostReduced = 3, kMostRead = 6;

struct UnitPlan {
  PyramidShape shape;
  Window window;
  UnitMemory memory;
  int threads, padded, staged_outputs;
  bool fits;
};

UnitMemory memory_of(const Unit& u, const UnitPlan& plan) {
  const int64_t element = bytes_of(u.type), compute = u.type == Type::float64 ? 8 : 4, pad = 16;
  const int64_t warps = plan.threads / 32;
  auto next = [](int64_t bytes) { return round_up(bytes, 128); };
  UnitMemory m{};
  const int64_t pixel = plan.padded * element + pad;
  m.branch_weights = next(int64_t{plan.window.rows} * plan.window.columns * pixel);
  m.concatenated = m.branch_weights + next(12 * plan.padded * compute);
  m.expand_weight = m.concatenated + next(round_up(plan.shape.cut.rows * plan.shape.cut.columns, 16) * pixel);
  const int64_t depth = round_up(u.channels / (u.groups / u.branches), 16);
  int64_t end = m.expand_weight + next(plan.staged_outputs * (depth * element + pad));
  if (u.reduces()) {
    m.reduce_weight = next(16 * warps * (128 + pad));
    end = most(end, m.branch_weights + m.reduce_weight + next(32 * (128 + pad)));
  }
  m.patches = end;
  m.centers = m.patches + warps * kUnitColumns * kPatchElements * compute;
  m.total = m.centers + int64_t{plan.shape.cut.rows} * plan.shape.cut.columns * 4;
  return m;
}

UnitPlan plan_of(const Unit& u, int64_t rows, int64_t columns, int threads) {
  UnitPlan plan{};
  const Cut cut = cut_into(least(rows, u.out_height), least(columns, u.out_width), u.channels, u.out_height,
                           u.out_width, u.channels);
  plan.shape = pyramid_plan(u, cut).shape;
  plan.threads = threads;
  plan.padded = static_cast<int>(round_up(u.channels, 16));
  const int64_t pitch = plan.padded + 16 / bytes_of(u.type), vectors = plan.padded / kCarriedChannels;
  plan.window = input_window(u, plan.shape);
  plan.window.channels = plan.padded;
  plan.window.column_step = static_cast<int>(pitch);
  plan.window.row_step = static_cast<int>(plan.window.columns * pitch);
  plan.window.channel_step = 1;
  const int64_t pixels = int64_t{cut.rows} * cut.columns;
  const int64_t inside = least(plan.window.rows, u.height) * least(plan.window.columns, u.width);
  const int64_t most_seen = (u.reduces() ? kMostReduced : kMostRead) * u.stride * u.stride;
  plan.fits = vectors <= threads && ceil_div(pixels, threads / vectors) <= kCarried && inside <= most_seen * pixels;
  for (int outputs : {64, 32}) {
    plan.staged_outputs = outputs;
    plan.memory = memory_of(u, plan);
    if (plan.memory.total <= kSharedForTwo) break;
  }
  plan.fits = plan.fits && plan.memory.total <= shared_memory_limit();
  return plan;
}

// The first rectangle, from large to small, of which there are enough for the device and two find room on a
// multiprocessor; else the smallest that fits.
UnitPlan choose(const Unit& u) {
  UnitPlan best{};
  // A channel of one branch to each group: see unit.cuh. Fragments of two groups must not share a step of 16.
  const int64_t groups_a_branch = u.groups / u.branches;
  if (u.groups % u.branches != 0 || u.channels % groups_a_branch != 0) return best;
  if (groups_a_branch > 1 && u.channels / groups_a_branch % 16 != 0) return best;
  struct Rectangle {
    int rows, columns, threads;
  };
  for (const Rectangle r : {Rectangle{16, 16, 256}, {8, 16, 256}, {8, 8, 256}, {8, 8, 128}, {4, 8, 128}, {4, 4, 128}}) {
    if (u.type == Type::float64 && r.threads != 128) continue;
    const UnitPlan plan = plan_of(u, r.rows, r.columns, r.threads);
    if (!plan.fits) continue;
    best = plan;
    if (plan.shape.blocks >= enough_blocks() && plan.memory.total <= kSharedForTwo) break;
  }
  return best;
}

template <class T>
Pooling<T> pooling_of(const Unit& u) {
  Pooling<T> pooling{};
  pooling.map = static_cast<const T*>(u.pooled_map);
  pooling.strides = strides_of(u.layout, u.pooled_channels, u.height, u.width);
  pooling.channels = u.pooled_channels;
  pooling.out = output_of<T>(u.out, u.layout, {nullptr, nullptr, u.epilogue.slope, nullptr}, u.whole_channels,
                             u.out_height * u.out_width);
  pooling.out.shortcut = shortcut_of(u);
  return pooling;
}

template <class T>
Outcome run_typed(const Unit& u, const UnitPlan& plan, void* stream) {
  UnitParams<T> p{};
  p.x = static_cast<const T*>(u.x);
  p.reduce_weight = static_cast<const T*>(u.reduce_weight);
  p.weight = static_cast<const T*>(u.weight);
  p.expand_weight = static_cast<const T*>(u.pointwise_weight);
  p.reduce = u.reduce_epilogue;
  p.pyramid = u.pyramid_epilogue;
  const int64_t out_pixels = u.out_height * u.out_width;
  p.out = output_of<T>(u.out, u.layout, u.epilogue, u.whole_channels, out_pixels, u.first_channel);
  p.out.shortcut = shortcut_of(u);
  p.out.vectors &= u.pointwise_channels / u.groups % kWidest<T> == 0;
  p.pooling = pooling_of<T>(u);
  p.shape = plan.shape;
  p.source = strides_of(u.layout, u.in_channels, u.height, u.width);
  p.window = plan.window;
  p.memory = plan.memory;
  p.in_channels = u.in_channels;
  p.reduce_groups = u.reduces() ? u.reduce_groups : 1;
  p.groups_a_branch = static_cast<int>(u.groups / u.branches);
  p.outputs = u.pointwise_channels / u.groups;
  p.depth = u.channels / p.groups_a_branch;
  p.padded = plan.padded;
  p.staged_outputs = plan.staged_outputs;
  const bool vectors = u.layout == Layout::channels_last && aligned(u.x, 16);
  p.vector_fill = vectors && u.channels % kWidest<T> == 0;
  p.vector_reduce = vectors && u.in_channels / p.reduce_groups % kWidest<T> == 0;
  p.vector_expand = Factor<T>{p.expand_weight, p.depth, 1}.vectors();
  auto start = [&](auto traits) {
    using Traits = decltype(traits);
    return launch("unit", unit_kernel<T, Traits>, plan.shape.blocks, Traits::threads, plan.memory.total, stream, p);
  };
  if constexpr (std::is_same_v<T, double>) {
    return start(UnitTraits<128, 1>{});
  } else {
    return plan.threads == 256 ? start(UnitTraits<256, 2>{}) : start(UnitTraits<128, 4>{});
  }
}

Outcome run_one_kernel(const Unit& u, const UnitPlan& plan, void* stream) {
  return with_factor_type(
      u.type, u.tf32, [&](auto* type) { return run_typed<std::remove_pointer_t<decltype(type)>>(u, plan, stream); });
}

Outcome run_pooling(const Unit& u, void* stream) {
  if (!u.pooled_map) return {};
  return with_type(u.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Cut cut =
        cut_into(least(8, u.out_height), least(16, u.out_width), u.channels, u.out_height, u.out_width, u.channels);
    const PoolParams<T> params{pooling_of<T>(u), pyramid_plan(u, cut).shape};
    return launch("average_pool", pool_kernel<T>, params.shape.blocks, 256, 0, stream, params);
  });
}

// The steps of a unit that is no single kernel, as problems of other kernels.
GroupPointwise reduction_of(const Unit& u, void* reduced) {
  GroupPointwise r = u.reduction();
  r.out = reduced;
  return r;
}

Unit without_reduction(const Unit& u, const void* reduced) {
  Unit rest = u;
  rest.x = reduced;
  rest.in_channels = u.channels;
  rest.reduce_weight = nullptr;
  return rest;
}

SpatialPyramid pyramid_of(const Unit& u, void* concatenated) {
  SpatialPyramid p{};
  static_cast<Pyramid&>(p) = u;
  p.x = u.x;
  p.weight = u.weight;
  p.epilogue = u.pyramid_epilogue;
  p.out = concatenated;
  return p;
}

GroupPointwise expansion_of(const Unit& u, const void* concatenated) {
  GroupPointwise e{};
  e.type = u.type;
  e.layout = u.layout;
  e.batch = u.batch;
  e.pixels = u.out_height * u.out_width;
  e.in_channels = u.out_channels();
  e.out_channels = u.pointwise_channels;
  e.groups = u.groups;
  e.x = concatenated;
  e.weight = u.pointwise_weight;
  e.out = u.out;
  e.epilogue = u.epilogue;
  e.tf32 = u.tf32;
  return e;
}

int64_t reduced_bytes(const Unit& u) {
  return round_up(u.batch * u.channels * u.height * u.width * bytes_of(u.type), 256);
}

}  // namespace

int64_t unit_scratch_bytes(const Unit& u) {
  if (choose(u).fits) return 0;
  if (u.reduces()) return reduced_bytes(u) + unit_scratch_bytes(without_reduction(u, nullptr));
  return u.batch * u.out_channels() * u.out_height * u.out_width * bytes_of(u.type);
}

Outcome run_unit(const Unit& u, void* scratch, void* stream) {
  const UnitPlan plan = choose(u);
  if (plan.fits) return run_one_kernel(u, plan, stream);
  if (u.reduces()) {
    const Outcome reduced = group_pointwise.run(reduction_of(u, scratch), nullptr, stream);
    if (reduced.failed()) return reduced;
    return run_unit(without_reduction(u, scratch), static_cast<char*>(scratch) + reduced_bytes(u), stream);
  }
  const Outcome pooled = run_pooling(u, stream);
  if (pooled.failed()) return pooled;
  const Outcome concatenated = spatial_pyramid.run(pyramid_of(u, scratch), nullptr, stream);
  if (concatenated.failed()) return concatenated;
  return run_group_pointwise(expansion_of(u, scratch), shortcut_of(u), u.whole_channels, u.first_channel, stream);
}

}  // namespace espk::cuda
