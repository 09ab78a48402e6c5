// Replaying plans, and laying out their memory.
#include "plan.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <stdexcept>
#include <thread>

#include "huge_pages.h"

namespace espk {
namespace {

constexpr int64_t kAlign = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Memory that is given out and taken back in the order of the steps: the lowest place that is large enough.
class Floorplan {
 public:
  int64_t take(int64_t bytes) {
    int64_t offset = 0;
    auto at = taken_.begin();
    for (; at != taken_.end() && at->offset - offset < bytes; ++at) offset = at->offset + at->bytes;
    taken_.insert(at, {offset, bytes});
    size_ = std::max(size_, offset + bytes);
    return offset;
  }

  void give_back(int64_t offset) {
    taken_.erase(std::find_if(taken_.begin(), taken_.end(), [&](const Block& b) { return b.offset == offset; }));
  }

  int64_t size() const { return size_; }

 private:
  struct Block {
    int64_t offset, bytes;
  };
  std::vector<Block> taken_;  // by offset
  int64_t size_ = 0;
};

// Some tens of microseconds on the core, as long as a unit may take; then asleep, because the thread that is waited for may
// need this very core.
void wait_a_moment(int64_t waits) {
  if (waits > 2'000) return std::this_thread::sleep_for(std::chrono::microseconds(20));
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Recording*& recording() {
  thread_local Recording* current = nullptr;
  return current;
}

Place Recording::find(const void* pointer, MapBytes bytes, Step& step) {
  if (!pointer) return {-1, 0};
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  for (std::size_t i = 0; i < ranges_.size(); ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(ranges_[i].data);
    if (address >= begin &&
        address + static_cast<uintptr_t>(bytes.span) <= begin + static_cast<uintptr_t>(ranges_[i].bytes)) {
      step.touches.push_back(static_cast<int64_t>(i));
      step.bytes.push_back(bytes.own);
      return {static_cast<int64_t>(i), static_cast<int64_t>(address - begin)};
    }
  }
  refuse(std::string(step.name) + " reads a map that no kernel of this library wrote");
  return {-1, 0};
}

// A step counts where what it writes is a result of the plan or is read by a step that counts. A merge of several of torch's operations
// into one kernel leaves behind the kernel that had run for the first of them.
void Recording::drop_unread(Plan& plan) {
  std::vector<bool> read(ranges_.size(), false);
  for (std::size_t result : plan.results_) read[result] = true;
  std::vector<std::unique_ptr<Step>>& steps = plan.steps;
  for (std::size_t s = steps_.size(); s-- > 0;) {
    const std::vector<int64_t>& touches = steps_[s]->touches;
    if (!read[static_cast<std::size_t>(touches.back())]) continue;
    for (int64_t buffer : touches) read[static_cast<std::size_t>(buffer)] = true;
    steps.push_back(std::move(steps_[s]));
    plan.recorded_as.push_back(static_cast<int64_t>(s));
  }
  std::reverse(steps.begin(), steps.end());
  std::reverse(plan.recorded_as.begin(), plan.recorded_as.end());
}

// A small image passes all weights once, and most come from memory: in pages of 4 KiB a fiftieth of a call goes to finding
// where they are (s=0.5 to 2.0, one thread of an EPYC, family 25 model 1, in a virtual machine).
void Recording::gather_weights(Plan& plan) {
  int64_t total = 0;
  for (const auto& step : plan.steps) total += aligned(step->weight_bytes);
  plan.weights_ = aligned_bytes(total);
  prefer_huge_pages(plan.weights_.get(), total);
  char* at = plan.weights_.get();
  for (const auto& step : plan.steps) {
    std::memcpy(at, step->weights, static_cast<std::size_t>(step->weight_bytes));
    step->weights = at;
    at += aligned(step->weight_bytes);
  }
}

// Whether the result of a step may take its residual's place in memory: both are whole buffers of one size, and no other
// of its maps is the residual's.
bool Recording::overwrites_residual(const Step& step) const {
  if (step.residual < 0) return false;
  const int64_t bytes = ranges_[static_cast<std::size_t>(step.residual)].bytes;
  return step.bytes.back() == bytes && ranges_[static_cast<std::size_t>(step.touches.back())].bytes == bytes &&
         std::count(step.touches.begin(), step.touches.end(), step.residual) == 1;
}

std::unique_ptr<Plan> Recording::finish(const std::vector<Range>& results, std::string& refusal) {
  auto plan = std::make_unique<Plan>();
  for (const Range& result : results) {
    std::size_t found = 0;
    for (std::size_t i = 1; i < ranges_.size(); ++i) {
      if (ranges_[i].data == result.data && ranges_[i].bytes == result.bytes) found = i;
    }
    if (found == 0) refuse("the result is not a map that a kernel of this library wrote");
    if (std::count(plan->results_.begin(), plan->results_.end(), found)) refuse("two results are one map");
    plan->results_.push_back(found);
    plan->output_bytes.push_back(result.bytes);
  }
  if (!refusal_.empty()) {
    refusal = refusal_;
    return nullptr;
  }
  drop_unread(*plan);
  gather_weights(*plan);
  const std::vector<std::unique_ptr<Step>>& steps = plan->steps;
  // First and last step that touches each buffer. A buffer is written before it is read: each belongs to one call.
  std::vector<int64_t> last(ranges_.size(), -1);
  for (std::size_t s = 0; s < steps.size(); ++s) {
    for (int64_t buffer : steps[s]->touches) last[static_cast<std::size_t>(buffer)] = static_cast<int64_t>(s);
  }
  plan->offsets_.assign(ranges_.size(), -1);
  std::vector<bool> given(ranges_.size(), false);  // the input and the outputs have memory of the caller's
  given[0] = true;
  for (std::size_t result : plan->results_) given[result] = true;
  Floorplan floorplan;
  for (std::size_t s = 0; s < steps.size(); ++s) {
    // A result that is stored where its residual was needs no lines of the cache but those the residual came in.
    const auto result = static_cast<std::size_t>(steps[s]->touches.back());
    if (overwrites_residual(*steps[s]) && !given[result] && plan->offsets_[result] < 0) {
      const auto residual = static_cast<std::size_t>(steps[s]->residual);
      if (!given[residual] && last[residual] == static_cast<int64_t>(s)) {
        plan->offsets_[result] = plan->offsets_[residual];
        last[residual] = -1;
      }
    }
    for (int64_t touched : steps[s]->touches) {
      const auto buffer = static_cast<std::size_t>(touched);
      int64_t& offset = plan->offsets_[buffer];
      if (!given[buffer] && offset < 0) offset = floorplan.take(aligned(ranges_[buffer].bytes));
    }
    for (std::size_t buffer = 1; buffer < ranges_.size(); ++buffer) {
      if (last[buffer] == static_cast<int64_t>(s) && plan->offsets_[buffer] >= 0) {
        floorplan.give_back(plan->offsets_[buffer]);
      }
    }
  }
  for (const Range& range : ranges_) plan->buffer_bytes.push_back(range.bytes);
  plan->input_bytes = input_bytes_;
  plan->arena_bytes = floorplan.size();
  return plan;
}

std::vector<char*> Plan::buffers(const char* input, const std::vector<char*>& outputs, int64_t image,
                                 char* arena) const {
  std::vector<char*> begins(offsets_.size());
  for (std::size_t i = 0; i < offsets_.size(); ++i) begins[i] = arena + std::max<int64_t>(offsets_[i], 0);
  begins[0] = const_cast<char*>(input) + image * input_bytes;  // steps only read it
  for (std::size_t r = 0; r < results_.size(); ++r) begins[results_[r]] = outputs[r] + image * output_bytes[r];
  return begins;
}

void Plan::run_alone(const std::vector<char*>& buffers) const {
  for (const auto& step : steps) step->run(buffers.data(), 1, 0, step->units(1));
}

// All threads go through the steps side by side. Each takes the units of its own share first, so that what it wrote in one
// step is in its cache for the next, then what is left of the others'; a step ends when all its units are done, not when
// all threads have come: one that the pool starts late, or never, is not waited for. A step costs two waits on a cache
// line, where going back to the pool after each costs several microseconds. What a thread throws (memory for its scratch) ends
// them all, since they would wait for its units.
void Plan::run_together(const std::vector<char*>& buffers, int64_t threads, double* seconds) const {
  struct alignas(kAlign) Share {
    std::atomic<int64_t> next{0};
  };
  struct Progress {
    std::vector<Share> shares;
    std::atomic<int64_t> done{0};
    int64_t units = 0;
  };
  std::vector<Progress> progress(steps.size());
  for (std::size_t s = 0; s < steps.size(); ++s) {
    progress[s].units = steps[s]->units(threads);
    progress[s].shares = std::vector<Share>(static_cast<std::size_t>(threads));
  }
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  const auto start = std::chrono::steady_clock::now();
  auto work = [&](int64_t thread) {
    for (std::size_t s = 0; s < steps.size(); ++s) {
      Progress& now = progress[s];
      for (int64_t i = 0; i < threads; ++i) {
        const int64_t owner = (thread + i) % threads;
        const int64_t first = now.units * owner / threads, end = now.units * (owner + 1) / threads;
        const int64_t few = (end - first + 2) / 3;
        std::atomic<int64_t>& next = now.shares[static_cast<std::size_t>(owner)].next;
        for (;;) {
          const int64_t from = first + next.fetch_add(few, std::memory_order_relaxed);
          if (from >= end || failed.load(std::memory_order_relaxed)) break;
          const int64_t to = std::min(from + few, end);
          steps[s]->run(buffers.data(), threads, from, to);
          // Ahead of the last unit's count, and by whichever thread did it: thread 0 may come when all is done.
          const auto time = seconds ? std::chrono::steady_clock::now() : start;
          const int64_t before = now.done.fetch_add(to - from, std::memory_order_release);
          if (seconds && before + to - from == now.units) {
            seconds[s] = std::chrono::duration<double>(time - start).count();
          }
        }
      }
      for (int64_t waits = 0; now.done.load(std::memory_order_acquire) < now.units; ++waits) {
        if (failed.load(std::memory_order_relaxed)) return;
        wait_a_moment(waits);
      }
    }
  };
  auto work_or_fail = [&](int64_t thread) {
    try {
      work(thread);
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  };
  parallel_for(
      threads, 1,
      [](void* given, int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) (*static_cast<decltype(work_or_fail)*>(given))(thread);
      },
      &work_or_fail);
  if (failure) std::rethrow_exception(failure);
}

Bytes Plan::take_arena() const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!arenas_.empty()) {
      Bytes arena = std::move(arenas_.back());
      arenas_.pop_back();
      return arena;
    }
  }
  Bytes arena = aligned_bytes(arena_bytes);
  prefer_huge_pages(arena.get(), arena_bytes);
  return arena;
}

void Plan::give_back(Bytes arena) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  arenas_.push_back(std::move(arena));
}

