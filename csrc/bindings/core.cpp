// Table of contents of the compiled core. Arguments arrive checked: stage1_pro.native is the only caller.
#include "arrays.hpp"

PYBIND11_MODULE(_core, module) {
    module.doc() = "Compiled kernels of stage1_pro; call them through stage1_pro.native";
    module.attr("__version__") = STAGE1_VERSION;
    stage1::bindings::bind_bootstrap(module);
    stage1::bindings::bind_order(module);
    stage1::bindings::bind_sweep(module);
    stage1::bindings::bind_route(module);
}
