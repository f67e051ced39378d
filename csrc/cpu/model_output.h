// The model's output as a kernel reads it, asked of the tensor through its Python attributes: one build serves every
// torch release, at half the price of asking in Python.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <utility>
#include <vector>

#include "../common/address.h"

namespace fastsample {

namespace py = pybind11;

struct ModelOutput {
    Address address;
    int64_t stride;  // elements from sample to sample
    int dtype;
    bool guided;
};

// What an output may be where nothing has to be copied or checked beside it.
class PlainOutputs {
public:
    // layouts: (shape, stride, guided) of each; dtypes: in the order of DType.
    PlainOutputs(py::object tensor_type, std::vector<std::tuple<py::object, int64_t, bool>> layouts,
                 std::array<py::object, 3> dtypes)
        : tensor_type_(std::move(tensor_type)), layouts_(std::move(layouts)), dtypes_(std::move(dtypes)) {}

    // False where the tensor is no such output: a subclass, of another shape or dtype, elsewhere, strided or without memory.
    bool read(py::handle m, ModelOutput* output) const {
        try {
            return is_plain(m, output);
        } catch (py::error_already_set& error) {
            if (!is_refusal(error)) throw;
            return false;
        }
    }

private:
    // What tensors without memory, or without a shape, answer; Ctrl-C is none of it.
    static bool is_refusal(const py::error_already_set& error) {
        return error.matches(PyExc_AttributeError) || error.matches(PyExc_RuntimeError) || error.matches(PyExc_TypeError);
    }

    bool is_plain(py::handle m, ModelOutput* output) const {
        if (reinterpret_cast<PyObject*>(Py_TYPE(m.ptr())) != tensor_type_.ptr()) return false;
        return attribute(m, is_cpu_).is(py::handle(Py_True)) && has_dtype(m, output) && has_layout(m, output) &&
               call(m, is_contiguous_).is(py::handle(Py_True)) && call(m, is_neg_).is(py::handle(Py_False)) &&
               has_address(m, output);
    }

    static py::object attribute(py::handle m, const py::str& name) {
        PyObject* found = PyObject_GetAttr(m.ptr(), name.ptr());
        if (!found) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(found);
    }

    static py::object call(py::handle m, const py::str& name) {
        PyObject* self = m.ptr();
        PyObject* found = PyObject_VectorcallMethod(name.ptr(), &self, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
        if (!found) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(found);
    }

    bool has_dtype(py::handle m, ModelOutput* output) const {
        const py::object dtype = attribute(m, dtype_);
        for (output->dtype = 0; output->dtype < 3; ++output->dtype)
            if (dtype.is(dtypes_[output->dtype])) return true;
        return false;
    }

    bool has_layout(py::handle m, ModelOutput* output) const {
        const py::object shape = attribute(m, shape_);
        for (const auto& [accepted, stride, guided] : layouts_) {
            if (!shape.equal(accepted)) continue;
            output->stride = stride;
            output->guided = guided;
            return true;
        }
        return false;
    }

    bool has_address(py::handle m, ModelOutput* output) const {
        output->address = call(m, data_ptr_).cast<Address>();
        return output->address != 0;
    }

    static py::str interned(const char* name) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)); }

    py::object tensor_type_;
    std::vector<std::tuple<py::object, int64_t, bool>> layouts_;
    std::array<py::object, 3> dtypes_;
    py::str is_cpu_ = interned("is_cpu"), dtype_ = interned("dtype"), shape_ = interned("shape"),
            is_contiguous_ = interned("is_contiguous"), is_neg_ = interned("is_neg"), data_ptr_ = interned("data_ptr");
};

}  // namespace fastsample
