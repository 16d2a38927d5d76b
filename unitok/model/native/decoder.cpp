// The decoder's pass and the sampling of a stretch of tokens, for CPUs. native.py builds it and documents what it computes.
//
// A matrix [n, k] is stored in panels of outputs, each [k, PANEL], so that a product needs no sums across lanes and reads memory in
// order. A pass is a sequence of phases; the threads take the items of a phase (panels, heads, rows) one by one, and a phase ends when
// all of its items are done. So a thread that the system has stopped delays the others by its own item at most.
//
// Letters: C hidden_size, H query heads, G key-value heads, D head_dim, N rows (tokens) of a pass, V tokens of the vocabulary.

#include <algorithm>
#include <atomic>
#ifdef UNITOK_PROFILE
#include <chrono>
#endif
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 64;   // rows that go through all layers together
constexpr int SPINS = 2000; // how often a thread looks for work before it lets others run
// Numbers of a vector: as many as a register holds, because GCC turns longer ones into single numbers. Outputs of a panel and rows of a
// tile: as many sums as there are registers for.
#if defined(__AVX512F__)
constexpr int LANES = 16, PANEL = 64, TILE = 6;
#elif defined(__AVX2__)
constexpr int LANES = 8, PANEL = 32, TILE = 2;
#else
constexpr int LANES = 4, PANEL = 16, TILE = 2;
#endif
constexpr int VECTORS = PANEL / LANES;

typedef float Lanes __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));

struct bf16 {
    uint16_t bits;
};

inline Lanes load(const float *p) { return *reinterpret_cast<const Lanes *>(p); }
// Compilers turn the general conversions into many instructions, so that those of x86 are named.
inline Lanes load(const bf16 *p) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
    return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16);
#else
    return (Lanes)(__builtin_convertvector(*reinterpret_cast<const Halves *>(p), Words) << 16); // the same bits
#endif
}
inline Lanes load(const int8_t *p) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
#elif defined(__AVX2__)
    return (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
#else
    return __builtin_convertvector(*reinterpret_cast<const Bytes *>(p), Lanes);
#endif
}
inline void store(float *p, Lanes x) { *reinterpret_cast<Lanes *>(p) = x; }

inline float number(float x) { return x; }
inline float number(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}
inline void put(const float *from, float *to, int n) { std::memcpy(to, from, n * sizeof(float)); }
inline void put(const float *from, bf16 *to, int n) { // the nearest, of two that are equally near the even one
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        std::memcpy(&bits, from + i, sizeof bits);
        to[i].bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
}

// In halves, because one after the other each addition waits for the last.
inline float sum(Lanes x) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[LANES / 4];
    std::memcpy(parts, &x, sizeof x);
    for (int n = LANES / 8; n; n /= 2)
        for (int i = 0; i < n; i++) parts[i] += parts[i + n];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// e^x for x in [-87, 88], relative error 2e-7 (Cephes' polynomial); below, 0.
inline Lanes exponential(Lanes x) {
    const Lanes low = Lanes{} - 87.0f, high = Lanes{} + 88.0f;
    const Ints tiny = x < low;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Lanes magic = Lanes{} + 12582912.0f; // adding 1.5 * 2^23 rounds to the nearest whole number
    const Lanes n = (x * 1.44269504f + magic) - magic;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = x * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    p = p * (Lanes)((__builtin_convertvector(n, Ints) + 127) << 23); // times 2^n
    return tiny ? Lanes{} : p;
}

template <class T> inline float dot(const float *a, const T *b, int n) {
    Lanes total = {};
    int i = 0;
    for (; i + LANES <= n; i += LANES) total += load(a + i) * load(b + i);
    float rest = 0;
    for (; i < n; i++) rest += a[i] * number(b[i]);
    return sum(total) + rest;
}

// ---- What Python passes: the same order and types as in native.py --------------------------------------------------------

struct Matrix {
    const void *panels; // null: no such matrix
    const float *scale; // of each output, for int8
    const float *bias;  // or null
    int32_t n, k, bytes, unused; // bytes of a weight: 4 fp32, 2 bfloat16, 1 int8
};

