// One EESP unit with its batch norms in training, forward and backward, as a sequence of kernels on one stream: what lies
// between them, maps and numbers of channels, stays in the scratch. Nothing waits for the host.
// Bytes of a residual unit in maps of N channels: forward 7.5, as on the CPU; backward 19.75, where a weight's gradient reads
// its maps for itself (and 1.25 to make the concatenated map again).
#include "launch.cuh"

namespace espk::cuda {
namespace {

// Hands out pieces of the scratch, each aligned to 256 bytes. To count them any address will do that is aligned too and
// not null, which would say that a map is not wanted.
class Carving {
 public:
  explicit Carving(void* memory) : next_(reinterpret_cast<uintptr_t>(memory)), first_(next_) {}
  Carving() : next_(256), first_(next_) {}

  void* take(int64_t bytes) {
    void* piece = rest();
    next_ += static_cast<uintptr_t>(round_up(bytes, 256));
    return piece;
  }
  void* rest() const { return reinterpret_cast<void*>(next_); }
  int64_t bytes() const { return static_cast<int64_t>(next_ - first_); }

 private:
  uintptr_t next_, first_;
};

const void* offset(const void* from, int64_t bytes) { return from ? static_cast<const char*>(from) + bytes : nullptr; }
void* offset(void* from, int64_t bytes) { return from ? static_cast<char*>(from) + bytes : nullptr; }

int64_t in_pixels(const Pyramid& p) { return p.batch * p.height * p.width; }
int64_t out_pixels(const Pyramid& p) { return p.batch * p.out_height * p.out_width; }
int64_t vector_bytes(Type type, int64_t channels) { return channels * (type == Type::float64 ? 8 : 4); }

// The three norms, with room for what each comes to.
struct Norms {
  BatchNorm reduce{}, pyramid{}, expand{};

  Norms(const UnitInTraining& p, Carving& scratch) {
    int64_t first = 0;
    for (int i = 0; i < 3; first += at(i++).channels) {
      BatchNorm& norm = at(i);
      norm.type = p.type;
      norm.channels = i == 0 ? p.channels : i == 1 ? p.out_channels() : p.pointwise_channels;
      norm.count = i == 0 ? in_pixels(p) : out_pixels(p);
      norm.batch_statistics = p.batch_statistics[i];
      norm.eps = p.eps[i];
      norm.weight = offset(p.norm_weight, vector_bytes(p.type, first));
      norm.bias = offset(p.norm_bias, vector_bytes(p.type, first));
      norm.slope = i < 2 || p.has_prelu ? offset(p.slope, vector_bytes(p.type, first)) : nullptr;
      for (void** vector : {&norm.scale, &norm.shift, &norm.prelu}) {
        *vector = scratch.take(vector_bytes(p.type, norm.channels));
      }
    }
  }
  BatchNorm& at(int i) { return i == 0 ? reduce : i == 1 ? pyramid : expand; }
};

// The concatenated map of the reduced one.
NormalisedPyramid concatenation(const UnitInTraining& p, const void* reduced, const BatchNorm* front, void* out,
                                const BatchNorm* behind) {
  NormalisedPyramid n{};
  static_cast<Pyramid&>(n) = p;
  n.x = reduced;
  n.front = front;
  n.weight = p.weight;
  n.out = out;
  n.behind = behind;
  return n;
}

// Runs kernels one after the other, or finds out how much scratch they need: all use the same.
class Sequence {
 public:
  Sequence(void* scratch, void* stream, bool counts) : scratch_(scratch), stream_(stream), counts_(counts) {}

  template <class Problem>
  void step(const Kernel<Problem>& kernel, const Problem& problem) {
    if (counts_) {
      bytes_ = most(bytes_, kernel.scratch_bytes(problem));
    } else if (!outcome_.failed()) {
      outcome_ = kernel.run(problem, scratch_, stream_);
    }
  }
  Outcome outcome() const { return outcome_; }
  int64_t bytes() const { return bytes_; }

 private:
  void *scratch_, *stream_;
  bool counts_;
  int64_t bytes_ = 0;
  Outcome outcome_;
};

// The kernels of one pass, and what lies between them in the scratch.
struct Forward {
  Norms norms;
  NormalisedPointwise reduce{}, expand{};
  NormalisedPyramid pyramid{};
  NormalisedOutput output{};

  Forward(const EespTraining& p, Carving& scratch) : norms(p, scratch) {
    const int64_t all = p.norm_channels();
    int64_t first = 0;
    for (int i = 0; i < 3; first += norms.at(i++).channels) {
      BatchNorm& norm = norms.at(i);
      norm.found = {p.statistics + first, p.statistics + all + first};
      if (norm.batch_statistics) continue;
      norm.mean = p.running_mean + first;
      norm.variance = p.running_variance + first;
    }
    void* concatenated =
        p.concatenated ? p.concatenated : scratch.take(out_pixels(p) * p.out_channels() * bytes_of(p.type));
    reduce = {p.type,  in_pixels(p),    p.in_channels, p.channels,    p.reduce_groups, p.x,
              nullptr, p.reduce_weight, p.reduced,     &norms.reduce, p.tf32};
    pyramid = concatenation(p, p.reduced, &norms.reduce, concatenated, &norms.pyramid);
    expand = {p.type,         out_pixels(p),   p.out_channels(), p.pointwise_channels, p.groups, concatenated,
              &norms.pyramid, p.expand_weight, p.expanded,       &norms.expand,        p.tf32};
    output = {p.type,  out_pixels(p), p.pointwise_channels, p.expanded, &norms.expand, p.residual ? p.x : nullptr,
              p.result};
  }
  Forward(const Forward&) = delete;

