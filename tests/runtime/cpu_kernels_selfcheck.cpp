// Runs every path of the codec kernels on buffers of exactly the promised sizes, for the sanitizers to watch, and
// compares each path with the portable one. Exit status 0: all equal.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <vector>

extern "C" int qlora_best_isa();
extern "C" void qlora_dequantize_4bit(
    const uint8_t*, const void*, const float*, const float*, const float*, void*, int64_t, int64_t, int64_t, int, int,
    int, int
);
extern "C" int qlora_has_linear_4bit_small() __attribute__((weak));
extern "C" void qlora_linear_4bit_small(const int64_t*) __attribute__((weak));
extern "C" void qlora_wide_linear_4bit_small(const int64_t*, int);
extern "C" int qlora_has_low_rank() __attribute__((weak));
extern "C" void qlora_lora_down(
    const uint16_t*, int64_t, int64_t, int64_t, const int64_t*, int64_t, uint16_t*, int
) __attribute__((weak));
extern "C" void qlora_lora_up(
    const uint16_t*, int64_t, const void*, int, float, uint16_t*, int64_t, int64_t, int64_t, int, int
) __attribute__((weak));
extern "C" void qlora_lora_backward(
    const uint16_t*, int64_t, const uint16_t*, int64_t, const uint16_t*, int64_t, const void*, int, float, uint16_t*,
    int64_t, void*, int, void*, int, int64_t, int64_t, int64_t, int64_t, int
) __attribute__((weak));
struct Heads {  // these three as in attention_call.cpp.jinja
    const uint16_t* data;
    int64_t batch, head, row;
};
struct Mask {
    const void* data;
    int64_t batch, head, query, dtype;
};
struct Call {
    int64_t B, H, G, L, S, D, E, causal, threads, dtype;
    double scale;
    Heads q, k, v, out;
    float* logsumexp;
    Mask mask;
    Heads dout, dq, dk, dv;
};
extern "C" int qlora_has_attention() __attribute__((weak));
extern "C" void qlora_attention_forward(const Call*) __attribute__((weak));
extern "C" void qlora_attention_backward(const Call*) __attribute__((weak));
extern "C" int qlora_wide_attention_best_isa();
extern "C" void qlora_wide_attention_forward(const Call*, int);
extern "C" void qlora_wide_attention_backward(const Call*, int);
extern "C" int qlora_has_cross_entropy() __attribute__((weak));
extern "C" void qlora_cross_entropy(
    const uint16_t*, const int64_t*, const int64_t*, float*, uint16_t*, int64_t, int64_t, int
) __attribute__((weak));
struct Matrix {  // these three as in wide_gemm.cpp.jinja
    const void* data;
    int64_t dtype, row, column;
};
struct Term {
    Matrix left, right;
    const void* absmax;
    const float *absmax_scale, *absmax_offset, *dynamic_map;
    int64_t quant_type, block_size, K;
    double factor;
};
struct Product {
    void* out;
    int64_t dtype, row, column;
    const void* bias;
    int64_t bias_dtype, M, N, threads, terms;
    Term term[2];
};
extern "C" int qlora_has_wide_gemm() __attribute__((weak));
extern "C" void qlora_wide_gemm(const Product*) __attribute__((weak));
extern "C" void qlora_quantize_4bit(const void*, uint8_t*, float*, int64_t, int64_t, int, int, int, int);
extern "C" void qlora_paged_step(const int64_t*, int64_t, const float*, const void*, const void*, int, int, int, int);

namespace {

uint32_t random_state = 1;
uint32_t random_bits() { return random_state = random_state * 1664525u + 1013904223u; }

template <typename T>
std::unique_ptr<T[]> buffer(int64_t size) {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]());
}

int64_t size_of(int dtype) { return dtype == 0 ? 4 : 2; }

// Random numbers of a few binades: the top bits of each element are a moderate exponent in every format.
std::unique_ptr<uint8_t[]> weights(int64_t numel, int dtype) {
    auto out = buffer<uint8_t>(numel * size_of(dtype));
    for (int64_t i = 0; i < numel; ++i) {
        const float value = (static_cast<float>(random_bits() >> 8) / 8388608.0f - 1.0f) * 3.0f;
        if (dtype == 0) std::memcpy(&out[i * 4], &value, 4);
        const uint16_t half = static_cast<uint16_t>((random_bits() & 0x83ffu) | (dtype == 1 ? 0x3f00u : 0x3400u));
        if (dtype != 0) std::memcpy(&out[i * 2], &half, 2);
    }
    return out;
}