// With as many images as threads each thread takes its images through all steps, one after the other, so that the maps of
// an image stay in its thread's cache; the images left over share all threads.
void Plan::run(const char* input, const std::vector<char*>& outputs, int64_t images) const {
  struct Context {
    const Plan& plan;
    const char* input;
    const std::vector<char*>& outputs;
  } context{*this, input, outputs};
  for (std::size_t r = 0; r < outputs.size(); ++r) prefer_huge_pages(outputs[r], images * output_bytes[r]);
  const int64_t threads = thread_count(), alone = threads > 1 ? images / threads * threads : 0;
  if (alone > 0) {
    parallel_for(
        alone, alone / threads,
        [](void* given, int64_t begin, int64_t end) {
          const Context& c = *static_cast<Context*>(given);
          Bytes arena = c.plan.take_arena();
          for (int64_t i = begin; i < end; ++i) {
            c.plan.run_alone(c.plan.buffers(c.input, c.outputs, i, arena.get()));
          }
          c.plan.give_back(std::move(arena));
        },
        &context);
  }
  if (alone == images) return;
  Bytes arena = take_arena();
  for (int64_t i = alone; i < images; ++i) {
    const std::vector<char*> image = buffers(input, outputs, i, arena.get());
    if (threads > 1) {
      run_together(image, threads, nullptr);
    } else {
      run_alone(image);
    }
  }
  give_back(std::move(arena));
}