// Parts of a span position (unitok/span_positions.py): the position, and where frame, row and column begin, and what they are at most.
constexpr int64_t POSITION = (1 << 20) - 1, AXES[3][2] = {{20, (1 << 15) - 1}, {35, (1 << 14) - 1}, {49, (1 << 14) - 1}};

struct Layer {
    Matrix qkv, out, gate_up, down;
    const float *gain, *shift;                 // of the QK-norm, [H + G, D]; null: none. A shift makes it a LayerNorm
    const float *after_attention, *after_mlp;  // gains of norms after; null: norms before, gains multiplied into the matrices
};

struct Model {
    int32_t layers, width, heads, groups, head_dim, span_positions, positions;
    int32_t span_rotation; // every second pair by the position in a span (1), or by frame, row and column (2)
    float eps;
    const Layer *layer;
    const float *embedding, *span_embedding, *norm, *rotation; // rotation: [positions, D / 2, 2], cosine and sine
    Matrix head;
};

struct Cache { // [layers, slots, G, length, D] each
    void *keys, *values;
    int64_t layer_stride, slot_stride, length;
    int32_t bytes, unused; // of a number: 4 fp32, 2 bfloat16
};

struct Tokens { // N of them
    const int64_t *ids, *positions, *span_positions;
    const int32_t *slots;
    int32_t count, once; // once: no slot has more than one of them
};

struct Params {
    float temperature, top_p, min_p, penalty;
    int32_t top_k, own, none, media; // slots: its own, and what guidance compares with; equal ones: nothing
};

struct Stretch {
    int32_t count, requests, slots, unused;
    const int32_t *owner;          // request of each slot
    const int32_t *set;            // [count, requests], number of the allowed set
    const int32_t *set_start;      // where a set's intervals begin; one more than sets
    const int32_t *intervals;      // [a, b) pairs
    const int32_t *union_;         // [count], number of the union
    const int32_t *union_start;    // where a union's panels begin
    const int32_t *panels;         // panels of the head
    const Params *params;          // [requests]
    const float *scales;           // [count, requests, 2]
    const double *uniform;         // [count, requests]
    const int64_t *positions, *span_positions; // [count, slots]
    uint8_t *seen;                 // [requests, V] or null
    int64_t *sampled;              // [count, requests]
    float *hidden;                 // [slots, C], before and after
};

// ---- Threads --------------------------------------------------------------------------------------------------------------

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Worker; // one thread's view of a job

enum Phase { EMBED, QKV, PLACE, ATTEND, OUT, MLP, DOWN, NORM, HEAD, SAMPLE, PHASES };
#ifdef UNITOK_PROFILE // benchmarks/step.py compiles it so
double seconds[PHASES] = {};
inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
#endif

struct Team {
    std::atomic<uint64_t> ticket{1 << 24};      // number of the phase << 24 | the next item
    alignas(64) std::atomic<uint32_t> done{0};  // items
    alignas(64) std::atomic<uint64_t> posted{0}, active{0};
    alignas(64) std::atomic<int> inside{0};
    void (*work)(Worker &, void *) = nullptr;
    void *argument = nullptr;
    uint64_t first_phase = 1;
    int threads = 1, started = 1;
    std::mutex one_at_a_time;
    pid_t process = getpid();

    void run(int count, void (*function)(Worker &, void *), void *data);
    void serve(int number);
};

struct Worker {
    Team *team = nullptr;
    uint64_t phase = 0;
    uint64_t prepared = 0;        // phase of which `input` is
    bool first = false;           // whether it is the thread that was asked
    std::vector<float> input = {}; // rows after a norm
    std::vector<float> scores = {};
    std::vector<std::pair<float, int32_t>> order = {};
    std::vector<float> logits = {}, other = {}, third = {};
    std::vector<int32_t> ids = {};

    // Take part in a phase until all of its items are done.
    template <class F> void each(Phase kind, uint32_t items, F item) {
#ifdef UNITOK_PROFILE
        const double began = now();
        take(items, item);
        if (first) seconds[kind] += now() - began;
#else
        (void)kind;
        take(items, item);
#endif
    }