bool check(int64_t numel, int64_t block_size, int quant_type, int dtype, int isa) {
    const int64_t blocks = (numel + block_size - 1) / block_size, groups = (blocks + 255) / 256;
    const int64_t code_bytes = (numel + 1) / 2, out_bytes = numel * size_of(dtype);
    const auto weight = weights(numel, dtype);
    auto codes = buffer<uint8_t>(code_bytes), other_codes = buffer<uint8_t>(code_bytes);
    auto absmax = buffer<float>(blocks), other_absmax = buffer<float>(blocks);
    const auto encode = [&](uint8_t* to, float* scales, int path) {
        qlora_quantize_4bit(weight.get(), to, scales, numel, block_size, quant_type, dtype, path, 2);
    };
    encode(codes.get(), absmax.get(), 0);
    encode(other_codes.get(), other_absmax.get(), isa);
    if (std::memcmp(codes.get(), other_codes.get(), static_cast<size_t>(code_bytes)) != 0) return false;
    if (std::memcmp(absmax.get(), other_absmax.get(), static_cast<size_t>(blocks) * 4) != 0) return false;

    auto scale_codes = buffer<uint8_t>(blocks);
    auto scale = buffer<float>(groups), map = buffer<float>(256), offset = buffer<float>(1);
    for (int64_t i = 0; i < blocks; ++i) scale_codes[i] = static_cast<uint8_t>(random_bits() >> 24);
    for (int64_t i = 0; i < groups; ++i) scale[i] = 0.3f + static_cast<float>(i);
    for (int i = 0; i < 256; ++i) map[i] = static_cast<float>(i - 127) / 128.0f;
    offset[0] = 0.7f;
    for (const bool nested : {false, true}) {
        auto out = buffer<uint8_t>(out_bytes), other = buffer<uint8_t>(out_bytes);
        const void* scales = nested ? static_cast<const void*>(scale_codes.get()) : absmax.get();
        const auto decode = [&](void* to, int path) {
            qlora_dequantize_4bit(
                codes.get(), scales, nested ? scale.get() : nullptr, nested ? offset.get() : nullptr, map.get(), to,
                numel, block_size, numel % 2 ? 0 : int64_t{1} << 40, quant_type, dtype, path, 2
            );
        };
        decode(out.get(), 0);
        decode(other.get(), isa);
        if (std::memcmp(out.get(), other.get(), static_cast<size_t>(out_bytes)) != 0) return false;
    }
    return true;
}

double value_of(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// y = x W^T + bias + 2 h B^T, h = x A^T, against fp64 sums over the decoded weight; weights, A and h are bf16-rounded on
// one side only: 2^-8 of the sum of magnitudes is more than they can differ by. `run` calls one of the kernels.
template <typename Run>
bool check_linear(int64_t M, int64_t N, int64_t K, int64_t block_size, Run run) {
    const int64_t numel = N * K, blocks = numel / block_size, stride = K + 3;
    const auto weight = weights(numel, 0), x_bytes = weights(M * stride, 1);
    auto codes = buffer<uint8_t>(numel / 2);
    auto absmax = buffer<float>(blocks), map = buffer<float>(256);
    auto dense = buffer<float>(numel), y = buffer<float>(M * N);
    constexpr int64_t R = 5;
    const auto a = weights(R * K, 0), b_bytes = weights(N * R, 1), bias = weights(N, 0);
    auto x = buffer<uint16_t>((M - 1) * stride + K), b = buffer<uint16_t>(N * R), h = buffer<uint16_t>(M * R);
    std::memcpy(x.get(), x_bytes.get(), static_cast<size_t>((M - 1) * stride + K) * 2);
    std::memcpy(b.get(), b_bytes.get(), static_cast<size_t>(N * R) * 2);
    qlora_quantize_4bit(weight.get(), codes.get(), absmax.get(), numel, block_size, 0, 0, 0, 2);
    qlora_dequantize_4bit(
        codes.get(), absmax.get(), nullptr, nullptr, map.get(), dense.get(), numel, block_size, 0, 0, 0, 0, 2
    );
    const auto at = [](const void* p) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(p)); };
    const double alpha = 2.0;
    int64_t call[28] = {at(x.get()), stride, at(h.get()), R, at(y.get()), M, 2, 1,  // as cpu_linear.py packs it
                        at(codes.get()), at(absmax.get()), 0, 0, at(map.get()), at(bias.get()),
                        N, K, block_size, 0, 0, 0, 1, at(a.get()), at(b.get()), 0, 0, 1, R, 0};
    std::memcpy(call + 27, &alpha, 8);
    run(call);
    const auto* a_values = reinterpret_cast<const float*>(a.get());
    const auto* bias_values = reinterpret_cast<const float*>(bias.get());
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < N; ++n) {
            double sum = bias_values[n], magnitudes = std::abs(sum);
            const auto add = [&](double product) {
                sum += product;
                magnitudes += std::abs(product);
            };
            for (int64_t k = 0; k < K; ++k) {
                const double value = value_of(x[m * stride + k]);
                add(value * dense[n * K + k]);
                for (int64_t r = 0; r < R; ++r) add(alpha * value * a_values[r * K + k] * value_of(b[n * R + r]));
            }
            if (!(std::abs(sum - y[m * N + n]) <= magnitudes / 256)) return false;
        }
    return true;
}

