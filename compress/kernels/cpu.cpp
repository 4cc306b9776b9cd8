// Decoding on a CPU with AVX-512 and its bf16 instructions: y = x W^T at the speed at which memory gives W.
//
// x bf16 (tokens, columns); W (rows, columns); y bf16 (tokens, rows); sums in float32
//
// Codes lie in blocks of 16 rows x 32 columns. A lane of 32 bits belongs to a row and its two words of 16 bits
// to two neighbouring columns, which is what vdpbf16ps multiplies with a pair of inputs: 16 rows add up side by
// side, no register is ever summed across, and a group of columns ends with one multiplication by the scales
// of 16 rows. A word holds the codes of as many pairs of columns as fit (8 of 2 bits, 5 of 3 with the sixteenth
// in the bits left over, 4 of 4, 2 of 8); a shift brings one down and vpermw looks its value up. vpermw reads
// five bits of an index, so tables that repeat make masks needless.
// A weight in 16 bits stays in rows as it is in the checkpoint.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using Word = std::uint16_t;
using Maybe = std::optional<Tensor>;

constexpr std::int64_t ROWS = 16, COLUMNS = 32;
// Tokens that share one unpacking: their sums fill half of the registers.
constexpr int TOKENS = 8;
// Bytes ahead of the codes being read: memory answers after about as long as these take.
constexpr std::int64_t AHEAD = 4096;
// Bytes of weights below which a second thread costs more than it saves.
constexpr std::int64_t SHARE = 32768;

// What a format is called on the side of Python.
enum Format { INT2 = 2, INT3 = 3, INT4 = 4, INT8 = 8, BF16 = 16, FP4 = 104, FP8 = 108 };

// ---- numbers

constexpr Word word_of(float value) {
  // Exact for what tables hold: eight significant bits.
  return static_cast<Word>(std::bit_cast<std::uint32_t>(value) >> 16);
}

template <typename Entry>
constexpr std::array<Word, 32> table_of(Entry entry) {
  std::array<Word, 32> table{};
  for (int i = 0; i < 32; ++i) table[i] = entry(i);
  return table;
}

template <int BITS>
constexpr auto INTEGERS =
    table_of([](int i) { return word_of(i % (1 << BITS) - (1 << (BITS - 1))); });
// A code of 2 bits one place up, so that two codes are read by one shift.
constexpr auto UPPER_INT2 = table_of([](int i) { return word_of(i / 4 % 4 - 2); });
// code - 128 as 16 * (high half - 8) + low half.
constexpr auto LOW_HALF = table_of([](int i) { return word_of(i % 16); });
constexpr auto HIGH_HALF = table_of([](int i) { return word_of(16 * (i % 16 - 8)); });
constexpr auto E2M1 = table_of([](int i) {
  constexpr float sizes[] = {0, .5, 1, 1.5, 2, 3, 4, 6};
  return word_of(i & 8 ? -sizes[i % 8] : sizes[i % 8]);
});
// e4m3 from two overlapping halves of its byte: sign and exponent from the upper five bits, the rest of the
// mantissa from the lower three. The exponent moves from a bias of 7 to one of 127.
constexpr auto SIGN_EXPONENT = table_of([](int i) {
  return static_cast<Word>((i & 16) << 11 | (i % 16 ? (i % 16 + 120) << 7 : 0));
});
constexpr auto MANTISSA = table_of([](int i) { return static_cast<Word>(i % 8 << 4); });
// Where the exponent is 0 the value is mantissa * 2^-9: vdpbf16ps would take a bf16 without exponent for 0.
constexpr auto SUBNORMAL = table_of([](int i) { return word_of(i % 8 / 512.0f); });

inline __m512i load(const void* from) { return _mm512_loadu_si512(from); }

inline __m512 to_floats(__m256i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

inline __m256i to_words(__m512 values) {
  return std::bit_cast<__m256i>(_mm512_cvtneps_pbh(values));
}

inline __m512 load_floats(const BFloat16* from, __mmask16 mask = 0xffff) {
  return to_floats(_mm256_maskz_loadu_epi16(mask, from));
}

inline void store_words(BFloat16* to, __m512 values, __mmask16 mask = 0xffff) {
  _mm256_mask_storeu_epi16(to, mask, to_words(values));
}

inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
}

// e^x within two units in the last place (Cephes' polynomial); 0 far below, infinity far above.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(89.0f)), _mm512_set1_ps(-104.0f));
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// ---- codes: each(registers, use) calls use(pair, values) for the 16 pairs of 32 columns

template <int FORMAT>
struct Codes;

template <>
struct Codes<INT2> {
  static constexpr int REGISTERS = 2;
  __m512i lower = load(INTEGERS<2>.data()), upper = load(UPPER_INT2.data());

  template <typename Use>
  [[gnu::always_inline]] void each(const __m512i* codes, Use use) const {
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      const __m512i words = load(codes + r);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        const __m512i two = _mm512_srli_epi16(words, 4 * s);
        use(8 * r + 2 * s, _mm512_permutexvar_epi16(two, lower));
        use(8 * r + 2 * s + 1, _mm512_permutexvar_epi16(two, upper));
      }
    }
  }
};

