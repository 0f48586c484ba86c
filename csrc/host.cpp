// host: C++ objects that are not tensors, bound with pybind11 and free of torch headers. Today: how
// this build was made.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

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

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host objects of pyllmtune.";
  m.def("build_info", &build_info,
        "How the compiled modules were built: compiler, standard, targets.");
}
