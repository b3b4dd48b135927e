// What the bindings share: typed arrays without conversion, their views, and the files of the table of contents.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <cstddef>
#include <memory>
#include <span>
#include <stdexcept>
#include <type_traits>

namespace stage1::bindings {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> view(const Array<T>& array) {
    if (array.ndim() != 1) {
        throw std::invalid_argument("arrays must have one dimension");
    }
    return {array.data(), static_cast<std::size_t>(array.size())};
}

template <class T>
Array<T> make_array(std::size_t size) {
    return Array<T>(static_cast<py::ssize_t>(size));
}

template <class T>
std::span<T> fill(Array<T>& array) {
    return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

// An array as it stands. Unlike the casters of Array it has NumPy make nothing, so a call allocates nothing.
template <class T>
std::span<T> stands(py::handle object) {
    if (!py::isinstance<Array<std::remove_const_t<T>>>(object)) {
        throw std::invalid_argument("arrays must be contiguous and of the kernel's type");
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    const auto size = static_cast<std::size_t>(array.size());
    if constexpr (std::is_const_v<T>) {
        return {static_cast<T*>(array.data()), size};
    } else {
        return {static_cast<T*>(py::array(array).mutable_data()), size};
    }
}

// Throws std::invalid_argument unless confidence and error have one length of 1 to 2^31 - 1.
template <class C, class L>
void check_rows(std::span<const C> confidence, std::span<const L> error) {
    if (confidence.empty() || error.size() != confidence.size() || confidence.size() >= std::size_t{1} << 31) {
        throw std::invalid_argument("arrays must have one length of 1 to 2^31 - 1");
    }
}

void bind_bootstrap(py::module_& module);
void bind_order(py::module_& module);
void bind_sweep(py::module_& module);
void bind_route(py::module_& module);

}  // namespace stage1::bindings
