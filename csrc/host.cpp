// host: C++ objects that are not tensors, bound with pybind11 and free of torch headers: how this
// build was made, and the beams of a search.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "host_beams.h"

namespace {

#define PLT_STRING(x) #x
#define PLT_VALUE(x) PLT_STRING(x)

std::map<std::string, std::string> build_info() {
  return {
#if defined(__clang__)
      {"compiler", "clang " __clang_version__},
#elif defined(__GNUC__)
      {"compiler", "gcc " __VERSION__},
#else
      {"compiler", "unknown"},
#endif
      {"c++", std::to_string(__cplusplus)},
      {"python headers", PY_VERSION},
      {"built for torch", PLT_VALUE(PLT_TORCH_TARGET) " and newer"},
      {"cpu modules", PLT_VALUE(PLT_CPU_MODULES)},
      {"cuda architectures", PLT_VALUE(PLT_CUDA_ARCHS)},
  };
}

void bind_beams(pybind11::module_& m) {
  namespace py = pybind11;
  py::enum_<plt::EarlyStopping>(m, "EarlyStopping")
      .value("false", plt::EarlyStopping::kFalse)
      .value("true", plt::EarlyStopping::kTrue)
      .value("never", plt::EarlyStopping::kNever);
  py::class_<plt::Hypothesis>(m, "Hypothesis")
      .def_readonly("score", &plt::Hypothesis::score)
      .def_readonly("tokens", &plt::Hypothesis::tokens)
      .def_readonly("parents", &plt::Hypothesis::parents)
      .def_readonly("sums", &plt::Hypothesis::sums);
  py::class_<plt::Step>(m, "Step")
      .def_readonly("parents", &plt::Step::parents)
      .def_readonly("tokens", &plt::Step::tokens)
      .def_readonly("sums", &plt::Step::sums)
      .def_readonly("fates", &plt::Step::fates);
  py::class_<plt::BeamHypotheses>(m, "BeamHypotheses",
                                  "The twin of pyllmtune.decoding.hypotheses.BeamHypotheses.")
      .def(py::init<int64_t, int64_t, double, plt::EarlyStopping, int64_t, int64_t>(),
           py::arg("items"), py::arg("width"), py::arg("length_penalty"), py::arg("early_stopping"),
           py::arg("min_length"), py::arg("max_length"))
      .def("advance", &plt::BeamHypotheses::advance, py::arg("sums"), py::arg("tokens"),
           py::arg("parents"), py::arg("ends"))
      .def("done", &plt::BeamHypotheses::done)
      .def("finished", &plt::BeamHypotheses::finished, py::arg("item"));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host objects of pyllmtune.";
  m.def("build_info", &build_info,
        "How the compiled modules were built: compiler, standard, targets.");
  bind_beams(m);
}
