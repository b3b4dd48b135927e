#include "stage1/route.hpp"

#include "arrays.hpp"

namespace stage1::bindings {
namespace {

void need(bool fits) {
    if (!fits) {
        throw std::invalid_argument("arrays must have the shapes that route.hpp states");
    }
}

// (scale, offset, threshold), (exited, score, label, probability, deferred), (label, probability, score)
using RuleTuple = py::typing::Tuple<double, double, double>;
using RoutedTuple =
    py::typing::Tuple<Array<std::uint8_t>, Array<float>, Array<std::int32_t>, Array<float>, Array<std::int32_t>>;
using AnswersTuple = py::typing::Tuple<Array<std::int32_t>, Array<float>, Array<float>>;

Routed routed(const RoutedTuple& out) {
    need(out.size() == 5);
    const Routed found{stands<std::uint8_t>(out[0]), stands<float>(out[1]), stands<std::int32_t>(out[2]),
                       stands<float>(out[3]), stands<std::int32_t>(out[4])};
    const std::size_t n = found.exited.size();
    need(found.score.size() == n && found.label.size() == n && found.probability.size() == n &&
         found.deferred.size() == n);
    return found;
}

std::size_t route(const py::array& logits, const py::object& gate, const RuleTuple& rule, const RoutedTuple& out) {
    need(logits.ndim() == 2 && logits.shape(1) >= 1 && logits.shape(1) < std::int64_t{1} << 31 && rule.size() == 3);
    const Routed found = routed(out);
    const auto rows = stands<const float>(logits);
    const auto gates = gate.is_none() ? std::span<const float>() : stands<const float>(gate);
    need(static_cast<std::size_t>(logits.shape(0)) == found.exited.size() &&
         gates.size() == (gate.is_none() ? 0 : found.exited.size()) && found.exited.size() < std::size_t{1} << 31);
    const auto n_classes = static_cast<std::size_t>(logits.shape(1));
    const Rule limits{gate.is_none() ? Score::probability : Score::gate, rule[0].cast<double>(), rule[1].cast<double>(),
                      rule[2].cast<float>()};
    const py::gil_scoped_release release;
    return stage1::route(rows, n_classes, gates, limits, found);
}

void check_index(std::span<const std::int32_t> index, std::size_t n) {
    for (const std::int32_t row : index) {
        need(row >= 0 && static_cast<std::size_t>(row) < n);
    }
}

void gather(const py::array& source, const py::array& index, const py::array& out) {
    need(source.ndim() == 2 && out.ndim() == 2 && out.shape(1) == source.shape(1) && out.shape(0) == index.size());
    const auto rows = stands<const float>(source);
    const auto gathered = stands<float>(out);
    const auto places = stands<const std::int32_t>(index);
    const auto n = static_cast<std::size_t>(source.shape(0));
    const auto width = static_cast<std::size_t>(source.shape(1));
    const py::gil_scoped_release release;
    check_index(places, n);
    stage1::gather(rows, width, places, gathered);
}

void merge(const py::array& index, const AnswersTuple& answers, const AnswersTuple& out) {
    need(answers.size() == 3 && out.size() == 3);
    const auto places = stands<const std::int32_t>(index);
    const auto labels = stands<const std::int32_t>(answers[0]);
    const auto probabilities = stands<const float>(answers[1]);
    const auto scores = stands<const float>(answers[2]);
    const Routed found{{}, stands<float>(out[2]), stands<std::int32_t>(out[0]), stands<float>(out[1]), {}};
    need(labels.size() == places.size() && probabilities.size() == places.size() && scores.size() == places.size() &&
         found.probability.size() == found.label.size() && found.score.size() == found.label.size());
    const py::gil_scoped_release release;
    check_index(places, found.label.size());
    stage1::merge(places, labels, probabilities, scores, found);
}

}  // namespace

// At most six arguments each: pybind11 keeps more on the heap.
void bind_route(py::module_& module) {
    module.def("route", &route, py::arg("logits"), py::arg("gate").none(true), py::arg("rule"), py::arg("out"),
               "Decides rows [N, K] by (scale, offset, threshold) into the five arrays [N], and returns how many are "
               "deferred");
    module.def("gather", &gather, py::arg("source"), py::arg("index"), py::arg("out"),
               "Rows index [M] of source [N, D] into out [M, D]");
    module.def("merge", &merge, py::arg("index"), py::arg("answers"), py::arg("out"),
               "Writes (label, probability, score) [M] to rows index [M] of the same three [N]");
}

}  // namespace stage1::bindings