    template <class F> void take(uint32_t items, F item) {
        const uint64_t mine = phase++ & ((uint64_t(1) << 40) - 1);
        uint64_t t = team->ticket.load(std::memory_order_acquire);
        while ((t >> 24) == mine) {
            if ((t & 0xffffff) >= items) {
                for (int spins = 0; ((t = team->ticket.load(std::memory_order_acquire)) >> 24) == mine; spins++)
                    spins < SPINS ? pause() : std::this_thread::yield();
                return;
            }
            if (!team->ticket.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel)) continue;
            item(int(t & 0xffffff));
            if (team->done.fetch_add(1, std::memory_order_acq_rel) + 1 == items) {
                team->done.store(0, std::memory_order_relaxed);
                team->ticket.store((mine + 1) << 24, std::memory_order_release);
                return;
            }
            t = team->ticket.load(std::memory_order_acquire);
        }
    }
};

void Team::serve(int number) {
    Worker worker{this};
    for (uint64_t known = 0;;) {
        for (int spins = 0; posted.load(std::memory_order_acquire) == known && spins < SPINS; spins++) pause();
        posted.wait(known, std::memory_order_acquire);
        known = posted.load(std::memory_order_acquire);
        inside.fetch_add(1);
        if (active.load() == known && number < threads) {
            worker.phase = first_phase, worker.prepared = 0;
            work(worker, argument);
        }
        inside.fetch_sub(1);
    }
}

void Team::run(int count, void (*function)(Worker &, void *), void *data) {
    static thread_local Worker own;
    try {
        for (; started < count; started++) std::thread(&Team::serve, this, started).detach();
    } catch (const std::system_error &) { // no more threads: those that there are do all of it
    }
    work = function, argument = data, threads = count, first_phase = ticket.load() >> 24;
    own.first = true, own.team = this, own.phase = first_phase, own.prepared = 0;
    const uint64_t job = posted.load() + 1;
    active.store(job);
    posted.store(job);
    if (count > 1) posted.notify_all();
    function(own, data);
    active.store(0); // who has not begun need not begin; who has, is waited for
    for (int spins = 0; inside.load() != 0; spins++) spins < SPINS ? pause() : std::this_thread::yield();
}

Team &team() { // never freed: its threads live as long as the process; a forked process makes its own
    static Team *known = nullptr;
    static std::mutex making;
    std::lock_guard<std::mutex> lock(making);
    if (!known || known->process != getpid()) known = new Team;
    return *known;
}

// ---- Products -------------------------------------------------------------------------------------------------------------

