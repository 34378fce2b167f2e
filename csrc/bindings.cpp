// fusedloss._native: fusedloss.h as a Python module. Pointers are plain integers, 0 for null; nothing is checked here
// that the C surface does not check.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings.h"

// Each in the file of its name, <name>_bindings.cpp.
void add_spherical(py::module_& m);
void add_permutahedron(py::module_& m);
void add_permutation(py::module_& m);
void add_sinkhorn(py::module_& m);
void add_running(py::module_& m);
void add_networks(py::module_& m);
void add_laplace(py::module_& m);
void add_threshold(py::module_& m);
void add_pairwise(py::module_& m);

namespace {

void raise_if(int status) {
  if (status) throw std::runtime_error(fl_error());
}

fl_tile make_tile(uintptr_t data, int64_t rows, int64_t columns, int64_t stride, int32_t dtype, int64_t first_column,
                  int64_t first_row, float softcap, float scale, uintptr_t bias, uintptr_t class_scale,
                  uintptr_t class_shift, uintptr_t scale_pointer) {
  fl_tile t{};
  t.data = pointer<const void>(data);
  t.rows = rows;
  t.columns = columns;
  t.stride = stride;
  t.first_column = first_column;
  t.first_row = first_row;
  t.dtype = dtype;
  t.softcap = softcap;
  t.scale = scale;
  t.bias = pointer<const float>(bias);
  t.class_scale = pointer<const float>(class_scale);
  t.class_shift = pointer<const float>(class_shift);
  t.scale_pointer = pointer<const float>(scale_pointer);
  return t;
}

fl_statistic make_statistic(int32_t kind, int32_t where, int32_t function, int32_t count, double factor,
                            double parameter, double weight, uintptr_t rest, uintptr_t row_label,
                            uintptr_t column_label, uintptr_t above, uintptr_t below, uintptr_t at, int64_t at_stride,
                            uintptr_t operand, int64_t operand_stride, int32_t operand_dtype, uintptr_t row,
                            uintptr_t state, uintptr_t coefficient, uintptr_t keep, int64_t keep_stride,
                            int32_t keep_dtype, int64_t keep_block, uintptr_t keep_shift) {
  fl_statistic s{};
  s.keep = pointer<void>(keep);
  s.keep_stride = keep_stride;
  s.keep_dtype = keep_dtype;
  s.keep_block = keep_block;
  s.keep_shift = pointer<float>(keep_shift);
  s.kind = kind;
  s.where = where;
  s.function = function;
  s.count = count;
  s.factor = factor;
  s.parameter = parameter;
  s.weight = weight;
  s.rest = pointer<const int64_t>(rest);
  s.row_label = pointer<const int64_t>(row_label);
  s.column_label = pointer<const int64_t>(column_label);
  s.above = pointer<const float>(above);
  s.below = pointer<const float>(below);
  s.at = pointer<const int64_t>(at);
  s.at_stride = at_stride;
  s.operand = pointer<const void>(operand);
  s.operand_stride = operand_stride;
  s.operand_dtype = operand_dtype;
  s.row = pointer<const float>(row);
  s.state = pointer<double>(state);
  s.coefficient = pointer<const float>(coefficient);
  return s;
}

fl_sums make_sums(uintptr_t bias, uintptr_t class_shift, uintptr_t class_scale, uintptr_t scale, uintptr_t largest) {
  return {pointer<float>(bias), pointer<float>(class_shift), pointer<float>(class_scale), pointer<double>(scale),
          pointer<float>(largest)};
}

void statistics(const fl_tile& tile, const std::vector<fl_statistic>& wanted) {
  int status;
  {
    py::gil_scoped_release released;
    status = fl_statistics(&tile, wanted.data(), (int32_t)wanted.size());
  }
  raise_if(status);
}

void column_statistics(const fl_tile& tile, const std::vector<fl_statistic>& wanted) {
  int status;
  {
    py::gil_scoped_release released;
    status = fl_column_statistics(&tile, wanted.data(), (int32_t)wanted.size());
  }
  raise_if(status);
}

void gradient(const fl_tile& tile, uintptr_t out, int64_t out_stride, int32_t out_dtype,
              const std::vector<fl_statistic>& wanted, const fl_sums* sums, const std::vector<fl_statistic>& across) {
  int status;
  {
    py::gil_scoped_release released;
    status = fl_gradient(&tile, pointer<void>(out), out_stride, out_dtype, wanted.data(), (int32_t)wanted.size(),
                         across.data(), (int32_t)across.size(), sums);
  }
  raise_if(status);
}

void gradient_of_exponentials(const fl_tile& tile, const std::vector<fl_statistic>& wanted, const fl_sums* sums) {
  int status;
  {
    py::gil_scoped_release released;
    status = fl_gradient_of_exponentials(&tile, wanted.data(), (int32_t)wanted.size(), sums);
  }
  raise_if(status);
}

void take_columns(uintptr_t data, int64_t rows, int64_t stride, int32_t dtype, uintptr_t columns, int64_t count) {
  int status;
  {
    py::gil_scoped_release released;
    status = fl_take_columns(pointer<void>(data), rows, stride, dtype, pointer<const int64_t>(columns), count);
  }
  raise_if(status);
}

// The struct itself, for a library that has the same C surface and is loaded in another way.
template <class Struct>
py::bytes bytes_of(const Struct& s) { return py::bytes(reinterpret_cast<const char*>(&s), sizeof s); }

// ---- CUDA: they only launch, which is not worth giving the interpreter away for --------------------------------------

int64_t cuda_statistics_workspace(const fl_tile& tile, const std::vector<fl_statistic>& wanted) {
  return fl_cuda_statistics_workspace(&tile, wanted.data(), (int32_t)wanted.size());
}

void cuda_statistics(const fl_tile& tile, const std::vector<fl_statistic>& wanted, uintptr_t workspace, int64_t bytes,
                     uintptr_t stream) {
  raise_if(fl_cuda_statistics(&tile, wanted.data(), (int32_t)wanted.size(), pointer<void>(workspace), bytes,
                              pointer<void>(stream)));
}

int64_t cuda_column_statistics_workspace(const fl_tile& tile, const std::vector<fl_statistic>& wanted) {
  return fl_cuda_column_statistics_workspace(&tile, wanted.data(), (int32_t)wanted.size());
}

void cuda_column_statistics(const fl_tile& tile, const std::vector<fl_statistic>& wanted, uintptr_t workspace,
                            int64_t bytes, uintptr_t stream) {
  raise_if(fl_cuda_column_statistics(&tile, wanted.data(), (int32_t)wanted.size(), pointer<void>(workspace), bytes,
                                     pointer<void>(stream)));
}

int64_t cuda_gradient_workspace(const fl_tile& tile, const std::vector<fl_statistic>& wanted, const fl_sums* sums,
                                const std::vector<fl_statistic>& across) {
  return fl_cuda_gradient_workspace(&tile, wanted.data(), (int32_t)wanted.size(), across.data(), (int32_t)across.size(),
                                    sums);
}

void cuda_gradient(const fl_tile& tile, uintptr_t out, int64_t out_stride, int32_t out_dtype,
                   const std::vector<fl_statistic>& wanted, const fl_sums* sums, const std::vector<fl_statistic>& across,
                   uintptr_t workspace, int64_t bytes, uintptr_t stream) {
  raise_if(fl_cuda_gradient(&tile, pointer<void>(out), out_stride, out_dtype, wanted.data(), (int32_t)wanted.size(),
                            across.data(), (int32_t)across.size(), sums, pointer<void>(workspace), bytes,
                            pointer<void>(stream)));
}

void cuda_gradient_of_exponentials(const fl_tile& tile, const std::vector<fl_statistic>& wanted, const fl_sums* sums,
                                   uintptr_t workspace, int64_t bytes, uintptr_t stream) {
  raise_if(fl_cuda_gradient_of_exponentials(&tile, wanted.data(), (int32_t)wanted.size(), sums, pointer<void>(workspace),
                                            bytes, pointer<void>(stream)));
}

int gemm(int64_t m, int64_t n, int64_t k, uintptr_t a, int64_t a_row, int64_t a_column, uintptr_t b, int64_t b_row,
         int64_t b_column, uintptr_t c, int64_t c_row, int32_t dtype, bool accumulate) {
  py::gil_scoped_release released;
  return fl_gemm(m, n, k, pointer<const void>(a), a_row, a_column, pointer<const void>(b), b_row, b_column,
                 pointer<float>(c), c_row, dtype, accumulate);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The C surface of fusedloss (csrc/fusedloss.h). Pointers are integers, 0 for null.";

  py::class_<fl_tile>(m, "Tile").def(
      py::init(&make_tile), py::kw_only(), py::arg("data"), py::arg("rows"), py::arg("columns"), py::arg("stride"),
      py::arg("dtype"), py::arg("first_column") = 0, py::arg("first_row") = 0, py::arg("softcap") = 0.0f,
      py::arg("scale") = 1.0f, py::arg("bias") = 0, py::arg("class_scale") = 0, py::arg("class_shift") = 0,
      py::arg("scale_pointer") = 0).def("__bytes__", &bytes_of<fl_tile>);
  py::class_<fl_statistic>(m, "Statistic").def(
      py::init(&make_statistic), py::kw_only(), py::arg("kind"), py::arg("where") = (int)FL_ALL, py::arg("function") = 0,
      py::arg("count") = 1, py::arg("factor") = 1.0, py::arg("parameter") = 0.0, py::arg("weight") = 1.0,
      py::arg("rest") = 0, py::arg("row_label") = 0, py::arg("column_label") = 0, py::arg("above") = 0,
      py::arg("below") = 0, py::arg("at") = 0, py::arg("at_stride") = 1, py::arg("operand") = 0, py::arg("operand_stride") = 0,
      py::arg("operand_dtype") = (int)FL_F32, py::arg("row") = 0, py::arg("state") = 0, py::arg("coefficient") = 0,
      py::arg("keep") = 0, py::arg("keep_stride") = 0, py::arg("keep_dtype") = (int)FL_F32,
      py::arg("keep_block") = FL_KEPT_COLUMNS, py::arg("keep_shift") = 0).def("__bytes__", &bytes_of<fl_statistic>);
  py::class_<fl_sums>(m, "Sums").def(py::init(&make_sums), py::kw_only(), py::arg("bias") = 0, py::arg("class_shift") = 0,
                                     py::arg("class_scale") = 0, py::arg("scale") = 0, py::arg("largest") = 0)
      .def("__bytes__", &bytes_of<fl_sums>);

  m.def("statistics", &statistics, py::arg("tile"), py::arg("statistics"));
  m.def("column_statistics", &column_statistics, py::arg("tile"), py::arg("statistics"));
  m.def("gradient", &gradient, py::arg("tile"), py::arg("out"), py::arg("out_stride"), py::arg("out_dtype"),
        py::arg("statistics"), py::arg("sums") = py::none(), py::arg("across") = std::vector<fl_statistic>());
  m.def("gradient_of_exponentials", &gradient_of_exponentials, py::arg("tile"), py::arg("statistics"),
        py::arg("sums") = py::none());
  m.def("take_columns", &take_columns, py::arg("data"), py::arg("rows"), py::arg("stride"), py::arg("dtype"),
        py::arg("columns"), py::arg("count"));
  m.def("gemm", &gemm, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("a"), py::arg("a_row"), py::arg("a_column"),
        py::arg("b"), py::arg("b_row"), py::arg("b_column"), py::arg("c"), py::arg("c_row"), py::arg("dtype"),
        py::arg("accumulate"), "Nonzero: no kernel for the dtype on this processor, nothing was written.");
  m.def("gemm_available", [](int32_t dtype) { return fl_gemm_available(dtype) != 0; }, py::arg("dtype"));
  m.def("cuda_compiled", [] { return fl_cuda_compiled() != 0; });
  m.def("cuda_statistics_workspace", &cuda_statistics_workspace, py::arg("tile"), py::arg("statistics"));
  m.def("cuda_statistics", &cuda_statistics, py::arg("tile"), py::arg("statistics"), py::arg("workspace"),
        py::arg("bytes"), py::arg("stream"));
  m.def("cuda_column_statistics_workspace", &cuda_column_statistics_workspace, py::arg("tile"), py::arg("statistics"));
  m.def("cuda_column_statistics", &cuda_column_statistics, py::arg("tile"), py::arg("statistics"), py::arg("workspace"),
        py::arg("bytes"), py::arg("stream"));
  m.def("cuda_gradient_workspace", &cuda_gradient_workspace, py::arg("tile"), py::arg("statistics"), py::arg("sums"),
        py::arg("across") = std::vector<fl_statistic>());
  m.def("cuda_gradient", &cuda_gradient, py::arg("tile"), py::arg("out"), py::arg("out_stride"), py::arg("out_dtype"),
        py::arg("statistics"), py::arg("sums"), py::arg("across"), py::arg("workspace"), py::arg("bytes"),
        py::arg("stream"));
  m.def("cuda_gradient_of_exponentials", &cuda_gradient_of_exponentials, py::arg("tile"), py::arg("statistics"),
        py::arg("sums"), py::arg("workspace"), py::arg("bytes"), py::arg("stream"));
  m.def("isa", [] { return std::string(fl_isa()); });
  m.def("set_isa", [](const char* name) { raise_if(fl_set_isa(name)); }, py::arg("name").none(true));

#define FL_CONSTANT(name) m.attr(#name) = (int)FL_##name;
  FL_CONSTANT(F32) FL_CONSTANT(BF16) FL_CONSTANT(F16)
  FL_CONSTANT(SCORE) FL_CONSTANT(LOGSUMEXP) FL_CONSTANT(SUM) FL_CONSTANT(SUM_OF_SQUARES) FL_CONSTANT(MOMENTS)
  FL_CONSTANT(EXPECTATION) FL_CONSTANT(SUM_OF) FL_CONSTANT(EXTREME) FL_CONSTANT(COUNT) FL_CONSTANT(LOGSUMEXP_OF)
  FL_CONSTANT(ALL) FL_CONSTANT(REST) FL_CONSTANT(SAME) FL_CONSTANT(OTHER) FL_CONSTANT(ABOVE) FL_CONSTANT(BELOW)
  FL_CONSTANT(V_OPERAND) FL_CONSTANT(V_SCORE) FL_CONSTANT(V_ABSOLUTE) FL_CONSTANT(V_SQUARE)
  FL_CONSTANT(F_SOFTPLUS) FL_CONSTANT(F_SIGMOID) FL_CONSTANT(F_HINGE) FL_CONSTANT(F_SQUARED_HINGE) FL_CONSTANT(F_FOCAL)
  FL_CONSTANT(G_LOG_TANH) FL_CONSTANT(G_LOG_ATAN) FL_CONSTANT(G_LOG_RELU) FL_CONSTANT(G_CIRCLE)
#undef FL_CONSTANT
  m.attr("KEPT_COLUMNS") = FL_KEPT_COLUMNS;
  m.attr("CUDA_KEPT_COLUMNS") = FL_CUDA_KEPT_COLUMNS;
  m.attr("CUDA_STATISTICS") = FL_CUDA_STATISTICS;
  add_spherical(m);
  add_permutahedron(m);
  add_permutation(m);
  add_sinkhorn(m);
  add_running(m);
  add_networks(m);
  add_laplace(m);
  add_threshold(m);
  add_pairwise(m);
}