template <>
struct Codes<INT3> {
  static constexpr int REGISTERS = 3;
  __m512i table = load(INTEGERS<3>.data());

  template <typename Use>
  [[gnu::always_inline]] void each(const __m512i* codes, Use use) const {
    __m512i words[3];
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) {
      words[r] = load(codes + r);
#pragma GCC unroll 5
      for (int s = 0; s < 5; ++s)
        use(5 * r + s, _mm512_permutexvar_epi16(_mm512_srli_epi16(words[r], 3 * s), table));
    }
    // Bit 0, 1 and 2 of the last pair are the top bits of the three words.
    constexpr int CHOOSE = 0xca;  // b where a, else c
    __m512i last = _mm512_ternarylogic_epi32(
        _mm512_set1_epi16(2), _mm512_srli_epi16(words[1], 14), _mm512_srli_epi16(words[0], 15), CHOOSE);
    last = _mm512_ternarylogic_epi32(
        _mm512_set1_epi16(4), _mm512_srli_epi16(words[2], 13), last, CHOOSE);
    use(15, _mm512_permutexvar_epi16(last, table));
  }
};

struct FourBits {
  static constexpr int REGISTERS = 4;
  __m512i table;

  template <typename Use>
  [[gnu::always_inline]] void each(const __m512i* codes, Use use) const {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m512i words = load(codes + r);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s)
        use(4 * r + s, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * s), table));
    }
  }
};

template <>
struct Codes<INT4> : FourBits {
  Codes() : FourBits{load(INTEGERS<4>.data())} {}
};

template <>
struct Codes<FP4> : FourBits {
  Codes() : FourBits{load(E2M1.data())} {}
};

template <>
struct Codes<INT8> {
  static constexpr int REGISTERS = 8;
  __m512i low = load(LOW_HALF.data()), high = load(HIGH_HALF.data());

  // Uses a pair twice: the halves of a code are added by who adds the pairs.
  template <typename Use>
  [[gnu::always_inline]] void each(const __m512i* codes, Use use) const {
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      const __m512i words = load(codes + r);
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        const int pair = 2 * r + s;
        use(pair, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8 * s), low));
        use(pair, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8 * s + 4), high));
      }
    }
  }
};

template <>
struct Codes<FP8> {
  static constexpr int REGISTERS = 8;
  __m512i top = load(SIGN_EXPONENT.data()), mantissa = load(MANTISSA.data());
  __m512i subnormal = load(SUBNORMAL.data());

  template <typename Use>
  [[gnu::always_inline]] void each(const __m512i* codes, Use use) const {
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      const __m512i words = load(codes + r);
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        const __m512i code = _mm512_srli_epi16(words, 8 * s);
        const __mmask32 small = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x78));
        __m512i low = _mm512_permutexvar_epi16(code, mantissa);
        low = _mm512_mask_permutexvar_epi16(low, small, code, subnormal);
        const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8 * s + 3), top);
        use(2 * r + s, _mm512_or_si512(high, low));
      }
    }
  }
};

// ---- weights

struct Weight {
  const char* codes;
  const void* scales;  // (blocks, groups, 16 rows)
  at::ScalarType scale_type;
  const std::uint8_t* zeros;  // as scales, or null
  float middle;               // the code that a table takes for 0
  std::int64_t rows, columns, group, groups;

  __m512 scale(std::int64_t block, std::int64_t g) const {
    const std::int64_t at = (block * groups + g) * ROWS;
    if (scale_type == at::kFloat) return _mm512_loadu_ps(static_cast<const float*>(scales) + at);
    const __m256i words =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const Word*>(scales) + at));
    return scale_type == at::kHalf ? _mm512_cvtph_ps(words) : to_floats(words);
  }

  // What is added to every level of the group.
  __m512 offset(std::int64_t block, std::int64_t g) const {
    const __m128i bytes = _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(zeros + (block * groups + g) * ROWS));
    return _mm512_sub_ps(
        _mm512_set1_ps(middle), _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
  }
};

// The products of 16 rows with T tokens. sums: of the inputs of each group (T, groups), where zeros are
template <int FORMAT, int T>
void multiply(
    const Weight& w, std::int64_t block, const BFloat16* x, const float* sums, __m512* y) {
  // Sums of one token that go on side by side: one would wait for itself.
  constexpr int CHAINS = T == 1 ? 4 : T == 2 ? 2 : 1;
  constexpr std::int64_t STEP = Codes<FORMAT>::REGISTERS * sizeof(__m512i);
  const Codes<FORMAT> unpack;
  const char* codes = w.codes + block * (w.columns / COLUMNS) * STEP;
  for (int t = 0; t < T; ++t) y[t] = _mm512_setzero_ps();
  for (std::int64_t g = 0, k = 0; g < w.groups; ++g) {
    __m512 sum[T][CHAINS];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c) sum[t][c] = _mm512_setzero_ps();
    for (const std::int64_t end = std::min(k + w.group, w.columns); k < end; k += COLUMNS) {
      // Codes of a byte last long enough for the CPU's own prefetching.
      if constexpr (Codes<FORMAT>::REGISTERS < 8)
#pragma GCC unroll 4
        for (std::int64_t line = 0; line < STEP; line += 64)
          _mm_prefetch(codes + AHEAD + line, _MM_HINT_T0);
      unpack.each(reinterpret_cast<const __m512i*>(codes), [&](int pair, __m512i values) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          int inputs;
          __builtin_memcpy(&inputs, x + t * w.columns + k + 2 * pair, sizeof inputs);
          sum[t][pair % CHAINS] = dot(sum[t][pair % CHAINS], values, _mm512_set1_epi32(inputs));
        }
      });
      codes += STEP;
    }
    const __m512 scale = w.scale(block, g);
    const __m512 offset = w.zeros ? w.offset(block, g) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      __m512 total = sum[t][0];
