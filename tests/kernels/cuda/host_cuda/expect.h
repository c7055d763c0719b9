// How the host checks of csrc's headers end: EXPECT(condition, printf arguments) prints the first thing that is wrong and fails.
#pragma once

#include <cstdio>
#include <cstdlib>

#define EXPECT(condition, ...)                   \
  if (!(condition)) {                            \
    std::printf("%s: ", #condition);             \
    std::printf(__VA_ARGS__);                    \
    std::printf("\n");                           \
    std::exit(1);                                \
  }
