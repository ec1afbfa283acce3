// What a training step does after top-k, for processors. saerad/sae/kernels.py compiles this file once a machine and calls it;
// nbs/sae/kernels.ipynb explains it, tests/sae/test_kernels.py holds it to the plain formulas. No dependency but a C++17 compiler.
//
// The residual stream is walked in blocks of BLOCK dimensions: one block of everything that is gathered fits a core's cache. Work is
// split over tokens or over features, and what belongs to one token or feature is always added up in the same order by one thread:
// the result does not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr long BLOCK = 128;

template <class F> void parallel(long threads, long n, long grain, F work) {
    std::atomic<long> next{0};
    auto loop = [&] {
        for (long begin; (begin = next.fetch_add(grain)) < n;)
            for (long i = begin, end = std::min(n, begin + grain); i < end; ++i) work(i);
    };
    std::vector<std::thread> others;
    for (long t = 1; t < std::min(threads, (n + grain - 1) / grain); ++t) others.emplace_back(loop);
    loop();
    for (auto& other : others) other.join();
}

// N registers of numbers, and BLOCK numbers of them. Nested rather than an array: compilers keep an array in memory.
#if defined(__AVX512F__)
constexpr long BYTES = 64;
#elif defined(__AVX__)
constexpr long BYTES = 32;
#else
constexpr long BYTES = 16;
#endif

template <class T, long N> struct Registers {
    Registers<T, N / 2> low, high;
    static constexpr long HALF = N / 2 * BYTES / sizeof(T);
    typedef typename Registers<T, 1>::V V;
    static Registers zero() { return {Registers<T, N / 2>::zero(), Registers<T, N / 2>::zero()}; }
    static Registers load(const T* p) { return {Registers<T, N / 2>::load(p), Registers<T, N / 2>::load(p + HALF)}; }
    void store(T* p) const { low.store(p); high.store(p + HALF); }
    void add(T s, const Registers& o) { low.add(s, o.low); high.add(s, o.high); }
    V times(const Registers& o) const { return low.times(o.low) + high.times(o.high); }
};

template <class T> struct Registers<T, 1> {
    typedef T V __attribute__((vector_size(BYTES)));
    typedef T Any __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
    V v;
    static Registers zero() { return {V{}}; }
    static Registers load(const T* p) { return {*(const Any*)p}; }
    void store(T* p) const { *(Any*)p = v; }
    void add(T s, const Registers& o) { v += s * o.v; }
    V times(const Registers& o) const { return v * o.v; }
};

template <class T, long BYTES> T sum(T __attribute__((vector_size(BYTES))) v) {
    if constexpr (BYTES == 2 * sizeof(T)) return v[0] + v[1];
    else {
        typedef T Half __attribute__((vector_size(BYTES / 2)));
        Half halves[2];
        std::memcpy(halves, &v, BYTES);
        return sum<T, BYTES / 2>(halves[0] + halves[1]);
    }
}

template <class T> struct Block : Registers<T, BLOCK * sizeof(T) / BYTES> {
    typedef Registers<T, BLOCK * sizeof(T) / BYTES> R;
    Block(R r) : R(r) {}
    static Block zero() { return R::zero(); }
    static Block load(const T* p) { return R::load(p); }
    static Block load(const T* p, long n) {                        // the last block may be short
        if (n >= BLOCK) return R::load(p);
        T whole[BLOCK] = {};
        std::memcpy(whole, p, n * sizeof(T));
        return R::load(whole);
    }
    void store(T* p) const { R::store(p); }
    void store(T* p, long n) const {
        if (n >= BLOCK) return R::store(p);
        T whole[BLOCK];
        R::store(whole);
        std::memcpy(p, whole, n * sizeof(T));
    }
    T dot(const Block& o) const {
        return sum<T, BYTES>(this->times(o));
    }
};

}  // namespace