#pragma GCC unroll 4
      for (int c = 1; c < CHAINS; ++c) total = _mm512_add_ps(total, sum[t][c]);
      if (w.zeros) total = _mm512_fmadd_ps(offset, _mm512_set1_ps(sums[t * w.groups + g]), total);
      y[t] = _mm512_fmadd_ps(scale, total, y[t]);
    }
  }
}

// R neighbouring rows of a weight in 16 bits with T tokens; y (T, 16) from the first of them on.
template <int R, int T>
void multiply_rows(
    const BFloat16* rows, std::int64_t columns, const BFloat16* x, float* y) {
  __m512 sum[R][T];
  for (auto& row : sum)
    for (auto& value : row) value = _mm512_setzero_ps();
  const auto add = [&](std::int64_t k, __mmask32 mask) {
    __m512i w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) w[r] = _mm512_maskz_loadu_epi16(mask, rows + r * columns + k);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m512i inputs = _mm512_maskz_loadu_epi16(mask, x + t * columns + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][t] = dot(sum[r][t], w[r], inputs);
    }
  };
  std::int64_t k = 0;
  for (; k + COLUMNS <= columns; k += COLUMNS) {
    // The next rows as one stream: the CPU foresees a row at a time, not R short ones side by side.
    if constexpr (R > 1)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        _mm_prefetch(rows + R * columns + R * k + COLUMNS * r, _MM_HINT_T1);
    add(k, 0xffffffff);
  }
  if (k < columns) add(k, (1u << (columns - k)) - 1);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) y[t * ROWS + r] = _mm512_reduce_add_ps(sum[r][t]);
}

template <int T>
void multiply_dense(const Weight& w, std::int64_t block, const BFloat16* x, __m512* y) {
  // One token: a row after the other as memory has them. More: rows that share what is read of x.
  constexpr int R = T == 1 ? 1 : 4;
  alignas(64) float sums[T * ROWS] = {};
  const std::int64_t rows = std::min(ROWS, w.rows - block * ROWS);
  const auto* from = reinterpret_cast<const BFloat16*>(w.codes) + block * ROWS * w.columns;
  std::int64_t r = 0;
  for (; r + R <= rows; r += R) multiply_rows<R, T>(from + r * w.columns, w.columns, x, sums + r);
  for (; r < rows; ++r) multiply_rows<1, T>(from + r * w.columns, w.columns, x, sums + r);
  for (int t = 0; t < T; ++t) y[t] = _mm512_load_ps(sums + t * ROWS);
}

// As many tokens as one call takes, at most those left; returns how many.
template <int FORMAT>
int multiply_some(
    const Weight& w, std::int64_t block, const BFloat16* x, const float* sums, __m512* y,
    std::int64_t left) {
  const auto run = [&]<int T>() {
    if constexpr (FORMAT == BF16)
      multiply_dense<T>(w, block, x, y);
    else
      multiply<FORMAT, T>(w, block, x, sums, y);
    return T;
  };
  if (left >= 8) return run.template operator()<8>();
  if (left >= 4) return run.template operator()<4>();
  if (left >= 2) return run.template operator()<2>();
  return run.template operator()<1>();
}

// What is done with the sums of 16 rows of all tokens before they leave the registers.
struct Around {
  const BFloat16 *bias, *residual;
  bool gated;
  BFloat16* y;
};

template <int FORMAT>
void run_blocks(
    const Weight& w, const BFloat16* x, const float* sums, std::int64_t tokens, const Around& around,
    std::int64_t begin, std::int64_t end) {
  const std::int64_t out = around.gated ? w.rows / 2 : w.rows;
  for (std::int64_t block = begin; block < end; ++block) {
    const std::int64_t row = block * ROWS;
    const __mmask16 mask = (1u << std::min(ROWS, out - row)) - 1;
    for (std::int64_t t = 0; t < tokens;) {
      const BFloat16* inputs = x + t * w.columns;
      const float* input_sums = sums ? sums + t * w.groups : nullptr;
      __m512 y[TOKENS], up[TOKENS];
      const int count = multiply_some<FORMAT>(w, block, inputs, input_sums, y, tokens - t);
      if (around.gated)
        multiply_some<FORMAT>(w, block + out / ROWS, inputs, input_sums, up, tokens - t);
      for (int i = 0; i < count; ++i, ++t) {
        if (around.bias) y[i] = _mm512_add_ps(y[i], load_floats(around.bias + row, mask));
        if (around.gated) {
          if (around.bias) up[i] = _mm512_add_ps(up[i], load_floats(around.bias + out + row));
          y[i] = _mm512_mul_ps(silu(y[i]), up[i]);
        }
        if (around.residual)
          y[i] = _mm512_add_ps(y[i], load_floats(around.residual + t * out + row, mask));
        store_words(around.y + t * out + row, y[i], mask);
      }
    }
  }
}

