// Several decode steps of one sequence in one launch: the largest logit's token, step after step.
//
// The phases of a layer are the launches of runtime/kernel_step/decode_step.py, with a barrier of
// the whole grid where a launch would end. All blocks must be resident at once, so the launch is a
// cooperative one.
//
//     qkv       norm; queries, keys and values, and what mask scores are computed from
//     attend    norm and rotation per head, the new key's score, append; keys split over blocks
//     o         joins the shares; product; residual
//     gate_up   norm; both products, SiLU * up
//     down      product; residual
//     head      final norm; product; each block's largest logit. Every block finds the token of
//               them all and begins the next step with its embedding
//
// Between its arrival at a barrier and the wait, a thread asks for the first weights that it will
// multiply behind the barrier, and for a part of those that follow. What other blocks write is read
// past the cache of a block's own multiprocessor. Arithmetic is float32.
//
// A model's numbers and types are macros (launches.py). The code between HOST_SHIM's lines is all
// that a test replaces to run the rest on a CPU.

#ifndef HOST_SHIM
#define SHARED_MEMORY(type, name) __shared__ type name

__device__ float float_of_half(unsigned short bits) {
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
  return number;
}

__device__ unsigned short half_of_float(float number) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
  return bits;
}

// What the launch does not write. Volatile, so that it stays on its side of a barrier.
__device__ uint4 load_stored(const uint4 *place) {
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(place));
  return bits;
}

// What some block has written.
template <class T>
__device__ T load_fresh(const T *place) {
  return __ldcg(place);
}

__device__ void prefetch_line(const char *place) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
}

__device__ unsigned add_release(unsigned *word, unsigned number) {
  unsigned before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(word), "r"(number)
               : "memory");
  return before;
}

__device__ unsigned load_acquire(const unsigned *word) {
  unsigned found;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(word) : "memory");
  return found;
}

__device__ void idle() {}
#endif  // HOST_SHIM

// Number formats, as plugins/projection/packing.py numbers the kinds of weights.
#define FLOAT32 0
#define FLOAT16 1
#define BFLOAT16 2
#define INT8 3
#define INT4 4

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARPS = THREADS / WARP;
constexpr int GROUP_HEADS = QUERY_HEADS / KEY_HEADS;
constexpr int ATTENDED = QUERY_HEADS * HEAD_SIZE;
constexpr int HEAD_ROWS = (QUERY_HEADS + 2 * KEY_HEADS) * HEAD_SIZE;
constexpr int LINE_BYTES = 128;
// Below every finite logit but its own, so that differences of two largest ones are numbers.
constexpr float LOWEST = -3.4028234663852886e38f;
// No token has these keys: for a logit of minus infinity, and for one that is no number or infinite.
constexpr long long NO_KEY = -0x7fffffffffffffffLL - 1;
constexpr long long BROKEN_KEY = 0x7fffffffffffffffLL;

static_assert(THREADS % WARP == 0, "a block is whole warps");
static_assert(MAX_SPLITS <= WARP, "a lane joins a share");
static_assert(QUERY_HEADS % KEY_HEADS == 0 && QUERY_HEADS % SCORE_HEADS == 0, "heads");
static_assert(HEAD_SIZE % 2 == 0, "rotation is of pairs");

__device__ constexpr int at_most(int number, int limit) { return number < limit ? number : limit; }
__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__device__ constexpr int blocks_of(int number, int size) { return (number + size - 1) / size; }
// The largest power of two up to a number.
__device__ constexpr int power_below(int number) { return number < 2 ? 1 : 2 * power_below(number / 2); }

// --- number formats: what 16 bytes hold ---

template <int KIND>
struct Stored;

template <>
struct Stored<FLOAT32> {
  static constexpr int CHUNK = 4;
  typedef float Number;
  static __device__ float widen(Number number) { return number; }
  static __device__ Number narrow(float number) { return number; }
  static __device__ void unpack(const uint4 &bits, float *numbers) {
    numbers[0] = __uint_as_float(bits.x);
    numbers[1] = __uint_as_float(bits.y);
    numbers[2] = __uint_as_float(bits.z);
    numbers[3] = __uint_as_float(bits.w);
  }
};

template <>
struct Stored<FLOAT16> {
  static constexpr int CHUNK = 8;
  typedef unsigned short Number;
  static __device__ float widen(Number number) { return float_of_half(number); }
  static __device__ Number narrow(float number) { return half_of_float(number); }
  static __device__ void unpack(const uint4 &bits, float *numbers) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      numbers[2 * w] = float_of_half((unsigned short)words[w]);
      numbers[2 * w + 1] = float_of_half((unsigned short)(words[w] >> 16));
    }
  }
};

template <>
struct Stored<BFLOAT16> {
  static constexpr int CHUNK = 8;
  typedef unsigned short Number;
  static __device__ float widen(Number number) { return __uint_as_float((unsigned)number << 16); }
  // Rounds to nearest, ties to even; what is no number stays none.
  static __device__ Number narrow(float number) {
    const unsigned bits = __float_as_uint(number);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (Number)((bits >> 16) | 0x40u);
    return (Number)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
  static __device__ void unpack(const uint4 &bits, float *numbers) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      numbers[2 * w] = __uint_as_float(words[w] << 16);
      numbers[2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
    }
  }
};