// All arrays of one step. n tokens, d dimensions, `width` features; the kept entries once by token (row_*) and once by feature (col_*).
template <class T> struct Step {
    long n, d, width, groups, threads;
    const long* group_end;            // [groups] first feature after each group
    const T* level;                   // [groups] 2 / tokens * weight of each level
    const T* x;                       // [blocks, n, BLOCK] normalised, less b_dec, padded with zeros
    const long* row_ptr; const int* col; const T* value;          // by token
    const long* col_ptr; const int* row; const T* strength;       // by feature; the same values in that order
    const int* number;                // [kept] by feature: which entry it is by token
    T* W_dec; T* W_enc;               // [width, d] both
    T* slope_of;                      // [kept] by token: derivative of the loss by each activation
    T* slope;                         // [kept] by feature
    T* G;                             // [blocks, groups, n, BLOCK] scratch
    T* pack;                          // [width, BLOCK] scratch
    double* levels;                   // [n, groups] squared errors
    double* reach;                    // [n, groups] squared lengths of G
    const T* length;                  // [n] of each x
    double* along;                    // [width] gradient of a decoder row along it
    double* square;                   // [width] squared lengths of both gradients, once asked
    double* most;                     // [width] what they cannot exceed
    double* norm;                     // [width] squared length of the new decoder row
    T* b_dec; T* b_enc;               // gradients
    T* residual;                      // [n, d] or null
    const int* extra; const T* extra_dec; const T* extra_enc;     // [width] row of an added gradient, or -1; may be null
    T* grad_dec; T* grad_enc;         // [width, d] to write gradients instead of changing weights, or null
    T* m_dec; T* v_dec; T* m_enc; T* v_enc;                       // [blocks, width, BLOCK] Adam's moments
    T clip, rate, beta1, beta2, eps, root2;                       // rate: over the first correction; root2: root of the second
};