template <typename Run>
void for_format(std::int64_t format, Run run) {
  switch (format) {
    case INT2: return run.template operator()<INT2>();
    case INT3: return run.template operator()<INT3>();
    case INT4: return run.template operator()<INT4>();
    case INT8: return run.template operator()<INT8>();
    case FP4: return run.template operator()<FP4>();
    case FP8: return run.template operator()<FP8>();
    case BF16: return run.template operator()<BF16>();
    default: TORCH_CHECK(false, "no format ", format);
  }
}

// ---- before the product

__mmask16 mask_at(std::int64_t k, std::int64_t columns) {
  return columns - k >= 16 ? 0xffff : (1u << (columns - k)) - 1;
}

// RMSNorm as transformers computes it: the root in float32, rounded, then the weight in bf16.
void rms_norm(
    const BFloat16* x, const BFloat16* weight, float eps, std::int64_t columns, BFloat16* y) {
  __m512 squares = _mm512_setzero_ps();
  for (std::int64_t k = 0; k < columns; k += 16) {
    const __m512 value = load_floats(x + k, mask_at(k, columns));
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(columns);
  const __m512 root = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  for (std::int64_t k = 0; k < columns; k += 16) {
    const __mmask16 mask = mask_at(k, columns);
    const __m512 unit = to_floats(to_words(_mm512_mul_ps(load_floats(x + k, mask), root)));
    store_words(y + k, _mm512_mul_ps(unit, load_floats(weight + k, mask)), mask);
  }
}

// The sum of each group of columns, which are a multiple of 32.
void add_groups(const BFloat16* x, std::int64_t columns, std::int64_t group, float* sums) {
  const __m512i ones = _mm512_set1_epi16(word_of(1.0f));
  for (std::int64_t k = 0; k < columns;) {
    __m512 sum = _mm512_setzero_ps();
    for (const std::int64_t end = std::min(k + group, columns); k < end; k += COLUMNS)
      sum = dot(sum, load(x + k), ones);
    *sums++ = _mm512_reduce_add_ps(sum);
  }
}

const BFloat16* words(const Maybe& tensor) {
  if (!tensor) return nullptr;
  TORCH_CHECK(
      tensor->scalar_type() == at::kBFloat16 && tensor->is_contiguous(), "contiguous bf16 is needed");
  return static_cast<const BFloat16*>(tensor->const_data_ptr());
}

Weight weight_of(
    const Tensor& codes, const Maybe& scales, const Maybe& zeros, std::int64_t format,
    std::int64_t group, std::int64_t rows, std::int64_t columns) {
  const bool dense = format == BF16;
  TORCH_CHECK(
      codes.is_contiguous() && codes.size(1) == (dense ? columns : columns / COLUMNS) &&
          codes.size(0) == (dense ? rows : (rows + ROWS - 1) / ROWS) &&
          (dense || columns % COLUMNS == 0),
      codes.sizes(), " is no weight of ", rows, " x ", columns);
  Weight w{};
  w.codes = static_cast<const char*>(codes.const_data_ptr());
  w.rows = rows;
  w.columns = columns;
  if (format == BF16) return w;
  w.group = group;
  w.groups = (columns + group - 1) / group;
  w.scales = scales->const_data_ptr();
  w.scale_type = scales->scalar_type();
  w.zeros = zeros ? static_cast<const std::uint8_t*>(zeros->const_data_ptr()) : nullptr;
  w.middle = static_cast<float>(1 << (format - 1) % 32);
  return w;
}

// y = x W^T with a norm before it; bias, gate and residual after it.
Tensor linear(
    const Tensor& x, const Tensor& codes, const Maybe& scales, const Maybe& zeros,
    std::int64_t format, std::int64_t group, std::int64_t rows, const Maybe& norm, double eps,
    const Maybe& bias, bool gated, const Maybe& residual) {
  const std::int64_t columns = x.size(-1), tokens = x.numel() / columns;
  const std::int64_t out = gated ? rows / 2 : rows;
  TORCH_CHECK(!gated || out % ROWS == 0, "halves of ", out, " rows are not whole blocks");
  const Weight w = weight_of(codes, scales, zeros, format, group, rows, columns);
  auto shape = x.sizes().vec();
  shape.back() = out;
  Tensor y = at::empty(shape, x.options());
  const Maybe x_rows = x.contiguous();
  const BFloat16* inputs = words(x_rows);
  const Maybe rest = residual ? Maybe(residual->contiguous()) : residual;
  TORCH_CHECK(!rest || rest->numel() == y.numel(), "the residual has another shape");
  TORCH_CHECK(!norm || norm->numel() == columns, "the norm has another size");
  TORCH_CHECK(!bias || bias->numel() == rows, "the bias has another size");
  thread_local std::vector<BFloat16> normed;
  thread_local std::vector<float> sums;
  if (norm) {
    normed.resize(x.numel());
    for (std::int64_t t = 0; t < tokens; ++t)
      rms_norm(
          inputs + t * columns, words(norm), static_cast<float>(eps), columns,
          normed.data() + t * columns);
    inputs = normed.data();
  }
  if (w.zeros) {
    sums.resize(tokens * w.groups);
    for (std::int64_t t = 0; t < tokens; ++t)
      add_groups(inputs + t * columns, columns, group, sums.data() + t * w.groups);
  }
  const float* input_sums = w.zeros ? sums.data() : nullptr;
  const Around around{
      words(bias), words(rest), gated, static_cast<BFloat16*>(y.mutable_data_ptr())};
  const std::int64_t blocks = (out + ROWS - 1) / ROWS;
  const std::int64_t bytes = std::max<std::int64_t>(1, codes.nbytes() / blocks * tokens);
  const std::int64_t least = std::max<std::int64_t>(1, SHARE / bytes);
  for_format(format, [&]<int FORMAT>() {
    at::parallel_for(0, blocks, least, [&](std::int64_t begin, std::int64_t end) {
      run_blocks<FORMAT>(w, inputs, input_sums, tokens, around, begin, end);
    });
  });
  return y;
}

// ---- the weight itself, in bf16

// (16, 16) of 32 bits, in place.
inline void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // Each quarter of a register now becomes four elements of a column.
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i even[] = {_mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x88),
                            _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0x88)};
    const __m512i odd[] = {_mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xdd),
                           _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0xdd)};
    t[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
    t[j + 4] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
    t[j + 8] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
    t[j + 12] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
  }
  std::copy(t, t + 16, rows);
}