template <>
struct Stored<INT8> {
  static constexpr int CHUNK = 16;
  static __device__ void unpack(const uint4 &bits, float *numbers) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
#pragma unroll
      for (int b = 0; b < 4; b++) {
        numbers[4 * w + b] = (float)(signed char)(words[w] >> (8 * b));
      }
    }
  }
};

template <>
struct Stored<INT4> {
  static constexpr int CHUNK = 32;
  static __device__ void unpack(const uint4 &bits, float *numbers) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
#pragma unroll
      for (int b = 0; b < 8; b++) {
        // The last bit of 2^23 as a float32 is worth 1: half a byte put there is added to it.
        const unsigned sum_bits = ((words[w] >> (4 * b)) & 15u) | 0x4b000000u;
        numbers[8 * w + b] = __uint_as_float(sum_bits) - (8388608.0f + 8.0f);
      }
    }
  }
};

// --- sums within a warp and a block ---

template <int LANES>
__device__ float sum_of_lanes(float number) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) {
    number += __shfl_xor_sync(ALL_LANES, number, offset);
  }
  return number;
}

__device__ long long largest_of_warp(long long key) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    const long long other = __shfl_xor_sync(ALL_LANES, key, offset);
    key = other > key ? other : key;
  }
  return key;
}

// What a block keeps beside registers; a phase finds nothing in it that another has left, but for
// `x` between `stage` functions and the products of the same phase.
struct Shared {
  float x[larger(larger(HIDDEN, INNER), ATTENDED)];  // what the phase multiplies by
  float sums[WARPS];
  long long keys[WARPS];
  float query[GROUP_HEADS][HEAD_SIZE];
  float new_key[HEAD_SIZE];
  float new_value[HEAD_SIZE];
  float new_bias[GROUP_HEADS];
  float new_logit[GROUP_HEADS];
  float tops[WARPS][GROUP_HEADS];
  float masses[WARPS][GROUP_HEADS];
  float attended[WARPS][GROUP_HEADS][HEAD_SIZE];
  float shares[QUERY_HEADS][MAX_SPLITS];
};

__device__ float sum_of_block(Shared &shared, float number) {
  number = sum_of_lanes<WARP>(number);
  if (threadIdx.x % WARP == 0) shared.sums[threadIdx.x / WARP] = number;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += shared.sums[w];
  return sum;
}

__device__ long long largest_of_block(Shared &shared, long long key) {
  key = largest_of_warp(key);
  if (threadIdx.x % WARP == 0) shared.keys[threadIdx.x / WARP] = key;
  __syncthreads();
  long long largest = NO_KEY;
#pragma unroll
  for (int w = 0; w < WARPS; w++) largest = shared.keys[w] > largest ? shared.keys[w] : largest;
  return largest;
}

// --- a barrier of the whole grid ---

// The blocks of a grid add 2^31 to a word together, whatever their number: block 0 what the others
// leave of it. So the word's highest bit flips once for each barrier, which is what they wait for,
// and the rest of it is zero again: the next barrier, or launch, needs no reset.
struct Barrier {
  static constexpr unsigned FLIPPED = 0x80000000u;
  unsigned *word;
  unsigned before;

  __device__ void arrive() {
    __syncthreads();  // what the block has written is written
    if (threadIdx.x == 0) {
      before = add_release(word, blockIdx.x == 0 ? FLIPPED - (gridDim.x - 1) : 1u);
    }
  }

  __device__ void wait() {
    if (threadIdx.x == 0) {
      while (((load_acquire(word) ^ before) & FLIPPED) == 0) idle();
    }
    __syncthreads();
  }
};

// A part of `bytes` for each thread of the grid, into the L2 cache.
__device__ void prefetch(const char *begin, long long bytes) {
  if (bytes > PREFETCH_BYTES) bytes = PREFETCH_BYTES;
  const long long first = ((long long)threadIdx.x * gridDim.x + blockIdx.x) * LINE_BYTES;
  const long long stride = (long long)THREADS * gridDim.x * LINE_BYTES;
#pragma unroll 1
  for (long long at = first; at < bytes; at += stride) prefetch_line(begin + at);
}

// --- products ---

// Rows of a packed matrix. A team of lanes multiplies a row, each lane 16 bytes at a time.
template <int KIND, int COLUMNS, int GROUP>
struct Matrix {
  static constexpr int CHUNK = Stored<KIND>::CHUNK;
  static constexpr int CHUNKS = COLUMNS / CHUNK;
  static constexpr int LANES = at_most(power_below(CHUNKS), WARP);
  static constexpr int LOADS = blocks_of(CHUNKS, LANES);
  static constexpr int OWN = LOADS * CHUNK;  // numbers of x that a lane multiplies by
  static constexpr int TEAMS = WARP / LANES * WARPS;
  static constexpr int ROW_BYTES = CHUNKS * 16;
  static_assert(COLUMNS % CHUNK == 0, "16 bytes must not reach into the next row");
  static_assert(KIND != INT4 || GROUP % CHUNK == 0, "a chunk has one scale");

