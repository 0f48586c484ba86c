// module: what Python imports. Loading the library registers the kernels; the module itself is
// empty.
#include <Python.h>

#define PLT_CONCAT(a, b) a##b
#define PLT_INIT(name) PLT_CONCAT(PyInit_, name)
#define PLT_STRING(name) #name
#define PLT_NAME(name) PLT_STRING(name)

PyMODINIT_FUNC PLT_INIT(TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               PLT_NAME(TORCH_EXTENSION_NAME),
                               nullptr,
                               0,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