namespace {

// A weight's block lies a page from that of the next feature, which no processor guesses: it is sent for some features ahead.
template <class T> void fetch(const Step<T>& s, const T* weights, long f, long at) {
    if (f >= s.width) return;
    for (long k = 0, len = std::min(BLOCK, s.d - at); k < len; k += 64 / sizeof(T)) __builtin_prefetch(weights + f * s.d + at + k);
}

// One block of all errors, and from them the gradients G of each group's share of the reconstruction, for every token.
template <class T> void decode(const Step<T>& s, long b) {
    const long at = b * BLOCK, len = std::min(BLOCK, s.d - at);
    parallel(s.threads, s.width, 256, [&](long f) {
        fetch(s, s.W_dec, f + 6, at);
        Block<T>::load(s.W_dec + f * s.d + at, len).store(s.pack + f * BLOCK);
    });
    const T* x = s.x + b * s.n * BLOCK;
    T* G = s.G + b * s.groups * s.n * BLOCK;
    parallel(s.threads, s.n, 32, [&](long i) {
        Block<T> e = Block<T>::zero(), c = Block<T>::zero();
        e.add(-1, Block<T>::load(x + i * BLOCK));
        long j = s.row_ptr[i];
        const long end = s.row_ptr[i + 1];
        for (long g = 0; g < s.groups; ++g) {
            for (; j < end && s.col[j] < s.group_end[g]; ++j) {
                if (j + 4 < end)
                    for (long k = 0; k < BLOCK; k += 64 / sizeof(T)) __builtin_prefetch(s.pack + s.col[j + 4] * BLOCK + k);
                e.add(s.value[j], Block<T>::load(s.pack + s.col[j] * BLOCK));
            }
            s.levels[i * s.groups + g] += e.dot(e);
            e.store(G + (g * s.n + i) * BLOCK);
        }
        if (s.residual) {
            Block<T> r = Block<T>::zero();
            r.add(-1, e);
            r.store(s.residual + i * s.d + at, len);
        }
        for (long g = s.groups - 1; g >= 0; --g) {
            T* place = G + (g * s.n + i) * BLOCK;
            c.add(s.level[g], Block<T>::load(place));
            c.store(place);
            s.reach[i * s.groups + g] += c.dot(c);
            for (const long first = g ? s.group_end[g - 1] : 0; j > s.row_ptr[i] && s.col[j - 1] >= first; --j)
                s.slope_of[j - 1] += c.dot(Block<T>::load(s.pack + s.col[j - 1] * BLOCK));
        }
    });
}

template <class T> const T* gathered(const Step<T>& s, long b, long f) {
    return s.G + (b * s.groups + (std::upper_bound(s.group_end, s.group_end + s.groups, f) - s.group_end)) * s.n * BLOCK;
}

template <class T> Block<T> start(const Step<T>& s, const T* extra, long f, long at, long len) {
    if (!s.extra || s.extra[f] < 0) return Block<T>::zero();
    return Block<T>::load(extra + s.extra[f] * s.d + at, len);
}

template <class T> Block<T> gather(const Step<T>& s, Block<T> sum, const T* from, const T* by, long f) {
    for (long j = s.col_ptr[f]; j < s.col_ptr[f + 1]; ++j) sum.add(by[j], Block<T>::load(from + s.row[j] * BLOCK));
    return sum;
}

template <class T> void adam(const Step<T>& s, T* __restrict w, T* __restrict m, T* __restrict v, const Block<T>& gradient, long len) {
    T from[BLOCK];
    gradient.store(from);
    const T clip = s.clip, keep1 = s.beta1, take1 = 1 - s.beta1, keep2 = s.beta2, take2 = 1 - s.beta2, by = 1 / s.root2, rate = s.rate, eps = s.eps;
    for (long k = 0; k < len; ++k) {
        const T g = clip * from[k];
        m[k] = keep1 * m[k] + take1 * g;
        v[k] = keep2 * v[k] + take2 * g * g;
        w[k] -= rate * m[k] / (std::sqrt(v[k]) * by + eps);
    }
}

// First pass: errors and slopes.
template <class T> void measure(const Step<T>& s) {
    for (long b = 0, at = 0; at < s.d; ++b, at += BLOCK) {
        decode(s, b);
        Block<T> sum = Block<T>::zero();                           // the bias is in every level
        for (long i = 0; i < s.n; ++i) sum.add(1, Block<T>::load(s.G + (b * s.groups * s.n + i) * BLOCK));
        sum.store(s.b_dec + at, std::min(BLOCK, s.d - at));
    }
}

// By the triangle inequality no gradient is longer than its tokens' parts, each as long as it is, all in one direction.
template <class T> void bound(const Step<T>& s) {
    parallel(s.threads, s.width, 256, [&](long f) {
        const long g = std::upper_bound(s.group_end, s.group_end + s.groups, f) - s.group_end;
        double along = 0, dec = 0, enc = 0, bias = 0;
        for (long j = s.col_ptr[f]; j < s.col_ptr[f + 1]; ++j) {
            const double slope = s.slope[j] = s.slope_of[s.number[j]], strength = s.strength[j];
            bias += slope;
            along += slope * strength;
            dec += std::abs(strength) * std::sqrt(s.reach[s.row[j] * s.groups + g]);
            enc += std::abs(slope) * s.length[s.row[j]];
        }
        if (s.extra && s.extra[f] >= 0) {
            const T *by_dec = s.extra_dec + s.extra[f] * s.d, *by_enc = s.extra_enc + s.extra[f] * s.d, *w = s.W_dec + f * s.d;
            double square_dec = 0, square_enc = 0;
            for (long k = 0; k < s.d; ++k) {
                along += double(by_dec[k]) * w[k];
                square_dec += double(by_dec[k]) * by_dec[k];
                square_enc += double(by_enc[k]) * by_enc[k];
            }
            dec += std::sqrt(square_dec);
            enc += std::sqrt(square_enc);
        }
        s.b_enc[f] = T(bias);
        s.along[f] = along;
        s.most[f] = dec * dec + enc * enc;
    });
}

// The lengths themselves, for where the bound leaves it open whether gradients must be clipped.
template <class T> void lengths(const Step<T>& s) {
    for (long b = 0, at = 0; at < s.d; ++b, at += BLOCK)
        parallel(s.threads, s.width, 64, [&](long f) {
            const long len = std::min(BLOCK, s.d - at);
            const Block<T> dec = gather(s, start(s, s.extra_dec, f, at, len), gathered(s, b, f), s.strength, f);
            const Block<T> enc = gather(s, start(s, s.extra_enc, f, at, len), s.x + b * s.n * BLOCK, s.slope, f);
            if (b == 0) s.square[f] = -s.along[f] * s.along[f];    // of the decoder's only what turns the row
            s.square[f] += double(dec.dot(dec)) + double(enc.dot(enc));
        });
}

// Second pass: every gradient again, block by block, and at once into the weights (or, for tests, out). One weight after the other:
// what is gathered for both at once is more than a core's own cache.
template <class T> void apply(const Step<T>& s) {
    for (long b = 0, at = 0; at < s.d; ++b, at += BLOCK) {
        const long len = std::min(BLOCK, s.d - at);
        parallel(s.threads, s.width, 256, [&](long f) {
            const long here = f * s.d + at, moments = (b * s.width + f) * BLOCK;
            fetch(s, s.W_enc, f + 6, at);
            const Block<T> g = gather(s, start(s, s.extra_enc, f, at, len), s.x + b * s.n * BLOCK, s.slope, f);
            if (s.grad_enc) g.store(s.grad_enc + here, len);
            else adam(s, s.W_enc + here, s.m_enc + moments, s.v_enc + moments, g, len);
        });
        parallel(s.threads, s.width, 256, [&](long f) {
            const long here = f * s.d + at, moments = (b * s.width + f) * BLOCK;
            fetch(s, s.W_dec, f + 6, at);
            Block<T> g = gather(s, start(s, s.extra_dec, f, at, len), gathered(s, b, f), s.strength, f);
            if (s.grad_dec) return g.store(s.grad_dec + here, len);
            g.add(-T(s.along[f]), Block<T>::load(s.W_dec + here, len));
            adam(s, s.W_dec + here, s.m_dec + moments, s.v_dec + moments, g, len);
            const Block<T> w = Block<T>::load(s.W_dec + here, len);
            s.norm[f] += w.dot(w);
        });
    }
    if (s.grad_dec) return;
    parallel(s.threads, s.width, 64, [&](long f) {
        const T by = T(1 / std::sqrt(s.norm[f]));
        for (long k = 0; k < s.d; ++k) s.W_dec[f * s.d + k] *= by;
    });
}

// Activations before selection at chosen places, features outside and tokens inside, so that each encoder row is read once a block.
template <class T> void values(const Step<T>& s, const T* b_enc, T* out) {
    for (long b = 0, at = 0; at < s.d; ++b, at += BLOCK)
        parallel(s.threads, s.width, 64, [&](long f) {
            fetch(s, s.W_enc, f + 6, at);
            const Block<T> w = Block<T>::load(s.W_enc + f * s.d + at, std::min(BLOCK, s.d - at));
            for (long j = s.col_ptr[f]; j < s.col_ptr[f + 1]; ++j)
                out[j] = (b ? out[j] : b_enc[f]) + w.dot(Block<T>::load(s.x + (b * s.n + s.row[j]) * BLOCK));
        });
}

}  // namespace

