#include "stage1/route.hpp"

#include "arrays.hpp"

namespace stage1::bindings {
namespace {

void need(bool fits) {
    if (!fits) {
        throw std::invalid_argument("arrays must have the shapes that route.hpp states");
    }
}

Routed routed(Array<std::uint8_t>& exited, Array<float>& score, Array<std::int32_t>& label, Array<float>& probability,
              Array<std::int32_t>& deferred) {
    const Routed out{fill(exited), fill(score), fill(label), fill(probability), fill(deferred)};
    const std::size_t n = out.exited.size();
    need(out.score.size() == n && out.label.size() == n && out.probability.size() == n && out.deferred.size() == n);
    return out;
}

std::size_t route(const Array<float>& logits, const Array<float>& gate, bool use_gate, double scale, double offset,
                  float threshold, Array<std::uint8_t> exited, Array<float> score, Array<std::int32_t> label,
                  Array<float> probability, Array<std::int32_t> deferred) {
    need(logits.ndim() == 2 && logits.shape(1) >= 1);
    const Routed out = routed(exited, score, label, probability, deferred);
    const std::span<const float> rows(logits.data(), static_cast<std::size_t>(logits.size()));
    const auto gates = view(gate);
    need(static_cast<std::size_t>(logits.shape(0)) == out.exited.size() &&
         gates.size() == (use_gate ? out.exited.size() : 0) && out.exited.size() < std::size_t{1} << 31);
    const auto n_classes = static_cast<std::size_t>(logits.shape(1));
    const Rule rule{use_gate ? Score::gate : Score::probability, scale, offset, threshold};
    const py::gil_scoped_release release;
    return stage1::route(rows, n_classes, gates, rule, out);
}

void check_index(std::span<const std::int32_t> index, std::size_t n) {
    for (const std::int32_t row : index) {
        need(row >= 0 && static_cast<std::size_t>(row) < n);
    }
}

void gather(const Array<float>& source, const Array<std::int32_t>& index, Array<float> out) {
    need(source.ndim() == 2 && out.ndim() == 2 && out.shape(1) == source.shape(1) && out.shape(0) == index.size());
    const std::span<const float> rows(source.data(), static_cast<std::size_t>(source.size()));
    const std::span<float> gathered = fill(out);
    const auto places = view(index);
    const auto n = static_cast<std::size_t>(source.shape(0));
    const auto width = static_cast<std::size_t>(source.shape(1));
    const py::gil_scoped_release release;
    check_index(places, n);
    stage1::gather(rows, width, places, gathered);
}

void merge(const Array<std::int32_t>& index, const Array<std::int32_t>& label, const Array<float>& probability,
           const Array<float>& score, Array<std::int32_t> out_label, Array<float> out_probability,
           Array<float> out_score) {
    const auto places = view(index);
    const auto labels = view(label);
    const auto probabilities = view(probability);
    const auto scores = view(score);
    need(labels.size() == places.size() && probabilities.size() == places.size() && scores.size() == places.size() &&
         out_probability.size() == out_label.size() && out_score.size() == out_label.size());
    const Routed out{{}, fill(out_score), fill(out_label), fill(out_probability), {}};
    const py::gil_scoped_release release;
    check_index(places, out.label.size());
    stage1::merge(places, labels, probabilities, scores, out);
}

}  // namespace

void bind_route(py::module_& module) {
    module.def("route", &route, py::arg("logits").noconvert(), py::arg("gate").noconvert(), py::arg("use_gate"),
               py::arg("scale"), py::arg("offset"), py::arg("threshold"), py::arg("exited").noconvert(),
               py::arg("score").noconvert(), py::arg("label").noconvert(), py::arg("probability").noconvert(),
               py::arg("deferred").noconvert(),
               "Decides rows [N, K] into the five arrays [N], and returns how many are deferred");
    module.def("gather", &gather, py::arg("source").noconvert(), py::arg("index").noconvert(),
               py::arg("out").noconvert(), "Rows index [M] of source [N, D] into out [M, D]");
    module.def("merge", &merge, py::arg("index").noconvert(), py::arg("label").noconvert(),
               py::arg("probability").noconvert(), py::arg("score").noconvert(), py::arg("out_label").noconvert(),
               py::arg("out_probability").noconvert(), py::arg("out_score").noconvert(),
               "Writes answers [M] to rows index [M] of the three arrays [N]");
}

}  // namespace stage1::bindings
