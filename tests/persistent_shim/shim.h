/* Runs CUDA C++ on a CPU: every thread of every block is a fiber, and all are resident at once.
 *
 * A fiber runs until it waits for others: at __syncthreads, at a shuffle, or for a word that another
 * block changes. Which of those that can go on does so next is chosen by a seed, so that a barrier
 * that is missing shows in the results of some seed. A state in which none can go on is an error,
 * and so are threads that meet at different barriers. Shared memory and stacks hold 0xFF at first.
 */
#pragma once
#define HOST_SHIM

#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __launch_bounds__(threads, blocks)
#define SHARED_MEMORY(type, name) type &name = *(type *)shim::shared_memory(sizeof(type))
#define __syncthreads() shim::meet_block(__LINE__)
#define __shfl_xor_sync(lanes, value, offset) shim::exchange(value, offset, __LINE__)

struct uint4 {
  unsigned x, y, z, w;
};
struct Place {
  unsigned x, y, z;
};

namespace shim {
void *shared_memory(size_t bytes);
void meet_block(int line);
/* Waits until all lanes of the warp have given a number; gives that of a lane. */
uint64_t exchange_bits(uint64_t bits, int offset, int line);
void word_changed();
void wait_for_a_change();

template <class T>
T exchange(T value, int offset, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange_bits(bits, offset, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace shim

extern Place threadIdx, blockIdx, gridDim;

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) {
  float number;
  memcpy(&number, &bits, 4);
  return number;
}
inline unsigned __float_as_uint(float number) {
  unsigned bits;
  memcpy(&bits, &number, 4);
  return bits;
}
inline float rsqrtf(float number) { return 1.0f / sqrtf(number); }

inline float float_of_half(unsigned short bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return (float)half;
}
inline unsigned short half_of_float(float number) {
  const _Float16 half = (_Float16)number;
  unsigned short bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline uint4 load_stored(const uint4 *place) { return *place; }
template <class T>
T load_fresh(const T *place) {
  return *place;
}
void prefetch_line(const char *place);
inline unsigned add_release(unsigned *word, unsigned number) {
  const unsigned before = *word;
  *word = before + number;
  shim::word_changed();
  return before;
}
inline unsigned load_acquire(const unsigned *word) { return *word; }
inline void idle() { shim::wait_for_a_change(); }