  struct Row {
    uint4 bits[LOADS];
    float scales[LOADS];
  };

  const char *weights;
  const char *scales;

  __device__ void load(Row &row, int number) const {
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      const int chunk = lane + l * LANES;
      row.bits[l] = make_uint4(0, 0, 0, 0);
      row.scales[l] = 1.0f;
      if (CHUNKS % LANES == 0 || chunk < CHUNKS) {
        const uint4 *chunks = (const uint4 *)(weights + (long long)number * ROW_BYTES);
        row.bits[l] = load_stored(chunks + chunk);
        if (KIND == INT8) row.scales[l] = ((const float *)scales)[number];
        if (KIND == INT4) {
          const long long group = (long long)number * (COLUMNS / larger(GROUP, 1)) +
                                  chunk * CHUNK / larger(GROUP, 1);
          row.scales[l] = float_of_half(((const unsigned short *)scales)[group]);
        }
      }
    }
  }

  __device__ void take(const float *x, float *own) const {
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      const int chunk = lane + l * LANES;
#pragma unroll
      for (int e = 0; e < CHUNK; e++) {
        own[l * CHUNK + e] =
            CHUNKS % LANES == 0 || chunk < CHUNKS ? x[chunk * CHUNK + e] : 0.0f;
      }
    }
  }

  // All lanes of a warp call it; each of a team gets the row's product.
  __device__ float multiply(const Row &row, const float *own) const {
    float sum = 0.0f;
#pragma unroll
    for (int l = 0; l < LOADS; l++) {
      float numbers[CHUNK];
      Stored<KIND>::unpack(row.bits[l], numbers);
      float part = 0.0f;
#pragma unroll
      for (int e = 0; e < CHUNK; e++) part += numbers[e] * own[l * CHUNK + e];
      sum += row.scales[l] * part;
    }
    return sum_of_lanes<LANES>(sum);
  }
};

// The units of a product, ROWS rows each, spread over the teams of all blocks: neighbouring units
// are different blocks'. The first unit of a team is loaded by `begin`, before x is there.
template <class M, int ALL_ROWS, int ROWS>
struct Product {
  static constexpr int UNITS = blocks_of(ALL_ROWS, ROWS);
  static constexpr int EACH = ROWS;
  typename M::Row rows[ROWS];

  static __device__ int first_of_warp() {
    return threadIdx.x / WARP * (WARP / M::LANES) * gridDim.x + blockIdx.x;
  }

  static __device__ int unit_of_team(int first) {
    return first + threadIdx.x % WARP / M::LANES * gridDim.x;
  }

  static __device__ void load(const M &matrix, typename M::Row *rows, int unit) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      matrix.load(rows[r], at_most(unit * ROWS + r, ALL_ROWS - 1));
    }
  }

  __device__ void begin(const M &matrix) {
    if (first_of_warp() < UNITS) {
      load(matrix, rows, at_most(unit_of_team(first_of_warp()), UNITS - 1));
      return;
    }
    // Nothing is kept from before, which would take registers all the time.
#pragma unroll
    for (int r = 0; r < ROWS; r++) rows[r] = typename M::Row();
  }

  // What `early` gives of the first unit of the team, for `run`.
  template <class Early>
  static __device__ float first(Early early) {
    const int unit = unit_of_team(first_of_warp());
    return unit < UNITS && threadIdx.x % M::LANES == 0 ? early(unit) : 0.0f;
  }

  // finish(unit, y, added): one lane of the unit's team has the products of its rows, and what
  // early(unit) has given it, which is asked for before the products are made.
  template <class Early, class Finish>
  __device__ void run(const M &matrix, const float *x, float added, Early early, Finish finish) {
    float own[M::OWN];
    matrix.take(x, own);
    const int stride = M::TEAMS * gridDim.x;
#pragma unroll 1
    for (int first = first_of_warp(); first < UNITS; first += stride) {
      typename M::Row next[ROWS];
      float next_added = 0.0f;
      if (first + stride < UNITS) {
        const int after = unit_of_team(first + stride);
        load(matrix, next, at_most(after, UNITS - 1));
        if (after < UNITS && threadIdx.x % M::LANES == 0) next_added = early(after);
      }
      float y[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) y[r] = matrix.multiply(rows[r], own);
      const int unit = unit_of_team(first);
      if (unit < UNITS && threadIdx.x % M::LANES == 0) finish(unit, y, added);
#pragma unroll
      for (int r = 0; r < ROWS; r++) rows[r] = next[r];
      added = next_added;
    }
  }

  template <class Finish>
  __device__ void run(const M &matrix, const float *x, Finish finish) {
    run(matrix, x, 0.0f, [](int) { return 0.0f; },
        [&](int unit, const float *y, float) { finish(unit, y); });
  }
};

