// A plan: the kernel calls of one forward pass, recorded once with their prepared weights, replayed on other images.
// A replay neither allocates nor returns to Python or torch between its steps, and lays all maps into one block of memory
// in which they take turns.
//
// Recording watches the launches of the calling thread (csrc/cpu_launch.h). Every map that a step reads must be the input
// or have been written by a step before it; a map that came from elsewhere makes the recording fail, never wrong.
#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu_run.h"
#include "pointers.h"

namespace espk {

struct AlignedFree {
  void operator()(void* data) const { ::operator delete(data, std::align_val_t{64}); }
};
using Bytes = std::unique_ptr<char, AlignedFree>;

inline Bytes aligned_bytes(int64_t count) {
  return Bytes(
      static_cast<char*>(::operator new(static_cast<std::size_t>(count > 0 ? count : 1), std::align_val_t{64})));
}

// A place in a buffer; buffer 0 is the input, -1 no place at all.
struct Place {
  int64_t buffer, offset;
};

// Moves the maps of a problem to where this replay has them.
struct Mover {
  char* const* buffers;
  const Place* place;

  void map(const void*& pointer, int64_t) {
    if (place->buffer >= 0) pointer = buffers[place->buffer] + place->offset;
    ++place;
  }
  void residual(const void*& pointer, int64_t bytes) { map(pointer, bytes); }
  void out(void*& pointer, int64_t) {
    pointer = buffers[place->buffer] + place->offset;
    ++place;
  }
  void vector(const void*&, int64_t) {}
  void constant(const void*&, int64_t) {}
  void weight(const void*&) {}
};

class Step {
 public:
  explicit Step(const char* name) : name(name) {}
  virtual ~Step() = default;
  // Units that `threads` threads cut the step into, and a run of them. buffers: where each buffer begins in this replay.
  virtual int64_t units(int64_t threads) const = 0;
  virtual void run(char* const* buffers, int64_t threads, int64_t begin, int64_t end) const = 0;
  virtual int64_t multiply_adds() const = 0;
  // Whether the step is cut for the number of threads, so that a tuning may choose to cut it finer.
  virtual bool has_cut() const = 0;

  const char* const name;
  std::vector<int64_t> touches;  // buffers, the result's last
  std::vector<int64_t> bytes;  // of the map in each of them
  int64_t residual = -1;  // the buffer of its residual
  int64_t weight_bytes = 0;
  char* weights = nullptr;
  int64_t cut = 1;  // it is cut for as many times the threads, which changes no bit
};

template <class Problem>
class StepOf final : public Step {
 public:
  StepOf(const char* name, const Kernel<Problem>& kernel, const Problem& problem)
      : Step(name), kernel_(kernel), problem_(problem) {}

  int64_t units(int64_t threads) const override { return kernel_.units(shared_by(threads)); }

  void run(char* const* buffers, int64_t threads, int64_t begin, int64_t end) const override {
    Problem problem = shared_by(threads);
    Mover mover{buffers, places_.data()};
    visit_pointers(mover, problem);
    kernel_.run(problem, weights, begin, end);
  }

  int64_t multiply_adds() const override { return problem_.multiply_adds(); }

  bool has_cut() const override {
    return requires(Problem& problem) { problem.threads; };
  }

 private:
  friend class Recording;

  Problem shared_by(int64_t threads) const {
    Problem problem = problem_;
    if constexpr (requires { problem.threads; }) problem.threads = threads * cut;
    return problem;
  }

  const Kernel<Problem>& kernel_;
  Problem problem_;
  std::vector<Bytes> vectors_;
  std::vector<Place> places_;  // of each map, in the order of visit_pointers
};

class Plan {
 public:
  // Runs every step for each of `images` inputs that lie one behind the other, and so do those of each output.
  void run(const char* input, const std::vector<char*>& outputs, int64_t images) const;
  // Seconds of each step on all threads, the median over `rounds`.
  std::vector<double> profile(const char* input, const std::vector<char*>& outputs, int64_t rounds) const;
  // How finely each step is cut, 0 where there is no choice. Not while another thread replays.
  std::vector<int64_t> cuts() const;
  void set_cuts(const std::vector<int64_t>& cuts);

