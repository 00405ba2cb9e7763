// Inner loops of attention.py: B rows, T positions, S cache slots, H heads, K key/value heads,
// D head width.
#include "native.h"

// x (heads, D) turned by rotary positions in place; cos, sin (D), sin negative for its first half;
// sign -1 turns back.
INLINE void rotate(float *x, long heads, long D, const float *cos, const float *sin, float sign) {
    for (long h = 0; h < heads; h++, x += D)
        for (long i = 0; i < D / 2; i++) {
            float a = x[i], b = x[i + D / 2];
            x[i] = a * cos[i] + sign * b * sin[i];
            x[i + D / 2] = b * cos[i + D / 2] + sign * a * sin[i + D / 2];
        }
}

// qkv (tokens, (H + 2 K) D) -> q (B, H, T, D) and k, v (B, K, S, D), turned; back: the other way,
// which is its gradient. Token n is place at[n] of the flattened (B, T), and goes to slot slots[n];
// NULL: place n, and the slot of its position. cos, sin: (B, T, D) or, with rope_rows 1, (1, T, D);
// NULL: no rotary positions.
void split_heads(void *qkv, int half, long tokens, const int64_t *at, const int64_t *slots, long T,
                 long S, long H, long K, long D, const void *cos, const void *sin, int rope_half,
                 long rope_rows, void *q, void *k, void *v, int back) {
    long width = (H + 2 * K) * D;
#pragma omp parallel for schedule(static) WORTH_THREADS(tokens *width)
    for (long n = 0; n < tokens; n++) {
        long place = at ? at[n] : n, b = place / T, t = place % T, slot = slots ? slots[n] : t;
        float x[width], c[D], s[D];
        if (cos) {
            long from = (rope_rows == 1 ? t : place) * D;
            load(c, AT(cos, rope_half, from), rope_half, D);
            load(s, AT(sin, rope_half, from), rope_half, D);
        }
        void *token = AT(qkv, half, n * width);
        if (!back) {
            load(x, token, half, width);
            if (cos) rotate(x, H + K, D, c, s, 1);
        }
        for (long h = 0; h < H + 2 * K; h++) {
            long kv = h < H + K ? h - H : h - H - K;
            void *one = h < H ? AT(q, half, ((b * H + h) * T + t) * D)
                              : AT(h < H + K ? k : v, half, ((b * K + kv) * S + slot) * D);
            if (back)
                load(x + h * D, one, half, D);
            else
                store(one, x + h * D, half, D);
        }
        if (back) {
            if (cos) rotate(x, H + K, D, c, s, -1);
            store(token, x, half, width);
        }
    }
}

// y (tokens, H D) <-> heads (B, H, T, D).
void merge_heads(void *y, int half, long tokens, const int64_t *at, long T, long H, long D,
                 void *heads, int back) {
#pragma omp parallel for schedule(static) WORTH_THREADS(tokens *H *D)
    for (long n = 0; n < tokens; n++) {
        long place = at ? at[n] : n, b = place / T, t = place % T;
        for (long h = 0; h < H; h++) {
            char *one = AT(heads, half, ((b * H + h) * T + t) * D),
                 *all = AT(y, half, (n * H + h) * D);
            __builtin_memcpy(back ? one : all, back ? all : one, BYTES(half) * D);
        }
    }
}

INLINE void attend_row(int half, const float *q, long D, const void *keys, const void *values,
                       const void *mask, int mask_half, long used, float *scores, void *y) {
    long first = 0;
    // What is seen has no gaps.
    while (used > 1 && element(mask, mask_half, used - 1) < -1e30f) used--;
    while (first < used && element(mask, mask_half, first) < -1e30f) first++;
    float most = -__builtin_inff(), sum = 0, out[D];
    // At the end the last ones again and again, rather than a loop for what is left over.
    for (long s = first; s < used; s += 4) {
        long a = s, b = s + 1 < used ? s + 1 : a, c = s + 2 < used ? s + 2 : b,
             d = s + 3 < used ? s + 3 : c;
        float w = 0, x = 0, y = 0, z = 0;
#pragma omp simd reduction(+ : w, x, y, z)
        for (long i = 0; i < D; i++) {
            w += q[i] * element(keys, half, a * D + i);
            x += q[i] * element(keys, half, b * D + i);
            y += q[i] * element(keys, half, c * D + i);
            z += q[i] * element(keys, half, d * D + i);
        }
        scores[a] = w, scores[b] = x, scores[c] = y, scores[d] = z;
    }
#pragma omp simd reduction(max : most)
    for (long s = first; s < used; s++) most = scores[s] > most ? scores[s] : most;
#pragma omp simd reduction(+ : sum)
    for (long s = first; s < used; s++) sum += scores[s] = exponential(scores[s] - most);
    for (long i = 0; i < D; i++) out[i] = 0;
    for (long s = first; s < used; s++)
        for (long i = 0; i < D; i++) out[i] += scores[s] * element(values, half, s * D + i);
    for (long i = 0; i < D; i++) out[i] /= sum;
    store(y, out, half, D);
}