typedef Matrix<PROJECTION_KIND, HIDDEN, HIDDEN_GROUP> FromHidden;
typedef Matrix<PROJECTION_KIND, ATTENDED, ATTENDED_GROUP> FromAttended;
typedef Matrix<PROJECTION_KIND, INNER, INNER_GROUP> FromInner;
typedef Matrix<FLOAT_KIND, HIDDEN, 0> ToScores;
typedef Matrix<TABLE_KIND, HIDDEN, 0> Table;
typedef Stored<FLOAT_KIND> Cached;
typedef Cached::Number CachedNumber;

typedef Product<FromHidden, HEAD_ROWS, 1> Qkv;
typedef Product<FromAttended, HIDDEN, 1> O;
typedef Product<FromHidden, 2 * INNER, 2> GateUp;
typedef Product<FromInner, HIDDEN, 1> Down;
// As many rows at once as a thread has registers for.
typedef Product<Table, VOCAB, (Table::LOADS > 2 ? 1 : Table::LOADS > 1 ? 2 : 4)> Head;

// --- what a phase multiplies by ---

// Norm weights of the numbers that a thread stages, asked for before they are there.
struct Norm {
  static constexpr int EACH = blocks_of(HIDDEN, THREADS);
  float weights[EACH];

  __device__ void begin(const float *norm) {
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int c = threadIdx.x + e * THREADS;
      weights[e] = HIDDEN % THREADS == 0 || c < HIDDEN ? norm[c] : 0.0f;
    }
  }

  // x[c] = read(c), normed; the whole block has it afterwards.
  template <class Read>
  __device__ void stage(Shared &shared, float eps, Read read) {
    float numbers[EACH];
    float squares = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int c = threadIdx.x + e * THREADS;
      numbers[e] = HIDDEN % THREADS == 0 || c < HIDDEN ? read(c) : 0.0f;
      squares += numbers[e] * numbers[e];
    }
    const float factor = rsqrtf(sum_of_block(shared, squares) / HIDDEN + eps);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int c = threadIdx.x + e * THREADS;
      if (c < HIDDEN) shared.x[c] = numbers[e] * factor * weights[e];
    }
    __syncthreads();
  }
};

// One number of the embedding table.
__device__ float embedding_of(const char *weights, const char *scales, int token, int column) {
  const long long place = (long long)token * HIDDEN + column;
#if TABLE_KIND == INT8
  return (float)((const signed char *)weights)[place] * ((const float *)scales)[token];
#else
  return Stored<TABLE_KIND>::widen(((const Stored<TABLE_KIND>::Number *)weights)[place]);
#endif
}

// --- attention ---

// How the visible keys of a token are split.
struct Shares {
  int visible;
  int share;
  int used;

  __device__ Shares(int position, int slots) {
    visible = position + 1 < slots ? position + 1 : slots;
    share = blocks_of(blocks_of(visible, MAX_SPLITS), SHARE_STEP) * SHARE_STEP;
    used = blocks_of(visible, share);
  }
};

struct LayerCache {
  char *key;
  char *value;
  float *score;
  int slots;

  __device__ CachedNumber *key_of(int g, int slot) const {
    return (CachedNumber *)key + ((long long)g * slots + slot) * HEAD_SIZE;
  }
  __device__ CachedNumber *value_of(int g, int slot) const {
    return (CachedNumber *)value + ((long long)g * slots + slot) * HEAD_SIZE;
  }
  __device__ float *score_of(int n, int slot) const { return score + (long long)n * slots + slot; }
};

struct Rotation {
  const float *cos;
  const float *sin;
};

// One head of a token's row, normed and rotated, by one warp.
__device__ void prepare_head(const float *row, const float *norm, Rotation rotation, float eps,
                             float scale, float *prepared) {
  constexpr int HALF = HEAD_SIZE / 2;
  constexpr int PAIRS = blocks_of(HALF, WARP);
  const int lane = threadIdx.x % WARP;
  float low[PAIRS], high[PAIRS];
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < PAIRS; p++) {
    const int d = lane + p * WARP;
    low[p] = d < HALF ? load_fresh(row + d) : 0.0f;
    high[p] = d < HALF ? load_fresh(row + d + HALF) : 0.0f;
    squares += low[p] * low[p] + high[p] * high[p];
  }
#if QK_NORM
  const float factor = rsqrtf(sum_of_lanes<WARP>(squares) / HEAD_SIZE + eps);
#endif
#pragma unroll
  for (int p = 0; p < PAIRS; p++) {
    const int d = lane + p * WARP;
    if (d < HALF) {
#if QK_NORM
      low[p] *= factor * norm[d];
      high[p] *= factor * norm[d + HALF];
#endif
      const float cos = rotation.cos[d], sin = rotation.sin[d];
      prepared[d] = (low[p] * cos - high[p] * sin) * scale;
      prepared[d + HALF] = (high[p] * cos + low[p] * sin) * scale;
    }
  }
}

// exp(A * softplus(dt)), the score of a key.
__device__ float mask_score(float dt, float A) {
  return expf(A * (fmaxf(dt, 0.0f) + log1pf(expf(-fabsf(dt)))));
}