std::vector<int64_t> Plan::cuts() const {
  std::vector<int64_t> found;
  for (const auto& step : steps) found.push_back(step->has_cut() ? step->cut : 0);
  return found;
}

void Plan::set_cuts(const std::vector<int64_t>& cuts) {
  if (cuts.size() != steps.size()) throw std::invalid_argument("cuts: expected one number a step");
  constexpr int64_t kFinest = 64;
  for (std::size_t s = 0; s < steps.size(); ++s) {
    const bool right = steps[s]->has_cut() ? cuts[s] >= 1 && cuts[s] <= kFinest : cuts[s] == 0;
    if (!right) throw std::invalid_argument("cuts: expected 1 to 64, and 0 for steps that have no choice");
  }
  for (std::size_t s = 0; s < steps.size(); ++s) {
    if (steps[s]->has_cut()) steps[s]->cut = cuts[s];
  }
}

std::vector<double> Plan::profile(const char* input, const std::vector<char*>& outputs, int64_t rounds) const {
  Bytes arena = take_arena();
  std::vector<std::vector<double>> seconds(steps.size());
  std::vector<double> one(steps.size());
  for (int64_t round = 0; round < rounds; ++round) {
    run_together(buffers(input, outputs, 0, arena.get()), thread_count(), one.data());
    double ended = 0;
    for (std::size_t s = 0; s < steps.size(); ++s) {
      seconds[s].push_back(std::max(one[s] - ended, 0.0));
      ended = std::max(one[s], ended);
    }
  }
  give_back(std::move(arena));
  std::vector<double> medians;
  for (auto& samples : seconds) {
    std::nth_element(samples.begin(), samples.begin() + static_cast<int64_t>(samples.size() / 2), samples.end());
    medians.push_back(samples[samples.size() / 2]);
  }
  return medians;
}

}  // namespace espk