INLINE void attend_row_of(int half, const float *q, long D, const void *keys, const void *values,
                          const void *mask, int mask_half, long used, float *scores, void *y) {
    if (D == 64)  // loops of known length are twice as fast
        attend_row(half, q, 64, keys, values, mask, mask_half, used, scores, y);
    else if (D == 32)
        attend_row(half, q, 32, keys, values, mask, mask_half, used, scores, y);
    else
        attend_row(half, q, D, keys, values, mask, mask_half, used, scores, y);
}

// One new token a row: qkv (B, (H + 2 K) D); its key and value go to slot slots[b] of keys, values
// (B, K, S, D), then its queries attend to the first `used` slots. cos, sin (B, D) or NULL; mask
// (B, used) is 0 or -inf; y (B, H D).
void attend_one(const void *qkv, int half, long B, long S, long H, long K, long D, const void *cos,
                const void *sin, int rope_half, void *keys, void *values, const int64_t *slots,
                const void *mask, int mask_half, long used, void *y) {
    long group = H / K;
    float scale = 1 / __builtin_sqrtf(D);
#pragma omp parallel for schedule(static) WORTH_THREADS(B *K *used *D)
    for (long n = 0; n < B * K; n++) {
        long b = n / K, head = n % K;
        float x[(group + 2) * D], c[D], s[D], scores[used];
        const void *token = AT(qkv, half, b * (H + 2 * K) * D);
        load(x, AT(token, half, head * group * D), half, group * D);
        load(x + group * D, AT(token, half, (H + head) * D), half, D);
        load(x + (group + 1) * D, AT(token, half, (H + K + head) * D), half, D);
        if (cos) {
            load(c, AT(cos, rope_half, b * D), rope_half, D);
            load(s, AT(sin, rope_half, b * D), rope_half, D);
            rotate(x, group + 1, D, c, s, 1);
        }
        char *k = AT(keys, half, n * S * D), *v = AT(values, half, n * S * D);
        store(AT(k, half, slots[b] * D), x + group * D, half, D);
        store(AT(v, half, slots[b] * D), x + (group + 1) * D, half, D);
        for (long i = 0; i < group * D; i++) x[i] *= scale;
        for (long g = 0; g < group; g++) {
            const void *allowed = AT(mask, mask_half, b * used);
            void *to = AT(y, half, (b * H + head * group + g) * D);
            if (half)
                attend_row_of(1, x + g * D, D, k, v, allowed, mask_half, used, scores, to);
            else
                attend_row_of(0, x + g * D, D, k, v, allowed, mask_half, used, scores, to);
        }
    }
}

// Of attention's backward pass: in place, scores (rows, T, T) = q k' -> p = softmax(scale *
// scores), and their gradient g = dy v' -> scale * p * (g - sum(p g)). Row t sees the first t + 1
// columns, or where mask (mask_rows, T, T) is not -inf: matrix r the mask r / (rows / mask_rows).
// Elsewhere both are zero.
void attention_scores(void *scores, int half, void *g, const void *mask, int mask_half,
                      long mask_rows, float scale, long rows, long T) {
#pragma omp parallel for schedule(static) WORTH_THREADS(rows *T *T)
    for (long n = 0; n < rows * T; n++) {
        long t = n % T, seen = mask ? T : t + 1;
        float p[T], d[T], most = -__builtin_inff(), sum = 0, mean = 0;
        load(p, AT(scores, half, n * T), half, seen);
        load(d, AT(g, half, n * T), half, seen);
        if (mask) {
            const void *bias = AT(mask, mask_half, (n / T / (rows / mask_rows) * T + t) * T);
            for (long i = 0; i < T; i++) p[i] = p[i] * scale + element(bias, mask_half, i);
        } else
            for (long i = 0; i < seen; i++) p[i] *= scale;
#pragma omp simd reduction(max : most)
        for (long i = 0; i < seen; i++) most = p[i] > most ? p[i] : most;
#pragma omp simd reduction(+ : sum, mean)
        for (long i = 0; i < seen; i++) {
            sum += p[i] = exponential(p[i] - most);
            mean += p[i] * d[i];
        }
        mean /= sum;
        for (long i = 0; i < seen; i++) {
            p[i] /= sum;
            d[i] = scale * p[i] * (d[i] - mean);
        }
        for (long i = seen; i < T; i++) p[i] = d[i] = 0;
        store(AT(scores, half, n * T), p, half, T);
        store(AT(g, half, n * T), d, half, T);
    }
}