// Sums of R rows of x [R, k] with one panel, in the order of k, so that they do not depend on what other rows there are.
template <int R, class W> inline void tile(const W *w, int k, const float *x, int stride, Lanes (&sums)[R][VECTORS]) {
    for (int i = 0; i < k; i++) {
        Lanes weights[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) weights[v] = load(w + i * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sums[r][v] += weights[v] * x[r * stride + i];
    }
}

template <int R, class W, class F>
inline int tiles(const W *w, int k, const float *x, int stride, int row, int rows, const F &take) {
    for (; row + R <= rows; row += R) {
        Lanes sums[R][VECTORS] = {};
        tile<R>(w, k, x + int64_t(row) * stride, stride, sums);
        for (int r = 0; r < R; r++) take(row + r, sums[r]);
    }
    return row;
}

template <class W, class F> void panel_of(const W *w, int k, const float *x, int stride, int rows, const F &take) {
    int row = tiles<TILE>(w, k, x, stride, 0, rows, take);
    if constexpr (TILE > 4) row = tiles<4>(w, k, x, stride, row, rows, take);
    if constexpr (TILE > 2) row = tiles<2>(w, k, x, stride, row, rows, take);
    tiles<1>(w, k, x, stride, row, rows, take);
}

// One panel of x [rows, k] times a matrix: take(row, its outputs), with scale and bias.
template <class F> void multiply(const Matrix &m, int panel, const float *x, int stride, int rows, const F &take) {
    const int64_t first = int64_t(panel) * PANEL, at = first * m.k;
    const auto finish = [&](int row, Lanes (&sums)[VECTORS]) {
        for (int v = 0; v < VECTORS; v++) {
            if (m.scale) sums[v] *= load(m.scale + first + v * LANES);
            if (m.bias) sums[v] += load(m.bias + first + v * LANES);
        }
        take(row, sums);
    };
    if (m.bytes == 4) panel_of(static_cast<const float *>(m.panels) + at, m.k, x, stride, rows, finish);
    else if (m.bytes == 2) panel_of(static_cast<const bf16 *>(m.panels) + at, m.k, x, stride, rows, finish);
    else panel_of(static_cast<const int8_t *>(m.panels) + at, m.k, x, stride, rows, finish);
}

inline int panels_of(const Matrix &m) { return (m.n + PANEL - 1) / PANEL; }

void normalize(const float *x, float *out, int n, float eps, const float *gain) {
    const float by = 1 / std::sqrt(dot(x, x, n) / n + eps);
    if (gain) for (int i = 0; i < n; i++) out[i] = x[i] * by * gain[i];
    else for (int i = 0; i < n; i++) out[i] = x[i] * by;
}

// ---- A pass ---------------------------------------------------------------------------------------------------------------

struct Buffers { // of N rows
    int width, qkv_width, mlp_width, heads_width;
    std::vector<float> x, y, qkv, attended, gated, logits;

    Buffers(const Model &m, int rows) {
        const auto whole = [](int n) { return (n + PANEL - 1) / PANEL * PANEL; };
        const Layer &l = m.layer[0];
        width = whole(m.width), qkv_width = whole(l.qkv.n), mlp_width = whole(l.gate_up.n) / 2, heads_width = m.heads * m.head_dim;
        x.resize(rows * width), y.resize(rows * width), qkv.resize(rows * qkv_width);
        attended.resize(rows * heads_width), gated.resize(rows * mlp_width);
    }
};

// Norm, rotation and a place in the cache for the queries, the key and the value of one group.
void place(const Model &m, const Layer &l, float *qkv, const Cache &cache, int64_t keys_at, int group, int64_t position, int64_t span_position) {
    const int d = m.head_dim, per = m.heads / m.groups;
    const float *rotation = m.rotation + std::min<int64_t>(position, m.positions - 1) * d;
    const float *by_span[3]; // of every second pair, in turn
    for (int k = 0; k < 3; k++) {
        const int64_t axis = m.span_rotation == 2 ? span_position >> AXES[k][0] & AXES[k][1] : span_position & POSITION;
        by_span[k] = m.span_rotation ? m.rotation + std::min<int64_t>(axis, m.positions - 1) * d : rotation;
    }
    for (int h = 0; h <= per; h++) {
        const int head = h < per ? group * per + h : m.heads + group;
        float *q = qkv + head * d;
        if (l.shift) {
            float mean = 0, square = 0;
            for (int i = 0; i < d; i++) mean += q[i];
            mean /= d;
            for (int i = 0; i < d; i++) square += (q[i] - mean) * (q[i] - mean);
            const float by = 1 / std::sqrt(square / d + 1e-5f);
            for (int i = 0; i < d; i++) q[i] = (q[i] - mean) * by * l.gain[head * d + i] + l.shift[head * d + i];
        } else if (l.gain) {
            normalize(q, q, d, m.eps, l.gain + head * d);
        }
        const auto rotate = [&](const float *by, int first, int step) {
            for (int i = first; i < d; i += step) {
                const float a = q[i], b = q[i + 1], c = by[i], s = by[i + 1];
                q[i] = a * c - b * s, q[i + 1] = a * s + b * c;
            }
        };
        rotate(rotation, 0, 4);
        for (int k = 0; k < 3; k++) rotate(by_span[k], 2 + 4 * k, 12);
    }
    const auto keep = [&](auto *keys, auto *values) {
        put(qkv + (m.heads + group) * d, keys + keys_at + position * d, d);
        put(qkv + (m.heads + m.groups + group) * d, values + keys_at + position * d, d);
    };
    if (cache.bytes == 4) keep(static_cast<float *>(cache.keys), static_cast<float *>(cache.values));
    else keep(static_cast<bf16 *>(cache.keys), static_cast<bf16 *>(cache.values));
}

// Attention of one query over the first `extent` positions.
template <class T>
void attend(const float *q, const T *keys, const T *values, int64_t extent, int d, float *out, std::vector<float> &scores) {
    scores.resize((extent + LANES - 1) / LANES * LANES);
    const float scale = 1 / std::sqrt(float(d));
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t p = 0; p < extent; p++) {
        scores[p] = dot(q, keys + p * d, d) * scale;
        most = std::max(most, scores[p]);
    }
    for (size_t p = extent; p < scores.size(); p++) scores[p] = -std::numeric_limits<float>::infinity();
    Lanes total = {};
    for (size_t p = 0; p < scores.size(); p += LANES) {
        const Lanes e = exponential(load(&scores[p]) - most);
        store(&scores[p], e);
        total += e;
    }
    const float by = 1 / sum(total);
    int i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES) {
        Lanes a = {}, b = {}, c = {}, e = {};
        for (int64_t p = 0; p < extent; p++) {
            const T *v = values + p * d + i;
            a += load(v) * scores[p], b += load(v + LANES) * scores[p], c += load(v + 2 * LANES) * scores[p], e += load(v + 3 * LANES) * scores[p];
        }
        store(out + i, a * by), store(out + i + LANES, b * by), store(out + i + 2 * LANES, c * by), store(out + i + 3 * LANES, e * by);
    }
    for (; i + LANES <= d; i += LANES) {
        Lanes a = {};
        for (int64_t p = 0; p < extent; p++) a += load(values + p * d + i) * scores[p];
        store(out + i, a * by);
    }
    for (; i < d; i++) {
        float a = 0;
        for (int64_t p = 0; p < extent; p++) a += number(values[p * d + i]) * scores[p];
        out[i] = a * by;
    }
}

