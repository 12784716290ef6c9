// Runs CUDA kernels on a CPU, for tests: one fiber per thread, blocks one after the other.
//
// Barriers count who arrives: a thread that misses one ends the program with a message. Shared memory is poisoned before every
// block. Races are not seen.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __host__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_shim {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10, kSharedBytes = 48 << 10;

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  unsigned char exchanged[8];
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned running;
inline const std::function<void()>* body;
inline std::vector<unsigned char> shared_memory(kSharedBytes);
inline std::map<const void*, size_t> shared_places;
inline size_t shared_used;

inline void wait(State barrier) {
  fibers[running].state = barrier;
  swapcontext(&fibers[running].context, &scheduler);
}

inline void enter() {
  (*body)();
  fibers[running].state = State::kDone;
  swapcontext(&fibers[running].context, &scheduler);
}

// The same place for all threads of a block, by where in the code it is asked for.
template <class T>
T* shared(const void* place, size_t count) {
  const auto [found, is_new] = shared_places.try_emplace(place, shared_used);
  if (is_new) shared_used += (count * sizeof(T) + 15) / 16 * 16;
  if (shared_used > kSharedBytes) std::fprintf(stderr, "cuda_shim: more than 48 KiB of shared memory\n"), std::abort();
  return reinterpret_cast<T*>(shared_memory.data() + found->second);
}

// Lets go whoever all have arrived: the warps first, else the block. False when every thread is done.
inline bool release() {
  bool released = false, alive = false;
  for (size_t first = 0; first < fibers.size(); first += kWarp) {
    const auto begin = fibers.begin() + first, end = fibers.begin() + std::min<size_t>(first + kWarp, fibers.size());
    const auto waits = [](const Fiber& f) { return f.state == State::kAtWarpBarrier; };
    const auto done = [](const Fiber& f) { return f.state == State::kDone; };
    alive = alive || !std::all_of(begin, end, done);
    if (std::none_of(begin, end, waits) || !std::all_of(begin, end, [&](const Fiber& f) { return waits(f) || done(f); })) continue;
    std::for_each(begin, end, [&](Fiber& f) { if (waits(f)) f.state = State::kReady; });
    released = true;
  }
  if (released || !alive) return released;
  for (Fiber& f : fibers) {
    if (f.state == State::kDone) continue;
    if (f.state != State::kAtBlockBarrier) std::fprintf(stderr, "cuda_shim: threads diverge at a barrier\n"), std::abort();
    f.state = State::kReady;
  }
  return true;
}

inline void run_block() {
  std::fill(shared_memory.begin(), shared_memory.end(), 0xff);
  shared_places.clear(), shared_used = 0;
  for (Fiber& f : fibers) {
    f.state = State::kReady;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size(), f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  do {
    for (running = 0; running < fibers.size(); ++running) {
      if (fibers[running].state != State::kReady) continue;
      threadIdx = dim3(running);
      swapcontext(&scheduler, &fibers[running].context);
    }
  } while (release());
}

inline void launch(dim3 grid, unsigned block, const std::function<void()>& kernel) {
  if (fibers.size() != block) {
    fibers = std::vector<Fiber>(block);
    for (Fiber& f : fibers) f.stack.resize(kStack);
  }
  gridDim = grid, blockDim = dim3(block), body = &kernel;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      run_block();
    }
}

}  // namespace cuda_shim

namespace cuda_shim {

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

inline float from_half(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace cuda_shim

inline void __syncthreads() { cuda_shim::wait(cuda_shim::State::kAtBlockBarrier); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  static_assert(sizeof(T) <= 8);
  using namespace cuda_shim;
  std::memcpy(fibers[running].exchanged, &value, sizeof value);
  wait(State::kAtWarpBarrier);
  T other;
  std::memcpy(&other, fibers[running ^ static_cast<unsigned>(offset)].exchanged, sizeof other);
  wait(State::kAtWarpBarrier);
  return other;
}

#define FASTREL_SHARED(type, name, size) \
  static const char name##_place = 0;    \
  type* name = cuda_shim::shared<type>(&name##_place, size)