// The even and the odd words of 32 as floats, and back.
inline __m512 even_floats(__m512i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

inline __m512 odd_floats(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000)));
}

inline __m512i woven(__m512 even, __m512 odd) {
  return _mm512_or_si512(
      _mm512_cvtepu16_epi32(to_words(even)),
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_words(odd)), 16));
}

template <int FORMAT>
void widen_block(const Weight& w, std::int64_t block, BFloat16* to) {
  constexpr std::int64_t STEP = Codes<FORMAT>::REGISTERS;
  const Codes<FORMAT> unpack;
  const auto* codes =
      reinterpret_cast<const __m512i*>(w.codes) + block * (w.columns / COLUMNS) * STEP;
  const std::int64_t rows = std::min(ROWS, w.rows - block * ROWS);
  for (std::int64_t k = 0; k < w.columns; k += COLUMNS, codes += STEP) {
    const std::int64_t g = k / w.group;
    const __m512 scale = w.scale(block, g);
    __m512 even[16], odd[16];
    std::fill_n(even, 16, w.zeros ? w.offset(block, g) : _mm512_setzero_ps());
    std::copy_n(even, 16, odd);
    // What is used twice, in halves, adds up.
    unpack.each(codes, [&](int pair, __m512i values) {
      even[pair] = _mm512_add_ps(even[pair], even_floats(values));
      odd[pair] = _mm512_add_ps(odd[pair], odd_floats(values));
    });
    __m512i pairs[16];
    for (int p = 0; p < 16; ++p)
      pairs[p] = woven(_mm512_mul_ps(even[p], scale), _mm512_mul_ps(odd[p], scale));
    transpose(pairs);
    for (std::int64_t r = 0; r < rows; ++r)
      _mm512_storeu_si512(to + (block * ROWS + r) * w.columns + k, pairs[r]);
  }
}

Tensor dequantize(
    const Tensor& codes, const Tensor& scales, const Maybe& zeros, std::int64_t format,
    std::int64_t group, std::int64_t rows, std::int64_t columns) {
  const Weight w = weight_of(codes, scales, zeros, format, group, rows, columns);
  Tensor wide = at::empty({rows, columns}, codes.options().dtype(at::kBFloat16));
  auto* to = static_cast<BFloat16*>(wide.mutable_data_ptr());
  for_format(format, [&]<int FORMAT>() {
    if constexpr (FORMAT != BF16)
      at::parallel_for(0, (rows + ROWS - 1) / ROWS, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t block = begin; block < end; ++block) widen_block<FORMAT>(w, block, to);
      });
  });
  return wide;
}

// ---- attention of one token a sequence, in 16 bits

// Tokens of a stretch of the context at least, and stretches of a long one at most. Neither depends on the
// threads, so neither do the results.
constexpr std::int64_t LEAST = 128, STRETCHES = 16;
// Tokens whose values are added at once: they stay in the first cache while more heads come for them.
constexpr std::int64_t TILE = 32;