// The rows after a norm, in memory of this thread, made once per phase; the rows themselves where norms come after.
const float *normalized(const Model &m, const Buffers &b, Worker &w, int rows, bool after) {
    if (after) return b.x.data();
    if (w.prepared != w.phase) {
        w.prepared = w.phase;
        w.input.resize(rows * b.width);
        for (int r = 0; r < rows; r++) normalize(&b.x[r * b.width], &w.input[r * b.width], m.width, m.eps, nullptr);
    }
    return w.input.data();
}

// x += the product of `from`; the product is normalized first where norms come after.
void add_product(const Model &m, Phase kind, const Matrix &matrix, const float *from, int stride, const float *gain, Buffers &b, Worker &w, int rows) {
    float *to = gain ? b.y.data() : b.x.data();
    w.each(kind, panels_of(matrix), [&](int panel) {
        multiply(matrix, panel, from, stride, rows, [&](int row, Lanes (&sums)[VECTORS]) {
            float *at = to + row * b.width + panel * PANEL;
            for (int v = 0; v < VECTORS; v++) store(at + v * LANES, gain ? sums[v] : sums[v] + load(at + v * LANES));
        });
    });
    if (gain)
        w.each(NORM, rows, [&](int row) {
            float *y = &b.y[row * b.width], *x = &b.x[row * b.width];
            normalize(y, y, m.width, m.eps, gain);
            for (int i = 0; i < m.width; i++) x[i] += y[i];
        });
}