extern "C" {

long saerad_block() { return BLOCK; }

// Rows of float32 as whole numbers up to `most`, each row in a unit of its own, that part of its largest entry; and the rows' squared lengths.
void saerad_quantise(const float* from, long rows, long d, long most, int8_t* to, float* unit, float* square, long threads) {
    typedef float F __attribute__((vector_size(64)));
    typedef int32_t I __attribute__((vector_size(64)));
    typedef int8_t B __attribute__((vector_size(16)));
    parallel(threads, rows, 8, [&](long i) {
        const float* row = from + i * d;
        const auto sixteen = [&](long k) {
            F v{};
            if (k + 16 <= d) std::memcpy(&v, row + k, 64);
            else std::memcpy(&v, row + k, (d - k) * 4);
            return v;
        };
        F longest{}, squares{};
        for (long k = 0; k < d; k += 16) {
            const F v = sixteen(k), size = v < 0 ? -v : v;
            longest = longest > size ? longest : size;
            squares += v * v;
        }
        float largest = 0;
        square[i] = 0;
        for (int k = 0; k < 16; ++k) largest = std::max(largest, longest[k]), square[i] += squares[k];
        unit[i] = largest / most;
        const float by = largest > 0 ? most / largest : 0;
        const F shift = F{} + 12582912.0f;                         // 1.5 * 2^23: what is added to it is rounded to a whole number
        for (long k = 0; k < d; k += 16) {
            const F moved = sixteen(k) * by + shift;
            I whole, zero;
            std::memcpy(&whole, &moved, 64);
            std::memcpy(&zero, &shift, 64);
            const B small = __builtin_convertvector(whole - zero, B);
            std::memcpy(to + i * d + k, &small, std::min(16L, d - k));
        }
    });
}

// Sums of products of such rows, `x` [rows, d] and `w` [some, d], into [rows, some]; false where this processor has no instruction for it.
//
// One instruction multiplies 32 pairs of bytes and adds neighbours up in 16 bits, but takes one side without a sign: x is moved by 64 and the
// sums moved back. Two such sums are added before they are widened: 4 * 127 * 63 still fits 16 bits, so neither side may go beyond 63. Four
// rows and sixteen columns of sums at a time stay in registers, and the weights of sixteen columns in a core's cache.
bool saerad_products(const int8_t* x, const int8_t* w, long rows, long some, long d, int* sums, long threads) {
#if defined(__AVX2__)
    constexpr long ROWS = 4, COLUMNS = 16, DEEP = 8, MOVED = 64;
    const long padded = (d + DEEP - 1) / DEEP * DEEP;
    std::vector<uint8_t> moved((rows + ROWS - 1) / ROWS * ROWS * padded, MOVED);
    parallel(threads, rows, 16, [&](long i) {
        for (long k = 0; k < d; ++k) moved[i * padded + k] = uint8_t(x[i * d + k] + MOVED);
    });
    parallel(threads, (some + COLUMNS - 1) / COLUMNS, 1, [&](long panel) {
        const long first = panel * COLUMNS, count = std::min(COLUMNS, some - first);
        std::vector<int8_t> packed(COLUMNS * padded);              // [d / 4, COLUMNS, 4]
        int back[COLUMNS] = {};
        for (long f = 0; f < count; ++f) {
            const int8_t* row = w + (first + f) * d;
            for (long k = 0; k < d; ++k) back[f] -= MOVED * row[k];
            for (long k = 0; k < d; k += 4) std::memcpy(&packed[k * COLUMNS + f * 4], row + k, std::min(4L, d - k));
        }
        const auto load = [](const void* at) { return _mm256_loadu_si256((const __m256i*)at); };
        const auto four = [](const uint8_t* at) { int bytes; std::memcpy(&bytes, at, 4); return _mm256_set1_epi32(bytes); };
        const __m256i ones = _mm256_set1_epi16(1);
        for (long i = 0; i < rows; i += ROWS) {
            __m256i sum[ROWS][2];                                  // every loop over it is unrolled, or it would lie in memory
#pragma GCC unroll 4
            for (long r = 0; r < ROWS; ++r) sum[r][0] = load(back), sum[r][1] = load(back + 8);
            for (long k = 0; k < padded; k += DEEP) {
                const int8_t* at = &packed[k * COLUMNS];
                const __m256i near[2] = {load(at), load(at + 32)}, far[2] = {load(at + 64), load(at + 96)};
#pragma GCC unroll 4
                for (long r = 0; r < ROWS; ++r) {
                    const uint8_t* row = &moved[(i + r) * padded + k];
                    const __m256i a = four(row), b = four(row + 4);
#pragma GCC unroll 2
                    for (long h = 0; h < 2; ++h) {
                        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a, near[h]), _mm256_maddubs_epi16(b, far[h]));
                        sum[r][h] = _mm256_add_epi32(sum[r][h], _mm256_madd_epi16(pairs, ones));
                    }
                }
            }
            int out[ROWS][COLUMNS];
#pragma GCC unroll 4
            for (long r = 0; r < ROWS; ++r) {
                _mm256_storeu_si256((__m256i*)out[r], sum[r][0]);
                _mm256_storeu_si256((__m256i*)(out[r] + 8), sum[r][1]);
            }
            for (long r = 0; r < std::min(ROWS, rows - i); ++r) std::memcpy(sums + (i + r) * some + first, out[r], count * sizeof(int));
        }
    });
    return true;