// Queries of key/value head g, and the new key, value and score where this share has them.
__device__ void stage_heads(Shared &shared, const float *rows, const float *query_norm,
                            const float *key_norm, const float *A, Rotation rotation, float eps,
                            float scale, const LayerCache &cache, int g, int position,
                            bool appends) {
  const int warp = threadIdx.x / WARP;
#pragma unroll 1
  for (int h = warp; h < GROUP_HEADS + (appends ? 1 : 0); h += WARPS) {
    if (h < GROUP_HEADS) {
      prepare_head(rows + (g * GROUP_HEADS + h) * HEAD_SIZE, query_norm, rotation, eps, scale,
                   shared.query[h]);
    } else {
      prepare_head(rows + (QUERY_HEADS + g) * HEAD_SIZE, key_norm, rotation, eps, 1.0f,
                   shared.new_key);
    }
  }
  if (!appends) return;
  const float *value = rows + (QUERY_HEADS + KEY_HEADS + g) * HEAD_SIZE;
#pragma unroll 1
  for (int d = threadIdx.x; d < HEAD_SIZE; d += THREADS) {
    const CachedNumber kept = Cached::narrow(load_fresh(value + d));
    cache.value_of(g, position)[d] = kept;
    shared.new_value[d] = Cached::widen(kept);
  }
  for (int h = threadIdx.x; h < GROUP_HEADS; h += THREADS) {
    const int a = g * GROUP_HEADS + h;
    const int n = a * SCORE_HEADS / QUERY_HEADS;
    const float bias = mask_score(load_fresh(rows + HEAD_ROWS + n), A[n]);
    shared.new_bias[h] = bias;
    // Of the heads that share a score, the first writes it.
    if (a % (QUERY_HEADS / SCORE_HEADS) == 0) *cache.score_of(n, position) = bias;
  }
}

// A team of lanes for each key; each team keeps a softmax of its own, and each warp joins its teams'.
__device__ void attend_share(Shared &shared, const LayerCache &cache, int g, int begin, int end) {
  typedef Matrix<FLOAT_KIND, HEAD_SIZE, 0> Keys;
  constexpr int OWN = Keys::OWN;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  float query[GROUP_HEADS][OWN], attended[GROUP_HEADS][OWN];
  float top[GROUP_HEADS], mass[GROUP_HEADS];
  const Keys keys = {0, 0};
#pragma unroll
  for (int h = 0; h < GROUP_HEADS; h++) {
    keys.take(shared.query[h], query[h]);
    top[h] = LOWEST;
    mass[h] = 0.0f;
#pragma unroll
    for (int e = 0; e < OWN; e++) attended[h][e] = 0.0f;
  }
#pragma unroll 1
  for (int first = begin + warp * (WARP / Keys::LANES); first < end; first += Keys::TEAMS) {
    const int slot = first + lane / Keys::LANES;
    const bool seen = slot < end;
    float k[OWN], v[OWN];
#pragma unroll
    for (int l = 0; l < Keys::LOADS; l++) {
      const int chunk = lane % Keys::LANES + l * Keys::LANES;
      uint4 key_bits = make_uint4(0, 0, 0, 0), value_bits = make_uint4(0, 0, 0, 0);
      if (seen && chunk < Keys::CHUNKS) {
        key_bits = load_fresh((const uint4 *)cache.key_of(g, slot) + chunk);
        value_bits = load_fresh((const uint4 *)cache.value_of(g, slot) + chunk);
      }
      Cached::unpack(key_bits, k + l * Keys::CHUNK);
      Cached::unpack(value_bits, v + l * Keys::CHUNK);
    }
#pragma unroll
    for (int h = 0; h < GROUP_HEADS; h++) {
      const int n = (g * GROUP_HEADS + h) * SCORE_HEADS / QUERY_HEADS;
      float logit = 0.0f;
#pragma unroll
      for (int e = 0; e < OWN; e++) logit += query[h][e] * k[e];
      logit = sum_of_lanes<Keys::LANES>(logit);
      if (seen) logit += load_fresh(cache.score_of(n, slot));
      const float new_top = seen ? fmaxf(top[h], logit) : top[h];
      const float p = seen ? expf(logit - new_top) : 0.0f;
      const float fade = expf(top[h] - new_top);
      top[h] = new_top;
      mass[h] = mass[h] * fade + p;
#pragma unroll
      for (int e = 0; e < OWN; e++) attended[h][e] = attended[h][e] * fade + p * v[e];
    }
  }
#pragma unroll
  for (int h = 0; h < GROUP_HEADS; h++) {
#pragma unroll
    for (int offset = Keys::LANES; offset < WARP; offset *= 2) {
      const float other_top = __shfl_xor_sync(ALL_LANES, top[h], offset);
      const float new_top = fmaxf(top[h], other_top);
      const float own_weight = expf(top[h] - new_top);
      const float other_weight = expf(other_top - new_top);
      mass[h] = mass[h] * own_weight +
                __shfl_xor_sync(ALL_LANES, mass[h], offset) * other_weight;
#pragma unroll
      for (int e = 0; e < OWN; e++) {
        attended[h][e] = attended[h][e] * own_weight +
                         __shfl_xor_sync(ALL_LANES, attended[h][e], offset) * other_weight;
      }
      top[h] = new_top;
    }
    if (lane < Keys::LANES) {
#pragma unroll
      for (int e = 0; e < OWN; e++) {
        const int chunk = lane + e / Keys::CHUNK * Keys::LANES;
        if (chunk < Keys::CHUNKS) {
          shared.attended[warp][h][chunk * Keys::CHUNK + e % Keys::CHUNK] = attended[h][e];
        }
      }
    }
    if (lane == 0) {
      shared.tops[warp][h] = top[h];
      shared.masses[warp][h] = mass[h];
    }
  }
}

