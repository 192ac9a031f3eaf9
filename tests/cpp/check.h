// A failed CHECK prints where and what, and makes the test program fail at its end.
#pragma once

#include <cstdio>

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      ++failures();                                                             \
    }                                                                           \
  } while (false)

#define CHECK_THROWS(expression, Exception) \
  do {                                      \
    bool thrown = false;                    \
    try {                                   \
      expression;                           \
    } catch (const Exception&) {            \
      thrown = true;                        \
    }                                       \
    CHECK(thrown&& #expression);            \
  } while (false)

// The exit status of main.
inline int report() {
  std::printf("%d failed checks\n", failures());
  return failures() == 0 ? 0 : 1;
}
