// watch.h: what tile.c tells sanitizers of the memory it reads and writes, a range at once. Its loops are compiled
// without them (CMakeLists.txt): looking at each number takes four times the time of all of a model.
#ifndef DITFLEET_WATCH_H
#define DITFLEET_WATCH_H

#include <stdint.h>

#if defined(DITFLEET_WATCH_ADDRESS)
void __asan_loadN(void *at, unsigned long bytes);
void __asan_storeN(void *at, unsigned long bytes);
#define WATCH_READ  __asan_loadN
#define WATCH_WRITE __asan_storeN
#elif defined(DITFLEET_WATCH_THREAD)
void __tsan_read_range(void *at, unsigned long bytes);
void __tsan_write_range(void *at, unsigned long bytes);
#define WATCH_READ  __tsan_read_range
#define WATCH_WRITE __tsan_write_range
#else
#define WATCH_READ(at, bytes)  ((void)(at), (void)(bytes))
#define WATCH_WRITE(at, bytes) ((void)(at), (void)(bytes))
#endif

// rows of `bytes` each, `apart` bytes from one to the next
static inline void watch_reads(const void *at, int64_t rows, int64_t apart, int64_t bytes)
{
    for (int64_t r = 0; r < rows && bytes > 0; r++)
        WATCH_READ((char *)at + r * apart, (unsigned long)bytes);
}

static inline void watch_writes(void *at, int64_t rows, int64_t apart, int64_t bytes)
{
    for (int64_t r = 0; r < rows && bytes > 0; r++)
        WATCH_WRITE((char *)at + r * apart, (unsigned long)bytes);
}

#undef WATCH_READ
#undef WATCH_WRITE

#endif