// Attention of the shares that this block has: partial values, largest logits and masses of them.
__device__ void attend(Shared &shared, const float *rows, const float *query_norm,
                       const float *key_norm, const float *A, Rotation rotation, float eps,
                       float scale, const LayerCache &cache, int position, float *partial_values,
                       float *partial_masses) {
  const Shares shares(position, cache.slots);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll 1
  for (int unit = blockIdx.x; unit < shares.used * KEY_HEADS; unit += gridDim.x) {
    const int g = unit / shares.used, split = unit % shares.used;
    const bool appends = split == shares.used - 1;
    const int begin = split * shares.share;
    const int end = appends ? shares.visible - 1 : begin + shares.share;
    if (unit != (int)blockIdx.x) __syncthreads();  // the unit before has read what this one overwrites
    stage_heads(shared, rows, query_norm, key_norm, A, rotation, eps, scale, cache, g, position,
                appends);
    __syncthreads();
    if (appends) {
      // The key as it is in the cache.
    #pragma unroll 1
  for (int d = threadIdx.x; d < HEAD_SIZE; d += THREADS) {
        cache.key_of(g, position)[d] = Cached::narrow(shared.new_key[d]);
      }
      for (int h = warp; h < GROUP_HEADS; h += WARPS) {
        float logit = 0.0f;
        for (int d = lane; d < HEAD_SIZE; d += WARP) {
          logit += shared.query[h][d] * Cached::widen(Cached::narrow(shared.new_key[d]));
        }
        logit = sum_of_lanes<WARP>(logit);
        if (lane == 0) shared.new_logit[h] = logit + shared.new_bias[h];
      }
    }
    attend_share(shared, cache, g, begin, end);
    __syncthreads();
    const int part = (g * MAX_SPLITS + split) * GROUP_HEADS;
    for (int i = threadIdx.x; i < GROUP_HEADS * HEAD_SIZE; i += THREADS) {
      const int h = i / HEAD_SIZE, d = i % HEAD_SIZE;
      float top = appends ? shared.new_logit[h] : LOWEST;
#pragma unroll
      for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.tops[w][h]);
      const float p = appends ? expf(shared.new_logit[h] - top) : 0.0f;
      float mass = p;
      float attended = appends ? p * shared.new_value[d] : 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float weight = expf(shared.tops[w][h] - top);
        mass += weight * shared.masses[w][h];
        attended += weight * shared.attended[w][h][d];
      }
      partial_values[(part + h) * HEAD_SIZE + d] = attended;
      if (d == 0) {
        partial_masses[(part + h) * 2] = top;
        partial_masses[(part + h) * 2 + 1] = mass;
      }
    }
  }
}

// Joins what the shares left: x = the attention of all heads. Every block does it for itself.
__device__ void stage_attended(Shared &shared, int position, int slots,
                               const float *partial_values, const float *partial_masses) {
  const Shares shares(position, slots);
  const int lane = threadIdx.x % WARP;
#pragma unroll 1
  for (int a = threadIdx.x / WARP; a < QUERY_HEADS; a += WARPS) {
    const int g = a / GROUP_HEADS, h = a % GROUP_HEADS;
    const int part = (g * MAX_SPLITS + lane) * GROUP_HEADS + h;
    const bool there = lane < shares.used;
    const float own_top = there ? load_fresh(partial_masses + part * 2) : LOWEST;
    const float own_mass = there ? load_fresh(partial_masses + part * 2 + 1) : 0.0f;
    float top = own_top;
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, offset));
    }
    const float weight = expf(own_top - top);
    const float mass = sum_of_lanes<WARP>(weight * own_mass);
    if (there) shared.shares[a][lane] = weight / mass;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < ATTENDED; c += THREADS) {
    const int a = c / HEAD_SIZE, d = c % HEAD_SIZE;
    const int g = a / GROUP_HEADS, h = a % GROUP_HEADS;
    float attended = 0.0f;
#pragma unroll 4
    for (int split = 0; split < shares.used; split++) {
      const int part = (g * MAX_SPLITS + split) * GROUP_HEADS + h;
      attended += shared.shares[a][split] * load_fresh(partial_values + part * HEAD_SIZE + d);
    }
    shared.x[c] = attended;
  }
  __syncthreads();
}

