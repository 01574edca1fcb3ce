// How a test sets the emulator of cuda_on_cpu.h.
#include "cuda_on_cpu.h"

extern "C" void emulator_order(int64_t seed) { emulator::order = seed; }
extern "C" void emulator_skip(const char* place) { emulator::skipped = place; }