// The low-rank products on buffers of exactly their sizes: 1 and 3 threads give the same bytes. That they are the right
// ones is what tests/runtime/test_low_rank.py checks.
bool check_low_rank(int64_t M, int64_t N, int64_t K, int64_t R, int dtype) {
    const auto x = weights(M * K, 1), dy = weights(M * N, 1), h = weights(M * R, 1), a = weights(R * K, dtype);
    const auto b = weights(N * R, dtype), old = weights(M * N, 1);
    const auto bf16 = [](const std::unique_ptr<uint8_t[]>& p) { return reinterpret_cast<const uint16_t*>(p.get()); };
    const int64_t sizes[] = {M * R * 2, M * N * 2, M * R * 2, R * K * size_of(dtype), N * R * size_of(dtype)};
    const int64_t factors[] = {reinterpret_cast<int64_t>(a.get()), R, dtype};
    std::unique_ptr<uint8_t[]> out[2][5];
    for (int run = 0; run < 2; ++run) {
        auto& o = out[run];
        for (int i = 0; i < 5; ++i) o[i] = buffer<uint8_t>(sizes[i]);
        const auto to = [&](int i) { return reinterpret_cast<uint16_t*>(o[i].get()); };
        const int threads = 1 + 2 * run;
        std::memcpy(o[1].get(), old.get(), static_cast<size_t>(sizes[1]));
        qlora_lora_down(bf16(x), K, M, K, factors, 1, to(0), threads);
        qlora_lora_up(bf16(h), R, b.get(), dtype, 0.5f, to(1), M, N, R, 1, threads);
        qlora_lora_backward(
            bf16(dy), N, bf16(x), K, bf16(h), R, b.get(), dtype, 0.5f, to(2), R, o[3].get(), dtype, o[4].get(), dtype,
            M, N, K, R, threads
        );
    }
    for (int i = 0; i < 5; ++i)
        if (std::memcmp(out[0][i].get(), out[1][i].get(), static_cast<size_t>(sizes[i])) != 0) return false;
    return true;
}

// Attention on buffers of exactly their sizes, two query heads to a key head: 1 and 3 threads give the same bytes. That
// they are the right ones is what tests/runtime/test_cpu_attention.py checks.
// `run` calls forward and backward.
template <typename Run>
bool check_attention(int64_t L, int64_t S, int64_t D, int64_t E, int64_t mask_dtype, bool causal, int dtype, Run run_both) {
    const int64_t KV = 2, H = 4, item = size_of(dtype);
    const auto q = weights(H * L * D, dtype), k = weights(KV * S * D, dtype), v = weights(KV * S * E, dtype);
    const auto dout = weights(H * L * E, dtype);
    auto mask = mask_dtype == 3 ? buffer<uint8_t>(L * S) : weights(L * S, mask_dtype == 0 ? 0 : 1);
    if (mask_dtype == 3)
        for (int64_t i = 0; i < L * S; ++i) mask[i] = random_bits() >> 31;
    const int64_t sizes[] = {H * L * E * item, H * L * 4, H * L * D * item, KV * S * D * item, KV * S * E * item};
    std::unique_ptr<uint8_t[]> o[2][5];
    for (int run = 0; run < 2; ++run) {
        for (int i = 0; i < 5; ++i) o[run][i] = buffer<uint8_t>(sizes[i]);
        const auto heads = [](const std::unique_ptr<uint8_t[]>& data, int64_t rows, int64_t size) {
            return Heads{reinterpret_cast<const uint16_t*>(data.get()), 0, rows * size, size};
        };
        Call call{1, H, H / KV, L, S, D, E, causal, 1 + 2 * run, dtype, 0.3, heads(q, L, D), heads(k, S, D), heads(v, S, E),
                  heads(o[run][0], L, E), reinterpret_cast<float*>(o[run][1].get()), {}, heads(dout, L, E),
                  heads(o[run][2], L, D), heads(o[run][3], S, D), heads(o[run][4], S, E)};
        if (mask_dtype >= 0) call.mask = {mask.get(), 0, 0, S, mask_dtype};
        run_both(&call);
    }
    for (int i = 0; i < 5; ++i)
        if (std::memcmp(o[0][i].get(), o[1][i].get(), static_cast<size_t>(sizes[i])) != 0) return false;
    return true;
}

// Losses and gradients on buffers of exactly their sizes: 1 thread in place and 3 for rows in order elsewhere give the same
// bytes.
bool check_cross_entropy(int64_t M, int64_t V) {
    const auto logits = weights(M * V, 1);
    auto target = buffer<int64_t>(M);
    for (int64_t m = 0; m < M; ++m) target[m] = random_bits() % V;
    std::unique_ptr<uint8_t[]> z[2], apart = buffer<uint8_t>(M * V * 2);
    std::unique_ptr<float[]> losses[2];
    auto rows = buffer<int64_t>(M);
    for (int64_t m = 0; m < M; ++m) rows[m] = m;
    std::memcpy(apart.get(), logits.get(), static_cast<size_t>(M * V) * 2);
    for (int run = 0; run < 2; ++run) {
        z[run] = buffer<uint8_t>(M * V * 2);
        losses[run] = buffer<float>(M);
        std::memcpy(z[run].get(), logits.get(), static_cast<size_t>(M * V) * 2);
        auto* at = reinterpret_cast<uint16_t*>(z[run].get());
        const auto* from = run == 0 ? at : reinterpret_cast<const uint16_t*>(apart.get());
        const int64_t* which = run == 0 ? nullptr : rows.get();
        qlora_cross_entropy(from, which, target.get(), losses[run].get(), at, M, V, 1 + 2 * run);
    }
    return std::memcmp(z[0].get(), z[1].get(), static_cast<size_t>(M * V) * 2) == 0 &&
           std::memcmp(losses[0].get(), losses[1].get(), static_cast<size_t>(M) * 4) == 0;
}

