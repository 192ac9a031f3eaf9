// The core's only exception, and the macro that throws it with a readable message.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace onp {

// Mapped to onp.errors.NativeError by the bindings.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace onp

// ONP_CHECK(rows > 0, "message_passing: rows must be positive, got ", rows)
#define ONP_CHECK(condition, ...)                                 \
  do {                                                            \
    if (!(condition)) throw ::onp::Error(::onp::concat(__VA_ARGS__)); \
  } while (false)