  void run(Sequence& sequence) const {
    sequence.step(normalised_pointwise, reduce);
    sequence.step(normalised_pyramid, pyramid);
    sequence.step(normalised_pointwise, expand);
    sequence.step(normalised_output, output);
  }
};

struct Backward {
  Norms norms;
  bool makes_concatenated, into_pyramid, into_reduced;
  NormalisedOutputBackward output{};
  NormalisedPyramid concatenate{};
  NormalisedPointwiseBackward expand{}, reduce{};
  NormalisedPyramidBackward pyramid{};

  Backward(const EespTrainingBackward& p, Carving& scratch) : norms(p, scratch) {
    const int64_t all = p.norm_channels();
    int64_t first = 0;
    for (int i = 0; i < 3; first += norms.at(i++).channels) {
      BatchNorm& norm = norms.at(i);
      norm.mean = p.statistics + first;
      norm.variance = p.statistics + all + first;
      for (void** vector : {&norm.of_grad, &norm.of_map, &norm.constant}) {
        *vector = scratch.take(vector_bytes(p.type, norm.channels));
      }
      const int64_t at = vector_bytes(p.type, first);
      norm.grad_weight = offset(p.grad_norm_weight, at);
      norm.grad_bias = offset(p.grad_norm_bias, at);
      norm.grad_slope = norm.slope ? offset(p.grad_slope, at) : nullptr;
    }
    auto map = [&](int64_t pixels, int64_t channels) { return scratch.take(pixels * channels * bytes_of(p.type)); };
    const bool vectors = p.grad_norm_weight || p.grad_norm_bias || p.grad_slope;
    into_reduced = p.grad_x || p.grad_reduce;
    into_pyramid = into_reduced || p.grad_weight || vectors;
    makes_concatenated = !p.concatenated && (into_pyramid || p.grad_expand);

    // The gradient in front of the last PReLU waits in grad_x for the sum with the reduction's.
    void* between = !p.has_prelu             ? nullptr
                    : p.residual && p.grad_x ? p.grad_x
                                             : map(out_pixels(p), p.pointwise_channels);
    const void* front = p.has_prelu ? between : p.grad;
    output = {p.type,     out_pixels(p), p.pointwise_channels,       p.grad,
              p.expanded, &norms.expand, p.residual ? p.x : nullptr, between};

    const void* concatenated = p.concatenated;
    if (makes_concatenated) {
      void* made = map(out_pixels(p), p.out_channels());
      concatenate = concatenation(p, p.reduced, &norms.reduce, made, nullptr);
      concatenated = made;
    }
    void* grad_concatenated = into_pyramid ? map(out_pixels(p), p.out_channels()) : nullptr;
    expand = {p.type,          out_pixels(p), p.out_channels(), p.pointwise_channels, p.groups,
              front,           p.expanded,    &norms.expand,    concatenated,         &norms.pyramid,
              p.expand_weight, nullptr,       p.grad_expand,    grad_concatenated,    p.tf32};
    if (!into_pyramid) return;
    void* grad_reduced = into_reduced || vectors ? map(in_pixels(p), p.channels) : nullptr;
    static_cast<Pyramid&>(pyramid) = p;
    pyramid.grad = grad_concatenated;
    pyramid.out = concatenated;
    pyramid.behind = &norms.pyramid;
    pyramid.x = p.reduced;
    pyramid.front = &norms.reduce;
    pyramid.weight = p.weight;
    pyramid.grad_weight = p.grad_weight;
    pyramid.grad_x = grad_reduced;
    reduce = {p.type,        in_pixels(p),  p.in_channels, p.channels, p.reduce_groups, grad_reduced,
              p.reduced,     &norms.reduce, p.x,           nullptr,    p.reduce_weight, p.residual ? front : nullptr,
              p.grad_reduce, p.grad_x,      p.tf32};
  }
  Backward(const Backward&) = delete;

  void run(Sequence& sequence) const {
    for (const BatchNorm* norm : {&norms.reduce, &norms.pyramid, &norms.expand}) sequence.step(known_moments, *norm);
    sequence.step(normalised_output_backward, output);
    if (makes_concatenated) sequence.step(normalised_pyramid, concatenate);
    if (expand.grad_weight || expand.grad_x) sequence.step(normalised_pointwise_backward, expand);
    if (into_pyramid) sequence.step(normalised_pyramid_backward, pyramid);
    if (into_reduced) sequence.step(normalised_pointwise_backward, reduce);
  }
};

template <class Pass, class Problem>
int64_t scratch_bytes(const Problem& p) {
  Carving scratch;
  const Pass pass(p, scratch);
  Sequence sequence(nullptr, nullptr, true);
  pass.run(sequence);
  return scratch.bytes() + sequence.bytes();
}

template <class Pass, class Problem>
Outcome run(const Problem& p, void* memory, void* stream) {
  Carving scratch(memory);
  const Pass pass(p, scratch);
  Sequence sequence(scratch.rest(), stream, false);
  pass.run(sequence);
  return sequence.outcome();
}

}  // namespace

extern const Kernel<EespTraining> eesp_training = {scratch_bytes<Forward>, run<Forward>};
extern const Kernel<EespTrainingBackward> eesp_training_backward = {scratch_bytes<Backward>, run<Backward>};

}  // namespace espk::cuda