// At most BLOCK tokens -> hidden states [N, C].
void pass(const Model &m, const Cache &cache, const Tokens &t, float *hidden, Buffers &b, Worker &w) {
    const int rows = t.count, d = m.head_dim, per = m.heads / m.groups;
    w.each(EMBED, rows, [&](int r) {
        float *x = &b.x[r * b.width];
        std::memcpy(x, m.embedding + t.ids[r] * m.width, m.width * sizeof(float));
        if (m.span_positions) {
            const float *add = m.span_embedding + std::min<int64_t>(t.span_positions[r] & POSITION, m.span_positions - 1) * m.width;
            for (int i = 0; i < m.width; i++) x[i] += add[i];
        }
    });
    for (int number = 0; number < m.layers; number++) {
        const Layer &l = m.layer[number];
        w.each(QKV, panels_of(l.qkv), [&](int panel) {
            const float *x = normalized(m, b, w, rows, l.after_attention);
            multiply(l.qkv, panel, x, b.width, rows, [&](int row, Lanes (&sums)[VECTORS]) {
                for (int v = 0; v < VECTORS; v++) store(&b.qkv[row * b.qkv_width + panel * PANEL + v * LANES], sums[v]);
            });
        });
        const auto at = [&](int item) {
            return number * cache.layer_stride + t.slots[item / m.groups] * cache.slot_stride + item % m.groups * cache.length * d;
        };
        const auto placed = [&](int item) {
            const int row = item / m.groups;
            place(m, l, &b.qkv[row * b.qkv_width], cache, at(item), item % m.groups, t.positions[row], t.span_positions[row]);
        };
        const auto attended = [&](int item) {
            const int row = item / m.groups, group = item % m.groups;
            const auto from = [&](const auto *keys, const auto *values) {
                for (int h = group * per; h < (group + 1) * per; h++)
                    attend(&b.qkv[row * b.qkv_width + h * d], keys + at(item), values + at(item), t.positions[row] + 1, d,
                           &b.attended[row * b.heads_width + h * d], w.scores);
            };
            if (cache.bytes == 4) from(static_cast<const float *>(cache.keys), static_cast<const float *>(cache.values));
            else from(static_cast<const bf16 *>(cache.keys), static_cast<const bf16 *>(cache.values));
        };
        if (!t.once) w.each(PLACE, rows * m.groups, placed);
        w.each(ATTEND, rows * m.groups, [&](int item) {
            if (t.once) placed(item);
            attended(item);
        });
        add_product(m, OUT, l.out, b.attended.data(), b.heads_width, l.after_attention, b, w, rows);
        w.each(MLP, panels_of(l.gate_up), [&](int panel) {
            const float *x = normalized(m, b, w, rows, l.after_mlp);
            multiply(l.gate_up, panel, x, b.width, rows, [&](int row, Lanes (&sums)[VECTORS]) {
                for (int v = 0; v < VECTORS / 2; v++) { // the first half of a panel is gates
                    const Lanes gate = sums[v], up = sums[v + VECTORS / 2];
                    store(&b.gated[row * b.mlp_width + panel * PANEL / 2 + v * LANES], gate / (1.0f + exponential(-gate)) * up);
                }
            });
        });
        add_product(m, DOWN, l.down, b.gated.data(), b.mlp_width, l.after_mlp, b, w, rows);
    }
    w.each(NORM, rows, [&](int r) { normalize(&b.x[r * b.width], hidden + int64_t(r) * m.width, m.width, m.eps, m.norm); });
}

// Panels of the head for hidden states [rows, C] -> logits [rows, V rounded up].
void logits_of(const Model &m, const float *hidden, int rows, const int32_t *panels, int count, float *logits, Worker &w) {
    const int64_t stride = int64_t(panels_of(m.head)) * PANEL;
    w.each(HEAD, count, [&](int item) {
        const int panel = panels[item];
        multiply(m.head, panel, hidden, m.width, rows, [&](int row, Lanes (&sums)[VECTORS]) {
            for (int v = 0; v < VECTORS; v++) store(logits + row * stride + panel * PANEL + v * LANES, sums[v]);
        });
    });
}

// ---- Sampling: as sample/sampling.py ----------------------------------------------------------------------------------------

void log_softmax(std::vector<float> &x) {
    const float most = *std::max_element(x.begin(), x.end());
    double total = 0;
    for (float v : x) total += std::exp(v - most);
    const float less = most + float(std::log(total));
    for (float &v : x) v -= less;
}

void gather(const float *logits, const std::vector<int32_t> &ids, std::vector<float> &out) {
    out.resize(ids.size());
    for (size_t i = 0; i < ids.size(); i++) out[i] = logits[ids[i]];
}