struct Attention {
  const BFloat16* qkv;  // (batch, heads + 2 kv_heads, head_dim)
  const Tensor &cos, &sin;
  BFloat16 *keys, *values;
  std::int64_t key_strides[3], value_strides[3];  // of batch, head, token
  const std::int64_t* first;
  std::int64_t place, lowest, length, stretches;
  std::int64_t heads, kv_heads, head_dim, window;
  float scaling;
  // Of each stretch (batch, kv_heads, stretches, heads / kv_heads): largest score, sum of exponentials, and
  // values weighted with them, (head_dim) with even and odd ones of 32 apart.
  float *largest, *sums, *weighted;

  std::int64_t shared() const { return heads / kv_heads; }
};

inline __m512 load_floats(const Tensor& from, std::int64_t at) {
  if (from.scalar_type() == at::kFloat)
    return _mm512_loadu_ps(static_cast<const float*>(from.const_data_ptr()) + at);
  return load_floats(static_cast<const BFloat16*>(from.const_data_ptr()) + at);
}

// A head turned to its place, halves of it being the two coordinates, as in transformers' Llama.
void rotate(const Attention& a, std::int64_t batch, const BFloat16* from, BFloat16* to) {
  const std::int64_t half = a.head_dim / 2, row = batch * a.head_dim;
  for (std::int64_t d = 0; d < half; d += 16) {
    const __m512 x = load_floats(from + d), y = load_floats(from + half + d);
    const __m512 turned_x = _mm512_fmsub_ps(
        x, load_floats(a.cos, row + d), _mm512_mul_ps(y, load_floats(a.sin, row + d)));
    const __m512 turned_y = _mm512_fmadd_ps(
        y, load_floats(a.cos, row + half + d), _mm512_mul_ps(x, load_floats(a.sin, row + half + d)));
    store_words(to + d, turned_x);
    store_words(to + half + d, turned_y);
  }
}

// Lane i: the sum over register i.
inline __m512 add_across(const __m512* x) {
  __m512 quads[4];
  for (int i = 0; i < 4; ++i) {
    const __m512* r = x + 4 * i;
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    quads[i] = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  }
  const auto merge = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return merge(merge(quads[0], quads[1]), merge(quads[2], quads[3]));
}

// Scores of 16 keys, or of fewer with -infinity behind them.
template <bool WHOLE>
inline __m512 score(
    const BFloat16* q, const BFloat16* keys, std::int64_t stride, std::int64_t count,
    std::int64_t head_dim) {
  __m512 sum[16];
#pragma GCC unroll 16
  for (auto& value : sum) value = _mm512_setzero_ps();
  for (std::int64_t d = 0; d < head_dim; d += COLUMNS) {
    const __m512i query = load(q + d);
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < 16; ++i)
      sum[i] = dot(sum[i], load(keys + (WHOLE ? i : std::min(i, count - 1)) * stride + d), query);
  }
  const __m512 scores = add_across(sum);
  if (WHOLE) return scores;
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (1u << count) - 1, scores);
}

// Adds the values of some tokens to those of H heads. probabilities (H, pitch); weighted (H, head_dim)
template <int H>
void add_values(
    const float* probabilities, std::int64_t pitch, const BFloat16* values, std::int64_t stride,
    std::int64_t count, std::int64_t head_dim, float* weighted) {
  for (std::int64_t d = 0; d < head_dim; d += COLUMNS) {
    __m512 even[H], odd[H];
    for (int h = 0; h < H; ++h) {
      even[h] = _mm512_loadu_ps(weighted + h * head_dim + d);
      odd[h] = _mm512_loadu_ps(weighted + h * head_dim + d + 16);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const __m512i value = load(values + i * stride + d);
      const __m512 low = even_floats(value), high = odd_floats(value);
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        const __m512 p = _mm512_set1_ps(probabilities[h * pitch + i]);
        even[h] = _mm512_fmadd_ps(p, low, even[h]);
        odd[h] = _mm512_fmadd_ps(p, high, odd[h]);
      }
    }
    for (int h = 0; h < H; ++h) {
      _mm512_storeu_ps(weighted + h * head_dim + d, even[h]);
      _mm512_storeu_ps(weighted + h * head_dim + d + 16, odd[h]);
    }
  }
}

// Asks memory for tokens that come next; heads read them in another order than they lie there.
inline void fetch(
    const BFloat16* from, std::int64_t tokens, std::int64_t stride, std::int64_t head_dim) {
  for (std::int64_t i = 0; i < tokens; ++i)
    for (std::int64_t d = 0; d < head_dim; d += COLUMNS)
      _mm_prefetch(from + i * stride + d, _MM_HINT_T0);
}

