// clock.h: the clock of deadlines and durations.
#ifndef DITFLEET_CLOCK_H
#define DITFLEET_CLOCK_H

#include <time.h>

// CLOCK_MONOTONIC in seconds.
static inline double monotonic_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif
