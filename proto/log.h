// log.h: structured log lines (logfmt) on a file descriptor.
//
//   ts=2026-11-22T17:50:01.123Z level=info prog=worker rank=0 event=job.claimed job=abc epoch=3
//
// One line is one write(2), so lines of several threads and processes do not mix. Prompts, header values and other
// secrets never appear; text that came from outside goes through the "%s" of a quoted value: key="%s".
#ifndef DITFLEET_LOG_H
#define DITFLEET_LOG_H

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

// Who writes. Set up once in main and passed down; never changed afterwards.
struct log {
    int fd;               // 2 in production
    enum log_level level; // lines below it are dropped
    const char *prog;     // "worker", "supervisor"
    int rank;             // -1: no rank field
};

// event is a dotted name; format gives further key=value pairs, separated by spaces, or "". A NULL log drops the line.
// Quotes, backslashes and control characters inside the formatted text of a "%s" must not break the line: every
// control character becomes '?'.
void log_line(const struct log *log, enum log_level level, const char *event, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

// "debug", "info", "warn", "error" -> level; -1 for anything else.
int log_level_parse(const char *name);

#endif