// One stretch of the context for one kv head and the query heads that share it.
void attend(const Attention& a, std::int64_t unit) {
  const std::int64_t stretch = unit % a.stretches, kv = unit / a.stretches % a.kv_heads;
  const std::int64_t batch = unit / a.stretches / a.kv_heads, shared = a.shared(), D = a.head_dim;
  BFloat16* keys = a.keys + batch * a.key_strides[0] + kv * a.key_strides[1];
  BFloat16* values = a.values + batch * a.value_strides[0] + kv * a.value_strides[1];
  const BFloat16* token = a.qkv + batch * (a.heads + 2 * a.kv_heads) * D;
  if (stretch == a.stretches - 1) {
    rotate(a, batch, token + (a.heads + kv) * D, keys + a.place * a.key_strides[2]);
    std::copy_n(
        token + (a.heads + a.kv_heads + kv) * D, D, values + a.place * a.value_strides[2]);
  }
  float *largest = a.largest + unit * shared, *sums = a.sums + unit * shared;
  float* weighted = a.weighted + unit * shared * D;
  std::fill_n(largest, shared, -INFINITY);
  std::fill_n(sums, shared, 0.0f);
  std::fill_n(weighted, shared * D, 0.0f);
  const std::int64_t start = a.lowest + stretch * a.length;
  const std::int64_t begin = std::max(start, a.first[batch]);
  const std::int64_t count = std::min(start + a.length, a.place + 1) - begin;
  if (count <= 0) return;
  keys += begin * a.key_strides[2];
  values += begin * a.value_strides[2];

  const std::int64_t pitch = (count + 15) / 16 * 16;
  thread_local std::vector<BFloat16> queries;
  thread_local std::vector<float> probabilities;
  queries.resize(shared * D);
  probabilities.resize(shared * pitch);
  for (std::int64_t h = 0; h < shared; ++h)
    rotate(a, batch, token + (kv * shared + h) * D, queries.data() + h * D);
  const __m512 scaling = _mm512_set1_ps(a.scaling);
  const std::int64_t stride = a.key_strides[2];
  for (std::int64_t i = 0; i < count; i += 16) {
    fetch(keys + (i + 16) * stride, 16, stride, D);
    for (std::int64_t h = 0; h < shared; ++h) {
      const BFloat16 *q = queries.data() + h * D, *from = keys + i * stride;
      const __m512 scores = count - i >= 16 ? score<true>(q, from, stride, 16, D)
                                            : score<false>(q, from, stride, count - i, D);
      _mm512_storeu_ps(probabilities.data() + h * pitch + i, _mm512_mul_ps(scores, scaling));
    }
  }
  for (std::int64_t h = 0; h < shared; ++h) {
    float* row = probabilities.data() + h * pitch;
    __m512 top = _mm512_loadu_ps(row), sum = _mm512_setzero_ps();
    for (std::int64_t i = 16; i < pitch; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(row + i));
    largest[h] = _mm512_reduce_max_ps(top);
    top = _mm512_set1_ps(largest[h]);
    for (std::int64_t i = 0; i < pitch; i += 16) {
      const __m512 p = exponential(_mm512_sub_ps(_mm512_loadu_ps(row + i), top));
      _mm512_storeu_ps(row + i, p);
      sum = _mm512_add_ps(sum, p);
    }
    sums[h] = _mm512_reduce_add_ps(sum);
  }
  const std::int64_t value_stride = a.value_strides[2];
  for (std::int64_t i = 0; i < count; i += TILE) {
    fetch(values + (i + TILE) * value_stride, TILE, value_stride, D);
    for (std::int64_t h = 0; h < shared; h += 4) {
      const auto add = [&]<int H>() {
        add_values<H>(
            probabilities.data() + h * pitch + i, pitch, values + i * value_stride, value_stride,
            std::min(TILE, count - i), D, weighted + h * D);
      };
      switch (shared - h) {
        case 1: add.template operator()<1>(); break;
        case 2: add.template operator()<2>(); break;
        case 3: add.template operator()<3>(); break;
        default: add.template operator()<4>();
      }
    }
  }
}

// The stretches of one head, added up. y bf16 (head_dim)
void combine(const Attention& a, std::int64_t head, BFloat16* y) {
  const std::int64_t shared = a.shared(), D = a.head_dim;
  const auto at = [&](std::int64_t s) {
    return (head / shared * a.stretches + s) * shared + head % shared;
  };
  float top = -INFINITY, total = 0;
  for (std::int64_t s = 0; s < a.stretches; ++s) top = std::max(top, a.largest[at(s)]);
  float weight[STRETCHES];
  for (std::int64_t s = 0; s < a.stretches; ++s) {
    weight[s] = std::exp(a.largest[at(s)] - top);
    total += weight[s] * a.sums[at(s)];
  }
  for (std::int64_t d = 0; d < D; d += COLUMNS) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (std::int64_t s = 0; s < a.stretches; ++s) {
      const float* part = a.weighted + at(s) * D + d;
      const __m512 share = _mm512_set1_ps(weight[s] / total);
      even = _mm512_fmadd_ps(share, _mm512_loadu_ps(part), even);
      odd = _mm512_fmadd_ps(share, _mm512_loadu_ps(part + 16), odd);
    }
    _mm512_storeu_si512(y + d, woven(even, odd));
  }
}

