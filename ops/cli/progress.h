// progress.h: a job's events as one live line on a terminal, or as plain lines elsewhere.
#ifndef DITFLEET_CLI_PROGRESS_H
#define DITFLEET_CLI_PROGRESS_H

#include <stdbool.h>
#include <stdio.h>

#include "proto/job.h"

enum { PROGRESS_BYTES = 120 };

struct progress {
    FILE *to;
    bool terminal;
    char shown[PROGRESS_BYTES]; // what stands on the line, or was printed last
    char milestone[32];         // plain lines: of the event printed last
    uint64_t time_ms;           // of the newest event
};

// What one event says, in a line without its end: "denoise  [####      ]  8/20  eta 4 s". With bar false the bar is
// left out. Returns out.
const char *progress_text(const Ditfleet__V1__Event *e, bool bar, char out[PROGRESS_BYTES]);

// Shows the event. Events that were shown already, as a reader that starts over gets them, change nothing. Without a
// terminal: a line for each stage and each tenth of the steps.
void progress_event(struct progress *p, const Ditfleet__V1__Event *e);

// Takes the live line away; what follows starts on a clean line.
void progress_clear(struct progress *p);

#endif