// x W^T + h B^T and y W + h^T A from exactly sized buffers: one thread and three give the same bytes, and so do codes and
// the dense weight that they mean.
bool check_gemm(int64_t M, int64_t N, int64_t K, int64_t block_size, int dtype) {
    const int64_t numel = N * K, blocks = numel / block_size, R = 5;
    const auto weight = weights(numel, 0), x = weights(M * K, dtype), y = weights(M * N, dtype), h = weights(M * R, 0);
    const auto a = weights(R * K, dtype), b = weights(N * R, 0), bias = weights(std::max(N, K), dtype);
    auto codes = buffer<uint8_t>(numel / 2);
    auto absmax = buffer<float>(blocks), dense = buffer<float>(numel), map = buffer<float>(256);
    qlora_quantize_4bit(weight.get(), codes.get(), absmax.get(), numel, block_size, 0, 0, 0, 2);
    qlora_dequantize_4bit(
        codes.get(), absmax.get(), nullptr, nullptr, map.get(), dense.get(), numel, block_size, 0, 0, 0, 0, 2
    );
    for (const bool forward : {true, false}) {
        const int64_t columns = forward ? N : K, inner = forward ? K : N, bytes = M * columns * size_of(dtype);
        std::unique_ptr<uint8_t[]> out[3];
        for (int run = 0; run < 3; ++run) {
            out[run] = buffer<uint8_t>(bytes);
            const Matrix rows{forward ? x.get() : y.get(), dtype, inner, 1};
            const void* data = run == 2 ? static_cast<const void*>(dense.get()) : codes.get();
            const Matrix w{data, run == 2 ? 0 : -1, forward ? 1 : K, forward ? K : 1};
            const Matrix low = forward ? Matrix{h.get(), 0, R, 1} : Matrix{h.get(), 0, 1, M};
            const Matrix up = forward ? Matrix{b.get(), 0, 1, R} : Matrix{a.get(), dtype, K, 1};
            const Product product{out[run].get(), dtype, columns, 1, bias.get(), dtype, M, columns, 1 + 2 * (run % 2), 2,
                                  {{rows, w, absmax.get(), nullptr, nullptr, map.get(), 0, block_size, inner, 1.0},
                                   {low, up, nullptr, nullptr, nullptr, nullptr, 0, 1, R, -0.5}}};
            qlora_wide_gemm(&product);
        }
        for (int run = 1; run < 3; ++run)
            if (std::memcmp(out[0].get(), out[run].get(), static_cast<size_t>(bytes)) != 0) return false;
    }
    return true;
}

std::vector<char> read(const char* path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

// A sweep over two parameters on buffers of exactly their sizes, twice, so that the second reads the states of the first: 1 and
// 3 threads give the same bytes. That they are the right ones is what tests/runtime/test_paged_optimizer.py checks.
bool check_paged_step(
    int64_t count, int dtype, bool lion, bool narrow, int isa, const std::vector<char>& first, const std::vector<char>& second
) {
    const int64_t counts[] = {count, 300}, states = lion ? 1 : 2, item = size_of(dtype);
    const float numbers[] = {0.99f, 0.1f, 0.999f, 0.001f, 0.9f, 1e-8f, -0.01f, 0.0f};
    std::unique_ptr<uint8_t[]> param[2][2], state[2][2], grad[2];
    for (int i = 0; i < 2; ++i) grad[i] = weights(counts[i], dtype);
    const uint32_t seed = random_state;
    for (int run = 0; run < 2; ++run) {
        int64_t pieces[2][6];
        random_state = seed;
        for (int i = 0; i < 2; ++i) {
            const int64_t blocks = (counts[i] + 255) / 256;
            const int64_t bytes = states * (narrow ? blocks * 260 : counts[i] * 4) + (dtype == 0 ? 0 : counts[i] * 4);
            param[run][i] = weights(counts[i], dtype);
            state[run][i] = buffer<uint8_t>(bytes);
            const auto at = [](const void* p) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(p)); };
            const int64_t piece[] = {at(param[run][i].get()), at(grad[i].get()), at(state[run][i].get()), counts[i], 0, dtype};
            std::copy(piece, piece + 6, pieces[i]);
        }
        for (int step = 0; step < 2; ++step)
            qlora_paged_step(pieces[0], 2, numbers, first.data(), second.data(), lion, narrow, isa, 1 + 2 * run);
    }
    for (int i = 0; i < 2; ++i)
        if (std::memcmp(param[0][i].get(), param[1][i].get(), static_cast<size_t>(counts[i] * item)) != 0) return false;
    return true;
}

}  // namespace

