/* Copies many pieces between two mapped pools in one call, without the interpreter lock.
 *
 * Called by kvtransfer.native. One call instead of one per block: a caller that gives up the
 * interpreter lock for every piece of 64 KiB may wait a switch interval for it after each.
 *
 * Large copies write around the cache: a pool is larger than any cache, and a store that allocates a
 * line first reads it from memory, which costs a third of the bandwidth. Small ones stay in the cache,
 * where the next step of the engine finds them.
 */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define VERSION 1

enum {
    STREAM_FROM = 1 << 20, /* bytes of a call: below, everything fits a core's share of the cache */
    STREAM_PIECE = 4096,   /* bytes of a piece: below, heads and tails cost what the stores save */
    SLICE = 4 << 20,       /* bytes between two looks at `stop`: below 1 ms */
    PREFETCH = 1024,       /* bytes ahead: the best of 512, 1024 and 2048 */
};

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void stream_avx2(uint8_t *to, const uint8_t *from, int64_t size) {
    int64_t head = (int64_t)(-(uintptr_t)to & 31);
    memcpy(to, from, (size_t)head);
    int64_t at = head;
    for (; at + 128 <= size; at += 128) {
        _mm_prefetch((const char *)from + at + PREFETCH, _MM_HINT_NTA);
        _mm_prefetch((const char *)from + at + PREFETCH + 64, _MM_HINT_NTA);
        const __m256i *source = (const __m256i *)(from + at);
        __m256i *target = (__m256i *)(to + at);
        __m256i a = _mm256_loadu_si256(source), b = _mm256_loadu_si256(source + 1);
        __m256i c = _mm256_loadu_si256(source + 2), d = _mm256_loadu_si256(source + 3);
        _mm256_stream_si256(target, a);
        _mm256_stream_si256(target + 1, b);
        _mm256_stream_si256(target + 2, c);
        _mm256_stream_si256(target + 3, d);
    }
    memcpy(to + at, from + at, (size_t)(size - at));
}
#endif

static void copy_piece(uint8_t *to, const uint8_t *from, int64_t size, int stream) {
#if defined(__x86_64__)
    if (stream && size >= STREAM_PIECE) {
        stream_avx2(to, from, size);
        return;
    }
#endif
    (void)stream;
    memcpy(to, from, (size_t)size);
}

EXPORT int32_t dfkv_version(void) { return VERSION; }

/* Copies `count` pieces; `pieces` holds (source offset, target offset, bytes) of each. Returns the
 * bytes copied: fewer than all if `*stop` became non-zero. All stores are visible to other cores
 * before it returns. */
EXPORT int64_t dfkv_copy(uint8_t *target, const uint8_t *source, const int64_t *pieces, int64_t count,
                         const volatile int32_t *stop) {
    int64_t total = 0, done = 0;
    for (int64_t i = 0; i < count; i++) total += pieces[3 * i + 2];
    int stream = 0;
#if defined(__x86_64__)
    stream = total >= STREAM_FROM && __builtin_cpu_supports("avx2");
#endif
    int64_t looked = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *from = source + pieces[3 * i];
        uint8_t *to = target + pieces[3 * i + 1];
        int64_t left = pieces[3 * i + 2];
        while (left > 0) {
            if (done - looked >= SLICE) {
                looked = done;
                if (*stop) goto out;
            }
            int64_t size = left < SLICE ? left : SLICE;
            copy_piece(to, from, size, stream);
            from += size;
            to += size;
            left -= size;
            done += size;
        }
    }
out:
#if defined(__x86_64__)
    if (stream) _mm_sfence();
#endif
    __sync_synchronize();
    return done;
}