// A token of each sequence: turns its query and key, writes key and value to their place in the caches (batch,
// kv_heads, capacity, head_dim), and attends to tokens first .. place, the last `window` of them if it is above
// 0. qkv (batch, (heads + 2 kv_heads) * head_dim) -> (batch, heads * head_dim)
Tensor decode_attention(
    const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& keys,
    const Tensor& values, const Tensor& first, std::int64_t place, std::int64_t heads,
    std::int64_t kv_heads, double scaling, std::int64_t window) {
  const std::int64_t batch = qkv.size(0), D = keys.size(3);
  TORCH_CHECK(D % COLUMNS == 0 && heads % kv_heads == 0, "heads of ", D);
  TORCH_CHECK(qkv.size(1) == (heads + 2 * kv_heads) * D && keys.size(1) == kv_heads);
  TORCH_CHECK(0 <= place && place < keys.size(2), "no place ", place, " in ", keys.size(2));
  for (const Tensor* turn : {&cos, &sin}) {
    TORCH_CHECK(turn->is_contiguous() && turn->numel() == batch * D);
    TORCH_CHECK(turn->scalar_type() == at::kFloat || turn->scalar_type() == at::kBFloat16);
  }
  for (const Tensor* cache : {&keys, &values})
    TORCH_CHECK(
        cache->scalar_type() == at::kBFloat16 && cache->stride(3) == 1 && cache->size(0) == batch &&
        cache->sizes() == keys.sizes());
  TORCH_CHECK(first.scalar_type() == at::kLong && first.is_contiguous() && first.numel() == batch);
  const auto* firsts = static_cast<const std::int64_t*>(first.const_data_ptr());
  std::int64_t lowest = *std::min_element(firsts, firsts + batch);
  TORCH_CHECK(*std::max_element(firsts, firsts + batch) <= place, "a sequence without a token");
  if (window > 0) lowest = std::max(lowest, place + 1 - window);
  const std::int64_t total = place + 1 - lowest;
  const std::int64_t length = std::max(LEAST, (total + STRETCHES - 1) / STRETCHES);
  const std::int64_t stretches = (total + length - 1) / length;

  const std::int64_t parts = batch * heads * stretches;
  thread_local std::vector<float> scratch;
  scratch.resize(parts * (D + 2));
  Tensor y = at::empty({batch, heads * D}, qkv.options());
  auto* to = static_cast<BFloat16*>(y.mutable_data_ptr());
  const Attention a{
      words(qkv),
      cos,
      sin,
      static_cast<BFloat16*>(keys.mutable_data_ptr()),
      static_cast<BFloat16*>(values.mutable_data_ptr()),
      {keys.stride(0), keys.stride(1), keys.stride(2)},
      {values.stride(0), values.stride(1), values.stride(2)},
      firsts,
      place,
      lowest,
      length,
      stretches,
      heads,
      kv_heads,
      D,
      window,
      static_cast<float>(scaling),
      scratch.data(),
      scratch.data() + parts,
      scratch.data() + 2 * parts};
  const auto shares = [](std::int64_t bytes) { return std::max<std::int64_t>(1, SHARE / bytes); };
  at::parallel_for(
      0, batch * kv_heads * stretches, shares(4 * D * std::min(length, total)),
      [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t unit = begin; unit < end; ++unit) attend(a, unit);
      });
  at::parallel_for(
      0, batch * heads, shares(4 * D * stretches), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t head = begin; head < end; ++head) combine(a, head, to + head * D);
      });
  return y;
}

// ---- what memory gives at best

// All bytes as integers of 64 bits, added up: nothing else is done with them.
std::int64_t read_all(const Tensor& tensor) {
  constexpr std::int64_t LINES = 8;
  TORCH_CHECK(tensor.is_contiguous());
  const auto* from = static_cast<const char*>(tensor.const_data_ptr());
  std::atomic<std::int64_t> total = 0;
  const std::int64_t steps = tensor.nbytes() / (LINES * 64);
  at::parallel_for(0, steps, SHARE / 64, [&](std::int64_t begin, std::int64_t end) {
    __m512i sums[LINES] = {};
    for (; begin < end; ++begin)
#pragma GCC unroll 8
      for (std::int64_t i = 0; i < LINES; ++i) {
        const char* line = from + (begin * LINES + i) * 64;
        _mm_prefetch(line + 2 * AHEAD, _MM_HINT_T1);
        sums[i] = _mm512_add_epi64(sums[i], load(line));
      }
    for (const __m512i& sum : sums) total += _mm512_reduce_add_epi64(sum);
  });
  return total;
}

}  // namespace

TORCH_LIBRARY(compress, m) {
  m.def(
      "linear(Tensor x, Tensor codes, Tensor? scales, Tensor? zeros, int format, int group, int rows,"
      " Tensor? norm, float eps, Tensor? bias, bool gated, Tensor? residual) -> Tensor");
  m.def(
      "dequantize(Tensor codes, Tensor scales, Tensor? zeros, int format, int group, int rows,"
      " int columns) -> Tensor");
  m.def(
      "decode_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values,"
      " Tensor first, int place, int heads, int kv_heads, float scaling, int window) -> Tensor");
  m.def("read(Tensor tensor) -> int");
}

TORCH_LIBRARY_IMPL(compress, CPU, m) {
  m.impl("linear", linear);
  m.impl("dequantize", dequantize);
  m.impl("decode_attention", decode_attention);
  m.impl("read", read_all);
}