#else
    return false;
#endif
}

// Sums of products of such rows [rows, some] in their units, plus a bias, as bfloat16 into `to` [rows, width] from its column `at` on.
void saerad_in_units(const int* sums, long rows, long some, const float* unit, const float* other, const float* bias, uint16_t* to, long at,
                     long width, long threads) {
    parallel(threads, rows, 8, [&](long i) {
        uint16_t* out = to + i * width + at;
        for (long f = 0; f < some; ++f) {
            const float value = float(sums[i * some + f]) * unit[i] * other[f] + bias[f];
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            out[f] = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        }
    });
}

// Of n bfloat16 numbers the bits of the want-th largest positive one; 0 when fewer have at least the bits `low`. Positive ones sort
// like their bits. Numbers below `low` are passed over many at a time, so a good guess makes this as fast as reading.
long saerad_cut(const uint16_t* pre, long n, long want, long low, long threads) {
    const unsigned least = std::max(1L, low), span = 0x8000u - least;
    const long parts = n < (1 << 18) ? 1 : std::max(1L, threads);         // a thread costs as much as 100,000 numbers
    std::vector<std::vector<unsigned>> counts(parts, std::vector<unsigned>(1 << 15));
    parallel(threads, parts, 1, [&](long p) {
        unsigned* mine = counts[p].data();
        for (long from = n * p / parts, end = n * (p + 1) / parts; from < end; from += 32) {
            const long to = std::min(end, from + 32);
            unsigned any = 0;
            for (long i = from; i < to; ++i) any |= uint16_t(pre[i] - least) < span;
            if (!any) continue;
            for (long i = from; i < to; ++i)
                if (uint16_t(pre[i] - least) < span) ++mine[pre[i]];
        }
    });
    long seen = 0;
    for (long bits = (1 << 15) - 1; bits >= long(least); --bits) {
        for (const auto& one : counts) seen += one[bits];
        if (seen >= want) return bits;
    }
    return 0;
}