// Set all but the likeliest tokens that together reach probability p to -inf.
void keep_top_p(std::vector<float> &x, double temperature, float p, std::vector<std::pair<float, int32_t>> &order) {
    order.clear();
    for (size_t i = 0; i < x.size(); i++)
        if (!std::isinf(x[i])) order.emplace_back(x[i], int32_t(i));
    std::stable_sort(order.begin(), order.end(), [](const auto &a, const auto &b) { return a.first > b.first; });
    double total = 0, before = 0;
    for (const auto &pair : order) total += std::exp((pair.first - order[0].first) / temperature);
    for (const auto &pair : order) {
        if (before >= p) x[pair.second] = -std::numeric_limits<float>::infinity();
        before += std::exp((pair.first - order[0].first) / temperature) / total;
    }
}

int32_t sample(Worker &w, const Params &p, double uniform) {
    std::vector<float> &x = w.logits;
    const size_t likeliest = std::max_element(x.begin(), x.end()) - x.begin();
    const float infinity = std::numeric_limits<float>::infinity(), most = x[likeliest];
    if (p.temperature == 0) return w.ids[likeliest];
    const double temperature = std::max(p.temperature, 1e-6f);
    if (p.top_k && size_t(p.top_k) < x.size()) {
        w.other = x;
        std::nth_element(w.other.begin(), w.other.begin() + p.top_k - 1, w.other.end(), std::greater<float>());
        const float least = w.other[p.top_k - 1];
        for (float &v : x) v = v < least ? -infinity : v;
    }
    if (p.top_p < 1) keep_top_p(x, temperature, p.top_p, w.order);
    if (p.min_p > 0)
        for (float &v : x) v = v / temperature < most / temperature + std::log(p.min_p) ? -infinity : v;
    double total = 0, before = 0;
    for (float v : x) total += std::isinf(v) ? 0 : std::exp((double(v) - most) / temperature);
    for (size_t i = 0; i < x.size(); i++) {
        if (std::isinf(x[i])) continue;
        before += std::exp((double(x[i]) - most) / temperature);
        if (before > uniform * total) return w.ids[i];
    }
    return w.ids[likeliest];
}

// Sample token `i` of one request from the logits of its slots.
void sample_one(const Stretch &s, int i, int request, const float *logits, int64_t stride, int vocab, Worker &w) {
    const Params &p = s.params[request];
    const int set = s.set[i * s.requests + request];
    w.ids.clear();
    for (int pair = s.set_start[set]; pair < s.set_start[set + 1]; pair++)
        for (int id = s.intervals[2 * pair]; id < s.intervals[2 * pair + 1]; id++) w.ids.push_back(id);
    gather(logits + p.own * stride, w.ids, w.logits);
    const float *scale = s.scales + (int64_t(i) * s.requests + request) * 2;
    if (p.none != p.own) {
        log_softmax(w.logits);
        gather(logits + p.none * stride, w.ids, w.other);
        log_softmax(w.other);
        if (p.media != p.none) {
            gather(logits + p.media * stride, w.ids, w.third);
            log_softmax(w.third);
            for (size_t j = 0; j < w.ids.size(); j++)
                w.logits[j] = w.other[j] + scale[1] * (w.third[j] - w.other[j]) + scale[0] * (w.logits[j] - w.third[j]);
        } else if (scale[0] != 1) {
            for (size_t j = 0; j < w.ids.size(); j++) w.logits[j] = w.other[j] + scale[0] * (w.logits[j] - w.other[j]);
        }
    }
    uint8_t *seen = s.seen ? s.seen + int64_t(request) * vocab : nullptr;
    if (seen && p.penalty != 1) {
        log_softmax(w.logits);
        for (size_t j = 0; j < w.ids.size(); j++)
            if (seen[w.ids[j]]) w.logits[j] *= p.penalty;
    }
    const int32_t id = sample(w, p, s.uniform[i * s.requests + request]);
    s.sampled[i * s.requests + request] = id;
    if (seen) seen[id] = 1;
}

} // namespace

// ---- What Python calls ------------------------------------------------------------------------------------------------------

