// msg.h: what supervisor and worker tell each other, one datagram of MSG_BYTES over a SOCK_SEQPACKET socketpair.
//
//   worker -> supervisor   HELLO once, READY once weights are loaded and a warm-up ran, BEAT every MSG_BEAT_SECONDS
//   from
//                          HELLO on (and at once when the stage changes), BYE before it exits by itself
//   supervisor -> worker   DRAIN: stop claiming, finish or release, BYE, exit 0
//
// A worker exits within a second of EOF on this socket: its supervisor is gone.
// msg_parse takes bytes, checks all of them and never trusts a length or an enum.
#ifndef DITFLEET_MSG_H
#define DITFLEET_MSG_H

#include <stddef.h>
#include <stdint.h>

#include "proto/err.h"

#define MSG_VERSION        1
#define MSG_BYTES          256
#define MSG_JOB_BYTES      160 // of an id, NUL included; longer ones are cut
#define MSG_REASON_BYTES   200 // of a reason, NUL included; longer ones are cut
#define MSG_BEAT_SECONDS   1.0
#define MSG_SILENT_SECONDS 5.0 // no BEAT for so long: hung

// Exit status of a worker that would fail the same way again (configuration, model missing or corrupt).
#define EXIT_DO_NOT_RESTART 125

enum msg_kind { MSG_HELLO = 1, MSG_READY, MSG_BEAT, MSG_BYE, MSG_DRAIN, MSG_KINDS };

enum stage {
    STAGE_STARTING, // before the first weight is read
    STAGE_LOADING,
    STAGE_IDLE, // the one stage in which no progress is no hang
    STAGE_TEXT,
    STAGE_DENOISE,
    STAGE_DECODE,
    STAGE_PNG,
    STAGE_UPLOAD,
    STAGE_DRAINING,
    STAGE_EXITING,
    STAGES,
};

struct msg {
    enum msg_kind kind;
    int32_t pid;                   // HELLO
    enum stage stage;              // BEAT
    uint32_t step, steps;          // BEAT: of the denoise loop
    uint64_t progress;             // BEAT: grows with every step, tensor loaded, chunk uploaded
    double busy_seconds;           // BEAT: device-seconds spent on jobs since the start; finite, not negative
    char job[MSG_JOB_BYTES];       // BEAT: "" when none
    char reason[MSG_REASON_BYTES]; // BYE
};

const char *stage_name(enum stage stage); // "denoise"

// Writes exactly MSG_BYTES.
void msg_format(const struct msg *m, uint8_t bytes[MSG_BYTES]);
// ERR_CORRUPT for a wrong size, magic, kind or value, ERR_UNSUPPORTED for another version (both versions named).
int msg_parse(const uint8_t *bytes, size_t n, struct msg *m, struct err *err);

// Sends without blocking. ERR_UNAVAILABLE: the peer is gone. ERR_TIMEOUT: its queue is full (a BEAT may be dropped).
int msg_send(int fd, const struct msg *m, struct err *err);
// Receives one message. ERR_TIMEOUT: none there (fd non-blocking). ERR_UNAVAILABLE: EOF. Else as msg_parse.
int msg_receive(int fd, struct msg *m, struct err *err);

#endif
