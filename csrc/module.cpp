// espkernels._C: what is not a tensor operation. Importing it registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "plan.h"

namespace py = pybind11;

namespace {

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* name : {"baseline", "avx2", "avx512", "avx512_bf16", "amx"}) {
    if (espk::isa_available(name)) names.emplace_back(name);
  }
  return names;
}

void set_isa(const std::string& name) {
  if (espk::set_isa(name.c_str())) return;
  std::string message = "isa: got '" + name + "', this binary on this machine has";
  for (const std::string& available : available_isas()) message += " " + available;
  throw py::value_error(message);
}

// Recording is of the calling thread: begin, one forward pass, then end with what it returned, or drop.
void begin_recording(uintptr_t input, int64_t bytes) {
  espk::Recording*& current = espk::recording();
  if (current) throw std::runtime_error("this thread is recording already");
  current = new espk::Recording(reinterpret_cast<const void*>(input), bytes);
}

void drop_recording() {
  delete espk::recording();
  espk::recording() = nullptr;
}

using Addresses = std::vector<uintptr_t>;

std::unique_ptr<espk::Plan> end_recording(const std::vector<std::pair<uintptr_t, int64_t>>& results) {
  const std::unique_ptr<espk::Recording> record(espk::recording());
  espk::recording() = nullptr;
  if (!record) throw std::runtime_error("this thread is not recording");
  std::string refusal;
  std::vector<espk::Recording::Range> ranges;
  for (const auto& [address, bytes] : results) ranges.push_back({reinterpret_cast<const void*>(address), bytes});
  std::unique_ptr<espk::Plan> plan = record->finish(ranges, refusal);
  if (!plan) throw py::value_error(refusal);
  return plan;
}

std::vector<char*> memory_of(const espk::Plan& plan, const Addresses& outputs) {
  if (outputs.size() != plan.output_bytes.size()) throw py::value_error("outputs: expected one address a result");
  std::vector<char*> memory;
  for (uintptr_t address : outputs) memory.push_back(reinterpret_cast<char*>(address));
  return memory;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#if defined(__x86_64__)
  info["architecture"] = "x86-64";
#elif defined(__aarch64__)
  info["architecture"] = "aarch64";
#endif
  info["torch_abi"] = "2.10";
  info["cuda"] = false;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Instruction sets and build facts of the compiled kernels; importing it registers the operators.";
  m.def("isa", [] { return std::string(espk::isa()); }, "The instruction set in use.");
  m.def(
      "multiplies_bfloat16", [] { return espk::kernels().bfloat16 != nullptr; },
      "Whether the instruction set in use multiplies bfloat16 as it is, where kernels have a way for that.");
  m.def("available_isas", available_isas, "The instruction sets in this binary that this machine runs, oldest first.");
  m.def("set_isa", set_isa, "Uses another instruction set from the next call on, in the whole process.");
  m.def("begin_recording", begin_recording,
        "Kernel calls of this thread are recorded; address and bytes of the input.");
  m.def(
      "recorded_steps", [] { return espk::recording() ? espk::recording()->steps() : 0; },
      "How many kernel calls this thread has recorded so far.");
  m.def("end_recording", end_recording, "The plan; address and bytes of each result. ValueError where there is none.");
  m.def("drop_recording", drop_recording, "Ends a recording, if there is one, and forgets it.");
  py::class_<espk::Plan>(m, "Plan", "The kernel calls of a recorded forward pass.")
      .def_readonly("input_bytes", &espk::Plan::input_bytes)
      .def_readonly("output_bytes", &espk::Plan::output_bytes)
      .def_readonly("arena_bytes", &espk::Plan::arena_bytes)
      .def_readonly("recorded_as", &espk::Plan::recorded_as, "Which of the recorded kernel calls each step is.")
      .def_readonly("buffer_bytes", &espk::Plan::buffer_bytes)
      .def(
          "run",
          [](const espk::Plan& plan, uintptr_t input, const Addresses& outputs, int64_t images) {
            const std::vector<char*> memory = memory_of(plan, outputs);
            const py::gil_scoped_release release;
            plan.run(reinterpret_cast<const char*>(input), memory, images);
          },
          "Replays on `images` inputs at an address, into the addresses of the outputs.")
      .def_property("cuts", &espk::Plan::cuts, &espk::Plan::set_cuts,
                    "For how many times the threads each step is cut; 0 where there is no choice.")
      .def(
          "profile",
          [](const espk::Plan& plan, uintptr_t input, const Addresses& outputs, int64_t rounds) {
            return plan.profile(reinterpret_cast<const char*>(input), memory_of(plan, outputs), rounds);
          },
          "Median seconds of each step on one input.")
      .def(
          "steps",
          [](const espk::Plan& plan) {
            py::list rows;
            for (const auto& step : plan.steps)
              rows.append(
                  py::make_tuple(step->name, step->multiply_adds(), step->weight_bytes, step->touches, step->bytes));
            return rows;
          },
          "Of each step: name, multiply-adds, bytes of the weights, buffers of its maps (0 is the input, the last is "
          "written), bytes of each map.");
  m.def("build_info", build_info, "Compiler, architecture and interface that this binary was built with.");
}