  int64_t input_bytes = 0, arena_bytes = 0;
  std::vector<int64_t> output_bytes;
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<int64_t> recorded_as;  // which of the recorded kernel calls each step is
  std::vector<int64_t> buffer_bytes;

 private:
  friend class Recording;
  // buffers: where each begins for one image; see buffers().
  void run_alone(const std::vector<char*>& buffers) const;
  // seconds: when each step ended, from the start on; may be null.
  void run_together(const std::vector<char*>& buffers, int64_t threads, double* seconds) const;
  std::vector<char*> buffers(const char* input, const std::vector<char*>& outputs, int64_t image, char* arena) const;
  Bytes take_arena() const;
  void give_back(Bytes arena) const;

  std::vector<int64_t> offsets_;  // of each buffer in the arena
  std::vector<std::size_t> results_;  // the buffers that are the outputs
  Bytes weights_;  // of all steps, one behind the other
  mutable std::mutex mutex_;
  mutable std::vector<Bytes> arenas_;
};

class Recording {
 public:
  Recording(const void* input, int64_t bytes) : input_bytes_(bytes) { ranges_.push_back({input, bytes}); }

  // A map that steps will write, and what keeps its memory from being used again while this records.
  void output(const void* data, int64_t bytes, std::shared_ptr<void> alive) {
    ranges_.push_back({data, bytes});
    alive_.push_back(std::move(alive));
  }

  template <class Problem>
  void launch(const char* name, const Kernel<Problem>& kernel, const Problem& problem, const void* prepared) {
    if constexpr (requires(Finder& finder, Problem& p) { visit_pointers(finder, p); }) {
      if (kernel.after) return refuse(std::string(name) + " has a second stage");
      auto step = std::make_unique<StepOf<Problem>>(name, kernel, problem);
      const int64_t bytes = kernel.shared_bytes(problem);
      step->weight_bytes = bytes;
      weights_.push_back(aligned_bytes(bytes));
      step->weights = weights_.back().get();
      std::memcpy(step->weights, prepared, static_cast<std::size_t>(bytes));
      Finder finder{*this, *step, step->vectors_, step->places_, problem.type == Type::float64 ? 8 : 4};
      visit_pointers(finder, step->problem_);
      steps_.push_back(std::move(step));
    } else {
      refuse(std::string(name) + " is not for inference");
    }
  }

  int64_t steps() const { return static_cast<int64_t>(steps_.size()); }

  void refuse(std::string reason) {
    if (refusal_.empty()) refusal_ = std::move(reason);
  }

  struct Range {
    const void* data;
    int64_t bytes;
  };

  // The plan, or null with the reason: also where one of `results` is not a whole map that a step wrote, or twice there.
  std::unique_ptr<Plan> finish(const std::vector<Range>& results, std::string& refusal);

 private:
  struct Finder {
    Recording& recording;
    Step& step;
    std::vector<Bytes>& vectors;
    std::vector<Place>& places;
    int64_t compute_bytes;

    void map(const void* pointer, MapBytes bytes) { places.push_back(recording.find(pointer, bytes, step)); }
    void residual(const void* pointer, MapBytes bytes) {
      map(pointer, bytes);
      step.residual = places.back().buffer;
    }
    void out(const void* pointer, MapBytes bytes) { map(pointer, bytes); }
    void weight(const void*& pointer) { pointer = nullptr; }
    void vector(const void*& pointer, int64_t count) { constant(pointer, count * compute_bytes); }
    void constant(const void*& pointer, int64_t bytes) {
      if (!pointer) return;
      vectors.push_back(aligned_bytes(bytes));
      std::memcpy(vectors.back().get(), pointer, static_cast<std::size_t>(bytes));
      pointer = vectors.back().get();
    }
  };

  Place find(const void* pointer, MapBytes bytes, Step& step);
  void drop_unread(Plan& plan);
  static void gather_weights(Plan& plan);
  bool overwrites_residual(const Step& step) const;

  int64_t input_bytes_;
  std::vector<Range> ranges_;
  std::vector<std::shared_ptr<void>> alive_;
  std::vector<std::unique_ptr<Step>> steps_;
  std::vector<Bytes> weights_;  // of each step, until those of the plan lie in one block
  std::string refusal_;
};

// The recording of the calling thread, or null.
Recording*& recording();

}  // namespace espk
