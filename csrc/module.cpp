// espkernels._C: what is not a tensor operation. Importing it registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* name : {"baseline", "avx2", "avx512"}) {
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
  m.def("available_isas", available_isas, "The instruction sets in this binary that this machine runs, oldest first.");
  m.def("set_isa", set_isa, "Uses another instruction set from the next call on, in the whole process.");
  m.def("build_info", build_info, "Compiler, architecture and interface that this binary was built with.");
}
