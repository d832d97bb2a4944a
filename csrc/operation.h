// An operation of the compiled libraries: a struct of arguments, whose fields are its schema, and one function for each
// device that takes the struct. A file that implements an operation registers it; there is no list of operations.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace frskd {

using torch::stable::Tensor;

// Inside a struct of arguments: the fields that are read, in the order in which Python passes them. A field may itself
// be such a struct, whose fields then stand in its place.
#define FRSKD_INPUTS(...)               \
  template <typename Visitor>           \
  void visit_inputs(Visitor& visitor) { \
    visitor(#__VA_ARGS__, __VA_ARGS__); \
  }

// The fields that are written, behind all that are read.
#define FRSKD_OUTPUTS(...)               \
  template <typename Visitor>            \
  void visit_outputs(Visitor& visitor) { \
    visitor(#__VA_ARGS__, __VA_ARGS__);  \
  }

namespace operation {

template <typename T, typename = void>
struct IsGroup : std::false_type {};
template <typename T>
struct IsGroup<T, std::void_t<decltype(std::declval<T&>().visit_inputs(std::declval<int&>()))>> : std::true_type {};

// The schema's name of a C++ type; `written` marks memory that the operation writes.
inline std::string type_of(const Tensor&, const std::string& written) { return "Tensor" + written; }
inline std::string type_of(const std::optional<Tensor>&, const std::string& written) {
  return "Tensor" + written + "?";
}
inline std::string type_of(const std::vector<Tensor>&, const std::string& written) { return "Tensor" + written + "[]"; }
inline std::string type_of(const double&, const std::string&) { return "float"; }
inline std::string type_of(const std::int64_t&, const std::string&) { return "int"; }
inline std::string type_of(const bool&, const std::string&) { return "bool"; }
inline std::string type_of(const std::vector<double>&, const std::string&) { return "float[]"; }
inline std::string type_of(const std::vector<std::int64_t>&, const std::string&) { return "int[]"; }

// Writes "Tensor[] inputs, float epsilon" from the names and the types of the fields.
class SchemaWriter {
 public:
  template <typename... Fields>
  void operator()(const char* names, Fields&... fields) {
    std::string rest = names;
    (add(next_name(rest), fields), ...);
  }

  bool writes = false;
  std::string text;

 private:
  static std::string next_name(std::string& rest) {
    const std::size_t comma = rest.find(", ");
    const std::string name = rest.substr(0, comma);
    rest = comma == std::string::npos ? "" : rest.substr(comma + 2);
    return name;
  }

  template <typename Field>
  void add(const std::string& name, Field& field) {
    if constexpr (IsGroup<Field>::value) {
      field.visit_inputs(*this);
    } else {
      const std::string written = writes ? std::string("(") + alias_++ + "!)" : "";
      text += (text.empty() ? "" : ", ") + type_of(field, written) + " " + name;
    }
  }

  char alias_ = 'a';
};

// Raises unless a tensor's storage has the bytes that its sizes and strides reach: one that was freed or shrunk, by
// untyped_storage().resize_() as sharding does it, would be read beyond its end. `names` begins with the tensor's.
inline void check_storage(const Tensor& tensor, const char* names) {
  if (!tensor.defined() || tensor.numel() == 0) return;
  std::int64_t last = tensor.storage_offset(), bytes = 0;
  for (std::int64_t axis = 0; axis < tensor.dim(); ++axis) last += (tensor.size(axis) - 1) * tensor.stride(axis);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const std::int64_t wanted = (last + 1) * static_cast<std::int64_t>(tensor.element_size());
  if (bytes >= wanted) return;
  const std::string text = names;
  STD_TORCH_CHECK(
      false, text.substr(0, text.find(", ")), " has a storage of ", bytes, " bytes, but ", wanted,
      " were wanted; it was freed or shrunk, for example by untyped_storage().resize_().");
}
inline void check_storage(const std::optional<Tensor>& tensor, const char* names) {
  if (tensor) check_storage(*tensor, names);
}
inline void check_storage(const std::vector<Tensor>& tensors, const char* names) {
  for (const Tensor& tensor : tensors) check_storage(tensor, names);
}
template <typename Number>
void check_storage(const Number&, const char*) {}

// Takes the fields off the stack on which PyTorch passes arguments.
class StackReader {
 public:
  explicit StackReader(StableIValue* stack) : next_(stack) {}

  template <typename... Fields>
  void operator()(const char* names, Fields&... fields) {
    (take(names, fields), ...);
  }

 private:
  template <typename Field>
  void take(const char*& names, Field& field) {
    if constexpr (IsGroup<Field>::value) {
      field.visit_inputs(*this);
    } else {
      field = torch::stable::detail::to<Field>(*next_++);
      check_storage(field, names);
    }
    while (*names != 0 && *names != ',') ++names;
    while (*names == ',' || *names == ' ') ++names;
  }

  StableIValue* next_;
};

template <auto function>
struct Boxed;

template <typename Arguments, void (*function)(const Arguments&)>
struct Boxed<function> {
  static std::string schema(const char* name) {
    Arguments arguments;
    SchemaWriter writer;
    arguments.visit_inputs(writer);
    writer.writes = true;
    arguments.visit_outputs(writer);
    return std::string(name) + "(" + writer.text + ") -> ()";
  }

  static void call(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments arguments;
    StackReader reader(stack);
    arguments.visit_inputs(reader);
    arguments.visit_outputs(reader);
    function(arguments);
  }
};

}  // namespace operation
}  // namespace frskd

#define FRSKD_DEFINE_OPERATION(library, device, function)                   \
  STABLE_TORCH_LIBRARY_FRAGMENT(library, m) {                               \
    m.def(::frskd::operation::Boxed<&function>::schema(#function).c_str()); \
  }                                                                         \
  STABLE_TORCH_LIBRARY_IMPL(library, device, m) { m.impl(#function, &::frskd::operation::Boxed<&function>::call); }

// In csrc/cpu, once for each function: defines the operation and implements it for CPU tensors.
#define FRSKD_CPU_OPERATION(function) FRSKD_DEFINE_OPERATION(frskd_fast_native, CPU, function)

// In csrc/cuda: implements the operation for CUDA tensors. The tests run the same kernels on CPU tensors, under another
// name.
#ifdef FRSKD_EMULATED
#define FRSKD_CUDA_OPERATION(function) FRSKD_DEFINE_OPERATION(frskd_fast_emulated, CPU, function)
#else
#define FRSKD_CUDA_OPERATION(function)                              \
  STABLE_TORCH_LIBRARY_IMPL(frskd_fast_native, CUDA, m) {           \
    m.impl(#function, &::frskd::operation::Boxed<&function>::call); \
  }
#endif