extern "C" {

// Outputs of a panel.
int unitok_panel() { return PANEL; }

#ifdef UNITOK_PROFILE
// Seconds by phase since the last call, of the thread that asks.
void unitok_seconds(double *out) { std::memcpy(out, seconds, sizeof(seconds)), std::fill(seconds, seconds + PHASES, 0.0); }
#endif

// Tokens -> hidden states [N, C].
void unitok_pass(const Model *m, const Cache *cache, const Tokens *tokens, float *hidden, int threads) {
    struct Job {
        const Model &m;
        const Cache &cache;
        const Tokens &tokens;
        float *hidden;
        Buffers buffers;
    } job{*m, *cache, *tokens, hidden, Buffers(*m, std::min(tokens->count, BLOCK))};
    Team &all = team();
    std::lock_guard<std::mutex> lock(all.one_at_a_time);
    all.run(threads, [](Worker &w, void *data) {
        Job &j = *static_cast<Job *>(data);
        for (int at = 0; at < j.tokens.count; at += BLOCK) {
            Tokens t = j.tokens;
            t.count = std::min(BLOCK, t.count - at);
            t.ids += at, t.positions += at, t.slots += at, t.span_positions += at;
            pass(j.m, j.cache, t, j.hidden + int64_t(at) * j.m.width, j.buffers, w);
        }
    }, &job);
}

// Hidden states [rows, C] -> logits [rows, V rounded up to whole panels], of the given panels alone.
void unitok_logits(const Model *m, const float *hidden, int rows, const int32_t *panels, int count, float *logits, int threads) {
    struct Job {
        const Model &m;
        const float *hidden;
        int rows;
        const int32_t *panels;
        int count;
        float *logits;
    } job{*m, hidden, rows, panels, count, logits};
    Team &all = team();
    std::lock_guard<std::mutex> lock(all.one_at_a_time);
    all.run(threads, [](Worker &w, void *data) {
        Job &j = *static_cast<Job *>(data);
        logits_of(j.m, j.hidden, j.rows, j.panels, j.count, j.logits, w);
    }, &job);
}

// Sample a stretch; the model runs on all of its tokens but the last.
void unitok_stretch(const Model *m, const Cache *cache, const Stretch *stretch, int threads) {
    struct Job {
        const Model &m;
        const Cache &cache;
        const Stretch &s;
        Buffers buffers;
        std::vector<float> logits;
        std::vector<int64_t> ids;
        std::vector<int32_t> slots;
    } job{*m, *cache, *stretch, Buffers(*m, std::min(stretch->slots, BLOCK)), {}, {}, {}};
    const int64_t stride = int64_t(panels_of(m->head)) * PANEL;
    job.logits.resize(stretch->slots * stride), job.ids.resize(stretch->slots);
    for (int i = 0; i < stretch->slots; i++) job.slots.push_back(i);
    Team &all = team();
    std::lock_guard<std::mutex> lock(all.one_at_a_time);
    all.run(threads, [](Worker &w, void *data) {
        Job &j = *static_cast<Job *>(data);
        const Stretch &s = j.s;
        const int64_t stride = int64_t(panels_of(j.m.head)) * PANEL;
        for (int i = 0; i < s.count; i++) {
            const int32_t *first = s.union_start + s.union_[i];
            logits_of(j.m, s.hidden, s.slots, s.panels + first[0], first[1] - first[0], j.logits.data(), w);
            w.each(SAMPLE, s.requests, [&](int request) { sample_one(s, i, request, j.logits.data(), stride, j.m.head.n, w); });
            if (i + 1 == s.count) return;
            w.each(SAMPLE, 1, [&](int) {
                for (int slot = 0; slot < s.slots; slot++) j.ids[slot] = s.sampled[i * s.requests + s.owner[slot]];
            });
            for (int at = 0; at < s.slots; at += BLOCK) {
                const int64_t token = int64_t(i) * s.slots + at;
                const Tokens t{j.ids.data() + at, s.positions + token, s.span_positions + token, j.slots.data() + at,
                               std::min(BLOCK, s.slots - at), 1};
                pass(j.m, j.cache, t, s.hidden + int64_t(at) * j.m.width, j.buffers, w);
            }
        }
    }, &job);
}

} // extern "C"
