/* The scheduler of shim.h, and the kernel's source behind it; compiled as one file. */
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <tuple>
#include <utility>
#include <vector>

/* For sources that a test has changed: which of its changes holds. */
static volatile int planted = -1;

#include KERNEL_SOURCE

Place threadIdx, blockIdx, gridDim;

namespace {

constexpr size_t STACK_BYTES = 1 << 16;
constexpr int LANES = 32;

struct Fiber {
  ucontext_t context; /* where it begins; from then on jumps are enough, which call no system */
  jmp_buf place;
  bool begun;
  Place thread, block;
  uint64_t given[2];
  unsigned exchanges;
};

struct Group {  // those that meet: a block, or a warp
  std::vector<int> waiting;
  int size;
  int line;
};

struct Run {
  std::vector<Fiber> fibers;
  std::vector<char> stacks, shared;
  std::vector<Group> blocks, warps;
  std::vector<int> ready, spinning;
  ucontext_t main;
  jmp_buf scheduler;
  void (*kernel)(void **);
  void **arguments;
  const char *problem;
  char said[200];
  int current, live, threads, favourite, patience;
  uint64_t state;
  size_t shared_bytes;
  long prefetched;
};

Run *run;

unsigned random_number(unsigned below) {
  run->state ^= run->state << 13;
  run->state ^= run->state >> 7;
  run->state ^= run->state << 17;
  return (unsigned)((run->state >> 33) % below);
}

/* Picks of the ready fibers those of a favourite block, and of a favourite warp before them, as long
 * as it finds some: so blocks and warps run far ahead of others. Favourites change now and then, the
 * seldomer the larger the seed's last part. */
unsigned choose() {
  constexpr int TRIES = 12;
  if (random_number(16u << run->patience) == 0) run->favourite = random_number(run->fibers.size());
  const int count = run->ready.size(), warp = run->favourite / LANES;
  int best = 0, best_rank = -1;
  for (int i = 0; i < TRIES && best_rank < 2; i++) {
    const int place = random_number(count), fiber = run->ready[place];
    const int rank = fiber / LANES == warp ? 2 : fiber / run->threads == run->favourite / run->threads;
    if (rank > best_rank) {
      best = place;
      best_rank = rank;
    }
  }
  return best;
}

void leave() {
  if (!_setjmp(run->fibers[run->current].place)) _longjmp(run->scheduler, 1);
}

void resume(Fiber &fiber) {
  if (_setjmp(run->scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  swapcontext(&run->main, &fiber.context);
}

void fail(const char *what, int a, int b) {
  if (!run->problem) {
    snprintf(run->said, sizeof run->said, what, a, b);
    run->problem = run->said;
  }
}

void meet(Group &group, int line) {
  if (group.waiting.empty()) {
    group.line = line;
  } else if (group.line != line) {
    fail("threads meet at different barriers, lines %d and %d", group.line, line);
  }
  group.waiting.push_back(run->current);
  if ((int)group.waiting.size() == group.size) {
    for (int fiber : group.waiting) run->ready.push_back(fiber);
    group.waiting.clear();
  }
  leave();
}

void begin() {
  run->kernel(run->arguments);
  run->live--;
  leave();
}

template <class... T, size_t... I>
void call(void (*kernel)(T...), void **arguments, std::index_sequence<I...>) {
  kernel(*(T *)arguments[I]...);
}

template <class... T>
void call_with(void (*kernel)(T...), void **arguments) {
  call(kernel, arguments, std::index_sequence_for<T...>{});
}

void step_kernel(void **arguments) { call_with(persistent_step, arguments); }
void barrier_kernel(void **arguments) { call_with(grid_barriers, arguments); }

const char *run_all(void (*kernel)(void **), void **arguments, int blocks, int threads,
                    uint64_t seed) {
  static Run kept;
  run = &kept;
  const int count = blocks * threads;
  run->fibers.assign(count, Fiber());
  run->stacks.assign(count * STACK_BYTES, (char)0xff);
  run->blocks.assign(blocks, Group{{}, threads, 0});
  run->warps.assign(count / LANES, Group{{}, LANES, 0});
  run->shared.clear();
  run->shared_bytes = 0;
  run->ready.clear();
  run->spinning.clear();
  run->kernel = kernel;
  run->arguments = arguments;
  run->problem = nullptr;
  run->prefetched = 0;
  run->live = count;
  run->threads = threads;
  run->state = seed * 2 + 1;
  run->favourite = 0;
  run->patience = seed % 8 * 2;
  gridDim = {(unsigned)blocks, 1, 1};
  for (int i = 0; i < count; i++) {
    Fiber &fiber = run->fibers[i];
    fiber.thread = {(unsigned)(i % threads), 0, 0};
    fiber.block = {(unsigned)(i / threads), 0, 0};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = &run->stacks[i * STACK_BYTES];
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin, 0);
    run->ready.push_back(i);
  }
  while (run->live && !run->problem) {
    if (run->ready.empty()) {
      fail("deadlock: %d threads of %d wait and none can go on", run->live, count);
      break;
    }
    const unsigned chosen = choose();
    run->current = run->ready[chosen];
    run->ready[chosen] = run->ready.back();
    run->ready.pop_back();
    threadIdx = run->fibers[run->current].thread;
    blockIdx = run->fibers[run->current].block;
    resume(run->fibers[run->current]);
  }
  return run->problem;
}

}  // namespace

namespace shim {

void *shared_memory(size_t bytes) {
  const size_t blocks = run->blocks.size();
  if (!run->shared_bytes) {
    run->shared_bytes = (bytes + 15) / 16 * 16;
    run->shared.assign(blocks * run->shared_bytes, (char)0xff);
  }
  return &run->shared[run->current / run->threads * run->shared_bytes];
}

void meet_block(int line) { meet(run->blocks[run->current / run->threads], line); }

/* A lane is at most one exchange ahead of the others of its warp: two slots are enough. */
uint64_t exchange_bits(uint64_t bits, int offset, int line) {
  const int own = run->current;
  Fiber &fiber = run->fibers[own];
  const unsigned slot = fiber.exchanges++ % 2;
  fiber.given[slot] = bits;
  meet(run->warps[own / LANES], line);
  return run->fibers[own ^ offset].given[slot];
}

void word_changed() {
  for (int fiber : run->spinning) run->ready.push_back(fiber);
  run->spinning.clear();
}

void wait_for_a_change() {
  run->spinning.push_back(run->current);
  leave();
}

}  // namespace shim

void prefetch_line(const char *place) {
  volatile char seen = *place; /* a fault where it is not in memory */
  (void)seen;
  run->prefetched++;
}

extern "C" {
/* Null, or what went wrong. arguments[i] points to the i-th argument. */
const char *run_step(void **arguments, int blocks, uint64_t seed) {
  return run_all(step_kernel, arguments, blocks, THREADS, seed);
}
const char *run_barriers(void **arguments, int blocks, uint64_t seed) {
  return run_all(barrier_kernel, arguments, blocks, THREADS, seed);
}
void plant(int change) { planted = change; }
long prefetched_lines(void) { return run ? run->prefetched : 0; }
}
