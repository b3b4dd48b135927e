#include "stage1/order.hpp"

#include <algorithm>

#include "arrays.hpp"

namespace stage1::bindings {
namespace {

template <class C, class L>
py::typing::Tuple<Array<std::uint32_t>, Array<std::uint32_t>> order(const Array<C>& confidence, const Array<L>& error) {
    const auto scores = view(confidence);
    const auto losses = view(error);
    check_rows(scores, losses);
    Array<std::uint32_t> rows = make_array<std::uint32_t>(scores.size());
    const auto places = fill(rows);
    const auto ends = std::make_unique_for_overwrite<std::uint32_t[]>(scores.size());
    std::size_t groups = 0;
    {
        const py::gil_scoped_release release;
        groups = sort_order(scores, losses, places, {ends.get(), scores.size()});
    }
    Array<std::uint32_t> tie_ends = make_array<std::uint32_t>(groups);
    std::copy_n(ends.get(), groups, tie_ends.mutable_data());
    return py::make_tuple(std::move(rows), std::move(tie_ends));
}

template <class C, class L>
void bind(py::module_& module) {
    module.def("order", &order<C, L>, py::arg("confidence").noconvert(), py::arg("error").noconvert(),
               "Rows [N] by descending confidence, then error, then index, and where tie groups end [M]");
}

}  // namespace

void bind_order(py::module_& module) {
    bind<float, std::uint8_t>(module);
    bind<float, double>(module);
    bind<double, std::uint8_t>(module);
    bind<double, double>(module);
}

}  // namespace stage1::bindings
