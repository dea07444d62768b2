#include "proto/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *const level_names[] = {"debug", "info", "warn", "error"};

int log_level_parse(const char *name)
{
    for (int i = 0; i < 4; i++)
        if (strcmp(name, level_names[i]) == 0)
            return i;
    return -1;
}

void log_line(const struct log *log, enum log_level level, const char *event, const char *format, ...)
{
    if (!log || level < log->level)
        return;
    char line[2048];
    const int room = (int)sizeof line - 1; // one byte is kept for the newline
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    int n = (int)strftime(line, sizeof line, "ts=%Y-%m-%dT%H:%M:%S", &utc);
    n += snprintf(line + n, (size_t)(room - n), ".%03ldZ level=%s prog=%s", now.tv_nsec / 1000000, level_names[level],
                  log->prog);
    if (log->rank >= 0)
        n += snprintf(line + n, (size_t)(room - n), " rank=%d", log->rank);
    n += snprintf(line + n, (size_t)(room - n), " event=%s ", event);
    va_list args;
    va_start(args, format);
    n += vsnprintf(line + n, (size_t)(room - n), format, args);
    va_end(args);
    if (n >= room)
        n = room - 1;
    for (int i = 0; i < n; i++)
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = '?';
    while (n > 0 && line[n - 1] == ' ')
        n--;
    line[n++] = '\n';
    // A log line that cannot be written has nobody left to tell.
    ssize_t ignored = write(log->fd, line, (size_t)n);
    (void)ignored;
}
