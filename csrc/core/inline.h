// For bodies that are written once and compiled into a caller for each instruction set.
#pragma once

#define ONP_INLINE inline __attribute__((always_inline))