// The keys and values of this block's share of the next attention.
__device__ void prefetch_share(const LayerCache &cache, int position) {
  const Shares shares(position, cache.slots);
#pragma unroll 1
  for (int unit = blockIdx.x; unit < shares.used * KEY_HEADS; unit += gridDim.x) {
    const int g = unit / shares.used, begin = unit % shares.used * shares.share;
    const int end = at_most(begin + shares.share, shares.visible - 1);
    const int bytes = (end - begin) * HEAD_SIZE * (int)sizeof(CachedNumber);
#pragma unroll 1
    for (int at = threadIdx.x * LINE_BYTES; at < bytes; at += THREADS * LINE_BYTES) {
      prefetch_line((const char *)cache.key_of(g, begin) + at);
      prefetch_line((const char *)cache.value_of(g, begin) + at);
    }
  }
}

// --- the head ---

// Orders as (logit, -token) does, and holds the token.
__device__ long long key_of(float logit, int token) {
  if (!(logit < __uint_as_float(0x7f800000u))) return BROKEN_KEY;
  if (logit == __uint_as_float(0xff800000u)) return NO_KEY;
  // Flipping the other bits of a negative number makes its order that of whole numbers; -0 is 0.
  const int bits = logit == 0.0f ? 0 : (int)__float_as_uint(logit);
  const int ordered = bits < 0 ? bits ^ 0x7fffffff : bits;
  return (long long)(((unsigned long long)(unsigned)ordered << 32) | (0x7fffffffu - token));
}

// -1 where no token can be picked.
__device__ int token_of(long long key) {
  if (key == BROKEN_KEY || key == NO_KEY) return -1;
  return 0x7fffffff - (int)(key & 0x7fffffff);
}