// The two files are the code maps of 8-bit states.
int main(int argc, char** argv) {
    if (argc != 3) return 2;
    const auto first = read(argv[1]), second = read(argv[2]);
    for (int isa = qlora_best_isa(); isa >= -1; --isa)
        for (int dtype = 0; dtype < 3; ++dtype)
            for (const bool lion : {false, true})
                for (const bool narrow : {false, true})
                    for (const int64_t count : {1, 97, 256, 769})
                        if (!check_paged_step(count, dtype, lion, narrow, isa, first, second)) {
                            std::printf("paged step, isa %d dtype %d, %d elements: threads differ\n", isa, dtype,
                                        static_cast<int>(count));
                            return 1;
                        }
    if (qlora_has_wide_gemm && qlora_has_wide_gemm())
        for (const int64_t M : {0, 1, 7, 110})
            for (const int64_t N : {1, 16, 37, 530})
                for (const int64_t K : {32, 96, 1088})
                    for (int dtype = 0; dtype < 3; ++dtype)
                        if (!check_gemm(M, N, K, K % 64 == 0 ? 64 : 32, dtype)) {
                            std::printf("gemm, M %d N %d K %d: other bytes\n", static_cast<int>(M), static_cast<int>(N),
                                        static_cast<int>(K));
                            return 1;
                        }
    if (qlora_has_cross_entropy && qlora_has_cross_entropy())
        for (const int64_t M : {0, 1, 5})
            for (const int64_t V : {1, 31, 32, 20011})
                if (!check_cross_entropy(M, V)) {
                    std::printf("cross-entropy, M %d V %d: threads differ\n", static_cast<int>(M), static_cast<int>(V));
                    return 1;
                }
    const auto bf16_attention = [](const Call* call) {
        qlora_attention_forward(call);
        qlora_attention_backward(call);
    };
    const bool has_bf16 = qlora_has_attention && qlora_has_attention();
    for (const int64_t L : {1, 33, 130})
        for (const int64_t S : {1, 64, 67})
            for (const int64_t D : {1, 32, 35})
                for (const int64_t E : {1, 33})
                    for (const int64_t mask_dtype : {-1, 0, 1, 2, 3}) {
                        bool same = !has_bf16 || check_attention(L, S, D, E, mask_dtype, L % 2 == 0, 1, bf16_attention);
                        const int dtype = static_cast<int>((L + S + mask_dtype + 1) % 3);
                        for (int isa = 0; isa <= qlora_wide_attention_best_isa(); ++isa)
                            same = same && check_attention(L, S, D, E, mask_dtype, L % 2 == 0, dtype, [=](const Call* call) {
                                qlora_wide_attention_forward(call, isa);
                                qlora_wide_attention_backward(call, isa);
                            });
                        if (!same) {
                            std::printf("attention, L %d S %d D %d E %d: threads differ\n", static_cast<int>(L),
                                        static_cast<int>(S), static_cast<int>(D), static_cast<int>(E));
                            return 1;
                        }
                    }

    if (qlora_has_low_rank && qlora_has_low_rank())
        for (const int64_t M : {0, 1, 130})
            for (const int64_t N : {1, 47, 288})
                for (const int64_t K : {1, 35, 290})
                    for (const int64_t R : {1, 8, 17, 40})
                        for (const int dtype : {0, 1})
                            if (!check_low_rank(M, N, K, R, dtype)) {
                                std::printf("low rank, M %d N %d K %d R %d: threads differ\n", static_cast<int>(M),
                                            static_cast<int>(N), static_cast<int>(K), static_cast<int>(R));
                                return 1;
                            }
    const bool has_linear = qlora_has_linear_4bit_small && qlora_has_linear_4bit_small();
    for (const int64_t M : {1, 3, 8, 9, 17})
        for (const int64_t N : {1, 5, 21})
            for (const int64_t block_size : {32, 64, 256})
                for (const int64_t K : {1, 3, 4}) {
                    bool right = !has_linear || check_linear(M, N, K * block_size, block_size, qlora_linear_4bit_small);
                    for (int isa = qlora_best_isa(); isa >= 0; --isa)
                        right = right && check_linear(M, N, K * block_size, block_size, [=](const int64_t* call) {
                            qlora_wide_linear_4bit_small(call, isa);
                        });
                    if (!right) {
                        std::printf("linear, M %d N %d: wrong\n", static_cast<int>(M), static_cast<int>(N));
                        return 1;
                    }
                }
    for (int isa = qlora_best_isa(); isa >= 0; --isa)
        for (int dtype = 0; dtype < 3; ++dtype)
            for (int quant_type = 0; quant_type < 2; ++quant_type)
                for (const int64_t block_size : {32, 64, 4096})
                    for (const int64_t numel : {0, 1, 33, 197, 4096, 20011})
                        if (!check(numel, block_size, quant_type, dtype, isa)) {
                            std::printf("isa %d dtype %d type %d: %lld values differ\n", isa, dtype, quant_type,
                                        static_cast<long long>(numel));
                            return 1;
                        }
    return 0;
}