// How many entries of each row have at least these bits; with `col`, their columns as well, from ptr[row] on.
void saerad_above(const uint16_t* pre, long rows, long width, long bits, long* count, const long* ptr, int* col, long threads) {
    const unsigned low = std::max(1L, bits), span = 0x8000u - low;
    parallel(threads, rows, std::max(8L, (1 << 17) / width), [&](long i) {
        const uint16_t* row = pre + i * width;
        if (!col) {
            long sum = 0;
            for (long k = 0; k < width; ++k) sum += uint16_t(row[k] - low) < span;
            count[i] = sum;
            return;
        }
        int* out = col + ptr[i];
        for (long from = 0; from < width; from += 32) {
            const long to = std::min(width, from + 32);
            unsigned any = 0;
            for (long k = from; k < to; ++k) any |= uint16_t(row[k] - low) < span;
            if (!any) continue;
            for (long k = from; k < to; ++k)
                if (uint16_t(row[k] - low) < span) *out++ = int(k);
        }
    });
}

// From places by row the same places by column: col_ptr [width + 1], and for each its row and its number by row.
void saerad_transpose(long rows, long width, const long* row_ptr, const int* col, long* col_ptr, int* row, int* number) {
    std::fill(col_ptr, col_ptr + width + 1, 0);
    for (long j = 0; j < row_ptr[rows]; ++j) ++col_ptr[col[j] + 1];
    for (long f = 0; f < width; ++f) col_ptr[f + 1] += col_ptr[f];
    std::vector<long> next(col_ptr, col_ptr + width);
    for (long i = 0; i < rows; ++i)
        for (long j = row_ptr[i]; j < row_ptr[i + 1]; ++j) {
            const long place = next[col[j]]++;
            row[place] = int(i);
            number[place] = int(j);
        }
}

#define BOTH(name, type)                                                                                       \
    void saerad_values_##name(const Step<type>* s, const type* b_enc, type* out) { values(*s, b_enc, out); }   \
    void saerad_measure_##name(const Step<type>* s) { measure(*s); }                                           \
    void saerad_bound_##name(const Step<type>* s) { bound(*s); }                                               \
    void saerad_lengths_##name(const Step<type>* s) { lengths(*s); }                                           \
    void saerad_apply_##name(const Step<type>* s) { apply(*s); }
BOTH(f32, float)
BOTH(f64, double)
}