#ifndef BARRIERS_ALONE
// `steps` steps of one sequence from token tokens[0] at slot positions[0] on.
//
// Weights are as packed; those of layer l lie l * weight_stride bytes behind layer 0's, and its
// cache l * cache_stride bytes. rows [(Nq + 2*Nkv)*D + N], x [H], inner [I],
// partial_values [Nkv, MAX_SPLITS, Nq/Nkv, D] and partial_masses [..., 2] float32, and best_keys
// int64, one a block, are scratch. barrier uint32 [1] is zero before the first launch and is never
// written by others.
//
// Written: chosen int64 [steps]; tokens, x and positions for the next step, as the kernel `head`
// leaves them; ring and step likewise. A token is -1 where a logit is no number or infinite, or all
// are minus infinity; the steps behind it begin with token 0, and mean nothing.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    persistent_step(const float *cos, const float *sin, const float *final_norm,
                    const char *embedding_weights, const char *embedding_scales,
                    const char *head_weights, const char *head_scales, const char *input_norm,
                    const char *qkv_weights, const char *qkv_scales, const char *score_weights,
                    const char *query_norm, const char *key_norm, const char *A,
                    const char *o_weights, const char *o_scales, const char *input_residual,
                    const char *mlp_norm, const char *gate_up_weights, const char *gate_up_scales,
                    const char *down_weights, const char *down_scales, const char *mlp_residual,
                    char *key, char *value, char *score, long long *tokens, long long *positions,
                    long long *ring, int *step, float *x, float *rows, float *inner,
                    float *partial_values, float *partial_masses, long long *best_keys,
                    long long *chosen, unsigned *barrier, long long weight_stride,
                    long long cache_stride, int slots, int last_slot, int steps, float scale,
                    float eps, const void *, const void *) {
  SHARED_MEMORY(Shared, shared);
  Barrier grid = {barrier, 0};
  const Table head = {head_weights, head_scales};
  int token = (int)tokens[0];
  int position = (int)positions[0];
  const int first_step = *step;

  Norm norm;
  Qkv qkv;
  const FromHidden first_qkv = {qkv_weights, qkv_scales};
  norm.begin((const float *)input_norm);
  qkv.begin(first_qkv);

#pragma unroll 1
  for (int n = 0; n < steps; n++) {
#pragma unroll 1
    for (int layer = 0; layer < LAYERS; layer++) {
      const long long weights_at = layer * weight_stride;
      const long long cache_at = layer * cache_stride;
      const auto floats = [weights_at](const char *first) {
        return (const float *)(first + weights_at);
      };
      const FromHidden to_heads = {qkv_weights + weights_at, qkv_scales + weights_at};
      const ToScores to_scores = {score_weights + weights_at, 0};
      const FromAttended from_attended = {o_weights + weights_at, o_scales + weights_at};
      const FromHidden to_inner = {gate_up_weights + weights_at, gate_up_scales + weights_at};
      const FromInner from_inner = {down_weights + weights_at, down_scales + weights_at};
      const LayerCache cache = {key + cache_at, value + cache_at, (float *)(score + cache_at),
                                slots};

      // qkv
      if (layer == 0) {
        const int embedded = token < 0 ? 0 : token;
        norm.stage(shared, eps, [&](int c) {
          const float number = embedding_of(embedding_weights, embedding_scales, embedded, c);
          if (blockIdx.x == 0) x[c] = number;
          return number;
        });
      } else {
        norm.stage(shared, eps, [&](int c) { return load_fresh(x + c); });
      }
      qkv.run(to_heads, shared.x, [&](int row, const float *y) { rows[row] = y[0]; });
      {
        // The few rows of the scores, by the warps that have least to do: the last ones.
        float own[ToScores::OWN];
        to_scores.take(shared.x, own);
        const int last = (WARPS - 1 - threadIdx.x / WARP) * gridDim.x + gridDim.x - 1 - blockIdx.x;
#pragma unroll 1
        for (int n_head = last; n_head < SCORE_HEADS; n_head += WARPS * gridDim.x) {
          ToScores::Row row;
          to_scores.load(row, n_head);
          const float y = to_scores.multiply(row, own);
          if (threadIdx.x % WARP == 0) rows[HEAD_ROWS + n_head] = y;
        }
      }
      grid.arrive();
      prefetch_share(cache, position);
      prefetch(from_attended.weights, (long long)HIDDEN * FromAttended::ROW_BYTES);
      grid.wait();

      // attend
      const Rotation rotation = {cos + (long long)position * (HEAD_SIZE / 2),
                                 sin + (long long)position * (HEAD_SIZE / 2)};
      attend(shared, rows, floats(query_norm), floats(key_norm), floats(A), rotation, eps, scale,
             cache, position, partial_values, partial_masses);
      grid.arrive();
      O o;
      o.begin(from_attended);
      prefetch(to_inner.weights, 2LL * INNER * FromHidden::ROW_BYTES);
      grid.wait();

      // o
      const auto residual = [&](int row) {
        return floats(input_residual)[row] * load_fresh(x + row);
      };
      const float first_residual = O::first(residual);
      stage_attended(shared, position, slots, partial_values, partial_masses);
      const auto keep = [&](int row, const float *y, float added) { x[row] = added + y[0]; };
      o.run(from_attended, shared.x, first_residual, residual, keep);
      grid.arrive();
      norm.begin(floats(mlp_norm));
      GateUp gate_up;
      gate_up.begin(to_inner);
      prefetch(from_inner.weights, (long long)HIDDEN * FromInner::ROW_BYTES);
      grid.wait();

      // gate_up
      norm.stage(shared, eps, [&](int c) { return load_fresh(x + c); });
      gate_up.run(to_inner, shared.x, [&](int unit, const float *y) {
        inner[unit] = y[0] / (1.0f + expf(-y[0])) * y[1];
      });
      const bool is_last = layer == LAYERS - 1;
      grid.arrive();
      Down down;
      down.begin(from_inner);
      if (is_last) {
        prefetch(head.weights, (long long)VOCAB * Table::ROW_BYTES);
      } else {
        prefetch(to_heads.weights + weight_stride, (long long)HEAD_ROWS * FromHidden::ROW_BYTES);
      }
      grid.wait();

      // down
      const auto mlp = [&](int row) { return floats(mlp_residual)[row] * load_fresh(x + row); };
      const float first_mlp = Down::first(mlp);
      for (int c = threadIdx.x; c < INNER; c += THREADS) shared.x[c] = load_fresh(inner + c);
      __syncthreads();
      down.run(from_inner, shared.x, first_mlp, mlp, keep);
      grid.arrive();
      if (is_last) break;  // what is waited for below
      const FromHidden next = {to_heads.weights + weight_stride, to_heads.scales + weight_stride};
      norm.begin(floats(input_norm + weight_stride));
      qkv.begin(next);
      grid.wait();
    }

    // head
    Head logits;
    norm.begin(final_norm);
    logits.begin(head);
    grid.wait();
    norm.stage(shared, eps, [&](int c) { return load_fresh(x + c); });
    long long best = NO_KEY;
    logits.run(head, shared.x, [&](int unit, const float *y) {
#pragma unroll
      for (int r = 0; r < Head::EACH; r++) {
        const int row = unit * Head::EACH + r;
        const long long found = row < VOCAB ? key_of(y[r], row) : NO_KEY;
        best = found > best ? found : best;
      }
    });
    best = largest_of_block(shared, best);
    if (threadIdx.x == 0) best_keys[blockIdx.x] = best;
    grid.arrive();
    norm.begin((const float *)input_norm);
    qkv.begin(first_qkv);
    grid.wait();
    best = NO_KEY;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += THREADS) {
      const long long found = load_fresh(best_keys + block);
      best = found > best ? found : best;
    }
    token = token_of(largest_of_block(shared, best));
    position = position < last_slot ? position + 1 : last_slot;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      chosen[n] = token;
      ring[(first_step + n) % RING] = token;
    }
  }

  if (blockIdx.x == 0) {
    const int embedded = token < 0 ? 0 : token;
    for (int c = threadIdx.x; c < HIDDEN; c += THREADS) {
      x[c] = embedding_of(embedding_weights, embedding_scales, embedded, c);
    }
    if (threadIdx.x == 0) {
      tokens[0] = token;
      positions[0] = position;
      *step = first_step + steps;
    }
  }
}
#endif  // BARRIERS_ALONE

#if defined(BARRIERS_ALONE) || defined(HOST_SHIM)
// Nothing but `count` barriers: what one costs.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grid_barriers(unsigned *barrier, int count, const void *, const void *) {
  Barrier grid = {barrier, 0};
  for (int n = 0; n < count; n++) {
    grid.arrive();
    grid.wait();
  }
}
#endif
