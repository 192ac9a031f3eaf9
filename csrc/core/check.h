// The core's only exception, and the macro that throws it with a readable message.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace onp {

// Mapped to onp.errors.NativeError by the bindings.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Text of a number or a string. No streams: they read the process's locale, which other libraries
// in it may have set up with a C++ runtime of their own.
template <typename Part>
std::string text_of(const Part& part) {
  if constexpr (std::is_arithmetic_v<Part>) {
    return std::to_string(part);
  } else {
    return std::string(part);
  }
}

template <typename... Parts>
std::string concat(const Parts&... parts) {
  return (std::string() + ... + text_of(parts));
}

}  // namespace onp

// ONP_CHECK(rows > 0, "message_passing: rows must be positive, got ", rows)
#define ONP_CHECK(condition, ...)                                     \
  do {                                                                \
    if (!(condition)) throw ::onp::Error(::onp::concat(__VA_ARGS__)); \
  } while (false)
